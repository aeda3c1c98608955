"""What several recipes share: published DiT sizes, the small image run, the small text run."""

from __future__ import annotations

from typing import Any

from coterie.backbones import DiTConfig, SlotConfig, TrunkConfig, UNetConfig
from coterie.backbones.causal import TEXT_TRUNK, CausalConfig
from coterie.core.registry import Part
from coterie.denoiser import DenoiserConfig, TokenDenoiserConfig
from coterie.runs.config import RunConfig, SampleConfig
from coterie.solvers import GuidanceConfig, ThresholdConfig
from coterie.train.config import TrainConfig
from coterie.train.objectives import DenoisingConfig, NextTokenConfig

# depth, width, heads of the published sizes (DiT, arXiv:2212.09748; G: DiT-MoE).
SIZES = {
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
    "G": (40, 1408, 16),
}

RECTIFIED_FLOW: dict[str, Any] = {"process": "rectified_flow", "view": "flow"}
DDPM: dict[str, Any] = {"process": {"kind": "ddpm", "schedule": "cosine"}, "view": "eps"}


def image_trunk(size: str, *slots: SlotConfig, **changes: Any) -> TrunkConfig:
    depth, width, heads = SIZES[size]
    return TrunkConfig(depth=depth, width=width, heads=heads, slots=slots, **changes)


def image_paper(recipe: str, trunk: TrunkConfig, **changes: Any) -> RunConfig:
    """ImageNet 256 px in the latent space of a factor-8 autoencoder: 32 x 32 x 4, patch 2.

    The variance is learnt in DDPM only: rectified flow has none.
    """
    flow = changes.pop("flow", True)
    kind = RECTIFIED_FLOW if flow else DDPM
    backbone = DiTConfig(
        image_size=32,
        channels=4,
        patch=2,
        num_classes=1000,
        learned_variance=not flow,
        trunk=trunk,
    )
    times = "logit_normal" if flow else "uniform"
    settings: dict[str, Any] = {
        "steps": 400_000,
        "batch": 256,
        "lr": 1e-4,
        "ema": 0.9999,
        "clip": None,
        "checkpoint_every": 5_000,
        **changes.pop("train", {}),
    }
    sampler = {"solver": "euler", "steps": 250} if flow else {"solver": "ancestral", "steps": 250}
    return RunConfig(
        recipe=recipe,
        preset="paper",
        data={"kind": "latents", "path": "imagenet-latents"},
        model=DenoiserConfig(backbone=backbone, **kind),
        objective=DenoisingConfig(times=times, **changes.pop("objective", {})),
        train=TrainConfig.from_dict(settings),
        sample=SampleConfig.from_dict({**sampler, "guidance": {"weight": 1.5}}),
    )


def image_tiny(
    recipe: str,
    *slots: SlotConfig,
    flow: bool = True,
    steps: int = 600,
    trunk: dict[str, Any] | None = None,
    objective: dict[str, Any] | None = None,
    **changes: Any,
) -> RunConfig:
    """Handwritten digits (5,000 of MNIST, 28 x 28), 16 tokens of 7 x 7 pixels, width 64, 4 blocks:
    one to two minutes on one core."""
    sizes = {"width": 64, "depth": 4, "heads": 4, **(trunk or {})}
    backbone = DiTConfig(trunk=TrunkConfig(**sizes, slots=slots))
    return _digits(recipe, backbone, flow, steps, objective, changes)


def unet_tiny(
    recipe: str,
    *slots: SlotConfig,
    flow: bool = True,
    steps: int = 300,
    sizes: dict[str, Any] | None = None,
    objective: dict[str, Any] | None = None,
    **changes: Any,
) -> RunConfig:
    """The same digits by a U-Net of 16, 32 and 32 channels at 28, 14 and 7 pixels: two to three
    minutes on one core. It learns more per step than the small transformer, which has eight of
    them in the same time."""
    backbone = UNetConfig.from_dict({"widths": (16, 32, 32), **(sizes or {}), "slots": slots})
    return _digits(recipe, backbone, flow, steps, objective, {"batch": 32, **changes})


def _digits(
    recipe: str,
    backbone: Part,
    flow: bool,
    steps: int,
    objective: dict[str, Any] | None,
    changes: dict[str, Any],
) -> RunConfig:
    """A short run on 5,000 digits of MNIST."""
    kind = RECTIFIED_FLOW if flow else DDPM
    times = "logit_normal" if flow else "uniform"
    sampler = {"solver": "heun" if flow else "dpmpp_2m", "steps": 12 if flow else 24}
    grid = "uniform" if flow else "lambda"
    return RunConfig(
        recipe=recipe,
        preset="tiny",
        data={"kind": "mnist-5k"},
        model=DenoiserConfig(backbone=backbone, **kind),
        objective=DenoisingConfig.from_dict({"times": times, **(objective or {})}),
        train=TrainConfig.from_dict(
            {"steps": steps, "batch": 64, "lr": 2e-3, "ema": 0.99, "warmup": 50, **changes}
        ),
        sample=SampleConfig(
            **sampler,
            grid=grid,
            guidance=GuidanceConfig(weight=2.0),
            # eps -> x0 divides by alpha, which is almost 0 where this schedule starts.
            threshold=None if flow else ThresholdConfig(),
        ),
    )


def text_tiny(
    recipe: str,
    *slots: SlotConfig,
    steps: int = 400,
    context: int = 128,
    trunk: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    **changes: Any,
) -> RunConfig:
    """Python's own help topics as bytes: 3 blocks of width 96, windows of ``context`` bytes.

    ``trunk`` and ``data`` change the sizes and the source.
    """
    sizes = TEXT_TRUNK.replace(**(trunk or {}), slots=slots)
    return RunConfig(
        recipe=recipe,
        preset="text",
        data={"kind": "pydoc-topics", **(data or {}), "context": context},
        model=TokenDenoiserConfig(backbone=CausalConfig(context=context, trunk=sizes)),
        objective=NextTokenConfig(),
        train=TrainConfig.from_dict(
            {
                "steps": steps,
                "batch": 16,
                "lr": 2e-3,
                "betas": (0.9, 0.95),
                "weight_decay": 0.1,
                "ema": 0.99,
                "warmup": 50,
                **changes,
            }
        ),
    )


def text_paper(
    recipe: str,
    *slots: SlotConfig,
    trunk: dict[str, Any],
    context: int,
    vocabulary: int = 260,
    **train: Any,
) -> RunConfig:
    """A language model of published sizes; bytes of a dictionary stand where papers have the web.

    ``vocabulary`` is that of the paper, so that parameters count as printed.
    """
    dictionary = {"kind": "gcide"}
    config = text_tiny(recipe, *slots, context=context, trunk=trunk, data=dictionary, **train)
    backbone = config.model.backbone.replace(vocabulary=vocabulary)
    return config.replace(preset="paper", model=config.model.replace(backbone=backbone))
