"""A network of diffusers, by its path, as a model: for ensembles and compositions.

Two directories are read: a pipeline (``model_index.json``; its scheduler names the process and what
the network answers) and what ``save_pretrained`` of one network writes, of which both must be said.
UNet2DModel, UNet2DConditionModel, DiTTransformer2DModel and others of their signature will do. What
is read there is a network by its configuration, with weights; a model directory stores the two
apart, and needs neither the pipeline nor its prompt any more. Shapes: B batch, M tokens of a
prompt, C their width.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, SerializeAsAny
from torch import Tensor, nn

from coterie.core.context import NULL_LABEL
from coterie.core.errors import CheckpointError, ConfigError, DataError, describe
from coterie.core.folder import file_digest
from coterie.core.paths import Place
from coterie.core.prediction import Condition, View
from coterie.core.registry import Part
from coterie.core.tensors import read_tensors
from coterie.denoiser import MODELS
from coterie.interop.diffusers.conventions import CONVENTIONS, convention_of, known_as, labels_of
from coterie.interop.diffusers.pipeline import (
    INDEX,
    DiffusersDenoiser,
    component,
    network_files,
    new_network,
    read_json,
    read_network,
)
from coterie.interop.diffusers.schedulers import scheduler_process
from coterie.process import PROCESSES

TOKENS = "tokens"


def is_diffusers(path: str | Path) -> bool:
    """Whether ``path`` is a pipeline, or one network, of diffusers."""
    folder = Path(path)
    if (folder / INDEX).is_file():
        return True
    config = folder / "config.json"
    return config.is_file() and "_class_name" in read_json(config)


@dataclass(frozen=True)
class NetworkFacts:
    """What the data of a network must be: [C, H, W], and how many classes it was told."""

    sample_shape: tuple[int, ...] | None
    num_classes: int
    kind: str


@MODELS.register
class DiffusersNetworkConfig(Part):
    """A network of diffusers with new random weights."""

    kind: Literal["diffusers_network"] = "diffusers_network"
    network: dict[str, Any] = Field(default_factory=lambda: {"_class_name": "UNet2DModel"})
    """its configuration (config.json)"""
    process: Annotated[SerializeAsAny[Part], PROCESSES.validator] = "ddpm"  # type: ignore[assignment]
    """Noising process."""
    view: View = "eps"  # what the network predicts
    null_label: int | None = Field(None, ge=0)
    """Class number that stands for no condition; null: one more than the classes of a DiT."""
    prompt: tuple[int, int] | None = None
    """Shape [M, C] of stored prompt tokens, for samples without tokens; zeros until weights are
    loaded."""

    @property
    def backbone(self) -> NetworkFacts:
        return _facts(self.network)

    def build(self) -> DiffusersExpert:
        return self.around(new_network(self.network))

    def around(self, network: nn.Module, tokens: Tensor | None = None) -> DiffusersExpert:
        """The denoiser whose network is ``network``, and its prompt ``tokens`` [M, C]."""
        if tokens is None and self.prompt is not None:
            tokens = torch.zeros(self.prompt)
        return DiffusersExpert(network, self, tokens)


@MODELS.register
class DiffusersConfig(Part):
    """The network of diffusers at a path, with its weights, in eval mode and frozen."""

    kind: Literal["diffusers"] = "diffusers"
    path: Place = Field("pipeline", min_length=1)  # a pipeline, or a network saved by itself
    process: Annotated[SerializeAsAny[Part], PROCESSES.validator] | None = None
    """Noising process, for networks without a scheduler beside them."""
    view: Literal["x0", "eps", "flow", "v"] | None = None
    """what it predicts, for networks without a scheduler beside them"""
    null_label: int | None = Field(None, ge=0)
    """Class number that stands for no condition; null: one more than the classes of a DiT."""
    tokens: Place | None = None
    """A safetensors file with ``tokens`` [M, C], the embedding of one prompt, for samples without
    tokens."""
    digest: str = ""  # hash that the weights must have; "": any
    is_trained: ClassVar[bool] = True

    @property
    def absent(self) -> str:
        """Why there is nothing at ``path`` to load; "" if there is."""
        if not is_diffusers(self.path):
            return f"nothing of diffusers at {self.path}"
        return ""

    @property
    def model(self) -> DiffusersNetworkConfig:
        """The network there; ConfigError where process or view are not known, or said twice."""
        _, network = component(self.path)
        process, view = self.process, self.view
        if (Path(self.path) / INDEX).is_file():
            index = read_json(Path(self.path) / INDEX)
            known, told = scheduler_process(Path(self.path), index)
            for field, value in (("process", process), ("view", view)):
                if value is not None:
                    hint = "its scheduler says so"
                    raise ConfigError(describe(field, value, f"none for {self.path}", hint))
            process, view = known, told  # type: ignore[assignment]
        for field, value in (("process", process), ("view", view)):
            if value is None:
                hint = f"{self.path} has no scheduler beside it"
                raise ConfigError(describe(field, None, f"the {field} it was trained in", hint))
        assert process is not None and view is not None
        return DiffusersNetworkConfig(
            network=network, process=process, view=view, null_label=self.null_label
        )

    @property
    def backbone(self) -> NetworkFacts:
        return _facts(component(self.path)[1])

    def pinned(self) -> DiffusersConfig:
        """With the digest of the weights that lie there now."""
        return self.replace(digest=self._found_digest())

    def _found_digest(self) -> str:
        folder, _ = component(self.path)
        return "+".join(file_digest(file) for file in network_files(folder))

    def build(self) -> DiffusersExpert:
        """CheckpointError if the weights are damaged, or others than those of ``digest``."""
        known = self.model
        if self.digest and self.digest != self._found_digest():
            raise CheckpointError(f"{self.path}: holds other weights than when it was named")
        tokens = None if self.tokens is None else _tokens(self.tokens)
        if tokens is not None:
            known = known.replace(prompt=tuple(tokens.shape))
        folder, _ = component(self.path)
        made = known.around(read_network(folder, known.network), tokens)
        return made.eval().requires_grad_(False)


def _facts(config: dict[str, Any]) -> NetworkFacts:
    """``sample_shape`` is that of x: what a network reads besides is no channel of a sample."""
    kind, size = str(config.get("_class_name", "")), config.get("sample_size")
    reads, answers = config.get("in_channels"), config.get("out_channels")
    channels = min(reads, answers) if reads and answers else reads
    sides = (size, size) if isinstance(size, int) else tuple(size or ())
    shape = (int(channels), *map(int, sides)) if channels and sides else None
    how = CONVENTIONS.get(known_as(kind, config))
    classes = config.get("num_class_embeds") or 0
    if how is not None and how.classes:
        classes = config.get("num_embeds_ada_norm") or 0
    return NetworkFacts(shape, int(classes), kind)


def _tokens(path: str) -> Tensor:
    found = read_tensors(Path(path)).get(TOKENS) if Path(path).is_file() else None
    if found is None or found.dim() != 2:
        allowed = f"a safetensors file with {TOKENS!r} [M, C]"
        raise CheckpointError(describe("tokens", path, allowed))
    return found


class DiffusersExpert(DiffusersDenoiser):
    """See :class:`DiffusersDenoiser`; our NULL_LABEL becomes the network's class of no condition,
    and ``tokens`` [M, C] stand in where the condition has none. x is [B, C, H, W]: DataError for
    another shape, ConfigError where the network must be told what the condition does not say."""

    def __init__(
        self,
        network: nn.Module,
        config: DiffusersNetworkConfig,
        tokens: Tensor | None = None,
    ) -> None:
        super().__init__(network, config.process.build(), config.view)
        self.config = config
        self.register_buffer(TOKENS, tokens)
        self.facts = config.backbone
        self.null_label = config.null_label
        if self.null_label is None and convention_of(network).classes:
            self.null_label = self.facts.num_classes or None  # a DiT's table has one more row

    def _told(self, x: Tensor, cond: Condition) -> Condition:
        shape = self.facts.sample_shape
        if shape is not None and tuple(x.shape[2:]) != shape[1:]:
            raise DataError(describe("x", tuple(x.shape), f"[B, {', '.join(map(str, shape))}]"))
        batch, device = len(x), x.device
        tokens, label = cond.tokens, cond.label
        if convention_of(self.network).tokens and tokens is None:
            own = self.get_buffer(TOKENS) if self.tokens is not None else None
            if own is None:
                hint = "it reads a prompt; name a file in the expert's tokens"
                raise ConfigError(describe("cond.tokens", None, "embeddings [B, M, C]", hint))
            tokens = own.to(device).expand(batch, -1, -1)
        if labels_of(self.network) not in ("class", "number"):
            label = None
        elif label is None:
            label = torch.full((batch,), NULL_LABEL, device=device)
        if label is not None and bool((label == NULL_LABEL).any()):
            if self.null_label is None:
                hint = "say null_label, the network's class number for no condition"
                raise ConfigError(describe("cond.label", NULL_LABEL, "a class", hint))
            label = torch.where(label == NULL_LABEL, self.null_label, label)
        return cond.replace(tokens=tokens, label=label)
