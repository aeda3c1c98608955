"""The record that every expert layer and router receives about the current forward pass."""

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

    A field is None where the backbone has no such input: a language model has no noise level.
    ``label`` is the label *after* condition dropout: NULL_LABEL marks an unconditional sample.
    """

    batch: int
    tokens: int
    noise: Tensor | None = None  # f32 [B], noise level in unit time: 0 is clean, 1 is noise
    step_index: Tensor | None = None  # i64 [B], index in the original grid 0..num_steps-1
    num_steps: int = 1000  # length of that grid
    time_input: Tensor | None = None  # f32 [B], input of the network's time embedding
    time_inputs: Tensor | None = None  # f32 [num_steps], the same for every step of the grid
    time_embedding: Tensor | None = None  # [B, D], tau(t): timestep only, no condition
    embedding: Tensor | None = None  # [B, D], timestep + condition
    time_table: Any = None  # () -> [num_steps, D]: time embedding of every step, differentiable
    label: Tensor | None = None  # i64 [B], after dropout
    task: Tensor | None = None  # i64 [B] or [B, N]
    modality: Tensor | None = None  # i64 [B] or [B, N]
    positions: Tensor | None = None  # i64 [N] or [B, N]
    sample_ids: Tensor | None = None  # i64 [B], dataset index or request id
    token_mask: Tensor | None = None  # bool [B, N], False = padding, never routed or counted
    slot: str = "ffn"  # kind of slot: ffn, pre_block, conv
    layer: int = 0  # number of the block, or of the replaced module
    name: str = ""  # of the module that the slot replaces, in networks of other libraries
    round: int = 0  # pass through the layer's experts, 0..rounds-1
    pool_layers: tuple[int, ...] = ()  # layers whose experts this one may use, in pool order
    progress: float = 1.0  # share of training done, in [0, 1], for schedules
    training: bool = False  # whether the layer is in training mode
    rng: Generator | None = None
    """for jitter and sampling routers; None = no random numbers are drawn"""
    seed: Callable[[], int] | None = None  # () -> random seed of this pass; None: that of ``rng``
    owner: object = None  # identity of the network that holds the slot, kept in its routings
    stream: Tensor | None = None  # [B, N, D], the residual stream before its norm
    normalised: Tensor | None = None
    """[B, N, D], the stream after its norm, before modulation; set where needed"""
    state: Tensor | None = None  # router state carried from the layer before
    keys_values: Tensor | None = None
    """[B, 2, layers, M, D], of M further tokens that all tokens attend to"""
    keys_mask: Tensor | None = None  # bool [B, M], False: that further token is not attended to
    known: Mapping[str, Any] | None = None
    """what a cache has precomputed for this noise level and label"""

    @property
    def pass_seed(self) -> int:
        """Seed of the random numbers of this forward pass. ``rng`` must not be None."""
        assert self.rng is not None
        return self.rng.initial_seed() if self.seed is None else self.seed()

    def drawing(self, *what: int | str) -> Generator | None:
        """A generator for random numbers at this slot; None outside training or without ``rng``.

        It depends on the pass, the slot and ``what`` alone, so a pass that is recomputed (gradient
        checkpointing) draws the same numbers. ConfigError while the graph is exported or traced.
        """
        if not self.training or self.rng is None:
            return None
        if recorded():
            hint = "the graph would keep what is drawn once"
            allowed = "a network in eval mode"
            raise ConfigError(describe("torch.export or trace", "draws", allowed, hint))
        return generator(self.pass_seed, self.slot, self.layer, self.round, *what)

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed."""
        return replaced(self, changes)
