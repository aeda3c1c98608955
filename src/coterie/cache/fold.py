"""Routing folded by step: for a known schedule, routers run once and unused experts stay home.

Where every router sees the noise level alone, its choice at a step of a schedule is the same for
any input. So it is made beforehand, and the chosen experts become one expert of k times the inner
size, or one map: the same function, without the router and without dispatch (MoDE,
arXiv:2412.12953; its cache is keyed by the mean of a noise embedding, this one by layer and step).
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Generator, Tensor, nn

from coterie.cache.layer import FoldedLayer, check_foldable
from coterie.cache.schedule import Schedule, at
from coterie.core.context import NULL_LABEL
from coterie.core.errors import ConfigError, describe
from coterie.core.prediction import Condition, Prediction
from coterie.core.routing import Routing
from coterie.experts import ExpertLayer, ExpertPool

_CHUNK = 16  # steps asked for at once while folding


def fold_by_step(
    denoiser: Any,
    times: Tensor | Sequence[float],
    cond: Condition | None = None,
    shape: Sequence[int] | None = None,
) -> FoldedDenoiser:
    """A denoiser of the same contract that answers at ``times`` only, as ``denoiser`` does.

    ``times``: where a solver will ask, in the process's time, float [S]; the clean end of a grid
    (sigma = 0) may be among them and is left out. ``cond``: any condition that the denoiser
    accepts, needed where it accepts no empty one; what it says does not matter. ``shape``: of one
    sample, by default the backbone's.

    The answer shares every weight that it does not fold with ``denoiser``, and does not keep it
    alive: let go of it, and the experts that no step uses are freed. Guidance goes around the
    result. ConfigError for a model that trains, has no experts, or has a layer whose routers see
    more than the noise level or whose experts cannot be fused.
    """
    layers = _layers(denoiser)
    if denoiser.training:
        raise ConfigError(describe("denoiser.training", True, "False", "call eval() first"))
    schedule = _schedule(denoiser.process, times)
    x, cond = _example(denoiser, cond, shape)
    recorded = _routings(denoiser, list(layers.values()), schedule.times, x, cond)
    memo: dict[int, Any] = {
        id(layer): FoldedLayer(layer, recorded[layer], name) for name, layer in layers.items()
    }
    return FoldedDenoiser(denoiser, _twin(denoiser, memo), schedule, (x, cond))


class FoldedDenoiser(nn.Module):
    """``folded(x [B, ...], t [B], cond) -> Prediction``, also with samples at different steps.

    Refuses (ConfigError) a time that is not of the schedule, to train, and to answer once the
    weights of the denoiser it was made from have changed (told by torch's version counters, which
    writing through ``.data`` escapes). Made by :func:`fold_by_step`.
    """

    def __init__(
        self,
        source: nn.Module,
        twin: nn.Module,
        schedule: Schedule,
        example: tuple[Tensor, Condition],
    ) -> None:
        super().__init__()
        self.inner = twin
        self.schedule = schedule
        self.example = example
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
        """The denoiser this was made from; None once nobody holds it any more."""
        return self._source()

    def train(self, mode: bool = True) -> FoldedDenoiser:
        if mode:
            hint = "train the denoiser it was made from, and fold again"
            raise ConfigError(describe("training", True, "False: the cache is for sampling", hint))
        return super().train(mode)

    def forward(
        self, x: Tensor, t: Tensor, cond: Condition, sample_ids: Tensor | None = None
    ) -> Prediction:
        self._check()
        with at(self.schedule.steps(t)):
            return cast(Prediction, self.inner(x, t, cond, sample_ids))

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


def _layers(denoiser: Any) -> dict[str, ExpertLayer]:
    """Path of each expert layer -> the layer, all of them foldable."""
    if not isinstance(denoiser, nn.Module):
        hint = "fold the model, then guide or threshold what you get"
        raise ConfigError(describe("denoiser", type(denoiser).__name__, "a denoiser model", hint))
    if not hasattr(denoiser, "process"):
        hint = "this model has no noise level to fold by"
        raise ConfigError(describe("denoiser", type(denoiser).__name__, "a denoiser model", hint))
    layers = {n: m for n, m in denoiser.named_modules() if isinstance(m, ExpertLayer)}
    if not layers:
        raise ConfigError(describe("denoiser", "no expert layer", "a model with experts"))
    for name, layer in layers.items():
        check_foldable(layer, name)
    return layers


def _schedule(process: Any, times: Tensor | Iterable[float]) -> Schedule:
    given = Schedule(times)
    noisy = process.sigma(given.times) > 0
    if not bool(noisy.any()):
        hint = "solvers ask for no time without noise"
        raise ConfigError(describe("times", given.times.tolist(), "times with noise", hint))
    return Schedule(given.times[noisy])


def _example(
    denoiser: Any, cond: Condition | None, shape: Sequence[int] | None
) -> tuple[Tensor, Condition]:
    """One sample of noise and one condition that the denoiser accepts."""
    backbone = getattr(denoiser.config, "backbone", None)
    shape = getattr(backbone, "sample_shape", None) if shape is None else shape
    if shape is None:
        raise ConfigError(describe("shape", None, "the shape of one sample"))
    like = next(denoiser.parameters())
    x = torch.randn((1, *shape), generator=Generator().manual_seed(0)).to(like)
    if cond is None:
        label = torch.tensor([NULL_LABEL]) if getattr(backbone, "num_classes", 0) else None
        return x, Condition(label=label).to(like.device)
    return x, cond.index(torch.zeros(1, dtype=torch.long)).to(like.device)


@torch.no_grad()
def _routings(
    denoiser: Any, layers: Sequence[ExpertLayer], times: Tensor, x: Tensor, cond: Condition
) -> dict[ExpertLayer, list[Routing]]:
    """Every layer's routings, one per round with a row per step."""
    made: dict[ExpertLayer, list[tuple[Routing, ...]]] = {layer: [] for layer in layers}
    hooks = [
        layer.register_forward_hook(lambda layer, _, out: made[layer].append(out.routings))
        for layer in layers
    ]
    try:
        for part in times.split(_CHUNK):
            t = part.to(device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
            same = torch.zeros(len(part), dtype=torch.long, device=x.device)
            denoiser(x[same], t, cond.index(same))
    finally:
        for hook in hooks:
            hook.remove()
    return {layer: [_joined(parts) for parts in zip(*calls)] for layer, calls in made.items()}


def _joined(parts: Sequence[Routing]) -> Routing:
    """Routings of several calls as one; shorter lists of choices end with nobody."""
    first = parts[0]
    most = max(part.top_k for part in parts)
    pad = [(0, most - part.top_k) for part in parts]
    return first.replace(
        ids=torch.cat(
            [nn.functional.pad(r.ids, p, value=r.num_experts) for r, p in zip(parts, pad)]
        ),
        gates=torch.cat([nn.functional.pad(r.gates, p) for r, p in zip(parts, pad)]),
        probs=torch.cat([r.probs for r in parts]),
        logits=torch.cat([r.logits for r in parts]),
    )


def _twin(denoiser: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """The denoiser again with other layers (``memo``: id -> what stands there instead), the same
    weights otherwise, and without the pools that layers shared."""
    for tensor in (*denoiser.parameters(), *denoiser.buffers()):
        memo[id(tensor)] = tensor
    for module in denoiser.modules():
        if isinstance(module, ExpertPool):
            memo.setdefault(id(module), nn.Identity())
    return copy.deepcopy(denoiser, memo)
