"""Guides end to end: a denoiser's own samples, a teacher, experts in turn, guided samples."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from coterie.cli.main import run as coterie
from coterie.core.batch import Batch
from coterie.core.config import override
from coterie.core.errors import ConfigError, DataError
from coterie.core.prediction import Condition
from coterie.core.rng import generator
from coterie.core.user_cache import cache_root
from coterie.data import build_source
from coterie.guides import Guide, height_map, pixel_classes
from coterie.guides.tasks import distilled, supervised
from coterie.recipes import ppap
from coterie.runs.build import build_model
from coterie.runs.config import RunConfig
from coterie.runs.cost import plan
from coterie.runs.judges.guide_scores import measured
from coterie.runs.measure.evaluation import measure
from coterie.runs.measure.report import report_run
from coterie.runs.origins.first_weights import find_origin
from coterie.runs.origins.guides import guide_run, reader_run
from coterie.runs.origins.trained_model import PretrainedConfig
from coterie.runs.sample.guides import followed, read_picture, with_guide
from coterie.runs.sample.sampling import generate
from coterie.runs.trained_run import LoadedRun, load_run
from coterie.runs.training import make_trainer, start
from coterie.solvers.network_guidance import GuidedConfig
from coterie.train.learning_rate import SCHEDULES, turn_at
from coterie.train.objectives import RecognitionConfig
from small_guides import DDPM, guide, pictures, reader

SHORT: dict[str, Any] = {
    "train.steps": 6,
    "train.batch": 16,
    "train.warmup": 0,
    "train.log_every": 2,
    "train.checkpoint_every": 4,
    "train.threads": 1,
}


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of generated samples; the classifiers that judge pictures are those of everyone."""
    there, own = cache_root() / "classifiers", tmp_path_factory.mktemp("cache")
    there.mkdir(parents=True, exist_ok=True)
    (own / "classifiers").symlink_to(there, target_is_directory=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COTERIE_CACHE", str(own))
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A denoiser and readers of all tasks, of a few steps."""
    root = tmp_path_factory.mktemp("runs")
    small = {"model.backbone.trunk.width": 16, "model.backbone.trunk.depth": 1, "sample.steps": 3}
    start(override(ppap.denoiser(), {**SHORT, **small}), root / "denoiser", progress=False)
    for task in ("classes", "map", "pixels"):
        config = override(reader_run(root / "denoiser", task), {**SHORT, "model.width": 8})  # type: ignore[arg-type]
        start(config, root / task, progress=False)
    return root


def guide_config(home: Path, task: str = "classes", **changes: Any) -> RunConfig:
    made = guide_run(home / "denoiser", home / task, experts=3, rank=2, samples=24)
    return override(made, {**SHORT, **{k.replace("__", "."): v for k, v in changes.items()}})


@pytest.fixture(scope="module")
def trained(home: Path) -> Path:
    return start(guide_config(home), home / "guide", progress=False)


def test_samples_of_a_run_are_a_source_without_labels_drawn_once(home: Path) -> None:
    config = guide_config(home).data
    source, held_out = config.build("train"), config.build("held_out")
    assert (len(source), len(held_out), source.shape) == (24, 8, (1, 8, 8))
    batch = source.get(np.arange(24))
    assert batch.cond.label is None and source.num_classes == 0
    assert float(batch.x.abs().max()) <= 1
    run = load_run(home / "denoiser")
    assert not torch.equal(batch.x[:8], held_out.get(np.arange(8)).x)
    assert torch.equal(config.build("train").get(np.arange(24)).x, batch.x)
    others = generate(run, 24, seed=5).x
    assert others.shape == batch.x.shape
    assert config.whole.kind == "digits"
    with pytest.raises(ConfigError, match=r"the run has been trained on since"):
        origin = config.origin.replace(digest="0" * 64)
        config.replace(origin=origin).build("train")
    with pytest.raises(ConfigError, match=r"data\.path: 'nowhere'"):
        config.replace(path="nowhere").build("train")


class NoLabels:
    """A source whose batches have a label that nobody may look at."""

    name, modality, shape = "blind", "image", (1, 8, 8)
    num_classes, class_names, licence = 0, (), "none"

    def __len__(self) -> int:
        return 32

    def get(self, indices: Any) -> Batch:
        return Batch(pictures(len(indices)), _Blind(), torch.from_numpy(np.asarray(indices)))


class _Blind(Condition):
    def __getattribute__(self, name: str) -> Any:
        if name == "label":
            raise AssertionError("a label was read")
        return super().__getattribute__(name)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {}


@pytest.mark.parametrize("task", ["classes", "map", "pixels"])
def test_what_learns_from_a_teacher_touches_no_label(home: Path, task: str) -> None:
    config = guide_config(home, task)
    trainer = make_trainer(config, None, NoLabels())  # type: ignore[arg-type]
    trainer.fit(progress=False)
    labelled = config.replace(objective=config.objective.replace(learn_from="data"))
    if task != "map":
        with pytest.raises(AssertionError, match="a label was read"):
            make_trainer(labelled, None, NoLabels()).fit(progress=False)  # type: ignore[arg-type]


@pytest.mark.parametrize("first", ["base", "previous"])
def test_experts_are_trained_in_turn_from_the_clean_end(home: Path, first: str) -> None:
    config = guide_config(home, objective__first=first)
    trainer = make_trainer(config)
    model = trainer.model
    assert isinstance(model, Guide)
    seen: list[list[bool]] = []
    before = [{n: v.clone() for n, v in model.expert(i).items()} for i in range(3)]
    starts: dict[int, Any] = {}

    def note(_: Any, record: dict[str, Any]) -> None:
        now = [{n: v.clone() for n, v in model.expert(i).items()} for i in range(3)]
        moved = [any(not torch.equal(now[i][n], before[i][n]) for n in now[i]) for i in range(3)]
        seen.append(moved)
        starts[len(seen)] = now
        before[:] = now

    trainer.fit(progress=False, callbacks=(note,))
    assert (
        seen == [[False, False, True]] * 2 + [[False, True, False]] * 2 + [[True, False, False]] * 2
    )
    down = next(name for name in before[0] if name.endswith(".down"))
    gap = [float((starts[3][1][down] - starts[2][i][down]).detach().abs().max()) for i in (1, 2)]
    wanted = gap[0] < gap[1] if first == "base" else gap[1] < gap[0]
    assert wanted, gap


def test_a_guide_that_was_stopped_goes_on_bit_for_bit(home: Path, tmp_path: Path) -> None:
    config = guide_config(home)
    whole = make_trainer(config)
    whole.fit(progress=False)
    from coterie.train.run_directory import RunDir

    class Stop(Exception):
        pass

    def stop(trainer: Any, record: dict[str, Any]) -> None:
        if trainer.state.step == 5:
            raise Stop

    trainer = make_trainer(config, RunDir(tmp_path / "run"))
    with pytest.raises(Stop):
        trainer.fit(progress=False, callbacks=(stop,))
    again = make_trainer(config, RunDir(tmp_path / "run"))
    assert again.fit(progress=False).step == 6
    for index in range(3):
        for name, value in whole.model.expert(index).items():
            assert torch.equal(again.model.expert(index)[name], value), name


def test_losses_are_those_of_the_reference() -> None:
    """KL of the sharpened teacher for classes and pixels, squared error for maps."""
    rng = generator(0, "losses")
    student, teacher = torch.randn(4, 3, generator=rng), torch.randn(4, 3, generator=rng)
    wanted = torch.nn.KLDivLoss(reduction="none")(
        student.log_softmax(1), (teacher / 0.25).softmax(1)
    ).sum(1)
    torch.testing.assert_close(distilled("classes", student, teacher, 0.25), wanted)
    pixels = (
        student[:, :, None, None].expand(4, 3, 2, 2),
        teacher[:, :, None, None].expand(4, 3, 2, 2),
    )
    torch.testing.assert_close(distilled("pixels", *pixels, 0.25), wanted)
    maps = student[:, None, None, :], teacher[:, None, None, :]
    torch.testing.assert_close(distilled("map", *maps, 0.25), (student - teacher).square().mean(1))
    x0, label = pictures(4).clamp(-1, 1), torch.tensor([0, 1, 2, 0])
    assert supervised("map", height_map(x0), x0, None).tolist() == [0.0] * 4
    seen = pixel_classes(x0, label)
    sure = torch.nn.functional.one_hot(seen, 4).permute(0, 3, 1, 2) * 100.0
    assert float(supervised("pixels", sure, x0, label).max()) < 1e-6
    assert seen.max() == 3 and set(seen[1].unique().tolist()) == {0, 2}


def test_a_run_of_a_guide_holds_experts_alone_and_loads(home: Path, trained: Path) -> None:
    loaded = load_run(trained).model
    assert isinstance(loaded, Guide) and loaded.names == ("range-0", "range-1", "range-2")
    from coterie.core.tensors import read_tensors
    from coterie.hub import load_pretrained

    stored = read_tensors(trained / "model" / "trunk.safetensors")
    assert stored and all(".adapters.parts.range-" in name for name in stored)
    assert any(name.endswith("running_var") for name in stored)
    again = load_pretrained(trained / "model")
    x, t = pictures(), torch.linspace(0, 1, 6)
    assert torch.equal(again(x, t).value, loaded(x, t).value)
    assert torch.equal(loaded.clean(x), load_run(home / "classes").model(x).value)
    planned = plan(guide_config(home), measure=False)
    assert planned["parameters_total"] == sum(p.numel() for p in loaded.parameters())


def test_another_reader_under_the_same_experts_is_refused(home: Path, tmp_path: Path) -> None:
    config = guide_config(home)
    assert config.model.network.origin is not None
    moved = config.model.network.replace(path=str(home / "pixels"))
    with pytest.raises(Exception, match="holds other weights than when this run was configured"):
        build_model(config.replace(model=config.model.replace(network=moved)))


def test_guided_samples_follow_their_seeds_labels_and_guide(home: Path, trained: Path) -> None:
    run = load_run(home / "denoiser")
    guided = with_guide(run, trained, 4.0)
    made = generate(guided, 6, labels=[0, 3])
    assert made.labels.tolist() == [0, 3] * 3
    some = generate(guided, 2, labels=[0, 3])
    torch.testing.assert_close(made.x[:2], some.x, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(made.x, generate(run, 6).x)
    assert torch.equal(generate(with_guide(run, trained, 0.0), 6).x, generate(run, 6).x)
    with pytest.raises(ConfigError, match=r"labels: 10 .*0\.\.9"):
        generate(guided, 2, labels=[10])
    with pytest.raises(ConfigError, match=r"scale"):
        with_guide(run, trained, float("nan"))


def test_a_guided_run_measures_its_guide(
    home: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coterie.runs.measure.report.SCORED", 24)
    monkeypatch.setattr("coterie.runs.measure.report.SHOWN", 10)
    denoiser = PretrainedConfig(path=str(home / "denoiser"))
    model = GuidedConfig(denoiser=denoiser, guide=PretrainedConfig(path=str(trained)), scale=2.0)
    base = load_run(home / "denoiser").config
    config = base.replace(model=model, train=base.train.replace(steps=0))
    run = load_run(start(config, tmp_path / "guided", progress=False))
    found = measure(run, num_samples=24)
    assert {"guide_loss", "gradient_cosine", "guide_accuracy", "label_accuracy"} <= set(found)
    assert {f"guide_loss_range_{index}" for index in range(3)} <= set(found)
    assert found["guide_parameters"] == sum(
        v.numel()
        for index in range(3)
        for n, v in run.model.guide.expert(index).items()
        if isinstance(v, torch.nn.Parameter)
    )
    assert 0 < found["guide_share"] < 1
    page = report_run(tmp_path / "guided", progress=False)
    text = page.read_text(encoding="utf-8")
    assert "gradient cosine, noise 0.05" in text and "guide" in text


def test_the_report_of_a_guide(home: Path, trained: Path) -> None:
    page = report_run(trained, progress=False)
    numbers = json.loads(page.with_name("report.json").read_text(encoding="utf-8"))
    assert "distillation loss, noise 0.05 (range 2)" in json.dumps(numbers)
    found = measure(load_run(trained))
    assert found["held_out_loss"] > 0 and found["experts_per_row"] == 1
    assert "accuracy" in measure(load_run(home / "classes"))


@pytest.mark.parametrize("task", ["map", "pixels"])
def test_maps_and_pixels_guide_the_same_denoiser(home: Path, task: str, tmp_path: Path) -> None:
    path = start(guide_config(home, task), home / f"guide-{task}", progress=False)
    run = load_run(home / "denoiser")
    guided = with_guide(run, path, 2.0)
    made, plain = generate(guided, 5), generate(run, 5)
    assert made.labels.tolist() == [-1] * 5 and not torch.allclose(made.x, plain.x)
    key = {"map": "target_error", "pixels": "target_accuracy"}[task]
    assert set(followed(guided, made.x)) == {key}
    real = build_source({"kind": "digits"}, "held_out").get(np.arange(1)).x[0, 0]
    picture = tmp_path / "digit.png"
    Image.fromarray(((real.numpy() + 1) * 127.5).astype(np.uint8)).save(picture)
    one = with_guide(run, path, 2.0, picture)
    again = generate(one, 5)
    assert not torch.allclose(again.x, made.x) and followed(one, again.x) == {}
    flat = measured(one.model.guide, run.config.data)
    assert len(flat.levels) == 10


def test_a_map_guide_moves_samples_towards_their_map() -> None:
    """With the exact map as network, one step of guidance lowers the distance."""
    made = guide(reader("map"), ranges=1)
    x, t = pictures(), torch.full((6,), 0.3)
    cond = Condition(channels=torch.zeros(6, 1, 8, 8))
    at = x.clone().requires_grad_(True)
    before = made.log_prob(at, t, cond)
    (gradient,) = torch.autograd.grad(before.sum(), at)
    assert bool((made.log_prob(x + 1e-4 * gradient, t, cond) > before).all())


def test_what_does_not_fit_is_refused(home: Path, trained: Path, tmp_path: Path) -> None:
    run = load_run(home / "denoiser")
    small = {"model.backbone.image_size": 12, "model.backbone.trunk.width": 16, "data.size": 12}
    config = override(ppap.denoiser(), {**SHORT, **small, "model.backbone.trunk.depth": 1})
    other = start(config, tmp_path / "other", progress=False)
    with pytest.raises(ConfigError, match=r"guide\.sample_shape: \(1, 8, 8\) .*\(1, 12, 12\)"):
        with_guide(load_run(other), trained)
    with pytest.raises(ConfigError, match=r"guide: 'Denoiser' .*a model with log_prob"):
        with_guide(run, home / "denoiser")
    with pytest.raises(ConfigError, match=r"target: .*this guide reads classes"):
        with_guide(run, trained, target=tmp_path / "x.png")
    with pytest.raises(DataError, match=r"no\.png: cannot be decoded"):
        (tmp_path / "no.png").write_text("no picture", encoding="utf-8")
        read_picture(tmp_path / "no.png", (1, 8, 8))
    with pytest.raises(ConfigError, match=r"model.*a model of kind reader or guide"):
        RecognitionConfig().build(run.model)
    with pytest.raises(ConfigError, match=r"objective\.times: None .*times for a guide"):
        RecognitionConfig().build(load_run(trained).model)
    with pytest.raises(ConfigError, match=r"network: 'reader' .*a trained model"):
        guide_config(home, model__network='{"kind": "reader"}')
    with pytest.raises(ConfigError, match=r"ranges: 3 .*1 with adapt none"):
        guide_config(home, model__adapt="none")
    with pytest.raises(ConfigError, match=r"DENOISER: .*a run of a denoiser of pictures"):
        reader_run(trained)
    label = torch.tensor([0, 11])
    with pytest.raises(DataError, match=r"cond\.label: 11"):
        supervised("classes", torch.zeros(2, 10), pictures(2), label)


def test_commands(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = [f"--{name}={value}" for name, value in SHORT.items() if name != "train.steps"]
    den, read, out = str(home / "denoiser"), str(tmp_path / "reader"), str(tmp_path / "guide")
    assert coterie(["guide", "reader", den, "--steps", "4", "-q", "--out", read, *short]) == 0
    plain = ["guide", "train", den, read, "--experts", "2", "--samples", "16", "--steps", "4"]
    assert coterie([*plain, "--out", out, "-n", "--json", *short]) == 0
    text = capsys.readouterr().out
    assert json.loads(text[text.index("{") :])["steps"] == 4 and not Path(out).exists()
    assert coterie([*plain, "--out", out, "-q", *short]) == 0
    assert f"coterie sample {den} --guide {out}" in capsys.readouterr().out
    sampled = ["sample", den, "--num", "4", "--labels", "3", "-q", "--out", str(tmp_path / "s")]
    assert coterie([*sampled, "--guide", out, "--scale", "4"]) == 0
    entries = json.loads((tmp_path / "s" / "samples.json").read_text(encoding="utf-8"))
    assert [entry["label"] for entry in entries] == [3] * 4
    assert (tmp_path / "s" / "grid.png").is_file()
    assert coterie([*sampled, "--scale", "4"]) == 2
    assert coterie([*sampled, "--guide", out, "--scale", "nan"]) == 2
    assert "scale" in capsys.readouterr().err
    assert coterie(["sample", out, "-q"]) == 2
    assert "coterie sample DENOISER --guide this run" in capsys.readouterr().err
    assert coterie(["guide", "train", den, "-q", "--out", out]) == 2


def test_a_schedule_starts_again_for_each_turn() -> None:
    factor = SCHEDULES.parse({"kind": "repeated", "times": 5}).build()
    values = [factor(step / 3000) for step in range(3000)]
    assert [values[600 * n] for n in range(5)] == pytest.approx([1.0] * 5)
    assert min(values) > 0 and values[599] == pytest.approx(1 / 600)
    assert [turn_at(step / 3000, 5) for step in (0, 599, 600, 1799, 1800, 2999)] == [
        0,
        0,
        1,
        2,
        3,
        4,
    ]
    assert turn_at(1.0, 5) == 4


def test_loaded_runs_keep_their_data(home: Path, trained: Path) -> None:
    guided = with_guide(load_run(home / "denoiser"), trained)
    assert isinstance(guided, LoadedRun) and guided.config.data.kind == "digits"
    assert replace(guided, step=1).config.model.guide.origin == find_origin(
        guided.config.model.guide._init
    )
    assert guided.model.process == DDPM
