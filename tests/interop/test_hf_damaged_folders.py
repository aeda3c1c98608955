"""Folders of Hugging Face with one thing wrong: it is named, before memory or work is spent."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_hf_models import make_model

from coterie.cli.main import run
from coterie.interop.transformers.fields import check_shapes
from coterie.interop.transformers.safe_loading import build, read_config

hf = pytest.importorskip("transformers")

WEIGHTS = "model.safetensors"
SIZES = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
DENSE = {**SIZES, "num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    hf.LlamaForCausalLM(hf.LlamaConfig(**DENSE)).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.fixture
def mixture(tmp_path: Path) -> Path:
    make_model("mixtral", std=0.2).save_pretrained(tmp_path / "mixture")
    return tmp_path / "mixture"


@pytest.fixture
def said(tmp_path: Path, capsys: Any) -> Callable[..., str]:
    """The one line with which a verb refuses a folder; nothing is written."""
    book = tmp_path / "book.txt"
    book.write_text("One expert reads this sentence, and another one reads that. " * 5)
    reads = ["--text", book, "--out", tmp_path / "out"]
    words = {
        "upcycle": ["--out", tmp_path / "out", "-q"],
        "report": [*reads, "-q"],
        "sweep": ["--select.k", "1,2", *reads, "-q"],
        "place": ["--devices", "2", *reads, "-q"],
    }

    def ask(verb: str, folder: Path) -> str:
        capsys.readouterr()
        assert run([verb, str(folder), *map(str, words[verb])]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert lines[-1].startswith("error: ") and not (tmp_path / "out").exists()
        return lines[-1]

    return ask


def change(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("verb", ["upcycle", "report", "sweep", "place"])
def test_C6_weights_that_are_not_finite_are_named(
    verb: str, value: str, request: Any, said: Callable[..., str]
) -> None:
    folder = request.getfixturevalue("dense" if verb == "upcycle" else "mixture")
    held = load_file(folder / WEIGHTS)
    name = next(n for n in held if "down_proj" in n or n.endswith("w2.weight"))
    held[name].view(-1)[3] = float(value)
    save_file(held, folder / WEIGHTS, {"format": "pt"})
    told = f"{folder / WEIGHTS}: tensor {name} holds NaN or infinity"
    assert said(verb, folder) == f"error: {told}"


@pytest.mark.parametrize(
    "field", ["hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers"]
)
def test_G10_sizes_of_a_folder_are_compared_before_memory_is_asked_for(
    field: str, dense: Path, said: Callable[..., str], monkeypatch: Any
) -> None:
    change(dense, **{field: 10**9})
    monkeypatch.setattr(
        hf.LlamaForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("read")
    )
    told = said("upcycle", dense)
    assert str(dense) in told and field in told and "1000000000" in told
    assert field == "num_hidden_layers" or "wrong shape of tensor" in told


@pytest.mark.parametrize("field", ["num_local_experts", "intermediate_size"])
def test_G10_stacks_of_experts_are_compared_too(
    field: str, mixture: Path, said: Callable[..., str]
) -> None:
    change(mixture, **{field: 10**9})
    told = said("report", mixture)
    assert str(mixture) in told and field in told and "1000000000" in told


def test_G10_a_folder_as_it_should_be_passes(mixture: Path) -> None:
    with torch.device("meta"):
        skeleton = build(read_config(mixture))
    shapes = {name: tuple(v.shape) for name, v in skeleton.named_parameters()}
    check_shapes(mixture, skeleton, shapes)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads: 0 is not allowed; allowed: a whole"),
        ({"num_hidden_layers": -1}, "num_hidden_layers: -1 is not allowed; allowed: a whole"),
        ({"hidden_size": "16"}, "hidden_size: '16' is not allowed; allowed: a whole"),
        ({"hidden_act": "__import__"}, "hidden_act: '__import__' is not allowed; allowed: "),
        (
            {"rope_parameters": {"rope_type": "nope", "rope_theta": 1e4}},
            "rope_parameters.rope_type: 'nope' is not allowed; allowed: default",
        ),
    ],
)
def test_A4_values_that_no_model_is_built_of_are_named(
    fields: dict[str, Any], message: str, dense: Path, said: Callable[..., str]
) -> None:
    change(dense, **fields)
    assert f"{dense / 'config.json'}: {message}" in said("upcycle", dense)


def test_A4_more_choices_than_experts_are_named(mixture: Path, said: Callable[..., str]) -> None:
    change(mixture, num_experts_per_tok=9)
    told = "num_experts_per_tok, here select.k: 9 is not allowed; allowed: 1..8; num_local_experts"
    assert f"{mixture / 'config.json'}: {told}" in said("report", mixture)


DAMAGED = {"latin": b'{"a": "\xe4"}', "a list": b"[1]", "deep": b"[" * 10**5 + b"]" * 10**5}


@pytest.mark.parametrize("verb", ["upcycle", "report", "sweep", "place"])
@pytest.mark.parametrize("kind", DAMAGED)
def test_A4_a_damaged_configuration_is_called_damaged(
    kind: str, verb: str, dense: Path, said: Callable[..., str]
) -> None:
    (dense / "config.json").write_bytes(DAMAGED[kind])
    assert said(verb, dense).startswith(f"error: {dense / 'config.json'} is damaged: ")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (
            {"weight_map": {"a": "../llama/model.safetensors"}},
            "llama/model.safetensors' is outside",
        ),
        ({"weight_map": {"a": "/model.safetensors"}}, "'/model.safetensors' is outside the folder"),
        ({}, "index.json: weight_map: missing; allowed: an object"),
        ({"weight_map": {"x": WEIGHTS, "a": 3}}, "weight_map: {'a': 3} is not allowed"),
    ],
)
def test_A4_entries_of_an_index_are_named(
    index: dict[str, Any], message: str, dense: Path, said: Callable[..., str]
) -> None:
    (dense / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    assert message in said("upcycle", dense)
