"""Shares of averages, boundaries of ranges, names of members: checked where they are given."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from coterie.core.errors import ConfigError
from coterie.ensembles import NoiseRangesConfig
from coterie.process import PROCESSES, ExactDenoiser, Mixture
from coterie.process.ranges import RangesConfig, equal_ranges
from coterie.runs.origins.composition import member_names
from coterie.runs.origins.trained_model import WeightAverageConfig


@pytest.mark.parametrize("shares", [(1, 1), (1.5, -0.5), (0.5,), (0.5, math.nan), (0.2, 0.2)])
def test_B7_shares_of_a_weight_average_add_up_to_one(shares: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"shares.*(positive numbers that add up to 1|finite number)"
    ):
        WeightAverageConfig.from_dict({"paths": ("a", "b"), "shares": shares})
    assert WeightAverageConfig(paths=("a", "b"), shares=(0.25, 0.75)).shares == (0.25, 0.75)


@pytest.mark.parametrize("unit", ["t", "sigma", "log_snr"])
@pytest.mark.parametrize("boundary", [875.0, 1.5, -0.1, math.nan])
def test_B7_boundaries_are_levels_of_the_process(boundary: float, unit: str) -> None:
    process = PROCESSES.parse("rectified_flow").build()
    one = ExactDenoiser(process, Mixture.gaussian(torch.zeros(2), 0.5))
    there = {"sigma": {875.0, 1.5}, "log_snr": {1.5, -0.1}}.get(unit, set())
    told = {"boundaries": (boundary,), "boundaries_in": unit}
    if boundary in there:
        assert len(NoiseRangesConfig.from_dict(told).build([one, one]).members) == 2
        return
    with pytest.raises(ConfigError, match="boundaries"):
        NoiseRangesConfig.from_dict(told).build([one, one])
    with pytest.raises(ConfigError, match="boundaries"):
        RangesConfig.from_dict(told).times(process)


def test_H_boundaries_that_are_no_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from coterie.cli.main import run
    from coterie.runs.training import start
    from small_models import small

    one = str(
        start(small("dit").replace(train=small("dit").train.replace(steps=1)), tmp_path / "a")
    )
    assert run(["ranges", one, one, "--boundaries", "2", "--out", str(tmp_path / "b")]) == 2
    said = capsys.readouterr().err
    assert (
        "boundaries: 2" in said.splitlines()[-1] and not (tmp_path / "b" / "config.json").exists()
    )


@pytest.mark.parametrize(("steps", "count"), [(10, 3), (1000, 7), (1000, 3), (12, 4), (5, 5)])
def test_C10_equal_ranges_hold_the_steps_they_say(steps: int, count: int) -> None:
    process = PROCESSES.parse({"kind": "ddpm", "num_steps": steps}).build()
    ranges = equal_ranges(process, count)
    index = torch.arange(steps)
    found = ranges.range_at(process, process.time_of_index(index, torch.float64))
    for n in range(count):  # from the clean end
        there = (index >= n * steps / count) & (index < (n + 1) * steps / count)
        assert torch.equal(found == count - 1 - n, there)


def test_D1_members_are_told_apart_by_place() -> None:
    assert member_names(["runs/dit", "runs/dit"]) == ["dit (1)", "dit (2)"]
    assert member_names(["a/x", "b/x", "b/x"]) == ["a/x", "b/x (2)", "b/x (3)"]
    assert member_names(["a/x", "b/y"]) == ["x", "y"]
    assert member_names(["a/x", "a/x", "b/y"]) == ["x (1)", "x (2)", "y"]
