"""Low-rank additions to stacked experts: every dispatch, merge, files, and what is left out."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_adapter_reads import wake
from torch import Tensor, nn

from coterie.adapters import (
    AdapterWarning,
    LoraConfig,
    Stacks,
    attach,
    load_adapter,
    merge,
    read_adapter,
    save_adapter,
)
from coterie.core.context import Context
from coterie.core.errors import CheckpointError, ConfigError
from coterie.core.json_reader import read_object
from coterie.experts import ExpertLayer, ExpertLayerConfig
from coterie.experts.kinds import EXPERTS
from coterie.train.parallel.exchange import split_experts

BACKENDS = ("auto", "loop", "dense", "sorted", "grouped", "native")
ALL = LoraConfig(targets=(), experts=("*",), rank=2, narrow="lower")
STACKED = [kind for kind in EXPERTS.kinds() if kind not in ("channel_window",)]


def layer_of(kind: str = "swiglu", dispatch: str = "auto", **more: object) -> ExpertLayer:
    torch.manual_seed(0)
    unit = "sample" if kind == "conv" else "token"
    config = {
        "num_experts": 4,
        "experts": {"kind": kind},
        "router": {"select": {"kind": "top_k", "k": 2}, "unit": unit},
        "dispatch": dispatch,
        **more,
    }
    layer = ExpertLayerConfig.from_dict(config).build(8).eval()
    with torch.no_grad():
        for stack in layer.pool.stacks().values():
            stack.normal_(0.0, 0.3)
    return layer


def asked(layer: ExpertLayer, x: Tensor | None = None) -> Tensor:
    rng = torch.Generator().manual_seed(3)
    shape = (3, 8, 4, 4) if layer.pool.kind.grid else (3, 8, 8)
    x = torch.randn(shape, generator=rng) if x is None else x
    return layer(x, Context(batch=3, tokens=8)).y


@pytest.mark.parametrize("kind", STACKED)
@pytest.mark.parametrize("dispatch", BACKENDS)
def test_B5_every_dispatch_answers_as_the_merged_experts(kind: str, dispatch: str) -> None:
    """Outputs, and gradients of the input and of both factors (through the merged weights)."""
    if kind == "conv" and dispatch in ("grouped", "native"):
        dispatch = "loop"
    layer = layer_of(kind, dispatch)
    before = asked(layer)
    (part,) = attach(layer, "a", ALL).values()
    assert isinstance(part, Stacks) and torch.equal(asked(layer), before)
    wake(layer)
    shape = (3, 8, 4, 4) if layer.pool.kind.grid else (3, 8, 8)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), requires_grad=True)
    y = asked(layer, x)
    assert not torch.allclose(y, asked(copy.deepcopy(layer_of(kind, dispatch)), x), atol=1e-3)
    trained = [p for p in layer.parameters() if p.requires_grad]
    found = torch.autograd.grad(y.square().sum(), [x, *trained])

    merged = layer_of(kind, "loop")
    stacks = {
        n: s.detach().clone().requires_grad_() for n, s in layer.pool.adapted().stacks().items()
    }
    with torch.no_grad():
        for name, stack in merged.pool.stacks().items():
            stack.copy_(stacks[name])
    z = asked(merged, x)
    assert torch.allclose(y, z, atol=1e-4, rtol=1e-4)
    (dx,) = torch.autograd.grad(z.square().sum(), [x], retain_graph=True)
    assert torch.allclose(found[0], dx, atol=1e-3, rtol=1e-3)
    own = dict(zip([id(p) for p in trained], found[1:], strict=True))
    for name, stack in merged.pool.stacks().items():
        if name not in part.names:
            continue
        (dw,) = torch.autograd.grad(z.square().sum(), [stack], retain_graph=True)
        up = part.config.scale * torch.einsum("eoi,eri->eor", dw.flatten(2), part.down[name])
        scale = float(up.detach().abs().max())
        assert torch.allclose(own[id(part.up[name])], up, atol=1e-4 * scale, rtol=1e-3), name
    merge(layer)
    assert torch.allclose(asked(layer, x), y, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "more",
    [
        {"shared": {"hidden": 6, "count": 2, "gate": "self"}},
        {"slot_map": (0, 1, 1, 0)},
        {"rounds": 2},
        {"stem": "star"},
        {"adaptor": 1.0},
    ],
)
def test_B5_in_every_layer_around_the_experts(more: dict[str, object]) -> None:
    layer = layer_of(**more)  # type: ignore[arg-type]
    attach(layer, "a", ALL)
    wake(layer)
    apart = asked(layer)
    merge(layer)
    assert torch.allclose(asked(layer), apart, atol=1e-4, rtol=1e-4)


class Foreign(nn.Module):
    """Stacked experts in the layout of Hugging Face models, which read their own parameters."""

    def __init__(self) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        self.gate_up_proj = nn.Parameter(torch.randn(3, 8, 4, generator=rng))
        self.bias = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        if not torch.isfinite(x).all():
            raise ValueError("not finite")
        return torch.einsum("ni,eoi->neo", x, self.gate_up_proj) + self.bias[:, None]


def test_B5_experts_of_other_libraries() -> None:
    net, x = nn.Sequential(Foreign()), torch.randn(5, 4)
    before = net(x)
    attach(net, "a", ALL)
    assert torch.equal(net(x), before)
    wake(net)
    apart = net(x)
    apart.sum().backward()
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)
    with pytest.raises(ValueError, match="not finite"):
        net(x * float("nan"))
    assert net[0].gate_up_proj is net[0]._parameters["gate_up_proj"]  # given back all the same
    merge(net)
    assert torch.allclose(net(x), apart, atol=1e-4) and not torch.allclose(apart, before)


def test_B5_what_is_left_out_is_said_with_the_share_that_is_reached() -> None:
    layer = layer_of()
    with pytest.warns(AdapterWarning, match=r"pool\.gate_up and 1 more stay.*1\.\d% of"):
        attach(layer, "a", LoraConfig(rank=2))
    quiet = layer_of()
    attach(quiet, "a", ALL.replace(targets=("*",)))  # warnings of coterie are errors in this suite
    named = layer_of()
    attach(named, "a", LoraConfig(targets=("routers.*",), rank=2))
    with pytest.raises(ConfigError, match=r"experts: 'pool\.up'"):
        attach(named, "b", LoraConfig(experts=("pool.up",)))
    with pytest.raises(ConfigError, match=r"rank: 9 .*pool\.gate_up maps 8"):
        attach(named, "b", LoraConfig(experts=("*",), targets=(), rank=9))


def test_B5_experts_with_adapters_stay_in_one_process() -> None:
    layer = layer_of()
    attach(layer, "a", ALL)
    processes: Any = SimpleNamespace(config=SimpleNamespace(expert=2), place={"expert": 0})
    with pytest.raises(ConfigError, match=r"parallel\.expert: 2 .*pool has adapters"):
        split_experts(layer, processes)


def test_B5_files_hold_the_factors_of_experts(tmp_path: Path) -> None:
    layer = layer_of()
    attach(layer, "a", LoraConfig(targets=("routers.*",), experts=("*",), rank=2, alpha=3.0))
    wake(layer)
    save_adapter(layer, "a", tmp_path / "a")
    told = read_object(tmp_path / "a" / "adapter_config.json")
    assert told["peft_type"] == "LORA_EXPERTS"  # PEFT would read a part of it
    assert read_adapter(tmp_path / "a").config.experts == ("pool.down", "pool.gate_up")
    again = layer_of()
    load_adapter(again, "b", tmp_path / "a")
    assert torch.equal(asked(again), asked(layer))
    other = layer_of("gelu_mlp")
    with pytest.raises(CheckpointError, match=r"experts: 'pool\.gate_up'.*pool\.up"):
        load_adapter(other, "b", tmp_path / "a")
    wide = layer_of(experts={"kind": "swiglu", "hidden": 5})
    with pytest.raises(CheckpointError, match=r"pool\.down: \(\(4, 2, 32\)"):
        load_adapter(wide, "b", tmp_path / "a")
