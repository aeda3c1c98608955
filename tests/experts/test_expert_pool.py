"""Stacked parameters: layout, per-expert initialisation, one expert alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from coterie.core.errors import CheckpointError, ConfigError
from coterie.experts import EXPERTS, ExpertPool
from coterie.experts.kinds import Affine, ChannelWindow, GeluMLP, SwiGLU

KINDS = [
    SwiGLU(hidden=24),
    SwiGLU(hidden=24, activation="gelu"),
    GeluMLP(hidden=24),
    Affine(),
]


def filled(kind, num_experts: int = 3, width: int = 16) -> ExpertPool:
    pool = ExpertPool(kind, num_experts, width)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for stack in pool.parameters():
            stack.normal_(generator=rng)
    return pool


def test_layout_is_the_one_of_hugging_face_models() -> None:
    pool = ExpertPool(SwiGLU(hidden=24), 5, 16)
    assert {n: tuple(p.shape) for n, p in pool.named_parameters()} == {
        "gate_up": (5, 48, 16),
        "down": (5, 16, 24),
    }
    x = torch.randn(4, 16)
    gate, up = pool.gate_up[2][:24], pool.gate_up[2][24:]
    expected = (nn.functional.silu(x @ gate.T) * (x @ up.T)) @ pool.down[2].T
    torch.testing.assert_close(pool.unpack()[2](x), expected)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.kind)
def test_unpacked_modules_are_plain_and_equal(kind) -> None:
    pool = filled(kind)
    for e, module in enumerate(pool.unpack()):
        linears = [m for m in module.modules() if isinstance(m, nn.Linear)]
        assert linears and sum(p.numel() for p in module.parameters()) == sum(
            p[e].numel() for p in pool.parameters()
        )
        for name, plain in kind.plain_names().items():
            assert torch.equal(module.state_dict()[plain], getattr(pool, name)[e])


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.kind)
def test_one_expert_can_be_stored_and_replaced_alone(kind) -> None:
    source, target = filled(kind), ExpertPool(kind, 5, 16)
    before = {name: stack.detach().clone() for name, stack in target.stacks().items()}
    target.load_expert_state(4, source.expert_state(1))
    for name, stack in target.stacks().items():
        assert torch.equal(stack[4], getattr(source, name)[1])
        assert torch.equal(stack[:4], before[name][:4])


def test_foreign_expert_files_are_refused() -> None:
    pool = filled(SwiGLU(hidden=24))
    state = pool.expert_state(0)
    with pytest.raises(CheckpointError, match="expert tensors"):
        pool.load_expert_state(0, {"gate_up": state["gate_up"]})
    with pytest.raises(CheckpointError, match=r"down: \(16, 12\)"):
        pool.load_expert_state(0, {**state, "down": state["down"][:, :12]})
    with pytest.raises(ConfigError, match=r"expert: 3 .* 0\.\.2"):
        pool.expert_state(3)


def test_xavier_bound_is_that_of_one_expert_not_of_the_stack() -> None:
    pool = ExpertPool(SwiGLU(hidden=64), 16, 32)
    pool.reset_parameters(torch.Generator().manual_seed(0))
    for name, fan in (("gate_up", 128 + 32), ("down", 64 + 32)):
        stack = getattr(pool, name).detach()
        bound = math.sqrt(6 / fan)
        assert stack.abs().max() <= bound and stack.abs().amax(dim=(1, 2)).min() > 0.95 * bound
        assert stack.std() == pytest.approx(bound / math.sqrt(3), rel=0.03)
    assert not torch.equal(pool.down[0], pool.down[1])


def test_other_initialisations() -> None:
    pool = ExpertPool(GeluMLP(hidden=64, init_std=0.006), 4, 32)
    assert pool.up.std().item() == pytest.approx(0.006, rel=0.05)
    assert pool.up_bias.abs().max() == 0 and pool.down_bias.abs().max() == 0
    affine = ExpertPool(Affine(), 3, 8)
    assert affine.weight.abs().max() == 0 and affine.bias.abs().max() == 0


def test_inner_size_from_ratio() -> None:
    assert SwiGLU(ratio=2.5).size(8) == 20 and SwiGLU(hidden=7).size(8) == 7
    with pytest.raises(ConfigError, match=r"affine.*inner size"):
        Affine().with_hidden(4)


def test_kinds_without_parameters() -> None:
    pool = ExpertPool(ChannelWindow(share=0.5), 5, 8)
    assert not list(pool.parameters()) and pool.expert_state(0) == {}
    assert pool.delta.shape == (5, 8)
    for part in (pool.kind.module, pool.kind.shapes):
        if part == pool.kind.module:
            with pytest.raises(TypeError):
                part(8)
    assert {"affine", "channel_window", "gelu_mlp", "swiglu"} <= set(EXPERTS.kinds())


def test_backward_does_not_build_a_full_stack_per_expert() -> None:
    """Indexing a stack per expert under autograd costs E^2; unbinding costs E.

    Counted, not timed: the largest number of elements allocated by backward nodes of selects.
    """
    from coterie.core.routing import Routing
    from coterie.experts import dispatch, plan

    pool = ExpertPool(SwiGLU(hidden=8), 16, 16)
    ids = torch.arange(32).remainder(16)[:, None]
    flat = torch.zeros(32, 16)
    routing = Routing("token", 16, ids, torch.ones(32, 1), flat.softmax(1), flat, (1, 32))
    for backend in ("loop", "dense", "sorted", "grouped"):
        y = dispatch(torch.randn(32, 16), plan(routing), pool, backend)
        seen, todo, names = set(), [y.grad_fn], []
        while todo:
            node = todo.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            names.append(node.name())
            todo.extend(parent for parent, _ in node.next_functions)
        assert not any("Select" in name and "IndexSelect" not in name for name in names)
        assert sum("Unbind" in name for name in names) <= 2 + (backend == "dense")


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_a_gated_expert_may_use_gelu(approximate: str) -> None:
    name = {"none": "gelu", "tanh": "gelu_tanh"}[approximate]
    pool = filled(SwiGLU(hidden=24, activation=name))
    x = torch.randn(5, pool.width)
    gate, up = (x @ pool.gate_up[1].T).chunk(2, dim=1)
    expected = (nn.functional.gelu(gate, approximate=approximate) * up) @ pool.down[1].T
    torch.testing.assert_close(pool.unpack()[1](x), expected)
