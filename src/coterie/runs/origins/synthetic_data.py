"""Samples of a trained denoiser as a data source, drawn once and kept."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from coterie.core.errors import ConfigError, describe
from coterie.core.paths import Place
from coterie.core.rng import derive
from coterie.core.user_cache import cache_root
from coterie.data.download.cache import (
    locked,
    open_array,
    problem,
    save_array,
    write_folder,
)
from coterie.data.source import SOURCES, ArraySource, SourceConfig, SourceInfo, Split
from coterie.runs.origins.first_weights import InitConfig, Origin, find_origin

NULL = -1


@SOURCES.register
class GeneratedConfig(SourceConfig):
    """Unconditional samples of a trained run as data; an eighth as many are held out, with other
    seeds.

    They are kept in the user's cache under the hash of the weights, so a run that is trained
    further gives other samples.
    """

    kind: Literal["generated"] = "generated"
    path: Place = Field("runs/dit", min_length=1)  # the run
    count: int = Field(1000, ge=8)  # training samples
    steps: int | None = Field(None, ge=1)  # solver steps; null: the run's
    seed: int = Field(0, ge=0, lt=2**63)  # of the samples
    weights: str = "ema"  # ema (first decay), ema-<decay>, or model (not averaged)
    origin: Origin | None = None  # identity that the weights must have; null: any
    info: ClassVar[SourceInfo] = SourceInfo(
        summary="samples of a trained run, without labels",
        modality="of its run",
        shape="of its run",
        count="any",
        licence="of its run's data",
    )

    @property
    def whole(self) -> SourceConfig:
        """The data of the run."""
        from coterie.runs.config import RunConfig

        config = Path(self.path) / "config.json"
        if not config.is_file():
            hint = "train the denoiser first"
            raise ConfigError(describe("data.path", self.path, "a run directory", hint))
        found: SourceConfig = RunConfig.load(config).data.whole
        return found

    def build(self, split: Split = "train") -> ArraySource:
        whole = self.whole.build("held_out")
        return ArraySource(
            "generated",
            whole.modality,
            self.samples(split),
            shape=whole.shape,
            licence=whole.licence,
        )

    def samples(self, split: Split) -> np.ndarray:
        """f32 [S, ...]; drawn where the cache has none, while a second process waits."""
        init = InitConfig(path=self.path, weights=self.weights, origin=self.origin)
        found = find_origin(init).digest
        if self.origin is not None and self.origin.digest != found:
            hint = "the run has been trained on since"
            allowed = f"the weights {self.origin.digest[:16]}"
            raise ConfigError(describe(f"data.path: {self.path}", found[:16], allowed, hint))
        fields = self.model_dump(mode="json", exclude={"path", "origin"})
        key = derive(0, found, split, *(str(fields[name]) for name in sorted(fields)))
        folder = cache_root() / "generated" / f"{key:016x}"
        with locked(folder.with_suffix(".lock")):
            if problem(folder, deep=True) is not None:
                drawn = self._draw(split)
                write_folder(folder, lambda work: save_array(work, "x", drawn))
        return open_array(folder, "x")

    def _draw(self, split: Split) -> np.ndarray:
        from coterie.runs.sample.sampling import conditional, generate
        from coterie.runs.trained_run import load_run

        run = load_run(self.path, which=self.weights)
        count = self.count if split == "train" else max(8, self.count // 8)
        labels = [NULL] if conditional(run) else None
        seed = derive(self.seed, "generated", split)
        made = generate(run, count, labels=labels, seed=seed, steps=self.steps, guidance=1.0)
        drawn: np.ndarray = made.x.float().clamp(-1.0, 1.0).cpu().numpy()
        return drawn
