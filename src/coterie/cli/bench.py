"""``coterie bench``: how fast things run here, beside their peers."""

from __future__ import annotations

import click

from coterie.cli.lazy import LazyGroup

BENCHES = {
    "experts": "Every way to dispatch tokens to experts, beside peers and a dense layer.",
    "train": "Training steps beside a dense model and transformers' experts; memory; data.",
    "parallel": "Training steps in several processes, beside torch's own data parallelism.",
    "sampling": "Guided sampling, plain, cached and compiled, beside diffusers.",
    "guides": "What guiding samples costs, and how they follow classes, maps and pixels.",
    "goals": "Goals of speed and what was measured, from results on disk.",
    "cache": "What exact caches save: references kept, routers folded.",
}
"""Name -> one line of help; ``cli/bench_<name>.py`` defines its ``command``."""


@click.group("bench", cls=LazyGroup, verbs=BENCHES, prefix="bench_")
def command() -> None:
    """Time parts of the library beside their peers on this machine.

    Candidates run interleaved and ratios are taken within a round. On one thread the clock is
    process CPU time. `--json` prints every column, `--out FILE` keeps it.
    """
