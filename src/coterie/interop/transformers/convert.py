"""Conversion of one MoE layer of transformers to an expert layer and back, with equal outputs.

Ours reads what their experts read: the block's input, or, where a block normalises it for the
experts alone (DiffusionGemma), that normalised input. There the router's own norm divides by the
same root mean square, so its weights divided by the norm's give equal logits.

Legend: E experts, D width, F inner size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from coterie.adapters.attach import additions_of
from coterie.adapters.layers import add
from coterie.core.errors import ConfigError, describe
from coterie.experts import ExpertLayer, ExpertLayerConfig, SharedConfig
from coterie.experts.kinds import SwiGLU
from coterie.interop.transformers.hooks import Control

if TYPE_CHECKING:
    from coterie.interop.transformers.sites import MoESite

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
"""Their names of activations -> ours."""


def layer_config(site: MoESite) -> ExpertLayerConfig:
    """What the layer is, as a configuration; ConfigError for what ours cannot state."""
    if not hasattr(site.experts, "gate_up_proj"):
        raise ConfigError(f"{site.path}: its experts are replaced; undo that first")
    config: Any = getattr(site.experts, "config", None)
    named = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
    if named not in ACTIVATIONS:
        raise ConfigError(describe(f"{site.path}: activation", named, ", ".join(ACTIVATIONS)))
    shared = None
    if site.shared is not None:
        biased = [name for name, value in site.shared.named_parameters() if value.dim() == 1]
        if biased:
            raise ConfigError(f"{site.path}: shared experts with biases ({', '.join(biased)})")
        hidden = int(site.shared.gate_proj.weight.shape[0])
        gate = "one" if site.shared_gate is None else "self"
        shared = SharedConfig.from_dict({"hidden": hidden, "gate": gate})
    return ExpertLayerConfig(
        num_experts=site.num_experts,
        experts=SwiGLU.from_dict({"hidden": site.hidden, "activation": ACTIVATIONS[named]}),
        router=site.router_config(),
        shared=shared,
        accumulate_float32=True,
    )


def to_expert_layer(site: MoESite) -> ExpertLayer:
    """A copy of the layer, in its device and type (routers compute in float32 all the same)."""
    layer = layer_config(site).build(site.width)
    check_nothing_else(site, _pairs(site, layer))
    with torch.no_grad():
        for ours, theirs in _pairs(site, layer):
            ours.copy_(torch.cat([part.float() for part in theirs]).view(ours.shape))
        _matrix(layer).copy_(router_matrix(site))
    like = site.expert(0)[0]
    layer.to(like.device)
    for part in (layer.pool, layer.shared):
        if part is not None:
            part.to(like.dtype)
    return layer.train(site.block.training)


def load_expert_layer(site: MoESite, layer: ExpertLayer) -> None:
    """Copy the tensors of ``layer`` into the model, in place: tied tensors stay tied."""
    wanted = layer_config(site)
    if layer.config.replace(dispatch="auto", accumulate_float32=True, balance=()) != wanted:
        raise ConfigError(f"{site.path}: the layer's configuration is not the one of this layer")
    check_nothing_else(site, _pairs(site, layer))
    with torch.no_grad():
        for ours, theirs in _pairs(site, layer):
            for part, value in zip(theirs, ours.split([len(part) for part in theirs])):
                part.copy_(value)
        own = site.family.logits == "output"
        site.router_weight.copy_(_matrix(layer) if own else _matrix(layer) / _fold(site))


def check_nothing_else(site: MoESite, pairs: Sequence[tuple[Tensor, list[Tensor]]]) -> None:
    """ConfigError where something acts on the layer that its tensors in ``pairs`` do not say: a
    copy of them would not do it."""
    for module in (site.block, site.router):
        for name, value in vars(module).items():
            if "jitter" in name and isinstance(value, int | float) and value:
                hint = "the noise would not be in a layer of ours; set it to 0"
                raise ConfigError(describe(f"{site.path}: {name}", value, "0", hint))
    control = Control.of(site)
    if control.changes:
        raise ConfigError(f"{site.path}: its routing is changed; undo that first")
    carried = {id(value) for _, theirs in pairs for value in theirs}
    carried |= {id(site.router_weight), id(getattr(site.router, "scale", None))}
    parts = {site.router: site.router_name, site.experts: "experts"}
    parts |= {site.shared: site.family.shared, site.shared_gate: site.family.shared_gate}
    for part, name in parts.items():
        if part is None:
            continue
        merged = {p for _, (_, p) in additions_of(part).items() if p.pristine is not None}
        idle = {id(value) for added in merged for value in added.parameters()}
        for inner, tensor in [*part.named_parameters(), *part.named_buffers()]:
            if id(tensor) not in carried | idle:
                hint = "merge or detach what was put on the layer"
                raise ConfigError(f"{site.path}.{name}: {inner} has no place in ours; {hint}")
        for inner, module in part.named_modules():
            hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
            mine = [hook is add or getattr(hook, "__self__", 0) is control for hook in hooks]
            if not all(mine):
                where = ".".join(filter(None, (site.path, name, inner)))
                raise ConfigError(f"{where}: a hook acts on it; remove the hook first")


def _pairs(site: MoESite, layer: ExpertLayer) -> list[tuple[Tensor, list[Tensor]]]:
    """(our tensor, their tensors that it is the concatenation of), all but the router's matrix."""
    experts, router = site.experts, layer.router(0)
    stacks = layer.pool.stacks()
    pairs = [(stacks["gate_up"], [experts.gate_up_proj]), (stacks["down"], [experts.down_proj])]
    if router.selection_bias is not None:
        pairs.append((router.selection_bias, [site.router.e_score_correction_bias]))
    if router.expert_scale is not None:
        pairs.append((router.expert_scale, [site.router.per_expert_scale]))
    shared: Any = layer.shared
    if shared is not None:
        own, mlp = shared.pool.stacks(), site.shared
        pairs.append((own["gate_up"][0], [mlp.gate_proj.weight, mlp.up_proj.weight]))
        pairs.append((own["down"][0], [mlp.down_proj.weight]))
        if shared.gate is not None:
            pairs.append((shared.gate.weight, [site.shared_gate.weight]))
    return pairs


def _matrix(layer: ExpertLayer) -> Tensor:
    score: Any = layer.router(0).score
    matrix: Tensor = score.proj.weight
    return matrix


def router_matrix(site: MoESite) -> Tensor:
    """f32 [E, D]: logits of the layer are this times what its experts read."""
    weight = site.router_weight.detach().float()
    return weight if site.family.logits == "output" else weight * _fold(site)


def _fold(site: MoESite) -> Tensor:
    """f32 [D]: the router's scale over that of the norm before the experts."""
    router, norm = site.router, site.block.pre_feedforward_layernorm_2
    if router.eps != norm.eps:
        raise ConfigError(describe(f"{site.path}: eps of the norms", router.eps, str(norm.eps)))
    weight = norm.weight.detach().float()
    if bool((weight == 0).any()):
        hint = "the router reads dimensions that the experts do not"
        raise ConfigError(describe(f"{site.path}: norm weight", 0.0, "no zeros", hint))
    return router.scale.detach().float() * router.scalar_root_size / weight
