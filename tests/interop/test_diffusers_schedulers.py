"""Schedulers of diffusers: read exactly, or refused by class and field."""

from __future__ import annotations

import inspect
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from coterie.core.errors import ConfigError, CoterieError
from coterie.core.prediction import Condition
from coterie.interop.diffusers import DiffusersDenoiser, load_noise_ranges
from coterie.interop.diffusers.conventions import grid_time
from coterie.interop.diffusers.schedulers import FLOWS, MAX_STEPS, ON_A_GRID, scheduler_process
from coterie.process import PROCESSES, convert
from coterie.solvers import SOLVERS, integrate

STEPS = 60  # enough for every class, and soon summed


@pytest.fixture(autouse=True)
def library() -> None:
    pytest.importorskip("diffusers")
    warnings.simplefilter("ignore")


def read(folder: Path, kind: Any, index: dict[str, Any] | None = None, **fields: Any) -> Any:
    """(process, view) of a scheduler's file with these fields."""
    place = folder / "scheduler"
    place.mkdir(exist_ok=True)
    facts = {"_class_name": kind, **fields}
    (place / "scheduler_config.json").write_text(json.dumps(facts), "utf-8")
    part, view = scheduler_process(folder, index or {})
    return part.build(), view


def own(kind: str, **fields: Any) -> Any:
    import diffusers

    return getattr(diffusers, kind)(**fields)


def every_class() -> list[str]:
    import diffusers.schedulers as there
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

    found = [getattr(there, name) for name in dir(there) if name.endswith("Scheduler")]
    real = [kind for kind in found if isinstance(kind, type) and issubclass(kind, SchedulerMixin)]
    return sorted({kind.__name__ for kind in found if kind in real or hasattr(kind, "_backends")})


WORDS = {
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "exp", "laplace"),
    "prediction_type": ("epsilon", "sample", "v_prediction", "flow_prediction", "other"),
    "timestep_spacing": ("linspace", "leading", "trailing"),
    "timestep_type": ("discrete", "continuous"),
    "interpolation_type": ("linear", "log_linear"),
    "algorithm_type": ("dpmsolver", "dpmsolver++", "sde-dpmsolver++", "deis"),
    "time_shift_type": ("exponential", "linear"),
    "final_sigmas_type": ("zero", "sigma_min"),
    "variance_type": ("fixed_small", "learned_range", None),
    "shift_terminal": (0.1,),
    "sigma_min": (0.01,),
    "sigma_max": (30.0,),
    "solver_p": (None,),
}


def others(name: str, default: Any) -> list[Any]:
    """Other values of an option."""
    if name == "trained_betas":
        return [torch.linspace(1e-3, 0.3, STEPS).tolist(), [0.1, 0.2]]
    if name in WORDS:
        return [value for value in WORDS[name] if value != default]
    if isinstance(default, bool):
        return [not default]
    if isinstance(default, int):
        return [default + 3]
    if isinstance(default, float) and abs(default) < float("inf"):
        return [default * 1.5 if default else 0.5]
    return [[0.25, 0.5], 3]  # a list, a string or null: something else


def variants(kind: str) -> list[dict[str, Any]]:
    """The defaults of a class, and each of its options varied alone."""
    import diffusers.schedulers as there

    known = inspect.signature(getattr(there, kind).__init__).parameters
    options = {name: p.default for name, p in known.items() if p.kind is p.POSITIONAL_OR_KEYWORD}
    options.pop("self", None)
    few = {"num_train_timesteps": STEPS} if "num_train_timesteps" in options else {}
    out = [{}, few]
    for name, default in options.items():
        out += [{**few, name: value} for value in others(name, default)]
    if "rescale_betas_zero_snr" in options:
        zero = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
        out.append({**few, **zero})
    if "use_flow_sigmas" in options:
        straight = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
        out += [{**few, **straight}, {**few, **straight, "flow_shift": 3.0}]
    return out


def check_grid(process: Any, scheduler: Any, kind: str) -> None:
    """Our alpha^2 and sigma^2 are those of the scheduler at each of its steps."""
    squares = scheduler.alphas_cumprod.double()
    t = process.time_of_index(torch.arange(process.num_steps), torch.float64)
    assert len(t) == len(squares), kind
    torch.testing.assert_close(process.alpha(t), squares.sqrt(), rtol=0, atol=1e-6)
    torch.testing.assert_close(process.sigma(t).square(), 1 - squares, rtol=0, atol=1e-6)
    assert grid_time(process, t).tolist() == list(range(process.num_steps)), kind


def check_flow(process: Any, scheduler: Any, kind: str) -> None:
    """At each noise level the network is told what the scheduler's own timestep is."""
    more = {"mu": 0.7} if getattr(scheduler.config, "use_dynamic_shifting", False) else {}
    scheduler.set_timesteps(5, **more)
    sigmas = scheduler.sigmas[: len(scheduler.timesteps)].double()
    torch.testing.assert_close(process.sigma(sigmas), sigmas, rtol=0, atol=1e-6)
    torch.testing.assert_close(process.alpha(sigmas), 1 - sigmas, rtol=0, atol=1e-6)
    whole = not scheduler.timesteps.is_floating_point()  # cut to whole steps
    told = grid_time(process, sigmas).double()
    expected = scheduler.timesteps.double()
    torch.testing.assert_close(told, expected, rtol=1e-5, atol=1.0 if whole else 1e-3)


def test_A1_every_scheduler_class_of_diffusers_is_read_exactly_or_refused(tmp_path: Path) -> None:
    exact: dict[str, int] = {}
    for kind in every_class():
        for fields in variants(kind):
            try:
                process, view = read(tmp_path, kind, **fields)
            except CoterieError as error:
                told = [kind, *fields]
                assert any(name in str(error) for name in told), (kind, fields, error)
                assert "\n" not in str(error)
                continue
            scheduler = own(kind, **fields)
            (check_flow if view == "flow" or process.t_min > 0 else check_grid)(
                process, scheduler, f"{kind} {fields}"
            )
            exact[kind] = exact.get(kind, 0) + 1
    import diffusers

    installed = {
        kind for kind in ON_A_GRID | FLOWS if not hasattr(getattr(diffusers, kind), "_backends")
    }
    assert exact.keys() == installed
    assert min(exact.values()) >= 2 and sum(exact.values()) > 300


def test_A1_classes_that_noise_another_way_are_refused_by_name(tmp_path: Path) -> None:
    refused = set(every_class()) - ON_A_GRID - FLOWS
    assert {"EDMEulerScheduler", "ScoreSdeVeScheduler", "IPNDMScheduler"} <= refused
    assert {"KarrasVeScheduler", "VQDiffusionScheduler", "DDPMWuerstchenScheduler"} <= refused
    for kind in [*sorted(refused), None, "NoScheduler", ["DDIMScheduler"], 7]:
        with pytest.raises(ConfigError, match=r"_class_name: .*not allowed") as found:
            read(tmp_path, kind)
        assert repr(kind) in str(found.value)


def test_A1_the_index_names_the_class_where_the_file_does_not(tmp_path: Path) -> None:
    index = {"scheduler": ["diffusers", "HeunDiscreteScheduler"]}
    process, _ = read(tmp_path, None, index)
    assert process.beta_start == 0.00085  # that class's default, not the usual one
    with pytest.raises(ConfigError, match=r"'DDIMScheduler'.*HeunDiscreteScheduler"):
        read(tmp_path, "DDIMScheduler", index)
    with pytest.raises(ConfigError, match=r"scheduler: 'mine'.*other code"):
        read(tmp_path, "DDIMScheduler", {"scheduler": ["mine", "DDIMScheduler"]})


@pytest.mark.parametrize(
    ("kind", "fields", "words"),
    [
        ("DDIMScheduler", {"num_train_timesteps": "1000"}, "num_train_timesteps: '1000'"),
        ("DDIMScheduler", {"num_train_timesteps": 1000.0}, "num_train_timesteps: 1000.0"),
        ("DDIMScheduler", {"num_train_timesteps": None}, "num_train_timesteps: None"),
        ("DDIMScheduler", {"num_train_timesteps": True}, "num_train_timesteps: True"),
        ("DDIMScheduler", {"num_train_timesteps": [1000]}, r"num_train_timesteps: \[1000\]"),
        ("FlowMatchEulerDiscreteScheduler", {"num_train_timesteps": 0}, "num_train_timesteps: 0"),
        ("FlowMatchEulerDiscreteScheduler", {"shift": "3"}, "shift: '3'"),
        ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}, "invert_sigmas: True"),
        ("DDIMScheduler", {"beta_start": "0.1"}, "beta_start: '0.1'"),
        ("DDIMScheduler", {"beta_end": float("nan")}, "beta_end: nan"),
        ("DDIMScheduler", {"trained_betas": [0.1, 0.2]}, r"trained_betas: \[0.1, 0.2\]"),
        ("DDIMScheduler", {"rescale_betas_zero_snr": "yes"}, "rescale_betas_zero_snr: 'yes'"),
        ("DDIMScheduler", {"rescale_betas_zero_snr": True}, "prediction_type: 'epsilon'.*noise"),
        ("PNDMScheduler", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr: True.*PNDM"),
        ("DDIMScheduler", {"snr_shift_scale": 3.0}, "snr_shift_scale: 3.0.*DDIM"),
        ("DDIMScheduler", {"prediction_type": ["epsilon"]}, r"prediction_type: \['epsilon'\]"),
        ("DDIMScheduler", {"new_noise": 0.3}, "new_noise: 0.3"),
        ("EulerDiscreteScheduler", {"timestep_type": "continuous"}, "timestep_type: 'continuous'"),
        ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "v_prediction"},
         "prediction_type: 'v_prediction'.*straight"),
        ("UniPCMultistepScheduler", {"prediction_type": "flow_prediction"}, "use_flow_sigmas"),
    ],
)  # fmt: skip
def test_A1_fields_that_are_not_understood_are_refused_by_value(
    tmp_path: Path, kind: str, fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        read(tmp_path, kind, **fields)


def test_A1_published_files_with_fields_of_other_classes_are_read(tmp_path: Path) -> None:
    """Stable Diffusion 1.5 and XL: their classes do not know all that their files say."""
    stable = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    left = {"clip_sample": False, "set_alpha_to_one": False, "skip_prk_steps": True}
    left |= {"steps_offset": 1, "trained_betas": None}
    known = PROCESSES.parse({"kind": "ddpm", "schedule": "scaled_linear"}).build()
    assert read(tmp_path, "PNDMScheduler", **stable, **left) == (known, "eps")
    left |= {"interpolation_type": "linear", "sample_max_value": 1.0, "use_karras_sigmas": False}
    assert read(tmp_path, "EulerDiscreteScheduler", **stable, **left) == (known, "eps")
    video = {**stable, "use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    assert read(tmp_path, "FlowMatchEulerDiscreteScheduler", **video)[1] == "flow"


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("view", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("DDIMScheduler", {}),
        ("DDIMScheduler", {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": STEPS}),
        ("DDPMScheduler", {"trained_betas": torch.linspace(1e-3, 0.02, 1000).tolist()}),
        ("CogVideoXDDIMScheduler", {"num_train_timesteps": STEPS}),
        ("DDPMScheduler", {"beta_schedule": "sigmoid"}),
    ],
)
def test_A1_answers_mean_what_the_scheduler_itself_makes_of_them(
    tmp_path: Path, kind: str, fields: dict[str, Any], view: str
) -> None:
    plain = {"clip_sample": False, "prediction_type": view, **fields}
    process, ours = read(tmp_path, kind, **plain)
    scheduler = own(kind, **plain)
    scheduler.set_timesteps(scheduler.config.num_train_timesteps)
    x, value = rand(1, 2, 4, 4).double(), rand(1, 2, 4, 4, seed=1).double()
    for step in (int(0.3 * process.num_steps), int(0.8 * process.num_steps)):
        theirs = scheduler.step(value, step, x).pred_original_sample
        t = process.time_of_index(torch.tensor([step]), torch.float64)
        found = convert(process, value, ours, "x0", x, t)
        torch.testing.assert_close(found, theirs.double(), rtol=1e-4, atol=1e-5)


def test_A1_samples_of_zero_terminal_noise_are_those_of_the_pipeline(tmp_path: Path) -> None:
    import diffusers

    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16),
        layers_per_block=1, norm_num_groups=4, attention_head_dim=8,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    ).eval()  # fmt: skip
    scheduler = diffusers.DDIMScheduler(
        rescale_betas_zero_snr=True, prediction_type="v_prediction",
        timestep_spacing="trailing", clip_sample=False,
    )  # fmt: skip
    diffusers.DDIMPipeline(unet=unet, scheduler=scheduler).save_pretrained(tmp_path)
    made = load_noise_ranges(tmp_path)
    assert float(made.process.alpha(torch.tensor(1.0))) == 0.0
    scheduler.set_timesteps(10)
    x = expected = rand(1, 1, 8, 8)
    with torch.no_grad():
        for step in scheduler.timesteps:
            answer = unet(expected, step).sample
            expected = scheduler.step(answer, step, expected).prev_sample
        times = made.process.time_of_index(scheduler.timesteps, torch.float64)
        times = torch.cat([times, times.new_tensor([made.process.t_clean])])
        solver = SOLVERS.parse({"kind": "ancestral", "eta": 0.0}).build()
        found = integrate(made, x, Condition(), times, solver)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_A2_flows_of_another_number_of_steps_are_told_their_own_time() -> None:
    import diffusers

    torch.manual_seed(0)
    network = diffusers.SanaTransformer2DModel(
        in_channels=2, out_channels=2, num_attention_heads=1, attention_head_dim=8, num_layers=1,
        num_cross_attention_heads=1, cross_attention_head_dim=8, cross_attention_dim=8,
        caption_channels=4, sample_size=4,
    ).eval()  # fmt: skip
    flow = PROCESSES.parse({"kind": "rectified_flow", "num_steps": 500}).build()
    seen: list[Any] = []
    network.register_forward_pre_hook(
        lambda module, args, given: seen.append(given["timestep"].tolist()), with_kwargs=True
    )
    told = Condition(tokens=rand(2, 3, 4))
    DiffusersDenoiser(network, flow, "flow")(rand(2, 2, 4, 4), torch.tensor([0.5, 1.0]), told)
    assert seen == [[250.0, 500.0]]


@pytest.mark.parametrize("kind", ["DDPMScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_G10_a_number_of_steps_without_end_is_refused_before_it_is_made(
    tmp_path: Path, kind: str
) -> None:
    for steps in (10**9, MAX_STEPS + 1):
        said = rf"scheduler_config\.json: num_train_timesteps: {steps} is .*2\.\.100000"
        with pytest.raises(ConfigError, match=said):
            read(tmp_path, kind, num_train_timesteps=steps)
    assert read(tmp_path, kind, num_train_timesteps=2000)[0].num_steps == 2000


@pytest.mark.parametrize(
    ("kind", "fields", "named"),
    [
        (
            "EulerDiscreteScheduler",
            {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
            "rescale_betas_zero_snr: True",
        ),
        ("DDPMScheduler", {"beta_start": -0.1}, r"beta_start: -0\.1"),
        ("DDPMScheduler", {"num_train_timesteps": 50_000}, "num_train_timesteps: 50000"),
        ("DDPMScheduler", {"beta_end": -2.0}, r"beta_end: -2\.0"),
        (
            "DDPMScheduler",
            {"beta_start": -0.2, "beta_end": -0.1},
            r"beta_end, beta_start: \[-0\.1, -0\.2\]",
        ),
    ],
)
def test_G10_the_field_that_was_set_is_named(
    tmp_path: Path, kind: str, fields: dict[str, Any], named: str
) -> None:
    said = rf"scheduler_config\.json: {named} is not allowed; .*the noise of {kind} grows"
    with pytest.raises(ConfigError, match=said):
        read(tmp_path, kind, **fields)
