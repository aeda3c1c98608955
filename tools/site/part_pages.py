"""Pages of every registered part: what it does, its fields, what it does not go with, its users."""

from __future__ import annotations

import importlib
import inspect
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_args

import field_words
from coterie.cli.list import REGISTRIES, summary
from coterie.core.config import Config
from coterie.core.registry import Part, Registry
from coterie.core.sections import section
from coterie.recipes import get_recipe, list_recipes
from coterie.runs.config import RunConfig

ROOT = Path(__file__).parents[2]
COMBINATIONS = ROOT / "docs" / "explanation" / "combinations.md"
TRIED = ("scores", "edits", "selects", "experts", "balances", "backbones", "models")
"""Kinds of parts whose combinations are tried, and shown in the table of combinations.md."""
TITLES = {
    "sources": ("Data sources", "where samples come from"),
    "processes": ("Noising processes", "how a sample is mixed with noise as time goes from 0 to 1"),
    "weightings": ("Loss weightings", "how much each noise level counts in the loss"),
    "times": ("Training times", "which noise levels are drawn in training"),
    "preconditions": ("Preconditioning", "how a network's input and answer are scaled"),
    "scores": ("Router scores", "how a router computes one logit per token and expert"),
    "edits": ("Router edits", "what changes the logits of a router before it selects"),
    "selects": ("Router selections", "which experts a router takes, given their scores"),
    "experts": ("Experts", "the networks among which a router chooses"),
    "balances": ("Balance losses", "what keeps the load of the experts even, or says how uneven"),
    "backbones": ("Backbones", "the networks that hold expert layers"),
    "models": ("Models", "what a run trains or samples from"),
    "ensembles": ("Ensembles", "how several denoisers answer as one"),
    "choices": ("Choices of an ensemble", "which members answer, given their weights"),
    "rewards": ("Rewards", "what samples of a composition are tilted towards"),
    "solvers": ("Solvers", "how a sample is computed from noise"),
    "grids": ("Time grids", "at which times a solver calls the network"),
    "objectives": ("Objectives", "what a model is trained to do"),
    "schedules": ("Learning-rate schedules", "how the learning rate changes in training"),
}
"""Registry -> the title of its page and what its parts say."""
ROLES = re.compile(r":(?:class|func|meth|mod|data):`~?([\w.]+)`")


def words(text: str) -> str:
    """A docstring as Markdown: references become code."""
    return ROLES.sub(r"`\1`", inspect.cleandoc(text)).replace("``", "`").strip()


def registry(plural: str) -> Registry:
    module, _, name = REGISTRIES[plural].partition(":")
    found: Registry = getattr(importlib.import_module(module), name)
    return found


def links() -> dict[str, str]:
    """Name of a registry -> its page, beside the others."""
    return {registry(plural).name: f"{plural}.md" for plural in REGISTRIES}


def described(cls: type[Config]) -> str:
    """What a class says of itself; a data source, what its card says."""
    own = words(cls.__dict__.get("__doc__") or "")
    return own or summary(cls)


def held(config: Any) -> Iterator[Part]:
    """Every part in a configuration, at any depth."""
    if isinstance(config, Part):
        yield config
    if isinstance(config, Config):
        for name in type(config).model_fields:
            yield from held(getattr(config, name))
    elif isinstance(config, tuple | list):
        for item in config:
            yield from held(item)
    elif isinstance(config, dict):
        for item in config.values():
            yield from held(item)


@cache
def users() -> dict[type[Config], list[str]]:
    """Class of a part -> the recipes whose default configuration holds it."""
    found: dict[type[Config], list[str]] = defaultdict(list)
    for name in list_recipes():
        for cls in dict.fromkeys(type(part) for part in held(get_recipe(name).config())):
            found[cls].append(name)
    return found


def inner(annotation: Any) -> Iterator[Any]:
    """An annotation and everything inside it, with the metadata of what is annotated."""
    yield annotation
    for one in get_args(annotation):
        yield from inner(one)


@cache
def configurations() -> tuple[type[Config], ...]:
    """Configurations that are no parts, as a run's configuration reaches them, the root first."""
    waiting: list[type[Config]] = [RunConfig]
    waiting += [registry(p).get(kind) for p in REGISTRIES for kind in registry(p).kinds()]
    found: dict[type[Config], None] = {}
    seen: set[type[Config]] = set()
    while waiting:
        cls = waiting.pop(0)
        if cls in seen:
            continue
        seen.add(cls)
        if not issubclass(cls, Part):
            found[cls] = None
        for field in cls.model_fields.values():
            for one in inner(field.annotation):
                if isinstance(one, type) and issubclass(one, Config) and one is not Part:
                    waiting.append(one)
    return tuple(found)


@cache
def homes() -> dict[str, list[str]]:
    """Name of a registry -> the fields that take its parts, as ``Class.field``."""
    found: dict[str, list[str]] = defaultdict(list)
    parts = [registry(p).get(kind) for p in REGISTRIES for kind in registry(p).kinds()]
    for cls in dict.fromkeys([*configurations(), *parts]):
        for name, field in cls.model_fields.items():
            for metadata in [field.metadata, *map(get_args, inner(field.annotation))]:
                taken = field_words.registry_of(metadata)
                if taken is not None:
                    found[taken.name].append(f"{cls.__name__}.{name}")
                    break
    return found


def apart(kinds: list[str]) -> str:
    """The rows of the table of combinations that name one of these kinds."""
    lines = section(COMBINATIONS.read_text(encoding="utf-8"), "combinations").splitlines()
    named = [line for line in lines[2:] if set(re.findall(r"`([^`]+)`", line)) & set(kinds)]
    return "\n".join([*lines[:2], *named]) if named else ""


def page(plural: str) -> str:
    """The page of one registry."""
    parts = registry(plural)
    title, purpose = TITLES[plural]
    places = ", ".join(f"`{place}`" for place in homes().get(parts.name, ()))
    lead = f"These parts say {purpose}. `coterie list {plural}` prints their names."
    if places:
        lead += f" One is chosen in {places}."
    if parts.group:
        lead += f" Other packages add kinds through the entry point `{parts.group}`."
    said = [f"# {title}", lead]
    for kind in parts.kinds():
        cls = parts.get(kind)
        said += [f"## `{kind}` {{ #{kind} }}", described(cls), field_words.table(cls, links())]
        source = f"Class `{cls.__module__}.{cls.__name__}`."
        if users().get(cls):
            source += f" Used by the recipes {', '.join(users()[cls])}."
        said.append(source)
    rows = apart(parts.kinds()) if plural in TRIED else ""
    if rows:
        said += [
            "## What does not go together",
            "Every other pair goes together. The table is made by trying all of them "
            "([with what it means](../../explanation/combinations.md)).",
            rows,
        ]
    return "\n\n".join(said) + "\n"


def configuration_page() -> str:
    """The page of the configurations that hold the parts."""
    said = [
        "# The configuration of a run",
        "A run is one tree of values. Any path in it is a flag: "
        "`coterie train dit-moe --train.steps=300`. These are the objects of the tree that are "
        "not chosen by a `kind`; the first is the root.",
    ]
    for cls in configurations():
        said += [f"## `{cls.__name__}` {{ #{cls.__name__.lower()} }}", described(cls)]
        said.append(field_words.table(cls, links()))
    return "\n\n".join(said) + "\n"


def pages() -> dict[str, str]:
    """Path below ``docs`` -> text."""
    made = {f"reference/parts/{plural}.md": page(plural) for plural in REGISTRIES}
    return {"reference/parts/configuration.md": configuration_page(), **made}
