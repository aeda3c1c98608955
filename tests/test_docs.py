"""What the documentation shows is run: Python blocks, commands, the table of claims."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from coterie.cli.main import cli
from coterie.recipes.tables import BEGIN, END, claims_table, read_results, update_page

ROOT = Path(__file__).parents[1]
NEEDS = {"import transformers": "transformers", "UNet": "diffusers"}
"""What a block with this text needs of the optional libraries."""
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run(page: Path) -> None:
    for block in blocks(page, "python"):
        for sign, library in NEEDS.items():
            if sign in block:
                pytest.importorskip(library)
        exec(compile(block, page.name, "exec"), {})


def test_readme_shows_existing_verbs_only() -> None:
    text = "\n".join(blocks(ROOT / "README.md", "sh"))
    shown = set(re.findall(r"^coterie (\w+)", text, re.MULTILINE))
    context = click.Context(cli)
    assert shown and shown <= set(cli.list_commands(context))


def test_links_inside_the_repository_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_readme_table_is_the_committed_results() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text.split(BEGIN, 1)[1].split(END, 1)[0].strip()
    assert table == claims_table(read_results(ROOT / "results" / "claims")).strip()


def test_update_page_replaces_only_what_is_between_the_markers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n", encoding="utf-8")
    update_page(page, "new")
    assert page.read_text(encoding="utf-8") == f"before\n{BEGIN}\nnew\n{END}\nafter\n"
