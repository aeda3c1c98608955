"""Rewards: what they value, what they refuse, and that a tilt towards them is the tilted law."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from coterie.core.errors import ConfigError, DataError
from coterie.core.prediction import Condition, Prediction
from coterie.core.rng import SampleNoise
from coterie.ensembles.product import CompositionConfig, compose
from coterie.ensembles.rewards import REWARDS, ClassReward
from coterie.process import PROCESSES, ExactDenoiser, Mixture
from coterie.solvers import GRIDS, SOLVERS, sample

VP = PROCESSES.parse("vp_linear").build()
NOTHING = Condition()
T = torch.full((3,), 0.5)


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Prediction:
        return Prediction(self.map(x.flatten(1)), "logits")


def test_brightness_and_symmetry_are_what_they_say() -> None:
    x = torch.randn(3, 1, 4, 4)
    torch.testing.assert_close(
        REWARDS.parse("brightness").build()(x, T, NOTHING), x.mean((1, 2, 3))
    )
    symmetry = REWARDS.parse("symmetry").build()
    assert not symmetry(x + x.flip(-1), T, NOTHING).any()
    assert (symmetry(x, T, NOTHING) < 0).all()
    other = REWARDS.parse({"kind": "symmetry", "axis": "up_down"}).build()
    assert not other(x + x.flip(-2), T, NOTHING).any()
    assert (other(x + x.flip(-1), T, NOTHING) < 0).all()


def test_a_class_is_the_one_asked_for_or_that_of_the_sample() -> None:
    network, x = Reader(), torch.randn(3, 2, 2)
    logs = network(x).value.log_softmax(1)
    fixed = ClassReward(network, 2)(x, T, NOTHING)
    torch.testing.assert_close(fixed, logs[:, 2])
    own = ClassReward(network)(x, T, Condition(label=torch.tensor([1, 0, 2])))
    torch.testing.assert_close(own, logs[torch.arange(3), torch.tensor([1, 0, 2])])
    assert not any(p.requires_grad for p in network.parameters())


def test_a_class_that_is_not_there() -> None:
    network, x = Reader(), torch.randn(3, 2, 2)
    with pytest.raises(ConfigError, match=r"reward.label: 3 .*0..2"):
        ClassReward(network, 3)(x, T, NOTHING)
    with pytest.raises(ConfigError, match=r"reward.label: None .*which class"):
        ClassReward(network)(x, T, NOTHING)
    with pytest.raises(DataError, match=r"reward.network.*class logits"):
        ClassReward(nn.Identity())(x, T, NOTHING)
    with pytest.raises(DataError, match=r"x.shape.*no picture"):
        REWARDS.parse({"kind": "symmetry", "axis": "up_down"}).build()(x[:, 0], T, NOTHING)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reward": "brightness"}, 'reward: .*mode "product"'),
        ({"mode": "tilt", "reward": "loudness"}, "kind: 'loudness'"),
        ({"mode": "tilt", "reward": {"kind": "class", "network": "denoiser"}}, "a trained model"),
    ],
)
def test_rewards_that_do_not_fit(settings: dict[str, Any], message: str) -> None:
    data = Mixture.gaussian(torch.zeros(2), 1.0)
    with pytest.raises(ConfigError, match=message):
        CompositionConfig.from_dict(settings).build([ExactDenoiser(VP, data)])


def test_a_configured_reward_is_the_function_itself() -> None:
    data = Mixture.gaussian(torch.tensor([0.3, -0.2]), 0.5)
    x, t = torch.randn(5, 2), torch.linspace(0.1, 0.9, 5)
    named = CompositionConfig.from_dict({"mode": "tilt", "tilt": 3.0, "reward": "brightness"})
    given = compose(
        [ExactDenoiser(VP, data, "eps")], mode="tilt", tilt=3.0, reward=lambda x, t, c: x.mean(1)
    )
    one, other = named.build([ExactDenoiser(VP, data, "eps")])(x, t, NOTHING), given(x, t, NOTHING)
    assert torch.equal(one.value, other.value)
    assert one.weight_rate is not None and other.weight_rate is not None
    assert torch.equal(one.weight_rate, other.weight_rate)


def test_tilting_a_gaussian_by_its_brightness_moves_its_mean() -> None:
    """N(0, s^2 I) times exp(b mean(x)) is N(b s^2 / d, s^2 I)."""
    data = Mixture.gaussian(torch.zeros(2), 0.5)
    config = CompositionConfig.from_dict({"mode": "tilt", "tilt": 8.0, "reward": "brightness"})
    made = config.build([ExactDenoiser(VP, data, "eps")])
    noise = SampleNoise(range(400))
    x = sample(
        made, made.initial((2,), noise), NOTHING, solver=SOLVERS.parse("feynman_kac"),
        grid=GRIDS.parse("lambda"), steps=60, noise=noise,
    )  # fmt: skip
    assert x.mean(0).sub(1.0).abs().max() < 0.15
    assert x.std(0).sub(0.5).abs().max() < 0.1
