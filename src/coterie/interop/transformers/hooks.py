"""Everything done to one layer while it runs, in one place and a fixed order.

    raw logits -> edits -> rule (the model's own, or another) -> changes of the routing -> taps

Hooks of several owners would see each other's work or not depending on who came first. So each
layer has at most one :class:`Control`, kept on its router module while anything is active, and
nothing of it is left when the last change is undone.

Legend: B samples, N tokens, R = B*N rows, E candidates, K choices, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Generator, Tensor, nn

from coterie.core.context import Context
from coterie.core.errors import ConfigError, describe
from coterie.core.rng import derive
from coterie.core.routing import Routing
from coterie.core.tensors import backward_runs
from coterie.experts import Router, RouterConfig
from coterie.interop.transformers.masks import MaskReader

if TYPE_CHECKING:
    from coterie.interop.transformers.sites import MoESite

EditFn = Callable[[Tensor], Tensor]
RouteFn = Callable[[Routing], Routing]
Collector = Callable[[Routing], Any]
SENTINEL_SAFE = (None, "eager", "grouped_mm", "batched_mm")
_ATTRIBUTE = "_coterie_control"
_SKIPS_SENTINELS = "_is_expert_parallel"  # of an experts module, since transformers 5.18


def _nothing() -> None:
    """There is nothing to undo."""


class Change:
    """Something done to a model that can be taken back: ``with change: ...``, or ``apply()`` for
    good and ``undo()`` later. After ``undo`` the model is as it was."""

    def __init__(self, start: Callable[[], Callable[[], None]]) -> None:
        self._start = start
        self._stop: Callable[[], None] | None = None

    def apply(self) -> Self:
        if self._stop is not None:
            raise RuntimeError("this change is already applied")
        self._stop = self._start()
        return self

    def undo(self) -> None:
        if self._stop is not None:
            stop, self._stop = self._stop, None
            stop()

    def __enter__(self) -> Self:
        return self.apply()

    def __exit__(self, *_: object) -> None:
        self.undo()


class Control:
    """The active edits, rules and taps of one layer, and the hooks that carry them out."""

    def __init__(self, site: MoESite) -> None:
        self.site = site
        self.edits: list[EditFn] = []
        self.rules: list[tuple[RouterConfig, Generator | None]] = []
        self.routes: list[RouteFn] = []
        self.taps: list[Collector] = []
        self._handles: list[Any] = []
        mask = "decoder_attention_mask" if site.slot == "decoder" else "attention_mask"
        self._masks = MaskReader(site.model, site.path, mask)
        self._shape = (1, 0)
        self._compile_again: Callable[[], None] = _nothing
        self._ran = False  # whether the experts of the block that runs were seen
        self._flag: bool | None = None  # what an experts module said before a change of ours
        self._raw: Tensor | None = None
        self._routing: Routing | None = None
        self._router: tuple[RouterConfig, Router] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Control:
        """Of a copied model: it computes what the model does, and nobody watches it."""
        made = object.__new__(type(self))
        memo[id(self)] = made
        for name, value in self.__dict__.items():
            made.__dict__[name] = [] if name == "taps" else copy.deepcopy(value, memo)
        return made

    @classmethod
    def of(cls, site: MoESite) -> Control:
        """The layer's control, whichever site object asks."""
        held = site.router.__dict__.get(_ATTRIBUTE)
        return held if isinstance(held, cls) else cls(site)

    def add(self, entries: list[Any], entry: Any) -> Callable[[], None]:
        """Make ``entry`` active; the returned function ends it."""
        if not self._handles:
            self.site.router.__dict__[_ATTRIBUTE] = self
            self.attach()
        entries.append(entry)

        def remove() -> None:
            # By identity: the same function may be active twice, and tensors compare by value.
            place = next(i for i, held in enumerate(entries) if held is entry)
            del entries[place]
            if not (self.edits or self.rules or self.routes or self.taps):
                self.detach()
                del self.site.router.__dict__[_ATTRIBUTE]

        return remove

    def attach(self) -> None:
        """Set the hooks; also called when another experts module has taken its place."""
        site = self.site
        self.detach()
        self._compile_again = site.run_eagerly()
        self._handles = [
            site.block.register_forward_pre_hook(self._before_block, with_kwargs=True),
            site.block.register_forward_hook(self._after_block),
            site.router.register_forward_hook(self._after_router),
            site.experts.register_forward_pre_hook(self._before_experts),
            site.experts.register_forward_hook(self._after_experts, always_call=True),
            *self._masks.attach(),
        ]
        if site.family.logits != "output":
            source = getattr(site.router, site.family.logits)
            self._handles.append(source.register_forward_hook(self._after_scores))

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._raw = self._routing = None
        self._compile_again()
        self._compile_again = _nothing

    @property
    def active(self) -> bool:
        return bool(self._handles)

    @property
    def changes(self) -> bool:
        """Whether the routing is changed, not only watched."""
        return bool(self.edits or self.rules or self.routes)

    def _router_of(self, config: RouterConfig | None) -> Router:
        """Our router by the layer's own rule as it now is, or by ``config``; made once."""
        wanted = rule_config(self.site, config)
        if self._router is None or self._router[0] != wanted:
            self._router = (wanted, rule_router(self.site, wanted))
        return self._router[1]

    def _before_block(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._ran = False
        hidden = args[0] if args else kwargs["hidden_states"]
        self._shape = tuple(hidden.shape[:2]) if hidden.dim() == 3 else (1, hidden.shape[0])

    def _after_block(self, module: nn.Module, args: Any, output: Any) -> None:
        """What stands in the place of a layer's own code (a fused kernel) may call no module."""
        if not self._ran:
            hint = "switch off what computes it instead, such as use_kernels"
            raise ConfigError(
                f"{self.site.path}: ran without calling its router and experts; {hint}"
            )

    def _after_scores(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self._raw = output

    def _after_router(self, module: nn.Module, args: Any, output: Any) -> Any:
        first, weights, ids = output
        raw = first if self.site.family.logits == "output" else self._raw
        assert raw is not None
        logits = raw.reshape(-1, raw.shape[-1]).float()
        for edit in self.edits:
            logits = _edited(edit, logits)
        config, rng = self.rules[-1] if self.rules else (None, None)
        router = self._router_of(config)
        batch, tokens = self._shape
        ctx = Context(batch, tokens, slot=self.site.slot, layer=self.site.layer, rng=rng)
        ctx = ctx.replace(training=rng is not None, seed=lambda: _seed_of(rng, logits))
        routing: Routing = router(logits.view(batch, tokens, -1), ctx)
        if self.changes:
            keys = router.keys(routing.logits, routing.probs)
            kept = keep_order(routing.ids, ids, keys)
            gates = router.gates(kept, routing.probs, routing.logits)
            gates = gates.masked_fill(kept == routing.num_experts, 0.0)
            routing = routing.replace(ids=kept, gates=gates)
            for change in self.routes:
                routing = check_choices(change(routing), routing)
            told = logits if self.site.family.logits == "output" else routing.probs
            output = (told.to(first.dtype), routing.gates.to(weights.dtype), routing.ids)
        inputs = args[0].reshape(-1, args[0].shape[-1])
        self._routing = routing.replace(inputs=inputs, mask=self._masks.rows(self._shape))
        return output

    def _before_experts(self, module: nn.Module, args: Any) -> None:
        _, ids, weights = args
        routing, self._routing = self._routing, None
        if routing is None:  # called on its own, not by its block
            return
        self._ran = True
        if self.changes:
            self._allow_sentinels(module, bool((ids >= routing.num_experts).any()))
        if self.taps:
            router = self._router_of(self.rules[-1][0] if self.rules else None)
            keys = router.keys(routing.logits, routing.probs)
            record = routing.replace(**best_first(ids, weights, keys))
            # What gradient checkpointing runs again does the same work, and is not told of twice.
            for collector in [] if backward_runs() else self.taps:
                collector(record)

    def _allow_sentinels(self, module: nn.Module, present: bool) -> None:
        """Without this flag the grouped product leaves the rows of "nobody" undefined, even NaN."""
        name = getattr(getattr(module, "config", None), "_experts_implementation", None)
        if present and hasattr(module, "gate_up_proj") and name not in SENTINEL_SAFE:
            hint = "this routing leaves some choices empty; call model.set_experts_implementation"
            allowed = "'eager' or 'grouped_mm'"
            raise ConfigError(describe("experts_implementation", name, allowed, hint))
        if present and hasattr(module, _SKIPS_SENTINELS):
            self._flag = getattr(module, _SKIPS_SENTINELS)
            setattr(module, _SKIPS_SENTINELS, True)

    def _after_experts(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._flag is not None:
            setattr(module, _SKIPS_SENTINELS, self._flag)
            self._flag = None


def _seed_of(rng: Generator | None, logits: Tensor) -> int:
    """What a layer of a foreign model draws from. It is told of no pass, so what it reads says
    which one this is: gradient checkpointing runs a layer again with the same logits."""
    assert rng is not None
    bits = logits.detach().contiguous().view(torch.int32)
    return derive(rng.initial_seed(), int(bits.sum(dtype=torch.int64)))


def rule_config(site: MoESite, config: RouterConfig | None = None) -> RouterConfig:
    """The layer's own rule, or another, for a router that is fed logits."""
    return site.rule.router_config("given") if config is None else config.replace(score="given")


def rule_router(site: MoESite, config: RouterConfig | None = None) -> Router:
    """Our router on a layer's logits, by its own rule or by that of ``config``.

    Selection bias and expert scale are the layer's own tensors, not copies.
    """
    own, config = site.rule, rule_config(site, config)
    router = config.build(own.num_experts, own.num_experts)
    router.to(next(site.router.parameters()).device)
    if own.selection_bias and config.selection_bias:
        router.selection_bias = site.router.e_score_correction_bias
    if own.expert_scale and config.expert_scale:
        router.expert_scale = site.router.per_expert_scale
    return router


def _edited(edit: EditFn, logits: Tensor) -> Tensor:
    """An edit may also write into what it is given, as long as it returns it."""
    out = edit(logits.clone())
    if not isinstance(out, Tensor) or out.shape != logits.shape:
        found = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ConfigError(describe("edited logits", found, str(tuple(logits.shape))))
    return out.float()


def check_choices(routing: Routing, before: Routing) -> Routing:
    """The answer of a function that changes routings: ids and gates of the same rows."""
    ids, gates = routing.ids, routing.gates
    rows = before.ids.shape[0]
    if ids.shape != gates.shape or ids.dim() != 2 or ids.shape[0] != rows:
        found = (tuple(ids.shape), tuple(gates.shape))
        raise ConfigError(describe("routing: ids and gates", found, f"both [{rows}, K]"))
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) <= before.num_experts:
        found_ids = (int(ids.min()), int(ids.max()))
        allowed = f"0..{before.num_experts}, {before.num_experts} = nobody"
        raise ConfigError(describe("routing.ids", found_ids, allowed))
    return routing.replace(gates=gates.masked_fill(ids == before.num_experts, 0.0))


def keep_order(ours: Tensor, theirs: Tensor, keys: Tensor) -> Tensor:
    """i64 [R, K]: their choice where it is as good as ours, else ours.

    Their selections leave the order (and ties) open. Sums depend on the order in the last bit, so
    rows whose choice did not change keep theirs: an edit by zero is then no edit at all.
    """
    if ours.shape != theirs.shape:
        return ours
    # NaN for nobody: such a row is never as good as a full one.
    padded = torch.nn.functional.pad(keys, (0, 1), value=float("nan"))
    mine, other = (padded.gather(1, ids).sort(dim=1).values for ids in (ours, theirs))
    return torch.where((mine == other).all(dim=1, keepdim=True), theirs, ours)


def best_first(ids: Tensor, weights: Tensor, keys: Tensor) -> dict[str, Tensor]:
    """The same choices in the order of preference (ties to the lowest index), nobody last."""
    by_id = ids.argsort(dim=1)
    padded = torch.nn.functional.pad(keys, (0, 1), value=float("-inf"))
    ranked = padded.gather(1, ids.gather(1, by_id)).argsort(dim=1, descending=True, stable=True)
    order = by_id.gather(1, ranked)
    return {"ids": ids.gather(1, order), "gates": weights.float().gather(1, order)}
