"""What a shell offers after the Tab key, found without importing torch.

Recipes, presets and data sets are read from the text of the package's files, runs from the folders
below the present one. The paths of a recipe's configuration need the recipe itself: the first time
it is imported, after that its paths are in the user's cache, until a file of the package changes.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from coterie.core.errors import CoterieError
from coterie.core.json_reader import read_json

RECIPE = re.compile(r"^PAPER = ", re.MULTILINE)
PRESET = re.compile(r"^def (tiny|paper|demo|gpu|text)\(", re.MULTILINE)
SOURCE = re.compile(r'^@SOURCES\.register\nclass .*?^    kind: Literal\["([^"]+)"', re.M | re.S)
DOWNLOAD = re.compile(r'\bDownload\(\s*(?:kind=)?"([\w-]+)"')
DEEPEST = 4
"""Levels of folders below the present one in which runs are looked for."""
MOST_FOLDERS = 5_000


def package() -> Path:
    spec = find_spec("coterie")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def recipe_texts() -> dict[str, str]:
    """Name of each recipe -> the text of its file."""
    texts = {path.stem: path.read_text("utf-8") for path in (package() / "recipes").glob("*.py")}
    return {
        name.replace("_", "-"): text for name, text in sorted(texts.items()) if RECIPE.search(text)
    }


def preset_names(recipe: str) -> list[str]:
    """Presets of a recipe; of all recipes where there is none of this name."""
    texts = recipe_texts()
    text = texts.get(recipe, "\n".join(texts.values()))
    return sorted(set(PRESET.findall(text)))


def source_names() -> list[str]:
    """Everything that `coterie data get` takes."""
    found: set[str] = set()
    for path in package().rglob("*.py"):
        text = path.read_text("utf-8")
        if "@SOURCES.register" in text:
            found.update(SOURCE.findall(text))
        if "Download(" in text:
            found.update(DOWNLOAD.findall(text))
    return sorted(found)


def run_folders(start: Path) -> Iterator[str]:
    """Folders with a ``config.json`` at most DEEPEST levels below ``start``, as paths from it."""
    waiting, seen = [(start, 0)], 0
    while waiting and seen < MOST_FOLDERS:
        folder, depth = waiting.pop()
        seen += 1
        if depth and (folder / "config.json").is_file():
            yield str(folder.relative_to(start))
            continue  # what lies inside belongs to the run
        if depth < DEEPEST:
            try:
                below = [one for one in os.scandir(folder) if one.is_dir(follow_symlinks=False)]
            except OSError:
                continue
            waiting += [
                (Path(one.path), depth + 1) for one in below if not one.name.startswith((".", "__"))
            ]


def config_paths(recipe_or_run: str, preset: str) -> list[str]:
    """Paths of a configuration: of a run from its file, of a recipe from the cache."""
    own = Path(recipe_or_run) / "config.json"
    if own.is_file():
        return sorted(_paths(_read(own)))
    if recipe_or_run not in recipe_texts():
        return []
    from coterie.core.user_cache import cache_root

    kept = cache_root() / "completion" / f"{recipe_or_run}-{preset}.json"
    newest = max(path.stat().st_mtime_ns for path in package().rglob("*.py"))
    if kept.is_file() and kept.stat().st_mtime_ns > newest:
        before = _read(kept)
        if isinstance(before, list):
            return before
    found = sorted(_paths(_of_recipe(recipe_or_run, preset)))
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(found), encoding="utf-8")
    except OSError:
        pass  # without a cache it only takes longer
    return found


def _of_recipe(recipe: str, preset: str) -> Any:
    from coterie.recipes import get_recipe

    try:
        return get_recipe(recipe).config(preset).model_dump(mode="json")
    except CoterieError:  # a preset that this recipe does not have
        return {}


def _read(path: Path) -> Any:
    try:
        return read_json(path)
    except CoterieError:
        return None


def _paths(value: Any, above: str = "") -> Iterator[str]:
    """Dotted paths to what is no object and no list of objects."""
    inner: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, dict):
        inner = value.items()
    elif isinstance(value, list) and any(isinstance(one, dict) for one in value):
        inner = enumerate(value)
    else:
        yield above
    for key, one in inner:
        yield from _paths(one, f"{above}.{key}" if above else str(key))


def _starting(names: Iterable[str], incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def recipes(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return _starting(recipe_texts(), incomplete)


def presets(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return _starting(preset_names(first_word(ctx)), incomplete)


def sources(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return _starting(source_names(), incomplete)


def runs(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Runs below the present folder; where none begins like this, folders by the shell."""
    found = _starting(sorted(run_folders(Path())), incomplete)
    return found or [CompletionItem(incomplete, type="dir")]


def recipes_and_runs(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    return recipes(ctx, param, incomplete) + runs(ctx, param, incomplete)


def first_word(ctx: click.Context) -> str:
    """The recipe or run of an unfinished command line; "" before it is given."""
    words = ctx.params.get("arguments") or ()
    return next((word for word in words if not word.startswith("-")), "")


def flags(ctx: click.Context, incomplete: str) -> list[CompletionItem]:
    """Paths of the configuration that an unfinished flag begins."""
    preset = ctx.params.get("preset") or "tiny"
    paths = (f"--{path}" for path in config_paths(first_word(ctx), preset))
    return _starting(paths, incomplete)
