"""Guides: at first the network as it is; one expert per range, merged or not, and nothing else."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coterie.adapters import LoraConfig, adapters_of, base_digest
from coterie.core.errors import ConfigError, DataError
from coterie.core.prediction import Condition
from coterie.core.tensors import module_tensors
from coterie.guides import Guide, suggested
from coterie.guides.guide import SLOT
from coterie.process import PROCESSES
from coterie.process.ranges import RangesConfig, equal_ranges
from small_guides import DDPM, FULL, guide, pictures, reader, wake

STEPS = torch.arange(DDPM.num_steps)
TIMES = DDPM.time_of_index(STEPS)


@pytest.mark.parametrize("adapter", [None, FULL])
@pytest.mark.parametrize("task", ["classes", "map", "pixels"])
def test_an_untrained_guide_is_its_network(task: str, adapter: LoraConfig | None) -> None:
    network, x = reader(task), pictures()
    before = network(x).value
    made = guide(network, adapter=adapter)
    t = torch.linspace(0.05, 0.95, len(x))
    assert torch.equal(made(x, t[:1].expand(len(x))).value, before)
    assert torch.equal(made.clean(x), before)
    if adapter is None:
        assert torch.equal(made(x, t).value, before)
    else:  # copies compute batches of other sizes, which round otherwise
        torch.testing.assert_close(made(x, t).value, before, rtol=1e-5, atol=1e-5)


def test_ranges_are_a_partition_of_the_steps() -> None:
    """Range n from the clean end holds n T / N and not (n + 1) T / N, also of times in float32."""
    for count in (1, 3, 5, 7):
        found = equal_ranges(DDPM, count).range_at(DDPM, TIMES)
        wanted = [
            next(n for n in range(count) if n * 1000 <= i * count < (n + 1) * 1000)
            for i in range(1000)
        ]
        assert found.tolist() == [count - 1 - n for n in wanted]


@pytest.mark.parametrize("unit", ["t", "sigma", "log_snr"])
def test_ranges_in_other_units_have_their_boundaries_in_t(unit: str) -> None:
    edges = torch.tensor([0.8, 0.3], dtype=torch.float64)
    levels = {"t": edges, "sigma": torch.exp(-DDPM.lam(edges)), "log_snr": 2 * DDPM.lam(edges)}
    made = RangesConfig(boundaries=tuple(levels[unit].tolist()), boundaries_in=unit)  # type: ignore[arg-type]
    assert made.times(DDPM) == pytest.approx(edges.tolist(), abs=1e-6)
    t = torch.tensor([1.0, 0.81, 0.79, 0.31, 0.29, 0.0], dtype=torch.float64)
    assert made.range_at(DDPM, t).tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("adapter", [None, FULL])
def test_each_sample_is_answered_by_the_expert_of_its_own_time(adapter: LoraConfig | None) -> None:
    made, x = wake(guide(adapter=adapter)), pictures(8)
    t = torch.tensor([0.9, 0.1, 0.5, 0.2, 0.99, 0.6, 0.0, 1.0])
    mixed = made(x, t)
    alone = torch.cat([made(x[i : i + 1], t[i : i + 1]).value for i in range(len(x))])
    torch.testing.assert_close(mixed.value, alone, rtol=1e-5, atol=1e-5)
    assert float((mixed.value - made.clean(x)).detach().abs().min(1).values.max()) > 1e-3
    (routing,) = mixed.routings
    assert (routing.unit, routing.slot, routing.num_experts) == ("sample", SLOT, 3)
    assert routing.ids[:, 0].tolist() == made.ranges.range_at(DDPM, t).tolist()
    assert torch.equal(routing.counts(), torch.bincount(routing.ids[:, 0], minlength=3).float())


def test_the_original_step_decides_not_the_number_of_the_sampler_step() -> None:
    """Every 40th step: 200, 400, ... open the noisier of two ranges, whatever came before."""
    respaced = TIMES[::40]
    ids = equal_ranges(DDPM, 5).range_at(DDPM, respaced)
    assert ids.tolist() == [4 - n // 200 for n in range(0, 1000, 40)]


@pytest.mark.parametrize("adapter", [None, FULL])
def test_merged_is_unmerged_and_leaves_the_weights_bit_for_bit(adapter: LoraConfig | None) -> None:
    made, x = wake(guide(adapter=adapter)), pictures()
    before = {n: v.clone() for n, v in made.network.state_dict().items()}
    for level in (0.9, 0.88, 0.5, 0.1, 0.95):
        t = torch.full((len(x),), level)
        apart = made(x, t).value
        made.fused = True
        merged = made(x, t).value
        assert made._merged == int(made.ranges.range_at(DDPM, t)[0])
        torch.testing.assert_close(merged, apart, rtol=1e-4, atol=1e-5)
        made.fused = False
        made.separate()
        assert torch.equal(made(x, t).value, apart)
    with made.fusing():
        made(x, torch.full((len(x),), 0.9))
        mixed = made(x, torch.linspace(0, 1, len(x)))
    torch.testing.assert_close(mixed.value, made(x, torch.linspace(0, 1, len(x))).value)
    after = made.network.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_unmerged_applies_alpha_over_rank_as_merged_does() -> None:
    network = reader()
    half = suggested(network, rank=4, alpha=2.0)
    made, x, t = wake(guide(network, adapter=half)), pictures(), torch.full((6,), 0.5)
    with made.fusing():
        merged = made(x, t).value
    torch.testing.assert_close(made(x, t).value, merged, rtol=1e-4, atol=1e-5)
    assert half.scale == 0.5


@pytest.mark.parametrize("adapter", [None, FULL])
def test_training_one_expert_changes_no_other_tensor(adapter: LoraConfig | None) -> None:
    made, x = guide(adapter=adapter), pictures(16)
    base, clean = base_digest(made.network), made.clean(x)
    before = [{n: v.clone() for n, v in made.expert(i).items()} for i in range(3)]
    optimizer = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad], lr=0.05)
    made.train()
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(made(x, torch.full((16,), 0.5)).value, torch.arange(16) % 3).backward()
        optimizer.step()
    made.eval()
    assert base_digest(made.network) == base and torch.equal(made.clean(x), clean)
    moved = [
        any(not torch.equal(v, before[i][n]) for n, v in made.expert(i).items()) for i in range(3)
    ]
    assert moved == [False, True, False]
    statistics = [n for n in before[1] if n.endswith("running_mean")]
    assert len(statistics) == 3
    assert all(not torch.equal(made.expert(1)[n], before[1][n]) for n in statistics)


def test_statistics_of_a_mixed_batch_are_those_of_each_experts_own_rows() -> None:
    mixed, apart = guide(), guide()
    x = pictures(12)
    t = torch.tensor([0.9, 0.5, 0.1] * 4)
    mixed.train()
    apart.train()
    mixed(x, t)
    for level in (0.9, 0.5, 0.1):
        apart(x[t == level], t[t == level])
    for index in range(3):
        for name, value in mixed.expert(index).items():
            torch.testing.assert_close(value, apart.expert(index)[name], msg=name)


def test_experts_hold_statistics_biases_and_factors_and_nothing_of_the_base() -> None:
    made = guide()
    names = set(made.expert(0))
    for ending in ("running_mean", "running_var", "shift", "up", "down", "change", "own.weight"):
        assert any(name.endswith(ending) for name in names) or ending in ("shift", "change")
    stored = module_tensors(made)
    assert len(stored) == 3 * len(names) and all("adapters.parts.range-" in n for n in stored)
    assert not any(".head." in name for name in names)


def test_one_range_is_a_single_model() -> None:
    network, x = reader(), pictures()
    one = wake(guide(network, ranges=1))
    assert one(x, torch.rand(6)).routings == ()
    single = copy.deepcopy(one.network)
    assert torch.equal(one(x, torch.rand(6)).value, single(x).value)
    three = guide(network, ranges=3)
    for index in range(3):
        for name, value in three.expert(index).items():
            value.data.copy_(one.expert(0)[name])
    torch.testing.assert_close(three(x, torch.rand(6)).value, one(x, torch.rand(6)).value)


def test_parameters_are_those_of_the_formula() -> None:
    """r (in + out) of a linear map, r k (in k + out k) of a convolution; biases; norms."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(4, 8, 5, padding=2)
            self.point = nn.Conv2d(8, 8, 1)
            self.norm = nn.BatchNorm2d(8)
            self.body = nn.Linear(8, 12)
            self.head = nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(self.norm(self.point(self.stem(x))).mean((2, 3))))

    rank = 3
    found = suggested(Net(), rank)
    assert (found.targets, found.copies) == (("stem",), ("norm",))
    assert found.biases == ("stem", "point", "body")
    both = found.replace(targets=("stem", "body"))
    made = Guide(Net(), DDPM, equal_ranges(DDPM, 2), both)
    wanted = rank * 5 * (4 * 5 + 8 * 5) + rank * (8 + 12) + (8 + 8 + 12) + 2 * 8
    for index in range(2):
        own = made.expert(index).values()
        assert sum(v.numel() for v in own if isinstance(v, nn.Parameter)) == wanted
    assert sum(p.numel() for p in made.parameters() if p.requires_grad) == 2 * wanted
    low = both.replace(rank=6)
    parts = adapters_of(Guide(Net(), DDPM, RangesConfig(), low).network)["range-0"]
    assert {path: getattr(part, "rank", None) for path, part in parts.items()}["stem"] == 4


def test_any_module_that_answers_a_tensor_can_be_wrapped() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch = nn.Conv2d(1, 8, 4, stride=4)
            self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
            self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.patch(x).flatten(2).transpose(1, 2)
            q, k, v = self.qkv(self.norm(h)).chunk(3, -1)
            return self.head((h + self.proj(F.scaled_dot_product_attention(q, k, v))).mean(1))

    network, x = Attention().eval(), pictures()
    before = network(x)
    assert set(suggested(network).targets) == {"qkv", "proj"}
    made = Guide(network, DDPM, equal_ranges(DDPM, 2), suggested(network), "classes", (1, 8, 8))
    t = torch.tensor([0.1, 0.9, 0.1, 0.9, 0.1, 0.9])
    assert torch.equal(made.eval()(x, t).value, before)
    wake(made)
    alone = torch.cat([made(x[i : i + 1], t[i : i + 1]).value for i in range(6)])
    torch.testing.assert_close(made(x, t).value, alone, rtol=1e-5, atol=1e-5)


def test_likelihoods_of_all_tasks_are_differentiable_in_x_row_by_row() -> None:
    targets = {
        "classes": Condition(label=torch.tensor([0, 2, -1, 1, 0, 2])),
        "map": Condition(channels=torch.zeros(6, 1, 8, 8)),
        "pixels": Condition(channels=torch.ones(6, 1, 8, 8)),
    }
    t = torch.tensor([0.1, 0.9, 0.5, 0.5, 0.2, 0.3])
    for task, cond in targets.items():
        made = wake(guide(reader(task)))
        x = pictures().requires_grad_(True)
        log_prob = made.log_prob(x, t, cond)
        assert log_prob.shape == (6,)
        (gradient,) = torch.autograd.grad(log_prob[1], x)
        assert float(gradient[1].abs().sum()) > 0
        assert not gradient[[0, 2, 3, 4, 5]].any()
    null = wake(guide()).log_prob(pictures(), t, targets["classes"])
    assert float(null[2].detach()) == 0


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ((0.3, 0.7), r"boundaries: \(0\.3, 0\.7\) .*from noisy to clean"),
        ((0.5, 0.5), r"boundaries: \(0\.5, 0\.5\) .*all different"),
        ((1.5,), r"boundaries: 1\.5 .*a range beyond it would hold no noise level"),
        ((0.5, 0.0), r"boundaries: 0\.0 .*a range beyond it"),
    ],
)
def test_ranges_that_are_no_partition_are_refused(ranges: tuple[float, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RangesConfig.from_dict({"boundaries": ranges}).times(DDPM)


def test_bad_input_is_named() -> None:
    made = guide()
    t = torch.full((6,), 0.5)
    with pytest.raises(ConfigError, match=r"ranges: 0 .*1\.\.1000"):
        equal_ranges(DDPM, 0)
    with pytest.raises(DataError, match=r"x\.shape: \(6, 3, 8, 8\) .*\[B, 1, 8, 8\]"):
        made(torch.zeros(6, 3, 8, 8), t)
    with pytest.raises(DataError, match=r"t: \(1,\)"):
        made(pictures(), t[:1])
    with pytest.raises(DataError, match=r"cond\.label: 3 .*-1\.\.2, the classes of the guide"):
        made.log_prob(pictures(), t, Condition(label=torch.tensor([0, 1, 2, 3, 0, 0])))
    with pytest.raises(DataError, match=r"cond\.label: None"):
        made.log_prob(pictures(), t, Condition())
    with pytest.raises(DataError, match=r"cond\.channels: None .*\(6, 1, 8, 8\)"):
        guide(reader("map")).log_prob(pictures(), t, Condition())
    with pytest.raises(ConfigError, match=r"network: 'tuple' .*a tensor"):
        Guide(_Pair(), DDPM)(pictures(), t)
    with pytest.raises(ConfigError, match=r"ranges: 2 .*1 without an adapter"):
        Guide(reader(), DDPM, equal_ranges(DDPM, 2))
    with pytest.raises(ConfigError, match=r"network: 'ReLU' .*a layer to adapt"):
        suggested(nn.ReLU())


class _Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, self.scale


def test_a_guide_of_continuous_processes_has_the_same_ranges() -> None:
    for kind in ("rectified_flow", "ve", "vp_linear"):
        process = PROCESSES.parse(kind).build()
        made = guide(process=process)
        ids = made.ranges.range_at(process, process.time_of_index(torch.arange(process.num_steps)))
        assert torch.bincount(ids, minlength=3).tolist() == [333, 333, 334]
