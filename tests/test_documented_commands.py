"""Every ``coterie ...`` of README and docs is one that the command line takes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest

from coterie.cli.main import cli
from coterie.cli.overrides import apply, split
from coterie.core.errors import CoterieError
from coterie.recipes import get_recipe, list_recipes

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
WITH_RECIPES = ("train", "show")


def commands_of(text: str) -> list[str]:
    """Commands in shell blocks, whole, where a line goes on after a backslash or inside quotes."""
    found: list[str] = []
    for block in re.findall(r"```(?:sh|bash|console)\n(.*?)```", text, re.DOTALL):
        waiting = ""
        for line in block.replace("\\\n", " ").splitlines():
            waiting = f"{waiting}\n{line}" if waiting else line
            if waiting.count("'") % 2 and not waiting.lstrip().startswith("#"):
                continue
            if re.match(r"(\$ )?coterie( |$)", waiting):
                found.append(waiting.removeprefix("$ "))
            waiting = ""
    return found


SHOWN = [
    pytest.param(command, id=f"{page.stem}: {command[:60]}")
    for page in PAGES
    for command in commands_of(page.read_text(encoding="utf-8"))
]


def context_of(words: list[str]) -> click.Context:
    """The verb's context, its options parsed; a UsageError where it takes no such thing."""
    group: Any = cli
    context = click.Context(cli, info_name="coterie")
    while isinstance(group, click.Group):
        assert words and words[0] in group.list_commands(context), f"no verb {words[:1]}"
        name, words = words[0], words[1:]
        command = group.get_command(context, name)
        assert command is not None
        if not isinstance(command, click.Group):
            return command.make_context(name, list(words), parent=context)
        group, context = command, click.Context(command, info_name=name, parent=context)
    raise AssertionError("no verb")


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Documents speak of files that are not here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        click.Path, "convert", lambda self, value, param, ctx: self.coerce_path_result(value)
    )


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize("command", SHOWN)
def test_D14_documented_commands_are_taken(command: str) -> None:
    words = shlex.split(command, comments=True)[1:]
    words = words[: next((i for i, word in enumerate(words) if word in ("|", ">", "&&")), None)]
    if not words or words[0].startswith("-"):
        return
    context = context_of(words)
    arguments = context.params.get("arguments")
    if context.command.name not in WITH_RECIPES or not arguments:
        return
    names, paths = split(arguments)
    if names[0] not in list_recipes():
        assert names[0].startswith("runs/") and not paths, "a run goes on as it was configured"
        return
    config = get_recipe(names[0]).config(str(context.params.get("preset") or "tiny"))
    # What a shell would put there, and folders that are not here, cannot be tried.
    left_out = [path for path, value in paths.items() if "$(" in value or path.startswith("init")]
    tried = {path: value for path, value in paths.items() if path not in left_out}
    if left_out and tried.get("train.steps") == "0":  # of a model that is not here
        del tried["train.steps"]
    apply(context, config, tried)


@pytest.mark.parametrize(
    "command",
    [
        "coterie sample runs/a --stepps 3",
        "coterie trian dit",
        "coterie train dit --train.stepz=3",
        "coterie train runs/condconv --train.steps=2000",
    ],
)
@pytest.mark.usefixtures("anywhere")
def test_D14_the_test_sees_commands_that_are_refused(command: str) -> None:
    with pytest.raises((click.UsageError, CoterieError, AssertionError)):
        test_D14_documented_commands_are_taken(command)


def test_D14_there_are_commands_to_look_at() -> None:
    assert len(SHOWN) > 80
    block = "```sh\ncoterie train dit --a='\n{\n}'\ncoterie cite \\\n  dit  # x\n```"
    assert commands_of(block) == ["coterie train dit --a='\n{\n}'", "coterie cite    dit  # x"]
