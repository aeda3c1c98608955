"""Every script and notebook of ``examples/`` runs, with a few steps and samples."""

from __future__ import annotations

import ast
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from coterie.data import SOURCES
from coterie.experts import SCORES
from small_runs import finished

EXAMPLES = Path(__file__).parents[1] / "examples"
TINY = {
    "adapter_on_a_frozen_run": "--steps 4",
    "cache_exactly": "--num 2 --steps 3 --repeats 1",
    "compare_solvers_and_guidance": "--num 16",
    "expert_layer_alone": "--steps 3",
    "expert_map": "--run runs/tiny --steps 2 --out map.png",
    "hugging_face_moe": "--tokens 16",
    "join_two_noise_ranges": "--steps 2",
    "multiply_two_denoisers": "--systems 2 --steps 4",
    "own_data_source": "--steps 2",
    "own_router_score": "--steps 2",
    "train_a_small_mixture": "--steps 2 --num 2",
    "upcycle_a_dense_run": "--steps 4",
    "who_serves_which_class": "--steps 2",
}
"""Script -> its arguments here."""
NEEDS = {"hugging_face_moe": "transformers"}
LONGEST = 60
"""Lines of a script, without blank ones and what it says at the top."""
PARAMETERS = {"STEPS": 2, "OUT": "out"}
"""What takes the place of the values of a notebook's cell with the tag ``parameters``."""


@pytest.fixture(autouse=True)
def own_parts_are_forgotten(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Examples register parts and write into the folder they are run from."""
    for registry in (SCORES, SOURCES):
        registry.kinds()
        monkeypatch.setattr(registry, "_parts", dict(registry._parts))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", sorted(TINY))
def test_script_runs(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    if TINY[name].startswith("run"):
        finished("dit-moe", Path("run"))
    script = EXAMPLES / f"{name}.py"
    monkeypatch.setattr(sys, "argv", [str(script), *TINY[name].split()])
    runpy.run_path(str(script), run_name="__main__")
    assert capsys.readouterr().out.strip()


def test_every_script_is_run_short_and_has_its_result() -> None:
    scripts = {path.stem: path.read_text(encoding="utf-8") for path in EXAMPLES.glob("*.py")}
    assert set(scripts) == set(TINY)
    results = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for name, text in scripts.items():
        said = ast.get_docstring(ast.parse(text), clean=False)
        assert said, f"{name} does not say what it is"
        lines = [line for line in text.replace(said, "", 1).splitlines() if line.strip()]
        assert 20 <= len(lines) <= LONGEST, f"{name}: {len(lines)} lines"
        assert f"python examples/{name}.py" in text, f"{name} does not say how it is run"
        assert f"{name}.py" in results, f"{name} has no result"


def code_cells(notebook: Path) -> list[dict[str, Any]]:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.parametrize("name", ["first_mixture", "several_denoisers"])
def test_notebook_runs(name: str) -> None:
    space: dict[str, Any] = {"__name__": "__main__"}
    for index, cell in enumerate(code_cells(EXAMPLES / f"{name}.ipynb")):
        exec(compile("".join(cell["source"]), f"{name}, cell {index}", "exec"), space)
        if "parameters" in cell["metadata"].get("tags", ()):
            assert set(PARAMETERS) <= set(space)
            space.update(PARAMETERS)
    assert Path(PARAMETERS["OUT"]).is_dir()


def test_every_notebook_is_run_and_small() -> None:
    notebooks = sorted(EXAMPLES.glob("*.ipynb"))
    assert [path.stem for path in notebooks] == ["first_mixture", "several_denoisers"]
    for path in notebooks:
        assert path.stat().st_size < 100_000, "outputs are to stay small"
