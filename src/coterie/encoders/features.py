"""The interface of feature networks: pictures in, feature rows out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from coterie.core.errors import DataError, describe


@runtime_checkable
class Features(Protocol):
    """``name`` goes beside every number measured with it; ``dim`` is the width of a row."""

    name: str
    dim: int

    def __call__(self, images: Tensor) -> np.ndarray:
        """f32 [S, C, H, W] in [-1, 1] -> f32 [S, dim]."""
        ...


class ModuleFeatures:
    """Runs ``extract`` ([B, C, H, W] -> [B, dim]) over any number of pictures, in batches."""

    def __init__(
        self, name: str, dim: int, extract: Callable[[Tensor], Tensor], batch: int = 128
    ) -> None:
        self.name, self.dim, self._extract, self._batch = name, dim, extract, batch

    def __call__(self, images: Tensor) -> np.ndarray:
        check_images(images)
        with torch.inference_mode():
            pieces = [self._extract(part).float().cpu() for part in images.split(self._batch)]
        rows = torch.cat(pieces).numpy()
        if rows.shape != (len(images), self.dim):
            wanted = f"({len(images)}, {self.dim})"
            raise DataError(describe(f"{self.name}: output shape", rows.shape, wanted))
        return rows


def check_images(images: Tensor) -> None:
    """Raise DataError unless ``images`` is a non-empty, finite float [S, 1 or 3, H, W]."""
    if images.dim() != 4 or images.shape[1] not in (1, 3) or 0 in images.shape:
        allowed = "[samples, 1 or 3, height, width]"
        raise DataError(describe("images.shape", tuple(images.shape), allowed))
    if not images.is_floating_point():
        raise DataError(describe("images.dtype", images.dtype, "floating point in [-1, 1]"))
    bad = ~torch.isfinite(images).flatten(1).all(dim=1)
    if bool(bad.any()):
        raise DataError(f"images: picture {int(torch.nonzero(bad)[0])} holds NaN or infinity")
