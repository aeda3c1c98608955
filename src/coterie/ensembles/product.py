"""Products, powers and tilts of the densities of trained denoisers, sampled correctly.

The target at every noise level is p(x, t) ~ prod_i q_i(x, t)^beta_i exp(b(t) r(x)): q_i are the
noised densities of the experts, r is a reward. The prediction is the score S = sum_i beta_i
score_i, and particles that follow the reverse equation of any zeta > 0 with it carry

    d log W / ds = (sum_i beta_i - 1) div f + g^2 / 2 (|S|^2 - sum_i beta_i |score_i|^2)
                   + sum_i beta_i' log q_i
                   + b' r - b grad r . f + b g^2 / 2 grad r . S

in falling time s (Skreta et al. 2025, arXiv:2503.02819: its annealing, geometric average, product
and reward are special cases). No divergence of a network is needed. With a reward the drift has
half of its gradient at zeta = 1, zeta^2 / (1 + zeta^2) of it in general; the weights do the rest.
Everything is per unit of lam = log(alpha / sigma), where it is finite in every process: g^2
|score|^2 ds = 2 |eps|^2 d lam. ``corrector`` "none" is the plain sum of scores, and the whole
gradient of the reward, without weights; this does not sample the target.

Quantities that change with the noise level follow the share of signal c = alpha^2 / (alpha^2 +
sigma^2): b(t) = b c, and beta_i(t) from ``noisy_betas`` at c = 0 to ``betas`` at c = 1. Shapes: B
batch, M experts, d values of a sample.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, SerializeAsAny, model_validator
from torch import Generator, Tensor, nn

from coterie.core.errors import ConfigError, describe
from coterie.core.prediction import Condition, DenoiserLike, Prediction, as_times
from coterie.core.registry import Part
from coterie.core.rng import SampleNoise
from coterie.core.tensors import module_tensors, require_finite
from coterie.ensembles.base import ENSEMBLES, Ensemble, EnsembleConfig, as_members, shared_view
from coterie.ensembles.members import Members
from coterie.ensembles.product_rates import (
    Differences,
    Power,
    Reward,
    drift_per_lam,
    reward_and_gradient,
    scaled,
    score_rate,
    signal_share,
    signal_slope,
)
from coterie.ensembles.residency import LoadedMembers
from coterie.ensembles.rewards import REWARDS
from coterie.process import OneCall, Process, as_view, convert, expand, view_slope
from coterie.process.contrast import MOST

Mode = Literal["product", "average", "anneal", "tilt"]
MODES: tuple[Mode, ...] = ("product", "average", "anneal", "tilt")
Label = Literal["given", "null"] | int
_LEAST_LAM = -6.0
DIVIDE_BY_ALPHA = {"eps", "score"}
"""Views that leave x0 open in pure noise."""


@ENSEMBLES.register
class CompositionConfig(EnsembleConfig):
    """A product, average, power or tilt of the densities of trained denoisers.

    ``process`` must be named if experts were trained with different ones. If alpha is 0 at its
    noisy end, and the normaliser changes with noise or an expert predicts eps or score (from which
    x0 cannot be computed there), sampling starts at lam = -6.
    """

    kind: Literal["composition"] = "composition"
    mode: Mode = "product"
    """``product``: any betas. ``average``: betas that add up to 1; of an unconditional and a
    conditional expert (1 - w, w) is the target of classifier-free guidance of weight w. ``anneal``:
    one expert's density to the power beta. ``tilt``: times exp(tilt * reward)."""
    betas: tuple[float, ...] | None = None
    """power of each expert's density; null: 1, or 1 / M in an average"""
    noisy_betas: tuple[float, ...] | None = None
    """Powers in pure noise, if they change with the noise level; every expert must then have
    ``log_prob``."""
    labels: tuple[Label, ...] | None = None
    """Condition of each expert: that of the sample (``given``), none (``null``), or a class."""
    tilt: float = 0.0  # factor of the reward
    reward: Annotated[SerializeAsAny[Part], REWARDS.validator] | None = None
    """function of a sample; larger is better"""
    zeta: float = Field(1.0, gt=0)  # noise of the solver, for rewards
    corrector: Literal["none", "fkc"] = "fkc"
    """fkc: weighted particles; none: the sum of scores, approximate"""

    @model_validator(mode="after")
    def _check(self) -> CompositionConfig:
        for name, none in (("tilt", 0.0), ("reward", None)):
            given = getattr(self, name)
            if given != none and self.mode != "tilt":
                raise ConfigError(describe(name, given, f'{none} in mode "{self.mode}"'))
        for name in ("betas", "noisy_betas"):
            given = getattr(self, name)
            if given is not None:
                self._check_betas(name, given)
        return self

    def _check_betas(self, name: str, betas: tuple[float, ...]) -> None:
        if not all(abs(beta) <= MOST for beta in betas):
            raise ConfigError(describe(name, betas, f"numbers from {-MOST:g} to {MOST:g}"))
        if sum(betas) <= 0.0:
            hint = "the product could not be normalised in pure noise"
            raise ConfigError(describe(name, betas, "numbers whose sum is above 0", hint))
        if self.mode == "average" and abs(sum(betas) - 1.0) > 1e-6:
            hint = 'mode "product" takes any other sum'
            raise ConfigError(describe(name, betas, "numbers that add up to 1", hint))
        if self.mode == "anneal" and len(betas) != 1:
            hint = 'mode "product" takes one for each of several experts'
            raise ConfigError(describe(name, betas, "one number", hint))

    def build(
        self,
        members: Members | Mapping[str, DenoiserLike | None] | Sequence[DenoiserLike | None],
        router: Any = None,
        reward: Reward | None = None,
    ) -> Composition:
        """The ensemble. ``reward``: a function that replaces the configured one.

        ConfigError if the target is not defined for these experts. ``router`` is not used.
        """
        if router is not None:
            raise ConfigError(describe("router", router, "none: every expert is asked"))
        if not isinstance(members, Members):
            _check_processes(members)
        if reward is None and self.reward is not None:
            reward = self.reward.build()
        return Composition(self, as_members(members), reward)


class Composition(Ensemble):
    """The ensemble of the module. Sample from :meth:`initial` noise with the solver
    ``feynman_kac``."""

    config: CompositionConfig

    def __init__(
        self, config: CompositionConfig, members: Members, reward: Reward | None = None
    ) -> None:
        _check_members(config, members)
        super().__init__(config, members)
        count = len(members)
        default = 1.0 / count if config.mode == "average" else 1.0
        self.betas = config.betas or (default,) * count
        self.noisy_betas = config.noisy_betas or self.betas
        self.labels = config.labels or ("given",) * count
        if config.mode == "anneal" and count != 1:
            hint = 'mode "product" takes several'
            raise ConfigError(describe("mode", "anneal", f"one expert, not {count}", hint))
        for name in ("betas", "noisy_betas", "labels"):
            value = getattr(self, name)
            if len(value) != count:
                raise ConfigError(describe(name, value, f"{count}, one per expert"))
        self.reward = reward
        if (reward is None) == (config.mode == "tilt"):
            allowed = "a function (x, t, cond) -> [B]" if reward is None else "none"
            raise ConfigError(describe("reward", reward, allowed, f'mode "{config.mode}"'))
        if self.changing:
            _check_densities(members, self.process)
        self.normalised = not self.changing and abs(sum(self.betas) - 1.0) < 1e-9
        self._whole = self.process
        self._corrected = config.corrector == "fkc"
        if not self.normalised or reward is not None:
            self.view = "eps"  # a sum of scores is a sum of these, whatever the betas add up to
        self.asked_view = shared_view(self._whole, members) or self.view
        if {self.view, self.asked_view, *(facts.view for facts in members.facts)} & DIVIDE_BY_ALPHA:
            self.process = _with_signal(self.process)

    @property
    def changing(self) -> bool:
        """Whether the betas depend on the noise level."""
        return self.noisy_betas != self.betas

    @property
    def zeta(self) -> float | None:
        """The ``zeta`` that the solver must have; None: any."""
        tilted = self.reward is not None and self.config.corrector == "fkc"
        return self.config.zeta if tilted else None

    @property
    def prior_scale(self) -> float:
        """Standard deviation of the initial noise relative to an expert's: 1 / sqrt(sum beta)."""
        return 1.0 / math.sqrt(float(sum(self._betas_at(self._noisy_end()))))

    def initial(self, shape: Sequence[int], noise: SampleNoise) -> Tensor:
        """f32 [B, *shape]: the state at ``process.t_max``; row i depends on seed i alone."""
        return self.prior_scale * self.process.prior_std() * noise.normal(shape)

    def log_prior(self, dims: int) -> float:
        """log of the integral of prod N(x; 0, sigma^2)^beta over ``dims`` numbers at ``t_max``:
        with the record's ``normaliser()`` the log-normaliser of the composition itself."""
        total = float(sum(self._betas_at(self._noisy_end())))
        log_two_pi = math.log(2.0 * math.pi * self.process.prior_std() ** 2)
        return 0.5 * dims * ((1.0 - total) * log_two_pi - math.log(total))

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        cond: Condition,
        sample_ids: Tensor | None = None,
        rng: Generator | None = None,
        progress: float = 1.0,
    ) -> Prediction:
        t = as_times(t, x)
        parts = [self._part(index, x, t, cond) for index in range(len(self.members))]
        value, rate = self._summed(x, t, [part.value for part in parts])
        if self.changing and self._corrected:
            rate = rate + self._densities(x, t, cond)
        if self.reward is not None:
            value, extra = self._tilted(x, t, cond, value)
            rate = rate + extra if self._corrected else rate
        inner = tuple(routing for part in parts for routing in part.routings)
        return Prediction(value, self.view, inner, weight_rate=rate)

    def paired(self, x: Tensor, t: Tensor, cond: Condition, null: Condition) -> Prediction:
        both = Condition.cat(cond, null)
        return self(torch.cat([x, x]), torch.cat([t, t]), both)

    def ask(self, index: int, x: Tensor, t: Tensor, cond: Condition) -> Prediction:
        member = self.members.get(index)
        if member.process == self._whole:  # only the range of times was cut
            return as_view(self.process, member(x, t, cond), self.asked_view, x, t)
        return super().ask(index, x, t, cond)

    def _part(self, index: int, x: Tensor, t: Tensor, cond: Condition) -> Prediction:
        return self._ask_rows(index, x, t, self._told(index, cond, len(x)))

    def _told(self, index: int, cond: Condition, batch: int) -> Condition:
        label = self.labels[index]
        if label == "given":
            return cond
        if label == "null":
            return cond.as_null(batch)
        device = next((value.device for value in cond.tensors().values()), None)
        return cond.replace(label=torch.full((batch,), int(label), device=device))

    def _noisy_end(self) -> Tensor:
        return torch.tensor([self.process.t_max], dtype=torch.float64)

    def _betas_at(self, t: Tensor) -> list[Power]:
        """M powers; [B] in the dtype of t where they depend on it."""
        if not self.changing:
            return list(self.betas)
        share = signal_share(self.process, t)
        ends = zip(self.betas, self.noisy_betas, strict=True)
        return [noisy + (beta - noisy) * share for beta, noisy in ends]

    def _summed(self, x: Tensor, t: Tensor, values: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The weighted sum in the composition's view, and its rate f64 [B]: change of log weight
        per unit of lam, without densities and reward (zeros without a corrector)."""
        process, betas = OneCall(self.process), self._betas_at(t)
        found = Differences.of(values, betas, self._corrected)
        value, total = values[0], sum(betas)
        if not self.normalised:
            # Views are linear in (eps, x), so a sum in one of them at x is that of eps at total x.
            value, x = scaled(total, value), scaled(total, x)
        if found.gap is not None:
            value = value + found.gap
        value = convert(process, value, self.asked_view, self.view, x, t)
        if not self._corrected:
            return value, torch.zeros_like(found.spread)
        slope = view_slope(process, t, self.asked_view, "eps").double()
        drift = None if self.normalised else drift_per_lam(process, t)
        return value, score_rate(found, slope, total, value, drift)

    def _densities(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """f64 [B]: what the rate has besides where betas change: sum beta_i' log q_i."""
        slope = signal_slope(self.process, t)
        rate = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        for index, (end, start) in enumerate(zip(self.betas, self.noisy_betas, strict=True)):
            known: Any = self.members.get(index)
            density = known.log_prob(x, t, self._told(index, cond, len(x)))
            rate = rate + (end - start) * (slope * density).double()
        return rate

    def _tilted(self, x: Tensor, t: Tensor, cond: Condition, eps: Tensor) -> tuple[Tensor, Tensor]:
        """eps with the reward's gradient, and what the reward adds to the rate, f64 [B]."""
        assert self.reward is not None
        reward, gradient = reward_and_gradient(self.reward, x, t, cond)
        process = OneCall(self.process)
        share, sigma = signal_share(process, t), process.sigma(t)
        zeta2 = self.config.zeta**2
        part = zeta2 / (1.0 + zeta2) if self._corrected else 1.0
        moved = eps - expand(part * self.config.tilt * share * sigma, x).to(x) * gradient
        along = (gradient * eps).flatten(1).double().sum(1)
        stretch = (gradient * x).flatten(1).double().sum(1) * drift_per_lam(process, t)
        rate = signal_slope(process, t) * reward - share * (stretch + sigma * along)
        return moved, self.config.tilt * rate.double()


def compose(
    experts: Members | Mapping[str, DenoiserLike | None] | Sequence[DenoiserLike | None],
    betas: Sequence[float] | None = None,
    *,
    reward: Reward | None = None,
    **settings: Any,
) -> Composition:
    """A composition of denoisers; ``settings`` are fields of :class:`CompositionConfig`.

    ConfigError if the target is not defined.
    """
    given = None if betas is None else tuple(float(beta) for beta in betas)
    config = CompositionConfig.from_dict({**settings, "betas": given})
    return config.build(experts, reward=reward)


def _check_processes(
    experts: Mapping[str, DenoiserLike | None] | Sequence[DenoiserLike | None],
) -> None:
    named = experts.items() if isinstance(experts, Mapping) else enumerate(experts)
    for name, expert in named:
        if expert is not None and not hasattr(expert, "process"):
            allowed = "a denoiser with a noising process (no token denoiser has one)"
            raise ConfigError(describe(f"experts.{name}", type(expert).__name__, allowed))


def _check_members(config: CompositionConfig, members: Members) -> None:
    """ConfigError if an expert is missing, or of another process that nobody has matched."""
    for facts in members.facts:
        if facts.missing:
            allowed = "every expert: without one the target is another"
            raise ConfigError(describe(f"experts.{facts.name}", facts.reason, allowed))
    if not isinstance(members, LoadedMembers):
        _check_finite(members)
    kinds = [facts.process for facts in members.facts]
    if config.process is None and any(kind != kinds[0] for kind in kinds):
        names = ", ".join(sorted({type(kind).__name__ for kind in kinds}))
        hint = "name the one to sample in; experts are then asked at the same lam"
        allowed = "the same process for all experts"
        raise ConfigError(describe("process", f"experts of {names}", allowed, hint))


def _check_finite(members: Members) -> None:
    """CheckpointError if an expert in memory has weights that no answer can come from."""
    for index, name in enumerate(members.names):
        expert = members.get(index)
        if isinstance(expert, nn.Module):
            require_finite(module_tensors(expert, borrowed=True), f"experts.{name}")


def _check_densities(members: Members, process: Process) -> None:
    """ConfigError unless every expert knows its density in ``process``."""
    for index, facts in enumerate(members.facts):
        known = hasattr(members.get(index), "log_prob") and facts.process == process
        if not known:
            allowed = "the same as betas"
            hint = f"{facts.name} knows a score and no density (log_prob) in this process"
            raise ConfigError(describe("noisy_betas", "changing", allowed, hint))


def _with_signal(process: Process) -> Process:
    """The process from where it has some signal on."""
    if float(process.alpha(torch.tensor(process.t_max, dtype=torch.float64))) > 0.0:
        return process
    start = float(process.time_of_lam(torch.tensor(_LEAST_LAM, dtype=torch.float64)))
    return dataclasses.replace(process, t_max=start)  # type: ignore[type-var]
