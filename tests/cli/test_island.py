"""The page on islands, command by command, on a model small enough for a test."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from coterie.cli.main import run

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "islands.md"
TINY = (
    "--train.steps=3 --train.batch=8 --train.threads=1 --train.warmup=0 "
    "--model.backbone.trunk.depth=1 --model.backbone.trunk.width=16 "
    "--model.backbone.trunk.heads=2 --sample.steps=2"
)
SMALL = {
    "coterie island plan": TINY,
    "coterie island router": "--train.steps=3",
    "coterie train": TINY,
    "coterie sample": "--num 4",
}


def walk(part: int) -> None:
    """Run the commands of one part of the page, on less."""
    text = PAGE.read_text(encoding="utf-8").split("<!-- run: begin -->")[part]
    block = re.findall(r"```sh\n(.*?)```", text.split("<!-- run: end -->")[0], re.DOTALL)[0]
    for line in block.splitlines():
        small = next((more for verb, more in SMALL.items() if line.startswith(verb)), "")
        words = shlex.split(line.removeprefix("coterie ")) + shlex.split(small)
        assert run(words) == 0, line


def test_the_page_walks_from_a_recipe_to_one_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    walk(1)
    assert Image.open("runs/together/samples/grid.png").size[0] > 28
    report = json.loads(Path("runs/together/report/report.json").read_text())
    assert "ensemble" in json.dumps(report)
    assert Path("runs/student/model/manifest.json").is_file()
    capsys.readouterr()
    assert run(["island", "status", "runs/islands", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["state"] for row in rows] == ["done"] * 5


def test_the_page_walks_from_a_base_to_two_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    walk(2)
    assert Image.open("runs/pair/samples/grid.png").size[0] > 28
    report = json.loads(Path("runs/pair/report/report.json").read_text())
    assert "ensemble" in json.dumps(report)


def test_plans_that_cannot_be_are_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for words, told in (
        (["island", "plan", "dit", "--islands", "0"], "islands"),
        (["island", "plan", "dit", "--islands", "3"], "train.batch: 64"),
        (["island", "plan", "dit", "--for", "x"], "ISLAND:PATH=VALUE"),
        (["island", "run", "nowhere"], "islands.json"),
        (["island", "assemble", "nowhere", "--out", "x"], "islands.json"),
    ):
        assert run(words) == 2
        assert told in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
