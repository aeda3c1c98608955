"""The expert layer: router -> dispatch -> experts -> combine, ``rounds`` times.

    x_0 = h;  x_{c+1} = x_c + routed_c(x_c) + shared(x_c);  the layer answers x_C - x_0

The block that owns the slot adds the answer (``ffn``), or reads ``m = 1 + answer`` (``pre_block``).
Several rounds over one pool: Chain-of-Experts (arXiv:2506.18945).
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
    """An expert layer of any kind.

    ``num_experts``: candidates of the router; None where the experts' kind fixes the number
    (``channel_window``). ``slot_map``: candidate -> tensor of the pool, many to one (merged
    experts); None = one tensor each.

    ``router_reads`` ``stream``: the residual stream before its norm instead of what the experts
    read; ``normalised``: the block's normalised input, without modulation (Nucleus-Image,
    arXiv:2604.12163). ``router_reads_time``: the time embedding as well, joined to either.
    ``stem``: a block that all experts share, before them (``star``: GELU(A x) * (C x)).
    ``adaptor``: inner size, as a multiple of the width, of a GELU network they share behind them
    (MoFME). ``shared`` experts read and add beside both.

    ``rounds`` C: times the pool is passed. ``round_routing``: each round has its ``own`` router,
    all use a ``shared`` one (its choice may still change with x_c), or the decision of the first
    is ``frozen``. ``inner_residual`` False drops x_c from x_{c+1}. ``inner_norm``: RMS norm without
    weights before router and experts from the second round on. ``answer`` ``output`` gives x_C
    instead of x_C - x_0. ``accumulate_float32``: sum expert answers in float32 under lower
    precision.

    ``init_std``: matrices start N(0, init_std) where their own part states no start and has none by
    its nature (a modulation by 1); null: by each part's own rule, or as the trunk around says.

    ``self_gate`` adds gates for each task's own experts to those of the router (HoME).
    ``noise_tasks`` T: the task of a sample is its noise level, in T equal parts of the original
    grid.
    """

    num_experts: int | None = Field(8, ge=1, le=65536)
    experts: Annotated[SerializeAsAny[Part], EXPERTS.validator] = SwiGLU()
    router: RouterConfig = RouterConfig()
    router_reads: Reads = "input"
    router_reads_time: bool = False
    stem: Literal["none", "star"] = "none"
    adaptor: AdaptorConfig | PositiveFloat | None = None
    shared: SharedConfig | None = None
    self_gate: SelfGateConfig | None = None
    noise_tasks: Few | None = None
    slot_map: tuple[NonNegativeInt, ...] | None = Field(None, min_length=1)
    rounds: Few = 1
    round_routing: Literal["own", "shared", "frozen"] = "own"
    inner_residual: bool = True
    inner_norm: bool = False
    answer: Literal["delta", "output"] = "delta"
    balance: tuple[Annotated[SerializeAsAny[Part], BALANCES.validator], ...] = ()
    dispatch: Literal["auto", "loop", "dense", "sorted", "grouped", "triton", "native"] = "auto"
    accumulate_float32: bool = False
    init_std: float | None = Field(None, ge=0.0)

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
        """Raise ConfigError where a layer of this width cannot be built."""
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
        """(field, its value, fields of the Context without which the layer cannot work)."""
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
        """With its ``init_std``, or ``std`` where it has none, told to the parts that have none."""
        std = std if self.init_std is None else self.init_std
        if std is None:
            return self
        router = self.router.replace(score=starting(self.router.score_part, std))
        return self.replace(init_std=std, experts=starting(self.kind, std), router=router)

    def candidates(self, width: int) -> int:
        """How many experts the router chooses among at this width."""
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
        """How many experts the pool holds: one per candidate or slot, plus the reserved one."""
        routed = self.candidates(width)
        if self.slot_map is not None:
            routed = max(self.slot_map) + 1
        return routed + self.router.num_reserved

    def build_pool(self, width: int) -> ExpertPool:
        """A pool of the right size, to be owned outside and passed to several layers."""
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
        """``time_width``, ``stream_width``: sizes of ctx.time_embedding and ctx.stream where they
        are not ``width``. ``pool_layers``: the layers that own equal parts of a shared ``pool``, in
        its order. ``always``: a module with the experts' input and output in the place of shared
        experts. ``init_std``: as the field, where that is null."""
        own = self.starting(init_std)
        return ExpertLayer(self, width, time_width, pool, pool_layers, always, stream_width, own)


class ExpertLayer(nn.Module):
    """``layer(h [B, N, D], ctx) -> ExpertOutput``; [B, C, H, W] where the experts read grids, and
    [N, D], also without a context, where each row is routed alone.

    Where the N rows of a sample are one and the same (h is expanded, not copied), experts answer
    it once, and each of the N routings weighs the answers: N tasks that are asked of one input.

    A ``pool`` that is passed in stays out of this module's parameters and state: whoever owns it
    registers it, once, however many layers use it.
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
        """Initialisation of each part's paper; apply after a backbone's generic pass.

        A pool or a module that was passed in is left to its owner.
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
        """The router of one round."""
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
        """Routed answer plus shared answer for x [B, N, D] or [B, C, H, W] under a given routing.

        Takes any routing of the right shape: a recorded, edited or cached one works too.
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
    """Routers in the order of (layer, round), as a balance's ``after_step`` expects them."""
    return [layer.router(round) for layer in layers for round in range(layer.config.rounds)]
