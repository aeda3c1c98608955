import time

import numpy as np
import pytest
import torch
from synthetic_routings import known_truth, routing

from coterie.core.errors import DataError
from coterie.inspect.page.findings import bits, findings, layers, sentences
from coterie.inspect.page.terminal_table import text_summary
from coterie.inspect.statistics import formulas
from coterie.inspect.statistics.routers import analyse
from coterie.inspect.statistics.trace import Trace


def traced(*batches, **options):
    trace = Trace(**options)
    for routings in batches:
        trace.add(routings)
    return trace


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def truth(rng):
    return traced(*(known_truth(rng) for _ in range(5)))


def test_tables_equal_a_loop_over_rows(rng):
    batch, tokens, num_experts, top_k = 7, 5, 4, 2
    rows = batch * tokens
    ids = torch.rand(rows, num_experts, generator=rng).argsort(1)[:, :top_k]
    ids[::6, 1] = num_experts  # nobody
    mask = torch.rand(rows, generator=rng) > 0.3
    label = torch.tensor([0, 2, -1, 1, 2, -1, 0])
    noise = torch.rand(batch, generator=rng)
    probs = torch.rand(rows, num_experts, generator=rng).softmax(1)
    record = routing(
        ids, num_experts, (batch, tokens), probs=probs, mask=mask, label=label, noise=noise
    )
    router = traced([record]).routers[0]
    noise_table = np.zeros((2, 10, num_experts))
    positions = np.zeros((2, tokens, num_experts))
    classes = np.zeros((2, 3, num_experts))
    pairs = np.zeros((2, num_experts, num_experts))
    choices = np.zeros((2, top_k + 1))
    gates = np.zeros(num_experts)
    entropy = np.zeros(2)
    for row in range(rows):
        if not mask[row]:
            continue
        sample = row // tokens
        half = int(label[sample] == -1)
        chosen = [int(i) for i in ids[row] if i < num_experts]
        choices[half, len(chosen)] += 1
        p = probs[row].double().numpy()
        entropy[half] -= (p * np.log(p)).sum()
        for expert in chosen:
            noise_table[half, int(noise[sample] * 10), expert] += 1
            positions[half, row % tokens, expert] += 1
            classes[half, max(int(label[sample]), 0), expert] += 1
            gates[expert] += 0.5
            for other in chosen:
                pairs[half, expert, other] += 1
    assert (router.noise.counts == noise_table).all()
    assert (router.positions.counts == positions).all()
    assert (router.classes.counts == classes).all()
    assert (router.pairs == pairs).all()
    assert (router.choices == choices).all()
    assert router.gate_mass.sum((0, 1)) == pytest.approx(gates)
    assert router.entropy.sum(1) == pytest.approx(entropy, rel=1e-5)
    assert (router.counts == noise_table.sum(1)).all()
    assert router.rows.sum() == mask.sum()
    assert router.rows_seen.tolist() == [25, 10]


def test_adding_in_parts_equals_adding_at_once(rng):
    records = known_truth(rng, samples=20)
    whole = traced(records).routers[1]
    first, second = [], []
    for record in records:
        cut = 12
        for part, rows in ((first, slice(0, cut)), (second, slice(cut, 20))):
            token_rows = slice(rows.start * 16, rows.stop * 16)
            part.append(
                record.replace(
                    ids=record.ids[token_rows],
                    gates=record.gates[token_rows],
                    probs=record.probs[token_rows],
                    logits=record.logits[token_rows],
                    noise=record.noise[rows],
                    label=record.label[rows],
                    batch=(rows.stop - rows.start, 16),
                )
            )
    parts = traced(second, first).routers[1]
    for name in ("noise", "classes", "positions"):
        assert (getattr(parts, name).counts == getattr(whole, name).counts).all()
    assert (parts.pairs == whole.pairs).all()
    assert parts.prob_mass == pytest.approx(whole.prob_mass)


def test_information_finds_what_each_layer_goes_by(truth):
    by_noise, by_position, by_class, at_random = analyse(truth)
    log = np.log2(10)
    assert by_noise.information["noise"].bits == pytest.approx(log, abs=0.05)
    assert by_noise.information["class"].measurable is False
    assert by_noise.information["position"].bits == pytest.approx(0, abs=1e-9)
    # 16 positions on 10 experts: experts 0-5 have two positions each
    load = np.array([2] * 6 + [1] * 4) / 16
    assert by_position.information["position"].bits == pytest.approx(formulas.entropy_bits(load))
    assert by_position.information["noise"].bits == pytest.approx(0, abs=1e-9)
    assert by_class.information["class"].bits == pytest.approx(log, abs=0.05)
    assert by_class.information["class"].normalised == pytest.approx(1.0)
    assert not any(info.measurable for info in at_random.information.values())


def test_token_choices_within_a_sample_count_as_far_as_they_are_independent(truth):
    by_noise, _, _, at_random = analyse(truth)
    conditional = 405  # samples of the five batches with a label, of 16 tokens each
    assert by_noise.samples == conditional
    independent = {f: i.floor for f, i in at_random.information.items()}
    freedom = (10 - 1) * (9 - 1)
    spread = (freedom + 2 * np.sqrt(2 * freedom)) / (2 * np.log(2))
    assert independent["noise"] == pytest.approx(spread / (conditional * 16), rel=0.1)
    assert by_noise.information["class"].floor > 10 * independent["class"]


def test_findings_name_the_dead_expert_and_only_it(truth):
    found = findings(analyse(truth))
    alarms = [item.text for item in found if item.level == "alarm"]
    assert len(alarms) == 1
    assert "Layer 3: expert 7 is dead" in alarms[0]
    assert "No collapsed router." in [item.text for item in found]
    assert not any("No dead" in item.text for item in found)


def test_sentences_put_the_strongest_fact_first(truth):
    text = " ".join(sentences(truth, analyse(truth)))
    assert "In layer 3 the choice of expert tells nothing measurable about" in text
    assert "In layer 0 the choice of expert tells 3.3" in text
    assert "bits about the noise level" in text.split("In layer 1")[0]
    assert "In layer 2 the choice of expert tells 3.3" in text


def test_conditional_and_unconditional_rows_are_kept_apart():
    label = torch.tensor([0, 1, -1, -1])
    ids = torch.tensor([0, 1, 2, 2])
    record = routing(ids, 3, (4, 1), label=label, noise=torch.tensor([0.1, 0.1, 0.9, 0.9]))
    item = analyse(traced([record]))[0]
    assert item.load.tolist() == [0.5, 0.5, 0.0]
    assert item.half == "conditional"
    assert item.halves_apart == 1.0
    assert item.information["noise"].bits == 0.0  # the unconditional rows would make it 1 bit
    assert item.information["class"].bits == pytest.approx(1.0)


def test_a_batch_without_labels_counts_as_conditional_and_all_null_falls_back():
    plain = analyse(traced([routing(torch.tensor([0, 1]), 2, (2, 1))]))[0]
    assert plain.half == "conditional"
    assert plain.omitted["class"] == "no class labels were recorded"
    assert plain.omitted["noise"] == "no noise level was recorded"
    null = routing(torch.tensor([0, 1]), 2, (2, 1), label=torch.tensor([-1, -1]))
    item = analyse(traced([null]))[0]
    assert item.half == "unconditional"
    assert item.load.tolist() == [0.5, 0.5]
    assert item.omitted["class"] == "every row is unconditional"


def test_noise_level_routers_have_one_row_per_sample_and_no_positions(rng):
    noise = torch.rand(200, generator=rng)
    table = torch.zeros(1000, 78).scatter_(1, (torch.arange(1000) * 78 // 1000)[:, None], 1.0)
    ids = (noise * 78).long()
    record = routing(ids, 78, (200, 16), unit="sample", noise=noise, table=table, slot="pre_block")
    trace = traced([record])
    item = analyse(trace)[0]
    assert item.rows == 200
    assert item.omitted["position"] == "one choice per sample holds at every position"
    assert item.information["noise"].bits == pytest.approx(np.log2(10), abs=0.15)
    assert trace.routers[0].table.shape == (250, 78)
    assert all(found.level != "alarm" for found in findings([item]))


def test_always_on_experts_come_from_the_table_of_a_noise_level_router():
    table = torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.2, 0.3]])
    ids = torch.tensor([[0, 1]])
    record = routing(ids, 3, (1, 4), unit="sample", table=table, noise=torch.tensor([0.0]))
    assert analyse(traced([record]))[0].always_on == (0,)


def test_collapsed_and_uneven_token_routers_raise_alarms():
    ids = torch.zeros(400, dtype=torch.long)
    item = analyse(traced([routing(ids, 4, (20, 20))]))[0]
    texts = [found.text for found in findings([item]) if found.level == "alarm"]
    assert any("collapsed: expert 0 receives 100.0%" in text for text in texts)
    ids = torch.cat([torch.zeros(340, dtype=torch.long), torch.arange(60) % 3 + 1])
    item = analyse(traced([routing(ids, 4, (20, 20))]))[0]
    texts = [found.text for found in findings([item]) if found.level == "alarm"]
    assert len(texts) == 1 and "unevenly loaded" in texts[0] and "3.4 times" in texts[0]


def test_few_rows_are_not_judged():
    item = analyse(traced([routing(torch.tensor([0, 0]), 4, (2, 1))]))[0]
    (found,) = findings([item])
    assert found.level == "note" and "too few" in found.text


def test_non_finite_router_output_is_counted_apart_and_reported():
    probs = torch.full((40, 2), 0.5)
    probs[3, 0] = float("nan")
    record = routing(torch.arange(40) % 2, 2, (40, 1), probs=probs)
    item = analyse(traced([record]))[0]
    assert (item.rows, item.rows_bad) == (39, 1)
    assert np.isfinite(item.confidence)
    assert findings([item])[0].text.startswith("Layer 0: 1 rows had non-finite")


def test_masked_rows_are_counted_nowhere_but_in_the_share_scored():
    mask = torch.tensor([True, True, False, False])
    record = routing(torch.tensor([0, 1, 1, 1]), 2, (2, 2), mask=mask, noise=torch.tensor([0, 1.0]))
    router = traced([record]).routers[0]
    item = analyse(traced([record]))[0]
    assert item.load.tolist() == [0.5, 0.5]
    assert item.rows_scored == 0.5
    assert router.noise.rows[0].tolist() == [2] + [0] * 9
    assert router.entropy_rows[0].sum() == 2


def test_variable_k_histogram_and_mean_choices():
    ids = torch.tensor([[0, 1], [0, 2], [2, 2], [2, 2]])
    item = analyse(traced([routing(ids, 2, (4, 1))]))[0]
    router = traced([routing(ids, 2, (4, 1))]).routers[0]
    assert router.choices[0].tolist() == [2, 1, 1]
    assert item.choices_per_row == pytest.approx(0.75)


def test_noise_is_mapped_to_the_unit_interval_when_asked():
    sigma = torch.tensor([0.01, 80.0])
    record = routing(torch.tensor([0, 1]), 2, (2, 1), noise=sigma)
    with pytest.raises(DataError, match="noise_to_unit"):
        traced([record])
    trace = traced([record], noise_to_unit=lambda s: (s / 0.01).log() / np.log(8000))
    assert trace.routers[0].noise.rows[0].tolist() == [1, 0, 0, 0, 0, 0, 0, 0, 0, 1]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.5, 1.5])
def test_bad_noise_is_refused(value):
    record = routing(torch.tensor([0, 1]), 2, (2, 1), noise=torch.tensor([0.5, value]))
    with pytest.raises(DataError, match="noise"):
        traced([record])


def test_records_that_contradict_themselves_or_each_other_are_refused():
    good = routing(torch.tensor([0, 1]), 2, (2, 1))
    trace = traced([good])
    with pytest.raises(DataError, match="3 experts per token, but it had 2"):
        trace.add([routing(torch.tensor([0, 1]), 3, (2, 1))])
    with pytest.raises(DataError, match="shapes"):
        trace.add([good.replace(batch=(3, 1))])
    with pytest.raises(DataError, match="shapes"):
        trace.add([good.replace(probs=good.probs[:, :1])])
    with pytest.raises(DataError, match="ids"):
        trace.add([good.replace(ids=torch.tensor([[0], [5]]))])
    with pytest.raises(DataError, match="label"):
        trace.add([good.replace(label=torch.tensor([0, -2]))])
    with pytest.raises(DataError, match="noise_bins"):
        Trace(noise_bins=0)


def test_a_dense_model_and_an_empty_batch_have_defined_results():
    trace = traced([])
    assert len(trace) == 0 and analyse(trace) == [] and findings([]) == []
    assert "dense" in text_summary(trace)
    empty = routing(torch.zeros(0, 1, dtype=torch.long), 4, (0, 16), noise=torch.zeros(0))
    item = analyse(traced([empty]))[0]
    assert item.rows == 0 and item.load.sum() == 0
    assert "too few" in text_summary(traced([empty]))


def test_longer_sequences_and_more_classes_make_the_tables_grow():
    short = routing(torch.zeros(4, dtype=torch.long), 2, (2, 2), label=torch.tensor([0, 1]))
    long = routing(torch.ones(10, dtype=torch.long), 2, (2, 5), label=torch.tensor([6, -1]))
    router = traced([short], [long]).routers[0]
    assert router.positions.rows.sum(0).tolist() == [4, 4, 2, 2, 2]
    assert router.classes.rows[0].tolist() == [2, 2, 0, 0, 0, 0, 5]
    assert router.classes.rows[1].tolist() == [5, 0, 0, 0, 0, 0, 0]


def test_too_many_columns_are_given_up_with_a_reason():
    record = routing(torch.zeros(1, dtype=torch.long), 2, (1, 1), label=torch.tensor([10**6]))
    item = analyse(traced([record]))[0]
    assert item.omitted["class"] == "more than 4096 columns"


def test_several_slots_and_rounds_have_distinct_names():
    one = routing(torch.tensor([0, 1]), 2, (2, 1))
    trace = traced([one, one.replace(slot="pre_block"), one.replace(round=1)])
    assert [item.name for item in analyse(trace)] == [
        "ffn 0 round 0",
        "ffn 0 round 1",
        "pre_block 0 round 0",
    ]


def test_text_summary_lines_up(truth):
    lines = text_summary(truth).splitlines()
    rule = next(i for i, line in enumerate(lines) if line.startswith("---"))
    table = [lines[rule - 1], *lines[rule + 1 : rule + 5]]
    assert len({len(line) for line in table}) == 1
    assert table[4].split()[8] == "1"  # dead experts of layer 3


def test_memory_does_not_grow_with_the_number_of_batches(rng):
    trace = traced(known_truth(rng, samples=4))
    size = sum(
        r.noise.counts.nbytes + r.pairs.nbytes + r.positions.counts.nbytes for r in trace.routers
    )
    for _ in range(5):
        trace.add(known_truth(rng, samples=4))
    after = sum(
        r.noise.counts.nbytes + r.pairs.nbytes + r.positions.counts.nbytes for r in trace.routers
    )
    assert after == size
    assert trace.routers[0].rows.sum() == 6 * 4 * 16


def test_a_batch_of_2048_tokens_in_12_layers_is_cheap(rng):
    records = [r.replace(layer=i) for i, r in enumerate(known_truth(rng, 128, 16, 8, 8)[:1] * 12)]
    trace = traced(records)
    best = float("inf")
    for _ in range(5):
        start = time.process_time()
        trace.add(records)
        best = min(best, time.process_time() - start)
    assert best < 0.5  # about 0.02 s on an idle core; a loop over rows would need seconds


def test_many_like_findings_are_put_together_and_many_layers_described_as_a_whole(rng):
    records = known_truth(rng)
    trace = traced([records[i // 5].replace(layer=i) for i in range(20)])
    items = analyse(trace)
    alarms = [found.text for found in findings(items) if found.level == "alarm"]
    assert layers(items) == "0, 1, 2, 3, 4, 5 and 14 more"
    assert alarms == [
        "5 layers have 5 dead experts in all (load below 1 % of uniform): 15, 16, 17, 18 and 19."
    ]
    text = sentences(trace, items)
    assert sum(line.startswith("About the") for line in text) == 3
    position = next(line for line in text if line.startswith("About the position"))
    assert "1.62 bits in the first half of the depth and 0.00 in the second" in position
    assert "most in layer 5, 3.25 bits" in position


def test_small_information_keeps_its_digits():
    assert [bits(v) for v in (3.314, 0.1, 0.0042, 0.0)] == ["3.31", "0.10", "0.0042", "0.00"]
