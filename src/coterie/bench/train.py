"""Training steps of a mixture of experts beside a dense model of equal active parameters, and
beside itself with the experts of transformers; whether data hold it up; and what memory it needs.

Every candidate is a trainer of the recipe ``dit-moe`` as ``coterie train`` makes it, with its own
weights from the same seed. The first loss of all but the dense one must agree.
"""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from coterie.bench.goals import goal, timed
from coterie.bench.live_memory import LiveBytes
from coterie.bench.timing import Place, Times, interleaved, milliseconds, ratio, ratios, spread
from coterie.core.cost import count_parameters
from coterie.core.errors import CoterieError
from coterie.core.rng import derive
from coterie.experts import ExpertLayer
from coterie.experts.dispatch.expert_weights import OneExpert
from coterie.experts.dispatch.plan import DispatchPlan
from coterie.experts.kinds.pool import ExpertPool
from coterie.recipes.dit_moe import arms
from coterie.runs.build import build_model, build_source
from coterie.runs.config import RunConfig
from coterie.runs.memory import training_memory
from coterie.train.loop import Trainer

DENSE, OURS = "dense", "dit-moe"
PACKAGE = "transformers"
IMPLEMENTATIONS = ("eager", "grouped_mm")
_TOLERANCE = 1e-4
_SEED = 0


class TimedSource:
    """A source that counts the seconds spent in ``get``."""

    def __init__(self, source: Any, place: Place) -> None:
        self._source, self._place, self.seconds = source, place, 0.0

    def __len__(self) -> int:
        return len(self._source)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def get(self, indices: Any) -> Any:
        start = self._place.clock()
        batch = self._source.get(indices)
        self.seconds += self._place.clock() - start
        return batch


class TheirExperts(nn.Module):
    """Mixtral's experts in the place of a pool's: they own its weights from now on."""

    def __init__(self, pool: ExpertPool, implementation: str) -> None:
        super().__init__()
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts

        stacks = pool.stacks()
        count, width, hidden = pool.num_experts, pool.width, stacks["down"].shape[2]
        config = MixtralConfig(hidden_size=width, intermediate_size=hidden, num_local_experts=count)
        config._experts_implementation = implementation
        with torch.device("meta"):
            self.experts = MixtralExperts(config)
        for name, theirs in (("gate_up", "gate_up_proj"), ("down", "down_proj")):
            weight = nn.Parameter(stacks[name].detach().clone().contiguous())
            setattr(self.experts, theirs, weight)

    def forward(
        self,
        x: Tensor,
        plan: DispatchPlan,
        pool: ExpertPool,
        backend: str,
        float32: bool,
        always: Mapping[str, Tensor] | None,
    ) -> Tensor:
        """As :func:`coterie.experts.dispatch.dispatch`."""
        y: Tensor = self.experts(x, plan.ids, plan.gates.to(x.dtype))
        return y if always is None else y + pool.kind.forward(x, OneExpert(always, {}))


def with_their_experts(model: nn.Module, implementation: str) -> nn.Module:
    """The model with every pool served, and owned, by transformers."""
    for layer in [m for m in model.modules() if isinstance(m, ExpertLayer)]:
        theirs = TheirExperts(layer.pool, implementation)
        for name in [name for name, _ in layer.pool.named_parameters(recurse=False)]:
            weight = getattr(layer.pool, name)
            weight.requires_grad_(False)
            weight.data = weight.data[:0]  # theirs are the weights; these cost nothing
        layer.add_module("their_experts", theirs)
        layer.pool.exchange = theirs.forward
    return model


def trainer_of(config: RunConfig, place: Place, implementation: str | None = None) -> Trainer:
    """A trainer that saves nothing, with a source that is timed."""
    torch.manual_seed(derive(_SEED, "bench"))
    model = build_model(config)
    if implementation is not None:
        with_their_experts(model, implementation)
    source = TimedSource(build_source(config), place)
    settings = config.train.replace(threads=place.threads)
    return Trainer(settings, model, config.objective.build(model), source, _SEED)


def candidates(place: Place) -> dict[str, Trainer]:
    """Name -> trainer; transformers' where it is installed."""
    there = arms()
    found = {DENSE: trainer_of(there["dense"], place), OURS: trainer_of(there["moe"], place)}
    if importlib.util.find_spec(PACKAGE) is not None:
        for name in IMPLEMENTATIONS:
            found[f"{PACKAGE}-{name}"] = trainer_of(there["moe"], place, name)
    return found


def run_benchmark(rounds: int = 5, threads: int = 1) -> dict[str, Any]:
    """``rows``: one per candidate; ``memory``: of ours and the dense one; ``left_out``."""
    place = Place(threads=threads)
    with place.entered():
        trainers = candidates(place)
        _check_first_loss(trainers)
        for trainer in trainers.values():
            _source(trainer).seconds = 0.0
        before = {name: trainer.state.step for name, trainer in trainers.items()}
        times = interleaved(
            {name: trainer.train_step for name, trainer in trainers.items()}, place, rounds
        )
        rows = []
        for name, trainer in trainers.items():
            seconds, steps = statistics.median(times[name]), trainer.state.step - before[name]
            per_step = trainer.config.batch * tokens(trainer)
            rows.append(
                {
                    "candidate": name,
                    "step_ms": milliseconds(times, name),
                    "tokens_per_second": round(per_step / seconds),
                    "vs_dense": ratio(times, name, [DENSE]),
                    "spread": spread(ratios(times, name, [DENSE])),
                    "data_share": round(_source(trainer).seconds / steps / seconds, 4),
                    "parameters": count_parameters(trainer.model).total,
                }
            )
        memory = [memory_row(name, trainers[name]) for name in (DENSE, OURS)]
    missing = [] if len(trainers) > 2 else [PACKAGE]
    goals = training_goals(times, rows, memory)
    return {"rows": rows, "goals": goals, "memory": memory, "left_out": missing}


def training_goals(
    times: Times, rows: Sequence[Mapping[str, Any]], memory: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Steps beside transformers' experts; getting samples must not hold a step up; peak memory
    within 15 % of what is counted from shapes."""
    theirs = [f"{PACKAGE}-{name}" for name in IMPLEMENTATIONS]
    made = [
        timed("training", "dit-moe: step, over transformers' experts", times, OURS, theirs, 1.0)
    ]
    for row in rows:
        what = f"{row['candidate']}: share of a step that gets samples"
        made.append(goal("training", what, row["data_share"], 0.05, at_most=True))
    for row in memory:
        what, figure = f"{row['candidate']}: peak counted / measured", row["counted_over_measured"]
        made.append(goal("memory", f"{what}, from below", figure, 0.85, at_most=False))
        made.append(goal("memory", f"{what}, from above", figure, 1.15, at_most=True))
    return made


def tokens(trainer: Trainer) -> int:
    """Of one sample."""
    model: Any = trainer.model
    return int(model.config.backbone.tokens)


def _source(trainer: Trainer) -> TimedSource:
    source = trainer._gradients.source
    assert isinstance(source, TimedSource)
    return source


def _check_first_loss(trainers: Mapping[str, Trainer]) -> None:
    """CoterieError where other experts compute something else; makes the first step of all."""
    losses = {name: float(trainer.train_step()["loss"]) for name, trainer in trainers.items()}
    for name, loss in losses.items():
        if name != DENSE and abs(loss - losses[OURS]) > _TOLERANCE * abs(losses[OURS]):
            raise CoterieError(f"{name}: first loss {loss:.6g}, ours {losses[OURS]:.6g}")


def memory_row(name: str, trainer: Trainer) -> dict[str, Any]:
    """Peak bytes of a step as measured, and as counted from shapes."""
    config = arms()["dense" if name == DENSE else "moe"]
    counted = training_memory(config, count_parameters(trainer.model).total)
    with LiveBytes() as live:
        trainer.train_step()
    averages = [trainer.ema.tensors(decay).values() for decay in trainer.ema.decays]
    moments = [state.values() for state in trainer.optimizer.state.values()]
    kept = [*trainer.model.parameters(), *chain(*averages), *chain(*moments)]
    measured = sum(_bytes(value) for value in kept) + live.peak
    return {
        "candidate": name,
        "measured_bytes": measured,
        "counted_bytes": counted.peak,
        "counted_over_measured": round(counted.peak / measured, 3),
        **counted.as_dict(),
    }


def _bytes(value: Any) -> int:
    return value.numel() * value.itemsize if isinstance(value, Tensor) else 0
