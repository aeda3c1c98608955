"""Detection of graph recording (``torch.export``, ``torch.jit.trace``)."""

from __future__ import annotations

import torch


def recorded() -> bool:
    """Whether a graph is being recorded that will run with other inputs (``torch.export``,
    ``torch.jit.trace``). A decision made from tensor values would then be fixed for all inputs."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()
