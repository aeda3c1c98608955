"""Routing metrics as plain numbers, over all routers of a model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from coterie.inspect import (
    Amounts,
    Trace,
    analyse,
    analyse_amounts,
    analyse_pairs,
    analyse_pools,
    label_name,
)

MOST_CLASSES = 40
"""With more classes than this there is no number for each of them."""


def routing_measures(trace: Trace, class_names: Sequence[str] = ()) -> dict[str, float]:
    """Means over the routers of a model, and how the first differs from the last; {} for a dense
    one."""
    items = analyse(trace)
    if not items:
        return {}
    out = {
        "load_cv": float(np.mean([item.cv for item in items])),
        "load_entropy": float(np.mean([item.entropy for item in items])),
        "dead_experts": float(sum(len(item.dead) for item in items)),
        "always_on_per_layer": sum(len(item.always_on) for item in items) / len(items),
    }
    certain = [item.confidence for item in items if np.isfinite(item.confidence)]
    if certain:
        out["gate_entropy"] = float(np.mean(certain))
    first, last = (
        {k: v.corrected for k, v in i.information.items()} for i in (items[0], items[-1])
    )
    for facet, bits in first.items():
        out[f"{facet}_bits_first"] = bits
        out[f"{facet}_bits_last"] = last.get(facet, 0.0)
    if {"noise", "position", "class"} <= set(first):
        place = first["noise"] + first["position"]
        out["place_minus_class_bits_first"] = place - first["class"]
        out["position_bits_fade"] = first["position"] - last["position"]
    return out | _amounts(analyse_amounts(trace), class_names) | _pairs(trace) | _pools(trace)


def _amounts(amounts: Sequence[Amounts], class_names: Sequence[str]) -> dict[str, float]:
    """Experts per row: mean over routers, of the first and the last layer, and of each class."""
    layers = [item.place.layer for item in amounts]
    places = {"_first": min(layers), "_last": max(layers)}
    out = {"experts_per_row": _mean([item.mean for item in amounts])}
    for name, layer in places.items():
        here = [item.mean for item in amounts if item.place.layer == layer]
        out[f"experts_per_row{name}"] = _mean(here)
    known = max(len(item.by_class) for item in amounts)
    for label in range(known if known <= MOST_CLASSES else 0):
        of_class = [item.by_class[label] for item in amounts if label < len(item.by_class)]
        out[f"experts_per_row/{label_name(label, class_names)}"] = _mean(of_class)
    return {name: value for name, value in out.items() if np.isfinite(value)}


def _mean(values: Sequence[float]) -> float:
    """Of the finite ones; NaN without any."""
    finite = [value for value in values if np.isfinite(value)]
    return float(np.mean(finite)) if finite else float("nan")


def _pairs(trace: Trace) -> dict[str, float]:
    """Between neighbours: first choices of adjacent layers, common experts of adjacent rounds."""
    pairs = analyse_pairs(trace)
    told = [p.information.corrected for p in pairs if p.kind == "layer" and p.information]
    kept = [p.overlap for p in pairs if p.kind == "round" and np.isfinite(p.overlap)]
    out = {"adjacent_bits": float(np.mean(told))} if told else {}
    return out | ({"round_overlap": float(np.mean(kept))} if kept else {})


def _pools(trace: Trace) -> dict[str, float]:
    """Load of experts over all that use them; what layers of a shared pool keep to their own."""
    pools = [pool for pool in analyse_pools(trace) if pool.counts.any()]
    worst = [float(pool.imbalance.max()) for pool in pools]
    own = [share for pool in pools if pool.shared for share in pool.own_shares.values()]
    out = {"lbv_max": float(np.mean(worst))} if worst else {}
    return out | ({"own_share": float(np.mean(own))} if own else {})
