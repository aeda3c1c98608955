"""What people put around a network, and the layers and networks that it is put around here.

A *form* takes a network of one input and answers another network that should say the same, and
have the same gradients. A :class:`Case` is a network with an input. Layers are read off the
registries: rows of levels in which every level of every part and field of a layer occurs.
"""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from combination_parts import TASKS, WIDTH, factors
from combination_runs import TinySource
from coterie.adapters import LoraConfig, attach
from coterie.core.context import Context
from coterie.core.errors import ConfigError
from coterie.core.rng import generator
from coterie.denoiser import MODELS
from coterie.experts import ExpertLayer, ExpertLayerConfig

SAMPLES, TOKENS, STEPS = 4, 6, 1000
Row = tuple[int, ...]


class LayerCall(nn.Module):
    """A layer as a function of its input: all that a backbone would tell it is fixed."""

    def __init__(self, config: ExpertLayerConfig) -> None:
        super().__init__()
        self.layer = config.build(WIDTH, time_width=WIDTH)
        rng = generator(0, "told")
        self.register_buffer("tau", torch.randn(SAMPLES, WIDTH, generator=rng), persistent=False)
        self.register_buffer("table", torch.randn(STEPS, WIDTH, generator=rng), persistent=False)

    def forward(self, h: Tensor) -> Tensor:
        numbers = torch.arange(SAMPLES)
        ctx = Context(
            batch=SAMPLES,
            tokens=TOKENS,
            step_index=numbers * 300,
            num_steps=STEPS,
            time_embedding=self.tau,
            time_table=lambda: self.table,
            label=numbers - 1,
            task=numbers % TASKS,
            modality=numbers % 2,
            sample_ids=numbers,
            stream=h.detach(),
            normalised=h.detach(),
            training=self.training,
            rng=generator(3, "pass") if self.training else None,
            progress=0.5,
        )
        return self.layer(h, ctx).y


class ModelCall(nn.Module):
    """A model as a function of its noisy input."""

    def __init__(self, fields: dict[str, Any]) -> None:
        super().__init__()
        self.model = MODELS.parse(fields).build()
        source = TinySource(self.model.config.backbone)
        self.given, self.t, self.cond = source.call(self.model)

    def forward(self, x: Tensor) -> Tensor:
        rng = generator(3, "pass") if self.training else None
        value: Tensor = self.model(x, self.t, self.cond, rng=rng).value
        return value


@dataclass(frozen=True)
class Case:
    """``build()`` is the same network each time."""

    name: str
    make: Callable[[], nn.Module]
    input: Callable[[nn.Module], Tensor]

    def build(self) -> tuple[nn.Module, Tensor]:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore", UserWarning)  # a constant gate is allowed
            torch.manual_seed(0)
            network = self.make()
        rng = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=rng))
        return network, self.input(network)


# Forms


def same(network: nn.Module, x: Tensor) -> nn.Module:
    return network


def adapted(network: nn.Module, x: Tensor) -> nn.Module:
    """Additions of zero on all that takes them."""
    config = LoraConfig(experts=("*",), rank=2, narrow="lower")
    try:
        attach(network, "zero", config)
    except ConfigError as error:
        if "none in this network" not in str(error):
            raise
        left = config.replace(**({"experts": ()} if "experts" in str(error) else {"targets": ()}))
        attach(network, "zero", left)
    return network


def copied(network: nn.Module, x: Tensor) -> nn.Module:
    made = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()  # a copy shares nothing
    return made


def reloaded(network: nn.Module, x: Tensor) -> nn.Module:
    """Its state, through a file, in another network of its kind that was moved."""
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    file.seek(0)
    made = copy.deepcopy(network)
    with torch.no_grad():
        for value in made.state_dict().values():
            value.fill_(1)
    made.load_state_dict(torch.load(file, weights_only=True))
    return made


def compiled(network: nn.Module, x: Tensor) -> nn.Module:
    torch._dynamo.reset()
    made: nn.Module = torch.compile(network, backend="eager", dynamic=False)  # type: ignore[assignment]
    return made


def traced(network: nn.Module, x: Tensor) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(network, (x,), check_trace=False)  # type: ignore[no-any-return]


def exported(network: nn.Module, x: Tensor) -> nn.Module:
    module: nn.Module = torch.export.export(network, (x,)).module()
    return module


class Checkpointed(nn.Module):
    def __init__(self, network: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.network, self.reentrant = network, reentrant

    def forward(self, x: Tensor) -> Tensor:
        # The reentrant form makes gradients only where an input wants one; token ids cannot.
        wants = torch.ones((), requires_grad=True)
        made: Tensor = checkpoint(self._run, x, wants, use_reentrant=self.reentrant)
        return made

    def _run(self, x: Tensor, wants: Tensor) -> Tensor:
        made: Tensor = self.network(x)
        return made * wants


def checkpointed(network: nn.Module, x: Tensor) -> nn.Module:
    return Checkpointed(network, False)


def checkpointed_reentrant(network: nn.Module, x: Tensor) -> nn.Module:
    return Checkpointed(network, True)


class Autocast(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            made: Tensor = self.network(x)
        return made


def autocast(network: nn.Module, x: Tensor) -> nn.Module:
    return Autocast(network)


@dataclass(frozen=True)
class Form:
    """``trains``: gradients are compared too. ``exact``: of float32; else of bfloat16, in which a
    row near a tie may choose another expert. ``modes``: as ``training`` of the network."""

    wrap: Callable[[nn.Module, Tensor], nn.Module]
    trains: bool = True
    exact: bool = True
    modes: tuple[bool, ...] = (False, True)


CHEAP: dict[str, Form] = {
    "adapter": Form(adapted, trains=False),
    "deepcopy": Form(copied),
    "state dict": Form(reloaded),
    "checkpoint": Form(checkpointed),
    "checkpoint reentrant": Form(checkpointed_reentrant),
    "autocast": Form(autocast, trains=False, exact=False, modes=(False,)),
    "jit.trace": Form(traced),
}
DEAR: dict[str, Form] = {
    "compile": Form(compiled, modes=(False,)),
    "export": Form(exported, trains=False, modes=(False,)),
}
"""Forms that look at every line: a second and more each."""


# Layers


def owned() -> list[int]:
    """Places of the factors that are fields of a router or a layer."""
    return [i for i, f in enumerate(factors()) if f.name.split(".")[0] in ("router", "expert")]


def config_of(row: Row) -> ExpertLayerConfig | None:
    """The layer of these levels, None where they do not go together."""
    fields: dict[str, dict[str, Any]] = {"router": {}, "expert": {}}
    for place, level in zip(owned(), row):
        owner, field = factors()[place].name.split(".")
        fields[owner][field] = factors()[place].values[level]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            config = ExpertLayerConfig.from_dict({**fields["expert"], "router": fields["router"]})
            config.check(WIDTH)
    except ConfigError:
        return None
    return config


def near(row: Row) -> Iterator[Row]:
    """It, and rows one change away."""
    yield row
    for place, own in enumerate(owned()):
        for level in range(len(factors()[own].labels)):
            if level != row[place]:
                yield (*row[:place], level, *row[place + 1 :])


@cache
def layer_rows() -> tuple[Row, ...]:
    """Rows in which every level occurs: the diagonal of their table, then what is not in it with as
    little else as it takes."""
    sizes = [len(factors()[place].labels) for place in owned()]
    default = (0,) * len(sizes)
    found: dict[Row, None] = {default: None}
    for level in range(max(sizes)):
        row = default
        for place, size in enumerate(sizes):
            changed = (*row[:place], level % size, *row[place + 1 :])
            row = changed if config_of(changed) is not None else row
        found[row] = None
    held = {level for row in found for level in enumerate(row)}
    for place, size in enumerate(sizes):
        for level in range(size):
            if (place, level) in held:
                continue
            start = (*default[:place], level, *default[place + 1 :])
            wider = (r for r in near(start) if r[place] == level and config_of(r) is not None)
            for row in wider:
                found[row] = None
                held |= set(enumerate(row))
                break
    return tuple(found)


def drawn_row(seed: int) -> Row:
    """Levels drawn at random, of those that still go together."""
    rng = Random(seed)
    row: Row = (0,) * len(owned())
    places = list(range(len(row)))
    rng.shuffle(places)
    for place in places:
        level = rng.randrange(len(factors()[owned()[place]].labels))
        changed = (*row[:place], level, *row[place + 1 :])
        row = changed if config_of(changed) is not None else row
    return row


def told(row: Row) -> str:
    named = [factors()[p] for p in owned()]
    return ", ".join(f"{f.name}={f.labels[lv]}" for f, lv in zip(named, row) if lv) or "defaults"


def layer_cases(rows: Sequence[Row] | Iterator[Row]) -> Iterator[Case]:
    for row in rows:
        config = config_of(row)
        if config is not None:
            yield Case(told(row), lambda c=config: LayerCall(c), layer_input)  # type: ignore[misc]


def layer_input(network: nn.Module) -> Tensor:
    layer = network.layer
    assert isinstance(layer, ExpertLayer)
    shape = (SAMPLES, WIDTH, 4, 4) if layer.pool.kind.grid else (SAMPLES, TOKENS, WIDTH)
    return torch.randn(shape, generator=torch.Generator().manual_seed(6))
