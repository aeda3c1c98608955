"""The models: a backbone with a noising process is a denoiser.

``denoiser(x, t, cond) -> Prediction`` is the interface that solvers, ensembles and guidance use.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import SerializeAsAny, model_validator
from torch import Generator, Tensor, nn

from coterie.backbones import BACKBONES, DiTConfig
from coterie.backbones.base import BackboneOutput
from coterie.backbones.causal import CausalConfig
from coterie.backbones.slots import claimed, hosts
from coterie.backbones.taps import Layers, Topology, as_layered
from coterie.core.context import Context
from coterie.core.errors import ConfigError, describe
from coterie.core.prediction import Condition, Prediction, as_condition, as_times
from coterie.core.registry import Part, Registry
from coterie.core.rng import PassSeed
from coterie.core.routing import Aux, Routing
from coterie.process import PRECONDITIONS, PROCESSES, Process, expand

MODELS = Registry("model", "coterie.models")


def _first_parameter(module: nn.Module) -> Tensor | None:
    """As ``next(module.parameters())``, which is slow for every call of a small network."""
    for parameter in module._parameters.values():
        if parameter is not None:
            return parameter
    for child in module._modules.values():
        found = None if child is None else _first_parameter(child)
        if found is not None:
            return found
    return None


class Model(nn.Module):
    """Base of all models: a backbone whose expert layers have balance losses."""

    backbone: nn.Module

    def aux_losses(
        self, routings: Sequence[Routing], rng: Generator | None = None
    ) -> tuple[Aux, ...]:
        """The balance losses of one forward pass, computed from its routings.

        DataError if a routing is of another model.
        """
        owners = hosts(self.backbone)
        made = zip(owners, claimed(owners, routings))
        return tuple(aux for host, own in made for aux in host.aux_losses(own, rng))

    def after_step(self, routings: Sequence[Routing]) -> None:
        """Updates after an optimiser step, such as selection biases.

        Training calls it once per optimiser step with the routings of all micro-batches.
        """
        owners = hosts(self.backbone)
        for host, own in zip(owners, claimed(owners, routings)):
            host.after_step(own)


def drawn_from(rng: Generator | None) -> dict[str, Any]:
    """Fields of the Context that carry the random numbers of one pass."""
    return {"rng": rng, "seed": None if rng is None else PassSeed(rng)}


def time_inputs(process: Process) -> Tensor:
    """f32 [num_steps]: input of the network's time embedding at every step of the grid."""
    steps = torch.arange(process.num_steps)
    return process.time_input(process.time_of_index(steps)).float()


def context_at(process: Process, t: Tensor, inputs: Tensor) -> Context:
    """The Context of the noise levels t [B]; ``inputs``: :func:`time_inputs` of the process."""
    return Context(
        batch=t.shape[0],
        tokens=0,
        noise=process.unit_time(t),
        step_index=process.step_index(t),
        num_steps=process.num_steps,
        time_input=process.time_input(t).float(),
        time_inputs=inputs,
    )


@MODELS.register
class DenoiserConfig(Part):
    """A diffusion model: a backbone, the noising process and what the network predicts."""

    kind: Literal["denoiser"] = "denoiser"
    backbone: Annotated[SerializeAsAny[Part], BACKBONES.validator] = DiTConfig()  # the network
    process: Annotated[SerializeAsAny[Part], PROCESSES.validator] = "rectified_flow"  # type: ignore[assignment]
    """The noising process, alpha(t) and sigma(t)."""
    precondition: Annotated[SerializeAsAny[Part], PRECONDITIONS.validator] = "none"  # type: ignore[assignment]
    """Scaling of the network's input and output; ``edm`` needs the view x0."""
    view: Literal["x0", "eps", "score", "flow", "v"] = "flow"  # what the network predicts

    @model_validator(mode="after")
    def _check(self) -> DenoiserConfig:
        if getattr(self.backbone, "answers", "sample") != "sample":
            hint = "it reads token ids; use the model token_denoiser"
            allowed = "a backbone that answers a sample"
            raise ConfigError(describe("backbone", self.backbone.kind, allowed, hint))
        if self.precondition.kind != "none" and self.view != "x0":
            hint = f"precondition {self.precondition.kind!r} answers x0"
            raise ConfigError(describe("view", self.view, "x0", hint))
        learned = getattr(self.backbone, "learned_variance", False)
        if learned and not self.process.build().discrete:
            hint = f"process {self.process.kind!r} has no transition variance to learn"
            raise ConfigError(describe("backbone.learned_variance", True, "false", hint))
        return self

    def build(self) -> Denoiser:
        """A new model with random weights."""
        return Denoiser(self)


class Denoiser(Model):
    """A diffusion model: ``forward(x [B, ...], t f32 [B], cond) -> Prediction`` of x's shape.

    The prediction is in ``config.view``. If t is a number, it is the time of all samples.
    ``sample_ids``, ``rng`` and ``progress`` are passed to the routers through the Context; sampling
    needs none of them. ``ctx``: the Context of the times t, if a cache has computed it.
    """

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        self.config = config
        self.process: Process = config.process.build()
        self.precondition = config.precondition.build(self.process)
        self.backbone = config.backbone.build()
        self.register_buffer("time_inputs", time_inputs(self.process), persistent=False)

    @property
    def _dtype(self) -> torch.dtype:
        parameter = _first_parameter(self.backbone)
        return torch.float32 if parameter is None else parameter.dtype

    def forward(
        self,
        x: Tensor,
        t: Tensor | float,
        cond: Condition | None = None,
        sample_ids: Tensor | None = None,
        rng: Generator | None = None,
        progress: float = 1.0,
        ctx: Context | None = None,
    ) -> Prediction:
        t, cond = as_times(t, x), as_condition(cond)
        ctx, scaled = self._asked(x, t, sample_ids, rng, progress, ctx)
        return self._answer(x, t, self.backbone(scaled, ctx, cond))

    def topology(self) -> Topology:
        """Where the backbone can be split into layers; ConfigError if it cannot be run layer by
        layer."""
        return as_layered(self.backbone, "backbone").topology()

    def layers(
        self,
        x: Tensor,
        t: Tensor | float,
        cond: Condition | None = None,
        sample_ids: Tensor | None = None,
        rng: Generator | None = None,
        progress: float = 1.0,
    ) -> Layers[Prediction]:
        """:meth:`forward` layer by layer; see :mod:`coterie.backbones.taps`."""
        t, cond = as_times(t, x), as_condition(cond)
        ctx, scaled = self._asked(x, t, sample_ids, rng, progress)
        out = yield from as_layered(self.backbone, "backbone").layers(scaled, ctx, cond)
        return self._answer(x, t, out)

    def _asked(
        self,
        x: Tensor,
        t: Tensor,
        sample_ids: Tensor | None,
        rng: Generator | None,
        progress: float,
        ctx: Context | None = None,
    ) -> tuple[Context, Tensor]:
        """What the backbone is told, and x as it reads it."""
        if ctx is None:
            ctx = context_at(self.process, t, self.get_buffer("time_inputs"))
        ctx = ctx.replace(
            sample_ids=sample_ids, training=self.training, progress=progress, **drawn_from(rng)
        )
        if self.precondition.plain:
            return ctx, x.to(self._dtype)
        c_in = expand(self.precondition.coefficients(t)[0], x).to(x)
        return ctx, (c_in * x).to(self._dtype)

    def _answer(self, x: Tensor, t: Tensor, out: BackboneOutput) -> Prediction:
        sample = out.sample.to(x)
        if not self.precondition.plain:
            _, c_skip, c_out = (expand(c, x).to(x) for c in self.precondition.coefficients(t))
            sample = c_skip * x + c_out * sample
        view = self.config.view
        return Prediction(sample, view, out.routings, variance=out.variance, visible=out.visible)


@MODELS.register
class TokenDenoiserConfig(Part):
    """A text model: a backbone with logits for each position."""

    kind: Literal["token_denoiser"] = "token_denoiser"
    backbone: Annotated[SerializeAsAny[Part], BACKBONES.validator] = CausalConfig()
    """the network; its ``answers`` are logits"""
    masking: Literal["next_token", "masked"] = "next_token"
    """``next_token``: autoregressive, needs a causal trunk. ``masked``: absorbing diffusion, each
    token is replaced by the mask token with probability t; needs a bidirectional trunk."""

    @model_validator(mode="after")
    def _check(self) -> TokenDenoiserConfig:
        if getattr(self.backbone, "answers", "sample") != "logits":
            hint = "it reads no token ids; use the model denoiser"
            allowed = "a backbone that answers logits"
            raise ConfigError(describe("backbone", self.backbone.kind, allowed, hint))
        trunk = getattr(self.backbone, "trunk", None)
        if trunk is not None and trunk.causal != (self.masking == "next_token"):
            hint = "next_token needs a causal trunk, masked a bidirectional one"
            allowed = str(self.masking == "next_token")
            raise ConfigError(describe("backbone.trunk.causal", trunk.causal, allowed, hint))
        return self

    def build(self) -> TokenDenoiser:
        """A new model with random weights."""
        return TokenDenoiser(self)


class TokenDenoiser(Model):
    """A text model: ``forward(ids i64 [B, N], t f32 [B], cond) -> Prediction``, logits f32 [B, N,
    V].

    t is the share of masked tokens (0 for an autoregressive model). The mask token is the last
    entry of the vocabulary.
    """

    def __init__(self, config: TokenDenoiserConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = config.backbone.build()

    @property
    def mask_token(self) -> int:
        """Id of the mask token."""
        return int(self.config.backbone.vocabulary) - 1

    def forward(
        self,
        ids_BN: Tensor,
        t: Tensor | float,
        cond: Condition | None = None,
        sample_ids: Tensor | None = None,
        rng: Generator | None = None,
        progress: float = 1.0,
    ) -> Prediction:
        t, cond = as_times(t, ids_BN), as_condition(cond)
        ctx = Context(
            batch=ids_BN.shape[0],
            tokens=0,
            noise=t.float(),
            step_index=(t.float() * 999).round().long(),
            sample_ids=sample_ids,
            training=self.training,
            progress=progress,
            **drawn_from(rng),
        )
        out = self.backbone(ids_BN, ctx, cond)
        return Prediction(out.sample, "logits", out.routings)


@MODELS.register
class PredictorConfig(Part):
    """A multi-task model without noise: one logit per task for each input."""

    kind: Literal["predictor"] = "predictor"
    backbone: Annotated[SerializeAsAny[Part], BACKBONES.validator]
    """a backbone for tasks, such as ``multitask``"""

    @model_validator(mode="after")
    def _check(self) -> PredictorConfig:
        if getattr(self.backbone, "answers", "sample") != "tasks":
            allowed = "a backbone that answers tasks"
            raise ConfigError(describe("backbone", self.backbone.kind, allowed, "use multitask"))
        return self

    def build(self) -> Predictor:
        """A new model with random weights."""
        return Predictor(self)


class Predictor(Model):
    """A multi-task model: ``forward(x i64 [B, C], cond) -> Prediction`` with logits f32 [B, T].

    ``tasks``: numbers of the tasks to compute, the others cost nothing; None: all.
    """

    def __init__(self, config: PredictorConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = config.backbone.build()

    def forward(
        self,
        x: Tensor,
        cond: Condition | None = None,
        sample_ids: Tensor | None = None,
        rng: Generator | None = None,
        progress: float = 1.0,
        tasks: Sequence[int] | None = None,
    ) -> Prediction:
        ctx = Context(
            batch=x.shape[0],
            tokens=0,
            sample_ids=sample_ids,
            training=self.training,
            progress=progress,
            **drawn_from(rng),
        )
        out = self.backbone(x, ctx, cond or Condition(), tasks)
        return Prediction(out.sample, "logits", out.routings)
