"""Pairs of routers, pools of experts and experts per row: closed cases, masks, bounds, words."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from synthetic_routings import routing

from coterie.core.routing import Routing
from coterie.inspect import (
    Place,
    ReportData,
    Trace,
    analyse,
    analyse_amounts,
    analyse_pairs,
    analyse_pools,
    sentences,
    write_report,
)
from coterie.inspect.page import report
from coterie.inspect.plots import style
from coterie.inspect.statistics import formulas, pairs

LOG2_4 = 2.0


def traced(*batches: list[Routing]) -> Trace:
    trace = Trace()
    for routings in batches:
        trace.add(routings)
    return trace


def layers(*choices: torch.Tensor, num_experts: int = 4, **fields: object) -> list[Routing]:
    """One router per tensor of choices, in layers 0, 1, ..., of 10 tokens a sample."""
    size = (len(choices[0]) // 10, 10)
    return [
        routing(ids, num_experts, size, **fields).replace(layer=layer)
        for layer, ids in enumerate(choices)
    ]


def rounds(*choices: torch.Tensor, **fields: object) -> list[Routing]:
    made = layers(*choices, **fields)
    return [item.replace(layer=0, round=number) for number, item in enumerate(made)]


@pytest.fixture
def uniform() -> torch.Tensor:
    return torch.arange(4000) % 4


# From one router to the next


def test_information_between_layers_is_what_they_share(uniform: torch.Tensor) -> None:
    """Layer 1 copies layer 0 permuted (2 bits), 2 keeps its half (1 bit), 3 is unrelated (0)."""
    permuted = (uniform + 1) % 4
    halved = permuted // 2 * 2 + torch.arange(4000) // 4 % 2
    unrelated = torch.arange(4000) // 16 % 4
    found = analyse_pairs(traced(layers(uniform, permuted, halved, unrelated)))
    told = [pair.information for pair in found]
    assert [info.bits for info in told] == pytest.approx([LOG2_4, 1.0, 0.0], abs=1e-3)
    biases = [(4 - 7), (8 - 7), (16 - 7)]  # occupied cells - rows - columns + 1
    for info, bias in zip(told, biases):
        expected = max(0.0, info.bits - max(0.0, bias) / (2 * 4000 * np.log(2)))
        assert info.corrected == pytest.approx(expected, abs=1e-9)
    assert [info.measurable for info in told] == [True, True, False]


def test_the_first_choice_is_the_one_with_the_largest_gate() -> None:
    ids = torch.tensor([[0, 1, 2], [2, 1, 0], [3, 1, 3], [3, 3, 3]])
    gates = torch.tensor([[0.2, 0.5, 0.3], [0.4, 0.4, 0.2], [9.0, 0.1, 9.0], [1.0, 1.0, 1.0]])
    assert pairs.first_choice(ids, gates, 3).tolist() == [1, 2, 1, 3]


def test_lift_and_overlap_of_rounds_counted_by_hand() -> None:
    first = torch.tensor([[0, 1], [0, 1], [2, 3], [2, 3]] * 5)
    second = torch.tensor([[0, 1], [1, 2], [2, 4], [0, 1]] * 5)  # 4 = nobody
    (pair,) = analyse_pairs(traced(rounds(first, second)))
    # Rows share 2 of 2, 1 of 2, 1 of 2, 0 of 2.
    assert pair.kind == "round" and pair.rows == 20
    assert pair.overlap == pytest.approx((1 + 0.5 + 0.5 + 0) / 4)
    rates = [np.full(4, 0.5), np.array([2, 3, 2, 0]) / 4]
    assert pair.chance == pytest.approx((rates[0] * rates[1]).sum() / 2)
    joint = 5 * np.array([[1, 2, 1, 0], [1, 2, 1, 0], [1, 1, 1, 0], [1, 1, 1, 0]])
    expected = joint * joint.sum() / np.outer(joint.sum(1), joint.sum(0).clip(1))
    assert pair.lift[:, :3] == pytest.approx(expected[:, :3])
    assert np.isnan(pair.lift[:, 3]).all()


def test_frozen_rounds_overlap_wholly_and_other_experts_not_at_all(uniform: torch.Tensor) -> None:
    frozen = rounds(uniform, uniform)
    (pair,) = analyse_pairs(traced(frozen))
    assert pair.overlap == 1.0 and pair.chance == pytest.approx(0.25)
    assert np.nan_to_num(pair.lift) == pytest.approx(4 * np.eye(4))
    (apart,) = analyse_pairs(traced(layers(uniform, uniform)))
    assert np.isnan(apart.overlap)  # expert 0 of layer 0 is not expert 0 of layer 1
    shared = [r.replace(pool_layers=(0, 1)) for r in layers(uniform, uniform)]
    assert analyse_pairs(traced(shared))[0].overlap == 1.0


def test_pairs_follow_execution_within_a_slot(uniform: torch.Tensor) -> None:
    made = [
        routing(uniform, 4, (400, 10)).replace(slot=slot, layer=layer, round=number)
        for layer in (3, 1)
        for number in (1, 0)
        for slot in ("pre_block", "ffn")
    ]
    names = [pair.name for pair in analyse_pairs(traced(made))]
    own = ["1, round 0 to 1", "1 to 3", "3, round 0 to 1"]
    assert names == [f"{slot} {name}" for slot in ("ffn", "pre_block") for name in own]


def test_rows_masked_in_either_router_or_without_an_expert_are_left_out() -> None:
    first, second = torch.arange(40) % 4, torch.arange(40) % 4
    seen = torch.arange(40) < 20
    made = layers(first, second)
    made[0] = made[0].replace(mask=seen)
    made[1] = made[1].replace(mask=torch.arange(40) >= 10)
    made[1] = made[1].replace(ids=made[1].ids.masked_fill(torch.arange(40)[:, None] == 15, 4))
    trace = traced(made)
    assert analyse_pairs(trace)[0].rows == 9
    assert trace.pairs[0].leads.sum() == trace.pairs[0].joint.sum() == 9
    nobody = traced(layers(torch.full((20,), 4), torch.full((20,), 4)))
    (pair,) = analyse_pairs(nobody)
    assert pair.information is None and pair.reason == "no row was scored by both"


def test_rows_that_are_not_the_same_are_not_paired(uniform: torch.Tensor) -> None:
    first, second = layers(uniform, uniform)
    assert not traced([first], [second]).pairs  # two passes
    assert not traced([first, second.replace(batch=(200, 20))]).pairs
    by_sample = routing(uniform[:400], 4, (400, 10), unit="sample").replace(layer=1)
    assert not traced([first, by_sample]).pairs
    assert not traced([first, second, first, second]).pairs  # which rows belong together?


def test_conditional_and_unconditional_pairs_are_kept_apart() -> None:
    label = torch.tensor([0, 1, -1, -1])
    first = torch.tensor([0, 1, 0, 1]).repeat_interleave(10)
    second = torch.tensor([0, 1, 0, 0]).repeat_interleave(10)
    made = layers(first, second, num_experts=2, label=label)
    trace = traced(made)
    assert trace.pairs[0].leads.tolist() == [[[10, 0], [0, 10]], [[10, 0], [10, 0]]]
    assert analyse_pairs(trace)[0].information.bits == pytest.approx(1.0)


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch, uniform: torch.Tensor) -> None:
    made = layers(uniform, uniform)
    trace = traced(made)
    size = trace.pairs[0].leads.nbytes + trace.pairs[0].joint.nbytes
    trace.add(made)
    assert trace.pairs[0].leads.nbytes + trace.pairs[0].joint.nbytes == size == 2 * 2 * 16 * 8
    assert trace.pairs[0].rows[0] == 8000
    monkeypatch.setattr(pairs, "MAX_PAIR_CELLS", 15)
    (pair,) = analyse_pairs(traced(made))
    assert pair.reason == "more than 15 pairs of experts" and pair.information is None
    assert np.isnan(pair.overlap) and pair.lift.size == 0


# Pools


def pooled(flows: list[list[float]], rows: int = 1000, first: int = 0) -> list[Routing]:
    """Layers of one pool of 2 experts each; ``flows[i][j]``: share of layer i's rows to owner j."""
    owners = tuple(range(first, first + len(flows)))
    made = []
    for layer, shares in zip(owners, flows):
        edges = (np.cumsum(shares) * rows).round().astype(int)
        owner = torch.tensor(np.searchsorted(edges, np.arange(rows), side="right"))
        ids = owner * 2 + torch.arange(rows) % 2
        record = routing(ids, 2 * len(flows), (rows // 10, 10), pool_layers=owners)
        made.append(record.replace(layer=layer))
    return made


def test_shares_of_owners_and_the_load_of_the_whole_pool() -> None:
    flows = [[0.5, 0.5, 0.0], [0.1, 0.2, 0.7], [1.0, 0.0, 0.0]]
    plain = routing(torch.zeros(1000, dtype=torch.long), 2, (100, 10)).replace(layer=3)
    shared, alone = analyse_pools(traced([*pooled(flows), plain]))
    assert shared.owners == shared.layers == (0, 1, 2) and shared.name == "0 to 2"
    assert shared.shares == pytest.approx(np.array(flows))
    assert shared.own_shares == pytest.approx({0: 0.5, 1: 0.2, 2: 0.0})
    assert shared.counts.tolist() == [800, 800, 350, 350, 350, 350]
    assert shared.imbalance == pytest.approx(shared.counts / 500 - 1)
    assert alone.owners == (3,) and not alone.shared
    assert alone.imbalance.tolist() == [1.0, -1.0] and alone.shares.tolist() == [[1.0]]


def test_the_load_of_a_pool_is_that_of_all_its_rounds(uniform: torch.Tensor) -> None:
    """Each round uses half of the experts; together the load is even."""
    made = rounds(uniform // 2, 2 + uniform // 2)
    items = analyse(traced(made))
    assert [item.max_over_mean for item in items] == [2.0, 2.0]
    (pool,) = analyse_pools(traced(made))
    assert pool.routers == 2 and pool.imbalance.tolist() == [0.0] * 4


# Experts per row


def variable(numbers: list[int], **fields: object) -> Routing:
    """Row r uses the first ``numbers[r]`` of 4 experts."""
    ids = torch.full((len(numbers), 4), 4)
    for row, number in enumerate(numbers):
        ids[row, :number] = torch.arange(number)
    fields.setdefault("batch", (len(numbers), 1))
    return routing(ids, 4, fields.pop("batch"), **fields)


def test_experts_per_row_by_class_noise_and_position() -> None:
    noise, label = torch.tensor([0.05, 0.95, 0.05]), torch.tensor([0, 2, -1])
    record = variable([1, 3, 2, 4, 4, 4], batch=(3, 2), noise=noise, label=label)
    (item,) = analyse_amounts(traced([record]))
    assert item.varies and item.mean == 2.5 and item.most == 4
    assert item.by_class.tolist()[::2] == [2.0, 3.0] and np.isnan(item.by_class[1])
    assert item.by_noise[[0, 9]].tolist() == [2.0, 3.0] and np.isnan(item.by_noise[1:9]).all()
    assert item.by_position.tolist() == [1.5, 3.5]


def test_masked_rows_have_no_experts_to_count() -> None:
    mask = torch.tensor([True, True, False, True])
    (item,) = analyse_amounts(traced([variable([1, 2, 4, 0], mask=mask)]))
    assert item.mean == 1.0 and item.most == 2
    (same,) = analyse_amounts(traced([variable([2, 2, 2])]))
    assert not same.varies and same.p95 == same.most == 2


@pytest.mark.parametrize(
    ("counts", "share", "expected"),
    [([0, 95, 5], 0.95, 1), ([0, 94, 6], 0.95, 2), ([10], 0.95, 0), ([0, 0], 0.95, 0)],
)
def test_quantile_of_a_histogram(counts: list[int], share: float, expected: int) -> None:
    assert formulas.quantile_of_histogram(counts, share) == expected


# Words, page and numbers


def everything() -> Trace:
    """A pool of two layers whose rows use 1 to 3 experts by class, and two rounds."""
    label = torch.arange(30) % 3
    numbers = (label + 1).repeat_interleave(10)
    made = []
    for layer in (0, 1):
        for number in (0, 1):
            rng = torch.Generator().manual_seed(10 * layer + number)
            order = torch.rand(300, 8, generator=rng).argsort(1)[:, :3]
            ids = order.masked_fill(torch.arange(3) >= numbers[:, None], 8)
            record = routing(ids, 8, (30, 10), label=label, pool_layers=(0, 1))
            made.append(record.replace(layer=layer, round=number))
    return traced(made)


def test_sentences_tell_of_classes_rounds_owners_and_neighbours() -> None:
    trace = everything()
    text = sentences(trace, analyse(trace), ("easy", "text", "hard"))
    assert "Experts per row in layer 0 round 0 by class: 1 for easy, 2 for text and 3 for hard." \
        in text  # fmt: skip
    assert any(line.startswith("A row uses 2 experts in layer 0 round 0") for line in text)
    assert any("of the experts of round 1 also answered in round 0" in line for line in text)
    assert any("The first choice in layer 0 tells" in line or "nothing measurable about that in"
               in line for line in text)  # fmt: skip
    flows = traced(pooled([[0.27, 0.73], [0.9, 0.1]]))
    assert sentences(flows, analyse(flows))[-2:] == [
        "73% of layer 0's choices go to experts of layer 1 and 27% to its own experts.",
        "90% of layer 1's choices go to experts of layer 0 and 10% to its own experts.",
    ]
    many = traced(pooled([[0.1] * 9 + [0.1]] * 10))
    assert sentences(many, analyse(many))[-2].startswith(
        "Layers that share experts give 10% of their choices to their own (mean of 10 layers"
    )


def test_the_noise_level_and_few_amounts_are_said() -> None:
    noise = torch.linspace(0.01, 0.99, 40)
    trace = traced([variable([1] * 20 + [4] * 20, noise=noise)])
    text = sentences(trace, analyse(trace))
    assert "A row uses 2.5 experts in layer 0; 95 of 100 rows use at most 4." in text
    assert "Layer 0 uses 1 experts near the data and 4 where the noise is strongest." in text


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty pictures: drawing is most of what a page takes."""
    monkeypatch.setattr(report, "render", lambda plot: style.Picture(plot, b"", b"", 100))


def test_the_page_shows_what_there_is_and_its_numbers_are_in_the_file(tmp_path: Path) -> None:
    cosine = {Place("ffn", 0, 0): np.array([[1.0, 0.5], [0.5, 1.0]])}
    data = ReportData(
        title="All", trace=everything(), class_names=("easy", "text", "hard"), similarity=cosine
    )
    html = write_report(tmp_path, data).read_text(encoding="utf-8")
    for name in (
        *("experts_per_row", "experts_per_row_by_class", "experts_per_row_by_position"),
        *("rounds", "adjacent_layers", "owners", "pool_imbalance", "expert_similarity"),
    ):
        assert f'id="{name}"' in html and (tmp_path / f"{name}.png").is_file()
    assert "How many experts a row uses" in html and "Who follows whom" in html
    numbers = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    first = numbers["routing"]["experts_per_row"][0]
    assert first["by_class"] == [1, 2, 3] and first["p95"] == 3
    kinds = [pair["kind"] for pair in numbers["routing"]["pairs"]]
    assert kinds == ["round", "layer", "round"]
    (pool,) = numbers["routing"]["pools"]
    assert np.sum(pool["shares"], axis=1) == pytest.approx([1, 1], abs=1e-5)
    assert set(pool["own_shares"]) == {"0", "1"}
    (alike,) = numbers["expert_similarity"]
    assert alike["mean"] == 0.5 and alike["cosine"] == [[1, 0.5], [0.5, 1]]


@pytest.mark.usefixtures("undrawn")
def test_a_plain_model_shows_none_of_it(tmp_path: Path, uniform: torch.Tensor) -> None:
    html = write_report(tmp_path, ReportData(title="Plain", trace=traced(layers(uniform))))
    text = html.read_text(encoding="utf-8")
    assert "How many experts a row uses" not in text and "Who follows whom" not in text


@pytest.mark.usefixtures("undrawn")
def test_large_tables_stay_out_of_the_file(tmp_path: Path) -> None:
    ids = torch.arange(400)
    made = layers(ids, ids, num_experts=200 + 200)
    write_report(tmp_path, ReportData(title="Large", trace=traced(made)))
    numbers = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    (pair,) = numbers["routing"]["pairs"]
    assert pair["lift"] == {"omitted": "400 x 400 numbers"}


def test_classes_that_differ_most_are_shown_where_there_are_many() -> None:
    from coterie.inspect.plots.experts_per_row import plot_amounts_by_class

    label = torch.arange(60)
    numbers = [4 if number < 40 and number % 2 == 0 else 1 for number in range(60)]
    amounts = analyse_amounts(traced([variable(numbers, label=label)]))
    plot = plot_amounts_by_class(amounts, ())
    assert "The 40 classes that differ most." in plot.caption
    image = next(ax.images[0] for ax in plot.draw().axes if ax.images)
    shown = np.asarray(image.get_array())
    assert shown.shape == (1, 40) and (shown == 4).sum() == 20


def test_shares_are_written_into_the_cells_under_the_names_of_layers() -> None:
    from coterie.inspect.plots.relations import plot_owners

    trace = traced([*pooled([[0.25, 0.75], [0.5, 0.5]]), *pooled([[1.0, 0.0]] * 2, first=2)])
    drawn = plot_owners(analyse_pools(trace)).draw()
    left, right = (ax for ax in drawn.axes if ax.images)
    assert [text.get_text() for text in left.texts] == ["25%", "75%", "50%", "50%"]
    assert [label.get_text() for label in right.get_xticklabels()] == ["2", "3"]
