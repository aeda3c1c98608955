"""The options of PEFT's ``adapter_config.json``: their meaning, and which are refused.

A file is read as PEFT reads it, or refused: every option that is not listed here, or has another
value than those listed, is an error that names it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from coterie.adapters.attach import Parts
from coterie.adapters.layers import Copy, LowRank, Rows, Shift
from coterie.adapters.stacks import Stacks
from coterie.core.errors import CheckpointError, describe

PEFT, STACKED = "LORA", "LORA_EXPERTS"
BIASES = ("none", "lora_only", "all")
READ = {
    *("peft_type", "bias", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"),
    *("modules_to_save", "trainable_token_indices", "init_lora_weights"),
}
NO_MATTER = {
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "lora_dropout", "runtime_config", "megatron_core", "qalora_group_size"),
    # Which modules have factors is seen in the weights.
    *("target_modules", "target_experts", "exclude_modules", "layers_to_transform"),
    *("layers_pattern", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
}
"""Options that change nothing about what a trained adapter computes."""
UNMOVED = (True, False, None, "gaussian", "eva", "orthogonal")
"""``init_lora_weights`` that leave the base as it is. The others (pissa, olora, corda, loftq,
lora_ga) subtract the first factors from it, so that the file alone is half of what was trained."""


def check_words(data: Mapping[str, Any], where: str) -> None:
    """CheckpointError for an adapter that is something else than a sum of low-rank maps, rows of
    tables, biases and whole modules, on the base as it is."""
    kind, bias = data.get("peft_type"), data.get("bias", "none")
    if kind not in (PEFT, STACKED) or bias not in BIASES:
        allowed = f"{PEFT}, {' or '.join(BIASES)}"
        raise CheckpointError(describe(f"{where}: peft_type, bias", (kind, bias), allowed))
    start = data.get("init_lora_weights", True)
    if not any(start is value or start == value != 1 for value in UNMOVED):
        allowed = ", ".join(map(str, UNMOVED))
        hint = "training moved the base; save it with path_initial_model_for_weight_conversion"
        raise CheckpointError(describe(f"{where}: init_lora_weights", start, allowed, hint))
    for name, value in data.items():
        if value and name not in READ | NO_MATTER:
            hint = "adapters here are plain sums of low-rank maps"
            raise CheckpointError(describe(f"{where}: {name}", value, "none", hint))


def deciding(data: Mapping[str, Any]) -> dict[str, Any]:
    """The words that decide what an adapter computes, and which modules it is of."""
    named = READ | {"target_modules", "target_experts"}
    return {name: data[name] for name in sorted(named & data.keys())}


def rows_of(data: Mapping[str, Any], tables: Iterable[str], where: str) -> dict[str, list[int]]:
    """Table -> its trained rows. A list means the one table that the weights are of."""
    given, tables = data.get("trainable_token_indices") or {}, sorted(tables)
    where = f"{where}: trainable_token_indices"
    if isinstance(given, list):
        if len(tables) != 1:
            hint = f"the weights are of {len(tables)} tables"
            raise CheckpointError(describe(where, given, "rows by table", hint))
        given = {tables[0]: given}
    plain = isinstance(given, dict) and all(
        isinstance(own, list) and all(type(row) is int for row in own) for own in given.values()
    )
    if not plain:
        raise CheckpointError(describe(where, given, "a list of rows, or one per table"))
    return given


def patterned(
    data: Mapping[str, Any], name: str, paths: Iterable[str], where: str
) -> dict[str, Any]:
    """Path -> its value of ``rank_pattern`` or ``alpha_pattern``, where it has one: the first
    regular expression that is the path, or its end after a dot."""
    given = data.get(name) or {}
    if not isinstance(given, dict) or not all(type(v) in (int, float) for v in given.values()):
        raise CheckpointError(describe(f"{where}: {name}", given, "numbers by pattern"))
    out = {}
    for path in paths:
        for pattern, value in given.items():
            try:
                found = re.match(rf"(.*\.)?({pattern})$", path)
            except re.error as error:
                hint = str(error)
                raise CheckpointError(
                    describe(f"{where}: {name}", pattern, "regular expressions", hint)
                ) from None
            if found:
                out[path] = value
                break
    return out


def saved_whole(data: Mapping[str, Any], path: str) -> bool:
    """Whether ``modules_to_save`` names the module at ``path``, or one around it."""
    names = data.get("modules_to_save") or []
    parts = path.split(".")
    around = [".".join(parts[: depth + 1]) for depth in range(len(parts))]
    return any(place.endswith(str(name)) for place in around for name in names)


def words(parts: Parts, base: str) -> dict[str, Any]:
    """``adapter_config.json`` of an adapter of ours."""
    config = next(iter(parts.values())).config
    low = {path: part for path, part in parts.items() if isinstance(part, LowRank)}
    rows = {path: list(part.rows) for path, part in parts.items() if isinstance(part, Rows)}
    stacks = {path: part.names for path, part in parts.items() if isinstance(part, Stacks)}
    experts = sorted(f"{path}.{name}" for path, names in stacks.items() for name in names)
    copies = sorted(path for path, part in parts.items() if isinstance(part, Copy))
    alpha = config.rank if config.alpha is None else config.alpha
    # Our scale belongs to the rank that was asked for, theirs to the one that a module has.
    alphas = {
        path: part.scale * (math.sqrt(part.rank) if config.rank_scaling else part.rank)
        for path, part in low.items()
    }
    shifted = [part.shift is not None for part in low.values()]
    bias = "lora_only" if any(shifted) else "none"
    if any(isinstance(part, Shift) for part in parts.values()):
        bias = "all"
    return {
        "peft_type": STACKED if experts else PEFT,
        "base_model_name_or_path": base or None,
        "task_type": None,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": alpha,
        "use_rslora": config.rank_scaling,
        "lora_dropout": 0.0,
        "bias": bias,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "target_modules": sorted(low),
        "rank_pattern": {
            _exactly(path): part.rank for path, part in low.items() if part.rank != config.rank
        },
        "alpha_pattern": {
            _exactly(path): own
            for path, own in alphas.items()
            if not math.isclose(own, alpha, rel_tol=1e-12)
        },
        "modules_to_save": copies or None,
        **({"target_experts": experts} if experts else {}),
        "trainable_token_indices": rows or None,
    }


def _exactly(path: str) -> str:
    """A regular expression that is this path and no other's end."""
    return f"^{re.escape(path)}"
