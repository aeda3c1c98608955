"""Models of diffusers: expert layers in their modules, and use as denoisers.

Importing this loads nothing of diffusers: places are found by structure.
"""

from coterie.interop.diffusers.attach import DiffusersHost, attach
from coterie.interop.diffusers.expert import (
    DiffusersConfig,
    DiffusersExpert,
    DiffusersNetworkConfig,
    is_diffusers,
)
from coterie.interop.diffusers.pipeline import DiffusersDenoiser, load_noise_ranges

__all__ = [
    "DiffusersConfig",
    "DiffusersDenoiser",
    "DiffusersExpert",
    "DiffusersHost",
    "DiffusersNetworkConfig",
    "attach",
    "is_diffusers",
    "load_noise_ranges",
]
