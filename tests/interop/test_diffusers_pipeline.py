"""Pipelines of diffusers with two denoisers: read as one ensemble, sampled as they sample."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from coterie.core.errors import CheckpointError, ConfigError
from coterie.core.prediction import Condition
from coterie.ensembles import LoadedMembers, NoiseRanges
from coterie.interop.diffusers import load_noise_ranges
from coterie.solvers import SOLVERS, integrate

STEPS = 6


@pytest.fixture(autouse=True)
def library() -> None:
    pytest.importorskip("diffusers")


def library_of() -> Any:
    import diffusers

    return diffusers


def video_network(seed: int, channels: int = 4) -> Any:
    torch.manual_seed(seed)
    return (
        library_of()
        .WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=channels,
            out_channels=channels,
            text_dim=8,
            freq_dim=16,
            ffn_dim=16,
            num_layers=1,
            rope_max_seq_len=32,
        )
        .eval()
    )


def video_pipeline(**changes: Any) -> Any:
    there = library_of()
    parts: dict[str, Any] = {"transformer": video_network(0), "transformer_2": video_network(1)}
    pipeline = there.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=there.FlowMatchEulerDiscreteScheduler(shift=3.0),
        **{**parts, "boundary_ratio": 0.7, **changes},
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    pytest.importorskip("diffusers")
    pipeline, folder = video_pipeline(), tmp_path_factory.mktemp("wan") / "pipeline"
    pipeline.save_pretrained(folder)
    return pipeline, folder


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


PROMPT, NEGATIVE, START = rand(1, 5, 8, seed=1), rand(1, 5, 8, seed=2), rand(1, 4, 2, 4, 4)


def theirs(pipeline: Any, scale: float, scale_2: float) -> Tensor:
    """What the pipeline itself makes of the same latents."""
    return pipeline(
        prompt_embeds=PROMPT,
        negative_prompt_embeds=NEGATIVE,
        height=32,
        width=32,
        num_frames=5,
        num_inference_steps=STEPS,
        guidance_scale=scale,
        guidance_scale_2=scale_2,
        latents=START.clone(),
        output_type="latent",
    ).frames


def ours(made: NoiseRanges, times: Tensor) -> Tensor:
    cond = Condition(tokens=PROMPT, null={"tokens": NEGATIVE[0]})
    with torch.no_grad():
        return integrate(made, START, cond, times, SOLVERS.parse("euler").build())


def test_samples_are_those_of_the_pipeline_itself(video: tuple[Any, Path]) -> None:
    pipeline, folder = video
    expected = theirs(pipeline, 4.0, 2.0)
    times = pipeline.scheduler.sigmas.double()
    assert float(times[2]) > 0.7 > float(times[3])  # both networks have steps
    made = load_noise_ranges(folder, guidance_scale=4.0, guidance_scale_2=2.0)
    torch.testing.assert_close(ours(made, times), expected, rtol=1e-4, atol=1e-5)
    assert made.members.names == ("transformer", "transformer_2") and made.view == "flow"
    same = load_noise_ranges(folder, guidance_scale=4.0)
    torch.testing.assert_close(ours(same, times), theirs(pipeline, 4.0, 4.0), rtol=1e-4, atol=1e-5)
    assert float((ours(same, times) - expected).abs().max()) > 1e-3


def test_one_network_is_in_memory_at_a_time(video: tuple[Any, Path]) -> None:
    pipeline, folder = video
    theirs(pipeline, 1.0, 1.0)
    times = pipeline.scheduler.sigmas.double()
    found = {}
    for prefetch in (False, True):
        made = load_noise_ranges(folder, prefetch=prefetch)
        members = made.members
        assert isinstance(members, LoadedMembers) and members.loads == 0
        found[prefetch] = ours(made, times)
        sizes = [file.stat().st_size for file in sorted(folder.glob("*/*.safetensors"))]
        assert members.peak_bytes == (sum(sizes) if prefetch else max(sizes))
        assert members.held == (1,) and members.loads == 2
    both = load_noise_ranges(folder, resident=2)
    assert torch.equal(found[False], found[True])
    assert torch.equal(found[False], ours(both, times))


def test_networks_that_predict_noise_on_a_grid_are_read_too(tmp_path: Path) -> None:
    there, networks = library_of(), []
    for seed, name in enumerate(("transformer", "transformer_2")):
        torch.manual_seed(seed)
        network = there.DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=4, in_channels=2, out_channels=4,
            num_layers=1, sample_size=8, patch_size=2, num_embeds_ada_norm=5,
        ).eval()  # fmt: skip
        network.save_pretrained(tmp_path / name)
        networks.append(network)
    there.DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012
    ).save_pretrained(tmp_path / "scheduler")
    names = {
        name: ["diffusers", "DiTTransformer2DModel"] for name in ("transformer", "transformer_2")
    }
    index = {"_class_name": "Two", "boundary_ratio": 0.5, **names}
    (tmp_path / "model_index.json").write_text(json.dumps(index), "utf-8")
    made = load_noise_ranges(tmp_path)
    steps = torch.tensor([999, 500, 499, 0])
    t = made.process.time_of_index(steps)
    x, label = rand(4, 2, 8, 8), torch.tensor([0, 1, 2, 3])
    with torch.no_grad():
        answer = made(x, t, Condition(label=label))
        direct = [
            net(x, timestep=steps, class_labels=label, return_dict=False)[0] for net in networks
        ]
    assert answer.routings[0].ids[:, 0].tolist() == [0, 0, 1, 1]
    assert answer.view == "eps" and made.process.discrete
    expected = torch.cat([direct[0][:2], direct[1][2:]])
    torch.testing.assert_close(answer.value, expected[:, :2], rtol=1e-4, atol=1e-5)
    assert answer.variance is not None
    torch.testing.assert_close(answer.variance, expected[:, 2:], rtol=1e-4, atol=1e-5)


def change(folder: Path, out: Path, file: str, **fields: Any) -> Path:
    """A copy of the pipeline with another value in one of its JSON files."""
    shutil.copytree(folder, out)
    path = out / file
    data = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({**data, **fields}), "utf-8")
    return out


@pytest.mark.parametrize(
    ("file", "fields", "words"),
    [
        ("model_index.json", {"boundary_ratio": None}, r"boundary_ratio: None"),
        ("model_index.json", {"expand_timesteps": True}, r"expand_timesteps: True"),
        ("model_index.json", {"transformer_2": [None, None]}, r"boundary_ratio: 0\.7"),
        ("model_index.json", {"transformer": ["mine", "Net"]}, r"transformer: 'mine'.*diffusers"),
        ("transformer_2/config.json", {"in_channels": 9}, r"transformer_2\.in_channels: 9.*has 4"),
        (
            "scheduler/scheduler_config.json",
            {"_class_name": "DDIMScheduler", "prediction_type": "velocity"},
            r"prediction_type: 'velocity'",
        ),
        (
            "scheduler/scheduler_config.json",
            {"_class_name": "DDIMScheduler", "beta_schedule": "sigmoid"},
            r"beta_schedule: 'sigmoid'",
        ),
    ],
)
def test_pipelines_of_another_make_are_refused_by_name(
    video: tuple[Any, Path], tmp_path: Path, file: str, fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        load_noise_ranges(change(video[1], tmp_path / "other", file, **fields))


def test_missing_and_foreign_files_are_named(video: tuple[Any, Path], tmp_path: Path) -> None:
    folder = video[1]
    with pytest.raises(CheckpointError, match=r"model_index\.json: missing"):
        load_noise_ranges(tmp_path)
    hollow = shutil.copytree(folder, tmp_path / "hollow")
    for file in (hollow / "transformer_2").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(CheckpointError, match=r"transformer_2/.*safetensors: missing"):
        load_noise_ranges(hollow)
    other = change(
        folder, tmp_path / "kind", "model_index.json", transformer=["diffusers", "DDIMScheduler"]
    )
    with pytest.raises(ConfigError, match=r"'DDIMScheduler'.*a model of diffusers"):
        load_noise_ranges(other)
    broken = shutil.copytree(folder, tmp_path / "broken")
    next((broken / "transformer").glob("*.safetensors")).write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"transformer/.*not a valid safetensors"):
        ours(load_noise_ranges(broken), torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64))


def test_one_network_alone_is_an_ensemble_of_one(tmp_path: Path) -> None:
    pipeline = video_pipeline(transformer_2=None, boundary_ratio=None)
    pipeline.save_pretrained(tmp_path / "one")
    made = load_noise_ranges(tmp_path / "one", guidance_scale=3.0)
    expected = theirs(pipeline, 3.0, None)  # type: ignore[arg-type]
    times = pipeline.scheduler.sigmas.double()
    torch.testing.assert_close(ours(made, times), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match="guidance_scale_2"):
        load_noise_ranges(tmp_path / "one", guidance_scale=3.0, guidance_scale_2=2.0)
