"""MoDE: a diffusion policy whose experts are chosen by the noise level alone."""

from __future__ import annotations

from typing import Any

from coterie.backbones import PolicyConfig, SlotConfig
from coterie.backbones.policy import POLICY_TRUNK
from coterie.denoiser import DenoiserConfig
from coterie.experts import ExpertLayerConfig, RouterConfig
from coterie.recipes.base import Claim, Paper
from coterie.runs.config import RunConfig, SampleConfig
from coterie.train.config import TrainConfig
from coterie.train.objectives import DenoisingConfig

PAPER = Paper(
    title="Efficient Diffusion Transformer Policies with Mixture of Expert Denoisers for Multitask"
    " Learning",
    authors="Reuss, Moritz and Pari, Jyothish and Agrawal, Pulkit and Lioutikov, Rudolf",
    year=2024,
    venue="ICLR 2025",
    arxiv="2412.12953",
    key="reuss2024mode",
    url="https://github.com/intuitive-robots/MoDE_Diffusion_Policy",
)
SUMMARY = "Policy of experts routed by noise: fused per denoising step, nothing lost."

EXPERTS, CHOSEN = 4, 2
RATIO = 2.0  # inner size of an expert in widths; the dense arm has that of the chosen together
EDM: dict[str, Any] = {
    "process": {"kind": "ve", "sigma_min": 0.001, "sigma_max": 80.0},
    "precondition": {"kind": "edm", "sigma_data": 0.5},
    "view": "x0",
}
# The weight cancels the preconditioning: plain squared error of the network's own answer.
OBJECTIVE = DenoisingConfig(times="log_logistic_sigma", weighting="edm", label_dropout=0.1)
TRAIN: dict[str, Any] = {
    **{"steps": 1200, "batch": 64, "lr": 2e-3, "ema": 0.99, "warmup": 50},
    **{"betas": (0.9, 0.95), "weight_decay": 0.05},
}
SAMPLE = SampleConfig(solver="ddim", grid="lambda", steps=10, batch=512)


def slot(
    width: int, depth: int, by: str = "noise", ratio: float = RATIO, balance: float = 0.01
) -> SlotConfig:
    """Experts in every block; ``balance`` is the weight of the mean over blocks, and k at best."""
    score: dict[str, Any] = {"kind": "mlp", "hidden": 2 * width, "init_std": 0.02}
    if by == "noise":
        score |= {"kind": "noise_level", "silu": False}
    loss = {"kind": "switch", "weight": balance / depth, "per_choice": False, "importance": "gates"}
    expert = ExpertLayerConfig(
        num_experts=EXPERTS,
        experts={"kind": "swiglu", "ratio": ratio},
        router=RouterConfig(score=score, select={"kind": "random", "k": CHOSEN}, weight="renorm"),
        balance=(loss,) if balance else (),
    )
    return SlotConfig(slot="ffn", expert=expert)


def policy(arm: str, width: int, depth: int, ratio: float, **sizes: Any) -> DenoiserConfig:
    """``arm``: noise, token, or dense, whose network is as wide as the chosen experts."""
    trunk = POLICY_TRUNK.replace(
        width=width,
        depth=depth,
        heads=sizes.pop("heads"),
        mlp_hidden=round(CHOSEN * ratio * width),
        causal=sizes.pop("causal", True),
        slots=() if arm == "dense" else (slot(width, depth, arm, ratio),),
    )
    return DenoiserConfig(backbone=PolicyConfig(trunk=trunk, **sizes), **EDM)


def run(preset: str, data: dict[str, Any], model: DenoiserConfig, train: TrainConfig) -> RunConfig:
    return RunConfig(
        recipe="mode-policy",
        preset=preset,
        data=data,
        model=model,
        objective=OBJECTIVE,
        train=train,
        sample=SAMPLE,
    )


def tiny(arm: str = "noise") -> RunConfig:
    """A point mass around an obstacle to one of four goals: 11 tokens, 3 blocks of width 64."""
    data = {"kind": "obstacle", "stride": 8}
    train = TrainConfig.from_dict({**TRAIN, "schedule": "cosine"})
    return run("tiny", data, policy(arm, 64, 3, RATIO, heads=4, causal=False), train)


def large(preset: str, data: dict[str, Any], model: DenoiserConfig, **train: Any) -> RunConfig:
    changes = {**TRAIN, "schedule": "tri_stage", "warmup": 0, "ema": 0.999, **train}
    return run(preset, data, model, TrainConfig.from_dict(changes))


def gpu() -> RunConfig:
    """The same task with ten times the episodes, for one GPU: minutes."""
    data = {"kind": "obstacle", "episodes": 20_000}
    model = policy("noise", 384, 6, 4.0, heads=6, causal=False)
    return large("gpu", data, model, steps=20_000, batch=512, lr=3e-4)


def paper() -> RunConfig:
    """LIBERO-90: two cameras' features of 2,048 values, 90 tasks, chunks of 10 actions of 7 values;
    12 blocks of width 1024, experts of four widths."""
    data = {"kind": "demonstrations", "path": "libero-90.npz", "horizon": 10, "num_goals": 90}
    seen = {"num_classes": 90, "observations": 2, "observation_size": 2048}
    model = policy("noise", 1024, 12, 4.0, heads=8, horizon=10, action_size=7, **seen)
    return large("paper", data, model, steps=45_000, batch=128, lr=1e-4)


def arms() -> dict[str, RunConfig]:
    """The same data and steps; the dense policy is as wide as the experts that one token uses."""
    return {arm: tiny(arm) for arm in ("noise", "token", "dense")}


CLAIMS = (
    Claim(
        "experts by noise act as well as a dense policy, within 2 %",
        "success", "noise", "dense", better="higher", tolerance=0.02,
    ),
    Claim(
        "and as well as experts by token, within 2 %",
        "success", "noise", "token", better="higher", tolerance=0.02,
    ),
    Claim("they predict better at equal active width", "held_out_loss", "noise", "dense"),
    Claim("most starts see both ways", "mode_coverage", "noise", target=0.5, better="higher"),
    Claim(
        "a cached call costs 30 % less than one with all experts",
        "cached_flops_per_call", "noise", against="all_experts_flops_per_call", factor=0.7,
    ),
    Claim("and actions stay as they are", "cache_difference", "noise", target=1e-5),
)  # fmt: skip
DEPARTURES = (
    "goals are one of N, each with a learnt embedding, and dropped whole; the paper embeds "
    "sentences by CLIP and drops single values",
    "observations are given as features; the paper trains FiLM-ResNets with the policy",
    "experts have no biases and no dropout, attention has no dropout",
    "noise embedding and input maps keep torch's initial scale: with N(0, 0.02) in a row routers "
    "hardly see the noise level",
    "tiny, gpu: attention is bidirectional; an action that sees no later one decides for a way of "
    "its own, and chunks mix two: success 0.84 after 1,000 steps, against 0.86 after 700",
    "tiny: experts of twice the width, not four times; cosine schedule, 2e-3",
    "the cache is keyed by step and layer and takes any k; the published one by a rounded mean of "
    "the embedding, and two experts",
)
