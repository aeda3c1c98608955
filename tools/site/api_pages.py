"""Pages of the public Python names, one per package, filled by mkdocstrings at build."""

from __future__ import annotations

import importlib
import inspect
import re
from functools import cache

import coterie
from coterie.cli.list import REGISTRIES
from part_pages import registry, words

PACKAGES = (
    "experts",
    "backbones",
    "process",
    "solvers",
    "ensembles",
    "train",
    "data",
    "recipes",
    "adapters",
    "cache",
    "convert",
    "guides",
    "encoders",
    "metrics",
    "inspect",
    "hub",
)
"""Packages whose ``__all__`` says what is public."""


@cache
def exported(package: str) -> tuple[str, ...]:
    return tuple(importlib.import_module(f"coterie.{package}").__all__)


def home(name: str) -> str:
    """The module in which a public name of ``coterie`` is documented."""
    return f"coterie.{coterie._HOME[name]}"


def block(identifier: str) -> str:
    return f"::: {identifier}"


def package_page(package: str) -> str:
    """The public names of a package. Its registries are those of the pages on parts."""
    module = importlib.import_module(f"coterie.{package}")
    here = {name: getattr(module, name) for name in exported(package)}
    named = {id(registry(plural)): plural for plural in REGISTRIES}
    parts = [
        f"[`{name}`](../parts/{named[id(value)]}.md)"
        for name, value in here.items()
        if id(value) in named
    ]
    lead = re.sub(r"^Floor \d: (\w)", lambda start: start[1].upper(), words(module.__doc__ or ""))
    said = [f"# coterie.{package}", lead]
    if parts:
        said.append(f"Registries, each with a page of its own: {', '.join(parts)}.")
    shown = [
        name
        for name, value in here.items()
        if not inspect.ismodule(value) and id(value) not in named
    ]
    return "\n\n".join([*said, *(block(f"coterie.{package}.{name}") for name in shown)]) + "\n"


def top_page() -> str:
    """What ``import coterie`` offers. Names of a package that has a page are documented there."""
    rows, own = [], []
    for name in sorted(coterie._HOME):
        package = coterie._HOME[name]
        if package in PACKAGES:
            rows.append(f"| [`{name}`]({package}.md#coterie.{package}.{name}) | `{home(name)}` |")
        else:
            rows.append(f"| [`{name}`](#{home(name)}.{name}) | `{home(name)}` |")
            own.append(block(f"{home(name)}.{name}"))
    head = [
        "# coterie",
        "These names can be imported from `coterie` itself. Nothing is loaded before it is used.",
        "\n".join(["| name | defined in |", "| --- | --- |", *rows]),
    ]
    return "\n\n".join([*head, *own]) + "\n"


def pages() -> dict[str, str]:
    """Path below ``docs`` -> text."""
    made = {f"reference/api/{package}.md": package_page(package) for package in PACKAGES}
    return {"reference/api/coterie.md": top_page(), **made}
