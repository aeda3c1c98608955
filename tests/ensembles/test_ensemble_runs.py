"""A saved ensemble under the usual verbs, as the model of a run that trains nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from coterie.backbones import DiTConfig, TrunkConfig
from coterie.cli.main import run
from coterie.denoiser import DenoiserConfig
from coterie.ensembles import NoiseRangesConfig
from coterie.hub import save_ensemble

SMALL = TrunkConfig(width=16, depth=1, heads=2)
MODEL = DenoiserConfig(backbone=DiTConfig(image_size=8, patch=4, trunk=SMALL))


@pytest.fixture
def joined(tmp_path: Path) -> Path:
    networks = []
    for seed in range(2):
        torch.manual_seed(seed)
        networks.append(MODEL.build().eval())
    ranges = NoiseRangesConfig(boundaries=(0.5,)).build(networks)
    folder = save_ensemble(ranges, tmp_path / "ranges")
    model = json.dumps({"kind": "pretrained", "path": str(folder)})
    data = json.dumps({"kind": "digits"})
    out = tmp_path / "joined"
    words = ["--out", str(out), "-q", "--train.steps=0", f"--model={model}", f"--data={data}"]
    assert run(["train", "dit", *words]) == 0
    return out


def test_a_saved_ensemble_is_sampled_by_the_usual_verb(joined: Path) -> None:
    assert run(["sample", str(joined), "--num", "4", "--steps", "4", "-q"]) == 0
    assert (joined / "samples" / "grid.png").is_file()
    assert len(json.loads((joined / "samples" / "samples.json").read_text("utf-8"))) == 4
