"""An upcycled model of Hugging Face as a folder, and one made from a dense folder.

``config.json`` (theirs), ``upcycled.json`` (which networks are replaced, by what, from where),
``model.safetensors``, the tokenizer's files, and a manifest with the hash of each. Their own loader
would not know the experts; :func:`load_upcycled` rebuilds them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coterie.convert import Preserved, UpcycleConfig, compare
from coterie.core.config import Config
from coterie.core.cost import count_parameters
from coterie.core.errors import CheckpointError, ConfigError, describe
from coterie.core.folder import (
    atomic_folder,
    canonical,
    file_digest,
    libraries,
    read_manifest,
    seal,
    verify_folder,
)
from coterie.core.rng import generator
from coterie.core.tensors import assign, module_tensors, read_tensors, write_tensors
from coterie.experts import ExpertLayerConfig
from coterie.interop.transformers.fields import check_shapes
from coterie.interop.transformers.safe_loading import (
    CAUSAL,
    build,
    load_weights,
    read_config,
    read_tokenizer,
    tensor_shapes,
)
from coterie.interop.upcycled.model import (
    chosen_networks,
    place_network,
    tapped,
    upcycle_transformers,
    upcycled_networks,
)
from coterie.interop.upcycled.networks import find_networks

FORMAT = "coterie.upcycled"
VERSION = 1
PLAN = "upcycled.json"
WEIGHTS = "model.safetensors"
COMPANIONS = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json"),
    *("vocab.json", "merges.txt", "generation_config.json", "chat_template.jinja"),
)
"""Files that go with a model and hold no code."""
LENGTH = 128  # tokens per sequence of the text that calibrates and compares
CALIBRATION_LIMIT = 64  # sequences; their tokens are what counts
NO_MODEL = "not a causal language model"
COMPARED = 4  # sequences on which the function is compared


class Plan(Config):
    """``upcycled.json``: network path -> its expert layer; ``dtype`` of all but the routers."""

    networks: dict[str, ExpertLayerConfig]
    dtype: str
    upcycle: UpcycleConfig | None = None
    source: str = ""
    source_digest: str = ""


def save_upcycled(
    model: nn.Module,
    path: str | Path,
    *,
    upcycle: UpcycleConfig | None = None,
    source: str | Path | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a model from :func:`upcycle_transformers`; all or nothing.

    ``source``: the dense folder, whose tokenizer is copied and whose weights are named. ``dtype``:
    what to store in (None: as the model is); routers stay float32. Raises CheckpointError.
    """
    target = Path(path)
    networks = upcycled_networks(model)
    if not networks:
        raise CheckpointError(describe("model", type(model).__name__, "an upcycled model"))
    theirs: Any = model.config
    dtype = dtype or next(model.parameters()).dtype
    plan = Plan(
        networks={name: network.layer.config for name, network in networks.items()},
        dtype=str(dtype).removeprefix("torch."),
        upcycle=upcycle,
        source="" if source is None else str(source),
        source_digest="" if source is None else _digest(Path(source)),
    )
    with atomic_folder(target, overwrite=overwrite) as folder:
        text = canonical(json.loads(theirs.to_json_string(use_diff=False)))
        (folder / "config.json").write_text(text, encoding="utf-8")
        (folder / PLAN).write_text(plan.to_json() + "\n", encoding="utf-8")
        write_tensors(folder / WEIGHTS, _stored(model, dtype))
        for name in COMPANIONS:
            if source is not None and (Path(source) / name).is_file():
                shutil.copyfile(Path(source) / name, folder / name)
        seal(folder, {"format": FORMAT, "version": VERSION, "libraries": libraries()})
    return target


def load_upcycled(path: str | Path) -> Any:
    """The model of :func:`save_upcycled`, in eval mode. Every file is checked first; a damaged or
    foreign folder is a CheckpointError."""
    path = Path(path)
    verify_folder(path, read_manifest(path, FORMAT, VERSION))
    try:
        plan = Plan.from_json((path / PLAN).read_text(encoding="utf-8"), origin=str(path / PLAN))
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    model = _empty(path, _dtype(plan, path))
    found = {network.path: (index, network) for index, network in enumerate(find_networks(model))}
    for name, layer in plan.networks.items():
        if name not in found:
            raise CheckpointError(describe(f"{path / PLAN}: networks", name, ", ".join(found)))
        index, network = found[name]
        place_network(model, network, index, layer)
    assign(module_tensors(model), read_tensors(path / WEIGHTS), str(path / WEIGHTS))
    return model.eval()


def plan_directory(path: str | Path, config: UpcycleConfig) -> dict[str, Any]:
    """What upcycling the model in a folder gives: its blocks, parameters before and after. No
    weight is read or made."""
    _refuse_upcycled(Path(path))
    with torch.device("meta"):
        model = _empty(Path(path))
    check_shapes(Path(path), model, tensor_shapes(Path(path)))
    dense = count_parameters(model)
    chosen = chosen_networks(model, config)
    upcycle_transformers(model, config)
    after = count_parameters(model)
    return {
        "blocks": len(chosen),
        "before": {"parameters_total": dense.total, "parameters_active": dense.active},
        "after": {"parameters_total": after.total, "parameters_active": after.active},
        "flops_per_token": {"before": 2 * dense.active, "after": 2 * after.active},
    }


def upcycle_directory(
    source: str | Path,
    out: str | Path,
    config: UpcycleConfig,
    progress: Callable[[int], object] | None = None,
) -> Preserved:
    """Upcycle the model in a Hugging Face folder into the folder ``out``; what changed, measured.

    Routers are balanced, and logits compared, on the help topics of Python, in the model's own
    tokens where the folder has a tokenizer (else on random ones).
    """
    if Path(out).exists():
        raise CheckpointError(describe("out", str(out), "a path that does not exist"))
    _refuse_upcycled(Path(source))
    model = _load(Path(source))
    ids = _sequences(Path(source), model, CALIBRATION_LIMIT + COMPARED)
    held, seen = ids[:COMPARED], ids[COMPARED:][: config.calibration]

    def run(dense: nn.Module) -> None:
        for batch in seen.split(COMPARED):
            dense(batch)

    with torch.no_grad():
        before = model(held).logits
        upcycle_transformers(model, config, run, progress=progress)
        with tapped(model) as routings:
            after = model(held).logits
    save_upcycled(model, out, upcycle=config, source=source, dtype=model.config.dtype)
    return compare(before, after, routings, config.slices)


def _stored(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    routers = {
        id(value)
        for network in upcycled_networks(model).values()
        for value in module_tensors(network.layer.routers).values()
    }
    return {
        name: value.to(dtype) if value.is_floating_point() and id(value) not in routers else value
        for name, value in module_tensors(model).items()
    }


def _empty(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The dense model a folder describes, with weights of no use."""
    return build(read_config(path, NO_MODEL), CAUSAL, dtype=dtype).eval()


def _load(path: Path) -> Any:
    """The dense model in float32, whatever it is stored in: the comparison is of functions."""
    with torch.device("meta"):
        described = _empty(path)
    return load_weights(type(described), path, torch.float32)


def _refuse_upcycled(path: Path) -> None:
    if (path / PLAN).is_file():
        raise ConfigError(describe("source", str(path), "a dense model", "it is upcycled already"))


def _sequences(path: Path, model: Any, count: int) -> Tensor:
    """i64 [count, LENGTH] of real text, or of random tokens where there is no tokenizer."""
    vocabulary = int(model.get_input_embeddings().num_embeddings)
    longest = int(getattr(model.config, "max_position_embeddings", LENGTH))
    length = min(LENGTH, longest)
    tokenizer = read_tokenizer(path)
    if tokenizer is not None:
        from pydoc_data.topics import topics

        tokens = tokenizer("\n\n".join(topics.values()))["input_ids"]
        if len(tokens) >= count * length:
            # Spread over the whole text: neighbouring pieces are alike.
            piece = len(tokens) // count
            starts = range(0, count * piece, piece)
            rows = torch.tensor([tokens[start : start + length] for start in starts])
            return rows[torch.randperm(count, generator=generator(0, "sequences"))]
    return torch.randint(0, vocabulary, (count, length), generator=generator(0, "sequences"))


def _digest(source: Path) -> str:
    """SHA-256 of the weights' file, or of the index that names its parts; "" if there is none."""
    for name in (WEIGHTS, f"{WEIGHTS}.index.json"):
        if (source / name).is_file():
            return file_digest(source / name)
    return ""


def _dtype(plan: Plan, path: Path) -> torch.dtype:
    dtype = getattr(torch, plan.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(describe(f"{path / PLAN}: dtype", plan.dtype, "a torch type"))
    return dtype
