"""Memory of an ensemble while it samples: ``python benchmarks/ensemble_memory.py``.

Four networks of equal size share the noise levels. Each way of keeping them (all resident; one,
read when needed; one, and the next read meanwhile) runs in a process of its own, which reports the
most memory it had beyond what sampling from a tiny ensemble takes, in sizes of one network, and a
hash of the samples: all are equal.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from coterie.backbones import DiTConfig, TrunkConfig
from coterie.core.folder import write_text
from coterie.core.machine import commit, hardware
from coterie.core.prediction import Condition
from coterie.core.rng import SampleNoise
from coterie.denoiser import DenoiserConfig
from coterie.ensembles import Ensemble, LoadedMembers, NoiseRangesConfig
from coterie.hub import load_ensemble, load_manifest, save_ensemble
from coterie.solvers import GRIDS, SOLVERS, initial_noise, sample

MIB = 2**20
WAYS: dict[str, dict[str, Any]] = {
    "all resident": {"resident": None},
    "one": {"resident": 1, "prefetch": False},
    "one, next prefetched": {"resident": 1, "prefetch": True},
}


def rss() -> int:
    """Bytes of this process in memory now."""
    fields = Path("/proc/self/statm").read_text(encoding="utf-8").split()
    return int(fields[1]) * 4096


class Peak:
    """The most memory while a block runs, looked at every two milliseconds."""

    def __enter__(self) -> Peak:
        self.most, self._done = rss(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self.most = max(self.most, rss())

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def model(width: int) -> DenoiserConfig:
    trunk = TrunkConfig(width=width, depth=4, heads=8)
    return DenoiserConfig(backbone=DiTConfig(image_size=8, patch=4, num_classes=0, trunk=trunk))


def make(folder: Path, width: int) -> None:
    torch.manual_seed(0)
    networks = [model(width).build() for _ in range(4)]
    with torch.no_grad():
        for network in networks:
            for value in network.parameters():
                value.add_(0.02 * torch.randn_like(value))
    save_ensemble(NoiseRangesConfig(boundaries=(0.75, 0.5, 0.25)).build(networks), folder)


def draw(folder: Path, way: str, settings: Any, steps: int) -> tuple[Ensemble, torch.Tensor]:
    made = load_ensemble(folder, **WAYS[way])
    x = initial_noise(made.process, (1, 8, 8), SampleNoise(range(4)))
    return made, sample(made, x, Condition(), steps=steps, **settings)


def run(folder: Path, way: str, steps: int, answer: Any) -> None:
    """One way in a process of its own."""
    torch.set_num_threads(1)
    size = max(e["bytes"] for f, e in load_manifest(folder).files.items() if "members" in f)
    settings: dict[str, Any] = {"solver": SOLVERS.parse("euler"), "grid": GRIDS.parse("uniform")}
    tiny = folder.with_name(f"tiny-{way}")
    make(tiny, 16)
    draw(tiny, way, settings, steps=2)  # what a process needs once, whatever the size
    before = rss()
    began = time.perf_counter()
    with Peak() as peak:
        made, out = draw(folder, way, settings, steps)
    members = made.members
    counted = members.peak_bytes if isinstance(members, LoadedMembers) else 4 * size
    answer.put(
        {
            "way": way,
            "peak_of_one_network": round((peak.most - before) / size, 2),
            "counted_of_one_network": round(counted / size, 2),
            "seconds": round(time.perf_counter() - began, 2),
            "samples": hashlib.sha256(out.numpy().tobytes()).hexdigest()[:16],
            "network_mib": round(size / MIB, 1),
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--out", type=Path, help="Also write JSON here.")
    given = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    rows = []
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "ranges"
        make(folder, given.width)
        for way in WAYS:
            answer = spawn.Queue()
            process = spawn.Process(target=run, args=(folder, way, given.steps, answer))
            process.start()
            rows.append(answer.get())
            process.join()
            print(json.dumps(rows[-1]))
    assert len({row["samples"] for row in rows}) == 1, "samples differ"
    if given.out:
        write_text(
            given.out,
            json.dumps({"rows": rows, "commit": commit(), "hardware": hardware()}, indent=1) + "\n",
        )


if __name__ == "__main__":
    main()
