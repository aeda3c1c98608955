"""Combinations that cannot work are refused before anything is built, in the house form."""

from __future__ import annotations

import warnings

import pytest
import torch
from expert_cases import WIDTH

from coterie.core.context import Context
from coterie.core.errors import ConfigError
from coterie.experts import EDITS, SCORES, SELECTS, ExpertLayerConfig, RouterConfig

REFUSED = [
    ({"num_experts": 4, "router": {"select": {"kind": "top_k", "k": 5}}},
     r"router\.select\.k: 5 .* k > E"),
    ({"router": {"select": {"kind": "top_k", "k": 0}}}, r"router\.select.*k"),
    ({"router": {"select": {"kind": "top_p", "p": 0.0}}}, r"router\.select.*p: 0\.0"),
    ({"router": {"select": {"kind": "top_p", "p": 1.5}}}, r"router\.select.*p: 1\.5"),
    ({"router": {"select": {"kind": "top_p", "p": -0.1}}}, r"router\.select.*p: -0\.1"),
    ({"router": {"select": {"kind": "top_p", "p": float("nan")}}}, r"select.*p: nan.*finite"),
    ({"router": {"select": {"kind": "top_p", "min_k": 9}}}, r"select\.min_k: 9 .*1\.\.8"),
    ({"router": {"select": {"kind": "top_p", "min_k": 3, "max_k": 2}}}, r"select\.min_k: 3"),
    ({"router": {"select": {"kind": "top_p", "max_k": 9}}}, r"select\.max_k: 9"),
    ({"router": {"select": {"kind": "rank", "ranks": [8]}}}, r"select\.ranks"),
    ({"router": {"select": {"kind": "rank", "ranks": [1, 1]}}}, r"select\.ranks.*different"),
    ({"router": {"select": {"kind": "fixed", "ids": [8]}}}, r"select\.ids"),
    ({"router": {"select": {"kind": "group_limited", "groups": 3}}},
     r"select\.groups: 3 .*divisor"),
    ({"router": {"select": {"kind": "group_limited", "k": 5, "groups": 4, "top_groups": 2}}},
     r"select\.k: 5 .*1\.\.4"),
    ({"router": {"score": "noise_level", "select": "expert_choice"}},
     r"router\.select: 'expert_choice'"),
    ({"router": {"score": "noise_window", "select": "expert_choice"}}, r"router\.select"),
    ({"router": {"when": "after", "select": "expert_choice"}}, r"router\.when"),
    ({"router": {"probability": "identity", "weight": "renorm"}}, r"router\.weight: 'renorm'"),
    ({"router": {"probability": "sigmoid", "when": "after"}}, r"router\.probability"),
    ({"router": {"probability": "identity", "select": "top_p"}}, r"router\.probability"),
    ({"router": {"edits": [{"kind": "candidates", "allowed": [8]}]}}, r"router\.edits\.0\.allowed"),
    ({"router": {"edits": [{"kind": "candidates", "by_task": [[0], [8, 1]]}]}},
     r"router\.edits\.0\.by_task: \(8, 1\).*0\.\.7"),
    ({"router": {"edits": [{"kind": "candidates", "by_task": [[0], []]}]}}, r"by_task.*no expert"),
    ({"router": {"edits": [{"kind": "candidates"}]}}, r"allowed: \(\)"),
    ({"router": {"edits": [{"kind": "progressive", "start": 9}]}}, r"edits\.0\.start: 9"),
    ({"router": {"edits": [{"kind": "progressive", "start": 1}]}},
     r"router\.select: .top_k. .*at most 1, not 2.*1 candidates"),
    ({"router": {"edits": [{"kind": "progressive", "start": 1}],
                 "select": {"kind": "rank", "ranks": [1]}}}, r"router\.select: .rank. .*not 2"),
    ({"router": {"edits": [{"kind": "progressive"}], "select": "fixed"}},
     r"router\.select: .fixed. .*edits\.0 \(progressive\) may close"),
    ({"router": {"edits": [{"kind": "jitter", "masks": "probs"}]}}, r"masks: .probs. .*no cand"),
    ({"router": {"edits": [{"kind": "progressive", "begin": 0.5}]}}, r"edits\.0.*end: 0\.3"),
    ({"router": {"edits": [{"kind": "candidates"}]}}, r"edits\.0.*allowed"),
    ({"balance": [{"kind": "switch", "pooled": True, "statistics": "sequence"}]}, "statistics"),
    ({"router": {"score": {"kind": "lineer"}}}, r"did you mean 'linear'"),
    ({"slot_map": [0, 1]}, r"slot_map: \(0, 1\) .*8 entries"),
    ({"slot_map": [0, 0, 0, 0, 2, 2, 2, 2]}, r"slot_map.*every tensor"),
    ({"balance": ["contrastive"]}, r"balance\.0\.kind: 'contrastive' .*cosine"),
    ({"balance": ["diffusion_prior"]}, r"balance\.0\.kind"),
    ({"balance": ["selection_bias"]}, r"balance\.0\.kind.*selection_bias=true"),
    ({"balance": ["switch"], "router": {"score": "cosine", "probability": "identity"}},
     r"balance\.0\.kind: 'switch'"),
    ({"balance": ["entropy"], "router": {"probability": "sigmoid"}}, r"balance\.0\.kind"),
    ({"balance": [{"kind": "switch", "groups": 3}]}, r"balance\.0\.groups: 3 .*divisor of 8"),
    ({"shared": {"hidden": 4}, "experts": "affine"}, r"affine.*inner size"),
    ({"stem": "star", "num_experts": None, "experts": "channel_window"}, r"stem.*ignore"),
    ({"num_experts": 0}, r"num_experts"),
    ({"num_expert": 8}, r"num_expert"),
    ({"rounds": 0}, r"rounds"),
    ({"shared": {"hidden": 0}}, r"shared\.hidden"),
]  # fmt: skip


@pytest.mark.parametrize("data, message", REFUSED, ids=[m for _, m in REFUSED])
def test_impossible_combinations_are_refused(data: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ExpertLayerConfig.from_dict(data)


@pytest.mark.parametrize(
    "data, message",
    [
        ({"router": {"partition": "null_label"}}, r"router\.partition: 'null_label' .*fixed"),
        ({"slot_map": [0, 1, 0, 1, 2]}, r"slot_map: \(0, 1, 0, 1, 2\) .*fixed"),
        ({"router": {"select": {"kind": "top_k", "k": 6}}}, r"router\.select\.k: 6 .*k > E"),
        ({"balance": [{"kind": "switch", "groups": 2}]}, r"balance\.0\.groups: 2 .*divisor of 5"),
    ],
)
def test_what_a_fixed_number_of_experts_rules_out(data: dict, message: str) -> None:
    """Known once the width is, and refused before anything is built."""
    fixed = {"num_experts": None, "experts": {"kind": "channel_window", "share": 0.75}}
    made = ExpertLayerConfig.from_dict({**fixed, **data})
    with pytest.raises(ConfigError, match=message):
        made.check(WIDTH)


def test_a_router_state_of_another_shape_is_refused() -> None:
    score = {"kind": "recurrent", "state": 3}
    router = RouterConfig.from_dict({"score": score}).build(WIDTH, 4)
    for foreign in (torch.zeros(10, 2), torch.zeros(5, 3)):
        with pytest.raises(ConfigError, match=r"router state: \(\d+, \d\) .*\(10, 3\), rows"):
            router(torch.zeros(2, 5, WIDTH), Context(2, 5, state=foreign))


def test_number_of_windows_belongs_to_the_experts() -> None:
    experts = {"kind": "channel_window", "share": 0.75}
    with pytest.raises(ConfigError, match=r"num_experts: 8 .* null or 5"):
        ExpertLayerConfig.from_dict({"num_experts": 8, "experts": experts}).build(WIDTH)
    made = ExpertLayerConfig.from_dict({"num_experts": None, "experts": experts})
    assert made.candidates(WIDTH) == 5
    with pytest.raises(ConfigError, match="num_experts: None"):
        ExpertLayerConfig(num_experts=None).build(WIDTH)


@pytest.mark.parametrize("fields", [{"weight": "renorm"}, {"when": "after"}])
@pytest.mark.parametrize("select", [{"kind": "top_k", "k": 1}, {"kind": "rank", "ranks": [0]}])
def test_one_renormalised_choice_warns_of_its_missing_gradient(fields: dict, select: dict) -> None:
    one = {"select": select, **fields}
    with pytest.warns(UserWarning, match="gives the router no gradient"):
        made = RouterConfig.from_dict(one)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RouterConfig.from_dict({**one, "weight": "raw", "when": "before"})
    router = made.build(WIDTH, 4)
    routing = router(torch.randn(1, 5, WIDTH), Context(1, 5))
    routing.gates.sum().backward()
    assert router.score.proj.weight.grad.abs().max() < 1e-6


@pytest.mark.parametrize(
    "fields, needs",
    [
        ({"score": "noise_level"}, "time embedding"),
        ({"score": "noise_window"}, "step index"),
        ({"score": {"kind": "task_linear", "num_tasks": 2}}, "task"),
        ({"score": {"kind": "fixed", "by": "label"}}, "score.by"),
        ({"edits": [{"kind": "candidates", "by_task": [[0], [1]]}]}, "task"),
    ],
)
def test_a_context_without_what_the_router_reads_is_named(fields: dict, needs: str) -> None:
    router = RouterConfig.from_dict(fields).build(WIDTH, 4)
    with pytest.raises(ConfigError, match=needs):
        router(torch.zeros(1, 2, WIDTH), Context(1, 2))


def test_registered_kinds() -> None:
    assert set(SCORES.kinds()) >= {
        "cosine", "fixed", "linear", "mlp", "noise_level", "noise_window", "recurrent",
        "task_linear",
    }  # fmt: skip
    assert set(EDITS.kinds()) >= {"bias_delta", "candidates", "jitter", "progressive"}
    assert set(SELECTS.kinds()) >= {
        "dense", "expert_choice", "fixed", "group_limited", "random", "rank", "top_k", "top_p",
    }  # fmt: skip
