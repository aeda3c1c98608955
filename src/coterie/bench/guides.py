"""What guides cost and what they are worth: a call of a guided denoiser, and samples that follow a
class, a map and the classes of pixels.

``rows``: milliseconds per call of 64 samples. ``followed``: of the recipe ``ppap``, each task
guided by its network as it is and by experts of noise ranges, at several scales.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from coterie.bench.timing import Place, interleaved, milliseconds, ratio
from coterie.core.prediction import Condition
from coterie.guides import Guide, GuideConfig
from coterie.recipes import ppap
from coterie.runs.config import RunConfig
from coterie.runs.judges import judge_of
from coterie.runs.origins.trained_model import PretrainedConfig
from coterie.runs.trained_run import load_run
from coterie.runs.training import start
from coterie.solvers.network_guidance import GuidedConfig, GuidedDenoiser

BATCH, SAMPLES = 64, 300
SCALES = {"classes": (4.0,), "map": (4.0, 16.0), "pixels": (0.5, 2.0)}
STEPS = 400  # of all experts of a task
SCORES = ("label_accuracy", "target_error", "target_accuracy", "frechet")
MEASURES = ("guide_loss", "gradient_cosine", "guide_accuracy", "guide_error", "guide_share")


def run_benchmark(rounds: int = 5, threads: int = 1, quality: bool = True) -> dict[str, Any]:
    """``rows`` and, with ``quality``, ``followed`` (over two minutes, most of it training)."""
    with Place(threads=threads).entered() as place, TemporaryDirectory() as folder:
        root = Path(folder)
        _train(ppap.denoiser(), root / "denoiser", quality)
        _prepare("classes", root, quality)
        rows = _times(root, place, rounds)
        followed = _followed("classes", root) if quality else []
        for task in ("map", "pixels") if quality else ():
            _prepare(task, root, quality)
            followed += _followed(task, root)
    return {"rows": rows, "followed": followed}


def _train(config: RunConfig, out: Path, quality: bool) -> None:
    """What is only timed need not know anything."""
    train = config.train if quality else config.train.replace(steps=5)
    start(config.replace(train=train), out, progress=False)


def _prepare(task: str, root: Path, quality: bool) -> None:
    """The network of a task, and its experts."""
    _train(ppap.reader(task), root / task, quality)
    data, steps = str(root / "denoiser"), STEPS
    made = ppap.guide(str(root / task), "lora", ppap.RANGES, data, steps)
    if not quality:
        made = made.replace(data=made.data.replace(count=32, steps=1))
    _train(made, root / f"{task}-experts", quality)


def _guides(task: str, root: Path) -> dict[str, Any]:
    network = PretrainedConfig(path=str(root / task))
    plain = GuideConfig(network=network, process=ppap.DDPM, ranges=1, adapt="none")
    return {"as it is": plain, "experts": PretrainedConfig(path=str(root / f"{task}-experts"))}


def _times(root: Path, place: Place, rounds: int) -> list[dict[str, Any]]:
    """Rows {candidate, ms, over_plain}: the denoiser, guided by the network as it is, and by
    experts: one for all rows, merged, or a batch of rows of all ranges."""
    denoiser = load_run(root / "denoiser").model
    plain, experts = (part.build().eval() for part in _guides("classes", root).values())
    merged = copy.deepcopy(experts)
    assert isinstance(merged, Guide)
    merged.fused = True
    x = torch.randn(BATCH, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    cond = Condition(label=torch.arange(BATCH) % 10)
    one, mixed = torch.full((BATCH,), 0.5), torch.linspace(0.0, 1.0, BATCH)

    def guided(guide: Guide, t: torch.Tensor) -> Callable[[], Any]:
        model = GuidedDenoiser(denoiser, guide, 4.0)
        return lambda: model(x, t, cond)

    calls = {
        "denoiser alone": lambda: denoiser(x, one, Condition()),
        "network as it is": guided(plain, one),
        "experts, one for all rows": guided(experts, one),
        "experts, merged": guided(merged, one),
        "experts, rows of all ranges": guided(experts, mixed),
    }
    with torch.no_grad():
        times = interleaved(calls, place, rounds)
    return [
        {
            "candidate": name,
            "ms": milliseconds(times, name),
            "over_plain": ratio(times, name, ["network as it is"]),
        }
        for name in times
    ]


def _followed(task: str, root: Path) -> list[dict[str, Any]]:
    """Rows {task, guide, scale, scores and measures}."""
    rows = []
    base = load_run(root / "denoiser").config
    denoiser = PretrainedConfig(path=str(root / "denoiser"))
    for name, part in _guides(task, root).items():
        for scale in SCALES[task]:
            model = GuidedConfig(denoiser=denoiser, guide=part, scale=scale)
            config = base.replace(model=model, train=base.train.replace(steps=0))
            out = root / f"{task}-{name}-{scale:g}".replace(" ", "-")
            judge = judge_of(load_run(start(config, out, progress=False)))
            scores = judge.scores(SAMPLES)
            found = {n: scores[n]["value"] for n in SCORES if n in scores}
            told = {n: v for n, v in judge.measures().items() if n in MEASURES}
            rows.append({"task": task, "guide": name, "scale": scale, **found, **told})
    return rows
