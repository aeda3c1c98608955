"""``coterie report`` on Hugging Face models: what is read, counted and refused."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hand_layers import gates_of, logits_of
from tiny_hf_models import EXPERTS, HIDDEN, TEXT, WIDTH, WORDS
from torch.nn import functional as F

from coterie.cli.main import run
from coterie.core.errors import CheckpointError, ConfigError, DataError
from coterie.inspect.statistics.expert_answers import ROWS
from coterie.interop.transformers import MismatchError, find_moe_layers
from coterie.interop.transformers.moe_folder import ModelFolder
from coterie.interop.transformers.report import Reading


def add_tokenizer(folder: Path) -> None:
    """One token per word, and a first token before every text."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    words = sorted(set(TEXT.replace(",", " ,").replace(".", " .").split()))
    table = {"<s>": 0, "<unk>": 1} | {word: 40 + i for i, word in enumerate(words)}
    fast = tokenizers.Tokenizer(tokenizers.models.WordLevel(table, unk_token="<unk>"))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<s>").save_pretrained(folder)


def counted_by_hand(model: Any, windows: list[torch.Tensor]) -> tuple[list[Counter], list[float]]:
    """Choices per expert of each layer, and nats of each predicted token, window by window."""
    choices = [Counter[int]() for _ in find_moe_layers(model)]
    nats: list[float] = []
    seen: list[torch.Tensor] = []
    for site in find_moe_layers(model):
        site.router.register_forward_hook(lambda m, a, out: seen.append(a[0].reshape(-1, WIDTH)))
    for window in windows:
        seen.clear()
        with torch.no_grad():
            logits = model(window[None]).logits[0]
        nats += F.cross_entropy(logits[:-1], window[1:], reduction="none").tolist()
        for site, x, counter in zip(find_moe_layers(model), seen, choices):
            for row in gates_of(site.kind, site.router, logits_of(site.kind, site.router, x)):
                counter.update(row.keys())
    return choices, nats


def test_a_report_from_the_command_line(folder_of, book: Path, tmp_path: Path, capsys) -> None:
    """Counts, losses and sizes against the model itself; that bytes stood for tokens is said."""
    folder, out = folder_of("deepseek_v2"), tmp_path / "out"
    flags = ["--tokens", "100", "--batch", "3", "--context", "16", "--out", str(out), "-q"]
    assert run(["report", str(folder), "--text", str(book), *flags]) == 0
    said = capsys.readouterr()
    report = json.loads((out / "report.json").read_text())
    page = (out / "index.html").read_text()
    for place in (said.err, page, report["notes"][0]):
        assert "raw bytes stood for tokens" in place

    ids = torch.tensor(list(TEXT.encode()[:100]))
    model = ModelFolder.open(folder).load()
    choices, nats = counted_by_hand(model, list(ids.split(16)))
    (router,) = report["routing"]["routers"]
    assert (router["rows"], router["choices_per_row"]) == (100, 3)
    counts = router["counts"]["total"]["conditional"]["choices"][0]
    assert counts == [choices[0][e] for e in range(EXPERTS)]
    loss, metrics = sum(nats) / len(nats), report["metrics"]
    assert metrics["tokens predicted"] == len(nats) == 100 - 7  # nothing before a window
    assert metrics["loss per token (nats)"]["value"] == pytest.approx(loss, rel=1e-5)
    assert metrics["bits per token"]["value"] == pytest.approx(loss / math.log(2), rel=1e-5)
    assert metrics["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    total = sum(parameter.numel() for parameter in model.parameters())
    idle = EXPERTS * 3 * HIDDEN * WIDTH * (1 - 3 / EXPERTS)
    assert report["parameters"] == {"total": total, "active": total - idle}
    for printed in (
        "tokens predicted       93",
        str(out / "index.html"),
        "uses 3 of them for each",
    ):
        assert printed in said.out
    text = re.sub(r"<style>.*?</style>|<[^>]+>", "", page.split('id="run"')[0], flags=re.DOTALL)
    assert "bits per token" in text and not re.search("noise|classes|condition|samples", text)


@pytest.mark.parametrize("kind", ["olmoe", "diffusion_gemma"])
def test_experts_are_asked_about_rows_that_chose_them(folder_of, book: Path, kind: str) -> None:
    """One expert answers ten times as strongly: collapse, at its place, against plain products."""
    reading = Reading.prepare(folder_of(kind), book, tokens=64, context=32)
    model = reading.model
    site = find_moe_layers(model)[-1]
    calls: list[tuple[torch.Tensor, torch.Tensor]] = []
    with torch.no_grad():
        site.experts.down_proj[2].mul_(10.0)
    handle = site.experts.register_forward_pre_hook(lambda m, args: calls.append(args[:2]))
    data = reading.read()
    handle.remove()
    (found,) = (
        answers
        for place, answers in data.answers.items()
        if (place.slot, place.layer) == (site.slot, site.layer)
    )
    gate, up, down = (part.detach().double() for part in site.expert(2))
    rows = [h[(ids == 2).any(1)][:ROWS].double() for h, ids in calls]
    x = torch.cat(rows)
    inner = F.silu(x @ gate.T) if kind == "olmoe" else F.gelu(x @ gate.T, approximate="tanh")
    scale = float((inner * (x @ up.T) @ down.T).square().mean().sqrt())
    assert found.rows[2] == len(x) > 0
    assert found.scale[2] == pytest.approx(scale, rel=1e-3)
    assert found.scale.argmax() == 2
    assert len(data.answers) == len(find_moe_layers(model))


def test_a_tokenizer_is_used_and_begins_every_window(folder_of, book: Path, tmp_path) -> None:
    """Every token of the text is counted and predicted once, padding never."""
    folder = edited(folder_of("qwen2_moe"), tmp_path / "model")
    add_tokenizer(folder)
    book.write_text(TEXT + " Nobody reads as far as that." * 100, encoding="utf-8")
    reading = Reading.prepare(folder, book, tokens=90, batch=3, context=17)
    data = reading.read()
    ids = ModelFolder.open(folder).tokenizer()(TEXT, add_special_tokens=False)["input_ids"][:90]
    cut = [torch.tensor([0, *ids[first : first + 16]]) for first in range(0, 90, 16)]
    choices, nats = counted_by_hand(ModelFolder.open(folder).load(), cut)
    assert len(nats) == 90  # the first of a window from <s>
    assert data.trace is not None and data.notes == ()
    for router, counter in zip(data.trace.routers, choices, strict=True):
        assert router.rows[0] == 96
        assert router.counts[0].tolist() == [counter[e] for e in range(EXPERTS)]
    assert data.metrics["loss per token (nats)"]["value"] == pytest.approx(sum(nats) / 90, rel=1e-5)
    assert data.metrics["tokens predicted"] == 90


def test_batches_do_not_change_what_is_measured(folder_of, book: Path) -> None:
    found = []
    for batch in (1, 5):
        reading = Reading.prepare(
            folder_of("deepseek_v3"), book, tokens=200, batch=batch, context=24
        )
        done: list[int] = []
        data = reading.read(done.append)
        (router,) = data.trace.routers  # type: ignore[union-attr]
        found.append((data.metrics, router.counts, router.positions.rows, sum(done)))
    assert found[0][3] == found[1][3] == 9
    assert (found[0][1] == found[1][1]).all() and (found[0][2] == found[1][2]).all()
    assert found[0][0]["perplexity"] == pytest.approx(found[1][0]["perplexity"], rel=1e-4)
    assert found[0][0]["tokens predicted"] == 200 - 9
    assert found[0][2][0].tolist() == [9.0] * 8 + [8.0] * 16


def test_a_block_diffusion_model_is_read_at_every_noise_level(folder_of, book: Path) -> None:
    reading = Reading.prepare(folder_of("diffusion_gemma"), book, tokens=420, context=20)
    assert len(reading.windows) == 21 and reading.blocks is not None
    assert reading.blocks.canvas == 8
    data = reading.read()
    assert data.trace is not None
    slots = {(r.place.slot, r.place.layer): r for r in data.trace.routers}
    assert set(slots) == {(s, i) for s in ("encoder", "decoder") for i in (0, 1)}
    decoder, encoder = slots["decoder", 0], slots["encoder", 0]
    assert decoder.rows[0] == 21 * 8 and encoder.rows[0] == 21 * 12
    assert decoder.noise.rows[0].tolist() == [24.0] + [16.0] * 9
    assert not encoder.noise.rows.any()
    assert [row["count"] for row in data.loss_bins] == [3] + [2] * 9
    assert [row["lo"] for row in data.loss_bins] == pytest.approx([i / 10 for i in range(10)])
    told = data.metrics["decoder, token on the noised canvas"]
    assert told["tokens predicted"] == 21 * 8
    mean = sum(row["loss"] * row["count"] for row in data.loss_bins) / 21
    assert told["bits per token"]["value"] == pytest.approx(mean)
    assert data.metrics["encoder, next token"]["tokens predicted"] == 21 * 11


def test_a_canvas_needs_a_few_tokens(folder_of, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("abcd")
    data = Reading.prepare(folder_of("diffusion_gemma"), short).read()
    told = [entry["tokens predicted"] for entry in data.metrics.values()]
    assert told == [1, 2]
    with pytest.raises(DataError, match=r"tokens of a window: 3 is not allowed; allowed: 4 or"):
        Reading.prepare(folder_of("diffusion_gemma"), short, tokens=3)


def test_the_noise_on_a_canvas_is_what_it_is_said_to_be(folder_of, book: Path) -> None:
    reading = Reading.prepare(folder_of("diffusion_gemma"), book, tokens=420, context=20)
    assert reading.blocks is not None
    canvas = torch.full((1000, 30), 7)
    noised = reading.blocks.noised(canvas, range(1000), WORDS)
    changed = (noised != canvas).float().mean(1)
    for level in range(10):
        share = (level + 0.5) / 10 * (1 - 1 / WORDS)
        assert changed[level::10].mean() == pytest.approx(share, abs=0.03)
    assert torch.equal(reading.blocks.noised(canvas[3:5], range(3, 5), WORDS), noised[3:5])
    assert noised.min() >= 0 and noised.max() < WORDS


def test_a_dry_run_tells_sizes_and_minutes(folder_of, book: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    argv = ["report", str(folder_of("mixtral")), "--text", str(book), "--out", str(out), "-n"]
    assert run([*argv, "--json", "--tokens", "500", "--context", "20"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["model"], told["experts"], told["top_k"]) == ("mixtral", EXPERTS, 3)
    assert (told["tokens"], told["context"], told["windows"]) == (500, 20, 25)
    assert told["raw_bytes"] is True and told["projected_minutes"] >= 0
    assert told["parameters_total"] > told["parameters_active"] > 0
    assert not out.exists()


def test_a_model_that_is_not_understood_is_not_reported(folder_of, book: Path, monkeypatch) -> None:
    reading = Reading.prepare(folder_of("olmoe"), book, tokens=60)
    load = ModelFolder.load

    def other(self: ModelFolder, *args: Any) -> Any:
        model = load(self, *args)
        site = find_moe_layers(model)[1]
        site.experts.register_forward_hook(lambda m, a, out: out * 1.1)
        return model

    monkeypatch.setattr(ModelFolder, "load", other)
    with pytest.raises(MismatchError, match="not computed as olmoe layers are known to be"):
        reading.read()


def test_a_model_too_large_for_the_machine_is_told_its_size(
    folder_of, book: Path, monkeypatch
) -> None:
    reading = Reading.prepare(folder_of("olmoe"), book, tokens=60)
    monkeypatch.setattr(ModelFolder, "weight_bytes", lambda self: 2**50)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    told = reading.measure()
    assert told["projected_minutes"] is None and "1,048,576.0 GiB" in told["note"]
    with pytest.raises(ConfigError, match=r"its weights take 1,048,576\.0 GiB, this machine has"):
        reading.read()


def edited(source: Path, target: Path, **changes: Any) -> Path:
    """A copy of a model's folder with another configuration."""
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((target / "config.json").read_text())
    for name, value in changes.items():
        config[name] = value
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"model_type": "novel"}, ConfigError, "model_type 'novel' is unknown to this version"),
        (
            {"model_type": "novel", "auto_map": {"AutoConfig": "x.Y"}},
            ConfigError,
            "code of its own",
        ),
        ({"quantization_config": {"quant_method": "fp8"}}, ConfigError, "quantised weights"),
        ({"model_type": "llama"}, ConfigError, "says num_experts=8, but no layer has a structure"),
        ({"num_hidden_layers": 3}, CheckpointError, r"missing tensor model\.layers\.2\."),
        ({"num_experts": 16}, CheckpointError, r"wrong shape of tensor .* \[8, 16, 12\] for \[16"),
        ({"num_experts_per_tok": 9}, ConfigError, r"select\.k: 9 is not allowed"),
        ({"vocab_size": 200}, ConfigError, "vocabulary of 200 has no place for 256 bytes"),
    ],
)
def test_folders_that_do_not_fit_are_refused(
    folder_of, book: Path, tmp_path: Path, changes: dict, error: type[Exception], match: str
) -> None:
    folder = edited(folder_of("olmoe"), tmp_path / "model", **changes)
    with pytest.raises(error, match=match) as raised:
        Reading.prepare(folder, book, tokens=60).read()
    assert "\n" not in str(raised.value)


def test_damaged_and_missing_files_are_named(folder_of, book: Path, tmp_path: Path) -> None:
    folder = edited(folder_of("olmoe"), tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:3000])
    with pytest.raises(CheckpointError, match="could not be loaded"):
        Reading.prepare(folder, book).read()
    weights.rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors files; pickled weights"):
        Reading.prepare(folder, book)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00001.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"model-00001\.safetensors: missing, but listed in"):
        Reading.prepare(folder, book)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: not valid JSON"):
        Reading.prepare(folder, book)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: missing; not the folder of a model"):
        Reading.prepare(folder, book)


def test_a_tokenizer_of_another_model_is_refused(folder_of, book: Path, tmp_path: Path) -> None:
    folder = edited(folder_of("olmoe"), tmp_path / "model")
    add_tokenizer(folder)
    text = (folder / "tokenizer.json").read_text()
    table = json.loads(text)
    table["model"]["vocab"]["expert"] = WORDS + 5
    (folder / "tokenizer.json").write_text(json.dumps(table))
    with pytest.raises(DataError, match=r"token: 305 is not allowed; allowed: 0\.\.299"):
        Reading.prepare(folder, book)
    latin = tmp_path / "latin.txt"
    latin.write_bytes("naïve".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.txt: not UTF-8 text"):
        Reading.prepare(folder, latin)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["{model}"], "--text: missing;"),
        (["{model}", "--text", "{none}"], "none.txt: cannot be read (No such file or directory)"),
        (["{model}", "--text", "{blank}"], "blank.txt: no text in it"),
        (["{model}", "--text", "{short}"], "short.txt: 1 tokens; at least 2 are needed"),
        (["{model}", "--text", "{book}", "--context", "65"], "context: 65 is not allowed"),
        (["{model}", "--text", "{book}", "--context", "1"], "allowed: 2..64; room to predict"),
        (["{model}", "--text", "{book}", "--out", "{book}/x"], "Not a directory; choose another"),
        (["{none}", "--text", "{book}"], "none.txt: no such folder"),
        (["{empty}", "--text", "{book}"], "--text: only for the folder of a Hugging Face model"),
        (["{empty}", "-n"], "--dry-run: only for the folder of a Hugging Face model"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    folder_of, book: Path, tmp_path: Path, capsys, argv: list[str], said: str
) -> None:
    places = {"model": folder_of("olmoe"), "book": book}
    places |= {name: tmp_path / f"{name}.txt" for name in ("none", "blank", "short")}
    places["blank"].write_text(" \n")
    places["short"].write_text("a")
    places["empty"] = tmp_path / "empty"
    places["empty"].mkdir()
    assert run(["report", *(part.format(**places) for part in argv)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert said in lines[-1] and lines[-1].startswith("error: ")


def test_a_missing_library_is_named(monkeypatch, book: Path, tmp_path: Path) -> None:
    import importlib.metadata

    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ConfigError, match=r"not installed; pip install 'coterie\[interop\]'"):
        Reading.prepare(tmp_path, book)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "5.4.0")
    with pytest.raises(
        ConfigError, match=r"transformers: '5\.4\.0' is not allowed; allowed: 5\.18"
    ):
        Reading.prepare(tmp_path, book)
