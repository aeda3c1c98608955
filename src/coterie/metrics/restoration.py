"""Similarity of a restored picture to the clean one: PSNR and SSIM.

Pictures are f32 [S, C, H, W] in [-1, 1], compared as floats (never rounded to 8 bits) after being
clamped to that range; the data range is 2. Legend: S pictures, W window.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from coterie.core.errors import DataError, describe

RANGE = 2.0
WINDOW, WINDOW_STD = 11, 1.5


def psnr(restored: Tensor, clean: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in decibels, f32 [S]; infinite for equal pictures."""
    restored, clean = _pair(restored, clean)
    error = (restored - clean).square().flatten(1).mean(1)
    return 10 * torch.log10(RANGE**2 / error)


def ssim(restored: Tensor, clean: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004), f32 [S]: Gaussian window of 11 pixels and
    standard deviation 1.5, population moments, K1 = 0.01, K2 = 0.03, no padding; the mean over
    channels and positions."""
    restored, clean = _pair(restored, clean)
    if min(clean.shape[2:]) < WINDOW:
        raise DataError(describe("clean.shape", tuple(clean.shape), f"{WINDOW} pixels or more"))
    window = _window().to(clean)

    def blur(values: Tensor) -> Tensor:
        channels = values.shape[1]
        kernel = window.expand(channels, 1, WINDOW)
        values = F.conv2d(values, kernel[..., None], groups=channels)
        return F.conv2d(values, kernel[:, :, None], groups=channels)

    mean_r, mean_c = blur(restored), blur(clean)
    var_r = blur(restored.square()) - mean_r.square()
    var_c = blur(clean.square()) - mean_c.square()
    both = blur(restored * clean) - mean_r * mean_c
    first, second = (0.01 * RANGE) ** 2, (0.03 * RANGE) ** 2
    luminance = (2 * mean_r * mean_c + first) / (mean_r.square() + mean_c.square() + first)
    structure = (2 * both + second) / (var_r + var_c + second)
    return (luminance * structure).flatten(1).mean(1)


def _window() -> Tensor:
    distance = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    weight = torch.exp(-distance.square() / (2 * WINDOW_STD**2))
    return weight / weight.sum()


def _pair(restored: Tensor, clean: Tensor) -> tuple[Tensor, Tensor]:
    if restored.shape != clean.shape or clean.dim() != 4:
        allowed = f"[S, C, H, W] as the clean pictures: {tuple(clean.shape)}"
        raise DataError(describe("restored.shape", tuple(restored.shape), allowed))
    for name, pictures in (("restored", restored), ("clean", clean)):
        if not bool(torch.isfinite(pictures).all()):
            raise DataError(f"{name}: holds NaN or infinity")
    return restored.double().clamp(-1, 1), clean.double().clamp(-1, 1)
