"""Success rates with Wilson's score interval (Wilson 1927)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

from coterie.core.errors import DataError, describe


@dataclass(frozen=True)
class Success:
    """``rate`` of successes, and its confidence interval at the given level."""

    rate: float
    low: float
    high: float
    trials: int


def success_rate(successes: int, trials: int, level: float = 0.95) -> Success:
    """Rate with its Wilson interval; DataError for no trials or more successes than trials.

    Unlike rate +- z sqrt(rate (1 - rate) / n) it stays within [0, 1] and has a width where all or
    none succeed.
    """
    if trials < 1 or not 0 <= successes <= trials:
        found = f"{successes} of {trials}"
        raise DataError(describe("successes", found, "0..trials of at least one trial"))
    if not 0 < level < 1:
        raise DataError(describe("level", level, "a number between 0 and 1"))
    z = NormalDist().inv_cdf(0.5 + level / 2)
    rate, shrink = successes / trials, z * z / trials
    centre = (rate + shrink / 2) / (1 + shrink)
    half = z / (1 + shrink) * math.sqrt(rate * (1 - rate) / trials + shrink / (4 * trials))
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == trials else centre + half
    return Success(rate, low, high, trials)
