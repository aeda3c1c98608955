"""Checks of what an expert layer gets: rows of the right shape, and a Context that agrees."""

from __future__ import annotations

from torch import Tensor

from coterie.core.context import Context
from coterie.core.errors import DataError, describe
from coterie.experts.routers import RouterConfig


def shaped(
    h: Tensor, ctx: Context | None, width: int, grid: bool, router: RouterConfig, training: bool
) -> tuple[Tensor, Context]:
    """h as [B, N, D] ([B, C, H, W] for experts on feature maps), and its Context.

    Rows [N, D] are the tokens of the Context's samples, one sample after the other; without a
    Context they are tokens of one sample. DataError where shape and Context disagree.
    """
    dims, channels = (4, 1) if grid else (3, -1)
    if h.dim() == 2 and not grid:
        h = _rows(h, ctx, router)
    if h.dim() != dims or h.shape[channels] != width:
        allowed = f"[B, {width}, H, W]" if grid else f"[B, N, {width}] or [N, {width}]"
        raise DataError(describe("h.shape", tuple(h.shape), allowed))
    if ctx is None:
        return h, Context(batch=h.shape[0], tokens=0 if grid else h.shape[1], training=training)
    told = (ctx.batch,) if grid else (ctx.batch, ctx.tokens)
    if told != tuple(h.shape[: len(told)]):
        allowed = f"{tuple(h.shape[: len(told)])}, as h has"
        raise DataError(describe("ctx.batch, ctx.tokens", told, allowed))
    mask = ctx.token_mask
    if mask is not None and not grid and mask.shape != h.shape[:2]:
        allowed = f"{tuple(h.shape[:2])}, as h has"
        raise DataError(describe("ctx.token_mask", tuple(mask.shape), allowed))
    return h, ctx


def _rows(h: Tensor, ctx: Context | None, router: RouterConfig) -> Tensor:
    """[N, D] -> [B, N / B, D]."""
    if ctx is not None and ctx.batch * ctx.tokens == h.shape[0]:
        return h.unflatten(0, (ctx.batch, ctx.tokens))
    if ctx is not None:
        allowed = f"{ctx.batch} x {ctx.tokens} rows, as the context says"
        raise DataError(describe("h.shape", tuple(h.shape), allowed))
    if router.routed_unit != "token" or router.select_part.needs_tokens:
        hint = "its router looks at whole samples, and rows do not say where one ends"
        raise DataError(describe("h.shape", tuple(h.shape), "[B, N, D], or a context", hint))
    return h[None]
