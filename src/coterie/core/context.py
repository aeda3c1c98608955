"""What every expert slot is told: one record, the same for every slot and every backbone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from torch import Generator, Tensor

from coterie.core.errors import ConfigError, describe
from coterie.core.graphs import recorded
from coterie.core.records import replaced
from coterie.core.rng import generator

NULL_LABEL = -1
"""The class id that means "no condition", in every tensor of labels in the library."""


@dataclass(frozen=True, eq=False)
class Context:
    """Facts about the forward pass at one slot (B samples, N tokens each, D width).

    Every field may be None where a backbone has no such thing (a language model has no noise
    level). ``label`` is the condition *after* dropout: NULL_LABEL marks an unconditional sample.
    """

    batch: int
    tokens: int
    noise: Tensor | None = None  # f32 [B], process time t in [0, 1]
    step_index: Tensor | None = None  # i64 [B], index in the ORIGINAL grid 0..num_steps-1
    num_steps: int = 1000  # length of that grid
    time_input: Tensor | None = None  # f32 [B], what the network's time embedding is fed
    time_inputs: Tensor | None = None  # f32 [num_steps], the same for every step of the grid
    time_embedding: Tensor | None = None  # [B, D], tau(t): timestep only, no condition
    embedding: Tensor | None = None  # [B, D], timestep + condition
    time_table: Any = None  # () -> [num_steps, D]: tau of every step, differentiable
    label: Tensor | None = None  # i64 [B], after dropout
    task: Tensor | None = None  # i64 [B] or [B, N]
    modality: Tensor | None = None  # i64 [B] or [B, N]
    positions: Tensor | None = None  # i64 [N] or [B, N]
    sample_ids: Tensor | None = None  # i64 [B], dataset index or request id
    token_mask: Tensor | None = None  # bool [B, N], False = padding, never routed or counted
    slot: str = "ffn"
    layer: int = 0
    name: str = ""  # of the place, where a number says little
    round: int = 0
    pool_layers: tuple[int, ...] = ()  # layers whose experts this one may use, in pool order
    progress: float = 1.0  # share of training done, for schedules
    training: bool = False
    rng: Generator | None = None  # for jitter and sampling routers; None = no noise
    seed: Callable[[], int] | None = None  # of what this pass draws; None: that of ``rng``
    owner: object = None  # of the slot: which host's routings these are
    stream: Tensor | None = None  # [B, N, D], the residual stream before its norm
    normalised: Tensor | None = None  # [B, N, D], after it and before any modulation, if asked for
    state: Tensor | None = None  # router state carried from the layer before
    keys_values: Tensor | None = None  # [B, 2, layers, M, D], of tokens that all may attend to
    keys_mask: Tensor | None = None  # bool [B, M]
    known: Mapping[str, Any] | None = None  # what a cache knows of this noise level and label

    @property
    def pass_seed(self) -> int:
        """Of what this forward pass draws; it needs an ``rng``."""
        assert self.rng is not None
        return self.rng.initial_seed() if self.seed is None else self.seed()

    def drawing(self, *what: int | str) -> Generator | None:
        """What this place draws from: a function of the pass, the place and ``what``, however often
        it is run. None: nothing is drawn."""
        if not self.training or self.rng is None:
            return None
        if recorded():
            hint = "the graph would keep what is drawn once"
            allowed = "a network in eval mode"
            raise ConfigError(describe("torch.export or trace", "draws", allowed, hint))
        return generator(self.pass_seed, self.slot, self.layer, self.round, *what)

    def replace(self, **changes: Any) -> Self:
        return replaced(self, changes)
