"""The cost of a run before it starts: parameters, multiply-adds, projected minutes, memory."""

from __future__ import annotations

from typing import Any

from coterie.core import memory
from coterie.core.cost import count_parameters
from coterie.runs.build import build_model
from coterie.runs.config import RunConfig
from coterie.runs.training import make_trainer


def plan(config: RunConfig, measure: bool = True) -> dict[str, Any]:
    """Sizes and cost before any work: parameters, multiply-adds, projected minutes; of a run that
    trains nothing only that, of one whose parts are not there what it memory."""
    if not config.train.steps:
        return {"recipe": config.recipe, "preset": config.preset, "steps": 0}
    missing = getattr(config.model, "absent", "")
    if missing:
        known = {"steps": config.train.steps, "batch": config.train.batch}
        return {"recipe": config.recipe, "preset": config.preset, **known, "needs": missing}
    # Shapes are enough, and published sizes fit few machines.
    counted = count_parameters(memory.on_meta(config.model, lambda: build_model(config)))
    backbone = getattr(config.model, "backbone", None)
    tokens = int(getattr(backbone, "tokens", 1))
    # Where a parameter serves many places, or several networks answer.
    whole = getattr(config.model, "multiply_adds", None)
    own = whole or getattr(backbone, "multiply_adds", None)
    work = counted.active * tokens if own is None else own()
    out: dict[str, Any] = {
        "recipe": config.recipe,
        "preset": config.preset,
        "parameters_total": counted.total,
        "parameters_active": counted.active,
        "tokens_per_sample": tokens,
        "steps": config.train.steps,
        "batch": config.train.batch,
        # 2 FLOPs per multiply-add, forward + twice that backward, active parameters only.
        "flops_per_step": 6 * work * config.train.batch,
    }
    if measure:
        # What a step costs does not depend on where the first weights come from, but adapters do.
        plain = config.init is None or not config.init.adapters
        timed = config.replace(init=None) if plain else config
        seconds = make_trainer(timed, None).project(steps=5)
        out["projected_minutes"] = round(seconds / 60, 2)
    return out
