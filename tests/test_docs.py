"""What the documentation shows is run: Python blocks, commands, the table of claims."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from coterie.bench import summary
from coterie.cli.main import cli
from coterie.core.sections import section
from coterie.recipes import tables

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
NEEDS = {"import transformers": "transformers", "UNet": "diffusers"}
"""What a block with this text needs of the optional libraries."""
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that begins with the name of a file is that file, which later blocks may import; it
    runs in a process of its own, as it may register parts."""
    monkeypatch.chdir(tmp_path)
    for block in blocks(page, "python"):
        for sign, library in NEEDS.items():
            if sign in block:
                pytest.importorskip(library)
        if name := re.match(r"# (\w+\.py)\n", block):
            Path(name[1]).write_text(block, encoding="utf-8")
            subprocess.run([sys.executable, name[1]], check=True)
        else:
            exec(compile(block, page.name, "exec"), {})


def test_readme_shows_existing_verbs_only() -> None:
    text = "\n".join(blocks(ROOT / "README.md", "sh"))
    shown = set(re.findall(r"^coterie (\w+)", text, re.MULTILINE))
    context = click.Context(cli)
    assert shown and shown <= set(cli.list_commands(context))


def test_links_inside_the_repository_lead_somewhere() -> None:
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize(
    ("page", "name", "made"),
    [
        ("README.md", "claims in short", lambda: tables.sections(RESULTS / "claims")),
        (
            "docs/explanation/claims.md",
            "recipes' claims",
            lambda: tables.sections(RESULTS / "claims"),
        ),
        ("docs/explanation/claims.md", "claims", lambda: tables.sections(RESULTS / "claims")),
        ("README.md", "speed", lambda: summary.sections(RESULTS / "bench")),
        (
            "docs/explanation/performance.md",
            "goals in short",
            lambda: summary.sections(RESULTS / "bench"),
        ),
        ("docs/explanation/performance.md", "goals", lambda: summary.sections(RESULTS / "bench")),
    ],
)
def test_tables_of_pages_are_the_committed_results(page: str, name: str, made) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert section(text, name) == made()[name].strip()
