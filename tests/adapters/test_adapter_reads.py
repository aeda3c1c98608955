"""Adapters act wherever a weight is read: routers, gates and cells read theirs past the module."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from coterie.adapters import LoraConfig, adapters_of, attach, fold, merge, unmerge, weigh
from coterie.core.context import Context
from coterie.core.errors import ConfigError
from coterie.experts import ExpertLayer, ExpertLayerConfig

WIDTH, EXPERTS = 8, 4

READS: dict[str, dict[str, object]] = {
    "linear": {"router": {"score": {"kind": "linear", "bias": True}}},
    "mlp": {"router": {"score": {"kind": "mlp"}}},
    "task_linear": {"router": {"score": {"kind": "task_linear", "num_tasks": 3}}},
    "noise_level": {"router": {"score": {"kind": "noise_level", "hidden": 6}, "unit": "sample"}},
    "uncertain": {"router": {"score": {"kind": "uncertain"}}},
    "recurrent": {"router": {"score": {"kind": "recurrent", "state": 6, "start": "time"}}},
    "prototypes": {"router": {"score": {"kind": "recurrent", "state": 6, "head": "cosine"}}},
    "shared gate": {"shared": {"hidden": 8, "count": 2, "gate": "self"}},
    "self gate": {
        "router": {"select": {"kind": "dense"}},
        "self_gate": {"by_task": ((0, 1), (2,), ())},
    },
}


def layer_of(name: str) -> ExpertLayer:
    torch.manual_seed(0)
    config = {"num_experts": EXPERTS, "experts": {"kind": "swiglu", "hidden": 6}, **READS[name]}
    return ExpertLayerConfig.from_dict(config).build(WIDTH)


def asked(layer: ExpertLayer, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    ctx = Context(
        batch=3,
        tokens=5,
        task=torch.tensor([0, 1, 2]),
        time_embedding=torch.randn(3, WIDTH, generator=rng),
        step_index=torch.tensor([1, 500, 999]),
    )
    return layer(torch.randn(3, 5, WIDTH, generator=rng), ctx).y


def wake(model: nn.Module) -> None:
    rng = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=rng))


@pytest.mark.parametrize("name", READS)
def test_B1_additions_act_where_weights_are_read(name: str) -> None:
    """Nothing changes at first; then the answer, and every gradient, is that of the merged."""
    layer = layer_of(name)
    before = asked(layer)
    parts = attach(layer, "a", LoraConfig(rank=2, narrow="lower"), warn=False)
    assert torch.allclose(asked(layer), before, atol=1e-6)  # other kernels where all is frozen
    wake(layer)
    apart = asked(layer)
    assert not torch.allclose(apart, before, atol=1e-3)
    apart.square().sum().backward()
    for path, part in parts.items():
        for own, parameter in part.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, (path, own)
    merge(layer)
    assert torch.allclose(asked(layer), apart, atol=1e-5)
    unmerge(layer)
    assert torch.equal(asked(layer), apart.detach())
    weigh(layer, {"a": 0.0})
    assert torch.allclose(asked(layer), before, atol=1e-6)


def test_B1_biases_and_copies_act_there_too() -> None:
    layer = layer_of("linear")
    config = LoraConfig(targets=(), biases=("routers.*",), experts=("*",), rank=2)
    attach(layer, "a", config)
    attach(layer, "b", LoraConfig(targets=(), copies=("routers.*.proj",)), weight=0.0)
    before = asked(layer)
    wake(layer)
    added = asked(layer)
    assert not torch.allclose(added, before, atol=1e-3)
    weigh(layer, {"a": 0.0, "b": 1.0})
    copied = asked(layer)
    assert not torch.allclose(copied, before, atol=1e-3)
    whole = copy.deepcopy(layer)
    fold(whole)
    assert torch.allclose(asked(whole), copied, atol=1e-5)


def test_B1_weights_per_sample_are_refused_where_a_weight_is_read_once() -> None:
    layer = layer_of("linear")
    attach(layer, "a", LoraConfig(targets=("routers.*",), rank=2))
    weigh(layer, {"a": torch.tensor([1.0, 0.0, 0.5])})
    with pytest.raises(ConfigError, match=r"weights\.a: 'per sample'"):
        asked(layer)


class Past(nn.Module):
    """It reads the weight of a map past the map."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.called = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.called(x @ self.read.weight.T)


def test_B1_an_adapter_that_reaches_nothing_is_refused() -> None:
    net, x = Past(), torch.ones(2, 4)
    attach(net, "lost", LoraConfig(targets=("read",), rank=2))
    with pytest.raises(ConfigError, match=r"adapter lost: 'read'.*cannot learn"):
        net(x)
    with torch.no_grad():
        net(x)  # it could not learn here anyway
    good = Past()
    attach(good, "found", LoraConfig(targets=("*",), rank=2))
    assert good(x).requires_grad and adapters_of(good)


def test_B1_what_torch_reads_past_a_module_is_no_target() -> None:
    net = nn.MultiheadAttention(8, 2)
    with pytest.raises(ConfigError, match="out_proj is of class NonDynamically"):
        attach(net, "a", LoraConfig(targets=("out_proj",)))
