"""Samples that come and go are what they are alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from coterie.core.errors import ConfigError, DataError
from coterie.core.prediction import Condition
from coterie.core.rng import SampleNoise
from coterie.process import PROCESSES, ExactDenoiser, Mixture
from coterie.solvers import (
    GRIDS,
    SOLVERS,
    GuidanceConfig,
    Stepper,
    asked_times,
    guide,
    initial_noise,
    sample,
)

ALONE = [kind for kind in SOLVERS.kinds() if kind != "feynman_kac"]
STEPS = [2, 5, 3]
KIND = {"rk45": torch.float64}  # a rounding error may decide whether a substep is taken


def build(kind: str) -> Any:
    return PROCESSES.parse(kind).build()


def denoiser(process: Any) -> ExactDenoiser:
    means = torch.tensor([[1.0, 0.5], [-1.0, 0.0]])
    return ExactDenoiser(
        process, Mixture(means, torch.tensor([0.1, 0.2]), torch.tensor([0.3, 0.7]))
    )


class Labelled:
    """Shifts what it answers by the label, and counts its calls and the rows of each."""

    def __init__(self, process: Any) -> None:
        self.inner, self.process = denoiser(process), process
        self.rows: list[int] = []

    def __call__(self, x: Tensor, t: Tensor, cond: Condition) -> Any:
        assert cond.label is not None and t.shape == cond.label.shape == (len(x),)
        self.rows.append(len(x))
        made = self.inner(x, t, Condition())
        return made.replace(value=made.value + 0.1 * cond.label[:, None])


def start(process: Any, seed: int) -> tuple[Tensor, SampleNoise]:
    noise = SampleNoise([seed])
    return initial_noise(process, (2,), noise), noise


def alone(model: Any, solver: str, steps: int, seed: int, cond: Condition) -> Tensor:
    x, noise = start(model.process, seed)
    return sample(
        model, x.to(KIND.get(solver, x.dtype)), cond, solver=SOLVERS.parse(solver),
        grid=GRIDS.parse("uniform"), steps=steps, noise=noise,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["ddpm", "rectified_flow", "ve"])
@pytest.mark.parametrize("solver", ALONE)
def test_samples_of_different_steps_are_what_they_are_alone(kind: str, solver: str) -> None:
    model = Labelled(build(kind))
    noise = SampleNoise([7, 8, 9])
    x = initial_noise(model.process, (2,), noise)
    labels = torch.tensor([0, 1, 2])
    together = sample(
        model, x.to(KIND.get(solver, x.dtype)), Condition(label=labels),
        solver=SOLVERS.parse(solver), grid=GRIDS.parse("uniform"), steps=STEPS, noise=noise,
    )  # fmt: skip
    assert together.dtype == KIND.get(solver, torch.float32)
    for row, steps in enumerate(STEPS):
        one = alone(model, solver, steps, 7 + row, Condition(label=labels[row : row + 1]))
        scale = max(1.0, float(one.abs().max()))
        # 1e-6, but for what a component of width 0.1 makes of a rounding error.
        torch.testing.assert_close(together[row : row + 1] / scale, one / scale, rtol=0, atol=3e-6)


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m", "sde_dpmpp_2m", "heun", "edm_churn"])
def test_samples_may_come_while_others_are_under_way(solver: str) -> None:
    model = Labelled(build("vp_linear"))
    stepper = Stepper(model, SOLVERS.parse(solver).build())
    grid, done = GRIDS.parse("lambda"), {}

    def admit(seed: int, steps: int) -> None:
        x, noise = start(model.process, seed)
        cond = Condition(label=torch.tensor([seed]))
        stepper.admit(x, cond, [grid.build(model.process, steps)], noise, [f"s{seed}"])

    admit(1, 4)
    done |= {one.id: one.x for one in stepper.step()}
    admit(2, 6)
    for _ in range(2):
        done |= {one.id: one.x for one in stepper.step()}
    admit(3, 2)
    assert stepper.ids == ["s1", "s2", "s3"]
    while len(stepper):
        done |= {one.id: one.x for one in stepper.step()}
    assert stepper.step() == []
    for seed, steps in ((1, 4), (2, 6), (3, 2)):
        x, noise = start(model.process, seed)
        one = sample(
            model, x, Condition(label=torch.tensor([seed])), solver=SOLVERS.parse(solver),
            grid=grid, steps=steps, noise=noise,
        )  # fmt: skip
        torch.testing.assert_close(done[f"s{seed}"], one[0], rtol=1e-6, atol=1e-6)


def test_who_is_done_costs_no_more_calls() -> None:
    model = Labelled(build("rectified_flow"))
    noise = SampleNoise([1, 2, 3])
    x = initial_noise(model.process, (2,), noise)
    cond = Condition(label=torch.zeros(3, dtype=torch.long))
    euler, grid = SOLVERS.parse("euler"), GRIDS.parse("uniform")
    sample(model, x, cond, solver=euler, grid=grid, steps=STEPS)
    assert model.rows == [3, 3, 2, 1, 1]
    # A sample of equal steps throughout is the same run, to the last bit.
    same = sample(model, x, cond, solver=euler, grid=grid, steps=[4, 4, 4])
    assert torch.equal(same, sample(model, x, cond, solver=euler, grid=grid, steps=4))


def test_each_sample_has_its_own_guidance() -> None:
    model = Labelled(build("vp_linear"))
    guided = guide(model, GuidanceConfig(weight=9.0))
    noise = SampleNoise([1, 2, 3])
    x = initial_noise(model.process, (2,), noise)
    weights = torch.tensor([1.0, 2.0, 3.5])
    cond = Condition(label=torch.tensor([1, 2, 3]), guidance=weights)
    settings: dict[str, Any] = {"solver": SOLVERS.parse("ddim"), "grid": GRIDS.parse("uniform")}
    together = sample(guided, x, cond, steps=[3, 4, 5], **settings)
    for row, weight in enumerate(weights.tolist()):
        one = sample(
            guide(model, GuidanceConfig(weight=weight)),
            x[row : row + 1],
            Condition(label=cond.tensors()["label"][row : row + 1]),
            steps=3 + row,
            **settings,
        )
        torch.testing.assert_close(together[row : row + 1], one, rtol=0, atol=1e-6)


def test_times_of_several_numbers_of_steps() -> None:
    process = build("rectified_flow")
    euler, grid = SOLVERS.parse("heun"), GRIDS.parse("uniform")
    several = asked_times(process, euler, grid, [4, 2, 4])
    each = [asked_times(process, euler, grid, count) for count in (2, 4)]
    assert set(several.tolist()) == set(torch.cat(each).tolist())
    assert len(several) == len(several.unique())


def test_bad_input() -> None:
    model = Labelled(build("vp_linear"))
    stepper = Stepper(model, SOLVERS.parse("ddim").build())
    x, _ = start(model.process, 1)
    cond = Condition(label=torch.tensor([1]))
    times = GRIDS.parse("uniform").build(model.process, 3)
    stepper.admit(x, cond, [times])
    for message, arguments in (
        ("times: 2 is not allowed; allowed: 1 grids", (x, cond, [times, times])),
        ("the fields of those under way", (x, Condition(), [times])),
        ("samples of shape", (x[:, :1], cond, [times])),
        ("strictly falling", (x, cond, [times[[0, 2, 1]]])),
    ):
        with pytest.raises(ConfigError, match=message):
            stepper.admit(*arguments)
    with pytest.raises(DataError, match="NaN"):
        stepper.admit(x * float("nan"), cond, [times])
    assert len(stepper) == 1
    with pytest.raises(ConfigError, match="this solver is stochastic"):
        Stepper(model, SOLVERS.parse("ancestral").build()).admit(x, cond, [times])
    with pytest.raises(ConfigError, match="its particles belong together"):
        Stepper(model, SOLVERS.parse("feynman_kac").build())
    settings: dict[str, Any] = {"solver": SOLVERS.parse("ddim"), "grid": GRIDS.parse("uniform")}
    with pytest.raises(ConfigError, match="1 numbers, one per sample"):
        sample(model, x, cond, steps=[3, 4], **settings)
    with pytest.raises(ConfigError, match="no step in common"):
        sample(model, x, cond, steps=[3], callback=lambda *_: None, **settings)
