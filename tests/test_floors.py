"""The house: a module imports only from lower floors or its own folder, and never in a circle."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from repository_tools import tool

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "coterie"


structure = tool("structure")

FLOORS: tuple[tuple[str, ...], ...] = (
    ("core",),
    ("process", "nn", "data"),
    ("experts", "adapters", "encoders"),
    ("backbones", "denoiser"),
    ("solvers", "guides", "ensembles", "cache", "compress", "convert", "inspect", "metrics"),
    ("train", "hub", "interop"),
    ("runs",),
    ("recipes",),
    ("bench",),
    ("serve", "cli"),
)
FLOOR = {area: floor for floor, areas in enumerate(FLOORS) for area in areas}

# The one neighbour that may be named, one way only: a denoiser is a backbone with its process.
NEIGHBOURS = {("denoiser", "backbones")}

# Floors inside a folder, lowest first: what is computed knows nothing of how it is drawn, pictures
# nothing of the page.
INSIDE = {"inspect": ("statistics", "plots", "page")}

# What anyone may take from the package itself; everything there is only a shorter name.
ROOT_NAMES = {"__version__"}


def area_of(path: Path, source: Path) -> str:
    parts = path.relative_to(source).parts
    return parts[0].removesuffix(".py")


def complaint(area: str, target: str) -> str | None:
    """Why ``area`` may not import ``target`` (an area, or a name of the package itself)."""
    if target in ROOT_NAMES or target == area:
        return None
    if target not in FLOOR:
        return f"imports {target!r} from the package itself; name the module that defines it"
    if target == "recipes" and area not in ("cli", "bench"):
        return "imports recipes; only cli and bench may"
    if FLOOR[target] > FLOOR[area]:
        return f"imports {target} (floor {FLOOR[target]}) from floor {FLOOR[area]}: upward"
    if FLOOR[target] == FLOOR[area] and (area, target) not in NEIGHBOURS:
        return f"imports its sibling {target} (floor {FLOOR[target]})"
    return None


def complaint_inside(area: str, folder: str, target: str) -> str | None:
    """Why a file of ``area/folder`` may not import ``area/target``."""
    floors = INSIDE.get(area, ())
    if folder in floors and target in floors and floors.index(target) > floors.index(folder):
        return f"imports {area}/{target} from {area}/{folder}: upward"
    return None


def violations(source: Path) -> list[str]:
    """One line per arrow of the tree under ``source`` that the floors forbid."""
    found = []
    for path in sorted(source.rglob("*.py")):
        area = area_of(path, source)
        where = path.relative_to(source).as_posix()
        if area == "__init__":
            continue
        if area not in FLOOR:
            found.append(f"{where}: {area!r} stands on no floor")
            continue
        package = ".".join(["coterie", *path.relative_to(source).parent.parts])
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
            for name in structure.names_imported(node, package):
                parts = name.split(".")
                if parts[0] != "coterie":
                    continue
                reason = complaint(area, parts[1] if len(parts) > 1 else "the whole package")
                if reason is None and parts[1] == area and len(parts) > 2:
                    folder = path.relative_to(source).parts[1]
                    reason = complaint_inside(area, folder, parts[2])
                if reason is not None:
                    found.append(f"{where}:{getattr(node, 'lineno', 0)}: {reason}")
    return found


def test_no_import_runs_up_or_sideways() -> None:
    assert violations(SOURCE) == []


def test_the_tree_is_there() -> None:
    assert (SOURCE / "core" / "routing.py").is_file()


def test_no_two_files_import_each_other_in_a_circle() -> None:
    assert structure.circles(structure.imports(structure.sources_in(SOURCE))) == []


@pytest.mark.parametrize(
    ("a", "b", "circle"),
    [
        ("from coterie.core.b import x", "from coterie.core.a import y", True),
        ("def f():\n    from coterie.core import b", "from coterie.core.a import y", True),
        ("from coterie.core.b import x", "def f():\n    from .a import y", True),
        (
            "import coterie.core.b",
            "import importlib\nimportlib.import_module('coterie.core.a')",
            True,
        ),
        (
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from coterie.core.b import x",
            "from coterie.core.a import y",
            False,
        ),
        ("from coterie.core.b import x", "import os", False),
    ],
)
def test_a_circle_is_found_wherever_the_import_stands(a: str, b: str, circle: bool) -> None:
    sources = {"coterie.core": "", "coterie.core.a": a, "coterie.core.b": b}
    arrows = structure.imports(sources)
    assert structure.circles(arrows) == ([["coterie.core.a", "coterie.core.b"]] if circle else [])
    assert max(structure.levels(arrows).values()) == (1 if circle else 2)


def test_a_package_that_hands_on_names_is_part_of_a_circle() -> None:
    sources = {
        "coterie.core": "from coterie.core.a import y",
        "coterie.core.a": "import coterie.core",
    }
    arrows = structure.imports(sources)
    assert structure.circles(arrows) == [["coterie.core", "coterie.core.a"]]
    measured = structure.measured(sources)
    assert measured["folders"]["core/"] == {"files": 2, "lines": 0, "levels": 1}
    assert "coterie.core <-> coterie.core.a" in structure.table({"now": measured})


@pytest.mark.parametrize(
    ("where", "code", "reason"),
    [
        ("core/a.py", "from coterie.process import Process", "upward"),
        ("core/a.py", "def f():\n    import coterie.train.loop", "upward"),
        ("core/a.py", "import importlib\nimportlib.import_module('coterie.nn.norm')", "upward"),
        ("nn/a.py", "from coterie.process.base import Process", "sibling process"),
        ("nn/a.py", "from ..data import order", "sibling data"),
        ("nn/sub/a.py", "from ...data.order import order", "sibling data"),
        ("solvers/a.py", "from coterie import ensembles", "sibling ensembles"),
        ("backbones/a.py", "from coterie.denoiser import Denoiser", "sibling denoiser"),
        ("hub.py", "from coterie.cli import main", "upward"),
        ("hub.py", "from coterie.train.loop import Trainer", "sibling train"),
        ("train/a.py", "from coterie.runs.config import RunConfig", "upward"),
        ("serve/a.py", "from coterie.recipes import get_recipe", "only cli and bench may"),
        ("train/a.py", "from coterie import RunConfig", "from the package itself"),
        ("inspect/statistics/a.py", "from coterie.inspect.page import html", "upward"),
        ("inspect/plots/a.py", "from coterie.inspect.page.html import x", "upward"),
        ("extra/a.py", "import os", "stands on no floor"),
        (
            "core/a.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from coterie.hub import x",
            "upward",
        ),
    ],
)
def test_a_forbidden_arrow_is_found(tmp_path: Path, where: str, code: str, reason: str) -> None:
    path = tmp_path / where
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(code, encoding="utf-8")
    (found,) = violations(tmp_path)
    assert found.startswith(where)
    assert reason in found


@pytest.mark.parametrize(
    ("where", "code"),
    [
        ("nn/a.py", "from coterie.core.errors import describe\nfrom .norm import x"),
        ("nn/a.py", "from coterie import core, __version__"),
        ("denoiser.py", "from coterie.backbones.dit import DiT"),
        ("cli/train.py", "def f():\n    from coterie.recipes import get_recipe"),
        ("__init__.py", "from coterie.recipes import get_recipe"),
        ("inspect/page/a.py", "from coterie.inspect.plots.style import x"),
        ("inspect/a.py", "from coterie.inspect.page.html import x"),
        ("train/a.py", "import torch, json\nfrom coterie.solvers import sample"),
    ],
)
def test_an_allowed_arrow_is_not(tmp_path: Path, where: str, code: str) -> None:
    path = tmp_path / where
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(code, encoding="utf-8")
    assert violations(tmp_path) == []
