"""Does the bridge understand a model? Every layer is computed again, naively, and compared.

While the model runs once on some tokens, each layer's logits are recomputed from the router's
input and weights, its choices and gates from those logits by our router, and its answer by a plain
loop over experts; matrix products in float64. Whoever reads a model's routing should ask first.

Legend: R rows, E experts, K choices, D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coterie.core.context import Context
from coterie.core.errors import CoterieError
from coterie.core.rng import generator
from coterie.interop.transformers.hooks import keep_order, rule_router
from coterie.interop.transformers.sites import MoESite, find_moe_layers

ROWS = 64  # compared per layer: a wrong rule shows in the first of them
LOW_PRECISION = 5e-2
FULL_PRECISION = 1e-4


class MismatchError(CoterieError):
    """A layer of a model does not compute what the bridge takes it to compute."""


@dataclass(frozen=True)
class SiteCheck:
    """Largest differences of one layer, each relative to the largest value compared."""

    path: str
    logits: float
    gates: float
    output: float

    @property
    def error(self) -> float:
        """The largest; infinite where something is not a number."""
        values = (self.logits, self.gates, self.output)
        return max(v if math.isfinite(v) else math.inf for v in values)


def selfcheck(
    model: nn.Module,
    input_ids: Tensor | None = None,
    *,
    tolerance: float | None = None,
    sites: Sequence[MoESite] | None = None,
) -> list[SiteCheck]:
    """One :class:`SiteCheck` per layer, or MismatchError if one is above ``tolerance``.

    ``input_ids`` i64 [B, N] (default: 2 x 16 random tokens). ``tolerance``: 1e-4 for float32 and
    float64 weights, 5e-2 for shorter types.
    """
    sites = find_moe_layers(model) if sites is None else sites
    found: dict[str, SiteCheck] = {}
    with torch.no_grad(), ExitStack() as stack:
        for module in model.modules():  # dropout and jitter would differ from a second computation
            stack.callback(setattr, module, "training", module.training)
        model.eval()
        for site in sites:
            if not hasattr(site.experts, "act_fn"):
                raise MismatchError(f"{site.path}: its experts are replaced; undo that first")
            watch = _Watch(site, found)
            stack.callback(watch.detach)
            stack.callback(site.run_eagerly())
        model(**inputs_for(model, input_ids))
    for site in sites:
        check = found.get(site.path)
        if check is None:
            raise MismatchError(f"{site.path}: the model ran without calling this layer's router")
        limit = tolerance if tolerance is not None else _limit(site)
        if not check.error <= limit:
            raise MismatchError(
                f"{site.path}: not computed as {site.kind} layers are known to be; largest "
                f"relative difference of logits {check.logits:.2g}, gates {check.gates:.2g}, "
                f"output {check.output:.2g}; allowed {limit:.0e}"
            )
    return [found[site.path] for site in sites]


def inputs_for(model: Any, input_ids: Tensor | None = None) -> dict[str, Tensor]:
    """Arguments of a forward pass over ``input_ids`` (default: 2 x 16 random tokens)."""
    config = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    device = next(model.parameters()).device
    rng = generator(0, "selfcheck")
    if input_ids is None:
        input_ids = torch.randint(0, text.vocab_size, (2, 16), generator=rng)
    out = {"input_ids": input_ids.to(device)}
    if getattr(config, "canvas_length", None):
        shape = (len(input_ids), min(16, config.canvas_length))
        canvas = torch.randint(0, text.vocab_size, shape, generator=rng)
        out["decoder_input_ids"] = canvas.to(device)
    return out


def _limit(site: MoESite) -> float:
    wide = site.expert(0)[0].dtype in (torch.float32, torch.float64)
    return FULL_PRECISION if wide else LOW_PRECISION


class _Watch:
    """Compares one layer when its experts have answered, and its block where that adds to them."""

    def __init__(self, site: MoESite, found: dict[str, SiteCheck]) -> None:
        self.site = site
        self.found = found
        self.logits_error = self.gates_error = math.inf
        self.routed: Tensor | None = None
        self.raw: Tensor | None = None
        hooks = [
            site.router.register_forward_hook(self._router),
            site.experts.register_forward_hook(self._experts),
        ]
        if site.family.logits == "output":
            hooks.append(site.block.register_forward_hook(self._block))
        else:
            scores = getattr(site.router, site.family.logits)
            hooks.append(scores.register_forward_hook(self._scores))
        self._hooks = hooks

    def detach(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _scores(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.raw = output

    def _router(self, module: nn.Module, args: Any, output: Any) -> None:
        site = self.site
        logits = output[0] if site.family.logits == "output" else self.raw
        x = args[0].reshape(-1, args[0].shape[-1])[:ROWS].double()
        logits, weights, ids = (t.reshape(-1, t.shape[-1])[:ROWS] for t in (logits, *output[1:]))
        self.logits_error = _apart(logits, naive_logits(site, x))
        router = rule_router(site)
        rows = logits.float()
        routing = router(rows[None], Context(1, len(rows)))
        keys = router.keys(routing.logits, routing.probs)
        # Exact ties are broken either way; theirs is then taken, and only gates are compared.
        chosen = keep_order(routing.ids, ids, keys)
        gates = router.gates(chosen, routing.probs, routing.logits)
        ours, theirs = (
            torch.zeros(len(rows), site.num_experts, device=rows.device, dtype=torch.float64)
            for _ in range(2)
        )
        ours.scatter_add_(1, chosen, gates.double())
        theirs.scatter_add_(1, ids, weights.double())
        self.gates_error = _apart(theirs, ours)

    def _experts(self, module: nn.Module, args: Any, output: Tensor) -> None:
        h, ids, weights = (value[:ROWS] for value in args)
        self.routed = naive_experts(self.site, h.double(), ids, weights.double())
        if self.site.family.logits != "output":
            self._close(output[:ROWS], self.routed)

    def _block(self, module: nn.Module, args: Any, output: Tensor) -> None:
        x = args[0].reshape(-1, args[0].shape[-1])[:ROWS].double()
        assert self.routed is not None
        expected = self.routed + naive_shared(self.site, x)
        self._close(output.reshape(-1, output.shape[-1])[:ROWS], expected)

    def _close(self, output: Tensor, expected: Tensor) -> None:
        error = _apart(output, expected)
        self.found[self.site.path] = SiteCheck(
            self.site.path, self.logits_error, self.gates_error, error
        )


def naive_logits(site: MoESite, x: Tensor) -> Tensor:
    """f64 [R, E] from the router's input x f64 [R, D]."""
    router = site.router
    if site.family.logits == "output":
        return F.linear(x, router.weight.double())
    normed = x / (x.pow(2).mean(-1, keepdim=True) + router.eps).sqrt()
    return F.linear(
        normed * router.scale.double() * router.scalar_root_size, router.proj.weight.double()
    )


def naive_experts(site: MoESite, h: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """f64 [R, D] = sum_k weights[r, k] expert_k(h[r]), one expert after the other."""
    activation = site.experts.act_fn
    total = torch.zeros_like(h)
    for expert in ids.unique().tolist():
        gate, up, down = (part.double() for part in site.expert(expert))
        rows, slots = (ids == expert).nonzero(as_tuple=True)
        inner = activation(F.linear(h[rows], gate)) * F.linear(h[rows], up)
        total.index_add_(0, rows, weights[rows, slots, None] * F.linear(inner, down))
    return total


def naive_shared(site: MoESite, x: Tensor) -> Tensor:
    """f64 [R, D], what is added whatever the routing."""
    mlp = site.shared
    if mlp is None:
        return torch.zeros_like(x)
    up, gate, down = (_affine(mlp, name) for name in ("up_proj", "gate_proj", "down_proj"))
    out = down(mlp.act_fn(gate(x)) * up(x))
    if site.shared_gate is not None:
        out = out * F.linear(x, site.shared_gate.weight.double()).sigmoid()
    return out


def _affine(mlp: Any, name: str) -> Any:
    linear = getattr(mlp, name)
    bias = None if linear.bias is None else linear.bias.double()
    return lambda x: F.linear(x, linear.weight.double(), bias)


def _apart(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value; 0 for two zeros."""
    expected = expected.double()
    size = float(expected.abs().max()) if expected.numel() else 0.0
    difference = float((found.double() - expected).abs().max()) if expected.numel() else 0.0
    return difference / max(size, 1e-30) if difference else 0.0
