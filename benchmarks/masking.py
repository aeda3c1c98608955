"""What dropping tokens in training saves: ``python benchmarks/masking.py``.

Times whole training steps of the ``fastdit-3d`` recipe (data, forward, backward, optimiser,
averages) under masks of several ratios and for the arms of its claims, in turns, so that a slow
minute of the machine hits all alike. On a CPU the time is that of the process on one thread, not of
the clock on the wall. The milliseconds in the recipe's ``ARMS`` are such numbers: its arms get
steps in inverse proportion.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from coterie.core.config import override
from coterie.core.folder import write_text
from coterie.core.machine import commit, hardware
from coterie.recipes import get_recipe
from coterie.runs.config import RunConfig
from coterie.runs.training import make_trainer

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
    """One arm in training; a call takes two steps and undoes them."""

    def __init__(self, config: RunConfig, device: str) -> None:
        threads = 1 if device == "cpu" else None
        train = config.train.replace(device=device, threads=threads)
        self.trainer = make_trainer(config.replace(train=train))
        self.clock = time.process_time if device == "cpu" else time.perf_counter
        self.seen: list[int] = []
        self.trainer.model.backbone.trunk.register_forward_pre_hook(self._count)

    def _count(self, _: Any, args: tuple[Any, ...]) -> None:
        self.seen.append(args[0].shape[1])

    def __call__(self) -> float:
        """Milliseconds of one step."""
        began = self.clock()
        self.trainer.project(steps=1)  # one step first, then the one that it times
        return 500 * (self.clock() - began)


def measure(preset: str, device: str, rounds: int) -> list[dict[str, Any]]:
    steppers = {name: Stepper(c, device) for name, c in variants(preset).items()}
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
