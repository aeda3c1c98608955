"""The worked example of CONTRIBUTING.md works: the score, its test, the arm and the claim."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from repository_tools import tool

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
CHECK = """
import math, sys
sys.path[:0] = [{tests!r}, "."]
import sphere  # as experts/routers/__init__.py would
import test_sphere_score as tests
import sphere_arm as recipe

for name, check in sorted(vars(tests).items()):
    if name.startswith("test_"):
        check()
        print(name)

from coterie.recipes.dit_moe import arms
from coterie.recipes.verify import judge
from coterie.runs.measure.evaluation import held_out
from coterie.runs.trained_run import load_run
from coterie.runs.training import start

claim, configs = recipe.CLAIM, {{**arms(), "sphere": recipe.sphere()}}
pictures = {{"kind": "image-folder", "path": "pictures", "size": 28, "channels": 1}}
measured = {{}}
for arm in (claim.ours, claim.baseline):
    config = configs[arm]
    few = config.train.replace(steps=2, batch=4)
    run = load_run(start(config.replace(data=pictures, train=few), arm, progress=False))
    measured[arm] = [{{claim.metric: float(held_out(run).loss)}}]
verdict = judge(claim, measured)
assert math.isfinite(verdict["ours"]) and verdict["ours"] != verdict["baseline"], verdict
print("score", run.config.model.backbone.trunk.slots[0].expert.router.score.kind)
print("judged", verdict["metric"])
"""


def files() -> dict[str, str]:
    """Name -> text of each block that begins with a comment of its file's name."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    named = {found[1]: block for block in blocks if (found := re.match(r"# (\w+\.py)\n", block))}
    assert len(named) == len(blocks)  # none is left out
    return named


@pytest.mark.slow
def test_the_worked_example_from_card_to_claim(tmp_path) -> None:
    for name, text in files().items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    tool("try_wheel").draw_pictures(tmp_path / "pictures")
    code = CHECK.format(tests=str(ROOT / "tests" / "experts"))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    written = re.findall(r"^def (test_\w+)", files()["test_sphere_score.py"], re.MULTILINE)
    assert lines[: len(written)] == sorted(written) and len(written) == 4
    assert lines[len(written) :] == ["score linear", "judged held_out_loss"]


def test_what_the_page_names_exists() -> None:
    for name in set(re.findall(r"`(tests/[\w/]+\.py)`", PAGE)) - {
        "tests/experts/test_sphere_score.py"
    }:
        assert (ROOT / name).is_file(), name
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for target in re.findall(r"^make (\w+)", PAGE, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for folder in re.findall(r"\| `((?:experts|data|solvers|recipes|cli)/[\w/]*)", PAGE):
        assert (ROOT / "src" / "coterie" / folder).is_dir(), folder
