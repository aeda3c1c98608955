from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from coterie.core.config import override
from coterie.core.errors import ConfigError
from coterie.train import Ema, TrainConfig


def test_round_trip_and_overrides():
    config = TrainConfig(schedule="cosine", ema=[0.99, 0.9], clip=None)
    assert TrainConfig.from_json(config.to_json()) == config
    changed = override(config, {"ema": "0.5", "schedule.final": "0.1", "clip": "2"})
    assert changed.ema == (0.5,)
    assert changed.schedule.final == 0.1
    assert override(config, {"ema": "null"}).ema == ()


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"batch": 8, "accumulate": 3}, "accumulate: 3"),
        ({"ema": [0.9, 0.9]}, "ema"),
        ({"ema": 1.0}, "ema"),
        ({"betas": [0.9, 1.0]}, "betas"),
        ({"lr": math.nan}, "lr"),
        ({"lr": -1}, "lr"),
        ({"precision": "float16"}, "precision"),
        ({"schedule": {"kind": "steps", "at": [0.9, 0.5]}}, "at"),
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
        ({"step": 3}, "did you mean 'steps'"),
    ],
)
def test_bad_values_are_named(values, field):
    with pytest.raises(ConfigError) as error:
        TrainConfig.from_dict(values)
    assert field in str(error.value)


def test_unknown_device_is_a_config_error():
    from coterie.train.precision import resolve_device

    with pytest.raises(ConfigError, match="device: 'tpu9'"):
        resolve_device("tpu9")


def test_learning_rates():
    constant = TrainConfig(steps=100, lr=2.0, warmup=4)
    assert [constant.lr_at(s) for s in (0, 1, 4, 99)] == pytest.approx([0.4, 0.8, 2.0, 2.0])
    cosine = TrainConfig(steps=100, lr=1.0, schedule={"kind": "cosine", "final": 0.2})
    assert [cosine.lr_at(s) for s in (0, 50, 100)] == pytest.approx([1.0, 0.6, 0.2])
    linear = TrainConfig(steps=100, lr=1.0, warmup=9, schedule={"kind": "linear", "final": 0.2})
    assert [linear.lr_at(s) for s in (0, 50, 100)] == pytest.approx([0.1, 0.6, 0.2])
    drops = TrainConfig(steps=100, lr=1.0, schedule={"kind": "steps", "at": [0.5, 0.8]})
    assert [drops.lr_at(s) for s in (49, 50, 79, 80)] == pytest.approx([1.0, 0.1, 0.1, 0.01])


def drifting(dtype=torch.float32):
    model = nn.Linear(3, 2, bias=False).to(dtype)
    model.register_buffer("count", torch.zeros((), dtype=torch.int64))
    model.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    return model


@pytest.mark.parametrize("warmup", [False, True])
def test_ema_has_its_closed_form(warmup):
    model = drifting()
    start = model.weight.detach().double().clone()
    ema = Ema(model, [0.9, 0.99], warmup=warmup)
    path = [torch.randn(2, 3, generator=torch.Generator().manual_seed(i)) for i in range(25)]
    for value in path:
        with torch.no_grad():
            model.weight.copy_(value)
            model.count += 1
        ema.update(model)
    for decay in (0.9, 0.99):
        rates = [min(decay, (1 + n) / (10 + n)) if warmup else decay for n in range(25)]
        expected = start * math.prod(rates)
        for n, value in enumerate(path):
            expected = expected + value.double() * (1 - rates[n]) * math.prod(rates[n + 1 :])
        shadow = ema.tensors(decay)
        assert torch.allclose(shadow["weight"].double(), expected, atol=1e-6)
        assert shadow["count"] == 25
        assert "frozen" not in shadow


def test_ema_of_half_precision_weights_is_float32_and_keeps_small_changes():
    model = drifting(torch.bfloat16)
    ema = Ema(model, [0.999], warmup=False)
    before = ema.tensors(0.999)["weight"].clone()
    with torch.no_grad():
        model.weight += 0.25
    ema.update(model)
    after = ema.tensors(0.999)["weight"]
    assert after.dtype == torch.float32
    assert torch.all((after - before).abs() > 0)
    other = drifting(torch.bfloat16)
    ema.copy_to(other)
    assert torch.equal(other.weight, after.bfloat16())


def test_ema_refuses_an_unknown_decay():
    model = drifting()
    with pytest.raises(ConfigError, match=r"decay: 0.5"):
        Ema(model, [0.9]).copy_to(model, 0.5)
    with pytest.raises(ConfigError, match=r"set train\.ema"):
        Ema(model, []).copy_to(model)
