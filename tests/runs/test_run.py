"""One run from configuration to samples: resumed, loaded, planned, refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from coterie.core.cost import count_parameters
from coterie.core.errors import CheckpointError, ConfigError
from coterie.runs.build import build_model, build_source
from coterie.runs.cost import plan
from coterie.runs.sample.sample_files import sample_run
from coterie.runs.sample.sampling import balanced_labels, generate, grid_image, to_pixels
from coterie.runs.trained_run import LoadedRun, load_run
from coterie.runs.training import start
from small_models import images, small, times
from small_runs import finished, short


@pytest.fixture(scope="module")
def image_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished("dit-moe", tmp_path_factory.mktemp("runs") / "image")


@pytest.fixture(scope="module")
def text_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished("deepseekmoe/text", tmp_path_factory.mktemp("runs") / "text")


def weights(run: LoadedRun) -> dict[str, torch.Tensor]:
    return run.model.state_dict()


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_initial_weights_depend_on_the_seed_alone() -> None:
    config = small("promoe")
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = build_model(config).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert_same(build_model(config).state_dict(), first)
    other = build_model(config.replace(seed=1)).state_dict()
    moved = [name for name in first if not torch.equal(first[name], other[name])]
    assert "backbone.patch_in.weight" in moved
    assert any(".routers." in name for name in moved), "routers start alike under every seed"
    assert any(".pool." in name for name in moved), "experts start alike under every seed"


def test_every_layer_starts_with_experts_and_routers_of_its_own() -> None:
    own = build_model(small("dit-moe")).state_dict()
    first = [name for name in own if ".blocks.0.ffn." in name]
    assert len(first) >= 4
    for name in first:
        assert not torch.equal(own[name], own[name.replace(".blocks.0.", ".blocks.1.")]), name


def test_starting_again_changes_nothing(image_run: Path) -> None:
    before = {path: path.read_bytes() for path in image_run.rglob("*") if path.is_file()}
    loaded = weights(load_run(image_run))
    assert start(load_run(image_run).config, image_run, progress=False) == image_run
    assert_same(weights(load_run(image_run)), loaded)
    for name in ("config.json", "metrics.jsonl", "model/model.safetensors"):
        path = image_run / name
        if path in before:
            assert path.read_bytes() == before[path], name


def test_an_interrupted_run_ends_as_if_it_had_not_been(image_run: Path, tmp_path: Path) -> None:
    from coterie.runs.training import make_trainer
    from coterie.train.run_directory import RunDir

    config = load_run(image_run).config

    class Stop(Exception):
        pass

    def stop_at_three(trainer: Any, record: dict) -> None:
        if trainer.state.step == 3:
            raise Stop

    with pytest.raises(Stop):
        make_trainer(config, RunDir(tmp_path)).fit(False, (stop_at_three,))
    assert load_run(tmp_path).step == 2
    start(config, tmp_path, progress=False)
    for which in ("ema", "model"):
        assert_same(weights(load_run(tmp_path, which)), weights(load_run(image_run, which)))


def test_a_loaded_run_is_the_trained_one(image_run: Path) -> None:
    run, plain = load_run(image_run), load_run(image_run, "model")
    assert run.step == 4 and run.path == image_run and not run.is_text
    assert run.config == short("dit-moe") and not run.model.training
    assert (run.source.name, len(run.source)) == ("digits", 1438)
    gap = [n for n, v in weights(run).items() if not torch.equal(v, weights(plain)[n])]
    assert gap, "averaged weights are the plain ones"
    batch, t = images(3), times(3)
    with torch.no_grad():
        again = load_run(image_run).model(batch.x, t, batch.cond).value
        assert torch.equal(run.model(batch.x, t, batch.cond).value, again)


def test_the_model_directory_holds_the_averaged_weights(image_run: Path) -> None:
    from coterie.hub import load_pretrained

    run = load_run(image_run)
    batch, t = images(3), times(3)
    with torch.no_grad():
        expected = run.model(batch.x, t, batch.cond).value
        found = load_pretrained(image_run / "model").eval()
        assert torch.equal(found(batch.x, t, batch.cond).value, expected)


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run: .*a run directory"):
        load_run(tmp_path)
    (tmp_path / "config.json").write_text(small("dit").to_json(), encoding="utf-8")
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        load_run(tmp_path)
    (tmp_path / "config.json").write_text('{"seed": -1}', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"seed: -1"):
        load_run(tmp_path)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("dit", {"data": {"kind": "digits", "pad": 1}}, r"model\.backbone: \(1, 8, 8\).*10, 10"),
        ("dit", {"model__backbone__image_size": 16}, r"model\.backbone: \(1, 16, 16\)"),
        ("dit", {"model__backbone__num_classes": 7}, r"num_classes: 7 .*allowed: 10;.*10 classes"),
        ("deepseekmoe/text", {"model__backbone__context": 32}, r"model\.backbone: \(32,\)"),
        ("deepseekmoe/text", {"model__backbone__vocabulary": 100}, r"vocabulary: 100 .*260"),
        ("dit", {"data": {"kind": "two-moons"}}, r"model\.backbone"),
    ],
)
def test_data_that_do_not_fit_the_model_are_refused(
    name: str, changes: dict, message: str, tmp_path: Path
) -> None:
    from coterie.data import SOURCES

    if changes.get("data") == {"kind": "two-moons"} and "two-moons" not in SOURCES.kinds():
        vector = next(kind for kind in SOURCES.kinds() if _is_vector(kind))
        changes = {"data": {"kind": vector}}
    with pytest.raises(ConfigError, match=message):
        start(short(name, **changes), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists(), "a refused run leaves nothing behind"


def _is_vector(kind: str) -> bool:
    from coterie.data import SOURCES

    return SOURCES.get(kind).info.modality == "vector"


def test_a_model_without_classes_takes_labelled_data() -> None:
    config = short("dit", model__backbone__num_classes=0)
    assert build_source(config).num_classes == 10


def test_a_plan_counts_before_anything_is_done() -> None:
    config = short("dit-moe", train__batch=16)
    found = plan(config, measure=False)
    counted = count_parameters(build_model(config))
    assert found["parameters_total"] == counted.total > found["parameters_active"]
    assert found["parameters_active"] == counted.active
    assert found["tokens_per_sample"] == 16
    assert (found["steps"], found["batch"]) == (4, 16)
    assert found["flops_per_step"] == 6 * counted.active * 16 * 16
    assert "projected_minutes" not in found
    measured = plan(short("dit", train__steps=100_000))
    assert 0.5 < measured["projected_minutes"] < 10_000


# Samples


def test_samples_are_files_that_follow_the_seed(image_run: Path, tmp_path: Path) -> None:
    run = load_run(image_run)
    folder = sample_run(run, num=5, seed=3, out=tmp_path / "a").parent
    entries = json.loads((folder / "samples.json").read_text(encoding="utf-8"))
    assert [entry["label"] for entry in entries] == [0, 1, 2, 3, 4]
    assert len({entry["seed"] for entry in entries}) == 5
    names = {path.name for path in folder.iterdir()}
    pictures = {f"{index:05d}.png" for index in range(5)}
    assert names == pictures | {"grid.png", "samples.json"}
    assert Image.open(folder / "00000.png").size == (8, 8)
    again = sample_run(load_run(image_run), num=5, seed=3, out=tmp_path / "b").parent
    for name in names:
        assert (again / name).read_bytes() == (folder / name).read_bytes(), name
    other = sample_run(run, num=5, seed=4, out=tmp_path / "c").parent
    assert (other / "00000.png").read_bytes() != (folder / "00000.png").read_bytes()


def test_a_sample_depends_on_its_seed_index_and_label_only(image_run: Path) -> None:
    run = load_run(image_run)
    whole = generate(run, 6, labels=[1, 2, 3], seed=9)
    assert whole.labels.tolist() == [1, 2, 3, 1, 2, 3] and whole.x.shape == (6, 1, 8, 8)
    part = generate(run, 2, labels=[1, 2, 3], seed=9)
    assert part.seeds == whole.seeds[:2]
    torch.testing.assert_close(part.x, whole.x[:2], rtol=1e-4, atol=1e-5)
    small_batches = LoadedRun(
        run.path,
        run.config.replace(sample=run.config.sample.replace(batch=2)),
        run.model,
        run.source,
        run.step,
    )
    counts: list[int] = []
    apart = generate(small_batches, 5, labels=[1, 2, 3], seed=9, progress=counts.append)
    torch.testing.assert_close(apart.x, whole.x[:5], rtol=1e-4, atol=1e-5)
    assert counts == [2, 2, 1]


def test_settings_of_sampling_are_used(image_run: Path) -> None:
    run = load_run(image_run)
    steps: list[int] = []
    generate(run, 2, steps=3, callback=lambda step, *rest: steps.append(step))
    assert steps == [0, 1, 2]
    plain, strong = (generate(run, 4, guidance=weight).x for weight in (1.0, 4.0))
    assert (plain - strong).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("num", "labels", "message"),
    [
        (2, [10], r"labels: 10 .*0\.\.9"),
        (2, [-2], r"labels: -2"),
        (2, [], r"labels: \[\]"),
        (0, None, r"num: 0 .*1 or more"),
    ],
)
def test_samples_that_cannot_be_drawn(
    image_run: Path, num: int, labels: list | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        generate(load_run(image_run), num, labels=labels)


def test_text_samples_are_lines_that_follow_the_seed(text_run: Path, tmp_path: Path) -> None:
    run = load_run(text_run)
    assert run.is_text
    folder = sample_run(run, num=3, out=tmp_path / "a").parent
    entries = json.loads((folder / "samples.json").read_text(encoding="utf-8"))
    assert len(entries) == 3 and all(entry["label"] == -1 for entry in entries)
    assert {path.name for path in folder.iterdir()} == {"samples.txt", "samples.json"}
    text = (folder / "samples.txt").read_bytes().decode()
    assert text == "\n\n".join(entry["text"] for entry in entries)
    again = sample_run(load_run(text_run), num=2, out=tmp_path / "b").parent
    found = json.loads((again / "samples.json").read_text(encoding="utf-8"))
    assert [entry.pop("draw")["num"] for entry in (*entries, *found)] == [3, 3, 3, 2, 2]
    assert found == entries[:2]
    with pytest.raises(ConfigError, match=r"labels: \[0\] .*no classes"):
        sample_run(run, num=2, labels=[0], out=tmp_path / "c")


def test_balanced_labels_take_classes_in_turn(image_run: Path, text_run: Path) -> None:
    assert balanced_labels(load_run(image_run), 12).tolist() == [*range(10), 0, 1]
    assert balanced_labels(load_run(text_run), 2).tolist() == [-1, -1]


def test_pixels_are_rounded_and_clamped() -> None:
    x = torch.tensor([-2.0, -1.0, 0.0, 1.0, 9.0]).reshape(1, 1, 1, 5)
    assert to_pixels(x).flatten().tolist() == [0, 0, 128, 255, 255]
    assert to_pixels(torch.zeros(2, 3, 4, 5)).shape == (2, 4, 5, 3)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_puts_pictures_row_by_row(channels: int) -> None:
    pixels = np.stack([np.full((4, 5, channels), 40 * i, np.uint8) for i in range(5)])
    sheet = np.asarray(grid_image(pixels, columns=3, scale=1, gap=2)).reshape(14, 23, channels)
    for index in range(5):
        row, column = divmod(index, 3)
        top, left = 2 + row * 6, 2 + column * 7
        assert (sheet[top : top + 4, left : left + 5] == 40 * index).all()
    assert (sheet[:2] == 255).all() and (sheet[8:12, 16:21] == 255).all()
