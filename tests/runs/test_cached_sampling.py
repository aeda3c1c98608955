"""Sampling folded or compiled: the same samples, from Python and from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch._inductor.utils import fresh_cache

from coterie.cli.main import run as coterie
from coterie.core.errors import ConfigError
from coterie.runs.sample.caches import cached, compiled
from coterie.runs.sample.sampling import generate
from coterie.runs.trained_run import LoadedRun, load_run
from coterie.solvers import SOLVERS
from small_runs import finished


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> LoadedRun:
    return load_run(finished("switch-dit", tmp_path_factory.mktemp("run") / "switch-dit"))


@pytest.mark.parametrize(("steps", "guidance"), [(None, 1.0), (3, 2.0)])
def test_a_cached_run_draws_the_same_samples(run: LoadedRun, steps: int, guidance: float) -> None:
    folded, saved = cached(run, steps)
    one, two = (generate(which, 4, steps=steps, guidance=guidance).x for which in (run, folded))
    torch.testing.assert_close(two, one, atol=1e-5, rtol=1e-5)
    assert 0 < saved.flops_with < saved.flops_without


def test_a_cache_of_other_steps_is_refused(run: LoadedRun) -> None:
    folded, _ = cached(run, 4)
    with pytest.raises(ConfigError, match="fold again with the times"):
        generate(folded, 1, steps=3)


def test_a_solver_with_its_own_times_is_refused(run: LoadedRun) -> None:
    settings = run.config.sample.replace(solver=SOLVERS.parse("rk45"))
    adaptive = LoadedRun(
        run.path, run.config.replace(sample=settings), run.model, run.source, run.step
    )
    with pytest.raises(ConfigError, match="one with a fixed number of calls"):
        cached(adaptive)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("deepseekmoe/text", "no noise level to fold by"),
    ],
)
def test_models_it_does_not_apply_to_are_refused_in_a_line(
    name: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = finished(name, tmp_path / "run")
    with pytest.raises(ConfigError, match=reason):
        cached(load_run(made))
    assert coterie(["sample", str(made), "--cached", "-q"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not (made / "samples").exists()


def test_the_command_says_what_was_saved(
    run: LoadedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def sample(*flags: str, out: str) -> str:
        argv = ["sample", str(run.path), "--num", "2", "-q", "--out", str(tmp_path / out), *flags]
        assert coterie(argv) == 0
        return capsys.readouterr().out

    assert "% fewer than without" in sample("--cached", out="a")
    saved = json.loads(sample("--cached", "--json", out="b"))["cache"]
    assert 0 < saved["flops_saved"] < 1
    assert "cache" not in json.loads(sample("--json", out="c"))
    sheets = [(tmp_path / name / "samples.json").read_bytes() for name in "abc"]
    assert len(set(sheets)) == 1


def test_a_compiled_run_draws_the_same_samples_and_compiles_once_for_all_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, counter, compile_module = finished("dit", tmp_path), CompileCounter(), nn.Module.compile
    plain = generate(load_run(made), 5, steps=3).x
    monkeypatch.setattr("coterie.runs.sample.caches._check_compiler", lambda device: None)
    monkeypatch.setattr(
        nn.Module, "compile", lambda *a, **k: compile_module(*a, backend=counter, **k)
    )
    run = compiled(load_run(made))
    for num in (3, 5, 2):
        x = generate(run, num, steps=3).x
        torch.testing.assert_close(x, plain[:num], atol=1e-5, rtol=1e-5)
        assert counter.frame_count == 1


def test_without_a_compiler_nothing_is_sampled(
    run: LoadedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["sample", str(run.path), "--compile", "-q", "--out", str(tmp_path / "out")]
    with torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}), fresh_cache():
        assert coterie(argv) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "compile: True" in line and "no-such-compiler" in line
    assert not (tmp_path / "out").exists()
