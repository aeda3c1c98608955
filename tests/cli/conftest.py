"""Stand-ins for the library under the command line: the verbs are tested without training."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from coterie.cli.main import run
from coterie.core.config import Config
from coterie.core.errors import ConfigError, unknown


class Part(Config):
    depth: int = 2
    name: str = "small"


class RunConfigStub(Config):
    seed: int = 0
    model: Part = Part()
    betas: tuple[float, float] = (0.9, 0.99)
    batch_size: int = 8


@dataclass
class Calls:
    """What the verbs asked of the library, in order: (function, arguments)."""

    made: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    error: BaseException | None = None
    plan_error: BaseException | None = None  # of measuring, not of counting
    parameters: int = 12_345

    def note(self, function: str, **arguments: Any) -> None:
        self.made.append((function, arguments))
        if self.error is not None:
            raise self.error

    def of(self, function: str) -> dict[str, Any]:
        (arguments,) = [given for name, given in self.made if name == function]
        return arguments


PAPER = SimpleNamespace(
    title="Many experts", authors="A. Author", year=2024, venue="V", arxiv="1", bibtex="@misc{a}"
)


def recipe_stub(name: str) -> SimpleNamespace:
    if name not in ("dit-moe", "other"):
        raise ConfigError(unknown("recipe", name, ["dit-moe", "other"]))

    def config(preset: str) -> RunConfigStub:
        if preset not in ("tiny", "demo"):
            raise ConfigError(unknown("preset", preset, ["tiny", "demo"]))
        return RunConfigStub(seed=7 if preset == "demo" else 0)

    return SimpleNamespace(
        name=name,
        summary="experts for tokens",
        paper=PAPER,
        claims=(),
        departures=("smaller",),
        presets=lambda: ["demo", "tiny"],
        config=config,
        arms=lambda: {"ours": None, "dense": None},
    )


def _module(name: str, **members: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(members)
    return module


def _fakes(calls: Calls) -> list[ModuleType]:
    def start(config: Any, out: Path, progress: bool = True) -> Path:
        calls.note("start", config=config, out=out, progress=progress)
        return Path(out)

    def load_run(path: Path, which: str = "ema") -> SimpleNamespace:
        calls.note("load_run", path=path, which=which)
        return SimpleNamespace(path=Path(path), is_text=False)

    def plan(config: Any, measure: bool = True) -> dict[str, Any]:
        calls.note("plan", config=config, measure=measure)
        if measure and calls.plan_error is not None:
            raise calls.plan_error
        minutes = {"projected_minutes": 1.5} if measure else {}
        return {"parameters_total": calls.parameters, **minutes}

    def sample_run(run: Any, num: int, progress: Callable[[int], None], **rest: Any) -> Path:
        calls.note("sample_run", run=run, num=num, **rest)
        progress(num)
        return Path(rest["out"]) / "grid.png"

    def report_run(path: Path, out: Path, progress: bool = True, citation: str = "") -> Path:
        calls.note("report_run", path=path, out=out, progress=progress, citation=citation)
        Path(out).mkdir(parents=True, exist_ok=True)
        (Path(out) / "report.json").write_text('{"loss": 0.5}', encoding="utf-8")
        return Path(out) / "index.html"

    def fetch(kind: str, progress: Any = None, refresh: bool = False) -> Path:
        calls.note("fetch", kind=kind, refresh=refresh)
        return Path("cache") / kind

    def run_benchmark(cases: tuple[str, ...], threads: int, rounds: int) -> dict[str, Any]:
        calls.note("run_benchmark", cases=cases, threads=threads, rounds=rounds)
        row = {"case": "S2", "backend": "loop", "forward_ms": 1.25, "choice": {}}
        return {"rows": [row], "goals": []}

    def verify(name: str, work: Path, seeds: int, workers: int | None, progress: Any) -> Any:
        calls.note("verify", name=name, work=work, seeds=seeds, workers=workers)
        progress("ours seed 0", 1, 2)
        claim = {"shown": False, "metric": "loss", "ours": 1.0, "baseline": 2.0}
        return {"claims": [{**claim, "spread": 0.1, "seeds": seeds, "claim": "better"}]}

    return [
        _module(
            "coterie.recipes", get_recipe=recipe_stub, list_recipes=lambda: ["dit-moe", "other"]
        ),
        _module("coterie.recipes.verify", verify=verify),
        _module("coterie.runs.training", start=start),
        _module("coterie.runs.trained_run", load_run=load_run),
        _module("coterie.runs.cost", plan=plan),
        _module("coterie.runs.sample.sample_files", sample_run=sample_run),
        _module("coterie.bench.experts", run_benchmark=run_benchmark, CASES={"S2": 1, "B2": 2}),
        _module("coterie.runs.measure.report", report_run=report_run),
        _module("coterie.data.download.fetch", fetch=fetch, DOWNLOADS={}),
    ]


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Replaces recipes, training, sampling, reports and fetching by stand-ins that note calls."""
    calls = Calls()
    for module in _fakes(calls):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return calls


@pytest.fixture
def coterie(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs one command line in this process: (exit code, standard output, standard error)."""

    def call(*argv: str) -> tuple[int, str, str]:
        code = run([str(word) for word in argv])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call
