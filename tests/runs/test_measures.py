"""Measures of routing and of text against closed cases: names, numbers, masks, what is left out."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from coterie.backbones.trunk import Trunk, TrunkConfig
from coterie.core.config import override
from coterie.core.cost import count_parameters
from coterie.core.prediction import Condition
from coterie.core.routing import Routing
from coterie.experts import ExpertLayer
from coterie.inspect import Place, Trace
from coterie.runs.build import build_source
from coterie.runs.config import RunConfig
from coterie.runs.judges.marked_answers import answer_measures, marks_answers, whole_answers
from coterie.runs.measure import active_parameters as active
from coterie.runs.measure import evaluation, routing_probes
from coterie.runs.measure.routing import routing_measures
from coterie.runs.trained_run import LoadedRun, load_run
from small_models import small, woken
from small_runs import finished

SLOT = "model.backbone.trunk.slots.0"
TOP_P = {f"{SLOT}.expert.router.select": {"kind": "top_p", "p": 0.4}}


def text_config(**paths: Any) -> RunConfig:
    """Next-token model of two layers, 8 experts top-2, on windows of 48 bytes of three kinds."""
    sizes = {"model.backbone.context": 48, "model.backbone.trunk.depth": 2, "data.context": 48}
    base = override(small("text:top-2-of-8"), {"data.kind": "mixed-difficulty"})
    return override(base, {**sizes, "data.count": 256, **paths})


def as_run(config: RunConfig, std: float = 0.05) -> LoadedRun:
    return LoadedRun(Path("unused"), config, woken(config, std=std), build_source(config), 0)


def record(ids: torch.Tensor, num_experts: int, **fields: Any) -> Routing:
    ids = ids if ids.dim() == 2 else ids[:, None]
    probs = torch.full((len(ids), num_experts), 1 / num_experts)
    gates = (ids < num_experts).float()
    size = fields.pop("batch", (len(ids), 1))
    return Routing("token", num_experts, ids, gates, probs, probs.log(), size, **fields)


def measured(*routings: Routing, names: tuple[str, ...] = ()) -> dict[str, float]:
    trace = Trace()
    trace.add(routings)
    return routing_measures(trace, names)


# Routing


def test_neighbours_rounds_and_pools_have_the_numbers_of_closed_cases() -> None:
    """Two layers over one pool of 4: layer 0 gives 3/4 to its own, layer 1 all to layer 0's."""
    first = torch.tensor([0, 1, 0, 2] * 100)
    second = torch.tensor([1, 0, 1, 0] * 100)
    owners = {"pool_layers": (0, 1)}
    found = measured(record(first, 4, **owners), record(second, 4, layer=1, **owners))
    assert found["own_share"] == pytest.approx((0.75 + 0.0) / 2)
    loads = np.array([400, 300, 100, 0])
    assert found["lbv_max"] == pytest.approx(loads.max() / loads.mean() - 1)
    # The second layer answers 1 to a 0, and 0 to all else: it knows 1 bit of the first's choice.
    bias = (3 - (3 + 2) + 1) / (2 * 400 * math.log(2))
    assert found["adjacent_bits"] == pytest.approx(1.0 - max(0.0, bias))
    assert found["gate_entropy"] == pytest.approx(1.0)
    assert "round_overlap" not in found
    rounds = measured(record(first, 4), record(second, 4, round=1))
    assert rounds["round_overlap"] == 0.0 and "adjacent_bits" not in rounds
    assert rounds["lbv_max"] == found["lbv_max"] and "own_share" not in rounds


def test_experts_per_row_of_first_and_last_layer_and_of_each_class() -> None:
    label = torch.tensor([0, 1, 1, -1])
    one = record(torch.tensor([[0, 3], [0, 1], [0, 3], [0, 1]]), 3, label=label)
    two = record(torch.tensor([[3, 3], [2, 1], [0, 1], [0, 1]]), 3, label=label, layer=5)
    found = measured(one, two, names=("easy", "hard"))
    assert found["experts_per_row_first"] == pytest.approx(4 / 3)
    assert found["experts_per_row_last"] == pytest.approx(4 / 3)
    assert found["experts_per_row"] == pytest.approx(4 / 3)
    assert found["experts_per_row/easy"] == pytest.approx((1 + 0) / 2)
    assert found["experts_per_row/hard"] == pytest.approx((1.5 + 2) / 2)
    mask = torch.tensor([True, False, False, True])
    assert measured(one.replace(mask=mask), names=("easy", "hard")).keys() >= {
        "experts_per_row/easy"
    }
    assert "experts_per_row/hard" not in measured(one.replace(mask=mask), names=("easy", "hard"))


def test_many_classes_get_no_number_each() -> None:
    found = measured(record(torch.zeros(41, dtype=torch.long), 2, label=torch.arange(41)))
    assert "experts_per_row" in found and not any("/" in name for name in found)


# Text


def test_answer_measures_count_whole_answers() -> None:
    mask = torch.tensor([[0, 1, 1, 0, 1, 0], [1, 0, 0, 0, 1, 1]]).bool()
    hits = torch.tensor([[0, 1, 0, 1, 1, 0], [1, 1, 1, 1, 1, 1]]).bool()
    # Row ends separate answers, also where the next row begins with one.
    assert whole_answers(mask, hits).tolist() == [False, True, True, True]
    assert whole_answers(mask[:, :1] & False, hits[:, :1]).tolist() == []
    touching = torch.tensor([[0, 1], [1, 0]]).bool()
    assert whole_answers(touching, touching).tolist() == [True, True]


class Oracle(torch.nn.Module):
    """Knows the next token where ``known`` says so, with probability 1/2 on it; else nothing."""

    def __init__(self, ids: torch.Tensor, known: torch.Tensor) -> None:
        super().__init__()
        wanted = F.one_hot(ids[:, 1:], 260).float()
        half = torch.where(wanted > 0, 0.5, 0.5 / 259).log()
        self.logits = torch.where(known[:, 1:, None], half, torch.zeros(260))

    def forward(self, ids: torch.Tensor, t: torch.Tensor, cond: Condition, **rest: Any) -> Any:
        from coterie.core.prediction import Prediction

        return Prediction(self.logits, "logits", ())


def test_an_oracle_answers_all_and_one_bit_off() -> None:
    source: Any = build_source(text_config(), "held_out")
    hard = [i for i, name in enumerate(source.class_names) if name == "hard"]
    rows = np.flatnonzero(np.isin(source.get(np.arange(len(source))).cond.label, hard))
    batch = source.get(rows)
    mask = source.answer_mask(batch.x)
    run = as_run(text_config())

    def answered(known: torch.Tensor) -> dict[str, float]:
        oracle = LoadedRun(run.path, run.config, Oracle(batch.x, known), source, 0)
        return answer_measures(oracle, source, [batch])

    assert answered(mask) == pytest.approx({"answer_loss": 1.0, "answer_accuracy": 1.0}, rel=1e-5)
    nothing = answered(mask & False)
    assert nothing["answer_loss"] == pytest.approx(math.log2(260), rel=1e-5)
    assert nothing["answer_accuracy"] == 0.0
    digits = mask & (batch.x != ord("\n"))  # without the ends of lines no answer is whole
    assert answered(digits)["answer_accuracy"] == 0.0
    easy = source.get(np.setdiff1d(np.arange(len(source)), rows)[:4])
    assert answer_measures(run, source, [easy]) == {}


def test_losses_of_classes_add_up_to_the_loss() -> None:
    run = as_run(text_config())
    found = evaluation.held_out(run)
    assert set(found.by_class) == {"easy", "hard", "text"}
    source = build_source(run.config, "held_out")
    label = source.get(np.arange(len(source))).cond.label
    share = torch.bincount(label).double() / len(label)
    mean = sum(share[i] * found.by_class[name] for i, name in enumerate(source.class_names))
    assert float(mean) == pytest.approx(found.loss, rel=1e-6)
    plain = as_run(small("text:top-2-of-8"))
    assert evaluation.held_out(plain, limit=20).by_class == {}
    assert not marks_answers(plain, plain.source)


def test_masked_models_have_no_answers_token_by_token() -> None:
    masked = {
        "model.masking": "masked",
        "model.backbone.trunk.causal": False,
        "objective": {"kind": "masked_token"},
    }
    run = as_run(text_config())
    assert marks_answers(run, run.source)
    config = run.config.from_dict(override_all(run.config, masked))
    assert not marks_answers(as_run(config), run.source)


def override_all(config: RunConfig, changes: dict[str, Any]) -> dict[str, Any]:
    """The configuration as data with several paths changed at once."""
    data = config.model_dump(mode="json")
    for path, value in changes.items():
        *parents, last = path.split(".")
        here = data
        for part in parents:
            here = here[part]
        here[last] = value
    return data


# What a row costs


def sites_and_trace(run: LoadedRun) -> tuple[active.Sites, dict[Place, float]]:
    return active.expert_sites(run), active.choices_per_row(evaluation.held_out(run).trace)


def test_slot_parameters_are_those_of_experts_or_of_what_stands_in_their_place() -> None:
    width, hidden = 8, 32
    mlp = 2 * width * hidden + hidden + width
    assert active.slot_parameters(build_trunk()) == 3 * mlp
    slot = {"expert": {"num_experts": 2, "experts": {"kind": "gelu_mlp", "hidden": hidden}}}
    router = 2 * width
    assert active.slot_parameters(build_trunk(slot)) == 3 * (2 * mlp + router)
    some = build_trunk({**slot, "layers": [0, 2], "reuse": 2})
    # One pool of 2 layers with 2 experts each, 2 routers of 4 candidates, a dense block between.
    assert active.slot_parameters(some) == 4 * mlp + 2 * 4 * width + mlp


def build_trunk(*slots: dict[str, Any]) -> Trunk:
    config = {"width": 8, "depth": 3, "heads": 2, "modulation": "none", "slots": slots}
    return Trunk(TrunkConfig.from_dict(config), 4)


def test_active_parameters_of_a_fixed_k_are_those_declared() -> None:
    for name in ("dit-moe", "switch-dit", "text:top-2-of-8"):
        run = as_run(small(name))
        sites, choices = active.expert_sites(run), {}
        for layer, (slot, index) in sites.items():
            select = layer.config.router.select_part
            for round in range(layer.config.rounds):
                expected = select.expected(layer.pool.num_experts)
                choices[Place(slot, index, round)] = expected
        declared = count_parameters(run.model).active
        assert active.active_parameters(run.model, sites, choices) == declared


def test_active_parameters_follow_the_measured_choices() -> None:
    run = as_run(text_config(**TOP_P), std=0.2)
    sites, choices = sites_and_trace(run)
    layers = [m for m in run.model.modules() if isinstance(m, ExpertLayer)]
    assert sites == {layer: ("ffn", index) for index, layer in enumerate(layers)}
    one = sum(p[0].numel() for p in layers[0].pool.parameters())
    dense = sum(p.numel() for p in run.model.parameters()) - 2 * 8 * one
    used = choices[Place("ffn", 0, 0)] + choices[Place("ffn", 1, 0)]
    assert 2 < used < 16 and used != round(used)
    assert active.active_parameters(run.model, sites, choices) == round(dense + used * one)
    assert count_parameters(run.model).active == dense + 16 * one  # declared: at most


@pytest.mark.parametrize("routing", ["own", "shared", "frozen"])
def test_rounds_count_their_experts_and_a_frozen_decision_once(routing: str) -> None:
    changes = {f"{SLOT}.expert.rounds": 3, f"{SLOT}.expert.round_routing": routing}
    run = as_run(text_config(**changes))
    sites, choices = sites_and_trace(run)
    layer = next(iter(sites))
    one = sum(p[0].numel() for p in layer.pool.parameters())
    router = sum(p.numel() for p in layer.routers[0].parameters())
    dense = sum(p.numel() for p in run.model.parameters()) - 2 * 8 * one
    times = 1 if routing == "frozen" else 3
    found = active.active_parameters(run.model, sites, choices)
    assert found == dense + 2 * min(8, 2 * times) * one
    # Every round multiplies, by whatever decision; a frozen one is made once.
    assert active.expert_multiply_adds(sites, choices) == 2 * (3 * 2 * one + times * router)


def test_a_pool_of_several_layers_is_counted_once() -> None:
    run = as_run(text_config(**{f"{SLOT}.reuse": 2, f"{SLOT}.expert.num_experts": 4}))
    sites, choices = sites_and_trace(run)
    (pool,) = {layer.pool for layer in sites}
    one = sum(p[0].numel() for p in pool.parameters())
    dense = sum(p.numel() for p in run.model.parameters()) - 8 * one
    assert active.active_parameters(run.model, sites, choices) == dense + 4 * one


# Experts that answer alike


def test_cosines_of_equal_opposite_and_any_experts() -> None:
    run = as_run(text_config())
    with torch.no_grad():
        for name, stack in sites_stack(run).items():
            stack[1] = stack[0]
            stack[2] = -stack[0] if name == "down" else stack[0]
    table = routing_probes.expert_cosines(run)[Place("ffn", 0, 0)]
    assert table.shape == (8, 8) and table == pytest.approx(table.T)
    assert np.diag(table) == pytest.approx(np.ones(8), abs=1e-5)
    assert table[0, 1] == pytest.approx(1.0, abs=1e-5)
    assert table[0, 2] == pytest.approx(-1.0, abs=1e-5)
    with routing_probes.observed(run.model) as seen:
        routing_probes.probe_loss(run, limit=4)
    layer, h = seen[0].layer, seen[0].h.flatten(0, 1)
    with torch.no_grad():
        answers = torch.stack([expert(h) for expert in layer.pool.unpack()])
    expected = F.cosine_similarity(answers[3], answers[4], dim=-1).mean()
    some = routing_probes.cosines_of(seen)[Place("ffn", 0, 0)]
    assert some[3, 4] == pytest.approx(float(expected), abs=1e-4)


def test_experts_are_compared_on_what_they_read_and_a_stem_costs_too() -> None:
    changes = {f"{SLOT}.expert.stem": "star", f"{SLOT}.expert.adaptor": 0.5}
    run = as_run(text_config(**changes))
    with routing_probes.observed(run.model) as seen:
        routing_probes.probe_loss(run, limit=4)
    layer, h = seen[0].layer, seen[0].h.flatten(0, 1)
    with torch.no_grad():
        answers = torch.stack([expert(layer.stem(h)) for expert in layer.pool.unpack()])
    expected = F.cosine_similarity(answers[3], answers[4], dim=-1).mean()
    found = routing_probes.cosines_of(seen)[Place("ffn", 0, 0)][3, 4]
    assert found == pytest.approx(float(expected), abs=1e-4)
    always = [p for part in (layer.stem, layer.adaptor) for p in part.parameters() if p.dim() > 1]
    sites = {layer: ("ffn", 0)}
    plain = active.expert_multiply_adds(sites, {Place("ffn", 0, 0): 0.0})
    router = sum(p.numel() for p in layer.routers.parameters())
    assert plain == router + sum(p.numel() for p in always) > router


def sites_stack(run: LoadedRun) -> dict[str, torch.Tensor]:
    layer = next(module for module in run.model.modules() if isinstance(module, ExpertLayer))
    return layer.pool.stacks()


def test_padding_is_not_compared_and_noise_level_experts_are_left_out() -> None:
    run = as_run(text_config())
    with routing_probes.observed(run.model) as seen:
        routing_probes.probe_loss(run, limit=2)
    item = seen[0]
    spoilt = item.h.clone()
    spoilt[1] = float("nan")
    mask = torch.tensor([[True], [False]]).expand(spoilt.shape[:2])
    clean = routing_probes.Seen(item.layer, item.h[:1], None, item.routings)
    padded = routing_probes.Seen(item.layer, spoilt, mask, item.routings)
    place = Place("ffn", 0, 0)
    assert np.array_equal(
        routing_probes.cosines_of([padded])[place], routing_probes.cosines_of([clean])[place]
    )
    assert routing_probes.expert_cosines(as_run(small("switch-dit"))) == {}
    assert not any(module._forward_hooks for module in run.model.modules())


# All together


def test_every_measure_is_a_finite_number_and_is_described(tmp_path: Path) -> None:
    paths = {"train.steps": 3, f"{SLOT}.reuse": 2, f"{SLOT}.expert.rounds": 2, **TOP_P}
    config = text_config(**paths)
    from coterie.runs.training import start

    run = load_run(start(config, tmp_path / "run", progress=False))
    found = evaluation.measure(run)
    assert all(isinstance(v, float) and math.isfinite(v) for v in found.values())
    assert found.keys() >= {
        *("held_out_loss", "held_out_loss/easy", "held_out_loss/hard", "held_out_loss/text"),
        *("answer_loss", "answer_accuracy", "experts_per_row", "experts_per_row/hard"),
        *("experts_per_row_first", "experts_per_row_last", "active_parameters", "adjacent_bits"),
        *("round_overlap", "gate_entropy", "expert_similarity", "lbv_max", "own_share"),
        "train_tokens_per_second",
    }
    page = Path(__file__).parents[2] / "docs" / "explanation" / "results.md"
    described = set(re.findall(r"`([\w/<>]+)`", page.read_text(encoding="utf-8")))
    images = evaluation.routing_measures(
        evaluation.held_out(as_run(small("dit-moe")), limit=16).trace
    )
    for name in {*found, *images}:
        general = re.sub(r"/.*", "/<class>", name)
        general = re.sub(r"^(noise|class|position)_bits_(first|last)$", r"<facet>_bits_\2", general)
        assert general in described, name
    log = (run.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    speeds = [json.loads(line).get("machine", {}).get("tokens_per_second") for line in log]
    assert found["train_tokens_per_second"] == np.median([s for s in speeds if s is not None])


def test_a_finished_dense_run_has_its_own_measures_only(tmp_path: Path) -> None:
    run = load_run(finished("text:dense", tmp_path / "dense"))
    found = evaluation.measure(run)
    assert found.keys() == {
        *("held_out_loss", "active_parameters", "slot_parameters", "train_tokens_per_second")
    }
    assert found["active_parameters"] == sum(p.numel() for p in run.model.parameters())
