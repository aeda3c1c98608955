"""Sample i of a draw alone, by its number and by its own seed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from coterie.cli.main import run as coterie
from coterie.core.config import override
from coterie.core.errors import ConfigError
from coterie.runs.sample.sampling import generate
from coterie.runs.trained_run import LoadedRun, load_run
from small_runs import finished


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> LoadedRun:
    folder = tmp_path_factory.mktemp("runs") / "digits"
    return load_run(finished("dit-moe", folder, sample__batch=4))


def test_B8_a_sample_by_its_number_is_the_same_to_the_bit(digits: LoadedRun) -> None:
    whole = generate(digits, 10, seed=5)
    for index in ([3], [9, 0], [4, 5, 6]):
        some = generate(digits, 10, seed=5, index=index)
        assert torch.equal(some.x, whole.x[index]) and some.places == tuple(index)
        assert some.seeds == [whole.seeds[place] for place in index]
        assert torch.equal(some.labels, whole.labels[index])
    other = generate(digits, 10, seed=6, index=[3])
    assert not torch.equal(other.x, whole.x[[3]])


def test_B8_a_sample_by_its_recorded_seed(digits: LoadedRun) -> None:
    whole = generate(digits, 4, seed=5)
    again = generate(digits, 1, whole.labels.tolist(), seeds=whole.seeds)
    assert torch.equal(again.x, whole.x) and again.seeds == whole.seeds  # the same batch
    for place, seed in enumerate(whole.seeds):
        alone = generate(digits, 1, [int(whole.labels[place])], seeds=[seed])
        torch.testing.assert_close(alone.x, whole.x[place : place + 1], rtol=0, atol=1e-5)
    one = digits.config.replace(sample=digits.config.sample.replace(batch=1))
    single = LoadedRun(digits.path, one, digits.model, digits.source, digits.step)
    each = generate(single, 3, seed=5)
    alone = generate(single, 1, [int(each.labels[2])], seeds=[each.seeds[2]])
    assert torch.equal(alone.x, each.x[2:])


def test_B8_the_files_say_what_is_needed(digits: LoadedRun, tmp_path: Path) -> None:
    words = ["sample", str(digits.path), "-q", "--seed", "5", "--num", "6", "--steps", "2"]
    assert coterie([*words, "--out", str(tmp_path / "all")]) == 0
    assert coterie([*words, "--index", "5,1", "--out", str(tmp_path / "some")]) == 0
    told = json.loads((tmp_path / "all" / "samples.json").read_text())
    some = json.loads((tmp_path / "some" / "samples.json").read_text())
    keys = ("index", "label", "seed", "draw")
    assert [[one[key] for key in keys] for one in some] == [
        [told[place][key] for key in keys] for place in (5, 1)
    ]
    draw = {"seed": 5, "num": 6, "batch": 4, "steps": 2, "guidance": None}
    assert told[0]["draw"] == {**draw, "threads": told[0]["draw"]["threads"]}
    assert told[0]["draw"]["threads"] >= 1
    for one, place in zip(some, (5, 1), strict=True):
        new, old = (tmp_path / "some" / one["file"]), tmp_path / "all" / told[place]["file"]
        assert new.read_bytes() == old.read_bytes()
    seed = str(told[1]["seed"])
    label = str(told[1]["label"])
    by_seed = ["sample", str(digits.path), "-q", "--steps", "2", "--seeds", seed, "--labels", label]
    assert coterie([*by_seed, "--out", str(tmp_path / "own")]) == 0
    assert json.loads((tmp_path / "own" / "samples.json").read_text())[0]["seed"] == int(seed)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"index": [10]}, r"index: .*0\.\.9"),
        ({"index": []}, "index"),
        ({"seeds": [-1]}, "seeds"),
        ({"seeds": []}, "seeds"),
        ({"seeds": [2**63]}, "seeds"),
    ],
)
def test_B8_places_and_seeds_that_are_none_are_refused(
    digits: LoadedRun, given: dict[str, list[int]], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        generate(digits, 10, **given)  # type: ignore[arg-type]


def test_B8_particles_come_in_whole_systems(digits: LoadedRun) -> None:
    solver = {"kind": "feynman_kac", "particles": 2}
    changed = override(digits.config, {"sample.solver": json.dumps(solver)})
    run = LoadedRun(digits.path, changed, digits.model, digits.source, digits.step)
    with pytest.raises(ConfigError, match="a multiple of 2"):
        generate(run, 1, seeds=[1, 2, 3])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--labels", "0-99999999999"], "more than 100,000"),
        (["--num", "1e30"], "--num"),
        (["--num", "1" + "0" * 30], "--num"),
        (["--steps", "1e15"], "--steps"),
        (["--steps", "1" + "0" * 15], "--steps"),
    ],
)
def test_H_words_of_a_draw_without_measure(
    digits: LoadedRun, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert coterie(["sample", str(digits.path), *words]) == 2
    assert message in capsys.readouterr().err


def test_B_a_guidance_weight_that_reaches_nothing_is_refused(tmp_path: Path) -> None:
    plain = load_run(finished("dit-moe", tmp_path / "a", model__backbone__num_classes=0))
    assert torch.equal(generate(plain, 2, guidance=1.0).x, generate(plain, 2).x)
    with pytest.raises(ConfigError, match=r"^guidance: 3\.0 .*allowed: none, or 1; .*no classes"):
        generate(plain, 2, guidance=3.0)
    text = load_run(finished("text:dense", tmp_path / "b"))
    with pytest.raises(ConfigError, match=r"^guidance: 2\.0 is not allowed"):
        generate(text, 1, guidance=2.0)
