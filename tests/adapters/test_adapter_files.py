"""Adapter folders: what is written is read, by us and by PEFT; what is wrong is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from coterie.adapters import (
    BasisConfig,
    LoraConfig,
    LowRank,
    adapters_of,
    attach,
    load_adapter,
    read_adapter,
    save_adapter,
)
from coterie.core.errors import CheckpointError, ConfigError
from coterie.core.tensors import tensors_digest

PLAIN = LoraConfig(targets=("*",), rank=2, alpha=6, embeddings=("table",), rows=(1, 3))
PLACED = LoraConfig(targets=("*",), rank=2, basis=BasisConfig(seed=7, index=1))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.table = nn.Embedding(5, 8)
            self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
            self.inner = nn.ModuleDict({"up": nn.Linear(8, 16)})

    def forward(self, x: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.inner["up"](self.conv(x).mean((2, 3)) + self.table(label))
        return y


def ask(model: nn.Module) -> torch.Tensor:
    x = torch.randn(5, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        answer: torch.Tensor = model(x, torch.arange(5))
    return answer


def trained(config: LoraConfig) -> Net:
    net = Net()
    attach(net, "mine", config)
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for part in adapters_of(net)["mine"].values():
            for parameter in part.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=rng))
    return net


@pytest.mark.parametrize("config", [PLAIN, PLACED, PLACED.replace(rank_scaling=True, alpha=3)])
def test_a_folder_gives_the_same_adapter_back(tmp_path: Path, config: LoraConfig) -> None:
    net, again = trained(config), Net()
    save_adapter(net, "mine", tmp_path / "a", base="runs/base")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    parts = load_adapter(again, "theirs", tmp_path / "a")
    torch.testing.assert_close(ask(again), ask(net), rtol=1e-6, atol=1e-6)
    made = next(part.config for part in parts.values() if isinstance(part, LowRank))
    assert (made.scale, made.basis, made.rank) == (config.scale, config.basis, 2)
    with pytest.raises(CheckpointError, match="does not exist"):
        save_adapter(net, "mine", tmp_path / "a")
    save_adapter(net, "mine", tmp_path / "a", overwrite=True)


def test_peft_reads_ours_and_we_read_theirs(tmp_path: Path) -> None:
    peft: Any = pytest.importorskip("peft")
    net = trained(PLAIN)
    save_adapter(net, "mine", tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(Net(), str(tmp_path / "ours"))
    torch.testing.assert_close(ask(theirs), ask(net), rtol=1e-5, atol=1e-5)
    placed = trained(PLACED)
    save_adapter(placed, "mine", tmp_path / "placed")
    again = peft.PeftModel.from_pretrained(Net(), str(tmp_path / "placed"))
    torch.testing.assert_close(ask(again), ask(placed), rtol=1e-5, atol=1e-5)
    config = peft.LoraConfig(
        r=2, lora_alpha=3, target_modules=["up", "conv"], trainable_token_indices={"table": [0, 2]}
    )
    made = peft.get_peft_model(Net(), config)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    made.save_pretrained(str(tmp_path / "theirs"))
    ours = Net()
    load_adapter(ours, "theirs", tmp_path / "theirs")
    torch.testing.assert_close(ask(ours), ask(made.eval()), rtol=1e-5, atol=1e-5)


def of_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def of_weights(change: Callable[[dict[str, torch.Tensor]], Any], header: Any = None) -> Any:
    def apply(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        told = json.loads(read_header(path).get("coterie", "{}"))
        told.pop("sha256", None)  # as another library would write it
        change(tensors)
        save_file(tensors, path, {"coterie": json.dumps(told), **(header or {})})

    return apply


def read_header(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


UP = "base_model.model.inner.up.lora_B.weight"
DOWN = "base_model.model.inner.up.lora_A.weight"
OTHER = {"coterie": json.dumps({"basis": {"seed": 7, "index": 1}, "basis_hash": "0123"})}
SHIFTED = {
    "coterie": json.dumps(
        {"basis": {"seed": 7, "index": 0}, "basis_hash": BasisConfig(seed=7).hash}
    )
}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (of_config(peft_type="LOHA"), "peft_type, bias: .*LOHA"),
        (of_config(use_dora=True), "use_dora: True"),
        (of_config(r="many"), r"rank"),
        (of_config(trainable_token_indices={"table": [1]}), r"tables: \[\] .*table"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "not valid JSON"),
        (lambda folder: (folder / "adapter_config.json").unlink(), "no adapter configuration"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"x"), "safetensors"),
        (of_weights(lambda t: t[UP].fill_(float("nan"))), r"lora_B\.weight holds NaN"),
        (of_weights(lambda t: t.pop(UP)), r"modules: \['inner\.up'\] .*for each"),
        (of_weights(lambda t: t.update(stray=t[UP].clone())), r"tensor: 'stray'"),
        (of_weights(lambda t: t.update({UP: t[UP][:5].clone()})), r"inner\.up: .*\(5, 2\)"),
        (
            of_weights(
                lambda t: t.update(
                    {
                        UP.replace("inner.up", "inner.out"): t.pop(UP),
                        DOWN.replace("inner.up", "inner.out"): t.pop(DOWN),
                    }
                )
            ),
            r"module: 'inner\.out' .*did you mean 'inner\.up'",
        ),
        (of_weights(lambda t: None, OTHER), r"basis hash: '0123' .*allowed: \w{16}"),
        (of_weights(lambda t: None, SHIFTED), r"not slot 0 of the basis that it names"),
        (of_weights(lambda t: t[DOWN].mul_(1.1)), r"inner\.up: the fixed factor differs"),
    ],
)
def test_damage_is_named_and_the_network_stays_as_it_was(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    save_adapter(trained(PLACED), "mine", tmp_path / "a")
    damage(tmp_path / "a")
    net = Net()
    with pytest.raises(CheckpointError, match=message):
        load_adapter(net, "a", tmp_path / "a")
    assert not adapters_of(net) and torch.equal(ask(net), ask(Net()))


def test_a_file_of_another_basis_does_not_join(tmp_path: Path) -> None:
    other = PLACED.replace(basis=BasisConfig(seed=8))
    save_adapter(trained(other), "mine", tmp_path / "a")
    net = trained(PLACED)
    with pytest.raises(ConfigError, match=r"a\.basis: .*one basis"):
        load_adapter(net, "a", tmp_path / "a")
    assert list(adapters_of(net)) == ["mine"]


def test_what_is_not_finite_is_not_written(tmp_path: Path) -> None:
    net = trained(PLAIN)
    part = adapters_of(net)["mine"]["conv"]
    assert isinstance(part, LowRank)
    part.up.data[0, 0] = float("inf")
    with pytest.raises(CheckpointError, match=r"conv\.lora_B\.weight holds NaN or infinity"):
        save_adapter(net, "mine", tmp_path / "a")
    with pytest.raises(ConfigError, match=r"adapter: 'his' .*allowed: mine"):
        save_adapter(net, "his", tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_folder_is_read_without_a_model(tmp_path: Path) -> None:
    save_adapter(trained(PLACED), "mine", tmp_path / "a")
    found = read_adapter(tmp_path / "a")
    assert found.config.basis == PLACED.basis and set(found.factors) == {"conv", "inner.up"}


@pytest.mark.parametrize(
    "change",
    [
        of_config(lora_alpha=9),
        of_config(use_rslora=True),
        of_config(alpha_pattern={"up": 3}),
        of_config(alpha_pattern={"nowhere": float("nan")}),
        of_config(target_modules=["other"]),
        of_config(base_model_name_or_path="moved", peft_version="1"),
    ],
)
def test_H_settings_of_an_adapter_are_hashed_with_its_weights(
    change: Callable[[Path], None], tmp_path: Path
) -> None:
    net = Net()
    attach(net, "mine", PLAIN)
    save_adapter(net, "mine", tmp_path / "a")
    config = tmp_path / "a" / "adapter_config.json"
    before = json.loads(config.read_text())
    change(tmp_path / "a")
    told = json.loads(config.read_text())
    if told["base_model_name_or_path"] == "moved":  # where the base lies changes no answer
        read_adapter(tmp_path / "a")
        return
    with pytest.raises(CheckpointError, match=r"damaged, its SHA-256 .*adapter_config\.json"):
        read_adapter(tmp_path / "a")
    config.write_text(json.dumps(before))  # said otherwise, it is the same
    read_adapter(tmp_path / "a")
    change(tmp_path / "a")
    of_weights(lambda tensors: None)(tmp_path / "a")
    read_adapter(tmp_path / "a")  # a file of others has no hash


@pytest.mark.parametrize("lost", [b"coterie", b"sha256"])
def test_H_an_adapter_that_lost_a_mark_is_still_checked(lost: bytes, tmp_path: Path) -> None:
    net = Net()
    attach(net, "mine", PLACED)
    save_adapter(net, "mine", tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes().replace(lost, b"_" + lost[1:], 1))
    of_config(lora_alpha=9)(tmp_path / "a")
    with pytest.raises(CheckpointError, match="damaged, its SHA-256"):
        read_adapter(tmp_path / "a")


def test_H_an_adapter_whose_weights_alone_were_hashed_is_read(tmp_path: Path) -> None:
    net = Net()
    attach(net, "mine", PLAIN)
    save_adapter(net, "mine", tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(path)
    hashed = tensors_digest({name: tensors[name] for name in sorted(tensors)})
    save_file(tensors, path, {"coterie": json.dumps({"sha256": hashed})})
    assert read_adapter(tmp_path / "a").config.rank == 2
    of_weights(lambda tensors: None, {"coterie": json.dumps({"sha256": "0" * 64})})(tmp_path / "a")
    with pytest.raises(CheckpointError, match="damaged"):
        read_adapter(tmp_path / "a")
