"""``coterie env``: what a measurement or a bug report should say about the machine."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import click

from coterie.cli.output import facts, say, say_json

PACKAGES = (
    *("torch", "numpy", "scipy", "pydantic", "safetensors", "pillow", "matplotlib", "click"),
    *("scikit-learn", "datasets", "huggingface_hub", "transformers", "diffusers", "tensorboard"),
)


@click.command("env")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(as_json: bool) -> None:
    """Versions, processor, threads and devices of this machine."""
    found = describe_machine()
    say_json(found) if as_json else say(facts(found))


def describe_machine() -> dict[str, Any]:
    """Hardware and versions; None for an optional package that is not installed."""
    import torch

    from coterie.core.machine import commit, hardware
    from coterie.experts.dispatch.native import library

    return {
        "coterie": version("coterie"),
        "commit": commit() or None,
        **hardware(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "native_operator": library().line(),
        "packages": {name: version(name) for name in PACKAGES},
    }


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
