"""The wheel is whole, and runs where only the core dependencies are installed."""

from __future__ import annotations

import re
import tomllib
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

from repository_tools import tool

ROOT = Path(__file__).resolve().parents[1]
try_wheel = tool("try_wheel")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
OPTIONAL = ("sklearn", "transformers", "diffusers", "datasets", "huggingface_hub", "hypothesis")


@pytest.fixture(scope="module")
def tried(tmp_path_factory):
    """Folder, wheel and the paths of a Python without optional libraries; listing, showing,
    training, sampling and reporting went well in it."""
    folder = tmp_path_factory.mktemp("wheel")
    _, wheel, paths = try_wheel.try_wheel(folder)
    return folder, wheel, paths


def python(code: str, tried) -> str:
    folder, _, paths = tried
    start = f"import sys; sys.path[:0] = {[str(path) for path in paths]!r}\n{code}"
    return try_wheel._run([*try_wheel.ISOLATED, "-c", start], folder)


@pytest.mark.slow
def test_a_run_is_trained_and_reported_by_the_wheel_alone(tried) -> None:
    folder, _, _ = tried
    assert (folder / "run" / "samples" / "grid.png").is_file()
    assert (folder / "run" / "report" / "index.html").is_file()


def test_the_trial_sees_no_optional_library(tried) -> None:
    code = f"""
from importlib.util import find_spec
print([name for name in {OPTIONAL!r} if find_spec(name)], find_spec("coterie").origin)
"""
    seen = python(code, tried)
    assert seen.startswith("[] ") and str(tried[0]) in seen


def test_data_of_an_optional_library_are_refused_with_its_extra_before_work(tried) -> None:
    with pytest.raises(RuntimeError, match=r"scikit-learn.*pip install 'coterie\[data\]'"):
        words = ["train", "dit-moe", "--out", "other", "-q", "--data.kind=digits"]
        try_wheel.coterie([words], tried[2], tried[0])
    assert not (tried[0] / "other" / "checkpoints").exists()


def test_the_wheel_says_what_it_is(tried) -> None:
    with zipfile.ZipFile(tried[1]) as packed:
        (name,) = [one for one in packed.namelist() if one.endswith(".dist-info/METADATA")]
        told = message_from_string(packed.read(name).decode())
        names = packed.namelist()
    assert told["License-Expression"] == "Apache-2.0" and told["Author"] == "The coterie authors"
    assert told["Version"] == PROJECT["version"] and "Typing :: Typed" in told.get_all("Classifier")
    assert "coterie/py.typed" in names and not [one for one in names if one.startswith("tests")]
    assert any(one.endswith("licenses/LICENSE") for one in names)


def test_files_that_a_wheel_lacks_are_found(tried, tmp_path) -> None:
    less = tmp_path / "less.whl"
    with zipfile.ZipFile(tried[1]) as packed, zipfile.ZipFile(less, "w") as out:
        for name in packed.namelist():
            if not name.endswith((".h", "py.typed")):
                out.writestr(name, packed.read(name))
    lost = try_wheel.missing_from(less)
    assert "coterie/py.typed" in lost and {Path(name).suffix for name in lost} == {".h", ".typed"}


def test_every_extra_that_a_message_names_exists() -> None:
    texts = [path.read_text("utf-8") for path in (ROOT / "src").rglob("*.py")]
    named = {name for text in texts for name in re.findall(r"coterie\[([\w,-]+)\]", text)}
    assert named and named <= set(PROJECT["optional-dependencies"])
