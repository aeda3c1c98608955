"""How networks of diffusers are called: a table by class, from the calls in its pipelines.

Classes differ in the time they are told, the sign of what they answer, and the names and forms of
their conditions. A network of a class that is not here is refused, with what else it is told: its
answers would be those of another time or condition. ``Condition.vector`` holds the pooled text and,
behind it, the numbers that a network reads besides: SDXL's time ids, Flux's weight of guidance,
PixArt's height, width and their ratio. Shapes: B batch, M tokens of a prompt, C channels, H height,
W width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from coterie.core.context import NULL_LABEL
from coterie.core.errors import ConfigError, DataError, describe
from coterie.core.prediction import Condition
from coterie.interop.diffusers.schedulers import names
from coterie.process import Process
from coterie.process.schedules import RectifiedFlow

Extra = Callable[[Any, Tensor], dict[str, Any]]
"""(network, Condition.vector) -> arguments."""
PACKED = 2  # Flux reads squares of so many latents a side as one token


def grid_time(process: Process, t: Tensor) -> Tensor:
    """f32 [B]: ``t`` as schedulers of diffusers count it: the index of a step, or T sigma."""
    if isinstance(process, RectifiedFlow):
        return (process.num_steps * process.sigma(t)).float()
    return process.time_input(t)


@dataclass(frozen=True)
class Convention:
    """How one class of networks is asked. ``classes``: its ``class_labels`` are classes, whatever
    its configuration says. ``mask``: the argument that masks its tokens. ``time_unit``: what the
    time of its grid is multiplied by. ``clean_is_one``: it is told 1 - time / T and answers from
    noise to data. ``embeds``: what it multiplies its time by before it embeds it. ``vector``: who
    reads ``Condition.vector``, if the network wants one. ``only``: fields of its configuration that
    must be among these."""

    tokens: bool = True
    classes: bool = False
    mask: str = ""
    needs_mask: bool = False
    time_unit: float = 1.0
    clean_is_one: bool = False
    embeds: float = 1.0
    vector: Callable[[Any], Extra | None] = lambda network: None
    packed: bool = False
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def time(self, network: Any, time: Tensor, steps: int) -> Tensor:
        """[B]: what a network is told at ``time`` [B] of a grid of so many steps."""
        if self.clean_is_one:
            return 1.0 - time / steps
        return time * self._unit(network)

    def grid(self, network: Any, told: Tensor, steps: int) -> Tensor:
        """[B]: the time of its grid at which a network is told ``told`` [B]."""
        return steps * (1.0 - told) if self.clean_is_one else told / self._unit(network)

    def _unit(self, network: Any) -> float:
        config = getattr(network, "config", None)  # networks of any make have experts put into them
        return self.time_unit * float(getattr(config, "timestep_scale", 1.0))


def _split(network: Any, vector: Tensor, pooled: int, count: int, what: str) -> list[Tensor]:
    """[B, pooled] of the network's type and [B, count] as they are; DataError for other widths."""
    if vector.dim() != 2 or vector.shape[1] != pooled + count:
        allowed = f"[B, {pooled + count}]: {what}"
        raise DataError(describe("cond.vector", tuple(vector.shape), allowed))
    text, numbers = vector[:, :pooled], vector[:, pooled:]
    if count and not bool((numbers[:, 0] > 0).all()):
        hint = "a null form that keeps them: Condition(null={'vector': ...})"
        allowed = f"a number above 0 in column {pooled}: {what}"
        raise DataError(describe("cond.vector", float(numbers[:, 0].min()), allowed, hint))
    return [text.to(network.dtype), numbers]


def _pooled_and_ids(network: Any, vector: Tensor) -> dict[str, Any]:
    """SDXL: how many ids there are follows from the widths, as each is embedded in A numbers."""
    total = int(network.config.projection_class_embeddings_input_dim)
    each = int(network.config.addition_time_embed_dim)
    width = vector.shape[-1]
    count, rest = divmod(total - width, max(each - 1, 1))
    if rest or not 0 <= count < width:
        allowed = f"[B, pooled text and time ids]: {total} numbers when {each} stand for each id"
        raise DataError(describe("cond.vector", tuple(vector.shape), allowed))
    text, ids = _split(network, vector, width - count, count, "pooled text and time ids")
    return {"added_cond_kwargs": {"text_embeds": text, "time_ids": ids}}


def _pooled(network: Any, vector: Tensor) -> dict[str, Any]:
    width = int(network.config.pooled_projection_dim)
    text, _ = _split(network, vector, width, 0, "the pooled text")
    return {"pooled_projections": text}


def _pooled_and_guidance(network: Any, vector: Tensor) -> dict[str, Any]:
    width, told = int(network.config.pooled_projection_dim), int(network.config.guidance_embeds)
    what = "the pooled text" + (" and the weight of guidance" if told else "")
    text, weight = _split(network, vector, width, told, what)
    return {"pooled_projections": text, "guidance": weight[:, 0].float() if told else None}


def _size(network: Any, vector: Tensor) -> dict[str, Any]:
    _, size = _split(network, vector, 0, 3, "height, width and height / width of the picture")
    size = size.to(network.dtype)
    return {"added_cond_kwargs": {"resolution": size[:, :2], "aspect_ratio": size[:, 2:]}}


def _of_class(network: Any, vector: Tensor) -> dict[str, Any]:
    return {"class_labels": vector.to(network.dtype)}


def _of_unet(network: Any) -> Extra | None:
    if labels_of(network) == "vector":
        return _of_class
    added = getattr(network.config, "addition_embed_type", None)
    return _pooled_and_ids if added == "text_time" else None


POSITIONAL = {"time_embedding_type": ("positional",)}
CONVENTIONS: dict[str, Convention] = {
    "AuraFlowTransformer2DModel": Convention(time_unit=1e-3),
    "DiTTransformer2DModel": Convention(tokens=False, classes=True),
    "FluxTransformer2DModel": Convention(
        time_unit=1e-3,
        embeds=1e3,
        vector=lambda network: _pooled_and_guidance,
        packed=True,
        only={"patch_size": (1,)},
    ),
    "Lumina2Transformer2DModel": Convention(
        mask="encoder_attention_mask", needs_mask=True, clean_is_one=True
    ),
    "PixArtTransformer2DModel": Convention(
        mask="encoder_attention_mask",
        vector=lambda network: _size if network.use_additional_conditions else None,
    ),
    "SD3Transformer2DModel": Convention(vector=lambda network: _pooled),
    "SanaTransformer2DModel": Convention(
        mask="encoder_attention_mask", only={"guidance_embeds": (False, None)}
    ),
    "UNet2DConditionModel": Convention(
        mask="encoder_attention_mask",
        vector=_of_unet,
        only={
            "addition_embed_type": (None, "text", "text_time"),
            "encoder_hid_dim_type": (None, "text_proj"),
            "time_cond_proj_dim": (None,),
            "attention_type": ("default",),
            **POSITIONAL,
        },
    ),
    "UNet2DModel": Convention(tokens=False, vector=_of_unet, only=POSITIONAL),
    "WanTransformer3DModel": Convention(only={"image_dim": (None,), "added_kv_proj_dim": (None,)}),
}
OLDER_NAMES = {
    ("Transformer2DModel", "ada_norm_zero"): "DiTTransformer2DModel",
    ("Transformer2DModel", "ada_norm_single"): "PixArtTransformer2DModel",
}
"""(class, its ``norm_type``) -> what diffusers calls such a network now."""
CHANNELS_FIRST = names("MarigoldDepth MarigoldIntrinsics MarigoldNormals", "Pipeline")
"""Pipelines whose network reads the condition's channels before x: its class does not say so."""
SAID = names(
    """self hidden_states sample timestep encoder_hidden_states encoder_attention_mask class_labels
    return_dict attention_mask attention_kwargs cross_attention_kwargs joint_attention_kwargs"""
)
"""Arguments that any network may have, or need not be given."""


def convention_of(network: nn.Module) -> Convention:
    """ConfigError for a class that is not known, or told more than a condition here holds."""
    return convention_for(type(network), getattr(network, "config", {}))


def convention_for(kind: type[Any], config: Mapping[str, Any]) -> Convention:
    """:func:`convention_of` the network that ``config`` describes, before it is made."""
    found = CONVENTIONS.get(known_as(kind.__name__, config))
    if found is None:
        others = set(inspect.signature(kind.forward).parameters) - SAID
        hint = f"it is also told {', '.join(sorted(others))}" if others else "its time is not known"
        raise ConfigError(describe("network", kind.__name__, ", ".join(CONVENTIONS), hint))
    for name, values in found.only.items():
        value = config.get(name, values[0])
        if value not in values:
            allowed = ", ".join(map(repr, values))
            hint = "no condition here holds what it would be told"
            raise ConfigError(describe(f"{kind.__name__}.{name}", value, allowed, hint))
    return found


def convention_or_plain(network: nn.Module) -> Convention:
    """:func:`convention_of`; for other classes, whose own calls are only read, that of a plain
    network, which is told the time of its grid."""
    config = getattr(network, "config", {})
    return CONVENTIONS.get(known_as(type(network).__name__, config), Convention())


def known_as(kind: str, config: Mapping[str, Any]) -> str:
    """The class whose conventions hold for networks of class ``kind`` with this configuration."""
    return OLDER_NAMES.get((kind, str(config.get("norm_type"))), kind)


def labels_of(network: Any) -> Literal["", "class", "number", "vector"]:
    """What ``class_labels`` of a network are: classes, numbers embedded like times, a vector."""
    if convention_of(network).classes:
        return "class"
    if getattr(network, "class_embedding", None) is None:
        return ""
    kinds = {None: "class", "timestep": "number"}
    return kinds.get(network.config.class_embed_type, "vector")  # type: ignore[return-value]


def ask(network: Any, x: Tensor, time: Tensor, steps: int, cond: Condition) -> Tensor:
    """The answer at x [B, C, ...], ``time`` [B] as its schedulers count it (see
    :func:`grid_time`), with the sign of d x / d time where it is a flow."""
    how = convention_of(network)
    given: dict[str, Any] = {"timestep": how.time(network, time, steps)}
    given |= _tokens(network, how, cond) | _labels(network, cond) | _vector(network, how, cond)
    state = stack(network, x, cond)
    if how.packed:
        state, ids = _pack(state)
        given |= {"img_ids": ids, "txt_ids": ids.new_zeros(cond.tokens.shape[1], 3)}  # type: ignore[union-attr]
    (value,) = network(state, **given, return_dict=False)
    if how.packed:
        value = _unpack(value, x)
    return -value if how.clean_is_one else value


def stack(network: Any, x: Tensor, cond: Condition) -> Tensor:
    """x [B, C, ...] with ``cond.channels`` behind it, of the network's type; DataError where they
    are not its ``in_channels`` together."""
    both = x if cond.channels is None else torch.cat([x, cond.channels.to(x)], dim=1)
    wanted = int(network.config.in_channels)
    if convention_of(network).packed:
        wanted //= PACKED**2
    if both.shape[1] != wanted:
        given = 0 if cond.channels is None else cond.channels.shape[1]
        hint = f"cond.channels brings {given} of them"
        allowed = f"{wanted} channels, those of cond.channels included"
        raise DataError(describe("x", tuple(x.shape), allowed, hint))
    return both.to(network.dtype)


def _tokens(network: Any, how: Convention, cond: Condition) -> dict[str, Any]:
    if not how.tokens:
        return {}
    if cond.tokens is None:
        hint = f"{type(network).__name__} reads a prompt"
        raise ConfigError(describe("cond.tokens", None, "embeddings [B, M, C]", hint))
    given: dict[str, Any] = {"encoder_hidden_states": cond.tokens.to(network.dtype)}
    mask = cond.tokens_mask
    if mask is not None and not how.mask:
        hint = f"{type(network).__name__} attends to every token"
        raise ConfigError(describe("cond.tokens_mask", tuple(mask.shape), "none", hint))
    if mask is None and how.needs_mask:
        mask = torch.ones(cond.tokens.shape[:2], dtype=torch.bool, device=cond.tokens.device)
    return given if mask is None else {**given, how.mask: mask}


def _labels(network: Any, cond: Condition) -> dict[str, Any]:
    if labels_of(network) not in ("class", "number"):
        return {}
    if cond.label is None:
        raise DataError(describe("cond.label", None, "labels [B]: the network has classes"))
    if cond.label.device.type == "cpu" and bool((cond.label == NULL_LABEL).any()):
        hint = "say null_label, the model's class number for no condition"
        raise DataError(describe("label", NULL_LABEL, "a class of the model", hint))
    return {"class_labels": cond.label}


def _vector(network: Any, how: Convention, cond: Condition) -> dict[str, Any]:
    read = how.vector(network)
    if read is None:
        return {}
    if cond.vector is None:
        hint = f"{type(network).__name__} is told one"
        raise ConfigError(describe("cond.vector", None, "a vector [B, V]", hint))
    return read(network, cond.vector)


def _pack(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [B, C, H, W] as [B, H W / 4, 4 C], and the place of each token, [H W / 4, 3]."""
    if x.dim() != 4 or x.shape[2] % PACKED or x.shape[3] % PACKED:
        raise DataError(describe("x", tuple(x.shape), "[B, C, H, W] with even H and W"))
    rows, columns = x.shape[2] // PACKED, x.shape[3] // PACKED
    parts = x.unflatten(3, (columns, PACKED)).unflatten(2, (rows, PACKED))
    packed = parts.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    grid = torch.zeros(rows, columns, 3, device=x.device, dtype=x.dtype)
    grid[..., 1] = torch.arange(rows, device=x.device)[:, None]
    grid[..., 2] = torch.arange(columns, device=x.device)
    return packed, grid.flatten(0, 1)


def _unpack(packed: Tensor, like: Tensor) -> Tensor:
    """[B, H W / 4, 4 C] as [B, C, H, W], with the sides of ``like``."""
    rows, columns = like.shape[2] // PACKED, like.shape[3] // PACKED
    parts = packed.unflatten(1, (rows, columns)).unflatten(3, (-1, PACKED, PACKED))
    return parts.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
