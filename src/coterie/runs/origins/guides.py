"""The runs that a guide is made of: a network that reads clean pictures, and its experts."""

from __future__ import annotations

from pathlib import Path

from coterie.core.errors import ConfigError, describe
from coterie.guides import GuideConfig, ReaderConfig
from coterie.guides.tasks import Task
from coterie.runs.config import RunConfig
from coterie.runs.origins.first_weights import InitConfig, find_origin
from coterie.runs.origins.synthetic_data import GeneratedConfig
from coterie.runs.origins.trained_model import PretrainedConfig
from coterie.train.objectives import RecognitionConfig
from coterie.train.run_directory import RunDir

STEPS = 1000


def reader_run(denoiser: str | Path, task: Task = "classes", steps: int = STEPS) -> RunConfig:
    """A small network that learns to read the clean pictures that ``denoiser`` was trained on."""
    run, shape = _of(denoiser)
    classes = run.data.whole.build(split="held_out").num_classes
    if task != "map" and not classes:
        hint = "its data have no classes"
        raise ConfigError(describe("task", task, "map", hint))
    width = 32 if task == "classes" else 16
    model = ReaderConfig(
        task=task, image_size=shape[1], channels=shape[0], classes=classes or 1, width=width
    )
    train = run.train.replace(steps=steps, batch=64, lr=2e-3, weight_decay=0.05, ema=())
    return run.replace(
        recipe="",
        preset="",
        data=run.data.whole,
        model=model,
        objective=RecognitionConfig(),
        train=train,
        init=None,
    )


def guide_run(
    denoiser: str | Path,
    reader: str | Path,
    experts: int = 5,
    rank: int = 4,
    steps: int = STEPS,
    labels: bool = False,
    samples: int = 1000,
) -> RunConfig:
    """Experts that make the network of ``reader`` read what ``denoiser`` is asked about, learnt on
    ``samples`` of the denoiser from the network's own answers; or (``labels``) on its data."""
    run, _ = _of(denoiser)
    process = run.model.process
    network = PretrainedConfig(path=str(reader)).pinned()
    origin = find_origin(InitConfig(path=str(denoiser)))
    made = GeneratedConfig(path=str(denoiser), count=samples, origin=origin)
    train = run.train.replace(
        steps=steps,
        batch=32,
        lr=2e-3,
        weight_decay=0.05,
        ema=(),
        warmup=0,
        schedule={"kind": "repeated", "schedule": "linear", "times": experts},
    )
    return run.replace(
        recipe="",
        preset="",
        data=run.data.whole if labels else made,
        model=GuideConfig(network=network, process=process, ranges=experts, rank=rank),
        objective=RecognitionConfig(learn_from="data" if labels else "teacher", times="uniform"),
        train=train,
        init=None,
    )


def _of(denoiser: str | Path) -> tuple[RunConfig, tuple[int, ...]]:
    """A run that makes pictures, and their shape."""
    run = RunDir(denoiser).read_config(RunConfig)
    shape = getattr(getattr(run.model, "backbone", None), "sample_shape", None)
    if shape is None or len(shape) != 3 or getattr(run.model, "view", None) is None:
        hint = "a guide reads the pictures of a denoiser"
        allowed = "a run of a denoiser of pictures"
        raise ConfigError(describe("DENOISER", str(denoiser), allowed, hint))
    return run, tuple(shape)
