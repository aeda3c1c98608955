"""What code must know of graphs that are made of it."""

from __future__ import annotations

import torch


def recorded() -> bool:
    """Whether a graph is being recorded that other inputs will run through (``torch.export``,
    ``torch.jit.trace``). What a value decides on the host would be kept for all of them."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()
