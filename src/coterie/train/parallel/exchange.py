"""Expert parallelism: rows are sent to the process that has their expert, and outputs are sent
back.

There are two ways. Where rows have few choices, each is sent to the processes of its experts:
counts first, then the rows, sorted by expert and so by process. The receiver's ordinary dispatch
sorts them by expert and computes them with its local rows. Outputs are sent back the same way and
weighted by their gates at home. Where rows have as many choices as there are processes, all rows
are sent to all processes with their choices, without counts, and outputs are sent back weighted and
summed. While rows are being sent shared experts compute, and while outputs are being sent a process
computes its own rows. Legend: R rows, A assignments, K choices, E experts, P processes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from coterie.core.errors import ConfigError, describe
from coterie.core.routing import Unit
from coterie.experts.dispatch import DispatchPlan, dispatch, plan_choices
from coterie.experts.dispatch.expert_weights import OneExpert
from coterie.experts.dispatch.plan import scale_rows
from coterie.experts.kinds import ExpertPool
from coterie.train.batch_parts import routed_pools
from coterie.train.parallel.config import parts_of
from coterie.train.parallel.processes import Processes

Send = Callable[[Tensor], Callable[[], Tensor]]


class _Trip:
    """Rows to other processes, and their gradient back: what is computed between ``depart`` and
    ``arrive`` takes its time from the journey, both ways.

    ``go`` and ``go_back`` send a tensor; their answer, called, waits for what comes in its place.
    A tensor without elements stands for what is on its way: it ties the two ends in the graph.
    """

    def __init__(self, go: Send, go_back: Send) -> None:
        self.go, self.go_back = go, go_back
        self.arrived: Callable[[], Tensor] | None = None

    def depart(self, rows: Tensor) -> Tensor:
        away: Tensor = _Depart.apply(rows, self)
        return away

    def arrive(self, away: Tensor) -> Tensor:
        rows: Tensor = _Arrive.apply(away, self)
        return rows

    def end(self) -> Tensor:
        arrived, self.arrived = self.arrived, None
        assert arrived is not None
        return arrived()


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, trip: _Trip) -> Tensor:
        ctx.trip = trip
        trip.arrived = trip.go(rows)
        return rows.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return ctx.trip.end(), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, _: Tensor, trip: _Trip) -> Tensor:
        ctx.trip = trip
        return trip.end()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.trip.arrived = ctx.trip.go_back(grad)
        return grad.new_empty(0), None


def _sending(processes: Processes, send: Sequence[int], receive: Sequence[int]) -> _Trip:
    """``send[r]`` rows to each process r, ``receive[r]`` from it."""

    def go(rows: Tensor, out: Sequence[int], back: Sequence[int]) -> Callable[[], Tensor]:
        made, wait = processes.exchanging(rows, out, back)

        def arrived() -> Tensor:
            wait()
            return made

        return arrived

    return _Trip(lambda rows: go(rows, send, receive), lambda grad: go(grad, receive, send))


class ExpertExchange:
    """Serves a pool of which this process has E / P experts; called as ``dispatch`` is."""

    def __init__(self, pool: ExpertPool, processes: Processes) -> None:
        self.processes = processes
        self._sizes = parts_of(pool.num_experts, processes.config.expert)
        # The same parameters, whoever replaces them, as a pool of its own size.
        self.local = copy.copy(pool)
        self.local.num_experts = self._sizes[processes.place["expert"]]
        self.local.exchange = None

    def __call__(
        self,
        x: Tensor,
        plan: DispatchPlan,
        pool: ExpertPool,
        backend: str = "auto",
        float32: bool = False,
        always: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        dtype, device = x.dtype, x.device.type
        if torch.is_autocast_enabled(device) and dtype == torch.float32:
            x, float32 = x.to(torch.get_autocast_dtype(device)), True
        with torch.autocast(device, enabled=False):
            if plan.unit == "token" and plan.num_rows > len(x):
                x = x.repeat_interleave(plan.num_rows // len(x), dim=0)

            def meanwhile() -> Tensor | None:
                return None if always is None else pool.kind.forward(x, OneExpert(always, {}))

            serve = self._all_to_all if self._many_choices(x, plan) else self._to_their_experts
            y, shared = serve(x, plan, backend, float32, meanwhile)
            return (y if shared is None else y + shared).to(dtype)

    def _many_choices(self, x: Tensor, plan: DispatchPlan) -> bool:
        """Whether all rows in float32 are no more to send than each choice of a row in its type."""
        processes = len(self._sizes)
        return processes > 1 and processes * 4 <= plan.ids.shape[1] * x.element_size()

    def _all_to_all(
        self,
        x: Tensor,
        plan: DispatchPlan,
        backend: str,
        float32: bool,
        meanwhile: Callable[[], Tensor | None],
    ) -> tuple[Tensor, Tensor | None]:
        """The routed answer, and what is computed meanwhile."""
        choices = [plan.gates.float(), plan.ids.float()]
        told = torch.cat([x.flatten(1).float(), *choices], dim=1)
        there, home = _Trip(self._hearing, self._adding), _Trip(self._adding, self._hearing)
        away = there.depart(told)
        shared = meanwhile()
        theirs = there.arrive(away)
        K = plan.ids.shape[1]
        rows, gates, ids = theirs.split([theirs.shape[1] - 2 * K, K, K], dim=1)
        rows = rows.to(x.dtype).reshape(-1, *x.shape[1:])
        answers = self._here(rows, gates, ids.detach().long(), plan.unit, backend)
        # Every process must send gradients back, also one whose experts nobody asked.
        back = home.depart(answers.flatten(1) + theirs[:0].sum())
        own = self._here(x, plan.gates, plan.ids, plan.unit, backend)
        y = own + home.arrive(back).view(own.shape)
        return y if float32 else y.to(x.dtype), shared

    def _here(self, rows: Tensor, gates: Tensor, ids: Tensor, unit: Unit, backend: str) -> Tensor:
        """f32 [R, ...]: what the local experts among those chosen answer, weighed and added up."""
        nobody = self.local.num_experts
        local = ids - sum(self._sizes[: self.processes.place["expert"]])
        local = torch.where((local >= 0) & (local < nobody), local, nobody)
        self.local.training = False
        plan = plan_choices(local, gates, nobody, unit=unit)
        return dispatch(rows, plan, self.local, backend, float32=True).float()

    def _hearing(self, rows: Tensor) -> Callable[[], Tensor]:
        """[R, ...] -> [(P - 1) R, ...]: those of the other processes."""
        mine = self.processes.place["expert"] * len(rows)
        arrived = self.processes.joining(rows, ("expert",))

        def heard() -> Tensor:
            everyone = arrived()
            return torch.cat([everyone[:mine], everyone[mine + len(rows) :]])

        return heard

    def _adding(self, rows: Tensor) -> Callable[[], Tensor]:
        """[(P - 1) R, ...], for the other processes -> [R, ...]: what they have for this one, added
        up."""
        others = len(self._sizes) - 1
        each = [len(rows) // others] * (others + 1)
        each[self.processes.place["expert"]] = 0
        out, wait = self.processes.exchanging(rows, each, each)

        def added() -> Tensor:
            wait()
            return out.unflatten(0, (others, -1)).sum(0)

        return added

    def _to_their_experts(
        self,
        x: Tensor,
        plan: DispatchPlan,
        backend: str,
        float32: bool,
        meanwhile: Callable[[], Tensor | None],
    ) -> tuple[Tensor, Tensor | None]:
        """The routed answer, and what is computed meanwhile."""
        send_PE, receive_PE = self._counts(plan, x.device)
        send, receive = torch.stack([send_PE.sum(1), receive_PE.sum(1)]).tolist()
        there = _sending(self.processes, send, receive)
        home = _sending(self.processes, receive, send)
        away = there.depart(x.index_select(0, plan.rows))
        shared = meanwhile()
        answers = self._answered(there.arrive(away), receive_PE, plan.unit, backend)
        values = scale_rows(home.arrive(home.depart(answers)), plan.sorted_gates, float32)
        shape = self.local.kind.output_shape(x.shape)
        return values.new_zeros(shape).index_add(0, plan.rows, values), shared

    def _counts(self, plan: DispatchPlan, device: torch.device) -> tuple[Tensor, Tensor]:
        """i64 [P, E of a process]: rows for every expert of each process, zeros where it has fewer
        than others; and rows from each process for every own expert."""
        counts = iter(plan.counts)
        most = self._sizes[0]
        there = [[next(counts) for _ in range(size)] + [0] * (most - size) for size in self._sizes]
        send_PE = torch.tensor(there, device=device)
        ones = [1] * len(send_PE)
        receive_PE, wait = self.processes.exchanging(send_PE, ones, ones)
        wait()
        return send_PE, receive_PE[:, : self.local.num_experts]

    def _answered(self, rows: Tensor, receive_PE: Tensor, unit: Unit, backend: str) -> Tensor:
        """The local experts' answers to rows [A, ...] that lie process by process."""
        experts = torch.arange(self.local.num_experts, device=rows.device)
        ids = experts.repeat(len(receive_PE)).repeat_interleave(receive_PE.flatten())
        gates = torch.ones(len(ids), 1, device=rows.device)
        local = plan_choices(ids[:, None], gates, self.local.num_experts, unit=unit)
        self.local.training = False
        answers = dispatch(rows, local, self.local, backend)
        # Every process must send gradients back, also one whose experts nobody asked.
        return answers + rows[:0].sum().to(answers.dtype)


def split_experts(model: nn.Module, processes: Processes) -> dict[str, int]:
    """Keep this process's part of every pool that serves expert layers; names of what was cut, and
    how many experts it had.

    ConfigError names the pool that has fewer experts than there are processes.
    """
    degree, mine = processes.config.expert, processes.place["expert"]
    cut: dict[str, int] = {}
    for path, pool in routed_pools(model).items():
        check_enough(path, pool.num_experts, degree)
        if hasattr(pool, "adapters"):
            hint = f"{path} has adapters on its experts, which lie in one process"
            raise ConfigError(describe("parallel.expert", degree, "1", hint))
        sizes = parts_of(pool.num_experts, degree)
        here = slice(sum(sizes[:mine]), sum(sizes[: mine + 1]))
        for name in pool.names:
            whole = pool.get_parameter(name)
            part = nn.Parameter(whole.detach()[here].clone(), whole.requires_grad)
            if hasattr(whole, "use_decay"):
                part.use_decay = whole.use_decay  # type: ignore[attr-defined]
            pool.register_parameter(name, part)
            cut[f"{path}.{name}"] = pool.num_experts
        for name, table in list(pool.named_buffers(recurse=False)):
            pool._buffers[name] = table[here].clone()
        pool.exchange = ExpertExchange(pool, processes)
    return cut


def check_enough(path: str, num_experts: int, degree: int) -> None:
    if num_experts < degree:
        raise ConfigError(
            f"parallel: {path} has {num_experts} experts, fewer than {degree} processes; use "
            f"expert= at most {num_experts}"
        )
