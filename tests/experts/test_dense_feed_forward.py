"""Dense feed-forward networks by the native operator: the same function, and who is listened to."""

import copy

import pytest
import torch
from torch import nn

from coterie.experts import ExpertPool, dense, dispatch
from coterie.experts.dispatch import native, plan_choices
from coterie.experts.kinds import GeluMLP, SwiGLU
from coterie.experts.shared import SharedConfig
from coterie.nn import mlp

PAIRS = [
    (dense.GeluMLP, mlp.GeluMLP, ()),
    (dense.SwiGLU, mlp.SwiGLU, ()),
    (dense.SwiGLU, mlp.SwiGLU, ("gelu",)),
    (dense.SwiGLU, mlp.SwiGLU, ("gelu_tanh",)),
]
needs_native = pytest.mark.skipif(not native.library().ready, reason="no C compiler here")


def pair(served, plain, told, width=24, hidden=40):
    torch.manual_seed(0)
    ours, theirs = served(width, hidden, *told), plain(width, hidden, *told)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize(("served", "plain", "told"), PAIRS)
@pytest.mark.parametrize("shape", [(24,), (1, 24), (5, 24), (3, 50, 24), (0, 4, 24)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_same_answer_and_gradients(served, plain, told, shape, dtype):
    ours, theirs = (module.to(dtype) for module in pair(served, plain, told))
    x = torch.randn(shape, dtype=dtype)
    bound = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0, "atol": 0}
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), **bound)
    grads = []
    for module in (ours, theirs):
        leaf = x.clone().requires_grad_(True)
        y = module(leaf)
        grads.append(torch.autograd.grad((y * y.detach()).sum(), [leaf, *module.parameters()]))
        assert y.shape == x.shape
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=bound["rtol"], atol=10 * bound["atol"])


@needs_native
def test_float32_on_a_cpu_is_served(monkeypatch):
    from coterie.experts.dispatch.native import op

    ours, _ = pair(*PAIRS[0])
    asked = []
    run = op.run_one
    monkeypatch.setattr(op, "run_one", lambda *args: asked.append(1) or run(*args))
    with torch.no_grad():
        ours(torch.randn(2, 24))
        assert asked == [1]
        with torch.autocast("cpu", torch.bfloat16):
            assert ours(torch.randn(2, 24)).dtype == torch.bfloat16
        ours.double()(torch.randn(2, 24, dtype=torch.float64))
    assert asked == [1]


def test_listeners_and_adapters_are_heard():
    ours, theirs = pair(*PAIRS[0])
    x, heard = torch.randn(7, 24), []
    handle = ours.up.register_forward_hook(lambda module, given, out: heard.append(out))
    ours(x)
    assert torch.equal(heard[0], theirs.up(x))
    handle.remove()

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    for module in (ours, theirs):
        made = Doubled(24, 40)
        made.load_state_dict(module.up.state_dict())
        module.up = made
    assert torch.equal(ours(x), theirs(x))


def test_other_defaults_of_torch_change_nothing():
    ours, theirs = pair(*PAIRS[0])
    x = torch.randn(11, 24)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad():
            found = ours(x)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found, theirs(x).detach(), rtol=1e-5, atol=1e-6)


def test_gradients_of_gradients_and_transforms():
    ours, theirs = pair(*PAIRS[0])
    x, v = torch.randn(3, 24), torch.randn(3, 24)
    made = []
    for module in (ours, theirs):
        leaf = x.clone().requires_grad_(True)
        (first,) = torch.autograd.grad(module(leaf).pow(2).sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), leaf)
        made.append((second, torch.func.jvp(module, (x,), (v,))[1]))
    for a, b in zip(*made):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_copy_stands_alone():
    ours, theirs = pair(*PAIRS[1])
    twin = copy.deepcopy(ours)
    with torch.no_grad():
        ours.down.weight.zero_()
        x = torch.randn(4, 24)
        torch.testing.assert_close(twin(x), theirs(x), rtol=1e-5, atol=1e-6)
        assert not ours(x).any()


def count_calls(monkeypatch):
    """The rows of every call that the operator serves for one expert."""
    from coterie.experts.dispatch.native import op

    asked = []
    for name in ("run_one", "experts"):
        run = getattr(op, name)
        monkeypatch.setattr(op, name, lambda x, *rest, r=run: asked.append(x.shape) or r(x, *rest))
    return asked


@needs_native
@pytest.mark.parametrize("gate", ["one", "self"])
@pytest.mark.parametrize("kind", [SwiGLU(), GeluMLP()])
def test_shared_experts_are_served(monkeypatch, kind, gate):
    """float64 is torch's own, and the same function."""
    torch.manual_seed(0)
    shared = SharedConfig(hidden=20, count=2, gate=gate).build(kind, 24)
    expected = copy.deepcopy(shared).double()
    x = torch.randn(5, 9, 24)
    asked = count_calls(monkeypatch)
    made = []
    for module, leaf in ((shared, x.clone()), (expected, x.double())):
        leaf.requires_grad_()
        y = module(leaf)
        grads = torch.autograd.grad(y.sin().sum(), [leaf, *module.parameters()])
        with torch.no_grad():
            made.append((module(leaf), y, *grads))
    calls = 1 if gate == "one" else 2
    assert asked == [(45, 24)] * calls + [(5, 9, 24)] * calls
    for a, b in zip(*made):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@needs_native
def test_an_expert_that_is_always_on_is_served(monkeypatch):
    torch.manual_seed(0)
    pool, x = ExpertPool(SwiGLU(hidden=20), 4, 24), torch.randn(50, 24)
    one = dense.SwiGLU(24, 32)
    always = {"gate_up": one.gate_up.weight, "down": one.down.weight}
    chosen = plan_choices(torch.randint(0, 4, (50, 2)), torch.rand(50, 2), 4)
    expected = dispatch(x, chosen, pool, "loop") + mlp.SwiGLU.forward(one, x)
    asked = count_calls(monkeypatch)
    with torch.no_grad():
        y = dispatch(x, chosen, pool, always=always)
    assert asked[-1] == (50, 24) and len(asked) <= 2
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
