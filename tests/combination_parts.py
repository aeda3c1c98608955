"""Any part with any other: factors read off the registries, and an array that covers all pairs.

A *factor* is one choice of a configuration (the score, the weight, the number of rounds, ...) and
its *levels* are read off a registry or off the field's type, so a new part or value enters by
itself. A *combination* picks one level per factor. Which ones go together is found by trying: the
configuration validates, or a ConfigError says why not.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal, get_args, get_origin

import torch

from coterie.backbones import BACKBONES, SlotConfig
from coterie.core.config import Config
from coterie.core.errors import ConfigError
from coterie.core.registry import Registry
from coterie.denoiser import MODELS
from coterie.experts import (
    BALANCES,
    EDITS,
    EXPERTS,
    SCORES,
    SELECTS,
    ExpertLayerConfig,
    RouterConfig,
)

WIDTH, HIDDEN, DEPTH, CLASSES, TASKS, WORDS = 8, 8, 2, 3, 2, 12
TRUNK = {"width": WIDTH, "depth": DEPTH, "heads": 2, "mlp_hidden": HIDDEN}
PLAIN = {**TRUNK, "modulation": "none"}
TEXT = {**PLAIN, "norm": "rms", "rotary": True}
IMAGE = {"image_size": 4, "patch": 2}
CONVOLVED = {"groups": 4, "head_width": 4}
PAGE = {"vocabulary": WORDS, "context": 6}
SEEN = {"kind": "fgbg", "rf": 0.2, "rb": 0.6}
CHUNK = {"horizon": 3, "observations": 0, "num_classes": CLASSES}
NOISED = {**PLAIN, "norm": "rms", "modulation": "add", "qk_norm": True, "causal": True}
CLOUD = {"num_points": 10, "voxels": 4, "num_classes": CLASSES, "decoder": {**TRUNK, "depth": 1}}

SAMPLES: dict[str, dict[str, list[dict[str, Any]]]] = {
    "score": {
        "mlp": [{"hidden": 6}],
        "noise_level": [{}, {"hidden": 6}],
        "recurrent": [{"state": 5}],
        "task_linear": [{"num_tasks": TASKS}],
    },
    "select": {
        "top_k": [{}, {"k": 1}, {"k": 4}],
        "top_p": [{"p": 0.5}, {"min_k": 2, "max_k": 3}],
        "rank": [{}, {"ranks": [1]}],
        "fixed": [{}, {"ids": [2, 1]}],
        "expert_choice": [{}, {"k": 2.0}],
    },
    "edit": {
        "candidates": [
            {"allowed": [0, 2, 3]},
            {"by_task": [[0, 1, 2], [1, 2, 3]]},
            {"own": True},
        ],
        "jitter": [{"scale": 0.1}],
        "progressive": [{"begin": 0.2, "end": 0.8}, {"start": 2, "begin": 0.2, "end": 0.8}],
    },
    "experts": {
        "swiglu": [{"hidden": HIDDEN}],
        "gelu_mlp": [{"hidden": HIDDEN}],
        "norm_mlp": [
            {"hidden": HIDDEN},
            {"feature_rank": 2},
            {"streams": 2, "reads": [0, 1, 1, 0]},
        ],
        "channel_window": [{"share": 0.5, "mode": "random", "num_masks": WIDTH}, {"share": 0.5}],
    },
    "balance": {"switch": [{}, {"groups": 2}]},
    "model": {"cluster_router": [{"num_clusters": TASKS}]},
    "backbone": {
        "dit": [
            {**IMAGE, "num_classes": CLASSES, "trunk": TRUNK},
            {**IMAGE, "num_classes": CLASSES, "trunk": PLAIN},
        ],
        "causal": [
            {**PAGE, "trunk": {**TEXT, "causal": True}},
            {**PAGE, "trunk": {**TEXT, "causal": False}},
        ],
        "points": [{**CLOUD, "mask": SEEN, "trunk": t} for t in (TRUNK, PLAIN)],
        "policy": [{**CHUNK, "trunk": NOISED}],
        "restorer": [{**IMAGE, "channels": 1, "stem": 2, "tail": 6, "trunk": PLAIN}],
        "unet": [{"image_size": 4, "num_classes": CLASSES, "widths": [WIDTH, WIDTH], **CONVOLVED}],
    },
}
"""Fields a part needs beyond its defaults here: width 8, at least 4 experts, 2 tasks. Parts that
do without are not listed; every value of a Literal or bool field is tried anyway."""

BY_HAND: dict[str, list[Any]] = {
    "expert.num_experts": [4, WIDTH, None],
    "expert.rounds": [1, 2],
    "expert.adaptor": [None, 1.0],
    "expert.shared": [None, *({"hidden": 4, "count": 2, "gate": g} for g in ("one", "self"))],
    "expert.self_gate": [None, {"by_task": [[0], [1, 2]]}],
    "expert.noise_tasks": [None, TASKS],
    "expert.slot_map": [None, [0, 1, 0, 2], [0, 1, 0, 2, 3, 3, 0, 1]],
    "slot.names": [[], ["mid_block.resnets.*.conv1"]],
    "slot.reuse": [1, 2],
}
"""Levels of the numbers and optional parts of a layer and a slot."""

OWNERS: dict[str, type[Config]] = {
    "router": RouterConfig,
    "expert": ExpertLayerConfig,
    "slot": SlotConfig,
}
NOT_TRIED = {"router.renorm_eps", "router.scale", "expert.init_std"}
NOT_TRIED |= {"expert.router", "slot.expert", "slot.layers"}
"""Plain factors and numbers, the layers a slot is in, and what holds other fields."""


CONVOLUTIONS = {
    "backbone": "unet",
    "slot.slot": "conv",
    "slot.names": "['mid_block.resnets.*.conv1']",
    "expert.experts": "conv",
    "router.unit": "sample",
}
BIDIRECTIONAL = {
    "model": "token_denoiser masking=masked",
    "backbone": "causal trunk.causal=False",
}
TOGETHER: tuple[dict[str, str], ...] = (CONVOLUTIONS, BIDIRECTIONAL)
"""Levels that work with each other only, where that takes more than one change of the defaults."""


@dataclass(frozen=True)
class Factor:
    """``name`` is ``owner.field``. A part's samples are levels of one ``kind``."""

    name: str
    kinds: tuple[str, ...]
    labels: tuple[str, ...]
    values: tuple[Any, ...]
    registry: str = ""

    @property
    def is_part(self) -> bool:
        return bool(self.registry)


Combination = tuple[int, ...]
"""The level of each factor."""


def literals(owner: type[Config]) -> dict[str, list[Any]]:
    """Every value of the fields whose type lists them, the default first."""
    out: dict[str, list[Any]] = {}
    for name, field in owner.model_fields.items():
        every = (True, False) if field.annotation is bool else ()
        if get_origin(field.annotation) is Literal and name != "kind":
            every = get_args(field.annotation)
        if every:
            first = field.get_default()
            out[name] = [first, *(value for value in every if value != first)]
    return out


LIBRARIES = {"unet": "diffusers", "conv": "diffusers"}
"""Parts that need an extra, themselves or for a backbone: left out where it is not installed."""


def missing() -> list[str]:
    """Libraries of the extras that are not installed."""
    return sorted({library for library in LIBRARIES.values() if not find_spec(library)})


NO_SLOTS = ("predictor", "multitask", "reader", "guide", "diffusers_network")
"""Parts in which no expert layer is put by configuration: their levels are their own."""


def kinds(registry: Registry) -> list[str]:
    there = [kind for kind in registry.kinds() if kind not in NO_SLOTS]
    # A model made of trained ones has no parts of its own to choose.
    there = [kind for kind in there if not getattr(registry.get(kind), "is_trained", False)]
    return [kind for kind in there if LIBRARIES.get(kind) not in missing()]


def samples(registry: Registry, kind: str) -> list[dict[str, Any]]:
    """Usable configurations of a registered part: its samples, then one field changed at a time."""
    first, *more = SAMPLES.get(registry.name, {}).get(kind, [{}])
    for fields in (first, *more):
        try:
            registry.parse({"kind": kind, **fields})
        except ConfigError as error:
            raise AssertionError(f"{unusable(registry.name, kind)} ({error})") from None
    for field, values in literals(registry.get(kind)).items():
        more += [{**first, field: value} for value in values[1:] if field not in first]
    return [{"kind": kind, **fields} for fields in (first, *more)]


def ready(registry: Registry, sample: dict[str, Any]) -> Any:
    """The part; None where its fields contradict each other. What holds other parts stays data."""
    if registry in (MODELS, BACKBONES):
        return sample
    try:
        return registry.parse(sample)
    except ConfigError as error:
        REFUSALS.add(str(error))
        return None


def unusable(registry: str, kind: str) -> str:
    return (
        f"{registry} kind {kind!r} has no sample that builds: in tests/combination_parts.py, add "
        f"the fields it needs to SAMPLES[{registry!r}], and to TOGETHER what else it takes"
    )


REFUSALS: set[str] = set()
"""Every message with which a configuration was refused so far."""


def part_factor(name: str, registry: Registry, default: str) -> Factor:
    """One level per sample of each kind, the default kind first. Fields that hold a list of parts
    (``default`` "nothing") also have the empty list."""
    levels: list[tuple[str, str, Any]] = []
    for kind in kinds(registry):
        first, *more = samples(registry, kind)
        for sample in (first, *more):
            part = ready(registry, sample)
            levels += [] if part is None else [(kind, label(kind, first, sample), part)]
    if default == "nothing":
        levels = [(kind, words, [sample]) for kind, words, sample in levels]
        levels.append((default, default, []))
    levels.sort(key=lambda level: level[0] != default)
    return Factor(name, *zip(*levels), registry=registry.name)


def label(kind: str, first: dict[str, Any], sample: dict[str, Any]) -> str:
    """The kind, and the fields in which a sample differs from the first of its kind."""
    told = []
    for key, value in sample.items():
        other = first.get(key)
        if isinstance(value, dict) and isinstance(other, dict):
            told += [f"{key}.{k}={v}" for k, v in value.items() if v != other.get(k)]
        elif value != other:
            told.append(f"{key}={value}")
    return " ".join([kind, *told])


@cache
def factors() -> tuple[Factor, ...]:
    """All of them; the first level of each is the default."""
    made = [
        part_factor("model", MODELS, "denoiser"),
        part_factor("backbone", BACKBONES, "dit"),
        part_factor("router.score", SCORES, "linear"),
        part_factor("router.select", SELECTS, "top_k"),
        part_factor("router.edits", EDITS, "nothing"),
        part_factor("expert.experts", EXPERTS, "swiglu"),
        part_factor("expert.balance", BALANCES, "nothing"),
    ]
    named = {f"{o}.{k}": v for o, cls in OWNERS.items() for k, v in literals(cls).items()}
    for name, values in (named | BY_HAND).items():
        words = [str(value) for value in values]
        field = name.split(".")[1]
        kinds = [
            field if value and isinstance(value, list | dict) else str(value) for value in values
        ]
        made.append(Factor(name, tuple(kinds), tuple(words), tuple(values)))
    return tuple(made)


@cache
def owned() -> list[tuple[int, str, str]]:
    """(factor, owner, field) of every factor that is a field of the router, layer or slot."""
    split = [(place, *factor.name.split(".")) for place, factor in enumerate(factors())]
    return [found for found in split if len(found) == 3]


def model_fields(combination: Sequence[int]) -> dict[str, Any]:
    """The model's configuration as plain data."""
    chosen = {f.name: f.values[level] for f, level in zip(factors()[:2], combination)}
    fields: dict[str, dict[str, Any]] = {"router": {}, "expert": {}, "slot": {}}
    for place, owner, field in owned():
        fields[owner][field] = factors()[place].values[combination[place]]
    slot = {**fields["slot"], "expert": {**fields["expert"], "router": fields["router"]}}
    backbone = chosen["backbone"]
    place = {"slots": [slot]}
    if "trunk" in backbone:
        place = {"trunk": {**backbone["trunk"], **place}}
    return {**chosen["model"], "backbone": {**backbone, **place}}


@cache
def refusal(combination: Combination) -> str | None:
    """Why this combination cannot be configured; None: it can."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a constant gate is allowed, and warned of
        try:
            config = MODELS.parse(model_fields(combination))
            hosted = getattr(config.backbone, "slots", ())
            if any(slot.reuse > 1 for slot in hosted):
                with torch.device("meta"):  # how many layers a name stands for, the network tells
                    config.build()
        except ConfigError as error:
            REFUSALS.add(str(error))
            return str(error)
    return None
