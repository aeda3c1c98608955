"""The expert layer: router -> dispatch -> experts -> combine, ``rounds`` times.

    x_0 = h;  x_{c+1} = x_c + routed_c(x_c) + shared(x_c);  the layer returns x_C - x_0

The block around it adds the output (slot ``ffn``), or multiplies its input by ``m = 1 + output``
(slot ``pre_block``). Several rounds over one pool: Chain-of-Experts (arXiv:2506.18945).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Annotated, Literal, Self, cast

import torch.nn.functional as F
from pydantic import Field, NonNegativeInt, PositiveFloat, SerializeAsAny, model_validator
from torch import Generator, Tensor, nn

from coterie.core.config import Config
from coterie.core.context import Context
from coterie.core.errors import ConfigError, describe
from coterie.core.numbers import Few
from coterie.core.registry import Part
from coterie.core.routing import Routing
from coterie.experts.adaptor import AdaptorConfig, build_adaptor
from coterie.experts.balance import BALANCES, BalancePart
from coterie.experts.dispatch import dispatch, plan
from coterie.experts.inputs import shaped
from coterie.experts.kinds import EXPERTS, ExpertKind, ExpertPool, SwiGLU
from coterie.experts.kinds.base import start_linears
from coterie.experts.layer_limits import GRID_ONLY, SAME_WIDTH, TRUNK_ONLY
from coterie.experts.output import ExpertOutput
from coterie.experts.router_input import Reads, noise_task, router_input
from coterie.experts.routers import Router, RouterConfig, share_cells
from coterie.experts.routers.base import starting
from coterie.experts.routers.config import within
from coterie.experts.self_gate import SelfGate, SelfGateConfig
from coterie.experts.shared import SharedConfig, SharedExperts
from coterie.nn.mlp import Star


class ExpertLayerConfig(Config):
    """An expert layer: its experts, its router, and what surrounds them."""

    num_experts: int | None = Field(8, ge=1, le=65536)
    """of the router; null where the kind of experts fixes it"""
    experts: Annotated[SerializeAsAny[Part], EXPERTS.validator] = SwiGLU()
    """kind of network of each expert"""
    router: RouterConfig = RouterConfig()  # how experts are chosen
    router_reads: Reads = "input"
    """The router's input: what the experts read, the residual ``stream`` before its norm, or the
    ``normalised`` stream before modulation (Nucleus-Image, arXiv:2604.12163)."""
    router_reads_time: bool = False  # append the time embedding to the router's input
    stem: Literal["none", "star"] = "none"
    """shared block before the experts; star: GELU(A x) * (C x)"""
    adaptor: AdaptorConfig | PositiveFloat | None = None
    """shared network after the experts (MoFME); a number: its ratio"""
    shared: SharedConfig | None = None  # experts that every token uses, beside the routed ones
    self_gate: SelfGateConfig | None = None  # second gates for each task's own experts (HoME)
    noise_tasks: Few | None = None  # T: task of a sample = its noise level in T equal parts
    slot_map: tuple[NonNegativeInt, ...] | None = Field(None, min_length=1)
    """router's expert -> index in the pool; null: one to one"""
    rounds: Few = 1  # passes through the experts
    round_routing: Literal["own", "shared", "frozen"] = "own"
    """router per round, one for all, or the first choice"""
    inner_residual: bool = True  # False drops x_c from x_{c+1}
    inner_norm: bool = False  # RMS norm without weights before each round after the first
    answer: Literal["delta", "output"] = "delta"  # what the layer returns: x_C - x_0, or x_C
    balance: tuple[Annotated[SerializeAsAny[Part], BALANCES.validator], ...] = ()
    """load-balance losses"""
    dispatch: Literal["auto", "loop", "dense", "sorted", "grouped", "triton", "native"] = "auto"
    """implementation; auto: the fastest"""
    accumulate_float32: bool = False  # sum expert outputs in float32 under lower precision
    init_std: float | None = Field(None, ge=0.0)
    """Standard deviation of initial weight matrices, for parts that set none themselves; null: each
    part's own rule, or the trunk's ``init_std``."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.slot_map is not None and set(self.slot_map) != set(range(max(self.slot_map) + 1)):
            hint = "a tensor that nobody uses cannot learn"
            allowed = "every tensor 0..max used at least once"
            raise ConfigError(describe("slot_map", self.slot_map, allowed, hint))
        if self.router_reads != "input" and self.rounds > 1:
            hint = "later rounds read what the one before wrote"
            raise ConfigError(describe("router_reads", self.router_reads, "input", hint))
        if self.router_reads_time and not self.router.score_part.reads_rows:
            hint = "its score reads no rows"
            raise ConfigError(describe("router_reads_time", True, "false", hint))
        self._check_kind()
        self._check_count(self.num_experts, None)
        return self

    def _check_count(self, count: int | None, width: int | None) -> None:
        """What depends on the number of candidates, where it is known."""
        if count is not None:
            within("router", lambda: self.router.check(count, width))
            if self.slot_map is not None and len(self.slot_map) != count:
                hint = f"it has {len(self.slot_map)}"
                allowed = f"{count} entries, one per candidate"
                raise ConfigError(describe("slot_map", self.slot_map, allowed, hint))
            if self.self_gate is not None:
                gate = self.self_gate
                within("self_gate", lambda: gate.check(self.router, self.kind, count))
        for place, part in enumerate(self.balance):
            balance = cast(BalancePart, part)
            within(f"balance.{place}", lambda b=balance: b.check(self.router, count))  # type: ignore[misc]

    def check(self, width: int) -> None:
        """ConfigError if a layer of this width cannot be built."""
        if self.kind.fixed_count(width) is not None:
            hint = f"the number of {self.kind.kind} experts is fixed, one per candidate"
            if self.slot_map is not None:
                raise ConfigError(describe("slot_map", self.slot_map, "null", hint))
            if self.router.num_reserved:
                partition = self.router.partition
                raise ConfigError(describe("router.partition", partition, "none", hint))
        # A trunk's time embedding is as wide as its stream.
        self._check_count(self.candidates(width), width * (1 + self.router_reads_time))
        out = (width,) if self.kind.grid else self.kind.output_shape((width,))
        if out != (width,):
            self._need(SAME_WIDTH, f"experts answer {out[0]} values to {width}")

    def _need(self, wanted: Mapping[str, object], hint: str) -> None:
        for field, value in wanted.items():
            if getattr(self, field) != value:
                raise ConfigError(describe(field, getattr(self, field), json.dumps(value), hint))

    def _check_kind(self) -> None:
        """What the kind of expert asks of the rest."""
        kind, unit = self.kind, self.router.routed_unit
        if self.shared is not None:
            kind.with_hidden(self.shared.hidden)
        if self.stem != "none" and kind.input_free:
            hint = f"experts of kind {kind.kind!r} ignore their input"
            raise ConfigError(describe("stem", self.stem, "none", hint))
        if kind.unit not in (None, unit):
            hint = f"experts of kind {kind.kind!r} serve a whole {kind.unit}"
            raise ConfigError(describe("router.unit", unit, str(kind.unit), hint))
        if kind.grid:
            hint = "the answer of a convolution need not have the shape of what it reads"
            self._need(GRID_ONLY, hint)
            self._need({"router_reads": "input"}, TRUNK_ONLY)
        if self.self_gate is not None and self.router.num_reserved:
            hint = "a reserved expert is no task's own"
            raise ConfigError(describe("self_gate", "given", "null", hint))

    @property
    def reads(self) -> list[tuple[str, str, tuple[str, ...]]]:
        """Context fields that the layer needs: (configuration field, its value, Context fields)."""
        found = [(f"router.{field}", value, names) for field, value, names in self.router.reads]
        if self.self_gate is not None:
            found.append(("self_gate", "given", ("task",)))
        if self.router_reads_time:
            found.append(("router_reads_time", "true", ("time_embedding",)))
        if self.noise_tasks is None:
            return found
        told = {"task": "step_index"}
        return [
            (field, value, tuple(told.get(n, n) for n in names)) for field, value, names in found
        ]

    @property
    def kind(self) -> ExpertKind:
        return cast(ExpertKind, self.experts)

    def starting(self, std: float | None) -> Self:
        """A copy in which parts without an ``init_std`` have the layer's, or else ``std``."""
        std = std if self.init_std is None else self.init_std
        if std is None:
            return self
        router = self.router.replace(score=starting(self.router.score_part, std))
        return self.replace(init_std=std, experts=starting(self.kind, std), router=router)

    def candidates(self, width: int) -> int:
        """Number of experts that the router chooses among at this width."""
        fixed = self.kind.fixed_count(width)
        if fixed is None and self.num_experts is None:
            hint = f"experts of kind {self.kind.kind!r} come in any number"
            raise ConfigError(describe("num_experts", None, "a number", hint))
        if fixed is not None and self.num_experts is not None and self.num_experts != fixed:
            hint = f"{self.kind.kind} has {fixed} experts at width {width}; leave it null"
            raise ConfigError(describe("num_experts", self.num_experts, f"null or {fixed}", hint))
        count = self.num_experts if fixed is None else fixed
        assert count is not None
        return count

    def tensors(self, width: int) -> int:
        """Number of experts in the pool at this width, the reserved one included."""
        routed = self.candidates(width)
        if self.slot_map is not None:
            routed = max(self.slot_map) + 1
        return routed + self.router.num_reserved

    def build_pool(self, width: int) -> ExpertPool:
        """A pool of the right size, to be registered elsewhere and passed to several layers."""
        return ExpertPool(self.starting(None).kind, self.tensors(width), width)

    def build(
        self,
        width: int,
        time_width: int | None = None,
        pool: ExpertPool | None = None,
        pool_layers: tuple[int, ...] = (),
        always: nn.Module | None = None,
        stream_width: int | None = None,
        init_std: float | None = None,
    ) -> ExpertLayer:
        """A new layer of this width.

        ``time_width``, ``stream_width``: sizes of ctx.time_embedding and ctx.stream if not
        ``width``. ``pool_layers``: the layers that own equal parts of a shared ``pool``, in its
        order. ``always``: a module that takes the place of shared experts. ``init_std``: used where
        the field is null.
        """
        own = self.starting(init_std)
        return ExpertLayer(self, width, time_width, pool, pool_layers, always, stream_width, own)


class ExpertLayer(nn.Module):
    """An expert layer: ``layer(h [B, N, D], ctx) -> ExpertOutput``.

    h is [B, C, H, W] for experts on feature maps; it may be [N, D], also without a Context. If h is
    one row per sample, expanded to N rows (not copied), each expert runs once per sample and the N
    routings weight its output: N tasks on one input. A ``pool`` that is passed in is not registered
    in this module; its owner registers it once for all layers that use it.
    """

    pool: ExpertPool

    def __init__(
        self,
        config: ExpertLayerConfig,
        width: int,
        time_width: int | None = None,
        pool: ExpertPool | None = None,
        pool_layers: tuple[int, ...] = (),
        always: nn.Module | None = None,
        stream_width: int | None = None,
        started: ExpertLayerConfig | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        config = started or config.starting(None)
        self.width = width
        config.check(width)
        candidates = config.candidates(width)
        num_routers = config.rounds if config.round_routing == "own" else 1
        scored = stream_width if config.router_reads == "stream" and stream_width else width
        scored += (time_width or width) if config.router_reads_time else 0
        self.routers = nn.ModuleList(
            config.router.build(scored, candidates, time_width) for _ in range(num_routers)
        )
        share_cells(self.routers)
        self.owns_pool = pool is None
        if pool is None:
            self.pool = config.build_pool(width)
        else:
            self.__dict__["pool"] = pool  # not a submodule here: its owner registers it once
        self._check_pool(config)
        self.shared: nn.Module | None = always
        if config.shared is not None:
            if always is not None:
                hint = "here the network's own module is always on"
                raise ConfigError(describe("shared", config.shared.count, "null", hint))
            self.shared = config.shared.build(config.kind, width)
        self.self_gate: SelfGate | None = None
        if config.self_gate is not None:
            self.self_gate = config.self_gate.build(config.kind, width, candidates)
        self.stem = Star(width) if config.stem == "star" else None
        self.adaptor = build_adaptor(config.adaptor, width)
        self.pool_layers = pool_layers
        self.owner = object()  # whose routings these are; a host puts its own here
        self._slots = self._slot_table(candidates)
        used = config.router.select_part.expected(candidates) * config.rounds
        self.pool.register_use(used)

    def _check_pool(self, config: ExpertLayerConfig) -> None:
        pool, tensors, self.init_std = self.pool, config.tensors(self.width), config.init_std
        if pool.kind not in (self.config.kind, config.kind) or pool.width != self.width:
            raise ConfigError(describe("pool", str(pool), f"{self.config.kind} of {self.width}"))
        if pool.num_experts != tensors:
            raise ConfigError(describe("pool.num_experts", pool.num_experts, str(tensors)))

    def _slot_table(self, candidates: int) -> tuple[int, ...] | None:
        """Candidate (reserved ones last) -> tensor; None where that is the identity."""
        if self.config.slot_map is None:
            return None
        first = max(self.config.slot_map) + 1
        return (*self.config.slot_map, *range(first, first + self.config.router.num_reserved))

    def reset_parameters(self, rng: Generator | None = None) -> None:
        """Initialise each part as in its paper; call it after a backbone's general initialisation.

        A pool or module that was passed in is not changed.
        """
        for router in self.routers:
            cast(Router, router).reset_parameters(rng)
        if self.owns_pool:
            self.pool.reset_parameters(rng)
        std = self.init_std
        if isinstance(self.shared, SharedExperts):
            self.shared.reset_parameters(rng, std)
        if self.self_gate is not None:
            self.self_gate.reset_parameters(rng, std)
        for part in (self.stem, self.adaptor):
            start_linears(part, std, rng)

    def router(self, round: int) -> Router:
        """The router of a round."""
        return cast(Router, self.routers[round if self.config.round_routing == "own" else 0])

    def forward(self, h: Tensor, ctx: Context | None = None) -> ExpertOutput:
        rows = h.dim() == 2
        router, grid = self.config.router, self.config.kind.grid
        h, ctx = shaped(h, ctx, self.width, grid, router, self.training)
        ctx = ctx.replace(pool_layers=self.pool_layers, owner=self.owner)
        if self.config.noise_tasks is not None:
            ctx = ctx.replace(task=noise_task(ctx, self.config.noise_tasks))
        if ctx.token_mask is not None:
            # Padding may hold anything, also NaN, which would reach every weight's gradient.
            h = h.masked_fill(~ctx.token_mask[:, :, None], 0.0)
        x, total, state = h, h, ctx.state
        routings: list[Routing] = []
        for round in range(self.config.rounds):
            read = F.rms_norm(x, x.shape[-1:]) if self.config.inner_norm and round else x
            own = ctx if round == ctx.round == 0 else ctx.replace(round=round, state=state)
            routing = self._route(read, own, routings)
            routings.append(routing)
            state = state if routing.state is None else routing.state
            delta = self.combine(read, routing)
            # Summed apart from h, so that one round answers exactly what the experts said.
            total = total + delta if self.config.inner_residual and round else delta
            if round < self.config.rounds - 1:
                x = x + delta if self.config.inner_residual else delta
        if self.config.answer == "output" and self.config.inner_residual:
            total = h + total
        return ExpertOutput(total.flatten(0, 1) if rows else total, tuple(routings), state)

    def _route(self, x: Tensor, ctx: Context, before: list[Routing]) -> Routing:
        if before and self.config.round_routing == "frozen":
            return before[0].replace(round=ctx.round)
        read = router_input(x, ctx, self.config.router_reads, self.config.router_reads_time)
        if self.pool.kind.grid:
            ctx = ctx.replace(tokens=read.shape[1])
        routing: Routing = self.router(ctx.round)(read, ctx)
        return routing if self.self_gate is None else self.self_gate(x, routing, ctx)

    def combine(self, x: Tensor, routing: Routing) -> Tensor:
        """Output of routed and shared experts for x [B, N, D] or [B, C, H, W] under a given
        routing.

        Any routing of the right shape works: recorded, edited or cached.
        """
        made = plan(routing, self._slots, self.pool.num_experts)
        u = x if self.stem is None else self.stem(x)
        rows = u
        if routing.unit == "token":
            rows = u[:, 0] if u.shape[1] > 1 and u.stride(1) == 0 else u.flatten(0, 1)
        config = self.config
        always = self._always()
        serve = self.pool.exchange or dispatch
        y = serve(rows, made, self.pool, config.dispatch, config.accumulate_float32, always)
        y = y.unflatten(0, x.shape[:2]) if routing.unit == "token" else y
        if self.adaptor is not None:
            y = self.adaptor(y)
        y = y.to(x.dtype)  # autocast works in between
        return y if self.shared is None or always is not None else y + self.shared(x)

    def _always(self) -> dict[str, Tensor] | None:
        """Weights of the module that is always on where it is one more expert of the same kind."""
        if self.shared is None or self.stem is not None or self.adaptor is not None:
            return None
        return self.pool.kind.weights_of(self.shared)


def routers_of(layers: Iterable[ExpertLayer]) -> list[Router]:
    """Routers in the order of (layer, round), which a balance part's ``after_step`` expects."""
    return [layer.router(round) for layer in layers for round in range(layer.config.rounds)]
