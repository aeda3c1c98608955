"""Whether samples are of the classes that the data have, in the shares that the data have them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from coterie.runs.build import build_source
from coterie.runs.feature_networks import read_labels
from coterie.runs.judges.base import batches
from coterie.runs.trained_run import LoadedRun

REAL = 1000  # real pictures that are read for the floor


def class_shares(run: LoadedRun, made: Tensor) -> dict[str, Any]:
    """Of pictures ``made`` [S, ...] as a classifier of the whole data reads them; {} unless the
    data are some classes of others, or where there is no classifier.

    ``in_classes``: share that is of the run's classes. ``class_distance``: total variation between
    the classes of the samples and those of the data. Floors are what held-out pictures reach.
    """
    kept = getattr(run.source, "classes", None)
    seen = None if kept is None else read_labels(run.config.data.whole, made)
    if kept is None or seen is None:
        return {}
    real = batches(build_source(run.config, "held_out"), 250, REAL)
    fresh = read_labels(run.config.data.whole, torch.cat([batch.x for batch in real]))
    known = [batch.cond.label for batch in real if batch.cond.label is not None]
    assert fresh is not None
    count = run.source.num_classes
    truth = _shares(torch.cat(known), count)
    found, floor = _shares(seen, count), _shares(fresh, count)
    rows = list(kept)
    return {
        "in_classes": {"value": float(found[rows].sum()), "floor": float(floor[rows].sum())},
        "class_distance": {
            "value": float((found - truth).abs().sum()) / 2.0,
            "floor": float((floor - truth).abs().sum()) / 2.0,
        },
    }


def _shares(labels: Tensor, count: int) -> Tensor:
    return torch.bincount(labels, minlength=count).double() / len(labels)
