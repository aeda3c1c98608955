"""A guided denoiser: the exact conditional score, whatever the process and the view."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from coterie.core.errors import ConfigError
from coterie.core.prediction import VIEWS, Condition, Prediction
from coterie.core.rng import SampleNoise
from coterie.process import PROCESSES, ExactDenoiser, Mixture, Process, convert
from coterie.process.transport import transport
from coterie.solvers import GRIDS, SOLVERS, sample
from coterie.solvers.network_guidance import GuidedDenoiser

F64 = torch.float64
KINDS = ("ddpm", "vp_linear", "cosine", "rectified_flow", "trig", "ve")
MIXTURE = Mixture(
    torch.tensor([[1.0, 0.5], [-1.0, 0.0]], dtype=F64),
    torch.tensor([0.3, 0.2], dtype=F64),
    torch.tensor([0.3, 0.7], dtype=F64),
)
LABEL = torch.tensor([0, 1, 1, 0, -1])


class Posterior(nn.Module):
    """The exact P(component | x_t), as a guide."""

    def __init__(self, process: Process) -> None:
        super().__init__()
        self.process = process

    def log_prob(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        share = MIXTURE.responsibilities(self.process, x, t).log()
        assert cond.label is not None
        chosen = share.gather(1, cond.label.clamp_min(0)[:, None])[:, 0]
        return torch.where(cond.label < 0, torch.zeros_like(chosen), chosen)


def states(process: Process) -> tuple[Tensor, Tensor]:
    unit = torch.tensor([0.95, 0.7, 0.4, 0.1, 0.6], dtype=F64)
    t = process.time_of_unit(unit)
    x0 = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    return process.diffuse(x0, x0.flip(0), t), t


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_posterior_makes_the_exact_conditional_score(kind: str, view: str) -> None:
    """score(x) + grad log P(y | x) = grad log p_t(x | y), and rows without a class stay as they
    are; also where the guide knows another process."""
    process = PROCESSES.parse(kind).build()
    x, t = states(process)
    exact = ExactDenoiser(process, MIXTURE, view)  # type: ignore[arg-type]
    cond = Condition(label=LABEL)
    wanted = exact(x, t, cond).value
    for own in (process, PROCESSES.parse("vp_linear").build()):
        made = GuidedDenoiser(exact, Posterior(own))(x, t, cond)
        assert made.view == view and not made.value.requires_grad
        torch.testing.assert_close(made.value, wanted, rtol=2e-5, atol=2e-5)
    strong = GuidedDenoiser(exact, Posterior(process), 3.0)(x, t, cond)
    plain, score = (
        convert(process, value, view, "score", x, t)
        for value in (exact(x, t, Condition()).value, wanted)
    )
    moved = convert(process, strong.value, view, "score", x, t)
    torch.testing.assert_close(moved, plain + 3.0 * (score - plain), rtol=1e-6, atol=1e-6)


def test_the_same_guide_in_another_process_is_asked_at_equal_signal_to_noise() -> None:
    flow, vp = (PROCESSES.parse(kind).build() for kind in ("rectified_flow", "vp_linear"))
    x, t = states(flow)
    moved, at = transport(flow, vp, x, t)
    torch.testing.assert_close(flow.lam(t), vp.lam(at), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(moved, x)


def test_scale_0_is_the_plain_step_bit_for_bit() -> None:
    process = PROCESSES.parse("ddpm").build()
    plain, guide = ExactDenoiser(process, MIXTURE, "v"), Posterior(process)
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(1))
    solver, grid = SOLVERS.parse("ddim"), GRIDS.parse("uniform")

    def draw(denoiser: object, cond: Condition) -> Tensor:
        noise = SampleNoise(range(5))
        return sample(denoiser, x, cond, solver=solver, grid=grid, steps=6, noise=noise)  # type: ignore[arg-type]

    cond = Condition(label=LABEL)
    assert torch.equal(draw(GuidedDenoiser(plain, guide, 0.0), cond), draw(plain, Condition()))
    assert not torch.allclose(
        draw(GuidedDenoiser(plain, guide, 1.0), cond), draw(plain, Condition())
    )


class Recording(nn.Module):
    """Counts what it is asked, and whether a gradient could be taken."""

    def __init__(self, process: Process) -> None:
        super().__init__()
        self.process, self.view, self.asked = process, "eps", []
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Prediction:
        self.asked.append((x.requires_grad or torch.is_grad_enabled(), cond))
        return Prediction(self.weight * x, "eps")


def test_no_gradient_goes_through_the_denoiser_and_it_is_not_told_the_target() -> None:
    process = PROCESSES.parse("ddpm").build()
    x, t = states(process)
    cond = Condition(label=LABEL, channels=torch.zeros(5, 1))
    for tells in (False, True):
        denoiser = Recording(process)
        made = GuidedDenoiser(denoiser, Posterior(process), 2.0, tells_label=tells)(x, t, cond)
        assert not made.value.requires_grad and denoiser.weight.grad is None
        ((graph, told),) = denoiser.asked
        assert not graph and told.channels is None
        assert (told.label is not None) is tells


def test_bad_pairs_and_scales_are_refused() -> None:
    process = PROCESSES.parse("ddpm").build()
    plain, guide = ExactDenoiser(process, MIXTURE), Posterior(process)
    for scale in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(ConfigError, match=r"weight: -?(nan|inf) .*a finite number"):
            GuidedDenoiser(plain, guide, scale)
    with pytest.raises(ConfigError, match=r"guide: 'Linear' .*a model with log_prob"):
        GuidedDenoiser(plain, nn.Linear(2, 2))
