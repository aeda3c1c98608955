"""Accuracy and calibration of a router's predicted classes."""

from __future__ import annotations

import numpy as np

from coterie.core.errors import DataError, describe

BINS = 10


def match_experts(use_SE: np.ndarray, labels_S: np.ndarray, num_classes: int) -> np.ndarray:
    """i64 [E]: the class whose rows use an expert most on average."""
    mean_CE = np.stack(
        [
            use_SE[labels_S == label].mean(0) if (labels_S == label).any() else 0 * use_SE[0]
            for label in range(num_classes)
        ]
    )
    matched: np.ndarray = mean_CE.argmax(0)
    return matched


def class_probabilities(
    use_SE: np.ndarray, expert_classes_E: np.ndarray, num_classes: int
) -> np.ndarray:
    """f64 [S, C]: share of a row's use that goes to the experts of each class."""
    use = np.asarray(use_SE, dtype=np.float64)
    by_class = use @ np.eye(num_classes)[expert_classes_E]
    whole = by_class.sum(1, keepdims=True)
    return np.where(whole > 0, by_class / np.where(whole > 0, whole, 1), 1 / num_classes)


def calibration_error(probs_SC: np.ndarray, labels_S: np.ndarray, bins: int = BINS) -> float:
    """Expected calibration error (arXiv:1706.04599): over equal bins of the largest probability,
    the mean distance between that probability and how often it was right."""
    probs, labels = np.asarray(probs_SC, dtype=np.float64), np.asarray(labels_S)
    if probs.ndim != 2 or len(probs) != len(labels) or not len(labels):
        found = f"{probs.shape} for {labels.shape}"
        raise DataError(describe("probs_SC", found, "[S, C] for [S], S at least 1"))
    if not np.isfinite(probs).all():
        raise DataError("probs_SC: holds NaN or infinity")
    confidence, right = probs.max(1), probs.argmax(1) == labels
    where = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [
        abs(float((confidence[where == b] - right[where == b]).mean())) * float((where == b).mean())
        for b in np.unique(where)
    ]
    return float(sum(gaps))


def router_calibration(
    use_SE: np.ndarray, labels_S: np.ndarray, num_classes: int
) -> tuple[float, float]:
    """(accuracy, expected calibration error) of a router as a classifier of rows: experts are
    matched to classes on the even rows, and judged on the odd ones."""
    matched = match_experts(use_SE[::2], labels_S[::2], num_classes)
    probs_SC = class_probabilities(use_SE[1::2], matched, num_classes)
    labels = labels_S[1::2]
    return float((probs_SC.argmax(1) == labels).mean()), calibration_error(probs_SC, labels)
