"""Metrics of generated pictures against real ones, each with the value between two real sets."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from coterie.core.errors import DataError, describe
from coterie.core.rng import numpy_generator
from coterie.encoders.features import Features
from coterie.metrics.frechet import frechet_distance
from coterie.metrics.kernel import kid_unbiased
from coterie.metrics.manifold import precision_recall

FEWEST = 4  # pictures in a set


def evaluate_images(
    features: Features,
    generated: Tensor,
    real_train: Tensor,
    real_held_out: Tensor,
    seed: int = 0,
) -> dict[str, Any]:
    """Frechet and kernel distance, precision and recall of ``generated`` against ``real_train``.

    All are f32 [S, C, H, W] in [-1, 1]. The smallest of the three sets gives ``n``; the others are
    thinned to ``n`` rows drawn by ``seed``. JSON-ready: ``extractor``, ``n`` and, per metric,
    ``value`` and ``floor`` (and standard errors for the kernel distance).
    """
    count = min(len(generated), len(real_train), len(real_held_out))
    if count < FEWEST:
        raise DataError(describe("number of pictures", count, f"at least {FEWEST} in each set"))
    sets = {"generated": generated, "real": real_train, "held_out": real_held_out}
    rows = {name: features(_thin(name, images, count, seed)) for name, images in sets.items()}
    made, floor = (_measure(rows[name], rows["real"]) for name in ("generated", "held_out"))
    report: dict[str, Any] = {"extractor": features.name, "n": count}
    for name, (value, stderr) in made.items():
        report[name] = {"value": value, "floor": floor[name][0]}
        if stderr is not None:
            report[name] |= {"stderr": stderr, "floor_stderr": floor[name][1]}
    return report


def format_evaluation(report: dict[str, Any]) -> str:
    """A small table for people."""
    lines = [f"n = {report['n']}, features: {report['extractor']}"]
    lines.append(f"{'metric':<12}{'generated':>14}{'real (floor)':>14}")
    for name, entry in report.items():
        if isinstance(entry, dict):
            lines.append(f"{name:<12}{entry['value']:>14.4g}{entry['floor']:>14.4g}")
    return "\n".join(lines)


def _thin(name: str, images: Tensor, count: int, seed: int) -> Tensor:
    rows = numpy_generator(seed, "evaluate", name).permutation(len(images))[:count]
    return images[torch.from_numpy(np.sort(rows))]


def _measure(rows: np.ndarray, real: np.ndarray) -> dict[str, tuple[float, float | None]]:
    kid = kid_unbiased(rows, real)
    share = precision_recall(rows, real)
    return {
        "frechet": (frechet_distance(rows, real), None),
        "kid": (kid.value, kid.stderr),
        "precision": (share.precision, None),
        "recall": (share.recall, None),
    }
