"""Pictures with one half replaced by noise, for experts that know the other half."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import SerializeAsAny, model_validator
from torch import Tensor

from coterie.core.batch import Batch, Source
from coterie.core.errors import ConfigError, describe
from coterie.core.registry import Part
from coterie.core.rng import generator
from coterie.data.source import SOURCES, SourceConfig, SourceInfo, Split, Subset

Half = Literal["left", "right", "top", "bottom"]


@SOURCES.register
class CoveredConfig(SourceConfig):
    """Pictures of another source with one half replaced by noise, the same in every run."""

    kind: Literal["covered"] = "covered"
    data: Annotated[SerializeAsAny[Part], SOURCES.validator] = "digits"  # type: ignore[assignment]
    """The other source."""
    keep: Half = "left"  # the half that is kept
    noise: float = 1.0  # standard deviation of the noise, clipped to [-1, 1]
    info: ClassVar[SourceInfo] = SourceInfo(
        summary="pictures of another source, one half lost in noise",
        modality="of its data",
        shape="of its data",
        count="of its data",
        licence="of its data",
    )

    @model_validator(mode="after")
    def _check(self) -> CoveredConfig:
        if self.noise <= 0:
            raise ConfigError(describe("noise", self.noise, "a number above 0"))
        return self

    @property
    def whole(self) -> SourceConfig:
        return self.data  # type: ignore[return-value]

    def build(self, split: Split = "train") -> Covered:
        source: Source = self.data.build(split=split)
        if len(source.shape) != 3:
            hint = f"source {source.name!r} yields samples of shape {tuple(source.shape)}"
            raise ConfigError(describe("data", self.data.kind, "pictures [C, H, W]", hint))
        return Covered(source, self.keep, self.noise)


class Covered(Subset):
    """All samples of a source, with one half of each in noise."""

    def __init__(self, source: Source, keep: Half, noise: float) -> None:
        super().__init__(source, list(range(len(source))))
        _, height, width = source.shape
        shown = torch.zeros(height, width, dtype=torch.bool)
        rows = {"top": slice(height // 2), "bottom": slice(height // 2, None)}
        columns = {"left": slice(width // 2), "right": slice(width // 2, None)}
        shown[rows.get(keep, slice(None)), columns.get(keep, slice(None))] = True
        self.shown, self.noise = shown, noise

    def get(self, indices: Any) -> Batch:
        batch = super().get(indices)
        noise = torch.stack([self._noise(int(number)) for number in batch.ids])
        return Batch(torch.where(self.shown, batch.x, noise), batch.cond, batch.ids)

    def _noise(self, number: int) -> Tensor:
        drawn = torch.randn(tuple(self.shape), generator=generator(0, "covered", number))
        return (self.noise * drawn).clamp_(-1.0, 1.0)
