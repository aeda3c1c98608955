"""All that wants a GPU, in one command of a few minutes: ``python benchmarks/gpu.py``.

Three parts, each resumable and each writing ``results/gpu/<part>.json``: do the dispatch backends
agree with float64 on this device; how fast are they beside a dense layer of equal active cost; how
fast does ``dit-moe --preset gpu`` train. ``--device cpu --quick`` rehearses everything in seconds.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from coterie.bench.experts import Case, make_routing, run_benchmark
from coterie.core.folder import write_text
from coterie.core.machine import commit, hardware
from coterie.experts import ExpertPool, dispatch, plan
from coterie.experts.kinds import SwiGLU
from coterie.recipes import get_recipe
from coterie.train.run import make_trainer

TOKENS = (8_192, 32_768, 131_072)


def correctness(device: str, quick: bool) -> list[dict[str, Any]]:
    """Largest relative error of each backend and type against the plain loop in float64."""
    case = Case("check", 64 if quick else 2048, 64, 128, 8, 2)
    routing = make_routing(case, device)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        pool = ExpertPool(SwiGLU(hidden=case.hidden), case.num_experts, case.width)
        pool = pool.to(device, dtype)
        x = torch.randn(case.tokens, case.width, generator=torch.Generator().manual_seed(2))
        x = x.to(device, dtype)
        exact_pool = ExpertPool(pool.kind, pool.num_experts, pool.width).to(device, torch.float64)
        exact_pool.load_state_dict(pool.state_dict())
        with torch.no_grad():
            exact = dispatch(x.double(), plan(routing), exact_pool, "loop")
            for backend in ("loop", "sorted", "grouped", "auto"):
                y = dispatch(x, plan(routing), pool, backend).double()
                error = float((y - exact).abs().max() / exact.abs().max())
                rows.append({"backend": backend, "dtype": str(dtype), "relative_error": error})
    return rows


def speed(device: str, quick: bool) -> list[dict[str, Any]]:
    """Rows of the expert benchmark for growing numbers of tokens."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    rows = []
    for tokens in (64,) if quick else TOKENS:
        cases = ("small",) if quick else ("S2", "B2", "fine64", "small")
        made = run_benchmark(cases, rounds=5, device=device, dtype=dtype, tokens=tokens)
        rows += [{"tokens": tokens, "dtype": str(dtype), **row} for row in made]
    return rows


def training(device: str, quick: bool) -> dict[str, Any]:
    """Seconds per step, samples per second and peak memory of ``dit-moe --preset gpu``."""
    config = get_recipe("dit-moe").config("tiny" if quick else "gpu")
    config = config.replace(train=config.train.replace(device=device))
    trainer = make_trainer(config)
    steps = 2 if quick else 50
    began = time.perf_counter()
    total = trainer.project(steps=steps)
    per_step = total / config.train.steps
    peak = torch.cuda.max_memory_allocated() / 2**30 if device != "cpu" else None
    return {
        "steps_timed": steps,
        "seconds_per_step": per_step,
        "samples_per_second": config.train.batch / per_step,
        "projected_minutes": total / 60,
        "peak_memory_gib": peak,
        "seconds": time.perf_counter() - began,
    }


PARTS: dict[str, Callable[[str, bool], Any]] = {
    "correctness": correctness,
    "speed": speed,
    "training": training,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: a rehearsal")
    parser.add_argument("--out", type=Path, default=Path("results/gpu"))
    args = parser.parse_args()
    if args.device != "cpu" and not torch.cuda.is_available():
        raise SystemExit("error: no CUDA device here; --device cpu --quick rehearses")
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.parts or PARTS:
        target = args.out / f"{name}.json"
        if target.is_file() and json.loads(target.read_text())["commit"] == commit():
            print(f"{name}: done at this commit")
            continue
        result = PARTS[name](args.device, args.quick)
        record = {"part": name, "commit": commit(), "hardware": hardware(), "result": result}
        write_text(target, json.dumps(record, indent=1) + "\n")
        print(f"{name}: {target}")


if __name__ == "__main__":
    main()
