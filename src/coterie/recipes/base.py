"""What a recipe consists of: a paper, presets, claims, departures from the paper.

A recipe file defines ``PAPER``, ``SUMMARY``, ``tiny()``, ``paper()`` (and more presets if it
likes), ``arms()`` (the configurations its claims compare; ``arm:NAME`` in place of a path is what
arm NAME has learnt), ``CLAIMS`` and ``DEPARTURES``.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Literal

from coterie.core.errors import ConfigError, unknown
from coterie.runs.config import RunConfig


@dataclass(frozen=True)
class Paper:
    """The publication of a recipe's method; ``bibtex`` is printed by ``coterie cite``."""

    title: str
    authors: str
    year: int
    venue: str
    arxiv: str
    key: str
    url: str = ""

    @property
    def bibtex(self) -> str:
        lines = [
            f"@misc{{{self.key},",
            f"  title = {{{self.title}}},",
            f"  author = {{{self.authors}}},",
            f"  year = {{{self.year}}},",
            f"  eprint = {{{self.arxiv}}},",
            "  archivePrefix = {arXiv},",
            f"  note = {{{self.venue}}},",
            "}",
        ]
        return "\n".join(lines)


@dataclass(frozen=True)
class Claim:
    """A sentence of the paper as a measurement: arm ``ours`` against arm ``baseline``.

    ``factor`` scales the baseline first: ``ours < 0.5 * baseline`` is ``factor=0.5``. A claim
    about one arm alone compares with the number ``target``, or with another metric of this arm,
    ``against``. ``equal``: what the arms share; with ``seconds`` their steps are in inverse
    proportion to the measured time of a step; with ``calls`` a sample takes as many calls of
    networks: solver steps in inverse proportion to how many are asked at each.
    """

    claim: str
    metric: str
    ours: str
    baseline: str = ""
    target: float | None = None
    against: str = ""
    better: Literal["lower", "higher"] = "lower"
    factor: float = 1.0
    tolerance: float = 0.0  # how far behind still counts, relative ("no worse than")
    equal: Literal["steps", "seconds", "calls"] = "steps"


@dataclass(frozen=True)
class Recipe:
    """One published system: its citation, presets, claims and departures."""

    name: str
    paper: Paper
    summary: str
    claims: tuple[Claim, ...]
    departures: tuple[str, ...]
    _presets: Mapping[str, Callable[[], RunConfig]] = field(repr=False)
    arms: Callable[[], dict[str, RunConfig]] = field(repr=False)

    def presets(self) -> list[str]:
        """Names of the presets."""
        return sorted(self._presets)

    def config(self, preset: str = "tiny") -> RunConfig:
        """The configuration of a preset; ConfigError for an unknown one."""
        if preset not in self._presets:
            raise ConfigError(unknown("preset", preset, self._presets))
        return self._presets[preset]()


NO_RECIPES = ("base", "common", "tables", "verify")  # modules of this package that are no recipe
PRESETS = ("tiny", "paper", "demo", "gpu", "text")


def list_recipes() -> list[str]:
    """Names of all recipes, as used on the command line."""
    modules = [item.name for item in pkgutil.iter_modules([str(Path(__file__).parent)])]
    return sorted(name.replace("_", "-") for name in modules if name not in NO_RECIPES)


def get_recipe(name: str) -> Recipe:
    """The recipe of that name."""
    if name not in list_recipes():
        raise ConfigError(unknown("recipe", name, list_recipes()))
    module = importlib.import_module(f"coterie.recipes.{name.replace('-', '_')}")
    return _collect(name, module)


def _collect(name: str, module: ModuleType) -> Recipe:
    presets = {key: getattr(module, key) for key in PRESETS if hasattr(module, key)}
    return Recipe(
        name=name,
        paper=module.PAPER,
        summary=module.SUMMARY,
        claims=tuple(module.CLAIMS),
        departures=tuple(module.DEPARTURES),
        _presets=presets,
        arms=module.arms,
    )
