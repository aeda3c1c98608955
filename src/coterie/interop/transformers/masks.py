"""Which tokens are padding, read from the attention mask that a model is given.

Legend: B samples, N tokens of this call, S tokens that the mask covers (with a cache, S >= N: those
of earlier calls come first, and a cache of fixed size has empty places at its end).
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from coterie.core.errors import ConfigError, describe
from coterie.interop.transformers.eager import around

ALLOWED = "a tensor [B, S], or [B, heads, N, S] as attention takes it"


@dataclass(frozen=True, eq=False)
class _Pass:
    """What the outermost module was given. ``start``: place of this call's first token in the
    mask; None: its tokens are the last ones."""

    module: nn.Module
    mask: Tensor | None
    start: int | None


class MaskReader:
    """Watches the modules around a layer for a mask under the argument ``name``. That of the
    outermost module counts: what those inside are given is made of it."""

    def __init__(self, model: nn.Module, path: str, name: str = "attention_mask") -> None:
        self.name = name
        self._around = [
            (module, places)
            for module in around(model, path)
            if name in (places := _arguments(module))
        ]
        self._pass: _Pass | None = None

    def attach(self) -> list[Any]:
        """Hook handles; the mask is forgotten when the module that was given it ends."""
        self._pass = None
        handles: list[Any] = []
        for module, places in self._around:

            def before(
                given: nn.Module, args: Any, kwargs: Any, places: dict[str, int] = places
            ) -> None:
                def argument(name: str) -> Any:
                    place = places.get(name, len(args))
                    return kwargs.get(name, args[place] if place < len(args) else None)

                if self._pass is None:
                    cache = argument("past_key_values") if self.name == "attention_mask" else None
                    self._pass = _Pass(given, _readable(argument(self.name)), _seen(cache))

            def after(given: nn.Module, args: Any, output: Any) -> None:
                if self._pass is not None and self._pass.module is given:
                    self._pass = None

            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after, always_call=True))
        return handles

    def rows(self, shape: tuple[int, int]) -> Tensor | None:
        """bool [B*N], True = a real token; None where no mask was given. ConfigError for a mask
        that does not say it of each token."""
        if self._pass is None or self._pass.mask is None:
            return None
        mask, start = self._pass.mask, self._pass.start
        batch, tokens = shape
        if mask.dim() == 2 and mask.numel() == batch * tokens:
            return mask.reshape(-1).to(torch.bool)
        if mask.shape[-1] >= tokens and mask.shape[0] in (1, batch):
            places = _places(mask.shape[-1], tokens, start)
            if mask.dim() == 2:
                return mask[:, places].to(torch.bool).expand(batch, tokens).reshape(-1)
            if mask.shape[2] == tokens:
                return _real(_attended(mask), places).expand(batch, tokens).reshape(-1)
        allowed = f"one that covers {batch} samples of {tokens} tokens"
        raise ConfigError(describe(self.name, tuple(mask.shape), allowed))


def _readable(given: Any) -> Tensor | None:
    """The mask as a tensor; of several, for layers of several kinds, that of full attention."""
    if isinstance(given, dict):
        given = given.get("full_attention", next(iter(given.values()), None))
    if given is None or (isinstance(given, Tensor) and given.dim() in (2, 4)):
        return given
    found = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
    hint = "which tokens are padding cannot be read from it"
    raise ConfigError(describe("attention_mask", found, ALLOWED, hint))


def _seen(cache: Any) -> int | None:
    """How many tokens a cache holds before this call."""
    return int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else None


def _places(covered: int, tokens: int, start: int | None) -> Tensor:
    """i64 [N]: where the tokens of this call are among those that the mask covers."""
    first = covered - tokens
    return torch.arange(tokens) + (first if start is None else min(start, first))


def _attended(mask: Tensor) -> Tensor:
    """bool [B, N, S]: who attends to whom in any head."""
    open_ = mask > torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else mask != 0
    return open_.any(dim=1)


def _real(attended: Tensor, places: Tensor) -> Tensor:
    """bool [B, N]: whether a token attends to itself. Tokens that may attend to nobody are often
    let attend to everybody, since a softmax over nothing is not a number; such a row is known by
    attending to all, to the future too, while no row of another kind attends to it."""
    covered = attended.shape[-1]
    places = places.to(attended.device)
    itself = attended.gather(2, places[None, :, None].expand(len(attended), -1, 1))[..., 0]
    everybody = attended.all(dim=2)
    wanted = (attended & ~everybody[..., None]).any(dim=1)[:, places]
    freed = everybody & ~wanted & (places < covered - 1) & ~everybody.all(dim=1, keepdim=True)
    return itself & ~freed


def _arguments(module: nn.Module) -> dict[str, int]:
    """Places of the arguments of the module's forward, by name."""
    try:
        return {name: at for at, name in enumerate(inspect.signature(module.forward).parameters)}
    except (TypeError, ValueError):
        return {}
