"""The Triton kernels, interpreted on the CPU (or run on a CUDA device), and compiled for Hopper."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from coterie.experts import ExpertPool
from coterie.experts.dispatch import DispatchPlan, available
from coterie.experts.kinds import SwiGLU

SCRIPT = Path(__file__).with_name("triton_checks.py")
INSTALLED = importlib.util.find_spec("triton") is not None


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="triton is not installed")
@pytest.mark.parametrize("checks", ["float32 half activations", "layer edges", "hopper"])
def test_kernels(checks: str) -> None:
    """In a process of its own: triton decides when it is imported whether it interprets."""
    command = [sys.executable, str(SCRIPT), *checks.split()]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr[-3000:]


def test_segments_hold_every_choice_by_expert_and_nobody_last() -> None:
    ids = torch.tensor([[2, 0], [3, 3], [0, 2], [2, 3]])
    made = DispatchPlan("token", ids, torch.ones(4, 2), 3)
    order, bounds = made.segments
    assert order.tolist() == [1, 4, 0, 5, 6, 2, 3, 7]
    assert bounds.tolist() == [0, 2, 2, 5] and bounds.dtype == torch.int32
    assert made.order.tolist() == [1, 4, 0, 5, 6] and made.offsets.tolist() == [2, 2, 5]
    assert made.sparse and not DispatchPlan("token", ids, torch.ones(4, 2), 2).sparse


def test_the_cpu_is_served_by_other_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    pool = ExpertPool(SwiGLU(hidden=8), 3, 16)
    made = DispatchPlan("token", torch.tensor([[0, 1]]), torch.ones(1, 2), 3)
    assert "triton" not in available(torch.zeros(1, 16), made, pool)
