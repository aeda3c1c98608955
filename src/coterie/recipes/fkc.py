"""FKC: denoisers that were trained apart, composed right in distribution by weighted particles."""

from __future__ import annotations

from typing import Literal

from coterie.ensembles.model import EnsembleModelConfig, MemberConfig
from coterie.ensembles.product import CompositionConfig
from coterie.recipes.base import Claim, Paper
from coterie.recipes.common import image_paper, image_tiny, image_trunk
from coterie.runs.config import RunConfig
from coterie.runs.origins.trained_model import PretrainedConfig
from coterie.solvers import GuidanceConfig

PAPER = Paper(
    title="Feynman-Kac Correctors in Diffusion: Annealing, Guidance, and Product of Experts",
    authors="Skreta, Marta and Akhound-Sadegh, Tara and Ohanesian, Viktor and others",
    year=2025,
    venue="ICML 2025",
    arxiv="2503.02819",
    key="skreta2025fkc",
    url="https://github.com/martaskrta/fkc-diffusion",
)
SUMMARY = "Products, averages and powers of trained denoisers by weighted, resampled particles."

LOW, HIGH = (0, 1, 2, 3, 4, 5), (3, 4, 5, 6, 7, 8, 9)
BOTH = (3, 4, 5)  # all that is left where both densities are large
CALLS = 2 * 40  # of networks per sample that is returned, in every composed arm
PARTICLES = 50


def expert(classes: tuple[int, ...]) -> RunConfig:
    """An unconditional denoiser of some classes of the 8 x 8 digits."""
    config = image_tiny("fkc", flow=False)
    backbone = config.model.backbone.replace(image_size=8, patch=2, num_classes=0)
    return config.replace(
        data={"kind": "classes", "data": {"kind": "digits"}, "classes": classes},
        model=config.model.replace(backbone=backbone),
    )


def composed(
    betas: tuple[float, float],
    corrector: Literal["fkc", "none"] = "fkc",
    paths: tuple[str, str] = ("arm:low", "arm:high"),
    particles: int = PARTICLES,
) -> RunConfig:
    """Both experts as one; the data are what an average of both should look like."""
    members = tuple(
        MemberConfig(name=name, model=PretrainedConfig(path=path))
        for name, path in zip(("low", "high"), paths, strict=True)
    )
    base = expert(BOTH)
    return base.replace(
        model=EnsembleModelConfig(
            ensemble=CompositionConfig(betas=betas, corrector=corrector), members=members
        ),
        train=base.train.replace(steps=0),
        sample=base.sample.replace(
            solver={"kind": "feynman_kac", "particles": particles},
            steps=CALLS // 2,
            batch=5 * particles,
            guidance=GuidanceConfig(weight=1.0),
        ),
    )


def tiny() -> RunConfig:
    return expert(LOW)


def paper(size: str = "XL") -> RunConfig:
    """One network, its classes and its null class composed: the images of the paper."""
    return image_paper("fkc", image_trunk(size), flow=False)


def arms() -> dict[str, RunConfig]:
    """Every composed arm asks both networks equally often, and returns as many samples: those
    without a corrector move the same particles, unweighted."""
    return {
        "low": expert(LOW),
        "high": expert(HIGH),
        "sum": composed((0.5, 0.5), "none"),
        "fkc": composed((0.5, 0.5)),
        "product-sum": composed((1.0, 1.0), "none"),
        "product-fkc": composed((1.0, 1.0)),
    }


CLAIMS = (
    Claim(
        "nearer to what both experts know than summed scores (kernel distance)", "kid", "fkc", "sum"
    ),
    Claim("nearer to what both experts know than summed scores (Frechet)", "frechet", "fkc", "sum"),
    Claim("more samples look like real ones", "precision", "fkc", "sum", better="higher"),
    Claim("more samples of the classes both know", "in_classes", "fkc", "sum", better="higher"),
    Claim(
        "a product has more samples of the classes both know",
        "in_classes",
        "product-fkc",
        "product-sum",
        better="higher",
    ),
)
DEPARTURES = (
    "tiny: experts of overlapping classes of 8 x 8 digits in place of molecules and of guided "
    "ImageNet models; the exact table is `python benchmarks/compose.py`",
    "weights per unit of log signal-to-noise ratio, for every process; the published code has them "
    "per unit of sigma",
    "ancestral steps, with noise for what x0 varies by given x (`data_std`), in place of "
    "Euler-Maruyama, whose limit they share",
    "no clamping by default: it biases the target, and is counted where it is asked for",
    "an early interval without weights is a setting, off by default",
    "tiny: the product is worse with particles than without. Its rate sums |S|^2 over 64 pixels, "
    "and with them grows the spread of log weights: all samples of a system descend from one of "
    "its 50 particles, and weights follow the errors of experts. `python "
    "benchmarks/compose_dimensions.py` shows both on Gaussians: particles win in 1 and 4 "
    "dimensions and lose in 64. An average, whose rate is a difference of experts, suffers less",
)
