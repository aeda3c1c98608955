"""``coterie list``: recipes and every kind of part there is."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import click

from coterie.cli.output import say, say_json, table
from coterie.core.errors import ConfigError, unknown

REGISTRIES = {
    "sources": "coterie.data:SOURCES",
    "processes": "coterie.process:PROCESSES",
    "weightings": "coterie.process:WEIGHTINGS",
    "times": "coterie.process:TIMES",
    "preconditions": "coterie.process:PRECONDITIONS",
    "scores": "coterie.experts:SCORES",
    "edits": "coterie.experts:EDITS",
    "selects": "coterie.experts:SELECTS",
    "experts": "coterie.experts:EXPERTS",
    "balances": "coterie.experts:BALANCES",
    "backbones": "coterie.backbones:BACKBONES",
    "models": "coterie.ensembles.model:MODELS",
    "ensembles": "coterie.ensembles:ENSEMBLES",
    "choices": "coterie.ensembles:CHOICES",
    "rewards": "coterie.ensembles:REWARDS",
    "solvers": "coterie.solvers:SOLVERS",
    "grids": "coterie.solvers:GRIDS",
    "objectives": "coterie.train.objectives:OBJECTIVES",
    "schedules": "coterie.train.learning_rate:SCHEDULES",
}
"""Plural -> the registry. The parts of a router are its scores, edits and selects; choices are
those of an ensemble."""


def _kinds(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    return [kind for kind in ("recipes", *REGISTRIES) if kind.startswith(incomplete)]


@click.command("list")
@click.argument("what", required=False, metavar="[KIND]", shell_complete=_kinds)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(what: str | None, as_json: bool) -> None:
    """Names that a configuration or a command may use: `coterie list recipes`, `... solvers`.

    Without KIND: all of them, names only.
    """
    known = ["recipes", *REGISTRIES]
    if what is not None and what not in known:
        raise ConfigError(unknown("kind of part", what, known))
    if what is None:
        found = {kind: [row["name"] for row in rows_of(kind)] for kind in known}
        lines = [{"kind": kind, "names": names} for kind, names in found.items()]
        say_json(found) if as_json else say(table(lines))
        return
    rows = rows_of(what)
    say_json(rows) if as_json else say(table(rows))


def rows_of(kind: str) -> list[dict[str, str]]:
    """Name and one line on each part of a kind, or each recipe."""
    if kind == "recipes":
        from coterie.recipes import get_recipe, list_recipes

        recipes = [get_recipe(name) for name in list_recipes()]
        return [
            {"name": recipe.name, "paper": f"arXiv:{recipe.paper.arxiv}", "summary": recipe.summary}
            for recipe in recipes
        ]
    module, _, name = REGISTRIES[kind].partition(":")
    registry = getattr(importlib.import_module(module), name)
    return [{"name": part, "summary": summary(registry.get(part))} for part in registry.kinds()]


def summary(part: Any) -> str:
    """What a part says of itself: the first line of its own docstring."""
    info = getattr(part, "info", None)
    text = getattr(info, "summary", None) or inspect.cleandoc(part.__dict__.get("__doc__") or "")
    return str(text).partition("\n")[0].rstrip(".")
