"""The layers of the seven classes written out row by row, from the table of their rules.

Independent of the library: plain Python for choices and gates, one expert after the other for
answers, all in float64. ``h`` is what the experts read, ``x`` what the router reads; they differ
in DiffusionGemma only.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Gates = list[dict[int, float]]  # per row: expert -> gate, in the order of preference


def softmax(values: list[float]) -> list[float]:
    top = max(values)
    powers = [math.exp(v - top) for v in values]
    return [p / sum(powers) for p in powers]


def best(values: list[float], k: int, among: list[int] | None = None) -> list[int]:
    allowed = range(len(values)) if among is None else among
    return sorted(allowed, key=lambda e: -values[e])[:k]


def renormalised(probs: list[float], chosen: list[int]) -> dict[int, float]:
    total = sum(probs[e] for e in chosen)
    return {e: probs[e] / total for e in chosen}


def logits_of(kind: str, router: Any, x: Tensor) -> Tensor:
    """f64 [R, E]."""
    x = x.double()
    if kind != "diffusion_gemma":
        return x @ router.weight.double().T
    norm = x / torch.sqrt((x * x).mean(1, keepdim=True) + 1e-6)
    return (norm * router.scale.double() / math.sqrt(x.shape[1])) @ router.proj.weight.double().T


def gates_of(kind: str, router: Any, logits: Tensor, k: int = 3) -> Gates:
    return [row_gates(kind, router, row, k) for row in logits.double().tolist()]


def row_gates(kind: str, router: Any, logits: list[float], k: int) -> dict[int, float]:
    """Experts with a logit of -inf are closed: where too few are left, a row has fewer."""
    gates = full_row_gates(kind, router, logits, k)
    return {e: gate for e, gate in gates.items() if logits[e] > -math.inf}


def full_row_gates(kind: str, router: Any, logits: list[float], k: int) -> dict[int, float]:
    probs = softmax(logits)
    if kind in ("mixtral", "qwen2_moe", "qwen3_moe"):
        return renormalised(probs, best(probs, k))
    if kind == "olmoe":  # norm_topk_prob is False there
        return {e: probs[e] for e in best(probs, k)}
    if kind == "diffusion_gemma":
        gates = renormalised(probs, best(probs, k))
        return {e: g * router.per_expert_scale[e].item() for e, g in gates.items()}
    if kind == "deepseek_v2":  # 4 groups of 2, scored by their best; the best 2 groups are open
        groups = best([max(probs[2 * g : 2 * g + 2]) for g in range(4)], 2)
        open_ = [e for g in groups for e in (2 * g, 2 * g + 1)]
        return {e: 1.5 * probs[e] for e in best(probs, k, open_)}
    assert kind == "deepseek_v3"
    scores = [1 / (1 + math.exp(-v)) if v > -math.inf else -math.inf for v in logits]
    keys = [s + b for s, b in zip(scores, router.e_score_correction_bias.tolist())]
    pairs = [[key for key in keys[2 * g : 2 * g + 2] if key > -math.inf] for g in range(4)]
    groups = best([sum(pair) if pair else -math.inf for pair in pairs], 2)
    open_ = [e for g in groups for e in (2 * g, 2 * g + 1)]
    chosen = best(keys, k, open_)
    chosen = [e for e in chosen if keys[e] > -math.inf]
    total = sum(scores[e] for e in chosen)
    return {e: 1.5 * scores[e] / total for e in chosen}


def answer(kind: str, experts: Any, h: Tensor, gates: Gates) -> Tensor:
    """f64 [R, D], the routed experts."""
    rows = []
    for row, chosen in zip(h.double(), gates):
        total = torch.zeros_like(row)
        for e, gate in chosen.items():
            weight = experts.gate_up_proj[e].double()
            half = len(weight) // 2
            inner = weight[:half] @ row
            if kind == "diffusion_gemma":
                inner = F.gelu(inner, approximate="tanh")
            else:
                inner = inner * torch.sigmoid(inner)
            total = total + gate * (experts.down_proj[e].double() @ (inner * (weight[half:] @ row)))
        rows.append(total)
    return torch.stack(rows)


def always_on(kind: str, block: Any, h: Tensor) -> Tensor:
    """f64 [R, D], what every row gets besides."""
    h = h.double()
    mlp = {"qwen2_moe": "shared_expert", "deepseek_v2": "shared_experts"}
    mlp["deepseek_v3"] = mlp["deepseek_v2"]
    if kind not in mlp:
        return torch.zeros_like(h)
    module = getattr(block, mlp[kind])
    gate, up, down = (
        getattr(module, name).weight.double() for name in ("gate_proj", "up_proj", "down_proj")
    )
    out = (F.silu(h @ gate.T) * (h @ up.T)) @ down.T
    if kind == "qwen2_moe":
        out = torch.sigmoid(h @ block.shared_expert_gate.weight.double().T) * out
    return out
