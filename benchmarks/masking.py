"""What dropping tokens in training saves: ``python benchmarks/masking.py``.

Times whole training steps of the ``fastdit-3d`` recipe (forward, backward, optimiser) under masks
of several ratios and for the arms of its claims, in turns, so that a slow minute of the machine
hits all alike. On a CPU the time is that of the process on one thread, not of the clock on the
wall. The recipe's ``STEP_MS`` are such numbers: its arms get steps in inverse proportion.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from coterie.core.config import override
from coterie.core.folder import write_text
from coterie.core.machine import commit, hardware
from coterie.core.rng import generator
from coterie.recipes import get_recipe
from coterie.train.run import RunConfig, build_model, build_source

RATIOS = (0.5, 0.9, 0.99)


def variants(preset: str) -> dict[str, RunConfig]:
    """The preset without experts under masks of several ratios, and the arms of the recipe."""
    recipe = get_recipe("fastdit-3d")
    base = override(recipe.config(preset), {"model.backbone.trunk.slots": []})
    masks: dict[str, Any] = {"none": {"kind": "none"}}
    masks |= {f"random {r:.0%}": {"kind": "random", "r": r} for r in RATIOS}
    masks |= {"aware 95/99%": {"kind": "fgbg", "rf": 0.95, "rb": 0.99}}
    found = {name: override(base, {"model.backbone.mask": mask}) for name, mask in masks.items()}
    if preset == "tiny":
        found |= {f"arm {name}": config for name, config in recipe.arms().items()}
    return found


class Stepper:
    """One model with its optimiser and a fixed batch; a call is one training step."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self.model = build_model(config).to(device).train()
        self.objective = config.objective.build(self.model).to(device)
        batch = build_source(config).get(range(config.train.batch))
        self.batch = type(batch)(batch.x.to(device), batch.cond.to(device), batch.ids.to(device))
        self.optimiser = torch.optim.AdamW(self.model.parameters(), lr=config.train.lr)
        self.device, self.step, self.seen = device, 0, []  # type: ignore[var-annotated]
        self.model.backbone.trunk.register_forward_pre_hook(self._count)

    def _count(self, _: Any, args: tuple[Any, ...]) -> None:
        self.seen.append(args[0].shape[1])

    def __call__(self) -> float:
        """Milliseconds of one step."""
        clock = time.process_time if self.device.type == "cpu" else time.perf_counter
        began = clock()
        rng = generator(0, "masking", self.step)
        self.objective(self.model, self.batch, rng, 0.5).total.backward()
        self.optimiser.step()
        self.optimiser.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.step += 1
        return 1000 * (clock() - began)


def measure(preset: str, device: str, rounds: int) -> list[dict[str, Any]]:
    steppers = {name: Stepper(c, torch.device(device)) for name, c in variants(preset).items()}
    for stepper in steppers.values():
        stepper()  # first steps allocate
    times: dict[str, list[float]] = {name: [] for name in steppers}
    for _ in range(rounds):
        for name, stepper in steppers.items():
            times[name].append(stepper())
    full = statistics.median(times["none"])
    rows = []
    for name, stepper in steppers.items():
        middle = statistics.median(times[name])
        tokens = statistics.mean(stepper.seen)
        rows.append({"mask": name, "tokens": tokens, "step_ms": middle, "share": middle / full})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="write the rows as JSON to this file")
    args = parser.parse_args()
    if args.device == "cpu":
        torch.set_num_threads(1)
    rows = measure(args.preset, args.device, args.rounds)
    print(f"{'mask':<16}{'tokens seen':>12}{'ms per step':>14}{'of unmasked':>14}")
    for row in rows:
        values = f"{row['tokens']:>12.0f}{row['step_ms']:>14.1f}{row['share']:>14.0%}"
        print(f"{row['mask']:<16}{values}")
    if args.out is not None:
        record = {"preset": args.preset, "commit": commit(), "hardware": hardware(), "rows": rows}
        write_text(args.out, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
