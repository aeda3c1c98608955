"""What a command line gets wrong is one line that names the flag; files of others stay alone."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from coterie.cli.main import run
from coterie.core.errors import ConfigError, DataError
from coterie.ensembles.product import CompositionConfig
from coterie.process import PROCESSES, ContrastConfig
from coterie.process.contrast import MOST
from coterie.process.ranges import RangesConfig
from coterie.runs.config import RunConfig
from coterie.train.run_directory import RunDir


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The line with which a command is refused: the only one."""

    def ask(*argv: object) -> str:
        capsys.readouterr()
        assert run([str(word) for word in argv]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: ")
        return lines[0]

    return ask


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["sample", "r", "--labels"], "'--labels' requires an argument"),
        (["sample", "r", "--num", "1e30"], "'1e30' is not a valid integer"),
        (["sample", "r", "--nom", "3"], "--nom"),
        (["train", "dit", "--out", ""], "--out"),
        (["sample"], "Missing argument 'RUN'"),
    ],
)
def test_D_words_of_click_are_one_line(
    argv: list[str], said: str, refused: Callable[..., str]
) -> None:
    told = refused(*argv)
    assert said in told and told.endswith(f"; see coterie {argv[0]} --help")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--seed", "2", "--seeds", "4,5"), "--seed and --seeds"),
        (("--seed", "0", "--seeds", "4,5"), "--seed and --seeds"),
        (("--num", "3", "--seeds", "4,5"), "--num 3: --seeds names 2 samples"),
        (("--num", "64", "--seeds", "4,5"), "--num 64: --seeds names 2 samples"),
    ],
)
def test_B_two_flags_that_contradict_each_other_are_refused(
    flags: tuple[str, ...], said: str, refused: Callable[..., str]
) -> None:
    assert said in refused("sample", "nowhere", *flags)


def test_B_a_number_that_agrees_with_the_seeds_passes(refused: Callable[..., str]) -> None:
    assert "nowhere" in refused("sample", "nowhere", "--num", "2", "--seeds", "4,5")


@pytest.mark.parametrize("beta", [1e30, -1e30])
def test_C6_betas_are_bounded_as_guidance_weights_are(beta: float) -> None:
    for name in ("betas", "noisy_betas"):
        with pytest.raises(ConfigError, match=rf"^{name}: .*numbers from -10000 to 10000"):
            CompositionConfig.from_dict({name: [abs(beta), beta]})
    assert CompositionConfig(mode="anneal", betas=(MOST,)).betas == (MOST,)


def test_C6_advice_on_a_composition_names_its_betas() -> None:
    import torch
    from torch import nn

    from coterie.runs.sample.nonfinite import explained

    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x / 0.0

    def told(model: nn.Module) -> str:
        return str(explained(DataError("x"), lambda _: model(torch.ones(1)), model))

    composed = Model()
    composed.betas = (1e4,)  # type: ignore[assignment]
    assert told(composed).endswith("look at the weights and at the betas of the composition")
    assert told(Model()).endswith("look at the weights and at the guidance weight")


@pytest.mark.parametrize("weight", [1e30, math.nan, -math.inf])
def test_C6_a_weight_of_guidance_is_called_guidance(weight: float) -> None:
    with pytest.raises(
        ConfigError, match=r"^guidance: .* is not allowed; allowed: -10000\.\.10000"
    ):
        ContrastConfig().weighed(weight)
    assert ContrastConfig().weighed(3.0).weight == 3.0 and ContrastConfig().weighed(None).plain


@pytest.mark.parametrize(
    ("unit", "level", "allowed"),
    [
        ("t", -1.0, r"times above [\d.e-]+, up to 1"),
        ("sigma", -1.0, r"sigma above [\d.e-]+, up to [\d.einf+-]+"),
        ("log_snr", 1e6, r"log_snr from [\d.einf+-]+, below [\d.einf+-]+"),
    ],
)
def test_D_words_about_ranges_are_in_the_unit_given(unit: str, level: float, allowed: str) -> None:
    config = RangesConfig.from_dict({"boundaries": [level], "boundaries_in": unit})
    with pytest.raises(ConfigError, match=f"^boundaries: .* allowed: {allowed};"):
        config.times(PROCESSES.parse({"kind": "rectified_flow"}).build())


def test_D_words_about_a_run_name_its_file(tmp_path: Path, refused: Callable[..., str]) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"train": {"stepz": 3}}))
    with pytest.raises(ConfigError) as raised:
        RunDir(tmp_path).read_config(RunConfig)
    assert str(raised.value).startswith(f"{path}: ") and "train.stepz" in str(raised.value)
    assert f"{path}: " in refused("sample", tmp_path)


def test_F_a_folder_of_others_does_not_become_a_run(
    tmp_path: Path, refused: Callable[..., str]
) -> None:
    def look(folder: Path) -> None:
        RunDir(folder).check_free()

    for name in (".DS_Store", "._x", "Thumbs.db", ".nfs0001"):
        (tmp_path / name).write_text("x")
    look(tmp_path)
    look(tmp_path / "not there")
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"allowed: an empty folder, or .*; thesis\.txt was not"):
        look(tmp_path)
    assert "thesis.txt was not written" in refused("train", "dit", "--out", tmp_path, "-q")
    assert (tmp_path / "thesis.txt").read_text() == "x" and not (tmp_path / "lock").exists()
