"""What kernels of our own must know of torch's ways to take gradients."""

from __future__ import annotations

import torch


def transformed() -> bool:
    """Whether gradients are being taken by other means than the backward pass: inside
    ``torch.func``, or forward mode. Operators with a backward alone then give way."""
    inside: bool = torch._C._functorch.peek_interpreter_stack() is not None
    return inside or torch.autograd.forward_ad._current_level >= 0
