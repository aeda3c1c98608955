"""All that wants a GPU, in one command: ``python benchmarks/gpu.py``; see docs/how-to/gpu.md.

Parts: do the dispatch backends agree with float64 on this device (``correctness``); how fast and
how large are they beside the expert layers of others, a part for each size (``speed-...``); how
fast does ``dit-moe --preset gpu`` train (``training``) and sample (``sampling``); and, only where
asked for, which tiles are fastest (``tune-...``). Each part writes ``<out>/<part>.json`` as soon
as it is done, the same command again goes on with those that are left, and ``summary.md`` and
``summary.json`` hold what there is. A part that fails is named, the others still run.
``--device cpu --quick`` rehearses everything in seconds.
"""

from __future__ import annotations

import argparse
import json
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from coterie.bench.gpu_clock import Clock
from coterie.bench.gpu_parts import correctness, sampling, training
from coterie.bench.gpu_speed import QUICK, SIZES, speed
from coterie.bench.gpu_summary import markdown, verdict
from coterie.bench.gpu_tune import tune
from coterie.bench.timing import versions
from coterie.core.folder import write_text
from coterie.core.machine import commit, hardware

TUNING = "tune-"  # only where it is asked for: it takes minutes, and changes no result
PACKAGES = ("torch", "triton", "transformers", "liger-kernel", "sonic-moe", "scattermoe")


def parts(device: str, quick: bool) -> dict[str, Callable[[], Any]]:
    """What there is to do, in order."""
    sizes = {"quick": QUICK} if quick else SIZES
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    clock = Clock(device, repeats=3, warmups=1) if quick else Clock(device)
    made: dict[str, Callable[[], Any]] = {"correctness": partial(correctness, device, quick)}
    for name, case in sizes.items():
        made[f"speed-{name}"] = partial(speed, case, device, dtype, clock)
    made["training"] = partial(training, device, quick)
    made["sampling"] = partial(sampling, device, quick)
    for name, case in sizes.items():
        made[f"{TUNING}{name}"] = partial(tune, case, device, dtype, clock)
    return made


def done(target: Path) -> Any:
    """The result of a part that was finished at this commit; else None."""
    if not target.is_file():
        return None
    record = json.loads(target.read_text())
    return record["result"] if record["commit"] == commit() else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", help="names, or beginnings of names [all]")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: a rehearsal")
    parser.add_argument("--minutes", type=float, help="begin no part after this time")
    parser.add_argument("--out", type=Path, default=Path("results/gpu"))
    args = parser.parse_args()
    if args.device != "cpu" and not torch.cuda.is_available():
        raise SystemExit("error: no CUDA device here; --device cpu --quick rehearses")
    known = parts(args.device, args.quick)
    wanted = [n for n in known if not n.startswith(TUNING)]
    if args.parts:
        wanted = [n for n in known if n.startswith(tuple(args.parts))]
    if not wanted:
        raise SystemExit(f"error: parts: {args.parts} begins none of {', '.join(known)}")
    args.out.mkdir(parents=True, exist_ok=True)
    stamp = {"commit": commit(), "hardware": hardware(), "versions": versions(*PACKAGES)}
    if args.device != "cpu":
        stamp["device"] = torch.cuda.get_device_name()
    began, failed = time.perf_counter(), []
    for name in wanted:
        target = args.out / f"{name}.json"
        if done(target) is not None:
            print(f"{name}: done at this commit")
            continue
        if args.minutes is not None and time.perf_counter() - began > 60 * args.minutes:
            print(f"{name}: left for the next call")
            continue
        start = time.perf_counter()
        try:
            result = known[name]()
        except Exception:
            failed.append(name)
            print(f"{name}: FAILED\n{traceback.format_exc()}", flush=True)
            continue
        write_text(target, json.dumps({"part": name, **stamp, "result": result}, indent=1) + "\n")
        print(f"{name}: {time.perf_counter() - start:.0f} s, {target}", flush=True)
    summarise(args.out, [name for name in known if not name.startswith(TUNING)], stamp)
    if failed:
        raise SystemExit(f"error: failed: {', '.join(failed)}")


def summarise(out: Path, names: list[str], stamp: dict[str, Any]) -> None:
    """Write the table and the verdict of every part that is there at this commit."""
    found = {name: done(out / f"{name}.json") for name in names}
    found = {name: result for name, result in found.items() if result is not None}
    goals = verdict(found)
    write_text(out / "summary.md", markdown(found, stamp))
    write_text(out / "summary.json", json.dumps({**stamp, "goals": goals}, indent=1) + "\n")
    for goal in goals:
        state = {True: "met", False: "NOT met", None: "nothing to compare"}[goal["met"]]
        print(f"{goal['part']}: {goal['what']}: {goal['value']} (<= {goal['limit']}) {state}")
    print(f"summary: {out / 'summary.md'}")


if __name__ == "__main__":
    main()
