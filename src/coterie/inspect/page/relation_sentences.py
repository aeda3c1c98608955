"""Sentences about experts per row, experts that follow each other, and experts of tasks or
classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from coterie.inspect.phrases import bits, label_name, listing
from coterie.inspect.statistics.accumulators import Place
from coterie.inspect.statistics.experts_per_row import Amounts, analyse_amounts
from coterie.inspect.statistics.formulas import Array
from coterie.inspect.statistics.pairs import PairStats, analyse_pairs
from coterie.inspect.statistics.pools import PoolStats, analyse_pools
from coterie.inspect.statistics.trace import Trace

FEW = 4
"""Up to so many layers get a sentence each."""
WORTH_SAYING = 0.05
"""A relative difference in experts per row below this is not mentioned."""


def relation_sentences(trace: Trace, class_names: Sequence[str] = ()) -> list[str]:
    """Empty for a dense model."""
    return [
        *amount_sentences(analyse_amounts(trace), class_names),
        *pair_sentences(analyse_pairs(trace)),
        *pool_sentences(analyse_pools(trace)),
    ]


def amount_sentences(amounts: Sequence[Amounts], class_names: Sequence[str] = ()) -> list[str]:
    """Only about routers whose rows use different numbers of experts."""
    varying = [item for item in amounts if item.varies]
    if not varying:
        return []
    out = []
    if len(varying) > 1:
        least, most = (f(varying, key=lambda item: item.mean) for f in (min, max))
        out.append(
            f"A row uses {most.mean:.2g} experts in layer {most.name} and {least.mean:.2g} in "
            f"layer {least.name}; 95 of 100 rows use at most {most.p95} and {least.p95}."
        )
    else:
        (only,) = varying
        out.append(
            f"A row uses {only.mean:.2g} experts in layer {only.name}; 95 of 100 rows use at "
            f"most {only.p95}."
        )
    for item in _widest(varying, {item.place: item.by_class for item in varying}):
        seen = [
            i for i in np.argsort(item.by_class, kind="stable") if np.isfinite(item.by_class[i])
        ]
        told = seen if len(seen) <= FEW else [seen[0], seen[-1]]
        parts = [f"{item.by_class[i]:.2g} for {label_name(int(i), class_names)}" for i in told]
        what = "by class" if len(seen) <= FEW else "for the classes with the fewest and the most"
        out.append(f"Experts per row in layer {item.name} {what}: {listing(parts)}.")
    ends = {item.place: _ends(item.by_noise) for item in varying}
    for item in _widest(varying, ends):
        first, last = ends[item.place]
        out.append(
            f"Layer {item.name} uses {first:.2g} experts near the data and {last:.2g} where "
            "the noise is strongest."
        )
    return out


def _widest(items: Sequence[Amounts], values: Mapping[Place, Array]) -> list[Amounts]:
    """Routers whose ``values`` differ most, in order of depth; [] where none do."""
    telling = [item for item in items if _spread(values[item.place]) > WORTH_SAYING]
    best = sorted(telling, key=lambda item: -_spread(values[item.place]))[:FEW]
    return sorted(best, key=lambda item: item.place)


def _ends(values: Array) -> Array:
    """The first and the last known value; [] for fewer than two."""
    known = values[np.isfinite(values)]
    return known[[0, -1]] if known.size > 1 else known[:0]


def _spread(values: Array) -> float:
    """(largest - smallest) / smallest; 0 for fewer than two."""
    known = values[np.isfinite(values)]
    if known.size < 2:
        return 0.0
    return float((known.max() - known.min()) / max(known.min(), 1e-9))


def pair_sentences(pairs: Sequence[PairStats]) -> list[str]:
    out = []
    rounds = [pair for pair in pairs if pair.kind == "round" and np.isfinite(pair.overlap)]
    if 0 < len(rounds) <= FEW:
        out += [
            f"In layer {pair.names[0]}, {pair.overlap:.0%} of the experts of round "
            f"{pair.second.round} also answered in round {pair.first.round} (by chance "
            f"{pair.chance:.0%})."
            for pair in rounds
        ]
    elif rounds:
        overlap, chance = (np.mean([getattr(p, n) for p in rounds]) for n in ("overlap", "chance"))
        out.append(
            f"From one round to the next {overlap:.0%} of the experts stay (by chance "
            f"{chance:.0%}), mean of {len(rounds)} pairs of rounds."
        )
    between = [(p, p.information) for p in pairs if p.kind == "layer" and p.information]
    if not between:
        return out
    told = [info.corrected if info.measurable else 0.0 for _, info in between]
    best = int(np.argmax(told))
    if told[best] == 0:
        text = "The first choice in one layer tells nothing measurable about that in the next."
    elif len(told) == 1:
        text = (
            f"The first choice in layer {between[0][0].names[0]} tells {bits(told[0])} bits "
            f"about that in layer {between[0][0].names[1]}."
        )
    else:
        text = (
            f"The first choice in one layer tells {bits(float(np.mean(told)))} bits about that in "
            f"the next (mean of {len(told)} pairs), most from layer {between[best][0].name}, "
            f"{bits(told[best])} bits."
        )
    return [*out, text]


def pool_sentences(pools: Sequence[PoolStats]) -> list[str]:
    """Only about pools that several layers share."""
    shared = [pool for pool in pools if pool.shared and pool.counts.any()]
    out = []
    flows = [(pool, row) for pool in shared for row in range(len(pool.layers))]
    if len(flows) <= FEW:
        out = [_flow(pool, row) for pool, row in flows]
    else:
        own = [share for pool in shared for share in pool.own_shares.values()]
        out.append(
            f"Layers that share experts give {np.mean(own):.0%} of their choices to their own "
            f"(mean of {len(own)} layers; from {min(own):.0%} to {max(own):.0%})."
        )
        share, user, owner = max(
            (pool.shares[row, column], pool.layers[row], pool.owners[column])
            for pool, row in flows
            for column in range(len(pool.owners))
            if pool.owners[column] != pool.layers[row]
        )
        out.append(
            f"The most that goes to another: {share:.0%} of layer {user}'s choices, to experts of "
            f"layer {owner}."
        )
    return out


def _flow(pool: PoolStats, row: int) -> str:
    """Where the choices of one layer go, the largest part first."""
    layer, shares = pool.layers[row], pool.shares[row]
    order = [int(i) for i in np.argsort(-shares, kind="stable")[:FEW]]
    whose = ["its own experts" if o == layer else f"experts of layer {o}" for o in pool.owners]
    first, *rest = [f"{shares[i]:.0%} to {whose[i]}" for i in order]
    first = first.replace(" to ", f" of layer {layer}'s choices go to ", 1)
    return f"{listing([first, *rest])}."
