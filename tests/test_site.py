"""The documentation site names every page, every part, every verb and every public name."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import click
import pytest
import yaml
from pydantic import Field, SerializeAsAny

import api_pages
import coterie
import field_words
import part_pages
import reference_pages
import verb_pages
from coterie.cli.list import REGISTRIES
from coterie.cli.main import VERBS
from coterie.core.config import Config
from coterie.core.registry import Part
from coterie.experts import SELECTS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def listed(nav: Any) -> Iterator[str]:
    """Paths of the pages in the menu."""
    if isinstance(nav, str):
        yield nav
    for entry in nav if isinstance(nav, list) else nav.values() if isinstance(nav, dict) else ():
        yield from listed(entry)


def test_the_menu_lists_every_page_once() -> None:
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    menu = list(listed(settings["nav"]))
    written = [page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")]
    assert sorted(menu) == sorted([*written, *reference_pages.pages()])


def test_every_registry_has_a_page() -> None:
    source = ROOT / "src" / "coterie"
    made = {
        name
        for path in source.rglob("*.py")
        for name in re.findall(r"^(\w+) = Registry\(", path.read_text(encoding="utf-8"), re.M)
    }
    assert made == {target.partition(":")[2] for target in REGISTRIES.values()}
    assert set(part_pages.TITLES) == set(REGISTRIES)


@pytest.mark.parametrize("plural", REGISTRIES)
def test_a_page_of_parts_says_what_each_kind_is_and_takes(plural: str) -> None:
    page, parts = part_pages.page(plural), part_pages.registry(plural)
    for kind in parts.kinds():
        cls = parts.get(kind)
        told = page.partition(f"## `{kind}` {{ #{kind} }}")[2].partition("\n## ")[0]
        assert part_pages.described(cls), f"{cls.__name__} has no docstring"
        for name in cls.model_fields:
            assert name == "kind" or f"| `{name}` |" in told, f"{kind}.{name}"


def test_a_page_of_parts_says_what_does_not_go_together() -> None:
    rows = part_pages.apart(["expert_choice"]).splitlines()
    assert len(rows) > 2 and all("`expert_choice`" in row for row in rows[2:])
    assert part_pages.apart(["no such kind"]) == ""
    assert rows[2] in part_pages.page("selects")


def test_every_verb_is_shown_with_its_options() -> None:
    page = verb_pages.page()
    for verb in VERBS:
        told = page.partition(f"\n## coterie {verb} {{ #coterie-{verb} }}\n")[2].partition("\n## ")[
            0
        ]
        command = importlib.import_module(f"coterie.cli.{verb}").command
        for name in [name for option in command.params for name in option.opts if name[0] == "-"]:
            assert name in told, f"{verb} {name}"
        for below in getattr(command, "verbs", ()):
            assert f"### coterie {verb} {below} {{" in told
    assert "UNSET" not in page


def test_commands_in_a_help_text_keep_their_lines() -> None:
    command = click.Command("v", help="Say\nmore | less.\n\n\b\n    coterie a\n    coterie b\n")
    assert list(verb_pages.help_text(command)) == [
        "Say more \\| less.",
        "```text\ncoterie a\ncoterie b\n```",
    ]


def test_every_public_name_is_shown() -> None:
    pages = api_pages.pages()
    for name in coterie._HOME:
        assert f"[`{name}`](" in pages["reference/api/coterie.md"]
    for package in api_pages.PACKAGES:
        page = pages[f"reference/api/{package}.md"]
        for name in api_pages.exported(package):
            value = getattr(importlib.import_module(f"coterie.{package}"), name)
            shown = f"::: coterie.{package}.{name}\n" in page or f"[`{name}`](../parts/" in page
            assert shown or inspect.ismodule(value), name


def test_every_package_that_names_what_is_public_has_a_page() -> None:
    inits = (ROOT / "src" / "coterie").glob("*/__init__.py")
    public = {path.parent.name for path in inits if "\n__all__ = " in path.read_text("utf-8")}
    assert public == set(api_pages.PACKAGES)


class Sample(Config):
    """Fields of every form."""

    steps: int = Field(default=3, gt=0, le=8)  # how many
    name: str = ""
    sizes: tuple[int, ...] = ()  # type: ignore[assignment]
    pair: tuple[float, float] = (0.5, 1.0)
    mode: Literal["a", "b"] | None = None
    names: dict[str, int] = Field(default_factory=dict)
    select: Annotated[SerializeAsAny[Part], SELECTS.validator]
    """Which experts
    are taken."""


def test_fields_in_words() -> None:
    lines = field_words.table(Sample, {"select": "selects.md"}).splitlines()
    assert lines[2:] == [
        "| `steps` | int > 0, ≤ 8 | `3` | how many |",
        "| `name` | str | empty |  |",
        "| `sizes` | list of int | `[]` |  |",
        "| `pair` | (float, float) | `[0.5, 1.0]` |  |",
        "| `mode` | `a`, `b` or `None` | `None` |  |",
        "| `names` | mapping of str to int | `{}` |  |",
        "| `select` | [select](selects.md) | required | Which experts are taken. |",
    ]


def test_a_configuration_without_fields_says_so() -> None:
    assert field_words.table(SELECTS.get("dense"), {}) == "No fields."


def own_classes() -> list[type[Config]]:
    """Every part and every other configuration that the reference shows."""
    parts = [
        part_pages.registry(plural).get(kind)
        for plural in REGISTRIES
        for kind in part_pages.registry(plural).kinds()
    ]
    found = dict.fromkeys([*part_pages.configurations(), *parts])
    return [cls for cls in found if cls.__module__.startswith("coterie.")]


def test_every_field_has_a_meaning() -> None:
    without = [
        f"{cls.__name__}.{name}"
        for cls in own_classes()
        for name in cls.model_fields
        if name != "kind" and not field_words.meanings(cls).get(name)
    ]
    assert without == []


def test_the_first_line_on_a_part_is_a_whole_sentence() -> None:
    """``coterie list`` shows that line alone, or the summary of a data source."""
    parts = [cls for cls in own_classes() if issubclass(cls, Part) and not hasattr(cls, "info")]
    lines = {cls.__name__: part_pages.described(cls).partition("\n")[0] for cls in parts}
    assert lines
    assert {name: line for name, line in lines.items() if not line.endswith(".")} == {}
