"""A denoiser for the times of one sampling grid, with everything precomputed that can be.

Every cache is exact: predictions are those of the source denoiser, to rounding.

* ``routing``: where routers depend on the noise level alone, the experts chosen at a step are fused
  into one (:mod:`.fold`).
* ``modulation``: embeddings of noise level and label are a table (:mod:`.conditioning_tables`).
* ``references``: keys and values of references are computed once per sample, by ``prepare``.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from coterie.cache.conditioning_tables import KnownTables, has_known
from coterie.cache.fold import example, expert_layers, fold, foldable
from coterie.cache.layer import FoldedLayer
from coterie.cache.schedule import Schedule, at
from coterie.core.errors import ConfigError, describe
from coterie.core.prediction import Condition, Prediction
from coterie.experts import ExpertPool

Cache = Literal["routing", "modulation", "references"]
CACHES: tuple[Cache, ...] = get_args(Cache)


def fold_by_step(
    denoiser: Any,
    times: Tensor | Sequence[float],
    cond: Condition | None = None,
    shape: Sequence[int] | None = None,
) -> CachedDenoiser:
    """``denoiser`` with its routing folded for ``times``, and with no other cache.

    Arguments as of :func:`cached`. ConfigError for a model that has no experts, or has a layer
    whose routers see more than the noise level or whose experts cannot be fused.
    """
    return _cached(denoiser, times, cond, shape, ("routing",))


def cached(
    denoiser: Any,
    times: Tensor | Sequence[float],
    cond: Condition | None = None,
    shape: Sequence[int] | None = None,
    caches: Sequence[Cache] | None = None,
) -> CachedDenoiser:
    """A denoiser that predicts the same as ``denoiser``, at ``times`` only, and faster.

    ``times``: the solver's times, float [S], in the process's time; the clean end of a grid (sigma
    = 0) may be among them and is left out. ``cond``: any condition that the denoiser accepts,
    needed if it accepts no empty one; its values do not matter. ``shape``: of one sample, by
    default the backbone's. ``caches``: which to use; None: all that apply.

    The result shares every weight that it does not fold with ``denoiser``, but does not keep it
    alive: if you drop it, experts that no step uses are freed. Apply guidance to the result.
    ConfigError for a model in training mode, if one of ``caches`` does not apply, or if none does.
    """
    known = set(CACHES)
    for name in caches or ():
        if name not in known:
            raise ConfigError(describe("caches", name, ", ".join(CACHES)))
    applies = applicable(denoiser) if caches is None else tuple(caches)
    if not applies:
        # What is in the way is best said by the one that asks for most.
        expert_layers(denoiser)
    return _cached(denoiser, times, cond, shape, applies)


def applicable(denoiser: Any) -> tuple[Cache, ...]:
    """The exact caches that ``denoiser`` can use; ConfigError if it is no denoiser model."""
    _check_model(denoiser)
    found: list[Cache] = []
    if foldable(denoiser):
        found.append("routing")
    if has_known(denoiser):
        found.append("modulation")
    if has_references(denoiser):
        found.append("references")
    return tuple(found)


def has_references(denoiser: Any) -> bool:
    """Whether its backbone attends to reference images."""
    return bool(getattr(getattr(denoiser, "backbone", None), "has_references", False))


def _check_model(denoiser: Any) -> None:
    for fits, hint in (
        (isinstance(denoiser, nn.Module), "cache the model, then guide or threshold what you get"),
        (hasattr(denoiser, "process"), "this model has no noise level to fold by"),
    ):
        if not fits:
            kind = type(denoiser).__name__
            raise ConfigError(describe("denoiser", kind, "a denoiser model", hint))
    if denoiser.training:
        raise ConfigError(describe("denoiser.training", True, "False", "call eval() first"))


def _cached(
    denoiser: Any,
    times: Tensor | Sequence[float],
    cond: Condition | None,
    shape: Sequence[int] | None,
    caches: Sequence[Cache],
) -> CachedDenoiser:
    _check_model(denoiser)
    schedule = _schedule(denoiser.process, times)
    shown = example(denoiser, cond, shape)
    memo: dict[int, Any] = fold(denoiser, schedule, *shown) if "routing" in caches else {}
    twin = _twin(denoiser, memo)
    for name, there in (
        ("modulation", has_known(denoiser)),
        ("references", has_references(denoiser)),
    ):
        if name in caches and not there:
            allowed = ", ".join(applicable(denoiser)) or "none"
            raise ConfigError(describe("caches", name, allowed, "this model has no such thing"))
    tables = KnownTables(cast(Any, twin), schedule) if "modulation" in caches else None
    return CachedDenoiser(denoiser, twin, schedule, shown, tuple(caches), tables)


def compile_network(denoiser: Any, dynamic: bool | None = None) -> None:
    """Compile the backbone with torch at its next call.

    For one batch size and again for another one, or (``dynamic``) once for all sizes above 1.
    Folded layers are not compiled, as their weights change with the step.
    """
    for module in denoiser.backbone.modules():
        if isinstance(module, FoldedLayer):
            module.forward = torch.compiler.disable(module.forward)  # type: ignore[method-assign]
    denoiser.backbone.compile(dynamic=dynamic)


class CachedDenoiser(nn.Module):
    """``cached(x [B, ...], t [B], cond) -> Prediction``, also with samples at different steps.

    ConfigError for a time that is not of the grid, for training, and once the weights of the source
    denoiser have changed (detected by torch's version counters; writes through ``.data`` are not
    seen). ``caches`` names those in use. Made by :func:`cached`.
    """

    def __init__(
        self,
        source: nn.Module,
        twin: nn.Module,
        schedule: Schedule,
        example: tuple[Tensor, Condition],
        caches: tuple[Cache, ...],
        tables: KnownTables | None,
    ) -> None:
        super().__init__()
        self.inner = twin
        self.schedule = schedule
        self.example = example
        self.caches = caches
        self.tables = tables
        self._source = weakref.ref(source)
        tensors = [*source.parameters(), *source.buffers()]
        self._seen = [(weakref.ref(tensor), tensor._version) for tensor in tensors]

    @property
    def process(self) -> Any:
        return self.inner.process

    @property
    def config(self) -> Any:
        return self.inner.config

    @property
    def backbone(self) -> Any:
        return self.inner.backbone

    @property
    def source(self) -> Any:
        """The denoiser that this was made from; None if it no longer exists."""
        return self._source()

    def train(self, mode: bool = True) -> CachedDenoiser:
        if mode:
            hint = "train the denoiser it was made from, and fold again"
            raise ConfigError(describe("training", True, "False: the cache is for sampling", hint))
        return super().train(mode)

    def prepare(self, cond: Condition) -> Condition:
        """``cond`` with its static parts computed once for all steps: keys and values of
        references."""
        if "references" not in self.caches:
            return cond
        self._check()
        prepared: Condition = self.backbone.prepare(cond)
        return prepared

    def forward(
        self, x: Tensor, t: Tensor, cond: Condition, sample_ids: Tensor | None = None
    ) -> Prediction:
        self._check()
        steps = self.schedule.steps(t)
        known = {}
        if self.tables is not None:
            known["ctx"] = self.tables.context(steps, cond.label)
        with at(steps):
            if torch.is_grad_enabled():
                return cast(Prediction, self.inner(x, t, cond, sample_ids, **known))
            # Here torch need not keep track of views and versions; what goes out it may.
            with torch.inference_mode():
                made = cast(Prediction, self.inner(x, t, cond, sample_ids, **known))
        own = {name: getattr(made, name) for name in ("value", "variance")}
        return made.replace(**{n: v.clone() for n, v in own.items() if v is not None})

    def _apply(self, fn: Any, recurse: bool = True) -> CachedDenoiser:
        super()._apply(fn, recurse)
        if self.tables is not None:
            self.tables.clear()
        return self

    def _check(self) -> None:
        source = self._source()
        if source is None:
            return  # nobody can train what is gone
        if source.training:
            hint = "call eval() on it, or fold again after training"
            raise ConfigError(describe("denoiser.training", True, "False", hint))
        for reference, version in self._seen:
            tensor = reference()
            if tensor is None or tensor._version != version:
                hint = "fold again"
                raise ConfigError(f"cache: the denoiser's weights have changed since; {hint}")


def _schedule(process: Any, times: Tensor | Sequence[float]) -> Schedule:
    given = Schedule(times)
    noisy = process.sigma(given.times) > 0
    if not bool(noisy.any()):
        hint = "solvers ask for no time without noise"
        raise ConfigError(describe("times", given.times.tolist(), "times with noise", hint))
    return Schedule(given.times[noisy])


def _twin(denoiser: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """The denoiser again with other layers (``memo``: id -> what stands there instead), the same
    weights otherwise, and without the pools that layers shared."""
    folded = bool(memo)
    for tensor in (*denoiser.parameters(), *denoiser.buffers()):
        memo[id(tensor)] = tensor
    for module in denoiser.modules():
        if folded and isinstance(module, ExpertPool):
            memo.setdefault(id(module), nn.Identity())
    return copy.deepcopy(denoiser, memo)
