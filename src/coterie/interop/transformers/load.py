"""A folder with a Hugging Face model: what is in it, checked before its weights are touched.

Only safetensors are read, only from the folder, and no code that lies in it is ever run.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from coterie.core.cost import Parameters, count_parameters
from coterie.core.errors import CheckpointError, ConfigError, describe
from coterie.core.folder import read_object
from coterie.interop.transformers.sites import MoESite, find_moe_layers

OLDEST = (5, 18)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DType = Literal["auto", "float32", "bfloat16", "float16"]
AUTO_CLASSES = ("AutoModelForCausalLM", "AutoModelForImageTextToText")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


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


@dataclass(frozen=True, eq=False)
class ModelFolder:
    """A model whose structure is known and whose weights are not loaded: ``skeleton`` is on the
    meta device."""

    path: Path
    config: Any
    skeleton: nn.Module
    sites: list[MoESite]

    @classmethod
    def open(cls, path: str | Path) -> ModelFolder:
        """ConfigError for what transformers or the bridge does not know, CheckpointError for
        missing files."""
        path = Path(path)
        hf = library()
        _check_config(path, set(hf.CONFIG_MAPPING))
        with _quiet(hf), _as_checkpoint_error(path):
            config = hf.AutoConfig.from_pretrained(str(path), local_files_only=True)
        skeleton = _skeleton(hf, config)
        sites = find_moe_layers(skeleton)
        folder = cls(path, config, skeleton, sites)
        folder.weight_files()
        return folder

    @property
    def kind(self) -> str:
        return self.sites[0].kind

    @property
    def text_config(self) -> Any:
        return self.config.get_text_config()

    @property
    def vocabulary(self) -> int:
        return int(self.text_config.vocab_size)

    def weight_files(self) -> list[Path]:
        """The safetensors files, all there; pickled weights are refused."""
        index = self.path / "model.safetensors.index.json"
        if index.is_file():
            names = set(read_object(index).get("weight_map", {}).values())
            files = [self.path / name for name in sorted(map(str, names))]
        else:
            files = sorted(self.path.glob("*.safetensors"))
        if not files:
            hint = "pickled weights (*.bin, *.pt) are not read"
            raise CheckpointError(f"{self.path}: no *.safetensors files; {hint}")
        for file in files:
            inside = file.resolve().parent == self.path.resolve() or file.is_symlink()
            if not inside or not file.is_file():
                raise CheckpointError(f"{file}: missing, but listed in {index.name}")
        return files

    def parameters(self) -> Parameters:
        """Counted on shapes: total, and active for one token."""
        used = {site.experts: site.top_k / site.num_experts for site in self.sites}
        shares = {
            experts: {name: share for name, _ in experts.named_parameters()}
            for experts, share in used.items()
        }
        return count_parameters(self.skeleton, shares)

    def weight_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.weight_files())

    def load(self, dtype: DType = "auto", device: str | None = None) -> nn.Module:
        """The model in eval mode. ``dtype`` "auto": as stored. ``device`` None: CUDA where there
        is one."""
        hf = library()
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        with _quiet(hf), _as_checkpoint_error(self.path):
            model, found = type(self.skeleton).from_pretrained(  # type: ignore[attr-defined]
                str(self.path),
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # told of below, by name
                dtype=DTYPES.get(dtype, "auto"),
            )
        _check_loaded(self.path, found)
        loaded: nn.Module = model.to(device).eval()
        return loaded

    def tokenizer(self) -> Any:
        """The model's own tokenizer, or None where none of its files are there."""
        if not any((self.path / name).is_file() for name in TOKENIZER_FILES):
            return None
        hf = library()
        with _quiet(hf), _as_checkpoint_error(self.path):
            return hf.AutoTokenizer.from_pretrained(
                str(self.path), local_files_only=True, trust_remote_code=False
            )


def _check_loaded(path: Path, found: Any) -> None:
    """transformers would go on with random numbers in the place of what is not there."""
    missing = sorted(found.get("missing_keys") or ())
    wrong = [f"{name} {list(a)} for {list(b)}" for name, a, b in found.get("mismatched_keys") or ()]
    for title, names in (("missing", missing), ("wrong shape of", sorted(wrong))):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise CheckpointError(f"{path}: {title} tensor {names[0]}{more}")


def _check_config(path: Path, known: set[str]) -> None:
    config = read_object(path / "config.json", "not the folder of a model")
    kind = config.get("model_type")
    if kind not in known:
        if "auto_map" in config:
            raise ConfigError(
                f"{path}: model_type {kind!r} needs code of its own, which is not run"
            )
        raise ConfigError(f"{path}: model_type {kind!r} is unknown to this version of transformers")
    if config.get("quantization_config"):
        hint = "store it in float32, bfloat16 or float16"
        raise ConfigError(f"{path}: quantised weights are not read; {hint}")


def _skeleton(hf: Any, config: Any) -> nn.Module:
    """The model without its numbers, of the class that predicts tokens."""
    for name in AUTO_CLASSES:
        try:
            with _quiet(hf), torch.device("meta"):
                skeleton: nn.Module = getattr(hf, name).from_config(config)
            return skeleton
        except ValueError:
            continue
    raise ConfigError(describe("model_type", config.model_type, "a model that predicts tokens"))


@contextmanager
def _as_checkpoint_error(path: Path) -> Iterator[None]:
    """Whatever a damaged or foreign folder makes transformers raise, as one line."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, SafetensorError) as error:
        text = " ".join(str(error).split())
        raise CheckpointError(f"{path}: could not be loaded ({text[:300]})") from error


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
