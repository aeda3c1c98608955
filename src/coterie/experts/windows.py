"""Sliding windows over channels or experts, placed by noise level.

DTR slides a window over hidden channels (arXiv:2310.07138, eq. for m_t), Switch-DiT's prior slides
one over all experts (arXiv:2403.09176). Step 0 is the least noisy; ``alpha`` > 1 moves the windows
of noisy steps further apart.
"""

from __future__ import annotations

import torch
from torch import Tensor


def window_size(units: int, share: float) -> int:
    """Units in a window: ``units * share`` in double precision, truncated."""
    return int(units * share)


def window_starts(step_index: Tensor, num_steps: int, span: int, alpha: float) -> Tensor:
    """i64, shape of ``step_index``: ``round((t / (T - 1)) ** alpha * span)``, ties to even.

    ``span`` is units minus window size, so the last step's window ends exactly at the last unit.
    """
    if num_steps <= 1:
        return torch.zeros_like(step_index, dtype=torch.int64)
    share = step_index.double() / (num_steps - 1)
    return torch.round(share.pow(alpha) * span).long()


def window_masks(starts: Tensor, units: int, size: int) -> Tensor:
    """bool [S, units]: True on the ``size`` units from each start."""
    unit = torch.arange(units, device=starts.device)
    first = starts[:, None]
    return (unit >= first) & (unit < first + size)


def sliding_windows(num_steps: int, units: int, size: int, alpha: float) -> Tensor:
    """bool [num_steps, units]: the map of every step."""
    steps = torch.arange(num_steps)
    return window_masks(window_starts(steps, num_steps, units - size, alpha), units, size)
