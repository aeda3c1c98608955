"""The denoiser against recorded facts: what the network is fed, and what becomes of its answer."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from coterie.backbones import BackboneOutput
from coterie.core.context import Context
from coterie.core.errors import ConfigError, DataError
from coterie.core.prediction import VIEWS, Condition
from coterie.core.rng import SampleNoise
from coterie.denoiser import Denoiser, DenoiserConfig
from coterie.process import PROCESSES, as_view, target_of
from coterie.solvers import GRIDS, SOLVERS, initial_noise, sample
from small_models import images, small, times, woken

KINDS = PROCESSES.kinds()


class Recorder(nn.Module):
    """Stands for a network: notes its input and context, answers ``answer(x, ctx)``."""

    def __init__(self, answer: Callable[[Tensor, Context], Tensor] | None = None) -> None:
        super().__init__()
        self.dtype_of = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.answer = answer or (lambda x, ctx: torch.zeros_like(x))
        self.seen: list[tuple[Tensor, Context]] = []

    def forward(self, x: Tensor, ctx: Context, cond: Condition) -> BackboneOutput:
        self.seen.append((x, ctx))
        return BackboneOutput(self.answer(x, ctx))


def denoiser(answer: Any = None, **changes: Any) -> tuple[Denoiser, Recorder]:
    made = DenoiserConfig.from_dict(changes).build()
    recorder = Recorder(answer)
    made.backbone = recorder
    return made, recorder


def inner_times(process: Any, count: int) -> Tensor:
    unit = torch.linspace(0.02, 0.98, count, dtype=torch.float64)
    return process.time_of_unit(unit)


def pair(seed: int = 0, shape: tuple[int, ...] = (5, 2, 3)) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    x0, eps = torch.randn(2, *shape, generator=rng, dtype=torch.float64)
    return x0, eps


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spread", [0.5, 2.0])
def test_edm_feeds_the_network_unit_variance_at_every_level(kind: str, spread: float) -> None:
    model, recorder = denoiser(
        process=kind, view="x0", precondition={"kind": "edm", "sigma_data": spread}
    )
    t = inner_times(model.process, 7)
    x0, eps = pair(shape=(7, 40_000))
    x_t = model.process.diffuse(spread * x0, eps, t)
    model(x_t, t, Condition())
    ((fed, _),) = recorder.seen
    torch.testing.assert_close(fed.var(dim=1), torch.ones(7).double(), rtol=0.03, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_edm_target_has_unit_variance_and_gives_the_data_back(kind: str) -> None:
    """The network that answers (x0 - c_skip x) / c_out denoises exactly, from unit variance."""
    x0, eps = pair(shape=(6, 40_000))
    model, _ = denoiser(process=kind, view="x0", precondition={"kind": "edm", "sigma_data": 0.5})
    t = inner_times(model.process, 6)
    x_t = model.process.diffuse(0.5 * x0, eps, t)
    _, c_skip, c_out = (c[:, None] for c in model.precondition.coefficients(t))
    target = (0.5 * x0 - c_skip * x_t) / c_out
    torch.testing.assert_close(target.var(dim=1), torch.ones(6).double(), rtol=0.03, atol=0)
    model.backbone.answer = lambda x, ctx: target
    prediction = model(x_t, t, Condition())
    assert prediction.view == "x0"
    torch.testing.assert_close(prediction.value, 0.5 * x0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("view", VIEWS)
def test_a_perfect_answer_in_any_view_is_the_same_prediction(kind: str, view: str) -> None:
    model, _ = denoiser(process=kind, view=view)
    x0, eps = pair()
    t = inner_times(model.process, 5)
    x_t = model.process.diffuse(x0, eps, t)
    model.backbone.answer = lambda x, ctx: target_of(model.process, x0, eps, view, t)
    prediction = model(x_t, t, Condition())
    assert prediction.view == view
    for other in VIEWS:
        value = as_view(model.process, prediction, other, x_t, t).value
        expected = target_of(model.process, x0, eps, other, t)
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_without_preconditioning_the_network_sees_x_itself(kind: str) -> None:
    model, recorder = denoiser(process=kind, answer=lambda x, ctx: 3.0 * x)
    x, _ = pair()
    out = model(x, inner_times(model.process, 5), Condition())
    assert torch.equal(recorder.seen[0][0], x) and torch.equal(out.value, 3.0 * x)


@pytest.mark.parametrize("kind", KINDS)
def test_the_table_of_time_inputs_holds_what_each_step_is_fed(kind: str) -> None:
    model, recorder = denoiser(process=kind)
    count = model.process.num_steps
    index = torch.arange(count)
    t = model.process.time_of_index(index)
    model(torch.zeros(count, 1, dtype=torch.float64), t, Condition())
    ctx = recorder.seen[0][1]
    assert ctx.num_steps == count and ctx.time_inputs.shape == (count,)
    assert torch.equal(ctx.step_index, index)
    torch.testing.assert_close(ctx.time_inputs[index], ctx.time_input, rtol=1e-6, atol=1e-6)
    assert ctx.time_inputs.isfinite().all() and (ctx.time_inputs.diff() > 0).all()
    assert ctx.noise.min() >= 0 and ctx.noise.max() <= 1 and (ctx.noise.diff() > 0).all()


@pytest.mark.parametrize("steps", [4, 10])
def test_respaced_sampling_asks_about_steps_of_the_original_grid(steps: int) -> None:
    model, recorder = denoiser(process={"kind": "ddpm", "num_steps": 200}, view="eps")
    noise = SampleNoise([1, 2])
    grid = GRIDS.parse("respaced")
    x = initial_noise(model.process, (2,), noise)
    solver = SOLVERS.parse("ancestral")
    sample(model, x, Condition(), solver=solver, grid=grid, steps=steps, noise=noise)
    asked = [int(ctx.step_index[0]) for _, ctx in recorder.seen]
    assert len(asked) == steps and asked[0] == 199
    assert all(a > b for a, b in pairwise(asked)) and asked[-1] < 200 / steps
    for _, ctx in recorder.seen:
        assert torch.equal(ctx.step_index[:1], ctx.step_index[1:])
        torch.testing.assert_close(
            ctx.time_input, ctx.time_inputs[ctx.step_index], atol=0.51, rtol=0
        )


def test_facts_for_the_routers_arrive_unchanged() -> None:
    model, recorder = denoiser()
    rng = torch.Generator()
    ids = torch.tensor([7, 3])
    model.train()(
        torch.zeros(2, 1).double(), torch.tensor([0.25, 0.5]), Condition(), ids, rng, progress=0.3
    )
    ctx = recorder.seen[0][1]
    assert ctx.rng is rng and ctx.sample_ids is ids
    assert (ctx.progress, ctx.training, ctx.batch) == (0.3, True, 2)
    model.eval()(torch.zeros(2, 1).double(), torch.tensor([0.25, 0.5]), Condition())
    assert recorder.seen[1][1].training is False and recorder.seen[1][1].rng is None


def test_dtype_of_the_state_is_kept_and_that_of_the_network_fed() -> None:
    model, recorder = denoiser()
    out = model(torch.zeros(2, 1), torch.tensor([0.25, 0.5]), Condition())
    assert out.value.dtype == torch.float32 and recorder.seen[0][0].dtype == torch.float64


@pytest.mark.parametrize("t", [torch.tensor(0.5), torch.tensor([0.5]), torch.zeros(2, 1)])
def test_times_of_another_shape_are_refused(t: Tensor) -> None:
    model, _ = denoiser()
    with pytest.raises(DataError, match=r"t: .*\[B\] with B = 2"):
        model(torch.zeros(2, 1), t, Condition())


def test_preconditioning_answers_data_only() -> None:
    with pytest.raises(ConfigError, match=r"view: 'flow' .*x0.*precondition 'edm' answers x0"):
        DenoiserConfig.from_dict({"precondition": "edm"})
    with pytest.raises(ConfigError, match=r"backbone\.learned_variance: True .*'cosine'"):
        DenoiserConfig.from_dict(
            {"process": "cosine", "backbone": {"kind": "dit", "learned_variance": True}}
        )


def test_weights_do_not_hold_what_the_configuration_determines() -> None:
    model = woken(small("dit"))
    stored = model.state_dict()
    assert stored.keys() == {name for name, _ in model.named_parameters()}
    with torch.no_grad():
        again = small("dit").model.build().eval()
        again.load_state_dict(stored)
        batch, t = images(3), times(3)
        expected = model(batch.x, t, batch.cond).value
        assert torch.equal(again(batch.x, t, batch.cond).value, expected)
