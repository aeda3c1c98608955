"""Graphs that are recorded once and run by others: torch.jit.trace, torch.export, ONNX."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from coterie.core.context import Context
from coterie.core.errors import ConfigError
from coterie.experts import ExpertLayerConfig
from coterie.experts.balance.diffusion_prior import usage_map
from coterie.experts.dense import FEED_FORWARD
from coterie.experts.kinds.masks import ChannelWindow

DYNAMIC = {"h": {0: Dim("samples", min=2), 1: Dim("tokens", min=2)}}


class Answer(nn.Module):
    """A layer as a function of tensors."""

    def __init__(self, **config: object) -> None:
        super().__init__()
        torch.manual_seed(0)
        given = {"num_experts": 4, "experts": {"kind": "swiglu", "hidden": 8}, **config}
        self.layer = ExpertLayerConfig.from_dict(given).build(16).eval()

    def forward(self, h: Tensor) -> Tensor:
        return self.layer(h, Context(batch=h.shape[0], tokens=h.shape[1])).y


def rows(batch: int = 2, tokens: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(batch, tokens, 16, generator=torch.Generator().manual_seed(seed))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("form", ["gelu", "swiglu", "layer", "shared"])
def test_C4_a_trace_computes_what_was_traced(form: str, grad: bool) -> None:
    """Dense networks too; for rows that were not there when it was traced."""
    with torch.set_grad_enabled(grad):
        if form in FEED_FORWARD:
            torch.manual_seed(0)
            net: nn.Module = FEED_FORWARD[form](16, 32)
        else:
            net = Answer(**({"shared": {"hidden": 8}} if form == "shared" else {}))
        traced = torch.jit.trace(net, (rows(),), check_trace=False)
        other = rows(seed=1)
        assert torch.allclose(traced(other), net(other), atol=1e-5)
        assert torch.allclose(traced(other), net(other), atol=1e-5)  # nor does it change


@pytest.mark.parametrize("dispatch", ["auto", "loop"])
def test_D11_every_dispatch_is_exported(dispatch: str) -> None:
    """By torch.export's default mode, with sizes left open and rows that choose other experts."""
    net, other = Answer(dispatch=dispatch), rows(3, 7, seed=1)
    made = torch.export.export(net, (rows(),), dynamic_shapes=DYNAMIC)
    assert torch.allclose(made.module()(other), net(other), atol=1e-5)
    assert "coterie" not in str(made.graph)  # whoever runs it need not have this library


@pytest.mark.parametrize(
    "config",
    [
        {"router": {"select": {"kind": "top_p", "p": 0.5}}},
        {"router": {"select": {"kind": "expert_choice", "k": 2.0}}},
        {"experts": {"kind": "affine"}, "router": {"unit": "sample"}},
        {"experts": {"kind": "channel_window", "mode": "random", "num_masks": 4}},
    ],
)
def test_D11_nothing_of_the_rows_is_kept_in_an_export(config: dict[str, object]) -> None:
    net, other = Answer(**config), rows(seed=1)
    made = torch.export.export(net, (rows(),))
    assert torch.allclose(made.module()(other), net(other), atol=1e-5)


def test_D11_statistics_of_a_batch_are_refused() -> None:
    net = Answer(experts={"kind": "norm_mlp"}).train()
    with pytest.raises(ConfigError, match=r"torch\.export or trace: 'norm_mlp'"):
        torch.export.export(net, (rows(),))


@pytest.mark.filterwarnings("ignore")
def test_D11_onnx_runs_a_mixture_of_experts(tmp_path: Path) -> None:
    import onnxruntime

    net, other = Answer(shared={"hidden": 8}), rows(3, 7, seed=1)
    with torch.no_grad():
        made = torch.onnx.export(net, (rows(),), dynamic_shapes=DYNAMIC, dynamo=True, verbose=False)
        made.save(tmp_path / "layer.onnx")
        wanted = net(other).numpy()
    session = onnxruntime.InferenceSession(
        tmp_path / "layer.onnx", providers=["CPUExecutionProvider"]
    )
    (found,) = session.run(None, {session.get_inputs()[0].name: other.numpy()})
    assert np.allclose(found, wanted, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_C4_masks_are_recorded_by_a_trace() -> None:
    def used(table: Tensor) -> Tensor:
        return usage_map([SimpleNamespace(table=table, top_k=2)]).float()  # type: ignore[list-item]

    table = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    traced = torch.jit.trace(used, (table,), check_trace=False)
    assert torch.equal(traced(table.flip(0)), used(table.flip(0)))
    windows = ChannelWindow(mode="random", num_masks=4)

    def masked(x: Tensor) -> Tensor:
        return x + windows.buffers(16)["delta"][0]

    traced = torch.jit.trace(masked, (rows(),), check_trace=False)
    moved = traced(torch.zeros(2, 6, 16))  # a trace draws by torch's own generator
    assert set(moved.unique().tolist()) == {-1.0, 0.0}
    assert torch.equal(moved.sum(-1), masked(torch.zeros(2, 6, 16)).sum(-1))
