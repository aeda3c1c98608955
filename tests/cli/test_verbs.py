"""What each verb asks of the library and what it prints, against stand-ins."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from coterie.core.errors import CheckpointError, DataError, TrainingError

Run = Callable[..., tuple[int, str, str]]


def test_train_applies_flags_and_names_the_run(library, coterie: Run) -> None:
    code, out, _ = coterie(
        *("train", "--model.depth", "6", "dit-moe", "--seed=3", "--batch-size=4", "--betas=[0, 1]")
    )
    given = library.of("start")
    assert code == 0
    assert given["out"] == Path("runs/dit-moe")
    assert given["progress"] is True
    assert (given["config"].model.depth, given["config"].seed) == (6, 3)
    assert (given["config"].batch_size, given["config"].betas) == (4, (0.0, 1.0))
    assert str(Path("runs/dit-moe")) in out


def test_train_takes_preset_out_and_quiet(library, coterie: Run, tmp_path: Path) -> None:
    code, _, _ = coterie("train", "dit-moe", "--preset", "demo", "--out", tmp_path, "-q")
    given = library.of("start")
    assert code == 0
    assert (given["config"].seed, given["out"], given["progress"]) == (7, tmp_path, False)


def test_a_dry_run_only_plans(library, coterie: Run) -> None:
    code, out, _ = coterie("train", "dit-moe", "--dry-run", "--json", "--model.depth=5")
    assert code == 0
    assert [(name, given["measure"]) for name, given in library.made] == [
        ("plan", False),
        ("plan", True),
    ]
    assert all(given["config"].model.depth == 5 for _, given in library.made)
    assert json.loads(out) == {
        "parameters_total": 12_345,
        "training_memory_gib": 0.0,
        "projected_minutes": 1.5,
    }
    assert "12,345" in coterie("train", "dit-moe", "-n")[1]


def test_a_dry_run_of_a_model_too_large_to_build_still_tells_its_size(
    library, coterie: Run
) -> None:
    library.parameters = 10**15
    code, out, _ = coterie("train", "dit-moe", "--dry-run", "--json")
    planned = json.loads(out)
    assert code == 0
    assert library.of("plan")["measure"] is False
    assert planned["training_memory_gib"] == pytest.approx(20e15 / 2**30)
    assert planned["projected_minutes"] is None
    assert "GiB" in planned["note"]


def test_a_dry_run_without_its_data_still_tells_the_size(library, coterie: Run) -> None:
    library.plan_error = DataError("no such data here")
    code, out, _ = coterie("train", "dit-moe", "-n")
    assert code == 0
    assert "12,345" in out
    assert "no such data here" in out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["train", "dit-mo"], "did you mean 'dit-moe'?"),
        (["train", "dit-moe", "--preset", "tinny"], "did you mean 'tiny'?"),
        (["train", "dit-moe", "--model.dept=3"], "did you mean 'depth'?"),
        (["train", "dit-moe", "--model.depth=deep"], "model.depth: 'deep' is not allowed"),
        (["train", "dit-moe", "--presett=demo"], "--preset"),
        (["train", "dit-moe", "--modle.depth=3"], "--model.depth"),
        (["train", "dit-moe", "extra"], "unexpected: extra"),
        (["train"], "missing RECIPE"),
        (["show", "dit-moe", "--model.depth"], "needs a value"),
        (["cite", "othr"], "did you mean 'other'?"),
        (["verify", "dit-moe", "othr"], "did you mean 'other'?"),
        (["demo", "dit-moe"], "unexpected: dit-moe"),
        (["sample", "runs/x", "--labels", "a-b"], "no list of class numbers"),
        (["sample", "runs/x", "--num", "0"], "--num"),
        (["list", "slovers"], "did you mean 'solvers'?"),
        (["tarin"], "did you mean 'train'?"),
    ],
)
def test_a_mistake_is_one_line_with_a_hint(library, coterie: Run, argv, said: str) -> None:
    code, out, err = coterie(*argv)
    assert code == 2
    assert out == ""
    assert said in err
    assert "Traceback" not in err
    assert library.made == []


def test_an_error_of_the_library_is_one_line(library, coterie: Run) -> None:
    library.error = CheckpointError("runs/x: damaged\n  twice")
    assert coterie("report", "runs/x") == (2, "", "error: runs/x: damaged twice\n")


def test_an_interrupt_has_its_own_exit_code(library, coterie: Run) -> None:
    library.error = KeyboardInterrupt()
    code, _, err = coterie("train", "dit-moe")
    assert code == 130
    assert "interrupted" in err


def test_training_that_was_stopped_hands_on_its_exit_code(library, coterie: Run) -> None:
    library.error = TrainingError("stopped by SIGTERM; saved")
    library.error.exit_code = 143  # as coterie.train.signals.Interrupted carries it
    assert coterie("train", "dit-moe") == (143, "", "stopped by SIGTERM; saved\n")


def test_a_bug_keeps_its_traceback(library, coterie: Run) -> None:
    library.error = RuntimeError("a bug")
    with pytest.raises(RuntimeError, match="a bug"):
        coterie("train", "dit-moe")


@pytest.mark.parametrize(
    ("labels", "parsed"), [("3", [3]), ("0,3,7", [0, 3, 7]), ("0-2,5", [0, 1, 2, 5])]
)
def test_sample_hands_everything_on(library, coterie: Run, labels: str, parsed) -> None:
    code, out, _ = coterie(
        *("sample", "runs/a", "--num", "5", "--labels", labels, "--seed", "9", "--steps", "4"),
        *("--guidance", "1.5", "--weights", "model", "--json"),
    )
    given = library.of("sample_run")
    assert code == 0
    assert library.of("load_run") == {"path": Path("runs/a"), "which": "model"}
    assert given.pop("run").path == Path("runs/a")
    assert given == {
        "num": 5,
        "labels": parsed,
        "index": None,
        "seeds": None,
        "seed": 9,
        "steps": 4,
        "guidance": 1.5,
        "out": Path("runs/a/samples"),
    }
    assert json.loads(out)["shown"] == str(Path("runs/a/samples/grid.png"))


def test_report_prints_the_page_or_the_numbers(library, coterie: Run, tmp_path: Path) -> None:
    code, out, _ = coterie("report", tmp_path)
    assert code == 0
    assert str(tmp_path / "report" / "index.html") in out
    assert library.of("report_run")["citation"] == ""
    assert json.loads(coterie("report", tmp_path, "--json")[1]) == {"loss": 0.5}


@pytest.mark.parametrize(
    ("text", "citation"),
    [
        ('{"recipe": "dit-moe"}', "@misc{a}"),
        ('{"recipe": "mine"}', ""),
        ("[1]", ""),
        ("{", ""),
    ],
)
def test_report_cites_the_recipe(library, coterie: Run, tmp_path: Path, text, citation) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    assert coterie("report", tmp_path)[0] == 0
    assert library.of("report_run")["citation"] == citation


@pytest.mark.parametrize(("named", "cases"), [((), ("S2", "B2")), (("B2",), ("B2",))])
def test_bench_times_the_cases_named_or_all(library, coterie: Run, named, cases) -> None:
    code, out, _ = coterie("bench", "experts", *named, "--threads", "2", "--rounds", "1")
    assert code == 0
    assert library.of("run_benchmark") == {"cases": cases, "threads": 2, "rounds": 1}
    assert "loop" in out
    assert json.loads(coterie("bench", "experts", *named, "--json")[1])["rows"][0]["choice"] == {}


def test_demo_goes_from_data_to_report(library, coterie: Run, tmp_path: Path) -> None:
    code, out, _ = coterie("demo", "--out", tmp_path, "--model.depth=1", "-q")
    assert code == 0
    assert [name for name, _ in library.made] == [
        *("fetch", "start", "load_run", "sample_run", "report_run")
    ]
    config = library.of("start")["config"]
    assert (config.seed, config.model.depth) == (7, 1)
    shown = [tmp_path / "samples/grid.png", tmp_path / "report/index.html"]
    assert [Path(line.split()[-1]) for line in out.splitlines()[-3:]] == [
        *shown,
        tmp_path / "report/report.json",
    ]


def test_verify_writes_the_result_of_each_recipe(library, coterie: Run, tmp_path: Path) -> None:
    code, out, _ = coterie("verify", "dit-moe", "--out", tmp_path, "--seeds", "2", "-q")
    assert code == 0
    assert library.of("verify")["seeds"] == 2
    assert json.loads((tmp_path / "dit-moe.json").read_text())["claims"][0]["shown"] is False
    assert "better" in out


def test_verify_without_names_takes_all(library, coterie: Run, tmp_path: Path) -> None:
    code, out, _ = coterie("verify", "--out", tmp_path, "--json", "-q")
    assert code == 0
    assert list(json.loads(out)) == ["dit-moe", "other"]


def test_show_prints_configuration_and_size(library, coterie: Run) -> None:
    code, out, _ = coterie("show", "dit-moe", "--model.name=big")
    assert code == 0
    assert library.of("plan")["measure"] is False
    assert '"name": "big"' in out
    assert "12,345" in out


def test_cite_prints_each_paper(library, coterie: Run) -> None:
    assert coterie("cite", "dit-moe", "other")[1] == "@misc{a}\n\n@misc{a}\n"
