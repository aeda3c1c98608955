"""The loss of a network that saw a part of its input: on all of it, on what was seen, and the
reconstruction of what was not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from coterie.core.batch import Batch
from coterie.core.prediction import Condition, Prediction
from coterie.core.rng import generator
from coterie.process import PROCESSES
from coterie.train.objectives import DenoisingConfig
from coterie.train.objectives.denoising import mean_over

POINTS = 7


class Halfblind(nn.Module):
    """Answers a constant and says it saw the first points of each cloud only."""

    def __init__(self, seen: int | None) -> None:
        super().__init__()
        self.process = PROCESSES.parse("rectified_flow").build()
        self.value = nn.Parameter(torch.full((POINTS, 3), 0.25))
        self.seen = seen
        self.inputs: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor, cond: Condition, **_: object) -> Prediction:
        self.inputs.append(x)
        visible = None
        if self.seen is not None:
            visible = (torch.arange(POINTS) < self.seen).expand(len(x), POINTS)
        return Prediction(self.value.expand(x.shape), "x0", visible=visible)

    def aux_losses(self, *_: object) -> tuple[()]:
        return ()


def losses(model: Halfblind, **options: object):  # type: ignore[no-untyped-def]
    x = torch.randn(4, POINTS, 3, generator=torch.Generator().manual_seed(0))
    batch = Batch(x, Condition(), torch.arange(4))
    return x, DenoisingConfig.from_dict(options).build(model)(model, batch, generator(0, "t"), 0.5)


def test_mean_over_parts_is_a_plain_loop() -> None:
    rng = torch.Generator().manual_seed(0)
    values, where = torch.rand(3, 5, 2, generator=rng), torch.rand(3, 5, generator=rng) < 0.5
    where[2] = False
    by_hand = [v[w].mean() if w.any() else torch.tensor(0.0) for v, w in zip(values, where)]
    torch.testing.assert_close(mean_over(values, where), torch.stack(by_hand))
    torch.testing.assert_close(mean_over(values, None), values.flatten(1).mean(1))


@pytest.mark.parametrize(("support", "counted"), [("all", POINTS), ("visible", 3)])
def test_the_loss_looks_where_it_is_told(support: str, counted: int) -> None:
    model = Halfblind(3)
    x, found = losses(model, support=support)
    gap = (0.25 - x[:, :counted]).square().mean(dim=(1, 2))
    torch.testing.assert_close(found.per_sample, gap)
    found.total.backward()
    assert (model.value.grad[:counted] != 0).all() and not model.value.grad[counted:].any()


def test_a_network_that_sees_all_has_the_plain_loss() -> None:
    plain, other = losses(Halfblind(None))[1], losses(Halfblind(None), support="visible")[1]
    assert torch.equal(plain.total, other.total) and set(other.main) == {"denoising"}
    assert set(losses(Halfblind(None), reconstruction=0.5)[1].main) == {"denoising"}


def test_reconstruction_compares_with_the_noisy_input_where_nothing_was_seen() -> None:
    model = Halfblind(3)
    _, found = losses(model, support="visible", reconstruction=0.1)
    noisy = model.inputs[0][:, 3:]
    wanted = 0.1 * (0.25 - noisy).square().mean()
    torch.testing.assert_close(found.main["reconstruction"], wanted)
    torch.testing.assert_close(found.total, found.main["denoising"] + wanted)
