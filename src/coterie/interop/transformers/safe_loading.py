"""Safe loading of model folders of transformers, used by every command that reads one.

What lies in the folder is checked against its own configuration before a weight is read, and again
when they are read. No code in it is run, and nobody is asked whether it should be.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from coterie.core.errors import CheckpointError, ConfigError, describe
from coterie.core.files import read_by_library, reason
from coterie.core.json_reader import read_object
from coterie.interop.transformers.fields import (
    check_choices,
    check_fields,
    check_layers,
    check_shapes,
)

OLDEST = (5, 18)
CAUSAL = ("AutoModelForCausalLM",)
PREDICTING = (*CAUSAL, "AutoModelForImageTextToText")
"""Automatic classes of models that predict tokens."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
NO_CODE = {"trust_remote_code": False}
"""Of every call that could run a folder's code: left unsaid, the library asks on the terminal."""
_EXPERT = re.compile(r"^(.*\.experts)\.(\d+)\.(.+)$")


def library() -> Any:
    """The module ``transformers``; ConfigError where it is missing or too old."""
    try:
        version = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        hint = "pip install 'coterie[interop]'"
        raise ConfigError(f"transformers is not installed; {hint}") from None
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        allowed = f"{'.'.join(map(str, OLDEST))} or newer"
        raise ConfigError(
            describe("transformers", version, allowed, "its routers answer otherwise")
        )
    import transformers

    return transformers


def read_config(path: Path, missing: str = "not the folder of a model") -> Any:
    """Their configuration of the model in a folder; CoterieError for what is not read here."""
    hf = library()
    data = read_object(path / "config.json", missing)
    kind = data.get("model_type")
    if not isinstance(kind, str) or kind not in hf.CONFIG_MAPPING:
        if "auto_map" in data:
            hint = "needs code of its own, which is not run"
            raise ConfigError(f"{path}: model_type {kind!r} {hint}")
        raise ConfigError(f"{path}: model_type {kind!r} is unknown to this version of transformers")
    if data.get("quantization_config"):
        hint = "store it in float32, bfloat16 or float16"
        raise ConfigError(f"{path}: quantised weights are not read; {hint}")
    if (path / "adapter_config.json").is_file():
        hint = "merge it into the weights, or take it out of the folder"
        raise ConfigError(f"{path}: an adapter lies beside the model; {hint}")
    check_fields(path, data)
    config = _from_folder(hf.AutoConfig, path)
    check_choices(path, config, data)
    check_layers(path, config, tensor_shapes(path))
    return config


def build(config: Any, classes: Sequence[str] = PREDICTING, **options: Any) -> nn.Module:
    """The model that a configuration describes, of the first class that has it, with weights of no
    use. ConfigError where none has."""
    hf, why = library(), ""
    for name in classes:
        with _quiet(hf):
            try:
                built: nn.Module = getattr(hf, name).from_config(config, **NO_CODE, **options)
            except Exception as error:  # each model reads the configuration in its own way
                if "Unrecognized configuration class" not in str(error):
                    why = f"{name}: {reason(error)}"
                continue
        return built
    allowed = "a causal language model" if classes == CAUSAL else "a model that predicts tokens"
    raise ConfigError(describe("model_type", config.model_type, allowed, why))


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a folder, all there; pickled weights are refused."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(_weight_map(index).values()))
        for name in names:
            if name != Path(name).name:
                raise CheckpointError(f"{index}: weight_map: {name!r} is outside the folder")
        files = [path / name for name in names]
    else:
        files = sorted(path.glob("*.safetensors"))
    if not files:
        hint = "pickled weights (*.bin, *.pt) are not read"
        raise CheckpointError(f"{path}: no *.safetensors files; {hint}")
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file}: missing, but listed in {index.name}")
    return files


def _weight_map(index: Path) -> dict[str, str]:
    data, field = read_object(index), f"{index}: weight_map"
    allowed = "an object of tensor names and file names"
    if "weight_map" not in data:
        raise CheckpointError(f"{field}: missing; allowed: {allowed}")
    found = data["weight_map"]
    if not isinstance(found, dict):
        raise CheckpointError(describe(field, found, allowed))
    for tensor, name in found.items():
        if not isinstance(name, str):
            raise CheckpointError(describe(field, {tensor: name}, allowed))
    if not found:
        raise CheckpointError(describe(f"{index}: weight_map", {}, "one entry per tensor"))
    return found


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a folder, from the headers of its files.

    CheckpointError for a damaged file, an index that names other tensors than the files hold, and
    experts of one layer that are not all there or not of one shape.
    """
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    for file in weight_files(path):
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (no mapping)
                    shapes[name] = tuple(opened.get_slice(name).get_shape())
        except (SafetensorError, OSError, ValueError) as error:
            said = f"not a valid safetensors file: {reason(error)}"
            raise CheckpointError(f"{file}: could not be loaded ({said})") from None
    index = path / "model.safetensors.index.json"
    if index.is_file() and (lost := sorted(_weight_map(index).keys() - shapes.keys())):
        raise CheckpointError(f"{path}: missing tensor {_first(lost)}, but listed in {index.name}")
    _check_experts(path, shapes)
    return shapes


def _check_experts(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Experts are stored one by one and stacked while they are read, where the library can only say
    that something went wrong."""
    stacks: dict[str, dict[str, dict[int, tuple[int, ...]]]] = {}
    for name, shape in shapes.items():
        if found := _EXPERT.match(name):
            layer, expert, part = found.groups()
            stacks.setdefault(layer, {}).setdefault(part, {})[int(expert)] = shape
    for layer, parts in stacks.items():
        every = {expert for stack in parts.values() for expert in stack}
        for part, stack in parts.items():
            if lost := sorted((every | set(range(len(every)))) - stack.keys()):
                first = f"{layer}.{lost[0]}.{part}"
                raise CheckpointError(f"{path}: missing tensor {_first([first, *lost[1:]])}")
            usual = max(stack.values(), key=list(stack.values()).count)
            for expert, shape in stack.items():
                if shape != usual:
                    name = f"{layer}.{expert}.{part}"
                    found_shape = f"{list(shape)} for {list(usual)}"
                    raise CheckpointError(f"{path}: wrong shape of tensor {name} {found_shape}")


def load_weights(model_class: Any, path: Path, dtype: torch.dtype | None = None) -> nn.Module:
    """The model of a folder in eval mode, every one of its tensors from there and no tensor of the
    folder left out. ``dtype`` None: as stored. CheckpointError otherwise."""
    shapes, config = tensor_shapes(path), read_config(path)
    with torch.device("meta"), _quiet(library()), _loading(path):
        skeleton = model_class(config)
    check_shapes(path, skeleton, shapes)
    with _loading(path):
        model, found = _from_folder(
            model_class,
            path,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told of below, by name
            dtype="auto" if dtype is None else dtype,
        )
    _check_loaded(path, found)
    with _loading(path):
        _check_finite(path, model)
    _tell_ties(model)
    loaded: nn.Module = model.eval()
    return loaded


def _check_finite(path: Path, model: nn.Module) -> None:
    """What is loaded is in memory, and stacked; the files are read again only to say which of
    their tensors it was."""
    from safetensors import safe_open

    held = {name: value for name, value in model.state_dict().items() if not _finite(value)}
    for file in weight_files(path) if held else ():
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (no mapping)
                if not _finite(opened.get_tensor(name)):
                    raise CheckpointError(f"{file}: tensor {name} holds NaN or infinity")
    for name, value in held.items():
        hint = f"numbers of the folder are too large for {value.dtype}; choose another dtype"
        raise CheckpointError(f"{path}: tensor {name} holds infinity; {hint}")


def _finite(value: torch.Tensor) -> bool:
    return not value.is_floating_point() or bool(torch.isfinite(value).all())


def _check_loaded(path: Path, found: Any) -> None:
    """transformers would go on with random numbers in the place of what is not there, and leave out
    what it has no place for."""
    missing = sorted(found.get("missing_keys") or ())
    wrong = [f"{name} {list(a)} for {list(b)}" for name, a, b in found.get("mismatched_keys") or ()]
    extra = sorted(found.get("unexpected_keys") or ())
    kinds = (("missing", missing), ("wrong shape of", sorted(wrong)), ("unknown", extra))
    for title, names in kinds:
        if names:
            hint = "; its configuration describes a model without it" if title == "unknown" else ""
            raise CheckpointError(f"{path}: {title} tensor {_first(names)}{hint}")


def _tell_ties(model: Any) -> None:
    """A head of its own that the folder holds is not tied, whatever the configuration says: what is
    saved and counted later goes by the configuration."""
    config = model.config.get_text_config()
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and getattr(config, "tie_word_embeddings", False):
        tied = head.weight is table.weight
        config.tie_word_embeddings = model.config.tie_word_embeddings = tied


def read_tokenizer(path: Path) -> Any:
    """The model's own tokenizer, or None where none of its files are there."""
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        return None
    return _from_folder(library().AutoTokenizer, path)


def _from_folder(theirs: Any, path: Path, **options: Any) -> Any:
    """The only call of ``from_pretrained``: from this folder alone, and none of its code."""
    with _quiet(library()), _loading(path):
        return theirs.from_pretrained(str(path), local_files_only=True, **NO_CODE, **options)


def _loading(path: Path) -> AbstractContextManager[None]:
    """Whatever a damaged or foreign folder makes transformers raise, as one line."""
    return read_by_library(f"{path}: could not be loaded", CheckpointError)


@contextmanager
def _quiet(hf: Any) -> Iterator[None]:
    """Without the library's own bars and remarks: ours say what matters."""
    log = hf.utils.logging
    level, shown = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if shown:
            log.enable_progress_bar()


def _first(names: Sequence[Any]) -> str:
    return f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else str(names[0])
