"""Networks of diffusers as experts: composed as by hand, fused, by command, and refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from coterie.backbones.taps import lockstep
from coterie.cli.main import run
from coterie.core.context import NULL_LABEL
from coterie.core.errors import CheckpointError, ConfigError, DataError
from coterie.core.prediction import Condition
from coterie.core.rng import SampleNoise
from coterie.ensembles import AggregateConfig, EnsembleModelConfig, MemberConfig, compose
from coterie.hub import load_member, load_pretrained, save_ensemble
from coterie.interop.diffusers import DiffusersConfig, DiffusersNetworkConfig
from coterie.process import PROCESSES
from coterie.runs.trained_run import load_run
from coterie.solvers import GRIDS, SOLVERS, sample

SMALL = {"sample_size": 8, "in_channels": 1, "out_channels": 1}
UNET = {**SMALL, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
PROCESS = PROCESSES.parse("ddpm").build()
T = torch.tensor([100.0, 600.0, 900.0]) / 999
LABELS = torch.tensor([0, 3, 2])


@pytest.fixture(autouse=True)
def library() -> None:
    pytest.importorskip("diffusers")


def network(kind: str, seed: int, **more: Any) -> Any:
    import diffusers

    torch.manual_seed(seed)
    if kind == "UNet2DModel":
        levels = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
        made = diffusers.UNet2DModel(**UNET, **levels, attention_head_dim=8, **more)
    elif kind == "UNet2DConditionModel":
        made = diffusers.UNet2DConditionModel(
            **UNET,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=4,
            cross_attention_dim=6,
        )
    else:
        made = diffusers.DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=4, in_channels=1, out_channels=2,
            num_layers=1, sample_size=8, patch_size=2, num_embeds_ada_norm=5,
        )  # fmt: skip
    with torch.no_grad():  # as if it were trained: zero-initialised layers answer too
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return made.eval()


KINDS = ("UNet2DModel", "UNet2DConditionModel", "DiTTransformer2DModel")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("diffusers")
    folder = tmp_path_factory.mktemp("networks")
    for kind in KINDS:
        for seed in (0, 1):
            network(kind, seed).save_pretrained(folder / f"{kind}-{seed}")
    return folder


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def expert(path: Path, **settings: Any) -> DiffusersConfig:
    return DiffusersConfig.from_dict(
        {"path": str(path), "process": "ddpm", "view": "eps"} | settings
    )


TOKENS = rand(3, 5, 6, seed=3)


def told(kind: str) -> dict[str, Any]:
    """What a network of this kind is asked about, as diffusers wants it."""
    if kind == "UNet2DConditionModel":
        return {"encoder_hidden_states": TOKENS}
    return {"class_labels": LABELS} if kind == "DiTTransformer2DModel" else {}


@pytest.mark.parametrize("kind", KINDS)
def test_a_product_of_two_is_the_sum_by_hand(saved: Path, kind: str) -> None:
    members = tuple(
        MemberConfig(name=str(seed), model=expert(saved / f"{kind}-{seed}")) for seed in (0, 1)
    )
    settings = {"kind": "composition", "betas": (1.0, 0.7)}
    made = EnsembleModelConfig(ensemble=settings, members=members).build()  # type: ignore[arg-type]
    x = rand(3, 1, 8, 8)
    cond = Condition(label=LABELS, tokens=TOKENS)
    found = made(x, T, cond)
    one, other = (
        network(kind, seed)(x, PROCESS.time_input(T), **told(kind), return_dict=False)[0][:, :1]
        for seed in (0, 1)
    )
    total = one + 0.7 * other
    torch.testing.assert_close(found.value, total, rtol=1e-4, atol=1e-5)
    alpha, sigma = PROCESS.alpha(T).double(), PROCESS.sigma(T).double()
    slopes = PROCESS.dalpha(T).double(), PROCESS.dsigma(T).double()
    drift = -slopes[0] * sigma / (slopes[0] * sigma - alpha * slopes[1])
    squares = [value.double().flatten(1).square().sum(1) for value in (total, one, other)]
    by_hand = squares[0] - squares[1] - 0.7 * squares[2] + 0.7 * 64 * drift
    assert found.weight_rate is not None
    torch.testing.assert_close(found.weight_rate, by_hand, rtol=1e-4, atol=1e-3)


def test_guidance_of_a_dit_is_its_average_with_itself_untold(saved: Path) -> None:
    dit = expert(saved / "DiTTransformer2DModel-0").build()
    made = compose([dit, dit], (-2.0, 3.0), mode="average", labels=("null", "given"))
    x = rand(3, 1, 8, 8)
    plain = network("DiTTransformer2DModel", 0)
    given, null = (
        plain(x, PROCESS.time_input(T), class_labels=labels, return_dict=False)[0][:, :1]
        for labels in (LABELS, torch.full((3,), 5))
    )
    found = made(x, T, Condition(label=LABELS)).value
    torch.testing.assert_close(found, -2.0 * null + 3.0 * given, rtol=1e-4, atol=1e-5)


def test_a_pipeline_says_its_process_and_its_prompt_may_lie_in_a_file(
    saved: Path, tmp_path: Path
) -> None:
    import diffusers

    unet = network("UNet2DModel", 0)
    scheduler = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    diffusers.DDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained(tmp_path / "pipeline")
    made = DiffusersConfig(path=str(tmp_path / "pipeline")).build()
    assert made.view == "eps" and made.process != PROCESS
    assert made.config.backbone.sample_shape == (1, 8, 8)
    save_file({"tokens": TOKENS[0]}, str(tmp_path / "prompt.safetensors"))
    path = saved / "UNet2DConditionModel-0"
    prompted = expert(path, tokens=str(tmp_path / "prompt.safetensors")).build()
    x = rand(3, 1, 8, 8)
    cond = Condition(tokens=TOKENS[:1].expand(3, -1, -1))
    torch.testing.assert_close(
        prompted(x, T, Condition()).value, expert(path).build()(x, T, cond).value
    )


def test_particles_of_two_networks_are_sampled(saved: Path) -> None:
    made = compose([expert(saved / f"UNet2DModel-{seed}").build() for seed in (0, 1)])
    noise = SampleNoise(range(4))
    solver = SOLVERS.parse({"kind": "feynman_kac", "particles": 2}).build()
    x = sample(
        made, made.initial((1, 8, 8), noise), Condition(),
        solver=solver, grid=GRIDS.parse("uniform"), steps=3, noise=noise,
    )  # fmt: skip
    assert x.shape == (4, 1, 8, 8) and bool(torch.isfinite(x).all())
    assert len(solver.record.steps) == 3  # type: ignore[attr-defined]


def test_from_the_command_line(saved: Path, tmp_path: Path) -> None:
    paths = [str(saved / f"UNet2DModel-{seed}") for seed in (0, 1)]
    out = str(tmp_path / "both")
    words = ["compose", *paths, "--process", "ddpm", "--data", "digits", "--particles", "2"]
    assert run([*words, "--out", out]) == 0
    assert run(["sample", out, "--num", "3", "--steps", "2", "-q"]) == 0
    assert len(json.loads((tmp_path / "both" / "samples" / "samples.json").read_text())) == 3
    network("UNet2DModel", 7).save_pretrained(paths[0])
    try:
        assert run(["sample", out, "--num", "2", "--steps", "2", "-q"]) == 2  # other weights now
    finally:
        network("UNet2DModel", 0).save_pretrained(paths[0])


def test_layer_by_layer_it_is_told_the_same(saved: Path, tmp_path: Path) -> None:
    """A prompt from a file, and our label of no condition, reach the layers too."""
    save_file({"tokens": TOKENS[0]}, str(tmp_path / "prompt.safetensors"))
    prompted = expert(
        saved / "UNet2DConditionModel-0", tokens=str(tmp_path / "prompt.safetensors")
    ).build()
    network("UNet2DModel", 0, num_class_embeds=5).save_pretrained(tmp_path / "classes")
    labelled = expert(tmp_path / "classes", null_label=4).build()
    x = rand(3, 1, 8, 8)
    for model, cond in (
        (prompted, Condition()),
        (labelled, Condition(label=torch.tensor([0, NULL_LABEL, 2]))),
    ):
        (answer,) = lockstep([model.layers(x, T, cond)], lambda taps: [t.feature for t in taps])
        assert torch.equal(answer.value, model(x, T, cond).value)


def aggregate(paths: list[Path], out: Path, *more: str) -> int:
    sizes = ["--width", "8", "--layers", "1", "--heads", "2", "--groups", "4", "-q"]
    short = ["--train.steps", "2", "--train.batch", "4", "--train.threads", "1"]
    return run(["aggregate", *map(str, paths), "--out", str(out), *sizes, *short, *more])


def test_networks_are_fused_from_the_command_line(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [saved / f"UNet2DModel-{seed}" for seed in (0, 1)]
    assert aggregate(paths, tmp_path / "none", "--process", "ddpm") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "name them (--data)" in line and not (tmp_path / "none").exists()
    out = tmp_path / "both"
    assert aggregate(paths, out, "--process", "ddpm", "--data", "digits") == 0
    assert run(["sample", str(out), "--num", "2", "--steps", "2", "-q"]) == 0
    made = load_run(out).model
    x, alone = rand(3, 1, 8, 8), [expert(path).build() for path in paths]
    found = made(x, T, Condition())
    assert [routing.name for routing in found.routings][-1] == "conv_out"
    assert not any(torch.equal(found.value, one(x, T, Condition()).value) for one in alone)
    for own, one in zip(made.networks, alone, strict=True):  # they stay as they are
        assert all(map(torch.equal, own.parameters(), one.parameters()))


def test_a_model_directory_needs_its_networks_no_more(saved: Path, tmp_path: Path) -> None:
    """Neither their folders nor the file of the prompt, whole or a member alone."""
    prompt = tmp_path / "prompt.safetensors"
    save_file({"tokens": TOKENS[0]}, str(prompt))
    built = {}
    for name in ("0", "1"):
        shutil.copytree(saved / f"UNet2DConditionModel-{name}", tmp_path / name)
        built[name] = expert(tmp_path / name, tokens=str(prompt)).build()
    settings = AggregateConfig.from_dict(
        {"aggregator": {"width": 8, "layers": 1, "heads": 2, "groups": 4}}
    )
    made = settings.build(built).eval()
    x = rand(3, 1, 8, 8)
    answer = made(x, T, Condition()).value
    alone = made.networks[1](x, T, Condition()).value
    save_ensemble(made, tmp_path / "model")
    for name in built:
        shutil.rmtree(tmp_path / name)
    prompt.unlink()
    assert torch.equal(load_pretrained(tmp_path / "model")(x, T, Condition()).value, answer)
    assert torch.equal(load_member(tmp_path / "model", "1")(x, T, Condition()).value, alone)


def test_a_network_of_no_known_class() -> None:
    config = DiffusersNetworkConfig(network={"_class_name": "DDIMScheduler"})
    with pytest.raises(ConfigError, match=r"_class_name.*'DDIMScheduler'.*a model of diffusers"):
        config.build()


def test_pipelines_are_fused_and_probed(saved: Path, tmp_path: Path) -> None:
    import diffusers

    for seed in (0, 1):
        unet, scheduler = network("UNet2DModel", seed), diffusers.DDPMScheduler()
        diffusers.DDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained(tmp_path / str(seed))
    paths = [tmp_path / "0", tmp_path / "1"]
    assert aggregate(paths, tmp_path / "both", "--data", "digits") == 0
    assert load_run(tmp_path / "both").model.process == PROCESS
    words = ["aggregate", *map(str, paths), "--data", "digits", "--headroom", "--samples", "8"]
    assert run(words) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"process": None}, "process: None .*no scheduler"),
        ({"view": None}, "view: None .*no scheduler"),
        ({"digest": "0" * 64}, "other weights than when it was named"),
        ({"path": "nowhere"}, r"nowhere.config.json: missing"),
    ],
)
def test_networks_that_cannot_be_read(saved: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, CheckpointError), match=message):
        expert(saved / "UNet2DModel-0").replace(**settings).build()


def test_what_a_network_must_be_told(saved: Path, tmp_path: Path) -> None:
    x = rand(3, 1, 8, 8)
    with pytest.raises(ConfigError, match=r"cond.tokens: None .*prompt"):
        expert(saved / "UNet2DConditionModel-0").build()(x, T, Condition())
    with pytest.raises(CheckpointError, match=r"tokens: 'gone' .*safetensors"):
        expert(saved / "UNet2DConditionModel-0", tokens="gone").build()
    with pytest.raises(DataError, match=r"x: .*\[B, 1, 8, 8\]"):
        expert(saved / "UNet2DModel-0").build()(rand(3, 1, 4, 4), T, Condition())
    dit = expert(saved / "DiTTransformer2DModel-0").build()
    null = torch.full((3,), NULL_LABEL)
    assert torch.equal(dit(x, T, Condition(label=null)).value, dit(x, T, Condition()).value)


def test_experts_of_other_shape_view_and_process(saved: Path) -> None:
    one = expert(saved / "UNet2DModel-0").build()
    other = expert(saved / "UNet2DModel-1", view="v").build()
    x = rand(3, 1, 8, 8)
    mixed = compose([one, other])(x, T, Condition())  # views are converted, not refused
    assert bool(torch.isfinite(mixed.value).all())
    flow = expert(saved / "UNet2DModel-1", process="rectified_flow", view="flow").build()
    with pytest.raises(ConfigError, match=r"process: .*the same process"):
        compose([one, flow])
    with pytest.raises(ConfigError, match=r"members.expert 1.num_classes"):
        compose([expert(saved / "DiTTransformer2DModel-0").build(), one])


@pytest.mark.parametrize("kind", [None, "DDIMScheduler"])
def test_D3_a_network_of_no_known_class_is_named_with_its_file(kind: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": kind}))
    (tmp_path / "diffusion_pytorch_model.safetensors").touch()
    config = DiffusersConfig.from_dict({"path": str(tmp_path), "process": "ddpm", "view": "eps"})
    where = re.escape(str(tmp_path / "config.json"))
    with pytest.raises(ConfigError, match=rf"^{where}: _class_name: .*a model of diffusers$"):
        config.build()
