"""Samples that are not finite: an error that says which, when and by whom; weights at load."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from coterie.cli.main import run as coterie
from coterie.core.errors import CheckpointError, DataError
from coterie.core.folder import seal
from coterie.core.tensors import read_tensors, write_tensors
from coterie.runs.sample.sampling import generate
from coterie.runs.trained_run import LoadedRun, load_run
from small_runs import finished


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished("dit-moe", tmp_path_factory.mktemp("runs") / "digits")


def spoilt(run: LoadedRun, when: int) -> str:
    """A module that answers NaN for the last row of its ``when``-th call; its name."""
    name, module = next(
        (name, module) for name, module in run.model.named_modules() if name.endswith("blocks.1")
    )
    calls = [0]

    def hook(module: torch.nn.Module, inputs: Any, output: Any) -> Any:
        calls[0] += 1
        if calls[0] % 4 == when:  # four calls draw a batch: the second time is like the first
            output[0][-1, 0] = math.nan
        return output

    module.register_forward_hook(hook)
    return name


def test_F5_samples_that_are_not_finite_name_sample_step_and_module(digits: Path) -> None:
    run = load_run(digits)
    settings = run.config.sample.replace(solver="euler", batch=3)
    run = dataclasses.replace(run, config=run.config.replace(sample=settings))
    name = spoilt(run, 2)
    with pytest.raises(DataError, match=rf"samples \[2\]: NaN .* step 1, first of module {name}"):
        generate(run, 5, steps=4, guidance=1.0)


def test_F5_guidance_that_overflows_is_not_blamed_on_the_network(digits: Path) -> None:
    run = load_run(digits)
    settings = run.config.sample.replace(solver="euler")
    run = dataclasses.replace(run, config=run.config.replace(sample=settings))
    for parameter in run.model.parameters():
        parameter.data.mul_(1e3)
    torch.nn.init.constant_(list(run.model.parameters())[-1], 3e38)
    with pytest.raises(DataError, match=r"samples \[0, 1, 2\]: NaN or infinity in step 0"):
        generate(run, 3, steps=2, guidance=1e4)


@pytest.mark.parametrize("weight", ["1e30", "nan", "inf"])
def test_C6_a_guidance_weight_without_meaning_is_refused(
    digits: Path, weight: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert coterie(["sample", str(digits), "--num", "2", "--guidance", weight, "-q"]) != 0
    assert "error: guidance: " in capsys.readouterr().err
    assert not (digits / "samples").exists()


@pytest.mark.parametrize("part", ["ema-0.99", "model"])
def test_F5_averaged_weights_with_nan_are_refused_at_load(part: str, tmp_path: Path) -> None:
    run = finished("dit-moe", tmp_path / "run")
    (folder,) = (run / "checkpoints").glob("step-*4")
    file = next(path for path in folder.glob("*.safetensors") if path.stem[:3] == part[:3])
    tensors = {name: value.clone() for name, value in read_tensors(file).items()}
    name = sorted(name for name, value in tensors.items() if value.is_floating_point())[0]
    tensors[name].view(-1)[0] = math.nan
    write_tensors(file, tensors)
    manifest = folder / "manifest.json"
    header = json.loads(manifest.read_text())
    manifest.unlink()
    seal(folder, {key: value for key, value in header.items() if key not in ("files", "digest")})
    with pytest.raises(CheckpointError, match=f"{name} holds NaN or infinity"):
        load_run(run)
