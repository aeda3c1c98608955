"""Adapters: nothing changes at first, little is trained, sums are sums, bases are orthogonal."""

from __future__ import annotations

import copy
from itertools import permutations
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from coterie.adapters import (
    BasisConfig,
    LoraConfig,
    LowRank,
    adapters_of,
    attach,
    base_digest,
    capacity,
    detach,
    fold,
    merge,
    pairs,
    room,
    save_adapter,
    unmerge,
    weigh,
)
from coterie.core.config import Config
from coterie.core.errors import ConfigError
from coterie.core.tensors import module_tensors


class Net(nn.Module):
    """A convolution, a table and two maps."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.conv = nn.Conv2d(3, 6, 3, stride=2, padding=1)
            self.wise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
            self.table = nn.Embedding(5, 6)
            self.up = nn.Linear(6, 32)
            self.down = nn.Linear(32, 6)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        h = self.wise(self.conv(x)).mean((2, 3)) + self.table(label)
        return self.down(torch.tanh(self.up(h)))


def inputs(batch: int = 4) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, 8, 8, generator=rng), torch.arange(batch) % 5


def shared(index: int, rank: int = 2, **changes: object) -> LoraConfig:
    basis = BasisConfig.from_dict({"seed": 7, "index": index, **changes})
    return LoraConfig(targets=("up", "down", "conv"), rank=rank, basis=basis)


def wake(model: nn.Module, seed: int = 0) -> None:
    """Move every trained parameter of the adapters."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parts in adapters_of(model).values():
            for part in parts.values():
                for parameter in part.parameters():
                    parameter.add_(0.3 * torch.randn(parameter.shape, generator=rng))


PLAIN = LoraConfig(targets=("conv", "up", "down"), rank=3, embeddings=("table",), rows=(1, 3))


@pytest.mark.parametrize("config", [PLAIN, shared(1), shared(1, side="output")])
def test_nothing_changes_at_first_and_only_the_adapter_learns(config: LoraConfig) -> None:
    net, x = Net(), inputs()
    before = net(*x)
    frozen = {name: value.clone() for name, value in net.state_dict().items()}
    parts = attach(net, "a", config)
    assert torch.equal(net(*x), before)
    fixed = {path: [b.clone() for b in part.buffers()] for path, part in parts.items()}
    open_ = [p for p in net.parameters() if p.requires_grad]
    assert {id(p) for p in open_} == {id(p) for part in parts.values() for p in part.parameters()}
    optimizer = torch.optim.Adam(open_, lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        net(*x).square().sum().backward()
        optimizer.step()
    assert not torch.allclose(net(*x), before)
    for name, value in frozen.items():
        assert torch.equal(net.state_dict()[name], value), name
    for path, part in parts.items():
        assert all(torch.equal(a, b) for a, b in zip(part.buffers(), fixed[path], strict=True))
        assert all(b.grad is None for b in part.buffers())


def test_only_the_trained_factor_is_counted_and_stored() -> None:
    """n r per module with a basis, r (n + m) without; convolutions read channels times kernel."""
    sizes = {"up": (32, 6), "down": (6, 32), "conv": (6, 27)}
    net = Net()
    for name, part in attach(net, "a", shared(0)).items():
        assert sum(p.numel() for p in part.parameters()) == 2 * sizes[name][0]
    assert set(module_tensors(net)) == {f"{name}.adapters.parts.a.up" for name in sizes}
    net = Net()
    plain = LoraConfig(targets=("conv", "up", "down"), rank=3)
    for name, part in attach(net, "a", plain).items():
        assert sum(p.numel() for p in part.parameters()) == 3 * sum(sizes[name])


def test_merged_is_unmerged_in_any_order_and_costs_nothing() -> None:
    x, answers = inputs(), []
    for order in permutations(range(3)):
        net = Net()
        for index in order:
            attach(net, f"c{index}", shared(index), weight=0.5 + index)
            part = adapters_of(net)[f"c{index}"]
            rng = torch.Generator().manual_seed(index)
            for one in part.values():
                for parameter in one.parameters():
                    parameter.data = torch.randn(parameter.shape, generator=rng)
        apart = net(*x)
        weights = {n: v.clone() for n, v in net.state_dict().items() if "adapters" not in n}
        merge(net)
        torch.testing.assert_close(net(*x), apart, rtol=1e-5, atol=1e-5)
        answers.append(net(*x))
        unmerge(net)
        assert all(torch.equal(net.state_dict()[n], v) for n, v in weights.items())
        assert torch.equal(net(*x), apart)
        fold(net)
        assert torch.equal(net(*x), answers[-1])
        assert [*net.state_dict()] == [*Net().state_dict()]
        assert set(module_tensors(net)) == set(module_tensors(Net()))
    assert all(torch.equal(answer, answers[0]) for answer in answers)


def test_rows_of_a_table_are_added_and_merged() -> None:
    net, (x, label) = Net(), inputs(5)
    before = net(x, label)
    attach(net, "a", LoraConfig(targets=(), embeddings=("table",), rows=(3, 1)), weight=0.25)
    wake(net)
    after = net(x, label)
    moved = (after != before).any(1)
    assert moved.tolist() == [row in (1, 3) for row in label.tolist()]
    merge(net)
    torch.testing.assert_close(net(x, label), after)
    unmerge(net)
    weigh(net, {"a": 0.0})
    assert torch.equal(net(x, label), before)


def test_updates_in_slots_of_one_basis_do_not_touch() -> None:
    net = Net()
    for index in range(3):
        attach(net, f"c{index}", shared(index))
    wake(net)
    parts = [adapters_of(net)[f"c{index}"] for index in range(3)]
    for path in ("up", "down", "conv"):
        made = [part for one in parts if isinstance(part := one[path], LowRank)]
        assert len(made) == 3
        down, delta = [p.down for p in made], [p.delta().detach().flatten(1) for p in made]
        for i in range(3):
            torch.testing.assert_close(down[i] @ down[i].T, torch.eye(2), atol=1e-6, rtol=0)
            for j in set(range(3)) - {i}:
                assert float((down[i] @ down[j].T).abs().max()) < 1e-6
                assert float((delta[i] @ delta[j].T).abs().max()) < 1e-5
        total = sum(delta)
        assert isinstance(total, Tensor)
        parallel = sum(float(d.square().sum()) for d in delta)
        assert float(total.square().sum()) == pytest.approx(parallel, rel=1e-5)
        for i in range(3):  # each is recovered from the sum by its slot alone
            torch.testing.assert_close(total @ down[i].T, made[i].up.detach(), atol=1e-5, rtol=1e-5)
            x = torch.randn(4, 2) @ down[i]  # inputs in the span of slot i see adapter i only
            torch.testing.assert_close(x @ total.T, x @ delta[i].T, atol=1e-5, rtol=1e-5)
    for pair in pairs(adapters_of(net)):
        assert max(pair.overlap, pair.update_overlap, pair.cosine) < 1e-5


def test_plain_adapters_do_touch_and_the_output_side_keeps_outputs_apart() -> None:
    net = Net()
    for index in range(2):
        attach(net, f"c{index}", LoraConfig(targets=("up",), rank=3))
    wake(net)
    (pair,) = pairs(adapters_of(net))
    assert min(pair.overlap, pair.update_overlap, pair.cosine) > 1e-3
    net = Net()
    for index in range(2):
        attach(net, f"c{index}", shared(index, side="output"))
    wake(net)
    one, other = (adapters_of(net)[f"c{index}"]["up"] for index in range(2))
    assert isinstance(one, LowRank) and isinstance(other, LowRank)
    assert float((one.delta().T @ other.delta()).abs().max().detach()) < 1e-5
    assert float((one.delta() @ other.delta().T).abs().max().detach()) > 1e-3


def test_gaussian_bases_are_orthogonal_on_average() -> None:
    rank, width, count = 4, 64, 40
    rows = [
        BasisConfig(kind="gaussian", index=index).directions(width, rank) for index in range(count)
    ]
    products = [float((rows[i] @ rows[j].T).square().sum()) for i in range(count) for j in range(i)]
    assert sum(products) / len(products) == pytest.approx(rank**2 / width, rel=0.1)


def test_a_basis_is_a_function_of_its_seed_and_its_hash_says_so() -> None:
    basis = BasisConfig(seed=7)
    assert basis.hash == "e8612720ec8fb3cb"
    assert basis.replace(index=3).hash == basis.hash
    others = [basis.replace(seed=8), basis.replace(kind="gaussian"), basis.replace(side="output")]
    assert len({basis.hash, *(other.hash for other in others)}) == 4
    first = basis.directions(16, 4)
    assert torch.equal(first, BasisConfig(seed=7).directions(16, 4))
    assert not torch.allclose(first, basis.replace(seed=8).directions(16, 4))


def test_capacity_is_a_limit() -> None:
    """m * r never exceeds the width, in any module; gaussian bases have no limit."""
    assert capacity(BasisConfig(), 64, 16) == 4
    net = Net()
    assert room(attach(net, "a", shared(2))) == 3  # 6 // 2, of the map that reads 6
    with pytest.raises(ConfigError, match=r"basis\.index: 3 .*allowed: 0\.\.2; 3 adapters of rank"):
        attach(net, "b", shared(3))
    assert list(adapters_of(net)) == ["a"]
    attach(Net(), "b", shared(3, kind="gaussian"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoraConfig(rank=7), r"rank: 7 .*allowed: 1\.\.6; conv maps 27 to 6"),
        (LoraConfig(targets=("upp",)), r"targets: 'upp' .*allowed: conv, up, down"),
        (LoraConfig(targets=("wise",)), r"targets: 'wise' .*allowed: conv, up, down"),
        (
            LoraConfig(targets=(), embeddings=("table",), rows=(5,)),
            r"rows: 5 .*0\.\.4, the rows of table",
        ),
        (shared(0), r"b\.basis\.index: 0 .*it shares directions with 'a'"),
        (shared(1, rank=1), r"b\.basis\.index: 1 .*it shares directions with 'a'"),
        (shared(1, seed=8), r"b\.basis: '\w+' .*one basis .*'a' has basis \w+"),
        (shared(1, side="output"), r"b\.basis: '\w+' .*one basis"),
    ],
)
def test_what_does_not_go_is_refused_and_leaves_the_network_as_it_was(
    config: LoraConfig, message: str
) -> None:
    net, x = Net(), inputs()
    attach(net, "a", shared(0))
    wake(net)
    before, names = net(*x), [*net.state_dict()]
    with pytest.raises(ConfigError, match=message):
        attach(net, "b", config)
    assert [*net.state_dict()] == names and torch.equal(net(*x), before)


def test_names_are_unique_and_known() -> None:
    net = Net()
    attach(net, "a", PLAIN)
    with pytest.raises(ConfigError, match=r"adapter: 'a'"):
        attach(net, "a", PLAIN)
    with pytest.raises(ConfigError, match=r"adapter: 'b' .*allowed: a"):
        weigh(net, {"b": 1.0})


def test_each_sample_may_have_its_own_weights() -> None:
    """A batch of mixed weights is what each sample gives alone."""
    net, (x, label) = Net(), inputs()
    for index in range(2):
        attach(net, f"c{index}", shared(index))
    wake(net)
    gains = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 2.0], [0.0, 0.0]])
    weigh(net, {f"c{index}": gains[:, index] for index in range(2)})
    mixed = net(x, label)
    with pytest.raises(ConfigError, match=r"weights: 'per sample'"):
        merge(net)
    for row in range(4):
        weigh(net, {f"c{index}": float(gains[row, index]) for index in range(2)})
        alone = net(x[row : row + 1], label[row : row + 1])
        torch.testing.assert_close(mixed[row : row + 1], alone, rtol=1e-5, atol=1e-6)


def test_merging_is_guarded_and_survives_copies() -> None:
    net, x = Net(), inputs()
    attach(net, "a", PLAIN)
    wake(net)
    twin = copy.deepcopy(net)
    assert torch.equal(twin(*x), net(*x))
    merge(net)
    with pytest.raises(ConfigError, match="merged"):
        merge(net)
    with pytest.raises(ConfigError, match="merged"):
        weigh(net, {"a": 2.0})
    with pytest.raises(ConfigError, match="merged"):
        attach(net, "b", LoraConfig(targets=("up",)))
    unmerge(net)
    weigh(net, {"a": 2.0})
    assert not torch.allclose(twin(*x), net(*x))
    detach(net)
    assert torch.equal(net(*x), Net()(*x)) and not adapters_of(net)


def test_configurations_survive_json_and_refuse_nonsense() -> None:
    config: Config = shared(2)
    assert LoraConfig.from_json(config.to_json()) == config
    assert LoraConfig(rank=4, alpha=8).scale == 2 and LoraConfig(rank=9).scale == 1
    assert LoraConfig(rank=4, alpha=8, rank_scaling=True).scale == 4
    for bad in ({"rows": (1,)}, {"embeddings": ("t",), "rows": (1, 1)}, {"targets": ()}):
        with pytest.raises(ConfigError):
            LoraConfig.from_dict(bad)


def test_the_base_has_one_digest_whatever_is_put_on_it() -> None:
    net = Net()
    first = base_digest(net)
    attach(net, "a", PLAIN)
    wake(net)
    assert base_digest(net) == first
    merge(net)
    assert base_digest(net) != first
    unmerge(net)
    assert base_digest(net) == first == base_digest(Net())


class Normed(nn.Module):
    """A kernel, a norm with statistics and a map."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
            self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).mean((2, 3)))


COPIED = LoraConfig(targets=("conv",), conv="kernel", rank=2, biases=("conv",), copies=("norm",))


def test_kernels_biases_and_copies_start_as_the_network_and_merge() -> None:
    net, (x, _) = Normed().eval(), inputs()
    before = net(x)
    parts = attach(net, "a", COPIED, weight=1.0)
    assert torch.equal(net(x), before)
    conv = parts["conv"]
    assert isinstance(conv, LowRank) and conv.shift is not None
    assert (tuple(conv.up.shape), tuple(conv.down.shape)) == ((24, 6), (6, 9))
    wake(net)
    unmerged, weights = net(x), {n: v.clone() for n, v in net.state_dict().items()}
    assert not torch.allclose(unmerged, before)
    merge(net)
    torch.testing.assert_close(net(x), unmerged, rtol=1e-4, atol=1e-5)
    unmerge(net)
    assert all(torch.equal(net.state_dict()[name], v) for name, v in weights.items())
    fold(net)
    torch.testing.assert_close(net(x), unmerged, rtol=1e-4, atol=1e-5)


def test_one_copy_of_a_module_answers_at_a_time() -> None:
    net, (x, _) = Normed().eval(), inputs()
    for name in ("a", "b"):
        attach(net, name, COPIED, weight=0.0)
    wake(net)
    weigh(net, {"a": 1.0, "b": 1.0})
    with pytest.raises(ConfigError, match=r"weights\.b: 1\.0 .*one copy answers"):
        net(x)
    weights = {n: v.clone() for n, v in net.state_dict().items()}
    with pytest.raises(ConfigError, match=r"weights\.b: 1\.0"):
        merge(net)
    assert all(torch.equal(net.state_dict()[name], v) for name, v in weights.items())
    weigh(net, {"b": 0.0})
    merge(net)


def test_peft_has_no_word_for_kernels(tmp_path: Path) -> None:
    """For biases and copies it has: tests/adapters/test_peft_files.py."""
    net = Normed()
    attach(net, "a", COPIED.replace(conv="kernel"))
    with pytest.raises(ConfigError, match=r"a: conv: 'kernel' .*a convolution to r channels"):
        save_adapter(net, "a", tmp_path / "peft")
    with pytest.raises(ConfigError, match=r"basis: 'conv kernel, narrow refuse'"):
        LoraConfig.from_dict({"basis": {}, "conv": "kernel"})
