"""What is asked of a GPU besides the speed of expert layers: agreement, training, sampling."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coterie.bench.expert_cases import Case, make_routing
from coterie.core.prediction import Condition
from coterie.core.rng import SampleNoise
from coterie.data.source import ArraySource
from coterie.experts import ExpertPool, plan
from coterie.experts.dispatch import BACKENDS, DispatchPlan, available
from coterie.experts.kinds import ExpertKind, GeluMLP, SwiGLU
from coterie.recipes import get_recipe
from coterie.runs.training import make_trainer
from coterie.solvers.guidance import guide
from coterie.solvers.sampling import initial_noise, sample

TYPES = (torch.float32, torch.bfloat16, torch.float16)


def correctness(device: str, quick: bool) -> list[dict[str, Any]]:
    """Relative error, by norms, of the answer and of each gradient of every backend and type
    against the plain loop in float64; some slots choose nobody."""
    case = Case("check", 32 if quick else 4000, 64, 40, 8, 2)
    kinds: tuple[ExpertKind, ...] = (SwiGLU(hidden=case.hidden), GeluMLP(hidden=case.hidden))
    return [
        row
        for kind in kinds
        for dtype in (TYPES[:2] if quick else TYPES)
        for row in _agreement(kind, case, device, dtype)
    ]


def _agreement(kind: ExpertKind, case: Case, device: str, dtype: torch.dtype) -> list[dict]:
    routing = make_routing(case, device)
    ids = routing.ids.clone()
    ids[::7, 1] = case.num_experts
    gates = routing.gates.detach().masked_fill(ids == case.num_experts, 0.0)
    made = plan(routing.replace(ids=ids, gates=gates))
    pool = ExpertPool(kind, case.num_experts, case.width)
    with torch.no_grad():
        for name in pool.names:  # biases begin at zero
            getattr(pool, name).normal_(0.0, 0.1)
    pool = pool.to(device, dtype)
    exact = ExpertPool(kind, case.num_experts, case.width).to(device, torch.float64)
    exact.load_state_dict(pool.state_dict())
    rng = torch.Generator().manual_seed(2)
    x, grad = (torch.randn(case.tokens, case.width, generator=rng).to(device, dtype) for _ in "xg")
    true = _answers(x.double(), grad.double(), made, exact, "loop")
    rows = []
    for backend in available(x, made, pool):
        found = _answers(x, grad, made, pool, backend)
        errors = {
            name: float((found[name].double() - one).norm() / one.norm())
            for name, one in true.items()
        }
        label = {"backend": backend, "experts": kind.kind, "dtype": str(dtype)}
        rows.append({**label, "worst": max(errors.values()), **errors})
    return rows


def _answers(
    x: Tensor, grad: Tensor, made: DispatchPlan, pool: ExpertPool, backend: str
) -> dict[str, Tensor]:
    x, gates = x.clone().requires_grad_(), made.gates.clone().requires_grad_()
    own = DispatchPlan(made.unit, made.ids, gates, made.num_experts)
    y = BACKENDS[backend](x, own, pool, False)
    names = ["x", "gates", *pool.names]
    grads = torch.autograd.grad(y, [x, gates, *pool.parameters()], grad)
    return {"y": y.detach(), **dict(zip(names, grads))}


def _trainer(device: str, quick: bool) -> Any:
    """``dit-moe``, on random pictures of the right shape: a machine may have no data."""
    config = get_recipe("dit-moe").config("tiny" if quick else "gpu")
    config = config.replace(train=config.train.replace(device=device))
    backbone = config.model.backbone
    shape = tuple(backbone.sample_shape)
    rng = np.random.default_rng(0)
    rows = max(1024, config.train.batch)
    source = ArraySource(
        "random",
        "image",
        rng.uniform(-1, 1, (rows, *shape)).astype(np.float32),
        shape=shape,
        licence="none",
        labels=rng.integers(0, backbone.num_classes, rows),
        class_names=[str(label) for label in range(backbone.num_classes)],
    )
    return config, make_trainer(config, source=source)


def training(device: str, quick: bool) -> dict[str, Any]:
    """Seconds per step, samples per second and peak memory of ``dit-moe --preset gpu``."""
    config, trainer = _trainer(device, quick)
    steps = 2 if quick else 50
    began = time.perf_counter()
    total = trainer.project(steps=steps)
    per_step = total / config.train.steps
    return {
        "steps_timed": steps,
        "seconds_per_step": per_step,
        "samples_per_second": config.train.batch / per_step,
        "projected_minutes": total / 60,
        "peak_memory_gib": _peak(device),
        "seconds": time.perf_counter() - began,
    }


def sampling(device: str, quick: bool) -> dict[str, Any]:
    """Seconds of a guided batch with the recipe's own solver and steps, weights as drawn."""
    config, trainer = _trainer(device, quick)
    model, settings = trainer.model.eval(), config.sample
    count, steps = (4, 2) if quick else (settings.batch, settings.steps)
    labels = torch.arange(count, device=device) % config.model.backbone.num_classes
    seeds = list(range(count))
    shape = tuple(config.model.backbone.sample_shape)
    denoiser = guide(model, settings.guidance)
    seconds = []
    for _ in range(2 if quick else 5):
        noise = SampleNoise(seeds)
        x = initial_noise(model.process, shape, noise).to(device)
        start = _now(device)
        y = sample(
            denoiser, x, Condition(label=labels), solver=settings.solver, grid=settings.grid,
            steps=steps, noise=noise,
        )  # fmt: skip
        seconds.append(_now(device) - start)
    if not y.isfinite().all():
        raise RuntimeError("samples are not finite")
    best = min(seconds[1:])
    return {
        "samples": count,
        "steps": steps,
        "seconds": best,
        "samples_per_second": count / best,
        "peak_memory_gib": _peak(device),
    }


def _now(device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def _peak(device: str) -> float | None:
    return None if device == "cpu" else torch.cuda.max_memory_allocated() / 2**30
