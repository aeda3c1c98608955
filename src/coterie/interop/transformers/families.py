"""What each class of router does with its logits: the only table of names here.

Confirmed by reading and running the classes of transformers 5.23. A router that is not in the
table is refused: its rule cannot be read off its shape.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from coterie.core.errors import ConfigError, describe
from coterie.experts import RouterConfig


@dataclass(frozen=True)
class Rule:
    """From logits to choices and gates.

    ``groups`` 1: the ``top_k`` best; else the best within the best ``top_groups`` groups, a group
    scored by ``group_score``. Gates: selected probabilities, divided by their sum if ``renorm``,
    times ``scale`` and, with ``expert_scale``, a number of each expert. ``selection_bias``: a
    vector added for the selection alone.
    """

    num_experts: int
    top_k: int
    probability: Literal["softmax", "sigmoid"] = "softmax"
    renorm: bool = False
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1
    group_score: Literal["max", "top2_sum"] = "max"
    selection_bias: bool = False
    expert_scale: bool = False

    def router_config(self, score: str = "linear") -> RouterConfig:
        """The same rule as a configuration of our router; ``given``: one that is fed logits."""
        return _router_config(self, score)


@lru_cache(maxsize=256)
def _router_config(rule: Rule, score: str) -> RouterConfig:
    select: dict[str, Any] = {"kind": "top_k", "k": rule.top_k}
    if rule.top_groups < rule.groups:
        select = {"kind": "group_limited", "k": rule.top_k, "groups": rule.groups}
        select |= {"top_groups": rule.top_groups, "group_score": rule.group_score}
    config = RouterConfig.from_dict(
        {
            "score": score,
            "probability": rule.probability,
            "select": select,
            "weight": "renorm" if rule.renorm else "raw",
            "scale": rule.scale,
            "selection_bias": rule.selection_bias,
            "expert_scale": rule.expert_scale,
        }
    )
    config.check(rule.num_experts)
    return config


@dataclass(frozen=True)
class Family:
    """One kind of layer: the classes it is made of and how its rule is read.

    ``blocks``: classes that hold gate and experts. ``logits``: where the raw logits are found, in
    the router's ``output`` or as what its submodule of that name answers. ``shared``: attribute of
    an MLP that is always on, weighted by a sigmoid of ``shared_gate`` where there is one.
    """

    kind: str
    router: str
    blocks: tuple[str, ...]
    read: Callable[[Any], Rule]
    logits: str = "output"
    shared: str = ""
    shared_gate: str = ""


def _renormalised(gate: Any) -> Rule:
    return Rule(gate.num_experts, gate.top_k, renorm=True)


def _by_flag(gate: Any) -> Rule:
    return Rule(gate.num_experts, gate.top_k, renorm=bool(gate.norm_topk_prob))


def _deepseek_v2(gate: Any) -> Rule:
    """The configuration's norm_topk_prob is read by no line of this class."""
    rule = Rule(gate.num_experts, gate.top_k, scale=float(gate.routed_scaling_factor))
    if gate.topk_method == "greedy":
        return rule
    if gate.topk_method != "group_limited_greedy":
        allowed = "greedy or group_limited_greedy"
        raise ConfigError(describe("topk_method", gate.topk_method, allowed))
    return Rule(
        rule.num_experts,
        rule.top_k,
        scale=rule.scale,
        groups=gate.num_group,
        top_groups=gate.topk_group,
    )


def _deepseek_v3(gate: Any) -> Rule:
    return Rule(
        gate.num_experts,
        gate.top_k,
        probability="sigmoid",
        renorm=bool(gate.norm_topk_prob),
        scale=float(gate.routed_scaling_factor),
        groups=gate.num_group,
        top_groups=gate.topk_group,
        group_score="top2_sum",
        selection_bias=True,
    )


def _diffusion_gemma(router: Any) -> Rule:
    config = router.config
    return Rule(config.num_experts, config.top_k_experts, renorm=True, expert_scale=True)


FAMILIES = (
    Family("mixtral", "MixtralTopKRouter", ("MixtralSparseMoeBlock",), _renormalised),
    Family("olmoe", "OlmoeTopKRouter", ("OlmoeSparseMoeBlock",), _by_flag),
    Family(
        "qwen2_moe",
        "Qwen2MoeTopKRouter",
        ("Qwen2MoeSparseMoeBlock",),
        _by_flag,
        shared="shared_expert",
        shared_gate="shared_expert_gate",
    ),
    Family("qwen3_moe", "Qwen3MoeTopKRouter", ("Qwen3MoeSparseMoeBlock",), _by_flag),
    Family(
        "deepseek_v2",
        "DeepseekV2TopkRouter",
        ("DeepseekV2Moe",),
        _deepseek_v2,
        shared="shared_experts",
    ),
    Family(
        "deepseek_v3",
        "DeepseekV3TopkRouter",
        ("DeepseekV3MoE",),
        _deepseek_v3,
        shared="shared_experts",
    ),
    Family(
        "diffusion_gemma",
        "DiffusionGemmaTextRouter",
        ("DiffusionGemmaEncoderTextLayer", "DiffusionGemmaDecoderTextLayer"),
        _diffusion_gemma,
        logits="proj",
    ),
)

KNOWN = tuple(family.kind for family in FAMILIES)


def family_of(router: object, block: object) -> Family | None:
    """The family of a router inside a block, by the names of their classes; None if unknown."""
    names = (type(router).__name__, type(block).__name__)
    for family in FAMILIES:
        if names[0] == family.router and names[1] in family.blocks:
            return family
    return None
