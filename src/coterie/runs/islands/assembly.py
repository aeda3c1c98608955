"""Combining trained islands: their router, the ensemble, and a dense student.

Everything here is a run like any other. The router's training is cross-entropy over the whole data
under the experts' noise; the ensemble trains nothing; the student learns what the expert of each
sample's own island answers (Decentralized Diffusion Models, McAllister et al. 2025).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coterie.core.config import override
from coterie.core.errors import CheckpointError, ConfigError, describe
from coterie.core.registry import Part
from coterie.denoiser import DenoiserConfig
from coterie.ensembles import (
    ClusterRouterConfig,
    EnsembleModelConfig,
    MemberConfig,
    MixtureConfig,
    Oracle,
)
from coterie.runs.config import RunConfig
from coterie.runs.islands.plan import IslandEntry, IslandPlan, read_plan
from coterie.runs.islands.source import IslandConfig
from coterie.runs.islands.workers import state_of
from coterie.runs.origins.trained_model import PretrainedConfig
from coterie.runs.training import start
from coterie.train.objectives import ClusterPosteriorConfig, DistillationConfig
from coterie.train.run_directory import RunDir, differences

ROUTER = "router"


def router_of(base: RunConfig, data: IslandConfig, islands: int) -> RunConfig:
    """The router's run: the base's encoder at half its depth, without label and experts.

    It sees x_t alone, samples of the whole data, as many of them as the base sees.
    """
    model = base.model
    if not isinstance(model, DenoiserConfig) or model.backbone.kind != "dit":
        kind = getattr(getattr(model, "backbone", None), "kind", model.kind)
        hint = "train a router of your own for others: the model cluster_router"
        raise ConfigError(describe("model.backbone.kind", kind, "dit", hint))
    trunk = model.backbone.trunk
    small = trunk.replace(depth=max(1, trunk.depth // 2), slots=())
    backbone = model.backbone.replace(num_classes=0, learned_variance=False, trunk=small)
    return base.replace(
        data=data,
        model=ClusterRouterConfig(
            num_clusters=islands,
            backbone=backbone,
            process=model.process,
            precondition=model.precondition,
        ),
        objective=ClusterPosteriorConfig(times=getattr(base.objective, "times", "uniform")),
    )


def train_router(
    folder: str | Path, changes: Mapping[str, Any] | None = None, progress: bool = True
) -> Path:
    """Train the router; the same call again resumes."""
    folder, plan = Path(folder), read_plan(folder)
    config = router_of(plan.base, plan.whole(folder), len(plan.islands))
    return start(override(config, changes or {}), folder / ROUTER, progress=progress)


def assemble(
    folder: str | Path,
    out: str | Path,
    choice: Any = None,
    changes: Mapping[str, Any] | None = None,
    partial: bool = False,
) -> Path:
    """Write the run that is all islands as one; ``choice`` (default: the most probable island).

    Members and router are named by path and by the hash of their weights, nothing is copied.
    Refused: islands of another cut of the data, of another process or shape of samples
    (ConfigError); islands that are missing or not finished (CheckpointError), unless ``partial``:
    then the ensemble is what is there, and says what is not.
    """
    folder, plan = Path(folder), read_plan(folder)
    choice = choice or {"kind": "top_k", "k": 1}
    model = ensemble_of(plan, folder, choice, partial)
    config = plan.base.replace(
        data=plan.whole(folder), model=model, train=plan.base.train.replace(steps=0)
    )
    return start(override(config, changes or {}), out)


def distil(
    folder: str | Path,
    out: str | Path,
    changes: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Path:
    """Train one dense model, the base's, on what the islands answer; the same call resumes."""
    config = override(distilled_config(read_plan(folder), Path(folder)), changes or {})
    return start(config, out, progress=progress)


def distilled_config(plan: IslandPlan, folder: Path) -> RunConfig:
    """The base's run with the expert of each sample's own island as its teacher."""
    objective = plan.base.objective
    shared = {name: getattr(objective, name) for name in ("times", "weighting", "label_dropout")}
    teacher = ensemble_of(plan, folder, Oracle(), partial=False)
    return plan.base.replace(
        data=plan.whole(folder), objective=DistillationConfig(teacher=teacher, **shared)
    )


def ensemble_of(
    plan: IslandPlan, folder: Path, choice: Part | Mapping[str, Any], partial: bool
) -> EnsembleModelConfig:
    """All islands of a plan as one model."""
    members = tuple(
        MemberConfig(name=entry.folder, model=_member(plan, folder, entry, partial))
        for entry in plan.islands
    )
    router = PretrainedConfig(path=str(folder / ROUTER))
    if router.absent:
        hint = f"train it: coterie island router {folder}"
        raise CheckpointError(f"{router.absent}; {hint}")
    total = sum(entry.samples for entry in plan.islands)
    prior = tuple(entry.samples / total for entry in plan.islands)
    return EnsembleModelConfig(
        ensemble=MixtureConfig.from_dict({"choice": choice, "prior": prior}),
        members=members,
        router=router.pinned(),
    )


def _member(plan: IslandPlan, folder: Path, entry: IslandEntry, partial: bool) -> PretrainedConfig:
    model = PretrainedConfig(path=str(folder / entry.folder))
    run = RunDir(folder / entry.folder)
    known = run.stored_config() is not None
    done = known and state_of(run.path)["state"] == "done"
    if not done and not partial:
        what = "is not finished" if known else "is missing"
        hint = "train it, or assemble what is there: --partial"
        raise CheckpointError(f"{run.path}: {entry.folder} {what}; {hint}")
    if known:
        _check_fits(plan, entry, run)
    return model if model.absent else model.pinned()


def _check_fits(plan: IslandPlan, entry: IslandEntry, run: RunDir) -> None:
    """ConfigError unless the island was trained on its part of this cut, under the same process."""
    config, base = run.read_config(RunConfig), plan.base
    data = config.data
    if data.kind == "shard":
        same = data.sha256 == entry.sha256
    else:
        same = data.kind == "island" and (data.cut, data.index) == (plan.cut, entry.index)
    if not same:
        allowed = f"{entry.folder} of the cut {plan.cut[:16]}"
        hint = "it was trained on other samples"
        raise ConfigError(describe(f"{run.path}: data", data.kind, allowed, hint))
    ours, theirs = (
        {
            "process": c.model.process.model_dump(mode="json"),
            "sample_shape": list(c.model.backbone.sample_shape),
            "num_classes": getattr(c.model.backbone, "num_classes", 0),
        }
        for c in (base, config)
    )
    changed = differences(ours, theirs)
    if changed:
        allowed = "as in the plan: members of one ensemble share a process and the data's shape"
        raise ConfigError(f"{run.path}: model: {'; '.join(changed)}; {allowed}")
