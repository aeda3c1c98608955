"""Dense language models of Hugging Face become mixtures of experts that answer the same."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from coterie.convert import Preserved, UpcycleConfig, compare
from coterie.core.errors import CheckpointError, ConfigError
from coterie.core.tensors import module_tensors
from coterie.interop.upcycled import (
    aux_losses,
    find_networks,
    load_upcycled,
    plan_directory,
    save_upcycled,
    tapped,
    upcycle_directory,
    upcycle_transformers,
    upcycled_networks,
)

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {"vocab_size": 64, "n_embd": 16, "n_inner": 24, "n_layer": 3, "n_head": 2, "n_positions": 64}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", SIZES),
    "qwen2": ("Qwen2Config", SIZES),
    "qwen3": ("Qwen3Config", {**SIZES, "head_dim": 8}),
    "mistral": ("MistralConfig", SIZES),
    "gemma": ("GemmaConfig", {**SIZES, "head_dim": 8}),
    "gemma3": ("Gemma3TextConfig", {**SIZES, "head_dim": 8}),
    "gpt2": ("GPT2Config", {**GPT2, "bos_token_id": 1, "eos_token_id": 2}),
    "phi": ("PhiConfig", SIZES),
    "gpt_neox": ("GPTNeoXConfig", {**SIZES, "hidden_act": "gelu_new"}),
}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "mixtral": ("MixtralConfig", {}, r"model\.layers\.0\.mlp\.experts.*holds experts already"),
    "phi3": ("Phi3Config", {}, r"model: 'Phi3ForCausalLM' .*gate_proj, up_proj, down_proj"),
    "biases": ("LlamaConfig", {"mlp_bias": True}, r"layers\.0\.mlp: 'gate_proj\.bias'"),
    "relu": ("LlamaConfig", {"hidden_act": "relu"}, r"mlp: activation: 'ReLU' .*silu, gelu"),
    "exact gelu": ("GPTNeoXConfig", {"hidden_act": "gelu"}, r"activation: 'gelu' .*gelu_tanh"),
}
IDS = torch.randint(3, 64, (3, 20), generator=torch.Generator().manual_seed(0))
CONFIG = UpcycleConfig(copies=3, slices=2)


def make(name: str, fields: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, name)(**fields)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:  # as large as in a trained model: differences must show
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def dense(family: str) -> Any:
    return make(*FAMILIES[family])


@cache
def upcycled(family: str) -> tuple[Any, Tensor, Preserved]:
    """Model, its logits, and how they compare with those of the dense one."""
    model = dense(family)
    with torch.no_grad():
        before = model(IDS).logits
        upcycle_transformers(model, CONFIG, lambda given: given(IDS))
        with tapped(model) as routings:
            after = model(IDS).logits
    return model, after, compare(before, after, routings, CONFIG.slices)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_dense_model(family: str) -> None:
    model, logits, found = upcycled(family)
    assert found.relative_error < 1e-5 and found.whole_copies == 1.0
    assert float(logits.std()) > 0.1, "logits that say something"
    assert len(found.load_cv) == len(upcycled_networks(model)) == 3
    assert all(isinstance(cv, float) and cv < 1.0 for cv in found.load_cv)


@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2"])
def test_a_saved_model_loads_to_the_same_logits(family: str, tmp_path: Path) -> None:
    model, logits, _ = upcycled(family)
    path = save_upcycled(model, tmp_path / "experts", upcycle=CONFIG)
    again = load_upcycled(path)
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, logits)
    own, old = module_tensors(again), module_tensors(model)
    assert own.keys() == old.keys() and all(torch.equal(own[name], old[name]) for name in own)
    assert not again.training
    with pytest.raises(CheckpointError, match="a path that does not exist"):
        save_upcycled(model, path)


def test_it_generates_token_by_token_as_it_reads() -> None:
    """Routing does not depend on what else is in the batch: a cache of keys changes nothing."""
    model, _, _ = upcycled("llama")
    with torch.no_grad():
        text = model.generate(IDS[:1], max_new_tokens=5, do_sample=False)
        whole = model(text).logits[0, -2].argmax()
    assert text.shape == (1, 25) and int(whole) == int(text[0, -1])


def test_lower_precision_keeps_routers_in_float32(tmp_path: Path) -> None:
    model = make(*FAMILIES["llama"], dtype=torch.bfloat16)
    with torch.no_grad():
        before = model(IDS).logits
        upcycle_transformers(model, CONFIG)
        after = model(IDS).logits
    for network in upcycled_networks(model).values():
        assert network.layer.router(0).score.proj.weight.dtype == torch.float32
        assert network.layer.pool.stacks()["down"].dtype == torch.bfloat16
    assert compare(before, after).relative_error < 0.05, "bfloat16 itself is as far off"
    again = load_upcycled(save_upcycled(model, tmp_path / "experts"))
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, after)


def test_only_the_named_networks_are_replaced() -> None:
    model = upcycle_transformers(dense("llama"), CONFIG.replace(layers=(0, 2)))
    assert sorted(upcycled_networks(model)) == ["model.layers.0.mlp", "model.layers.2.mlp"]
    assert [network.index for network in upcycled_networks(model).values()] == [0, 2]
    with pytest.raises(ConfigError, match="holds experts already"):
        upcycle_transformers(model, CONFIG)


@pytest.mark.parametrize("case", REFUSED)
def test_what_we_cannot_state_is_refused_by_name(case: str) -> None:
    name, fields, message = REFUSED[case]
    model = make(name, {**SIZES, **fields})
    before = set(dict(model.named_modules()))
    with pytest.raises(ConfigError, match=message):
        upcycle_transformers(model, CONFIG)
    assert set(dict(model.named_modules())) == before, "nothing is changed"


def test_a_network_that_does_more_than_its_structure_says_is_refused() -> None:
    model = dense("llama")
    network = model.model.layers[1].mlp
    plain = network.forward
    network.forward = lambda x: 1.01 * plain(x)
    with pytest.raises(ConfigError, match=r"layers\.1\.mlp: 'LlamaMLP' .*differs from it by 0\.0"):
        find_networks(model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": (3,)}, r"layers: \(3,\) .*networks 0\.\.2"),
        ({"slices": 5}, r"slices: 5 .*a divisor of the inner size 24"),
    ],
)
def test_settings_that_do_not_fit_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        upcycle_transformers(dense("llama"), CONFIG.replace(**changes))


def test_balance_losses_reach_the_routers_in_training() -> None:
    model = upcycle_transformers(dense("gpt2"), CONFIG).train()
    with tapped(model) as routings:
        loss = model(IDS, labels=IDS).loss
    aux = aux_losses(model, routings)
    assert [(item.name, item.layer) for item in aux] == [("switch", layer) for layer in range(3)]
    (loss + sum(item.weight * item.value for item in aux)).backward()
    for network in upcycled_networks(model).values():
        assert network.dropout == pytest.approx(0.1)
        rows = network.layer.router(0).score.proj.weight
        assert rows.grad is not None and (rows.grad.abs().sum(dim=1) > 0).all()
    with tapped(model) as later:
        pass
    assert later == [] and len(routings) == 3, "nothing is kept outside the block"


# Folders


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "dense"
    dense("llama").save_pretrained(path)
    return path


def test_a_folder_becomes_a_folder(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "experts"
    steps: list[int] = []
    found = upcycle_directory(folder, out, CONFIG, progress=steps.append)
    assert found.holds and steps == [1, 1, 1]
    planned = plan_directory(folder, CONFIG)
    model = load_upcycled(out)
    assert planned["blocks"] == 3
    total = sum(parameter.numel() for parameter in model.parameters())
    assert planned["after"]["parameters_total"] == total
    router = 3 * 6 * 16
    assert planned["after"]["parameters_active"] == (
        planned["before"]["parameters_active"] + router
    )
    told = json.loads((out / "upcycled.json").read_text(encoding="utf-8"))
    assert told["source"] == str(folder) and len(told["source_digest"]) == 64
    assert UpcycleConfig.from_dict(told["upcycle"]) == CONFIG
    with pytest.raises(CheckpointError, match="a path that does not exist"):
        upcycle_directory(folder, out, CONFIG)
    with pytest.raises(ConfigError, match="it is upcycled already"):
        upcycle_directory(out, tmp_path / "again", CONFIG)


def test_a_damaged_or_foreign_folder_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"manifest\.json: missing"):
        load_upcycled(folder)
    with pytest.raises(CheckpointError, match="not a causal language model"):
        upcycle_directory(tmp_path, tmp_path / "out", CONFIG)
    out = tmp_path / "experts"
    upcycle_directory(folder, out, CONFIG)
    weights = out / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged"):
        load_upcycled(out)
