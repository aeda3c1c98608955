"""A frozen network for clean pictures as a guide of samples, with one small expert per noise range.

A network for clean pictures fails on noisy ones, and so does its gradient. Each range of noise
levels gets an adapter, trained to reproduce the network's output on the clean picture from the
noisy one (PPAP: Go et al. 2023, arXiv:2212.05973). Shapes: B batch, K ranges.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, PositiveInt, SerializeAsAny, model_validator
from torch import Generator, Tensor, nn

from coterie.adapters import LoraConfig, attach, merge, unmerge, weigh
from coterie.adapters.attach import own_modules
from coterie.core.errors import ConfigError, describe
from coterie.core.numbers import Few
from coterie.core.prediction import Condition, Prediction, as_times
from coterie.core.registry import Part
from coterie.core.routing import Aux, Routing
from coterie.core.tensors import borrow, is_borrowed, module_tensors
from coterie.denoiser import MODELS
from coterie.guides.reader import check_shape
from coterie.guides.tasks import Task, log_likelihood
from coterie.process import PROCESSES, Process
from coterie.process.ranges import RangesConfig, equal_ranges

SLOT = "guide"
ATTENTION = ("qkv", "proj", "query", "key", "value", "to_q", "to_k", "to_v", "q_proj", "v_proj")


@MODELS.register
class GuideConfig(Part):
    """A frozen network for clean pictures with one adapter per range of noise levels."""

    kind: Literal["guide"] = "guide"
    network: Annotated[SerializeAsAny[Part], MODELS.validator]  # the trained network, by its path
    process: Annotated[SerializeAsAny[Part], PROCESSES.validator] = "ddpm"  # type: ignore[assignment]
    """Noising process of the ranges."""
    ranges: Few | RangesConfig = 5
    """number of equal ranges of steps, or the boundaries between ranges"""
    adapt: Literal["lora", "full", "none"] = "lora"
    """Per range: a low-rank adapter (``lora``), a full copy (``full``), or nothing (``none``)."""
    rank: PositiveInt = 4  # of the adapters
    alpha: float | None = Field(None, gt=0)  # of the adapters; null: rank
    lora: LoraConfig | None = None  # full settings of the adapters; null: those of ``suggested``
    task: Task | None = None  # what the network predicts; null: as it says itself

    @model_validator(mode="after")
    def _check(self) -> GuideConfig:
        if not getattr(self.network, "is_trained", False):
            hint = "train a reader first, and name its run"
            raise ConfigError(describe("network", self.network.kind, "a trained model", hint))
        if self.adapt == "none" and self.ranges != 1:
            hint = "without adapters there is one network for all noise levels"
            raise ConfigError(describe("ranges", self.ranges, "1 with adapt none", hint))
        if self.lora is not None and self.adapt != "lora":
            raise ConfigError(describe("lora", "given", f"null with adapt {self.adapt}"))
        self._ranges()
        return self

    def _ranges(self) -> RangesConfig:
        process: Process = self.process.build()
        given = self.ranges
        found = equal_ranges(process, given) if isinstance(given, int) else given
        found.times(process)
        return found

    @property
    def is_trained(self) -> bool:
        return self.adapt == "none"

    @property
    def absent(self) -> str:
        """Why there is no network to build on; "" if there is one."""
        return str(getattr(self.network, "absent", ""))

    @property
    def backbone(self) -> Any:
        return getattr(self.network, "backbone", None)

    @property
    def classes(self) -> int:
        """Classes that samples may be guided to; 0 for other tasks."""
        network = getattr(self.network, "model", self.network)
        task = self.task or getattr(network, "task", "classes")
        return int(getattr(network, "classes", 0)) if task == "classes" else 0

    def build(self) -> Guide:
        network = self.network.build()
        adapter: LoraConfig | None = None
        if self.adapt == "full":
            adapter = LoraConfig(targets=(), copies=("*",))
        elif self.adapt == "lora":
            adapter = self.lora or suggested(network, self.rank, self.alpha)
        process = self.process.build()
        return Guide(network, process, self._ranges(), adapter, self.task, config=self)


def suggested(network: nn.Module, rank: int = 4, alpha: float | None = None) -> LoraConfig:
    """Settings of an adapter that suits a network.

    Low-rank changes of a transformer's attention, of a convolutional network's kernels larger than
    1 x 1, or else of all linear maps; all biases but those of the last layer; a copy of each batch
    norm.
    """
    modules = own_modules(network)
    maps = {path: m for path, m in modules.items() if isinstance(m, nn.Linear | nn.Conv2d)}
    head = next(reversed(maps), None)
    linear = [path for path, m in maps.items() if isinstance(m, nn.Linear) and path != head]
    kernels = [
        path
        for path, m in maps.items()
        if isinstance(m, nn.Conv2d) and max(m.kernel_size) > 1 and m.groups == 1 and path != head
    ]
    targets = [path for path in linear if path.rpartition(".")[2] in ATTENTION] or kernels or linear
    if not targets:
        hint = "give lora yourself"
        raise ConfigError(describe("network", type(network).__name__, "a layer to adapt", hint))
    norms = [p for p, m in modules.items() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    biases = [
        path
        for path, m in modules.items()
        if isinstance(getattr(m, "bias", None), Tensor) and path not in (head, *norms)
    ]
    return LoraConfig(
        targets=tuple(targets),
        rank=rank,
        alpha=alpha,
        conv="kernel",
        narrow="lower",
        biases=tuple(biases),
        copies=tuple(norms),
    )


class Guide(nn.Module):
    """``forward(x [B, ...], t f32 [B]) -> Prediction`` of what the network recognises in noisy x.

    ``network``: any module with one input that returns a tensor (or something with ``value`` or
    ``logits``); it is changed in place, and not trained. Each row uses the expert of its range, by
    process time. ``shape``: of one sample, if the network has none. ``fused``: merge a range's
    adapter into the weights while whole batches are in it, as in sampling; the same outputs at the
    network's own cost.
    """

    def __init__(
        self,
        network: nn.Module,
        process: Process,
        ranges: RangesConfig | None = None,
        adapter: LoraConfig | None = None,
        task: str | None = None,
        shape: tuple[int, ...] | None = None,
        config: GuideConfig | None = None,
    ) -> None:
        super().__init__()
        self.config, self.process = config, process
        self.ranges = ranges or RangesConfig()
        self.ranges.times(process)
        self.task = str(task or getattr(network, "task", "classes"))
        self.sample_shape = shape or getattr(network, "sample_shape", None)
        self.network = network
        self.adapter, self.fused = adapter, False
        self._merged: int | None = None
        self.names = tuple(f"range-{index}" for index in range(self.ranges.count))
        if adapter is None and len(self.names) > 1:
            hint = "ranges without adapters are one network"
            raise ConfigError(describe("ranges", len(self.names), "1 without an adapter", hint))
        for module in network.modules():
            borrow(module)
        if adapter is not None:
            for name in self.names:
                attach(network, name, adapter, weight=0.0)
        self.train(self.training)

    def train(self, mode: bool = True) -> Guide:
        """Set the experts' mode; the network, batch statistics included, stays in eval mode."""
        self.separate()
        super().train(mode)
        for module in self.network.modules():
            if is_borrowed(module):
                module.training = False
        return self

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        cond: Condition | None = None,
        sample_ids: Tensor | None = None,
        rng: Generator | None = None,
        progress: float = 1.0,
    ) -> Prediction:
        t = as_times(t, x)
        self._check(x)
        ids = self.ranges.range_at(self.process, t)
        self._choose(ids)
        routings = self.routings(t, cond, sample_ids)
        return Prediction(answer_of(self.network(x)), "logits", routings)

    @torch.no_grad()
    def clean(self, x0: Tensor) -> Tensor:
        """The network's output on clean pictures, without gradient, as a training target."""
        return self.base(x0)

    def base(self, x0: Tensor) -> Tensor:
        """The network's output without any expert."""
        self._check(x0)
        self.separate()
        if self.adapter is not None:
            weigh(self.network, dict.fromkeys(self.names, 0.0))
        return answer_of(self.network(x0))

    def log_prob(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """f32 [B]: log p(target | x_t), differentiable in x (see :mod:`coterie.guides.tasks`)."""
        answer = self(x.to(next(self.network.parameters()).dtype), t, cond).value
        return log_likelihood(self.task, answer, cond)

    def routings(
        self, t: Tensor, cond: Condition | None = None, sample_ids: Tensor | None = None
    ) -> tuple[Routing, ...]:
        """The expert of each t [B] as routings; () if there is one for all."""
        if len(self.names) == 1:
            return ()
        ids = self.ranges.range_at(self.process, t)[:, None]
        probs = torch.zeros(len(t), len(self.names), device=t.device).scatter_(1, ids, 1.0)
        routing = Routing(
            unit="sample",
            num_experts=len(self.names),
            ids=ids,
            gates=torch.ones(len(t), 1, device=t.device),
            probs=probs,
            logits=probs,
            batch=(len(t), 1),
            slot=SLOT,
            name=SLOT,
            noise=t,
            step_index=self.process.step_index(t),
            label=None if cond is None else cond.label,
            sample_ids=sample_ids,
        )
        return (routing,)

    def expert(self, index: int) -> dict[str, Tensor]:
        """The tensors of one expert by name, without its own name in them; not copies."""
        mark = f".adapters.parts.{self.names[index]}."
        own = module_tensors(self.network)
        return {name.replace(mark, ".", 1): v for name, v in own.items() if mark in name}

    @torch.no_grad()
    def start_from(self, index: int, other: int) -> None:
        """Give expert ``index`` the tensors of expert ``other``."""
        theirs = self.expert(other)
        for name, value in self.expert(index).items():
            value.copy_(theirs[name])

    def aux_losses(
        self, routings: Sequence[Routing], rng: Generator | None = None
    ) -> tuple[Aux, ...]:
        return ()

    @contextmanager
    def fusing(self) -> Iterator[Guide]:
        """``fused`` inside the block; its weights are as before after it."""
        before, self.fused = self.fused, True
        try:
            yield self
        finally:
            self.fused = before
            self.separate()

    def separate(self) -> None:
        """Take a merged expert out of the weights, which are then as they were, bit for bit."""
        if getattr(self, "_merged", None) is not None:
            unmerge(self.network)
            self._merged = None

    def _choose(self, ids: Tensor) -> None:
        """Turn on the experts of a batch; one for all rows, by numbers, else row by row."""
        if self.adapter is None:
            return
        first = int(ids[0]) if len(ids) else 0
        single = bool((ids == first).all())
        if single and self._merged == first:
            return
        self.separate()
        if single:
            weigh(self.network, {n: float(i == first) for i, n in enumerate(self.names)})
            if self.fused and not self.training:
                merge(self.network)
                self._merged = first
            return
        weigh(self.network, {n: (ids == i).float() for i, n in enumerate(self.names)})

    def _check(self, x: Tensor) -> None:
        if self.sample_shape is not None:
            check_shape(x, self.sample_shape)


def answer_of(found: Any) -> Tensor:
    """The tensor in the output of a network."""
    for name in ("value", "logits"):
        found = getattr(found, name, found)
    if not isinstance(found, Tensor):
        hint = "wrap the network in a module that answers one tensor"
        raise ConfigError(describe("network", type(found).__name__, "a tensor", hint))
    return found
