"""Times of a range: the distribution it is cut from, given the range."""

import pytest
import torch

from coterie.core.errors import ConfigError
from coterie.process import PROCESSES, TIMES, WithinTimes, share_within


def build(kind="rectified_flow"):
    return PROCESSES.parse({"kind": kind}).build()


@pytest.mark.parametrize("kind", ["rectified_flow", "ddpm", "ve"])
def test_all_times_lie_in_the_range_and_are_distributed_as_before(kind):
    process = build(kind)
    middle = float(process.time_of_unit(torch.tensor([0.4])))
    config = WithinTimes(times={"kind": "uniform"}, low=middle)
    t = config.build(process).sample(4000, torch.Generator().manual_seed(1))
    assert t.shape == (4000,) and float(t.min()) >= middle
    unit = process.unit_time(t)
    assert abs(float(unit.mean()) - 0.7) < 0.01 and float(unit.max()) > 0.99
    assert share_within(config, process) == pytest.approx(0.6, abs=0.03)


def test_neighbours_share_everything_and_nothing_twice():
    process = build()
    edges = (None, 0.3, 0.7, None)
    parts = [WithinTimes(times="logit_normal", low=edges[i], high=edges[i + 1]) for i in range(3)]
    assert sum(share_within(part, process) for part in parts) == 1.0
    again = [
        part.build(process).sample(16, torch.Generator().manual_seed(3)) for part in (parts[1],) * 2
    ]
    assert torch.equal(*again) and bool(((again[0] >= 0.3) & (again[0] < 0.7)).all())
    assert TIMES.parse(parts[1].model_dump(mode="json")) == parts[1]


def test_ranges_with_nothing_in_them_are_refused():
    with pytest.raises(ConfigError, match=r"high: 0\.2 .*above low = 0\.4"):
        WithinTimes.from_dict({"low": 0.4, "high": 0.2})
    with pytest.raises(ConfigError, match=r"low, high: .*at least 0\.2%"):
        WithinTimes(times="logit_normal", low=0.999).build(build())
    with pytest.raises(ConfigError, match="stratified"):
        WithinTimes.from_dict({"times": {"kind": "stratified"}})
