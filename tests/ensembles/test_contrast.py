"""Strong minus weak: one operator for guidance, autoguidance and other experts of one network."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from exact_mixtures import DATA, NOTHING, process, states, whole

from coterie.core.errors import ConfigError
from coterie.core.prediction import VIEWS, Condition
from coterie.ensembles import StrongWeakConfig
from coterie.experts import Router
from coterie.process import ExactDenoiser, convert
from coterie.solvers import GuidanceConfig, guide
from small_models import images, small, times, woken

LABEL = torch.arange(40) % 5


class Labelled:
    """The exact denoiser of the labelled component, or of all data."""

    def __init__(self, label: bool, view: Any = "x0") -> None:
        self.inner, self.label = ExactDenoiser(process(), DATA, view), label
        self.process, self.view = self.inner.process, view

    def __call__(self, x: Any, t: Any, cond: Condition) -> Any:
        return self.inner(x, t, cond if self.label else NOTHING)


@pytest.mark.parametrize("view", VIEWS)
def test_guidance_is_the_contrast_with_the_unconditional_answer(view: str) -> None:
    x, t = states()
    cond = Condition(label=LABEL)
    made = StrongWeakConfig(contrast={"weight": 2.5}).build(
        [Labelled(True, view), Labelled(False, view)]
    )
    guided = guide(Labelled(True, view), GuidanceConfig(weight=2.5))(x, t, cond)
    answer = made(x, t, cond)
    assert answer.view == guided.view == view
    torch.testing.assert_close(answer.value, guided.value, rtol=1e-12, atol=1e-12)


def test_autoguidance_is_the_same_and_every_view_moves_alike() -> None:
    x, t = states()
    weak = ExactDenoiser(process(), DATA.component(0))
    auto = guide(whole(), GuidanceConfig(mode="auto", weight=1.7), weak)(x, t, NOTHING)
    for view in VIEWS:
        made = StrongWeakConfig(contrast={"weight": 1.7}).build([whole(view), weak])
        answer = made(x, t, NOTHING)
        x0 = convert(process(), answer.value, answer.view, "x0", x, t)
        torch.testing.assert_close(x0, auto.value, rtol=1e-9, atol=1e-9)


def test_a_third_member_is_moved_by_the_difference_of_the_other_two() -> None:
    x, t = states()
    strong, weak, base = (ExactDenoiser(process(), DATA.component(k)) for k in (1, 2, 3))
    made = StrongWeakConfig(contrast={"weight": 3.0}).build(
        {"strong": strong, "weak": weak, "base": base}
    )
    values = [one(x, t, NOTHING).value for one in (strong, weak, base)]
    answer = made(x, t, NOTHING)
    torch.testing.assert_close(answer.value, values[2] + 2.0 * (values[0] - values[1]))
    (routing,) = answer.routings
    assert routing.gates[0].tolist() == [2.0, -2.0, 1.0]
    one = StrongWeakConfig(contrast={"weight": 1.0}).build([strong, weak, base])
    assert torch.equal(one(x, t, NOTHING).value, values[2])


def test_weight_one_asks_the_strong_one_alone_and_intervals_hold() -> None:
    x, t = states()
    asked: list[int] = []

    class Weak(ExactDenoiser):
        def __call__(self, x: Any, t: Any, cond: Condition) -> Any:
            asked.append(len(x))
            return super().__call__(x, t, cond)

    weak = Weak(process(), DATA.component(0))
    plain = whole()(x, t, NOTHING).value
    one = StrongWeakConfig(contrast={"weight": 1.0}).build([whole(), weak])
    assert torch.equal(one(x, t, NOTHING).value, plain) and asked == []
    part = {"weight": 2.0, "interval": (0.4, 0.6)}
    made = StrongWeakConfig(contrast=part).build([whole(), weak])(x, t, NOTHING).value
    inside = (t >= 0.4) & (t <= 0.6)
    assert torch.equal(made[~inside], plain[~inside])
    moved = 2.0 * plain - weak(x, t, NOTHING).value
    torch.testing.assert_close(made[inside], moved[inside])


def test_fewer_experts_of_the_same_network_are_the_weak_one_without_a_copy() -> None:
    model = woken(small("dit-moe"))
    batch, t = images(6, labels=[0, 1, 2, 3, 4, 5]), times(6)
    k = next(m.config.select.k for m in model.modules() if isinstance(m, Router))
    assert k > 1
    made = StrongWeakConfig(contrast={"weight": 2.0}, rerouted={"select.k": 1}).build([model])
    assert {id(p) for p in made.parameters()} == {id(p) for p in model.parameters()}
    weak = copy.deepcopy(model)
    for module in weak.modules():
        if isinstance(module, Router):
            module.config = module.config.replace(select={"kind": "top_k", "k": 1})
    with torch.no_grad():
        strong, weaker = (one(batch.x, t, batch.cond).value for one in (model, weak))
        answer = made(batch.x, t, batch.cond)
        after = model(batch.x, t, batch.cond).value
    torch.testing.assert_close(answer.value, 2.0 * strong - weaker)
    assert float((strong - weaker).abs().max()) > 1e-4
    assert torch.equal(after, strong)  # as it was before
    slots = {routing.slot for routing in answer.routings}
    assert slots == {"ensemble", "expert 0/ffn", "weak expert 0/ffn"}
    chosen = {routing.slot: routing.top_k for routing in answer.routings}
    assert chosen["expert 0/ffn"] == k and chosen["weak expert 0/ffn"] == 1


@pytest.mark.parametrize(
    ("fields", "count", "words"),
    [
        ({}, 1, "members.*2 or 3.*strong, weak"),
        ({"rerouted": {"select.k": 1}}, 2, "members.*1.*rerouted"),
        ({"rerouted": {"select.k": 1}}, 1, "no router chooses"),
    ],
)
def test_members_that_do_not_fit_are_refused(fields: Any, count: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        StrongWeakConfig.from_dict(fields).build([whole()] * count)


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"score\.kind"):
        StrongWeakConfig.from_dict({"rerouted": {"score.kind": "mlp"}})
    with pytest.raises(ConfigError, match="interval"):
        StrongWeakConfig.from_dict({"contrast": {"interval": (0.5, 0.2)}})
    with pytest.raises(ConfigError, match="router"):
        StrongWeakConfig().build([whole()] * 2, lambda x, t, cond: x)
    model = woken(small("dit-moe"))
    with pytest.raises(ConfigError, match="k"):
        StrongWeakConfig(rerouted={"select.k": 99}).build([model])
    config = StrongWeakConfig(contrast={"weight": 1.5, "rescale": 0.7}, process="ve")
    assert StrongWeakConfig.from_json(config.to_json()) == config
