"""``coterie upcycle``, and what becomes of the run it writes: nothing is replaced by a stand-in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coterie.cli.main import run as run_coterie

Run = Callable[..., tuple[int, str, str]]
SMALL = (
    *("--data=digits", "--model.backbone.image_size=8", "--model.backbone.patch=2"),
    *("--model.backbone.trunk.depth=1", "--model.backbone.trunk.width=32"),
    *("--train.batch=8", "--train.steps=3", "--train.warmup=0", "--train.lr=0.01"),
    *("--train.threads=1", "--sample.steps=2", "-q"),
)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "dense"
    assert run_coterie(["train", "dit", *SMALL, "--out", str(path)]) == 0
    return path


def told(answer: tuple[int, str, str]) -> dict[str, Any]:
    code, out, err = answer
    assert code == 0, err
    found: dict[str, Any] = json.loads(out)
    return found


def test_from_a_dense_run_to_the_report_of_its_experts(
    coterie: Run, dense: Path, tmp_path: Path
) -> None:
    run = tmp_path / "experts"
    flags = ("--copies", "3", "--calibration", "16", "--train.steps=4", "--out", run, "--json")
    found = told(coterie("upcycle", dense, *flags))
    assert (found["mode"], found["experts"], found["top_k"]) == ("slice+copy", 6, 2)
    assert found["function_kept"] and found["relative_error"] < 1e-5
    assert len(found["load_cv"]) == 1
    assert told(coterie("upcycle", dense, *flags)) == found, "the same command again"
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    assert (run / config["init"]["path"]).resolve() == dense.resolve()
    assert config["init"]["origin"]["step"] == 3
    assert config["train"]["steps"] == 4 and config["init"]["upcycle"]["copies"] == 3

    samples = ("sample", run, "--num", "2", "-q", "--json")
    assert Path(told(coterie(*samples))["shown"]).is_file(), "before any training"
    assert told(coterie("train", run, "-q", "--json"))["run"] == str(run)
    log = (run / "metrics.jsonl").read_text(encoding="utf-8")
    assert len(log.splitlines()) == 4
    assert coterie("train", run, "-q")[0] == 0
    assert (run / "metrics.jsonl").read_text(encoding="utf-8") == log, "a finished run trains on"
    assert told(coterie(*samples))["samples"]
    assert told(coterie("report", run, "-q", "--json"))["routing"]
    again = told(coterie("upcycle", dense, *flags))
    assert "function_kept" not in again, "a trained run is not compared any more"


def test_a_dry_run_tells_what_it_costs_and_writes_nothing(
    coterie: Run, dense: Path, tmp_path: Path
) -> None:
    found = told(coterie("upcycle", dense, "-n", "--json", "--mode", "copy", "--copies", "2"))
    before, after = found["before"], found["after"]
    width, hidden = 32, 128
    network = 2 * width * hidden + width + hidden
    assert after["parameters_total"] - before["parameters_total"] == network + 2 * width
    assert after["parameters_active"] - before["parameters_active"] == 2 * width
    assert after["flops_per_step"] > before["flops_per_step"]
    assert after["projected_minutes"] >= 0
    assert sorted(path.name for path in tmp_path.iterdir()) == []


def test_a_model_directory_becomes_another(coterie: Run, dense: Path, tmp_path: Path) -> None:
    from coterie.experts import ExpertPool
    from coterie.hub import load_pretrained

    out = tmp_path / "model"
    found = told(coterie("upcycle", dense / "model", "--mode", "slice", "--out", out, "--json"))
    assert found["function_kept"] and found["experts"] == 2
    pools = [m for m in load_pretrained(out).modules() if isinstance(m, ExpertPool)]
    assert [pool.num_experts for pool in pools] == [2]


def test_a_hugging_face_folder_becomes_one_of_experts(coterie: Run, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from coterie.interop.upcycled import load_upcycled, upcycled_networks

    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    dense, out = tmp_path / "dense", tmp_path / "experts"
    transformers.LlamaForCausalLM(config).save_pretrained(dense)
    planned = told(coterie("upcycle", dense, "-n", "--json"))
    assert planned["blocks"] == 2 and not out.exists()
    found = told(coterie("upcycle", dense, "--layers", "1", "--out", out, "--json", "-q"))
    assert found["blocks"] == 1 and found["function_kept"]
    assert list(upcycled_networks(load_upcycled(out))) == ["model.layers.1.mlp"]
    assert coterie("upcycle", dense, "--train.steps=3", "--out", tmp_path / "x")[0] == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--mode", "copy", "--slices", "2"), "slices: 2 is not allowed; allowed: 1, for mode cop"),
        (("--mode", "slice+copy", "--slices", "1"), "mode: 'slice+copy' is not allowed"),
        (("--copies", "0"), "copies: 0 is not allowed"),
        (("--slices", "3"), "slices: 3 is not allowed; allowed: a divisor of the inner size 128"),
        (("--layers", "4"), "layers: (4,) is not allowed; allowed: dense blocks of [0]"),
        (("--layers", "some"), "layers"),
        (("--gates", "two"), "gates: 'two' is not allowed"),
        (("--trian.steps=3",), "Did you mean '--train.steps'"),
        (("--train.stps=3",), "did you mean 'steps'"),
    ],
)
def test_errors_name_what_is_wrong(
    coterie: Run, dense: Path, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    code, out, err = coterie("upcycle", dense, *words, "--out", tmp_path / "run")
    assert (code, out) == (2, "")
    assert message in err and not (tmp_path / "run").exists()


def test_a_source_that_is_none_and_a_missing_target_are_named(
    coterie: Run, dense: Path, tmp_path: Path
) -> None:
    code, _, err = coterie("upcycle", tmp_path, "--out", tmp_path / "run")
    assert code == 2 and "a run directory, a model directory, or a Hugging Face" in err
    code, _, err = coterie("upcycle", dense)
    assert code == 2 and "missing --out" in err


def test_going_on_with_a_run_takes_no_other_configuration(coterie: Run, dense: Path) -> None:
    code, _, err = coterie("train", dense, "--train.lr=0.5", "-q")
    assert code == 2 and "train.lr: 0.01 -> 0.5" in err
