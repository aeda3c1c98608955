"""One pass of a tiny model, and what a layer of it read and answered."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from hand_layers import logits_of
from tiny_hf_models import WIDTH, tokens
from torch import Tensor

from coterie.interop.transformers import MoESite
from coterie.interop.transformers.selfcheck import inputs_for


def logits_after(model: Any) -> Tensor:
    with torch.no_grad():
        return model(**inputs_for(model, tokens())).logits


@contextmanager
def using(model: Any, name: str) -> Iterator[None]:
    before = model.config._experts_implementation
    model.set_experts_implementation(name)
    try:
        yield
    finally:
        model.set_experts_implementation(before)


def experts_seen(site: MoESite) -> tuple[dict[str, Tensor], Tensor, Any]:
    """What the router read and what the experts read and answered in one pass."""
    seen: dict[str, Tensor] = {}
    hooks = [
        site.router.register_forward_hook(lambda m, a, o: seen.update(x=a[0].reshape(-1, WIDTH))),
        site.experts.register_forward_hook(lambda m, a, o: seen.update(h=a[0], y=o)),
    ]
    logits_after(site.model)
    for hook in hooks:
        hook.remove()
    return seen, logits_of(site.kind, site.router, seen["x"]), site.router
