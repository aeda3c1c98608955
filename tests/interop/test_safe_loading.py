"""The one way into a folder of transformers: what does not fit is said, and no code runs."""

from __future__ import annotations

import ast
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_hf_models import make_model, tokens

import coterie
from coterie.cli.main import run
from coterie.convert import UpcycleConfig
from coterie.core.errors import CheckpointError, CoterieError
from coterie.interop.transformers.moe_folder import ModelFolder
from coterie.interop.transformers.safe_loading import load_weights, read_tokenizer
from coterie.interop.upcycled import load_upcycled, plan_directory, upcycle_directory

hf = pytest.importorskip("transformers")

Change = Callable[[dict[str, torch.Tensor]], Any]
WEIGHTS = "model.safetensors"
DENSE = {
    "vocab_size": 300, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
UPCYCLE = UpcycleConfig(copies=2, slices=2, calibration=4)


def dense(path: Path, **changes: Any) -> Path:
    torch.manual_seed(0)
    hf.LlamaForCausalLM(hf.LlamaConfig(**DENSE | changes)).save_pretrained(path)
    return path


def experts(path: Path, kind: str = "qwen2_moe") -> Path:
    make_model(kind, std=0.2).save_pretrained(path)
    return path


def weights_of(folder: Path, change: Change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def config_of(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def said(argv: list[Any], capsys: Any) -> str:
    """The one line with which a command fails."""
    capsys.readouterr()
    assert run([str(word) for word in argv]) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert captured.out == "" and lines[-1].startswith("error: ") and len(lines[-1]) < 600
    return lines[-1]


def rename(prefix: str) -> Change:
    return lambda t: [t.update({prefix + name: t.pop(name)}) for name in list(t)]


def drop(part: str) -> Change:
    return lambda t: [t.pop(name) for name in list(t) if part in name]


DAMAGES: dict[str, tuple[Change, str]] = {
    "missing": (drop("layers.1.mlp.up_proj"), r"missing tensor model\.layers\.1\.mlp\.up_proj"),
    "renamed": (rename("net."), r"missing tensor .* and \d+ more"),
    "a layer less": (drop("layers.1."), r"missing tensor model\.layers\.1\..* and \d+ more"),
    "a layer more": (
        lambda t: [
            t.update({name.replace("layers.1.", "layers.2."): value.clone()})
            for name, value in list(t.items())
            if "layers.1." in name
        ],
        r"unknown tensor model\.layers\.2\..* and \d+ more",
    ),
    "extra": (
        lambda t: t.update({"model.layers.0.mlp.gate.bias": torch.zeros(8)}),
        r"unknown tensor model\.layers\.0\.mlp\.gate\.bias",
    ),
    "a wrong shape": (
        lambda t: t.update({"model.norm.weight": torch.ones(5)}),
        r"wrong shape of tensor model\.norm\.weight \[5\] for \[16\]",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_A4_upcycle_writes_no_random_weights(damage: str, tmp_path: Path) -> None:
    change, message = DAMAGES[damage]
    folder, out = dense(tmp_path / "dense"), tmp_path / "out"
    weights_of(folder, change)
    with pytest.raises(CheckpointError, match=message):
        upcycle_directory(folder, out, UPCYCLE)
    assert not out.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("0.mlp.experts.3.gate_proj"), r"missing tensor .*0\.mlp\.experts\.3\.gate_proj"),
        (drop("0.mlp.experts.7."), r"wrong shape of tensor .*experts\.\w+ \[7, .* for \[8"),
        (
            lambda t: t.update({"model.layers.0.mlp.gate.bias": torch.zeros(8)}),
            r"unknown tensor model\.layers\.0\.mlp\.gate\.bias; its configuration",
        ),
        (
            lambda t: t.update({"model.layers.0.mlp.shared_experts.up_proj.weight": torch.ones(2)}),
            r"unknown tensor model\.layers\.0\.mlp\.shared_experts",
        ),
        (drop("shared_expert_gate"), r"missing tensor .*shared_expert_gate\.weight and 1 more"),
        (
            lambda t: t.update({"model.layers.1.mlp.experts.2.up_proj.weight": torch.ones(5, 16)}),
            r"wrong shape of tensor .*1\.mlp\.experts\.2\.up_proj\.weight \[5, 16\] for \[12, 16\]",
        ),
    ],
)
def test_A4_report_reads_every_tensor_of_a_folder(
    change: Change, message: str, tmp_path: Path
) -> None:
    folder = experts(tmp_path / "model")
    weights_of(folder, change)
    with pytest.raises(CheckpointError, match=message):
        ModelFolder.open(folder).load()


def test_A4_what_was_saved_without_its_prefix_is_read_rightly(tmp_path: Path) -> None:
    """A base model's own names: the library knows them, and nothing is left to chance."""
    folder = dense(tmp_path / "dense")
    model = load_weights(hf.LlamaForCausalLM, folder)
    weights_of(
        folder,
        lambda t: [
            t.update({name.removeprefix("model."): t.pop(name)})
            for name in list(t)
            if name.startswith("model.")
        ],
    )
    with torch.no_grad():
        again = load_weights(hf.LlamaForCausalLM, folder)(tokens()).logits
        assert torch.equal(again, model(tokens()).logits)


def test_A4_an_adapter_beside_the_model_is_not_passed_over(tmp_path: Path) -> None:
    folder = dense(tmp_path / "dense")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(CoterieError, match="an adapter lies beside the model; merge it"):
        upcycle_directory(folder, tmp_path / "out", UPCYCLE)


CODE = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\nclass Own: ...\n"
MAP = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own", "AutoTokenizer": "own.Own"}


def with_code(folder: Path, **changes: Any) -> Path:
    (folder / "own.py").write_text(CODE)
    config_of(folder, auto_map=MAP, **changes)
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["own.Own", None]}, "tokenizer_class": "Own"})
    )
    return folder


@pytest.mark.parametrize("verb", ["upcycle", "upcycle -n", "report"])
def test_A5_F2_a_folder_with_code_is_one_line(
    verb: str, tmp_path: Path, book: Path, capsys: Any, monkeypatch: Any
) -> None:
    """Nobody is asked, nothing runs, though every question would be answered with yes."""
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 20))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    folder = with_code(dense(tmp_path / "dense"), model_type="novel")
    words = {
        "upcycle": ["upcycle", folder, "--out", tmp_path / "out"],
        "upcycle -n": ["upcycle", folder, "-n"],
        "report": ["report", folder, "--text", book, "-n"],
    }[verb]
    assert "model_type 'novel' needs code of its own, which is not run" in said(words, capsys)
    assert not list(tmp_path.rglob("ran")) and not (tmp_path / "out").exists()


def test_A5_F2_code_beside_a_known_model_is_left_alone(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    folder = with_code(dense(tmp_path / "dense"))
    assert plan_directory(folder, UPCYCLE)["blocks"] == 2
    assert type(load_weights(hf.LlamaForCausalLM, folder)).__module__.startswith("transformers.")
    with pytest.raises(CheckpointError, match="could not be loaded") as raised:
        read_tokenizer(folder)
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.rglob("ran"))


def test_A5_F2_no_call_leaves_it_unsaid() -> None:
    """Every call that could run a folder's code is in one module, and says that it must not."""
    calls = []
    for path in sorted((Path(coterie.__file__).parent).rglob("*.py")):
        if "diffusers" in path.parts or path.parent.name == "hub":
            continue
        text = path.read_text(encoding="utf-8")
        if "from_pretrained(" not in text and "from_config(" not in text:
            continue
        for node in ast.walk(ast.parse(text)):
            name = node.func.attr if isinstance(node, ast.Call) and isinstance(
                node.func, ast.Attribute
            ) else ""  # fmt: skip
            if name in ("from_pretrained", "from_config") and isinstance(node, ast.Call):
                starred = [ast.unparse(k.value) for k in node.keywords if k.arg is None]
                calls.append((path.name, "NO_CODE" in starred))
    assert calls == [("safe_loading.py", True)] * 2


def test_A11_a_head_of_its_own_is_counted(tmp_path: Path, book: Path, capsys: Any) -> None:
    """The flag says tied, the folder holds two matrices: both are loaded, so both count."""
    folder = experts(tmp_path / "model")
    model = ModelFolder.open(folder).load()
    total = sum(parameter.numel() for parameter in model.parameters())
    with torch.no_grad():
        logits = model(tokens()).logits
    config_of(folder, tie_word_embeddings=True)
    opened = ModelFolder.open(folder)
    with torch.no_grad():
        assert torch.equal(opened.load()(tokens()).logits, logits)
    assert opened.parameters(opened.load()).total == total
    assert run(["report", str(folder), "--text", str(book), "-n", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters_total"] == total


def test_A11_an_upcycled_head_of_its_own_survives_its_folder(tmp_path: Path) -> None:
    folder, out = dense(tmp_path / "dense"), tmp_path / "out"
    config_of(folder, tie_word_embeddings=True)
    assert upcycle_directory(folder, out, UPCYCLE).holds
    with torch.no_grad():
        expected = load_weights(hf.LlamaForCausalLM, folder)(tokens()).logits
        torch.testing.assert_close(load_upcycled(out)(tokens()).logits, expected)


def t5(path: Path) -> Path:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=64, **sizes)).save_pretrained(path)
    return path


def test_D5_upcycle_says_in_one_line_what_is_wrong(tmp_path: Path, capsys: Any) -> None:
    folder = dense(tmp_path / "dense")
    words = ["upcycle", folder, "--out", tmp_path / "out", "-q"]
    whole = (folder / WEIGHTS).read_bytes()
    weights_of(folder, lambda t: t.update({"model.norm.weight": torch.ones(5)}))
    assert "wrong shape of tensor model.norm.weight [5] for [16]" in said(words, capsys)
    (folder / WEIGHTS).write_bytes(whole[:3000])
    for argv in (words, ["upcycle", folder, "-n"]):
        assert "model.safetensors: could not be loaded (not a valid saf" in said(argv, capsys)
    (folder / WEIGHTS).write_bytes(whole)
    config_of(folder, quantization_config={"quant_method": "fp8"})
    assert "quantised weights are not read; store it in float32" in said(words, capsys)
    words[1] = t5(tmp_path / "t5")
    told = said(words, capsys)
    assert told == "error: model_type: 't5' is not allowed; allowed: a causal language model"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("index", [{}, {"weight_map": ["a"]}, {"weight_map": {"a": 3}}])
def test_D9_an_index_without_a_map_is_one_line(index: dict, tmp_path: Path) -> None:
    folder = dense(tmp_path / "dense")
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    for read in (plan_directory, lambda f, _: load_weights(hf.LlamaForCausalLM, f)):
        with pytest.raises(CheckpointError, match=r"index\.json: weight_map: .*; allowed: an obj"):
            read(folder, UPCYCLE)
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": {"x": WEIGHTS}}))
    with pytest.raises(CheckpointError, match=r"missing tensor x, but listed in model"):
        plan_directory(folder, UPCYCLE)


def test_D9_a_model_of_several_parts_is_one_line(tmp_path: Path, book: Path, capsys: Any) -> None:
    text = {"model_type": "t5", "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1}
    sound = {"model_type": "encodec"}
    config = {"model_type": "musicgen", "text_encoder": text, "audio_encoder": sound}
    decoder = {"model_type": "musicgen_decoder", "hidden_size": 16, "num_hidden_layers": 1}
    folder = tmp_path / "music"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**config, "decoder": decoder}))
    save_file({"x": torch.ones(1)}, folder / WEIGHTS)
    for words in (["upcycle", folder, "-n"], ["report", folder, "--text", book, "-n"]):
        assert "model_type: 'musicgen' is not allowed; allowed: a" in said(words, capsys)
