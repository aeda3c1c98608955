"""Fields of a ``config.json`` of transformers that it would fail on, or ask for memory by: named
before anything is built of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from coterie.core.errors import CheckpointError, ConfigError, describe, unknown

COUNTS = (
    *("hidden_size", "vocab_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings"),
)
"""Of these a model has at least one, where it says how many."""
ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function")
CHOICES = ("num_experts_per_tok", "top_k_experts")
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
SLACK = 2**20
"""Numbers that a model may have beside those of its files: what is missing is named later."""
Shapes = Mapping[str, tuple[int, ...]]


def check_fields(path: Path, data: Mapping[str, Any]) -> None:
    """ConfigError names the first field, also of a part such as ``text_config``, that holds what no
    model can be built of."""
    from transformers.activations import ACT2FN
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rules = {"default", *ROPE_INIT_FUNCTIONS}
    for name, value in _fields(data):
        field, last = f"{path / 'config.json'}: {name}", name.rpartition(".")[2]
        if value is None:
            continue
        if last in COUNTS and not (type(value) is int and value > 0):
            raise ConfigError(describe(field, value, "a whole number above 0"))
        if last in ACTIVATIONS and not (isinstance(value, str) and value in ACT2FN):
            raise ConfigError(unknown(field, value, ACT2FN))
        if last == "rope_type" and not (isinstance(value, str) and value in rules):
            raise ConfigError(unknown(field, value, rules))


def _fields(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Path -> value, of what makes the language model: parts for pictures and sound have rules of
    their own. Nesting is bounded by the reader of JSON."""
    for name, value in data.items():
        if name.endswith("_config") and name != "text_config":
            continue
        if isinstance(value, dict):
            yield from _fields(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _text(config: Any) -> Any:
    """The part of the language model; where there are several, the whole."""
    try:
        return config.get_text_config()
    except ValueError:
        return config


def check_choices(path: Path, config: Any, data: Mapping[str, Any]) -> None:
    """A token is sent to as many experts as there are, at the most. ``data``: what the file holds;
    a field may have several names, and is called as it is there."""
    text = _text(config)
    part = data.get("text_config")
    named = {*data, *(part if isinstance(part, dict) else ())}
    experts, field = (
        next((n for n in sorted(names, key=lambda n: n not in named) if hasattr(text, n)), None)
        for names in (EXPERTS, CHOICES)
    )
    if experts is None or field is None:
        return
    count, value = getattr(text, experts), getattr(text, field)
    if type(count) is not int or value is None:
        return
    if type(value) is not int or not 1 <= value <= count:
        field, hint = f"{path / 'config.json'}: {field}, here select.k", f"{experts} is {count}"
        raise ConfigError(describe(field, value, f"1..{count}", hint))


def check_layers(path: Path, config: Any, shapes: Shapes) -> None:
    """A layer has a tensor at least: a number of layers beyond that is not even built."""
    layers = getattr(_text(config), "num_hidden_layers", None) or 0
    if layers > len(shapes):
        allowed = f"1..{len(shapes)}, the number of tensors in the folder"
        raise ConfigError(describe(f"{path / 'config.json'}: num_hidden_layers", layers, allowed))


def check_shapes(path: Path, skeleton: nn.Module, shapes: Shapes) -> None:
    """CheckpointError before memory is asked for, where ``skeleton``, on the meta device, needs far
    more than the files hold: it names the tensor and the field that says so. Lesser differences are
    told of when the files are read."""
    config: Any = skeleton.config
    described = {name: tuple(value.shape) for name, value in skeleton.named_parameters()}
    there, wanted = (sum(map(math.prod, one.values())) for one in (shapes, described))
    if wanted <= 2 * there + SLACK:
        return
    base = f"{getattr(skeleton, 'base_model_prefix', '')}."
    for name, shape in described.items():
        found = shapes.get(name, shapes.get(name.removeprefix(base)))
        if found is not None and found != shape:
            told = f"{path}: wrong shape of tensor {name} {list(found)} for {list(shape)}"
            raise CheckpointError(told + _blamed(config, found, shape))
    # Stacks of experts have other names in files.
    name = max(described.keys() - shapes.keys(), key=lambda n: math.prod(described[n]))
    shape = described[name]
    told = f"{path}: its configuration describes {wanted:,} numbers, its files hold {there:,}"
    raise CheckpointError(f"{told}; largest: {name} {list(shape)}{_blamed(config, (), shape)}")


def _blamed(config: Any, found: tuple[int, ...], shape: tuple[int, ...]) -> str:
    """The field of the configuration that gives the largest size that is not found."""
    sizes = [size for size in shape if size not in found]
    for name, value in _text(config).to_dict().items():
        # gate and up of an expert are one stack
        if sizes and type(value) is int and max(sizes) in (value, 2 * value):
            return f"; {name} of config.json is {value}"
    return ""
