"""The machine, library versions and commit that a measurement was made with."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

GIT_SECONDS = 30


@cache
def commit() -> str:
    """Short hash of the checkout the package runs from, ``+`` if it has changes; "" if none."""
    root = Path(__file__).resolve().parents[3]

    def git(*words: str) -> str:
        try:
            done = subprocess.run(
                ["git", "-C", str(root), *words],
                capture_output=True,
                stdin=subprocess.DEVNULL,
                timeout=GIT_SECONDS,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):  # no git here, or a disk that hangs
            return ""
        return done.stdout.decode(errors="replace").strip() if done.returncode == 0 else ""

    head = git("rev-parse", "--short=12", "HEAD") if (root / ".git").exists() else ""
    changed = git("status", "--porcelain", "--untracked-files=no", "--", "src") if head else ""
    return f"{head}+" if changed else head


def cpu_model() -> str:
    """Name of the processor."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@cache
def hardware() -> dict[str, Any]:
    """CPU, cores, memory, CUDA device and versions."""
    import torch

    cuda = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    pages = os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "memory_gib": round(pages * os.sysconf("SC_PAGE_SIZE") / 2**30, 1) if pages else None,
        "gpu": cuda,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "system": platform.system(),
    }


def hardware_line() -> str:
    """:func:`hardware` as one line of text."""
    here = hardware()
    parts = [here["gpu"], here["cpu"], f"{here['cores']} cores", f"{here['memory_gib']} GiB"]
    return ", ".join([part for part in parts if part] + [f"torch {here['torch']}"])
