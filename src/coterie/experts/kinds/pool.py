"""Stacked parameters of E experts, owned once; layers hold a reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Generator, Tensor, nn

from coterie.core.errors import CheckpointError, ConfigError, describe
from coterie.core.tensors import effective
from coterie.experts.kinds.base import ExpertKind


class ExpertPool(nn.Module):
    """Stacked parameters of E experts of one kind; each tensor is [E, *shape of one expert].

    A pool may serve several layers (register it once; a shared tensor appears once in counts and
    optimisers). Do not index ``pool.gate_up[e]`` under autograd, which builds a full zero stack per
    expert in the backward pass; :meth:`unbind` splits all experts with one backward.
    """

    def __init__(self, kind: ExpertKind, num_experts: int, width: int) -> None:
        super().__init__()
        if num_experts < 1:
            raise ConfigError(describe("num_experts", num_experts, "at least 1"))
        self.kind = kind
        self.num_experts = num_experts
        self.width = width
        self.names = tuple(kind.shapes(width))
        for name, shape in kind.shapes(width).items():
            self.register_parameter(name, nn.Parameter(torch.empty(num_experts, *shape)))
        for name, table in kind.buffers(width).items():
            self.register_buffer(name, table, persistent=False)
        self.moving = tuple(kind.statistics(width))
        for name, value in kind.statistics(width).items():
            self.register_buffer(name, value.repeat(num_experts, *[1] * value.dim()))
        self._used_per_row = 0.0
        self.exchange: Callable[..., Tensor] | None = None
        """What serves calls in the place of ``dispatch`` where other processes hold some of the
        experts; the stacks are then this process's."""
        self.reset_parameters()

    def reset_parameters(self, rng: Generator | None = None) -> None:
        """Initialise each expert by its kind's rule.

        ``rng`` None: torch's global generator, as ``nn.Linear`` uses, so that layers start
        differently.
        """
        for name, stack in self.stacks().items():
            if stack.device.type == "meta":
                continue
            values = torch.empty(stack.shape, dtype=torch.float32)
            for one in values.unbind(0):
                self.kind.reset(name, one, rng)
            with torch.no_grad():
                stack.copy_(values)
        for name, start in self.kind.statistics(self.width).items():
            self.get_buffer(name).copy_(start.expand_as(self.get_buffer(name)))

    @torch.no_grad()
    def silence(self) -> None:
        """Zero the last parameters of every expert, so that it returns 0."""
        for name in set(self.kind.ends) & set(self.names):
            getattr(self, name).zero_()

    def stacks(self) -> dict[str, Tensor]:
        """Parameter name -> [E, ...], as stored."""
        return {name: getattr(self, name) for name in self.names}

    def adapted(self) -> ExpertPool:
        """This pool, or a view of it with what adapters add; used for computing."""
        if "adapters" not in self._modules:
            return self
        return cast(ExpertPool, _Adapted(self, effective(self)))

    def statistics(self) -> dict[str, Tensor]:
        """Running statistics: name -> [E, ...]."""
        return {name: self.get_buffer(name) for name in self.moving}

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and running statistics: name -> [E, ...]."""
        return {**self.stacks(), **self.statistics()}

    def unbind(self) -> list[dict[str, Tensor]]:
        """Parameters of each expert, views with gradient."""
        return split_experts(self.stacks(), self.num_experts)

    def unpack(self) -> list[nn.Module]:
        """Every expert as a plain module (a copy), for tools that expect Linear layers."""
        modules = []
        names = self.kind.plain_names()
        for expert, own in enumerate(self.unbind()):
            module = self.kind.module(self.width).to(next(iter(own.values())))
            state = {names[name]: value for name, value in self.expert_state(expert).items()}
            module.load_state_dict({**module.state_dict(), **state})
            modules.append(module.train(self.training))
        return modules

    def expert_state(self, expert: int) -> dict[str, Tensor]:
        """Copies of one expert's tensors, without the leading E: what a model directory stores."""
        self._check(expert)
        return {name: stack.detach()[expert].clone() for name, stack in self.tensors().items()}

    def load_expert_state(self, expert: int, tensors: Mapping[str, Tensor]) -> None:
        """Replace one expert; CheckpointError unless names and shapes match."""
        self._check(expert)
        shapes = {name: tuple(stack.shape[1:]) for name, stack in self.tensors().items()}
        if set(tensors) != set(shapes):
            raise CheckpointError(describe("expert tensors", sorted(tensors), str(sorted(shapes))))
        for name, shape in shapes.items():
            if tuple(tensors[name].shape) != shape:
                raise CheckpointError(describe(name, tuple(tensors[name].shape), str(shape)))
        with torch.no_grad():
            for name, stack in self.tensors().items():
                stack[expert].copy_(tensors[name])

    def register_use(self, experts_per_row: float) -> None:
        """Tell the pool how many of its experts a layer uses per row, for active parameter
        counts."""
        self._used_per_row += experts_per_row

    def active_share(self) -> dict[str, float]:
        """Share of each stack that one row uses, over all layers that use this pool."""
        used = self._used_per_row if self._used_per_row else float(self.num_experts)
        return {name: min(1.0, used / self.num_experts) for name in self.names}

    def _check(self, expert: int) -> None:
        if not 0 <= expert < self.num_experts:
            raise ConfigError(describe("expert", expert, f"0..{self.num_experts - 1}"))

    def extra_repr(self) -> str:
        return f"{self.kind.kind}, num_experts={self.num_experts}, width={self.width}"


class _Adapted:
    """A pool whose stacks are others; all else is that of the pool itself."""

    def __init__(self, pool: ExpertPool, stacks: dict[str, Tensor]) -> None:
        self._pool, self._stacks = pool, stacks

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)

    def adapted(self) -> _Adapted:
        return self

    def stacks(self) -> dict[str, Tensor]:
        return self._stacks

    def unbind(self) -> list[dict[str, Tensor]]:
        return split_experts(self._stacks, self._pool.num_experts)


def split_experts(stacks: Mapping[str, Tensor], num_experts: int) -> list[dict[str, Tensor]]:
    """Parameters of each expert; one backward per stack."""
    split = {name: stack.unbind(0) for name, stack in stacks.items()}
    return [{name: split[name][e] for name in stacks} for e in range(num_experts)]
