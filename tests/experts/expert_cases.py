"""Configurations every expert test runs over, and how to run one of them with gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from coterie.core.context import NULL_LABEL, Context
from coterie.experts import ExpertLayer, ExpertLayerConfig, Router, RouterConfig

WIDTH, TIME_WIDTH, STEPS, BATCH = 16, 12, 50, 2

SWIGLU = {"kind": "swiglu", "hidden": 8}
GELU = {"kind": "gelu_mlp", "hidden": 8}

CASES: dict[str, dict] = {
    "dit_moe": {"num_experts": 8, "experts": SWIGLU, "shared": {"hidden": 16}},
    "top_1": {"num_experts": 4, "experts": GELU, "router": {"select": {"kind": "top_k", "k": 1}}},
    "renorm": {"num_experts": 5, "experts": GELU, "router": {"weight": "renorm"}},
    "softmax_after": {"num_experts": 5, "experts": SWIGLU, "router": {"when": "after"}},
    "deepseek_v3": {
        "num_experts": 8,
        "experts": SWIGLU,
        "shared": {"hidden": 8, "count": 2},
        "router": {
            "probability": "sigmoid",
            "weight": "renorm",
            "scale": 2.5,
            "selection_bias": True,
            "select": {
                "kind": "group_limited",
                "k": 3,
                "groups": 4,
                "top_groups": 2,
                "group_score": "top2_sum",
            },
        },
    },
    "diffusion_gemma": {
        "num_experts": 5,
        "experts": {"kind": "swiglu", "hidden": 8, "activation": "gelu_tanh"},
        "router": {"weight": "renorm", "expert_scale": True},
    },
    "mofme": {
        "num_experts": 5,
        "experts": "modulation",
        "router": {"when": "after", "score": {"kind": "uncertain", "evaluate": "passes"}},
        "stem": "star",
        "adaptor": 2.0,
    },
    "mofme_vector": {
        "num_experts": 4,
        "experts": {"kind": "modulation", "form": "vector"},
        "router": {"score": {"kind": "uncertain", "whiten": "full"}},
        "stem": "star",
    },
    "promoe": {
        "num_experts": 6,
        "experts": GELU,
        "shared": {"hidden": 8},
        "router": {
            "score": "cosine",
            "probability": "identity",
            "select": {"kind": "top_k", "k": 1},
            "partition": "null_label",
        },
    },
    "promoe_expert_choice": {
        "num_experts": 6,
        "experts": GELU,
        "shared": {"hidden": 8},
        "router": {
            "score": "cosine",
            "probability": "identity",
            "select": {"kind": "expert_choice", "k": 1.0},
            "partition": "null_label",
        },
    },
    "switch_dit": {
        "num_experts": 3,
        "experts": {"kind": "affine"},
        "router": {"score": {"kind": "noise_level", "table": True}},
    },
    "dtr": {
        "num_experts": None,
        "experts": {"kind": "channel_window", "share": 0.8},
        "router": {
            "score": "noise_window",
            "probability": "identity",
            "select": {"kind": "top_k", "k": 1},
            "weight": "one",
        },
    },
    "mode_policy": {
        "num_experts": 4,
        "experts": GELU,
        "router": {
            "score": {"kind": "noise_level", "hidden": 24, "silu": False, "init_std": 0.5},
            "select": {"kind": "random", "k": 2},
            "weight": "renorm",
        },
    },
    "top_p": {
        "num_experts": 6,
        "experts": SWIGLU,
        "router": {
            "select": {"kind": "top_p", "p": 0.5},
            "score": {"kind": "mlp", "init_std": 0.7},
        },
    },
    "straight_through": {
        "num_experts": 4,
        "experts": SWIGLU,
        "router": {"select": {"kind": "top_k", "k": 1}, "weight": "straight_through"},
    },
    "dense": {"num_experts": 4, "experts": SWIGLU, "router": {"select": "dense"}},
    "rank": {
        "num_experts": 5,
        "experts": GELU,
        "router": {"select": {"kind": "rank", "ranks": [1]}},
    },
    "fixed_experts": {
        "num_experts": 5,
        "experts": GELU,
        "router": {"select": {"kind": "fixed", "ids": [3, 1]}},
    },
    "hash": {
        "num_experts": 5,
        "experts": GELU,
        "router": {
            "score": {"kind": "fixed", "by": "position", "hashed": True},
            "probability": "identity",
            "select": {"kind": "top_k", "k": 1},
            "weight": "one",
        },
    },
    "chain": {"num_experts": 6, "experts": SWIGLU, "shared": {"hidden": 8}, "rounds": 2},
    "recurrent": {
        "num_experts": 5,
        "experts": SWIGLU,
        "rounds": 2,
        "router": {"score": {"kind": "recurrent", "state": 6, "init_std": 0.5}, "weight": "renorm"},
    },
    "merged_slots": {
        "num_experts": 6,
        "experts": SWIGLU,
        "slot_map": [0, 1, 0, 2, 2, 1],
        "router": {"select": {"kind": "top_k", "k": 3}},
    },
    "per_task": {
        "num_experts": 6,
        "experts": GELU,
        "shared": {"hidden": 8, "count": 2, "gate": "self"},
        "router": {
            "score": {"kind": "task_linear", "num_tasks": 2},
            "edits": [{"kind": "candidates", "by_task": [[0, 1, 4], [2, 3, 5]]}],
            "select": "dense",
        },
    },
    "home": {
        "num_experts": 6,
        "experts": {"kind": "norm_mlp", "hidden": 8, "feature_rank": 4},
        "router": {
            "score": {"kind": "task_linear", "num_tasks": 2},
            "edits": [{"kind": "candidates", "by_task": [[0, 1, 2], [0, 3, 4, 5]]}],
            "select": "dense",
        },
        "self_gate": {"by_task": [[1], [4, 5]]},
        "noise_tasks": 2,
    },
    "batch_norm": {"num_experts": 5, "experts": {"kind": "norm_mlp", "hidden": 8}},
    "layer_norm": {
        "num_experts": 5,
        "experts": {"kind": "norm_mlp", "norm": "layer", "activation": "gelu"},
        "router": {"unit": "sample"},
    },
    "streams": {
        "num_experts": None,
        "experts": {"kind": "norm_mlp", "streams": 2, "reads": [0, 1, 1, 0], "norm": "none"},
        "router": {"select": {"kind": "top_k", "k": 3}},
    },
    "sample_linear": {"num_experts": 4, "experts": SWIGLU, "router": {"unit": "sample"}},
}


def config(name: str, **changes: object) -> ExpertLayerConfig:
    return ExpertLayerConfig.from_dict({**CASES[name], **changes})


def build(name: str, dtype: torch.dtype = torch.float32, **changes: object) -> ExpertLayer:
    """The layer with every parameter random (also those that start at zero)."""
    layer = config(name, **changes).build(WIDTH, TIME_WIDTH)
    layer.reset_parameters(torch.Generator().manual_seed(3))
    rng = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.abs().max() == 0:
                parameter.normal_(0.0, 0.3, generator=rng)
    return layer.to(dtype)


def time_embedding(steps: Tensor) -> Tensor:
    angles = steps.float()[:, None] * torch.linspace(0.01, 1.0, TIME_WIDTH)
    return torch.sin(angles)


def router(num_experts: int = 6, seed: int = 1, **fields: object) -> Router:
    made = RouterConfig.from_dict(fields).build(WIDTH, num_experts, TIME_WIDTH)
    made.reset_parameters(torch.Generator().manual_seed(seed))
    return made


def context(
    tokens: int, batch: int = BATCH, null: tuple[int, ...] = (1,), mask: Tensor | None = None
) -> Context:
    """A context in which every score finds what it reads; samples in ``null`` are unconditional."""
    label = torch.arange(batch)
    label[list(null)] = NULL_LABEL
    steps = torch.linspace(3, STEPS - 1, max(batch, 1)).long()[:batch]
    return Context(
        batch=batch,
        tokens=tokens,
        noise=steps.float() / (STEPS - 1),
        step_index=steps,
        num_steps=STEPS,
        time_embedding=time_embedding(steps),
        time_table=lambda: time_embedding(torch.arange(STEPS)),
        label=label,
        task=torch.arange(batch) % 2,
        modality=torch.arange(batch) % 2,
        sample_ids=torch.arange(batch) + 7,
        token_mask=mask,
        training=True,
    )


def inputs(tokens: int, batch: int = BATCH, dtype: torch.dtype = torch.float32) -> Tensor:
    rng = torch.Generator().manual_seed(5)
    return torch.randn(batch, tokens, WIDTH, generator=rng).to(dtype).requires_grad_()


def run(layer: ExpertLayer, h: Tensor, ctx: Context) -> tuple[Tensor, dict[str, Tensor]]:
    """Output, and the gradient of a random projection of it for h and every parameter."""
    layer.zero_grad()
    h.grad = None
    out = layer(h, ctx)
    weight = torch.randn(out.y.shape, generator=torch.Generator().manual_seed(6)).to(out.y.dtype)
    if out.y.requires_grad:
        (out.y * weight).sum().backward()
    grads = {name: p.grad for name, p in layer.named_parameters()}
    grads["h"] = h.grad
    return out.y.detach(), {
        name: torch.zeros(()) if grad is None else grad.clone() for name, grad in grads.items()
    }
