"""The device and the floating type of a run."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch

from coterie.core.errors import ConfigError, describe


def resolve_device(name: str) -> torch.device:
    """The device; ``auto``: a CUDA device if there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(describe("device", name, "auto, cpu, or a device here", reason)) from None
    return device


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device computes bfloat16 in hardware (emulation is slower than float32)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)
    return False


def resolve_precision(name: str, device: torch.device) -> torch.dtype:
    """The type of matrix products; ``auto``: bfloat16 if :func:`has_bfloat16`, else float32."""
    if name == "auto":
        return torch.bfloat16 if has_bfloat16(device) else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)
