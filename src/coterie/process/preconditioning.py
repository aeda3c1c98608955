"""Scaling of a network's input and output (preconditioning).

EDM's coefficients (Karras et al. 2022, arXiv:2206.00364, table 1) hold for any process through s =
sigma / alpha and the input x / alpha; written with alpha and sigma they are finite at alpha=0:

    c_in = 1/r, c_skip = alpha sigma_data^2 / r^2, c_out = sigma sigma_data / r,
    r^2 = sigma^2 + alpha^2 sigma_data^2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor

from coterie.core.registry import Part, Registry
from coterie.process.base import Process

PRECONDITIONS = Registry("precondition", "coterie.preconditions")


class Precondition(Protocol):
    """The prediction D = c_skip x + c_out F(c_in x) of a network F."""

    @property
    def view(self) -> str | None:
        """The view of the prediction; None: that of the network."""
        ...

    @property
    def plain(self) -> bool:
        """Whether D = F(x), so that nothing is scaled."""
        ...

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(c_in, c_skip, c_out), each of the shape and dtype of ``t``."""
        ...


@dataclass(frozen=True)
class _Identity:
    view: str | None = None
    plain: bool = True

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ones_like(t), torch.zeros_like(t), torch.ones_like(t)


@PRECONDITIONS.register
class NoPrecondition(Part):
    """No scaling: the network's output is the prediction."""

    kind: Literal["none"] = "none"

    def build(self, process: Process) -> Precondition:
        return _Identity()


@dataclass(frozen=True)
class _EDM:
    process: Process
    sigma_data: float
    view: str | None = "x0"
    plain: bool = False

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        alpha, sigma, data = self.process.alpha(t), self.process.sigma(t), self.sigma_data
        power = sigma.square() + (alpha * data).square()
        root = power.sqrt()
        return 1.0 / root, alpha * data**2 / power, sigma * data / root


@PRECONDITIONS.register
class EDMPrecondition(Part):
    """EDM's scaling: network input and training target have unit variance."""

    kind: Literal["edm"] = "edm"
    sigma_data: float = Field(0.5, gt=0)  # standard deviation of the data

    def build(self, process: Process) -> Precondition:
        return _EDM(process, self.sigma_data)
