"""HoME: many tasks on one input; normalised experts in two levels, each task with some of its own.

In a denoiser noise levels are the tasks, and high and low noise are the groups.
"""

from __future__ import annotations

from typing import Any

from coterie.backbones import DiTConfig, FieldConfig, LevelConfig, MultiTaskConfig, SlotConfig
from coterie.backbones.levels import lay_out
from coterie.data.ratings.movielens import FIELDS
from coterie.denoiser import DenoiserConfig, PredictorConfig
from coterie.experts.kinds import NormMLP
from coterie.recipes.base import Claim, Paper
from coterie.recipes.common import RECTIFIED_FLOW, image_tiny, image_trunk
from coterie.runs.config import RunConfig, SampleConfig
from coterie.train.config import TrainConfig
from coterie.train.objectives import DenoisingConfig, MultiTaskObjectiveConfig

PAPER = Paper(
    title="HoME: Hierarchy of Multi-Gate Experts for Multi-Task Learning at Kuaishou",
    authors="Wang, Xu and Cao, Jiangxia and Fu, Zhiyi and Gai, Kun and Zhou, Guorui",
    year=2024,
    venue="arXiv preprint",
    arxiv="2408.05430",
    key="wang2024home",
)
SUMMARY = "Many tasks, two levels of normalised experts: for all, for groups of tasks, for each."

GROUPS = {"positive": ("ge3", "ge4", "eq5"), "negative": ("le2", "eq1")}
TASKS = tuple(task for tasks in GROUPS.values() for task in tasks)
EXPERT = NormMLP(norm="batch", activation="silu", feature_rank=4)
PLAIN = NormMLP(norm="none", activation="relu")
Parts = dict[str, Any]


def levels(group: int = 2, width: int = 64, last: int = 32) -> tuple[LevelConfig, ...]:
    """HoME's two: experts for all and for each group; above them, with tasks' own ones too."""
    below = LevelConfig(shared=2, group=group, width=width, readers="groups")
    return below, LevelConfig(shared=1, group=1, task=1, width=last)


def one_level(shared: int, task: int, hidden: int) -> Parts:
    """Experts of two layers, as deep as two levels: shared-bottom, MMoE, CGC."""
    level = LevelConfig(shared=shared, task=task, width=32)
    return {"levels": (level,), "expert": PLAIN.replace(hidden=hidden)}


def ple(width: int, last: int) -> Parts:
    """Two levels of CGC; the gates of the second read what its experts read, as published."""
    below, above = LevelConfig(shared=2, task=1, width=width), LevelConfig(shared=1, task=1)
    return {"levels": (below, above.replace(width=last)), "expert": PLAIN, "gates": "own"}


HOME: Parts = {"levels": levels(), "expert": EXPERT, "self_gate": True}
BASELINES = {
    "shared-bottom": one_level(1, 0, 540),
    "mmoe": one_level(8, 0, 64),
    "cgc": one_level(2, 1, 74),
    "ple": ple(70, 40),
}
NO_GATE: Parts = {"levels": levels(2, 76, 33), "expert": EXPERT.replace(feature_rank=None)}
WITHOUT: dict[str, Parts] = {
    "no-norm": {**HOME, "expert": PLAIN.replace(feature_rank=4)},
    "no-mask": {**HOME, "mask": False},
    "no-feature-gate": {**HOME, **NO_GATE},
    "no-self-gate": {**HOME, "self_gate": False},
}


def ratings(parts: Parts, embedding: int = 12, **changes: Any) -> RunConfig:
    """MovieLens-100K: five questions about a rating, three epochs."""
    fields = tuple(FieldConfig(name=f.name, size=f.size, columns=f.columns) for f in FIELDS)
    what: Parts = {"fields": fields, "tasks": TASKS, "groups": GROUPS, "embedding": embedding}
    train = {"steps": 237, "batch": 1024, "lr": 0.01, "ema": None, **changes}
    return RunConfig(
        recipe="home",
        preset="tiny",
        data={"kind": "movielens", "tasks": TASKS},
        model=PredictorConfig(backbone=MultiTaskConfig(**what, **parts)),
        objective=MultiTaskObjectiveConfig(),
        train=TrainConfig.from_dict(train),
    )


def tiny() -> RunConfig:
    return ratings(HOME)


def paper() -> RunConfig:
    """A large layout, in one pass."""
    parts = {**HOME, "levels": levels(4, 512, 256), "tower": 128}
    return ratings(parts, embedding=64, steps=79, lr=1e-3).replace(preset="paper")


def slot(bins: int, hidden: int, home: bool = True) -> SlotConfig:
    """Noise levels in ``bins`` equal parts are tasks, the lower and the higher half groups. Without
    ``home`` as many plain experts are open to all of them."""
    halves = tuple(2 * task // bins for task in range(bins))
    sizes = (1, 1, 1) if home else (1 + 2 + bins, 0, 0)
    (plan,) = lay_out([(*sizes, "tasks")], halves, mask=True)
    expert = (EXPERT if home else PLAIN).replace(hidden=hidden)
    layer = plan.layer(expert, self_gate=home, later=False, balance=())
    return SlotConfig(slot="ffn", expert=layer.replace(noise_tasks=bins))


def gpu() -> RunConfig:
    """DiT-S on CIFAR-10 in 10 noise levels, for one GPU."""
    trunk = image_trunk("S", slot(10, 768))
    backbone = DiTConfig(image_size=32, channels=3, num_classes=10, patch=2, trunk=trunk)
    return RunConfig(
        recipe="home",
        preset="gpu",
        data={"kind": "cifar10"},
        model=DenoiserConfig(backbone=backbone, **RECTIFIED_FLOW),
        objective=DenoisingConfig(times="logit_normal"),
        train=TrainConfig(steps=20_000, batch=128, lr=3e-4, warmup=500, ema=0.999),
        sample=SampleConfig(solver="heun", steps=25),
    )


def arms() -> dict[str, RunConfig]:
    """As many parameters in all arms of a modality, within 2 %."""
    images = {"image-home": slot(4, 64), "image-mmoe": slot(4, 69, home=False)}
    found = {name: ratings(parts) for name, parts in ({"home": HOME} | BASELINES | WITHOUT).items()}
    return found | {name: image_tiny("home", part, steps=200) for name, part in images.items()}


def _claim(text: str, metric: str, baseline: str) -> Claim:
    return Claim(text, metric, "home", baseline, better="higher")


CLAIMS = (
    *(_claim(f"ranks better within users than {name}", "gauc", name) for name in BASELINES),
    *(_claim(f"ranks {t} better than {b}", f"gauc/{t}", b) for t in TASKS[3:] for b in BASELINES),
    *(_claim(f"{name.replace('-', ' ')} ranks worse", "gauc", name) for name in WITHOUT),
    Claim("noise levels as tasks beat open experts", "held_out_loss", "image-home", "image-mmoe"),
)
DEPARTURES = (
    "ratings of films, not impressions: tasks are questions about a rating, two of them rare",
    "gates read the embedded features on both levels; PLE's read what its experts read",
    "a self gate adds its experts' answers as a residual; feature gates have rank 4, one each",
    "experts are one layer in each of two levels; those of one-level mixtures have two layers",
    "images: noise levels are tasks and one level stands in every block; this use is ours",
    "paper: sizes and logs are not published; a large layout on the same ratings",
)
