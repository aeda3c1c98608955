"""The noising process and view of a diffusers scheduler.

The scheduler is built by diffusers itself and asked for its alphas, so that the defaults of its
class hold. Of its fields those that make the noise are named here, and those that only choose the
steps or shape the answer afterwards, which samplers of ours do their own way. Any other class or
field is refused: what it does to the noise is not known.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coterie.core.errors import ConfigError, describe, unknown
from coterie.core.json_reader import read_object
from coterie.core.prediction import View
from coterie.core.registry import Part
from coterie.process import PROCESSES
from coterie.process.discrete import DDPMConfig

VIEWS_THERE: dict[str, View] = {
    "epsilon": "eps",
    "sample": "x0",
    "v_prediction": "v",
    "flow_prediction": "flow",
}
STEPS = "num_train_timesteps"
MAX_STEPS = 100_000
"""The library makes its tables of every step at once, some of them one step at a time."""


def names(text: str, ending: str = "") -> frozenset[str]:
    return frozenset(word + ending for word in text.split())


ON_A_GRID = names(
    """CogVideoXDDIM CogVideoXDPM DDIM DDIMInverse DDIMParallel DDPM DDPMParallel DEISMultistep
    DPMSolverMultistep DPMSolverMultistepInverse DPMSolverSDE DPMSolverSinglestep
    EulerAncestralDiscrete EulerDiscrete HeunDiscrete KDPM2AncestralDiscrete KDPM2Discrete LCM
    LMSDiscrete PNDM RePaint SASolver TCD UnCLIP UniPCMultistep""",
    "Scheduler",
)
"""They hold ``alphas_cumprod`` of every step they were trained with."""

FLOWS = names(
    "FlowMatchEulerDiscrete FlowMatchHeunDiscrete FlowMatchLCM LTXEulerAncestralRF", "Scheduler"
)
"""They count T sigma along straight paths."""

NOISE = names(
    """num_train_timesteps beta_start beta_end beta_schedule trained_betas rescale_betas_zero_snr
    snr_shift_scale prediction_type use_flow_sigmas"""
)
STEPPING = names(
    """algorithm_type base_image_seq_len base_shift clip_sample clip_sample_range corrector_order
    disable_corrector dynamic_thresholding_ratio eta euler_at_final final_sigmas_type flow_shift
    interpolation_type lambda_min_clipped lower_order_final max_image_seq_len max_shift
    noise_sampler_seed original_inference_steps predict_x0 predictor_order s_noise sample_max_value
    set_alpha_to_one shift shift_terminal sigma_max sigma_min skip_prk_steps solver_order solver_p
    solver_type steps_offset stochastic_sampling tau_func thresholding time_shift_type
    timestep_scaling timestep_spacing upscale_mode use_beta_sigmas use_dynamic_shifting
    use_exponential_sigmas use_karras_sigmas use_lu_lambdas variance_type"""
)
"""Which steps are taken and how: the noise at a time, and what the network is told of it, stay."""

ONLY: dict[str, Any] = {"invert_sigmas": False, "scale_factors": None, "timestep_type": "discrete"}
"""Fields that must be as they are by default: with others the network is told another time."""

AGREES = 1e-6
"""How far alphas that the library sums in float32 may lie from those of a schedule known here."""


def scheduler_process(folder: Path, index: Mapping[str, Any]) -> tuple[Part, View]:
    """Configuration of the process, and the view, of the pipeline at ``folder`` whose
    ``model_index.json`` says ``index``; ConfigError names a class or field that is not known."""
    path = folder / "scheduler" / "scheduler_config.json"
    facts = read_object(path, f"{folder} is not a pipeline of diffusers")
    named = _named(index)
    kind = facts.get("_class_name") or named
    known = ON_A_GRID | FLOWS
    if not isinstance(kind, str) or kind not in known:
        raise ConfigError(unknown(f"{path}: _class_name", kind, known))
    with torch.device("cpu"):  # numbers, also where a model is built without memory
        made = Scheduler(path, kind, facts).process()
    if named is not None and named != kind:
        hint = f"model_index.json says {named}"
        raise ConfigError(describe(f"{path}: _class_name", kind, "one class in both files", hint))
    return made


def _named(index: Mapping[str, Any]) -> Any:
    """The class of the scheduler that the pipeline's index names; None if it names none."""
    stored = index.get("scheduler")
    if not isinstance(stored, list) or len(stored) != 2:
        return None
    if stored[0] not in (None, "diffusers"):
        hint = "schedulers of other code are not run"
        raise ConfigError(describe("model_index.json: scheduler", stored[0], "diffusers", hint))
    return stored[1]


class Scheduler:
    """A scheduler of diffusers as its file at ``path`` describes it."""

    def __init__(self, path: Path, kind: str, facts: Mapping[str, Any]) -> None:
        self.path, self.kind = path, kind
        try:
            import diffusers
        except ImportError:
            raise ConfigError("diffusers: not installed; pip install 'coterie[interop]'") from None
        self.type: Any = getattr(diffusers, kind, None)
        if self.type is None or hasattr(self.type, "_backends"):  # what stands in for it
            allowed = f"a class that diffusers {diffusers.__version__} has as it is installed"
            raise self._refused("_class_name", kind, allowed)
        known = inspect.signature(self.type.__init__).parameters
        self.defaults = {
            name: given.default
            for name, given in known.items()
            if given.default is not inspect.Parameter.empty
        }
        self.given = {name: value for name, value in facts.items() if not name.startswith("_")}
        self._check_fields()
        self.facts = {
            **self.defaults,
            **{name: value for name, value in self.given.items() if name in self.defaults},
        }

    def process(self) -> tuple[Part, View]:
        """Configuration of the process, and the view of what its network answers."""
        flow = self.kind in FLOWS
        told = self.facts.get("prediction_type", "flow_prediction" if flow else "epsilon")
        if not isinstance(told, str) or told not in VIEWS_THERE:
            raise self._refused("prediction_type", told, ", ".join(VIEWS_THERE))
        view = VIEWS_THERE[told]
        if flow or self.facts.get("use_flow_sigmas"):
            if view == "v":
                allowed = "flow_prediction, epsilon or sample along straight paths"
                raise self._refused("prediction_type", told, allowed)
            self._build()
            return self._parse(kind="rectified_flow", num_steps=self.facts[STEPS]), view
        if view == "flow":
            raise self._refused("prediction_type", told, "another, or use_flow_sigmas true")
        squares = self._alphas_cumprod()
        if view == "eps" and float(squares[-1]) == 0.0:
            hint = "rescale_betas_zero_snr, or a beta of 1, leaves only noise at the last step"
            raise self._refused("prediction_type", told, "v_prediction or sample", hint)
        return self._known_schedule(squares) or self._parse(
            schedule="table", num_steps=len(squares), alphas_cumprod=squares.tolist()
        ), view

    def _check_fields(self) -> None:
        for name, value in self.given.items():
            if name in ONLY:
                if value != ONLY[name]:
                    raise self._refused(name, value, repr(ONLY[name]))
            elif name in NOISE:
                if name not in self.defaults and not self._says_nothing(name, value):
                    raise self._refused(name, value, f"none: {self.kind} does not read it")
            elif name not in STEPPING and value != self.defaults.get(name, inspect):
                raise self._refused(name, value, "fields that are known", "what it does is not")
        steps = self.given.get(STEPS, self.defaults.get(STEPS))
        if type(steps) is not int or not 2 <= steps <= MAX_STEPS:
            raise self._refused(STEPS, steps, f"a whole number of 2..{MAX_STEPS}")
        for name in ("beta_start", "beta_end", "snr_shift_scale"):
            value = self.given.get(name, self.defaults.get(name, 1.0))
            if type(value) not in (int, float) or not math.isfinite(value):
                raise self._refused(name, value, "a number")
        betas = self.given.get("trained_betas")
        if betas is not None and not _numbers(betas, steps):
            raise self._refused("trained_betas", betas, f"null, or {steps} numbers in (0, 1]")
        for name in ("rescale_betas_zero_snr", "use_flow_sigmas"):
            value = self.given.get(name, False)
            if type(value) is not bool:
                raise self._refused(name, value, "true or false")

    def _says_nothing(self, name: str, value: object) -> bool:
        """Whether a field of other classes, which this one does not read, agrees with it."""
        if self.kind in FLOWS:
            if name in ("prediction_type", "use_flow_sigmas"):
                return value in ("flow_prediction", True)
            return name.startswith("beta_") or value in (None, False)
        return value in (None, False, "epsilon")

    def _alphas_cumprod(self) -> Tensor:
        """f64 [T]: alpha^2 of every step, as the library has them."""
        found = getattr(self._build(), "alphas_cumprod", None)
        if not isinstance(found, Tensor) or found.shape != (self.facts[STEPS],):
            raise self._refused("_class_name", self.kind, f"a class with {STEPS} alphas_cumprod")
        squares = found.double().cpu()
        if not _noise_grows(squares):
            raise self._falling()
        return squares

    def _falling(self) -> ConfigError:
        """Names the field of the file without which the noise would grow, or all that together
        make it fall."""
        given = {name: self.given[name] for name in sorted(self.given.keys() & self.defaults)}
        made = [name for name in given if name in NOISE]
        alone = [name for name in made if self._grows_without(name, given)][:1]
        named = alone or made or ["_class_name"]
        values = [given.get(name, self.kind) for name in named]
        return self._refused(
            ", ".join(named),
            values[0] if len(values) == 1 else values,
            f"values with which the noise of {self.kind} grows at each step",
        )

    def _grows_without(self, name: str, given: Mapping[str, Any]) -> bool:
        try:
            made = self.type(**{key: value for key, value in given.items() if key != name})
        except Exception:
            return False
        return _noise_grows(made.alphas_cumprod.double().cpu())

    def _build(self) -> Any:
        """The scheduler as diffusers makes it; ConfigError names the field it does not take."""
        fields = {name: self.given[name] for name in self.given.keys() & self.defaults.keys()}
        try:
            return self.type(**fields)
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            for name in sorted(fields):
                rest = {key: value for key, value in fields.items() if key != name}
                if _builds(self.type, rest):
                    raise self._refused(
                        name, fields[name], f"what {self.kind} takes", reason
                    ) from None
            raise ConfigError(f"{self.path}: {self.kind} cannot be made: {reason}") from None

    def _known_schedule(self, squares: Tensor) -> Part | None:
        """The schedule of ours with the same alphas, free of float32; None where there is none."""
        names = {
            "linear": "linear",
            "scaled_linear": "scaled_linear",
            "squaredcos_cap_v2": "cosine",
        }
        schedule = names.get(self.facts.get("beta_schedule", ""))
        if schedule is None or float(squares[-1]) == 0.0:
            return None
        fields: dict[str, Any] = {"schedule": schedule, "num_steps": len(squares)}
        if schedule != "cosine":
            fields |= {name: self.facts.get(name) for name in ("beta_start", "beta_end")}
        try:
            known = DDPMConfig.from_dict(fields)
        except ConfigError:
            return None  # betas that fall: the alphas themselves will do
        own = (1.0 - known.build().betas()).cumprod(0)
        near = float((own - squares).abs().max()) <= AGREES
        return known if near and float((own.log() - squares.log()).abs().max()) <= 1e-3 else None

    def _parse(self, **fields: Any) -> Part:
        try:
            return PROCESSES.parse({"kind": "ddpm", **fields})
        except ConfigError as error:
            raise ConfigError(f"{self.path}: {error}") from None

    def _refused(self, field: str, value: object, allowed: str, hint: str = "") -> ConfigError:
        if isinstance(value, list) and len(value) > 4:
            value = f"{len(value)} values"
        return ConfigError(describe(f"{self.path}: {field}", value, allowed, hint))


def _noise_grows(squares: Tensor) -> bool:
    ends = torch.cat([squares.new_ones(1), squares])
    return bool((ends.diff() < 0).all()) and float(squares[-1]) >= 0.0


def _numbers(betas: Any, steps: int) -> bool:
    return (
        isinstance(betas, list)
        and len(betas) == steps
        and all(type(beta) in (int, float) and 0.0 < beta <= 1.0 for beta in betas)
    )


def _builds(kind: Any, fields: Mapping[str, Any]) -> bool:
    try:
        kind(**fields)
    except Exception:
        return False
    return True
