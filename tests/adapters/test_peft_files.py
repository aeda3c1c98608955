"""Folders that PEFT writes: read as PEFT reads them, written as it reads them, or refused by name.

The sums are written out here from PEFT's own definitions: the module's weight plus
``lora_alpha / r`` B A with r and alpha of the first pattern that is the module's path or its end,
biases and whole modules in the place of the network's. PEFT 0.21 gives the same numbers.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from coterie.adapters import (
    LoraConfig,
    adapters_of,
    attach,
    load_adapter,
    merge,
    read_adapter,
    save_adapter,
)
from coterie.core.errors import CheckpointError, ConfigError

WEIGHTS, CONFIG, BASE = "adapter_model.safetensors", "adapter_config.json", "base_model.model."
X = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
LABEL = torch.arange(5)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.table = nn.Embedding(5, 8)
            self.inner = nn.ModuleDict({"up": nn.Linear(8, 16), "down": nn.Linear(16, 8)})
            self.norm = nn.BatchNorm1d(8)
            self.head = nn.Sequential(nn.Linear(8, 4), nn.LayerNorm(4))
        self.eval()

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        y: Tensor = self.inner["down"](self.inner["up"](x + self.table(label)))
        answer: Tensor = self.head(self.norm(y))
        return answer


def ask(net: nn.Module) -> Tensor:
    with torch.no_grad():
        answer: Tensor = net(X, LABEL)
    return answer


def folder_of(path: Path, ranks: dict[str, int], extra: dict[str, Tensor], **words: Any) -> Path:
    """A folder as PEFT writes it: factors of ``ranks`` and further tensors."""
    rng = torch.Generator().manual_seed(3)
    tensors, layers = {}, dict(Net().named_modules())
    for name, rank in ranks.items():
        outputs, inputs = layers[name].weight.shape  # type: ignore[union-attr, misc]
        tensors[f"{BASE}{name}.lora_A.weight"] = torch.randn(rank, inputs, generator=rng) / 3
        tensors[f"{BASE}{name}.lora_B.weight"] = torch.randn(outputs, rank, generator=rng) / 3
    path.mkdir()
    save_file(tensors | {BASE + name: value for name, value in extra.items()}, path / WEIGHTS)
    given = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "bias": "none", "peft_version": "0.21.2"}
    given |= {"target_modules": list(ranks), "init_lora_weights": True, "task_type": None, **words}
    (path / CONFIG).write_text(json.dumps(given))
    return path


def expected(path: Path, scales: dict[str, float], whole: dict[str, Tensor]) -> Tensor:
    """The network's answer with the sums and replacements written into its weights."""
    net, tensors = Net(), load_file(path / WEIGHTS)
    state = net.state_dict()
    for name, scale in scales.items():
        a, b = (tensors[f"{BASE}{name}.lora_{factor}.weight"] for factor in "AB")
        state[f"{name}.weight"] += scale * b @ a
    net.load_state_dict(state | whole)
    return ask(net)


def both_ways(path: Path, wanted: Tensor, tmp_path: Path) -> dict[str, Any]:
    """Read, merged, and written again and read: one answer. What was written of it."""
    net = Net()
    load_adapter(net, "theirs", path)
    plain = ask(Net())
    assert (wanted - plain).abs().max() > 0.1 * plain.abs().max()
    torch.testing.assert_close(ask(net), wanted, rtol=1e-5, atol=1e-5)
    again = Net()
    load_adapter(again, "ours", save_adapter(net, "theirs", tmp_path / "again"))
    torch.testing.assert_close(ask(again), wanted, rtol=1e-5, atol=1e-5)
    theirs, ours = (load_file(folder / WEIGHTS) for folder in (path, tmp_path / "again"))
    assert theirs.keys() == ours.keys()
    assert all(torch.allclose(theirs[name], ours[name], atol=1e-6) for name in theirs)
    merge(net)
    torch.testing.assert_close(ask(net), wanted, rtol=1e-4, atol=1e-5)
    words: dict[str, Any] = json.loads((tmp_path / "again" / CONFIG).read_text())
    return words


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"])
def test_A3_an_adapter_whose_training_moved_the_base_is_refused(start: str, tmp_path: Path) -> None:
    path = folder_of(tmp_path / "a", {"inner.up": 2}, {}, init_lora_weights=start)
    net = Net()
    match = rf"init_lora_weights: '{start}' .*True, False, None, gaussian, .*path_initial_model_for"
    with pytest.raises(CheckpointError, match=match):
        load_adapter(net, "a", path)
    assert not adapters_of(net)


@pytest.mark.parametrize("start", [True, False, None, "gaussian", "eva", "orthogonal"])
def test_A3_other_starts_leave_the_base_as_it_is(start: Any, tmp_path: Path) -> None:
    path = folder_of(tmp_path / "a", {"inner.up": 2}, {}, init_lora_weights=start)
    net = Net()
    load_adapter(net, "a", path)
    torch.testing.assert_close(ask(net), expected(path, {"inner.up": 1.5}, {}))


@pytest.mark.parametrize("field", ["use_dora", "kasa_config", "something_new"])
def test_A3_an_option_that_is_not_known_is_refused_by_name(field: str, tmp_path: Path) -> None:
    path = folder_of(tmp_path / "a", {"inner.up": 2}, {}, **{field: {"on": True}})
    with pytest.raises(CheckpointError, match=rf"{field}: .*allowed: none"):
        read_adapter(path)
    told = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(json.dumps({**told, field: None}))
    read_adapter(path)


@pytest.mark.parametrize("rooted", [False, True])
def test_D10_ranks_and_alphas_by_pattern(rooted: bool, tmp_path: Path) -> None:
    words = {
        "rank_pattern": {r"inner\.u.*": 4, "up": 1},
        "alpha_pattern": {"^inner.down": 8},
        "use_rslora": rooted,
    }
    path = folder_of(tmp_path / "a", {"inner.up": 4, "inner.down": 2, "head.0": 2}, {}, **words)

    def scale(alpha: float, rank: int) -> float:
        return alpha / (math.sqrt(rank) if rooted else rank)

    scales = {"inner.up": scale(3, 4), "inner.down": scale(8, 2), "head.0": scale(3, 2)}
    told = both_ways(path, expected(path, scales, {}), tmp_path)
    assert told["rank_pattern"] == {r"^inner\.up": 4}
    assert told["alpha_pattern"] == {r"^inner\.down": 8.0}


def test_D10_a_pattern_that_does_not_fit_the_weights_is_refused(tmp_path: Path) -> None:
    path = folder_of(tmp_path / "a", {"inner.up": 2}, {}, rank_pattern={"up": 4})
    with pytest.raises(CheckpointError, match=r"inner\.up: \(\(2, 8\), \(16, 2\)\) .*\(\(4, 8\)"):
        load_adapter(Net(), "a", path)
    for pattern, match in (({"(": 4}, "regular expressions"), ({"up": "x"}, "numbers by pattern")):
        path = folder_of(tmp_path / match[:3], {"inner.up": 2}, {}, rank_pattern=pattern)
        with pytest.raises(CheckpointError, match=rf"rank_pattern: .*{match}"):
            read_adapter(path)
    with pytest.raises(ConfigError, match=r"ranks: 'head.*' is not allowed; allowed: inner\.up"):
        attach(Net(), "a", LoraConfig(targets=("inner.up",), ranks={"head.*": 2}))
    with pytest.raises(ConfigError, match=r"ranks: .*none with a basis"):
        LoraConfig.from_dict({"ranks": {"up": 2}, "basis": {}})


@pytest.mark.parametrize("bias", ["lora_only", "all"])
@pytest.mark.parametrize("name", ["bias", "base_layer.bias"])
def test_D10_biases(bias: str, name: str, tmp_path: Path) -> None:
    up, down = torch.linspace(-1, 1, 16), torch.linspace(0, 1, 8)
    extra = {f"inner.up.{name}": up} | ({"inner.down.bias": down} if bias == "all" else {})
    path = folder_of(tmp_path / "a", {"inner.up": 2}, extra, bias=bias)
    whole = {"inner.up.bias": up} | ({"inner.down.bias": down} if bias == "all" else {})
    wanted = expected(path, {"inner.up": 1.5}, whole)
    if name == "bias":  # as older versions wrote it
        net = Net()
        load_adapter(net, "a", path)
        torch.testing.assert_close(ask(net), wanted, rtol=1e-5, atol=1e-5)
        return
    assert both_ways(path, wanted, tmp_path)["bias"] == bias
    told = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(json.dumps({**told, "bias": "none"}))
    with pytest.raises(CheckpointError, match=r"tensor: .*bias"):
        read_adapter(path)


def test_D10_whole_modules(tmp_path: Path) -> None:
    rng = torch.Generator().manual_seed(5)
    state = Net().state_dict()
    whole = {
        name: value + torch.rand(value.shape, generator=rng)
        if value.is_floating_point()
        else value + 7
        for name, value in state.items()
        if name.startswith(("head.", "norm."))
    }
    path = folder_of(tmp_path / "a", {"inner.up": 2}, whole, modules_to_save=["head", "norm"])
    told = both_ways(path, expected(path, {"inner.up": 1.5}, whole), tmp_path)
    assert told["modules_to_save"] == ["head.0", "head.1", "norm"]
    tensors = load_file(path / WEIGHTS)
    missing = {name: value for name, value in tensors.items() if "head.0.bias" not in name}
    save_file(missing, path / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"head\.0: \{'weight': \(4, 8\)\} is not allowed"):
        load_adapter(Net(), "a", path)
    told = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(json.dumps({**told, "modules_to_save": ["norm"]}))
    with pytest.raises(CheckpointError, match=r"tensor: 'base_model\.model\.head\."):
        read_adapter(path)


def test_D10_our_own_biases_and_copies_are_written(tmp_path: Path) -> None:
    net = Net()
    config = LoraConfig(
        targets=("inner.*",), rank=2, biases=("inner.up", "head.1"), copies=("norm", "head.0")
    )
    attach(net, "own", config)
    rng = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for part in adapters_of(net)["own"].values():
            for parameter in part.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=rng) / 3)
    again = Net()
    load_adapter(again, "read", save_adapter(net, "own", tmp_path / "a"))
    assert (ask(net) - ask(Net())).abs().max() > 0.1
    torch.testing.assert_close(ask(again), ask(net), rtol=1e-5, atol=1e-5)
    told = json.loads((tmp_path / "a" / CONFIG).read_text())
    assert (told["bias"], told["modules_to_save"]) == ("all", ["head.0", "norm"])


def test_D9_rows_of_the_one_table_as_a_list(tmp_path: Path) -> None:
    rows = torch.linspace(-2, 2, 16).view(2, 8)
    name = "table.token_adapter.trainable_tokens_delta"
    path = folder_of(tmp_path / "a", {}, {name: rows}, trainable_token_indices=[1, 3])
    table = Net().state_dict()["table.weight"].clone()
    table[[1, 3]] = rows
    net = Net()
    load_adapter(net, "a", path)
    torch.testing.assert_close(ask(net), expected(path, {}, {"table.weight": table}))
    wrong: list[tuple[Any, str]] = [
        ([1.5], r"trainable_token_indices: .*a list of rows, or one per table"),
        ({"table": 3}, r"trainable_token_indices: .*a list of rows, or one per table"),
        ("table", r"trainable_token_indices: .*a list of rows, or one per table"),
    ]
    for given, match in wrong:
        told = json.loads((path / CONFIG).read_text())
        (path / CONFIG).write_text(json.dumps({**told, "trainable_token_indices": given}))
        with pytest.raises(CheckpointError, match=match):
            read_adapter(path)
    path = folder_of(tmp_path / "b", {"inner.up": 2}, {}, trainable_token_indices=[1, 3])
    with pytest.raises(CheckpointError, match=r"indices: \[1, 3\] .*weights are of 0 tables"):
        read_adapter(path)


def test_D9_rows_of_a_tied_table_are_refused(tmp_path: Path) -> None:
    """PEFT changes them at both ends of the network."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.out = nn.Embedding(5, 8), nn.Linear(8, 5, bias=False)
            self.out.weight = self.table.weight

        def forward(self, ids: Tensor) -> Tensor:
            return F.relu(self.out(self.table(ids)))

    name = "table.token_adapter.trainable_tokens_delta"
    path = folder_of(tmp_path / "a", {}, {name: torch.ones(1, 8)}, trainable_token_indices=[1])
    with pytest.raises(CheckpointError, match=r"table: 'tied to out' is not allowed"):
        load_adapter(Tied(), "a", path)


def test_H_a_flipped_bit_in_an_adapter(tmp_path: Path) -> None:
    """Ours carry a hash: any bit of the weights. Those of others carry none and are read."""
    net = Net()
    attach(net, "own", LoraConfig(targets=("inner.*",), rank=2, embeddings=("table",), rows=(1,)))
    path = save_adapter(net, "own", tmp_path / "a") / WEIGHTS
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    for place in range(start, len(whole), 97):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"its SHA-256 does not|NaN or inf"):
            load_adapter(Net(), "a", path.parent)
    path.write_bytes(whole)
    load_adapter(Net(), "a", path.parent)
    with safe_open(path, framework="pt") as file:
        assert len(json.loads(file.metadata()["coterie"])["sha256"]) == 64
    save_file(load_file(path), path)  # as another library would write it
    load_adapter(Net(), "a", path.parent)
