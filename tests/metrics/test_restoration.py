"""PSNR and SSIM against closed cases and a naive window by window computation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from coterie.core.errors import DataError
from coterie.metrics.restoration import psnr, ssim


def pictures(count: int = 2, side: int = 14, seed: int = 0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, side, side, generator=rng) * 1.6 - 0.8


def test_psnr_of_a_constant_error() -> None:
    clean = pictures()
    found = psnr(clean + torch.tensor([0.02, 0.2])[:, None, None, None], clean)
    want = [20 * math.log10(2 / 0.02), 20 * math.log10(2 / 0.2)]
    assert found.tolist() == pytest.approx(want, rel=1e-4)
    assert torch.isinf(psnr(clean, clean)).all()
    assert torch.equal(psnr(clean.clamp(-1, 1), clean + 0), psnr(clean, clean))


def test_values_out_of_range_are_clamped_and_not_rounded() -> None:
    clean = torch.ones(1, 1, 12, 12)
    assert torch.isinf(psnr(clean + 5, clean)).all()
    assert float(psnr(clean - 1e-4, clean)) == pytest.approx(20 * math.log10(2 / 1e-4), rel=1e-3)


def naive_ssim(first: np.ndarray, second: np.ndarray) -> float:
    place = np.arange(11) - 5
    line = np.exp(-(place**2) / (2 * 1.5**2))
    window = np.outer(line, line)
    window /= window.sum()
    found = []
    for channel in range(first.shape[0]):
        for y in range(first.shape[1] - 10):
            for x in range(first.shape[2] - 10):
                a = first[channel, y : y + 11, x : x + 11]
                b = second[channel, y : y + 11, x : x + 11]
                ma, mb = (window * a).sum(), (window * b).sum()
                va, vb = (window * (a - ma) ** 2).sum(), (window * (b - mb) ** 2).sum()
                cov = (window * (a - ma) * (b - mb)).sum()
                c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
                found.append(
                    (2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))
                )
    return float(np.mean(found))


def test_ssim_equals_the_naive_computation() -> None:
    clean, other = pictures(), pictures(seed=1)
    mixed = 0.7 * clean + 0.3 * other
    want = [naive_ssim(m.double().numpy(), c.double().numpy()) for m, c in zip(mixed, clean)]
    assert ssim(mixed, clean).tolist() == pytest.approx(want, abs=1e-9)
    assert ssim(clean, clean).tolist() == pytest.approx([1.0, 1.0])
    assert torch.allclose(ssim(mixed, clean), ssim(clean, mixed))


def test_pictures_that_do_not_fit_are_named() -> None:
    clean = pictures()
    with pytest.raises(DataError, match=r"restored\.shape: \(2, 3, 12, 12\)"):
        psnr(clean[..., :12, :12], clean)
    with pytest.raises(DataError, match="restored: holds NaN"):
        ssim(clean * float("nan"), clean)
    with pytest.raises(DataError, match="11 pixels"):
        ssim(clean[..., :8, :8], clean[..., :8, :8])
