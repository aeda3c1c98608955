"""``coterie sweep`` on a run of a few steps, with the real library."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., tuple[int, str, str]]

ROUTER = "--model.backbone.trunk.slots.0.expert.router"
SMALL = (
    *("deepseekmoe", "--preset", "text", "--model.backbone.trunk.depth=1"),
    *('--data={"kind": "arithmetic", "count": 64, "context": 24}', "--model.backbone.context=24"),
    *("--train.batch=4", "--train.steps=3", "--train.threads=1", f"{ROUTER}.select=top_p", "-q"),
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from coterie.cli.main import run

    folder = tmp_path_factory.mktemp("runs") / "text"
    assert run(["train", *SMALL, "--out", str(folder)]) == 0
    return folder


def test_a_sweep_prints_a_table_and_leaves_a_picture(trained: Path, coterie: Run) -> None:
    code, out, err = coterie("sweep", trained, "--select.p", "0.1,0.4,1", "--limit", "8", "-q")
    assert code == 0, err
    header, _, *lines = out.splitlines()
    assert header.split()[:3] == ["select.p", "held-out", "loss"]
    assert [line.split()[0] for line in lines[:3]] == ["0.1", "0.4", "1"]
    assert [line.endswith("trained") for line in lines[:3]] == [False, True, False]
    assert (trained / "sweep" / "select.p.png").is_file()
    numbers = json.loads((trained / "sweep" / "select.p.json").read_text(encoding="utf-8"))
    used = [row["experts_per_row"] for row in numbers["rows"]]
    assert used == sorted(used) and used[-1] == 31


def test_json_and_another_folder(trained: Path, coterie: Run, tmp_path: Path) -> None:
    words = ("sweep", trained, "--select=top_k", "--select.k=2,4", "--limit=8", "--json", "-q")
    code, out, err = coterie(*words, "--out", tmp_path)
    assert code == 0, err
    found = json.loads(out)
    assert [row["trained"] for row in found["rows"]] == [True, False, False]
    assert [row["experts_per_row"] for row in found["rows"]][1:] == [2, 4]
    assert Path(found["picture"]) == tmp_path / "select_select.k.png"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--select.p", "0,0.4"), "select.p: 0 is not allowed"),
        (("--select=top_k", "--select.k=32"), "k <= E, that is 1..31"),
        (("--selct.k", "2"), "did you mean 'select'"),
        ((), "missing a path with values"),
        (("--select.p",), "needs a value"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(
    trained: Path, coterie: Run, words: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    code, _, err = coterie("sweep", trained, *words, "--out", tmp_path / "no")
    assert code == 2 and message in err and not (tmp_path / "no").exists()


def test_a_run_that_is_not_there_is_named(coterie: Run, tmp_path: Path) -> None:
    code, _, err = coterie("sweep", tmp_path / "gone", "--select.k=1")
    assert code == 2 and "gone" in err
