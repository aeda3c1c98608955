"""Finding the dense feed-forward networks of a foreign model, by structure and by numbers.

Legend: D width, F inner size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from coterie.core.errors import ConfigError, describe
from coterie.core.registry import Part
from coterie.experts import EXPERTS, ExpertKind, ExpertLayer
from coterie.nn.mlp import GLU_ACTIVATIONS

GATED = ("gate_proj", "up_proj", "down_proj")
PAIRS = (("c_fc", "c_proj"), ("dense_h_to_4h", "dense_4h_to_h"), ("fc1", "fc2"))
ACTIVATION_NAMES = ("act_fn", "act", "activation_fn", "activation")
ALLOWED = (
    "a model whose blocks have a network of gate_proj, up_proj, down_proj, "
    "or of c_fc and c_proj (dense_h_to_4h and dense_4h_to_h, fc1 and fc2)"
)
AGREES = 1e-4  # relative: another activation than the one assumed is further off than this


@dataclass(frozen=True)
class DenseNetwork:
    """A feed-forward network at ``path``: ``kind`` (of inner size F) computes what it does."""

    path: str
    module: nn.Module
    kind: ExpertKind
    width: int
    hidden: int

    def tensors(self) -> dict[str, Tensor]:
        """Its weights by the names of the kind's, [out, in]."""
        if self.kind.kind == "swiglu":
            gate, up, down = (_weight(self.module, name) for name in GATED)
            return {"gate_up": torch.cat([gate, up]), "down": down}
        up, down = (getattr(self.module, name) for name in _pair(self.module) or ())
        return {
            "up": _weight(self.module, up),
            "up_bias": up.bias,
            "down": _weight(self.module, down),
            "down_bias": down.bias,
        }

    @property
    def dropout(self) -> float:
        """Share of its answer dropped while training (GPT-2)."""
        found = [m.p for m in self.module.children() if isinstance(m, nn.Dropout)]
        return float(found[0]) if found else 0.0


def find_networks(model: nn.Module) -> list[DenseNetwork]:
    """Every dense network, in the model's order; ConfigError for none, or one we cannot state.

    On the meta device only structure and activation are looked at, not the numbers.
    """
    for path, module in model.named_modules():
        if path.rsplit(".", 1)[-1] == "experts" or isinstance(module, ExpertLayer):
            raise ConfigError(describe("model", path, "a dense model", "it holds experts already"))
    found = [
        _network(path, module)
        for path, module in model.named_modules()
        if _is_gated(module) or _pair(module) is not None
    ]
    if not found:
        raise ConfigError(describe("model", type(model).__name__, ALLOWED))
    for network in found:
        _check(network)
    return found


def _network(path: str, module: nn.Module) -> DenseNetwork:
    if _is_gated(module):
        down = _weight(module, "down_proj")
        biased = [name for name, value in module.named_parameters() if value.dim() == 1]
        if biased:
            raise ConfigError(describe(path, biased[0], "a gated network without biases"))
        part: dict[str, Any] = {"kind": "swiglu", "activation": _activation(path, module)}
    else:
        first, second = (getattr(module, name) for name in _pair(module) or ())
        down = _weight(module, second)
        if first.bias is None or second.bias is None:
            raise ConfigError(describe(path, "no bias", "a two-layer network with biases"))
        activation = _activation(path, module)
        if activation != "gelu_tanh":
            hint = "two-layer experts use the tanh form"
            raise ConfigError(describe(f"{path}: activation", activation, "gelu_tanh", hint))
        part = {"kind": "gelu_mlp"}
    width, hidden = down.shape
    kind: Part = EXPERTS.parse({**part, "hidden": hidden})
    assert isinstance(kind, ExpertKind)
    return DenseNetwork(path, module, kind, width, hidden)


def _is_gated(module: nn.Module) -> bool:
    return all(isinstance(getattr(module, name, None), nn.Linear) for name in GATED)


def _pair(module: nn.Module) -> tuple[str, str] | None:
    """Names of the two layers of a network that holds nothing else; None for anything else."""
    for pair in PAIRS:
        layers = [getattr(module, name, None) for name in pair]
        own = {id(value) for layer in layers if layer is not None for value in layer.parameters()}
        if all(hasattr(layer, "weight") for layer in layers):
            return pair if {id(value) for value in module.parameters()} == own else None
    return None


def _weight(module: nn.Module, layer: str | nn.Module) -> Tensor:
    """[out, in], also of GPT-2's transposed layers."""
    found: Any = getattr(module, layer) if isinstance(layer, str) else layer
    weight: Tensor = found.weight
    return weight if isinstance(found, nn.Linear) else weight.T


def _activation(path: str, module: nn.Module) -> str:
    """Our name of the activation, told by its values."""
    named = [getattr(module, name) for name in ACTIVATION_NAMES if hasattr(module, name)]
    if not named:
        raise ConfigError(describe(f"{path}: activation", None, ", ".join(ACTIVATION_NAMES)))
    apply: Callable[[Tensor], Tensor] = named[0]
    grid = torch.linspace(-6.0, 6.0, 121, device="cpu")
    with torch.no_grad():
        values = apply(grid)
    for name, known in GLU_ACTIVATIONS.items():
        if torch.allclose(values, known(grid), rtol=0.0, atol=1e-6):
            return name
    raise ConfigError(
        describe(f"{path}: activation", type(apply).__name__, ", ".join(GLU_ACTIVATIONS))
    )


@torch.no_grad()
def _check(network: DenseNetwork) -> None:
    """Refuse a network that computes something else than its structure says."""
    weight = next(network.module.parameters())
    if weight.is_meta:
        return
    plain = network.kind.module(network.width)
    names = network.kind.plain_names()
    plain.load_state_dict({names[k]: v.detach().float() for k, v in network.tensors().items()})
    x = torch.randn(1, 8, network.width, generator=torch.Generator().manual_seed(0))
    training = network.module.training
    network.module.eval()
    theirs = network.module(x.to(weight)).float().cpu()
    network.module.train(training)
    ours = plain(x)
    slack = AGREES if weight.dtype == torch.float32 else 0.05
    error = float((ours - theirs).abs().max() / ours.abs().max().clamp_min(1e-12))
    if not error < slack:
        what = f"{network.kind.kind}, but differs from it by {error:.2g}"
        raise ConfigError(describe(network.path, type(network.module).__name__, what))
