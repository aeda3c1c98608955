"""Expert parallelism: rows travel to the process that has their expert, and answers back.

Counts are sent first, then the rows, sorted by expert and so by process. What arrives lies process
by process; the ordinary dispatch sorts it by expert and serves it with the local ones. Answers go
back the way the rows came, and are weighed by their gates at home. Legend: R rows, A assignments,
E experts, P processes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from coterie.core.errors import ConfigError
from coterie.experts.dispatch import DispatchPlan, dispatch, plan_choices
from coterie.experts.dispatch.backends import OneExpert
from coterie.experts.dispatch.plan import scale_rows
from coterie.experts.kinds import ExpertPool
from coterie.train.parallel.processes import Processes


class _Travel(torch.autograd.Function):
    """Rows to other processes; the gradient travels back."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, processes: Processes, send: Sequence[int], receive: Sequence[int]
    ) -> Tensor:
        ctx.processes, ctx.send, ctx.receive = processes, send, receive
        return processes.exchange(rows, send, receive)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.processes.exchange(grad, ctx.receive, ctx.send), None, None, None


class ExpertExchange:
    """Serves a pool of which this process has E / P experts; called as ``dispatch`` is."""

    def __init__(self, pool: ExpertPool, processes: Processes) -> None:
        self.processes = processes
        # The same parameters, whoever replaces them, as a pool of its own size.
        self.local = copy.copy(pool)
        self.local.num_experts = pool.num_experts // processes.config.expert
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
            back = self._asked(x.index_select(0, plan.rows), plan, backend)
            values = scale_rows(back, plan.sorted_gates, float32)
            y = values.new_zeros(pool.kind.output_shape(x.shape)).index_add(0, plan.rows, values)
            if always is not None:
                y = y + pool.kind.forward(x, OneExpert(always, {}))
            return y.to(dtype)

    def _asked(self, rows: Tensor, plan: DispatchPlan, backend: str) -> Tensor:
        """The experts' answers to rows [A, ...], sorted by expert; in their order."""
        send_PE = torch.tensor(plan.counts, device=rows.device).view(-1, self.local.num_experts)
        ones = [1] * len(send_PE)
        receive_PE = self.processes.exchange(send_PE, ones, ones)
        send, receive = torch.stack([send_PE.sum(1), receive_PE.sum(1)]).tolist()
        arrived: Tensor = _Travel.apply(rows, self.processes, send, receive)
        experts = torch.arange(self.local.num_experts, device=rows.device)
        ids = experts.repeat(len(send_PE)).repeat_interleave(receive_PE.flatten())
        gates = torch.ones(len(ids), 1, device=rows.device)
        local = plan_choices(ids[:, None], gates, self.local.num_experts, unit=plan.unit)
        self.local.training = False
        answers = dispatch(arrived, local, self.local, backend)
        # Every process must send gradients back, also one whose experts nobody asked.
        answers = answers + arrived[:0].sum().to(answers.dtype)
        back: Tensor = _Travel.apply(answers, self.processes, receive, send)
        return back


def split_experts(model: nn.Module, processes: Processes) -> set[str]:
    """Keep this process's part of every pool that serves expert layers; names of what was cut.

    ConfigError names the pool that cannot be cut into equal parts.
    """
    degree, mine = processes.config.expert, processes.place["expert"]
    cut: set[str] = set()
    for path, pool in routed_pools(model).items():
        check_divides(path, pool.num_experts, degree)
        size = pool.num_experts // degree
        here = slice(mine * size, (mine + 1) * size)
        for name in pool.names:
            whole = pool.get_parameter(name)
            part = nn.Parameter(whole.detach()[here].clone(), whole.requires_grad)
            if hasattr(whole, "use_decay"):
                part.use_decay = whole.use_decay  # type: ignore[attr-defined]
            pool.register_parameter(name, part)
            cut.add(f"{path}.{name}")
        for name, table in list(pool.named_buffers(recurse=False)):
            pool._buffers[name] = table[here].clone()
        pool.exchange = ExpertExchange(pool, processes)
    return cut


def routed_pools(model: nn.Module) -> dict[str, ExpertPool]:
    """Pools that routers choose from, by path; shared experts are every process's own."""
    from coterie.experts.shared import SharedExperts

    always = {id(m.pool) for m in model.modules() if isinstance(m, SharedExperts)}
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, ExpertPool) and id(module) not in always
    }


def check_divides(path: str, num_experts: int, degree: int) -> None:
    if num_experts % degree:
        raise ConfigError(
            f"parallel: {path} has {num_experts} experts, which {degree} processes cannot share "
            f"equally; use expert= a divisor of {num_experts}"
        )
