"""``coterie sweep`` and ``coterie place`` on the folder of a Hugging Face model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_hf_models import EXPERTS, HIDDEN, WIDTH

from coterie.cli.main import run
from coterie.interop.transformers.report import Reading

READ = ("--context", "16", "--batch", "3", "-q", "--json")


def told(argv: list[Any], capsys: Any) -> dict[str, Any]:
    capsys.readouterr()
    assert run([str(word) for word in argv]) == 0, capsys.readouterr().err
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def own_setting(folder: Path, book: Path, top_k: int) -> tuple[float, int]:
    """Bits per token and active parameters of a model that is configured with ``top_k``."""
    config = json.loads((folder / "config.json").read_text())
    before = (folder / "config.json").read_text()
    (folder / "config.json").write_text(json.dumps({**config, "num_experts_per_tok": top_k}))
    try:
        data = Reading.prepare(folder, book, tokens=60, context=16).read()
    finally:
        (folder / "config.json").write_text(before)
    assert data.parameters is not None
    return data.metrics["bits per token"]["value"], data.parameters.active


@pytest.mark.parametrize("kind", ["olmoe", "qwen2_moe"])
def test_D7_a_sweep_is_what_the_model_is_under_that_setting(
    folder_of: Any, kind: str, book: Path, tmp_path: Path, capsys: Any
) -> None:
    folder, out = folder_of(kind), tmp_path / "out"
    flags = ("--select.k", "1,3,5", "--text", book, "--tokens", "60", "--out", out)
    found = told(["sweep", folder, *flags, *READ], capsys)
    assert [row["settings"] for row in found["rows"]] == [{"select.k": k} for k in (1, 3, 5)]
    assert [row["trained"] for row in found["rows"]] == [False, True, False]
    always = {"olmoe": 0, "qwen2_moe": 3 * 20 * WIDTH + WIDTH}[kind]
    adds = [EXPERTS * WIDTH + k * 3 * WIDTH * HIDDEN + always for k in (1, 3, 5)]
    for k, row, cost in zip((1, 3, 5), found["rows"], adds, strict=True):
        bits, active = own_setting(folder, book, k)
        assert row["held_out_loss"] == pytest.approx(bits, rel=1e-5)
        assert row["active_parameters"] == active
        assert (row["experts_per_row"], row["experts_per_row_max"]) == (k, k)
        assert row["relative_multiply_adds"] == pytest.approx(cost / adds[1])
    numbers = json.loads((out / "select.k.json").read_text())
    assert numbers["rows"] == found["rows"] and numbers["loss_unit"] == "bits per token"
    assert Path(found["picture"]).is_file()


def test_D7_a_block_diffusion_model_and_a_rule_of_another_kind(
    folder_of: Any, book: Path, tmp_path: Path, capsys: Any
) -> None:
    folder = folder_of("diffusion_gemma")
    flags = ("--select", "top_p", "--select.p", "0.3,1", "--text", book, "--tokens", "60")
    found = told(["sweep", folder, *flags, "--out", tmp_path / "out", *READ], capsys)
    first, few, many = found["rows"]
    assert first["trained"] and first["settings"] == {"select": "top_k", "select.p": None}
    assert few["experts_per_row"] < many["experts_per_row"] == EXPERTS
    (metrics,) = [Reading.prepare(folder, book, tokens=60, context=16).read().metrics]
    bits = metrics["decoder, token on the noised canvas"]["bits per token"]["value"]
    assert first["held_out_loss"] == pytest.approx(bits, rel=1e-5)


def test_D7_experts_are_placed_by_what_the_text_chose(
    folder_of: Any, book: Path, tmp_path: Path, capsys: Any
) -> None:
    folder, out = folder_of("olmoe"), tmp_path / "out"
    flags = ("--devices", "2,4", "--text", book, "--read", "60", "--out", out)
    found = told(["place", folder, *flags, *READ], capsys)
    data = Reading.prepare(folder, book, tokens=60, context=16).read()
    assert data.trace is not None
    for layer, router in zip(found["layers"], data.trace.routers, strict=True):
        share = torch.tensor(router.counts[0]) / router.counts[0].sum()
        assert layer["load"] == pytest.approx(share.tolist(), abs=1e-6)
    assert [row["devices"] for row in found["rows"]] == [2] * 3 + [4] * 3
    assert found["cost"]["per_row"] > 0
    assert json.loads((out / "placement.json").read_text()) == found
    assert (out / "placement.png").is_file()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("sweep", "{model}", "--select.k", "2"), "--text: missing; "),
        (("place", "{model}"), "--text: missing; "),
        (("sweep", "{model}", "--select.k", "9", "--text", "{book}"), "select.k: 9 is not allow"),
        (("sweep", "{model}", "--hidden", "9", "--text", "{book}"), "hidden: 'hidden' is not al"),
        (
            ("sweep", "{model}", "--select", "expert_choice", "--text", "{book}"),
            "select: 'expert_choice' is not allowed; allowed: a row-wise one",
        ),
        (
            ("sweep", "{model}", "--select.k", "2", "--text", "{book}", "--limit", "4"),
            "--limit: only for a run",
        ),
        (("place", "{empty}", "--read", "9"), "--read: only for the folder of a Hugging Face"),
        (("sweep", "{empty}", "--select.k=2", "--text", "{book}"), "--text: only for the folder"),
    ],
)
def test_D7_what_is_wrong_is_one_line(
    folder_of: Any, book: Path, tmp_path: Path, capsys: Any, words: tuple[str, ...], said: str
) -> None:
    (tmp_path / "empty").mkdir()
    places = {"model": folder_of("olmoe"), "book": book, "empty": tmp_path / "empty"}
    out = tmp_path / "out"
    assert run([*(word.format(**places) for word in words), "--out", str(out)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert said in lines[-1] and lines[-1].startswith("error: ") and len(lines[-1]) < 400
    assert not out.exists()
