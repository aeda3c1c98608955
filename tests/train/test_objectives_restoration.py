"""Restoration: what the loss compares, what is refused, and that a small network learns it."""

from __future__ import annotations

import pytest
import torch

from coterie.backbones.restorer import RestorerConfig
from coterie.core.batch import Batch
from coterie.core.errors import ConfigError, DataError
from coterie.core.prediction import Condition
from coterie.denoiser import Denoiser, DenoiserConfig
from coterie.train.objectives import RestorationConfig
from small_models import SMALL_RESTORER


def model(view: str = "x0") -> Denoiser:
    torch.manual_seed(0)
    config = DenoiserConfig.from_dict({"backbone": SMALL_RESTORER, "view": view})
    return config.build()


def batch(count: int = 6) -> Batch:
    rng = torch.Generator().manual_seed(0)
    clean = torch.rand(count, 3, 16, 16, generator=rng) - 0.5
    return Batch(clean, Condition(channels=0.5 * clean + 0.4), torch.arange(count))


def test_the_loss_is_smooth_l1_of_the_answer_to_the_degraded_picture() -> None:
    made, data = model().eval(), batch()
    losses = RestorationConfig(beta=0.1).build(made)(made, data, torch.Generator(), 1.0)
    answer = made(data.cond.channels, torch.zeros(6), data.cond).value
    gap = (answer - data.x).abs()
    want = torch.where(gap < 0.1, 5 * gap.square(), gap - 0.05).flatten(1).mean(1)
    torch.testing.assert_close(losses.per_sample, want, atol=1e-6, rtol=1e-5)
    assert losses.routings and answer.abs().max() <= 1


def test_a_few_steps_restore_better_than_doing_nothing_new() -> None:
    made, data = model().train(), batch()
    objective = RestorationConfig(beta=0.1).build(made)
    optimiser = torch.optim.Adam(made.parameters(), lr=5e-3)
    first = None
    for step in range(80):
        losses = objective(made, data, torch.Generator().manual_seed(step), step / 80)
        first = losses.total.item() if first is None else first
        optimiser.zero_grad()
        losses.total.backward()
        optimiser.step()
        made.after_step(losses.routings)
    assert losses.total.item() < 0.5 * first
    scores = [p.grad for n, p in made.named_parameters() if "score" in n]
    assert scores and all(grad is not None and grad.abs().max() > 0 for grad in scores)


def test_what_cannot_be_restored_is_named() -> None:
    with pytest.raises(ConfigError, match=r"model\.view: 'flow'.*x0"):
        RestorationConfig().build(model("flow"))
    made, data = model(), batch()
    objective = RestorationConfig().build(made)
    bare = Batch(data.x, Condition(), data.ids)
    with pytest.raises(DataError, match=r"cond\.channels"):
        objective(made, bare, torch.Generator(), 1.0)
    large = Batch(data.x, Condition(channels=torch.zeros(6, 3, 24, 24)), data.ids)
    with pytest.raises(DataError, match=r"x: \(6, 3, 24, 24\)"):
        objective(made, large, torch.Generator(), 1.0)
    with pytest.raises(ConfigError, match=r"patch: 7"):
        RestorerConfig.from_dict({**SMALL_RESTORER, "patch": 7})
    with pytest.raises(ConfigError, match=r"trunk\.modulation"):
        RestorerConfig.from_dict({**SMALL_RESTORER, "trunk": {}})


def test_the_published_size() -> None:
    """Two blocks of width 384; head 3 -> 32, patches of 8, tail 128 -> 64 -> 3."""
    with torch.device("meta"):
        made = RestorerConfig().build()
    sizes = {
        name: sum(p.numel() for p in part.parameters()) for name, part in made.named_children()
    }
    assert sizes["patch_in"] == 32 * 64 * 384 + 384
    assert sizes["patch_out"] == 384 * 64 * 128 + 64 * 128
    assert sizes["head"] == (27 * 32 + 32) + 4 * (9 * 32 * 32 + 32)
