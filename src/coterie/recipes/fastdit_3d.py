"""FastDiT-3D: point clouds whose transformer trains on few of its tokens, with experts."""

from __future__ import annotations

from typing import Any

from coterie.backbones import MaskConfig, PointsConfig, SlotConfig, TrunkConfig
from coterie.denoiser import DenoiserConfig
from coterie.experts import ExpertLayerConfig, RouterConfig
from coterie.recipes.base import Claim, Paper
from coterie.recipes.common import RECTIFIED_FLOW, SIZES
from coterie.runs.config import RunConfig, SampleConfig
from coterie.train.config import TrainConfig
from coterie.train.objectives import DenoisingConfig

PAPER = Paper(
    title="Fast Training of Diffusion Transformer with Extreme Masking for 3D Point Clouds "
    "Generation",
    authors="Mo, Shentong and Xie, Enze and Wu, Yue and Chen, Junsong and Nie{\\ss}ner, Matthias "
    "and Li, Zhenguo",
    year=2023,
    venue="ECCV 2024",
    arxiv="2312.07231",
    key="mo2023fastdit",
    url="https://github.com/DiT-3D/FastDiT-3D",
)
SUMMARY = "Voxel transformer trained on few foreground and background tokens; experts per token."

CLASSES = ("chair", "table", "plane")
DDPM: dict[str, Any] = {"process": {"kind": "ddpm", "schedule": "linear"}, "view": "eps"}
# Of each arm: its mask, and milliseconds of a training step on one core (benchmarks/masking.py).
# ``random`` drops what leaves as many tokens as ``aware`` on average, 95 of 512.
ARMS: dict[str, tuple[dict[str, Any], float]] = {
    "no-mask": ({"kind": "none"}, 390.0),
    "random": ({"kind": "random", "r": 0.815}, 118.0),
    "aware": ({"kind": "fgbg", "rf": 0.5, "rb": 0.9}, 122.0),
    "moe": ({"kind": "fgbg", "rf": 0.5, "rb": 0.9}, 148.0),
}
SECONDS = 60.0  # of training, the same for every arm


def slot(num_experts: int, balance: float = 0.01) -> SlotConfig:
    """One of several experts for each token, each as large as the network they replace."""
    expert = ExpertLayerConfig(
        num_experts=num_experts,
        experts={"kind": "gelu_mlp"},
        router=RouterConfig(select={"kind": "top_k", "k": 1}),
        balance=({"kind": "switch", "weight": balance},),
    )
    return SlotConfig(slot="ffn", expert=expert)


def small(arm: str = "moe") -> RunConfig:
    """Synthetic chairs, tables and planes of 512 points in 16^3 cells: 512 tokens, 4 + 2 blocks."""
    mask, milliseconds = ARMS[arm]
    backbone = PointsConfig(
        num_classes=len(CLASSES),
        mask=MaskConfig(**mask),
        trunk=TrunkConfig(width=64, depth=4, heads=2, slots=(slot(4),) if arm == "moe" else ()),
        decoder=TrunkConfig(width=32, depth=2, heads=2, window=4),
    )
    return RunConfig(
        recipe="fastdit-3d",
        preset="tiny",
        data={"kind": "solids", "classes": CLASSES, "count": 999, "held_out": 48},
        model=DenoiserConfig(backbone=backbone, **RECTIFIED_FLOW),
        objective=DenoisingConfig(times="logit_normal"),
        train=TrainConfig(
            steps=round(1000 * SECONDS / milliseconds), batch=8, lr=2e-3, ema=0.99, warmup=20
        ),
        sample=SampleConfig(solver="heun", steps=6),
    )


def tiny() -> RunConfig:
    return small()


def large(preset: str, num_experts: int, **changes: Any) -> RunConfig:
    """DiT-3D-S/4: 2,048 points, 32^3 cells, 12 + 4 blocks of width 384; drops 95 % and 99 %."""
    depth, width, heads = SIZES["S"]
    backbone = PointsConfig(
        num_points=2048,
        voxels=32,
        patch=4,
        num_classes=changes.pop("num_classes"),
        mask=MaskConfig(kind="fgbg", rf=0.95, rb=0.99),
        trunk=TrunkConfig(width=width, depth=depth, heads=heads, slots=(slot(num_experts),)),
        decoder=TrunkConfig(width=width, depth=4, heads=heads, window=4, window_layers=(2, 3)),
    )
    return RunConfig(
        recipe="fastdit-3d",
        preset=preset,
        data={"num_points": 2048, **changes.pop("data")},
        model=DenoiserConfig(backbone=backbone, **DDPM),
        objective=DenoisingConfig(),
        train=TrainConfig.from_dict({"lr": 1e-4, "clip": None, **changes}),
        sample=SampleConfig(solver="ancestral", steps=1000),
    )


def gpu() -> RunConfig:
    """Real furniture and more in nine classes, for one GPU: minutes, not days."""
    return large(
        "gpu", 4, num_classes=9, data={"kind": "furniture3d"}, steps=5000, batch=64, lr=3e-4
    )


def paper(num_experts: int = 4) -> RunConfig:
    """ShapeNet-v2 chairs, planes and cars (PC15k), 10,000 epochs of about 9,900 clouds."""
    data = {"kind": "cloud-folder", "path": "ShapeNetCore.v2.PC15k"}
    return large(
        "paper", num_experts, num_classes=3, data=data, steps=775_000, batch=128, ema=0.9999
    )


def arms() -> dict[str, RunConfig]:
    """Equal seconds of training, not equal steps: what masking saves is time."""
    return {arm: small(arm) for arm in ARMS}


def _claim(text: str, metric: str, ours: str, baseline: str, **options: Any) -> Claim:
    return Claim(text, metric, ours, baseline, equal="seconds", **options)


CLAIMS = (
    _claim("aware masking beats none in equal time", "held_out_loss", "aware", "no-mask"),
    _claim("aware masking beats random of as many tokens", "held_out_loss", "aware", "random"),
    _claim("samples are closer to real ones too", "mmd_cd", "aware", "no-mask"),
    _claim("and cover more of them", "coverage_cd", "aware", "no-mask", better="higher"),
    _claim("experts beat one network in equal time", "held_out_loss", "moe", "aware"),
    Claim("experts follow category", "class_bits_last", "moe", target=0.0, better="higher"),
)
DEPARTURES = (
    "number of experts and weight of the balance loss are not published: 4, top-1, 0.01",
    "each sample keeps its own exact numbers of tokens; shorter ones are padded and masked",
    "foreground is a patch with a point of the noisy input in it, as the encoder sees it",
    "decoder windows are attended apart; the published base code attends to all tokens",
    "tiny: rectified flow and synthetic solids; drops 50 % and 90 %, as 512 tokens hold about 110 "
    "of the foreground; both decoder blocks have windows",
    "clouds are scaled into the unit ball one by one, not to unit variance of the data set",
)
