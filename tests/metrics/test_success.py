"""Success rates with Wilson intervals, against published values."""

from __future__ import annotations

import pytest

from coterie.core.errors import DataError
from coterie.metrics import success_rate


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, table I, method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (5, 10, 0.2366, 0.7634),
        (10, 10, 0.7225, 1.0),
    ],
)
def test_known_intervals(successes: int, trials: int, low: float, high: float) -> None:
    found = success_rate(successes, trials)
    assert (found.low, found.high) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))
    assert found.low <= found.rate <= found.high and found.rate == successes / trials


def test_more_certainty_and_fewer_trials_widen_it() -> None:
    narrow, wide = success_rate(90, 100), success_rate(90, 100, level=0.99)
    assert wide.low < narrow.low < narrow.high < wide.high
    assert success_rate(9, 10).low < narrow.low


@pytest.mark.parametrize(("successes", "trials", "level"), [(0, 0, 0.95), (3, 2, 0.95), (1, 2, 1)])
def test_what_is_no_rate_is_refused(successes: int, trials: int, level: float) -> None:
    with pytest.raises(DataError):
        success_rate(successes, trials, level)
