"""The uncertainty-aware router of MoFME (AAAI 2024).

Each row is scored M times under dropout. Logits that vary between the passes count less:

    mu = mean_m z_m,  S = cov_m z_m,  z~ = c * S^(-1/2) mu,  c = running mean of sqrt(diag S)

``diagonal`` uses variances only; ``full`` the covariance, shrunk towards its diagonal because M
passes span at most M - 1 directions. With dropout 0 the score is the plain one. The released code
averages deviations, whose mean is 0, over passes without dropout; this is the formula of the paper.
Legend: M passes, R rows, E experts, D width.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self, cast

import torch
from pydantic import Field, SerializeAsAny, model_validator
from torch import Generator, Tensor

from coterie.core.context import Context
from coterie.core.errors import ConfigError, describe
from coterie.core.registry import Part
from coterie.core.rng import generator
from coterie.core.share import summed
from coterie.core.tensors import backward_runs
from coterie.experts.routers.base import (
    SCORES,
    Scored,
    ScoreModule,
    ScorePart,
    draw,
    draw_rows,
)
from coterie.experts.routers.scores import LinearScore

EPS = 1e-5
MOMENTUM = 0.99
SHRINKAGE = 0.5  # weight of the diagonal in the full covariance


@SCORES.register
class UncertainScore(ScorePart):
    """A score run several times under dropout, divided by how much its logits vary."""

    kind: Literal["uncertain"] = "uncertain"
    of: Annotated[SerializeAsAny[Part], SCORES.validator] = LinearScore()
    """the score; any that reads rows"""
    passes: int = Field(5, ge=2, le=4096)  # M, number of passes in training
    dropout: float = Field(0.1, ge=0.0, lt=1.0)  # probability
    whiten: Literal["diagonal", "full"] = "diagonal"
    """divide by standard deviations, or by the full covariance"""
    evaluate: Literal["off", "running", "passes"] = "running"
    """Outside training: the plain score (``off``, as published), one pass divided by the running
    deviations (``running``), or M passes with fixed masks, the same for every row (``passes``)."""
    draws: ClassVar[bool] = True

    @model_validator(mode="after")
    def _fits(self) -> Self:
        inner = cast(ScorePart, self.of)
        if not inner.reads_rows or inner.kind in (self.kind, "recurrent", "fixed"):
            allowed = "a score that reads rows and nothing else"
            raise ConfigError(describe("of", inner.kind, allowed, "dropout falls on the rows"))
        return self

    @property
    def reads(self) -> tuple[str, ...]:
        return cast(ScorePart, self.of).reads

    def check(self, num_experts: int, width: int) -> None:
        cast(ScorePart, self.of).check(num_experts, width)

    def build(self, width: int, num_experts: int, time_width: int | None) -> ScoreModule:
        return _Uncertain(self, width, num_experts, time_width)


class _Uncertain(ScoreModule):
    """``deviation`` moves after each optimiser step, by what all its passes have ``seen``: within a
    step a pass is the same however often it is run, and batches in parts are as one batch."""

    deviation: Tensor
    seen: Tensor

    def __init__(
        self, config: UncertainScore, width: int, num_experts: int, time_width: int | None
    ) -> None:
        super().__init__()
        self.config = config
        self.inner = cast(ScorePart, config.of).build(width, num_experts, time_width)
        self.register_buffer("deviation", torch.ones(num_experts))  # running sqrt(diag S), [E]
        # Sums of sqrt(diag S) in this step, and of how many rows: [E + 1].
        self.register_buffer("seen", torch.zeros(num_experts + 1), persistent=False)

    def forward(self, x: Tensor, ctx: Context) -> Scored:
        config = self.config
        sampling = ctx.training and ctx.rng is not None
        if config.dropout == 0 or (not sampling and config.evaluate == "off"):
            return self.inner(x, ctx)
        if not sampling and config.evaluate == "running":
            plain = self.inner(x, ctx)
            logits = plain.logits * (self.deviation.mean() / self.deviation)
            return Scored(logits, plain.prototypes)
        rng = ctx.rng if sampling else generator(0, "uncertain")
        assert rng is not None
        # Outside training all rows share the masks, so that no row depends on its batch.
        shape = torch.Size([x.shape[0] if sampling else 1, x.shape[1]])
        drawn = draw_rows if sampling else draw
        masks = [self._mask(drawn(shape, rng, x), x) for _ in range(config.passes)]
        passes = [self.inner(x * mask, ctx) for mask in masks]
        logits_MRE = torch.stack([scored.logits for scored in passes])
        away_MRE = logits_MRE - logits_MRE.mean(0)
        spread_RE = (away_MRE.square().sum(0) / (config.passes - 1) + EPS).sqrt()
        if sampling:
            self._remember(spread_RE.detach()[real_rows(ctx, x)])
        whitened = logits_MRE.mean(0) / spread_RE
        if config.whiten == "full":
            whitened = whiten(logits_MRE)
        return Scored(whitened * self.deviation.mean(), passes[0].prototypes)

    def _mask(self, drawn: Tensor, x: Tensor) -> Tensor:
        keep = 1 - self.config.dropout
        return (drawn < keep).to(x.dtype) / keep

    @torch.no_grad()
    def _remember(self, spread_RE: Tensor) -> None:
        if backward_runs():  # counted when it ran first
            return
        count = spread_RE.new_tensor([len(spread_RE)])
        (seen,) = summed(torch.cat([spread_RE.sum(0), count]))
        self.seen += seen

    @torch.no_grad()
    def after_step(self) -> None:
        """Once per optimiser step."""
        if self.seen[-1] > 0:
            mean_E = self.seen[:-1] / self.seen[-1]
            # A new tensor: who holds the old one goes on with its value.
            self.deviation = MOMENTUM * self.deviation + (1 - MOMENTUM) * mean_E
        self.seen.zero_()

    def reset_parameters(self, rng: Generator | None) -> None:
        self.inner.reset_parameters(rng)
        self.deviation.fill_(1.0)
        self.seen.zero_()


def real_rows(ctx: Context, x: Tensor) -> Tensor:
    """bool [R]: rows that are not padding."""
    mask = ctx.token_mask
    if mask is None:
        return torch.ones(len(x), dtype=torch.bool, device=x.device)
    return mask.flatten() if len(x) == mask.numel() else mask.any(dim=1)


def whiten(logits_MRE: Tensor) -> Tensor:
    """``S^(-1/2) mu`` per row, [R, E]; S is shrunk towards its diagonal."""
    mean_RE = logits_MRE.mean(0)
    away_MRE = logits_MRE - mean_RE
    cov_REE = torch.einsum("mre,mrf->ref", away_MRE, away_MRE) / (len(logits_MRE) - 1)
    diagonal_REE = torch.diag_embed(cov_REE.diagonal(dim1=1, dim2=2) + EPS)
    shrunk_REE = (1 - SHRINKAGE) * cov_REE + SHRINKAGE * diagonal_REE
    root_REE: Tensor = _InverseRoot.apply(shrunk_REE)
    return torch.einsum("ref,rf->re", root_REE, mean_RE)


class _InverseRoot(torch.autograd.Function):
    """S^(-1/2) of symmetric positive matrices [..., E, E].

    The gradient of an eigendecomposition has 1 / (l_i - l_j) in it and is NaN where eigenvalues
    agree (a row that no dropout mask changed has covariance 0). That of a function of S has divided
    differences instead: for l^(-1/2), -1 / (sqrt(l_i l_j) (sqrt(l_i) + sqrt(l_j))), always finite.
    """

    @staticmethod
    def forward(ctx: Any, matrix: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(matrix)
        ctx.save_for_backward(values.sqrt(), vectors)
        return (vectors * values.rsqrt()[..., None, :]) @ vectors.mT

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        roots, vectors = ctx.saved_tensors
        left, right = roots[..., :, None], roots[..., None, :]
        inner = -(vectors.mT @ grad @ vectors) / (left * right * (left + right))
        return vectors @ inner @ vectors.mT
