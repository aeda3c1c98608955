"""How the package is built: files per folder, levels of imports, and circles of files.

    python tools/structure.py                     # of this checkout
    python tools/structure.py --at HEAD~20        # of another commit
    python tools/structure.py --compare HEAD~20   # of both, side by side
    python tools/structure.py --json

A file stands one level above the highest file that it imports. Imports inside functions count;
those that only type checkers read (``if TYPE_CHECKING``) do not. ``tests/test_floors.py`` reads the
same imports and fails on a circle.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import subprocess
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "coterie"
SOURCE = ROOT / "src" / PACKAGE

Sources = Mapping[str, str]
"""Dotted name of a module, ``coterie.train.loop`` or of a package, -> its text."""


def module_name(path: Path) -> str:
    """``train/loop.py`` and ``train/__init__.py`` -> ``coterie.train.loop``, ``coterie.train``."""
    parts = [PACKAGE, *path.with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources_in(folder: Path) -> dict[str, str]:
    """All modules below a folder that stands for the package."""
    return {
        module_name(path.relative_to(folder)): path.read_text(encoding="utf-8")
        for path in sorted(folder.rglob("*.py"))
    }


def sources_at(commit: str) -> dict[str, str]:
    """All modules of another commit, read from git."""
    where = f"src/{PACKAGE}"
    packed = subprocess.run(
        ["git", "archive", commit, where], cwd=ROOT, check=True, capture_output=True
    ).stdout
    found = {}
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        for member in archive:
            if member.isfile() and member.name.endswith(".py"):
                file = archive.extractfile(member)
                assert file is not None
                name = module_name(Path(member.name).relative_to(where))
                found[name] = file.read().decode("utf-8")
    return found


def is_for_type_checkers(node: ast.AST) -> bool:
    """Whether a statement is ``if TYPE_CHECKING:``, which never runs."""
    if not isinstance(node, ast.If):
        return False
    test = node.test
    return getattr(test, "id", getattr(test, "attr", "")) == "TYPE_CHECKING"


def statements(node: ast.AST, types_too: bool = False) -> Iterator[ast.AST]:
    """All nodes below ``node``; without ``types_too`` those that can run."""
    for child in ast.iter_child_nodes(node):
        if types_too or not is_for_type_checkers(child):
            yield child
            yield from statements(child, types_too)
        elif isinstance(child, ast.If):
            for other in child.orelse:
                yield other
                yield from statements(other, types_too)


def names_imported(node: ast.AST, package: str) -> Iterator[str]:
    """Absolute dotted names that an import, of any form and anywhere in the file, asks for."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*above, *([node.module] if node.module else [])])
        yield from (f"{base}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if name in {"import_module", "__import__"} and isinstance(node.args[0].value, str):
            yield node.args[0].value


def package_of(name: str, sources: Sources) -> str:
    """The package whose names a module may import with a leading dot."""
    inside = any(other.startswith(name + ".") for other in sources)
    return name if inside else name.rpartition(".")[0]


def imports(sources: Sources) -> dict[str, set[str]]:
    """Module -> the modules that it imports when it runs, at its top or in a function."""
    found: dict[str, set[str]] = {}
    for name, text in sources.items():
        package, asked = package_of(name, sources), set()
        for node in statements(ast.parse(text, filename=name)):
            for wanted in names_imported(node, package):
                while wanted and wanted not in sources:
                    wanted = wanted.rpartition(".")[0]
                if wanted and wanted != PACKAGE:
                    asked.add(wanted)
        found[name] = asked - {name}
    return found


def components(arrows: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of modules that reach each other (Tarjan), those that are imported first."""
    index: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    groups: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = lowest[name] = len(index)
        stack.append(name)
        for other in sorted(arrows[name]):
            if other not in index:
                visit(other)
                lowest[name] = min(lowest[name], lowest[other])
            elif other in stack:
                lowest[name] = min(lowest[name], index[other])
        if lowest[name] == index[name]:
            first = stack.index(name)
            groups.append(sorted(stack[first:]))
            del stack[first:]

    for name in sorted(arrows):
        if name not in index:
            visit(name)
    return groups


def circles(arrows: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of two or more modules that import each other."""
    return [group for group in components(arrows) if len(group) > 1]


def levels(arrows: Mapping[str, set[str]]) -> dict[str, int]:
    """Module -> its level, from 1; modules of a circle share one."""
    found: dict[str, int] = {}
    for group in components(arrows):
        below = {other for name in group for other in arrows[name]} - set(group)
        level = 1 + max((found[other] for other in below), default=0)
        found.update(dict.fromkeys(group, level))
    return found


def measured(sources: Sources) -> dict[str, Any]:
    """Per folder: files, lines, and levels that its own imports make; and the circles of all."""
    arrows = imports(sources)
    folders: dict[str, list[str]] = {}
    for name in sources:
        parts = package_of(name, sources).split(".")[1:]
        for depth in range(1, min(len(parts), 2) + 1):
            folders.setdefault("/".join(parts[:depth]) + "/", []).append(name)
        if not parts:
            folders.setdefault("./", []).append(name)
    rows = {}
    for folder, names in sorted(folders.items()):
        inside = {name: arrows[name] & set(names) for name in names}
        rows[folder] = {
            "files": len(names),
            "lines": sum(sources[name].count("\n") for name in names),
            "levels": max(levels(inside).values()),
        }
    return {
        "files": len(sources),
        "lines": sum(text.count("\n") for text in sources.values()),
        "levels": max(levels(arrows).values()),
        "folders": rows,
        "circles": circles(arrows),
    }


def table(measures: Mapping[str, dict[str, Any]]) -> str:
    """Folders down, one block of columns for each measured tree."""
    folders = sorted({folder for found in measures.values() for folder in found["folders"]})
    wide = max(map(len, folders))
    lines = [" " * wide + "".join(f"  {title:>22.22}" for title in measures)]
    lines.append(" " * wide + "   files  lines  levels" * len(measures))
    for folder in [*folders, "all"]:
        cells = ""
        for found in measures.values():
            row = found if folder == "all" else found["folders"].get(folder)
            numbers = [row[key] if row else "-" for key in ("files", "lines", "levels")]
            cells += "  {:>6} {:>6}  {:>6}".format(*numbers)
        lines.append(f"{folder:<{wide}}{cells}")
    for title, found in measures.items():
        lines.append(f"circles of files, {title}: {len(found['circles'])}")
        lines += [f"  {' <-> '.join(group)}" for group in found["circles"]]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--at", metavar="COMMIT", help="measure this commit")
    parser.add_argument("--compare", metavar="COMMIT", help="show this commit beside")
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args()
    measures = {}
    if given.compare:
        measures[given.compare] = measured(sources_at(given.compare))
    title = given.at or "this checkout"
    measures[title] = measured(sources_at(given.at) if given.at else sources_in(SOURCE))
    print(json.dumps(measures, indent=2) if given.json else table(measures))


if __name__ == "__main__":
    main()
