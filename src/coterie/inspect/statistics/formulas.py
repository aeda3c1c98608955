"""Numbers about routing: small pure functions on arrays of counts.

Shapes: E experts, C columns (noise bins, classes or positions), T noise levels, U units (experts
of one or of several layers), D width. Counts are choices; a row (token or sample) makes k of them.
All arithmetic is float64. Empty input has a defined answer, stated per function.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from coterie.core.errors import DataError, describe

Array = NDArray[np.float64]

DEAD_SHARE = 0.01
"""An expert is dead if its load is below this share of the uniform load 1/E."""
COLLAPSED_ENTROPY = 0.1
"""A router is collapsed if the entropy of its load is below this share of log E."""
UNEVEN_ENTROPY = 0.75
"""A router is unevenly loaded if the entropy of its load is below this share of log E."""


def _counts(values: ArrayLike, name: str = "counts") -> Array:
    array = np.asarray(values, dtype=np.float64)
    if not np.isfinite(array).all() or (array < 0).any():
        raise DataError(describe(name, "a negative or non-finite entry", "finite values >= 0"))
    return array


def load_share(counts: ArrayLike) -> Array:
    """[..., E] share of all choices; all zero where nothing was chosen."""
    array = _counts(counts)
    total = array.sum(-1, keepdims=True)
    return np.divide(array, total, out=np.zeros_like(array), where=total > 0)


def load_cv(counts: ArrayLike) -> float:
    """Coefficient of variation of the load, std / mean over experts (population std).

    0 = perfectly balanced, sqrt(E - 1) = one expert does everything; 0 for no choices.
    """
    array = _counts(counts)
    mean = array.mean()
    return float(array.std() / mean) if mean > 0 else 0.0


def max_over_mean(counts: ArrayLike) -> float:
    """Load of the busiest expert over the mean load, 1..E; 1 for no choices."""
    array = _counts(counts)
    mean = array.mean()
    return float(array.max() / mean) if mean > 0 else 1.0


def relative_imbalance(counts: ArrayLike) -> Array:
    """[E] (load - mean load) / mean load, 0 = even; zeros for no choices (arXiv:2510.17483)."""
    array = _counts(counts)
    mean = array.mean()
    return array / mean - 1.0 if mean > 0 else np.zeros_like(array)


def entropy_bits(weights: ArrayLike) -> float:
    """Shannon entropy in bits of non-negative weights, normalised to one; 0 for no mass."""
    share = load_share(np.ravel(np.asarray(weights, dtype=np.float64)))
    positive = share[share > 0]
    return float(-(positive * np.log2(positive)).sum()) if positive.size else 0.0


def load_entropy(counts: ArrayLike) -> float:
    """Entropy of the load over log E: 1 = uniform, 0 = one expert. 1 for E = 1 or no choices."""
    array = _counts(counts)
    if array.size == 1 or array.sum() == 0:
        return 1.0
    return entropy_bits(array) / float(np.log2(array.size))


def dead_experts(counts: ArrayLike, share: float = DEAD_SHARE) -> tuple[int, ...]:
    """Experts whose load is below ``share`` of uniform; () where nothing was chosen."""
    array = _counts(counts)
    if array.sum() == 0:
        return ()
    return tuple(int(i) for i in np.flatnonzero(load_share(array) < share / array.size))


def is_collapsed(counts: ArrayLike, threshold: float = COLLAPSED_ENTROPY) -> bool:
    """Entropy of the load below ``threshold * log E``."""
    return load_entropy(counts) < threshold


def confidence_entropy(entropy_sum: ArrayLike, rows: ArrayLike, num_experts: int) -> Array:
    """Mean entropy of a row's router probabilities over log E, from a sum in nats.

    0 = the router is certain, 1 = it is undecided; NaN where there are no rows; 0 for E = 1.
    """
    total = np.asarray(entropy_sum, dtype=np.float64)
    count = np.asarray(rows, dtype=np.float64)
    mean = np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)
    return mean / np.log(num_experts) if num_experts > 1 else mean * 0.0


@dataclass(frozen=True)
class Information:
    """Mutual information between the expert of a choice and a property of its row, in bits.

    ``bits`` is the plug-in value, biased upwards. ``corrected`` subtracts the Miller-Madow bias
    and is cut at 0. ``floor`` is what two unrelated variables hardly exceed
    (:func:`independence_floor`). Both count the draws that are independent
    (:func:`effective_draws`), as tokens of one sample share noise level and class.
    ``normalised`` = bits / min(H(expert), H(property)), in [0, 1]; 0 if either never varies.
    """

    bits: float
    corrected: float
    floor: float
    normalised: float

    @property
    def measurable(self) -> bool:
        """Above what unrelated variables give by chance."""
        return self.bits > self.floor


def mutual_information(joint: ArrayLike) -> float:
    """Plug-in mutual information in bits of a joint table of counts [A, C]; 0 for no counts."""
    table = _counts(joint, "joint")
    total = table.sum()
    if total == 0:
        return 0.0
    share = table / total
    expected = share.sum(1, keepdims=True) * share.sum(0, keepdims=True)
    here = share > 0
    bits = (share[here] * np.log2(share[here] / expected[here])).sum()
    return max(0.0, float(bits))


def miller_madow_bias(joint: ArrayLike, count: float) -> float:
    """Upward bias in bits of the plug-in information after ``count`` independent draws.

    (cells - rows - columns + 1) / (2 n ln 2), counting occupied ones (Miller 1955, with the
    rule applied to each of the three entropies); 0 for no draws.
    """
    table = _counts(joint, "joint")
    if count <= 0:
        return 0.0
    cells = int((table > 0).sum())
    used = int((table.sum(1) > 0).sum()) + int((table.sum(0) > 0).sum())
    return max(0.0, (cells - used + 1) / (2.0 * count * np.log(2.0)))


def independence_floor(joint: ArrayLike, count: float) -> float:
    """Plug-in information, in bits, that ``count`` draws of unrelated variables hardly exceed.

    2 n ln 2 times the information is chi-squared with d = (rows - 1) (columns - 1) degrees of
    freedom (occupied rows and columns): its mean d plus two standard deviations sqrt(2 d),
    exceeded in about 3 of 100 cases. 0 for no draws.
    """
    table = _counts(joint, "joint")
    if count <= 0:
        return 0.0
    rows = max(1, int((table.sum(1) > 0).sum()))
    columns = max(1, int((table.sum(0) > 0).sum()))
    freedom = (rows - 1) * (columns - 1)
    return (freedom + 2.0 * math.sqrt(2.0 * freedom)) / (2.0 * count * math.log(2.0))


def information(joint: ArrayLike, independent: float | None = None) -> Information:
    """All of :class:`Information` from joint counts [C, E].

    ``independent``: number of independent draws behind the counts (None: each choice is one).
    """
    table = _counts(joint, "joint")
    total = float(table.sum())
    bits = mutual_information(table)
    smaller = min(entropy_bits(table.sum(0)), entropy_bits(table.sum(1)))
    draws = total if independent is None else independent
    return Information(
        bits=bits,
        corrected=max(0.0, bits - miller_madow_bias(table, draws)),
        floor=independence_floor(table, draws),
        normalised=min(1.0, bits / smaller) if smaller > 1e-12 else 0.0,
    )


def effective_draws(counts: ArrayLike, clumping: float, samples: float) -> float:
    """How many independent choices the choices of ``samples`` samples are worth.

    ``counts`` [E] over all samples; ``clumping`` = sum_s sum_e n_se^2 / n_s with n_se the choices
    of e in sample s. The number of choices over their design effect (Rao and Scott 1981): the
    choices themselves if those within a sample are independent, ``samples`` if they all agree.
    """
    array = _counts(counts)
    total = array.sum()
    if total == 0 or samples < 2:
        return float(min(total, samples))
    share = array / total
    independent = (samples - 1) * (1.0 - float((share**2).sum()))
    if independent <= 1e-9:
        return float(total)
    effect = (clumping - float((array * share).sum())) / independent
    return float(total / max(1.0, effect))


def coactivation_lift(pairs: ArrayLike) -> Array:
    """[E, E] how much more often two experts serve the same row than their loads explain.

    ``pairs[i, j]``: rows that chose both; the diagonal holds the choices per expert. Expected
    pairs are proportional to the product of the two loads and scaled to the observed number of
    pairs, so a uniform top-k choice has lift 1. NaN on the diagonal and where undefined.
    """
    table = _counts(pairs, "pairs")
    load = np.diag(table)
    off = ~np.eye(len(table), dtype=bool)
    expected = np.outer(load, load)
    scale = table[off].sum() / expected[off].sum() if expected[off].sum() > 0 else 0.0
    lift = np.full_like(table, np.nan)
    np.divide(table, expected * scale, out=lift, where=off & (expected * scale > 0))
    return lift


def joint_lift(joint: ArrayLike) -> Array:
    """[E, F] how much more often e comes with f than their totals explain: 1 is chance.

    NaN where either never occurs.
    """
    table = _counts(joint, "joint")
    expected = table.sum(1, keepdims=True) * table.sum(0, keepdims=True)
    lift = np.full_like(table, np.nan)
    return np.divide(table * table.sum(), expected, out=lift, where=expected > 0)


def quantile_of_histogram(counts: ArrayLike, share: float) -> int:
    """Smallest value v such that at least ``share`` of the rows are <= v; ``counts[v]`` rows have
    value v. 0 for no rows."""
    array = _counts(counts)
    reached = np.cumsum(array) >= share * array.sum() - 1e-9
    return int(np.argmax(reached)) if array.sum() else 0


def choice_histogram(counts: ArrayLike) -> Array:
    """[K + 1] share of rows that made 0, 1, ..., K choices; zeros for no rows."""
    return load_share(counts)


def usage_rate(counts: ArrayLike, rows: ArrayLike) -> Array:
    """[C, E] probability that a row of column c chooses expert e; NaN where there are no rows."""
    table, count = _counts(counts), _counts(rows, "rows")[..., None]
    return np.divide(table, count, out=np.full_like(table, np.nan), where=count > 0)


def always_on(usage: ArrayLike, threshold: float = 0.5) -> tuple[int, ...]:
    """Experts chosen with a rate above ``threshold`` at every noise level of ``usage`` [T, E].

    Noise levels without rows (NaN) are passed over; () if none has rows.
    """
    rates = np.asarray(usage, dtype=np.float64)
    seen = rates[np.isfinite(rates).all(-1)]
    if len(seen) == 0:
        return ()
    return tuple(int(i) for i in np.flatnonzero((seen > threshold).all(0)))


def top_k_usage(table: ArrayLike, top_k: int) -> Array:
    """[T, E] of 0 and 1: the ``top_k`` largest entries of every row (ties: lower index)."""
    probs = np.asarray(table, dtype=np.float64)
    best = np.argsort(-probs, axis=1, kind="stable")[:, :top_k]
    usage = np.zeros_like(probs)
    np.put_along_axis(usage, best, 1.0, axis=1)
    return usage


def task_affinity(usage: ArrayLike) -> Array:
    """[T, T] overlap of the units two noise levels use: sum_u min(s_u, t_u) / larger total.

    For binary maps this is |m_s & m_t| / max(|m_s|, |m_t|), the task affinity of DTR and
    Switch-DiT before min-max scaling. NaN for noise levels without data.
    """
    rates = np.asarray(usage, dtype=np.float64)
    totals = rates.sum(1)
    out = np.full((len(rates), len(rates)), np.nan)
    for row, values in enumerate(rates):
        larger = np.maximum(totals, totals[row])
        shared = np.minimum(rates, values).sum(1)
        np.divide(shared, larger, out=out[row], where=np.isfinite(larger) & (larger > 0))
    return out


def cosine_matrix(rows: ArrayLike) -> Array:
    """[E, E] cosine between rows [E, D] (router prototypes); 0 for a zero row."""
    array = np.asarray(rows, dtype=np.float64)
    norm = np.linalg.norm(array, axis=1, keepdims=True)
    unit = np.divide(array, norm, out=np.zeros_like(array), where=norm > 0)
    return unit @ unit.T


def off_diagonal_mean(matrix: ArrayLike) -> float:
    """Mean of the entries of [E, E] off the diagonal; NaN for E < 2."""
    array = np.asarray(matrix, dtype=np.float64)
    size = len(array)
    return float((array.sum() - np.trace(array)) / (size * (size - 1))) if size > 1 else math.nan


def chance_overlap(counts: ArrayLike, rows: float) -> float:
    """Overlap of two rows that choose independently with these loads: sum_e q_e^2 / sum_e q_e.

    q_e = counts / rows is how often a row chooses expert e; NaN for no choices.
    """
    array = _counts(counts)
    if rows <= 0 or array.sum() == 0:
        return float("nan")
    rate = array / rows
    return float((rate**2).sum() / rate.sum())


def total_variation(first: ArrayLike, second: ArrayLike) -> float:
    """Half the absolute difference of two load shares, in [0, 1]; NaN if either is empty."""
    a, b = _counts(first), _counts(second)
    if a.sum() == 0 or b.sum() == 0:
        return float("nan")
    return float(np.abs(load_share(a) - load_share(b)).sum() / 2)
