"""Every field of every configuration, given what it is not: refused in one line that names it, or
it makes a model. Nothing is trained, nothing is allocated: models are built as shapes alone."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, Literal, get_args, get_origin

import pytest
import torch

from combination_parts import SAMPLES
from coterie.adapters import AdapterConfig
from coterie.backbones import BACKBONES
from coterie.core.config import Config, override
from coterie.core.errors import ConfigError, CoterieError
from coterie.core.registry import Part, Registry
from coterie.data import SOURCES
from coterie.denoiser import MODELS
from coterie.experts import BALANCES, EDITS, EXPERTS, SCORES, SELECTS
from coterie.process import PROCESSES, TIMES, WEIGHTINGS
from coterie.recipes import get_recipe, list_recipes
from coterie.runs.build import check_fits
from coterie.runs.config import RunConfig
from coterie.solvers import GRIDS, SOLVERS
from coterie.train import TrainConfig
from coterie.train.learning_rate import SCHEDULES
from coterie.train.objectives import OBJECTIVES
from fuzz_budget import Outcomes, first_seed, is_long, seconds
from small_models import small

ORDINARY = 1000  # cases of the ordinary suite
DRAWS = ("denoising", "masked_token", "cluster_posterior")
"""Objectives that need a model's process alone."""

DEEP: Any = []
for _ in range(2000):
    DEEP = [DEEP]

VALUES: dict[str, Any] = {
    "true": True,
    "negative": -1,
    "zero": 0,
    "small": 1e-30,
    "half": 2.5,
    "huge": 10**9,
    "float huge": 1e30,
    "beyond": 2**63,
    "digits": 10**5000,
    "nan": math.nan,
    "inf": math.inf,
    "none": None,
    "text": "zzz",
    "number as text": "3",
    "empty text": "",
    "empty list": [],
    "empty object": {},
    "list": [1, 2],
    "deep": DEEP,
}

ROUTER = "model.backbone.trunk.slots.0.expert.router"
EXPERT = "model.backbone.trunk.slots.0.expert"
PLACES: dict[str, tuple[Registry, str]] = {
    f"{ROUTER}.score": (SCORES, "score"),
    f"{ROUTER}.select": (SELECTS, "select"),
    f"{ROUTER}.edits": (EDITS, "edit"),
    f"{EXPERT}.experts": (EXPERTS, "experts"),
    f"{EXPERT}.balance": (BALANCES, "balance"),
    "model.process": (PROCESSES, "process"),
    "objective.times": (TIMES, "times"),
    "objective.weighting": (WEIGHTINGS, "weighting"),
    "train.schedule": (SCHEDULES, "schedule"),
    "sample.solver": (SOLVERS, "solver"),
    "sample.grid": (GRIDS, "grid"),
    "data": (SOURCES, "source"),
    "objective": (OBJECTIVES, "objective"),
    "model.backbone": (BACKBONES, "backbone"),
    "model": (MODELS, "model"),
}
"""Where in a run the parts of a registry go; a path that ends in a list takes one."""


@cache
def runs() -> tuple[RunConfig, ...]:
    """Runs that hold every part which fits a small one, and those of the recipes."""
    found = [small("dit-moe")]
    for path, (registry, name) in PLACES.items():
        for kind in registry.kinds():
            for fields in SAMPLES.get(name, {}).get(kind, [{}])[:1]:
                part = {"kind": kind, **fields}
                value = [part] if path.endswith(("edits", "balance")) else part
                try:
                    found.append(override(found[0], {path: value}))
                except CoterieError:
                    continue
    found += [get_recipe(name).config() for name in list_recipes()]
    return tuple(found)


def fields_of(config: Config, path: str = "") -> Iterator[tuple[type[Config], str, str]]:
    """(class, field, path) of every field of a configuration and of what it holds."""
    for name in type(config).model_fields:
        here = f"{path}.{name}" if path else name
        if name != "kind":
            yield type(config), name, here
        value = getattr(config, name)
        for number, item in enumerate(value if isinstance(value, tuple) else (value,)):
            if isinstance(item, Config):
                inside = f"{here}.{number}" if isinstance(value, tuple) else here
                yield from fields_of(item, inside)


@cache
def places() -> dict[tuple[type[Config], str], tuple[RunConfig, str]]:
    """Every field of every class that a run can hold, once, and the run it is in."""
    found: dict[tuple[type[Config], str], tuple[RunConfig, str]] = {}
    for run in runs():
        for cls, name, path in fields_of(run):
            found.setdefault((cls, name), (run, path))
    return found


def parts() -> Iterator[tuple[type[Config], str, dict[str, Any]]]:
    """Fields of parts and other configurations that no run above holds, with what they need."""
    for registry in {id(entry[0]): entry for entry in PLACES.values()}.values():
        for kind in registry[0].kinds():
            cls = registry[0].get(kind)
            base = SAMPLES.get(registry[1], {}).get(kind, [{}])[0]
            for name in cls.model_fields:
                if (cls, name) not in places() and name != "kind":
                    yield cls, name, base
    for cls in sorted(classes() - {cls for cls, _ in places()}, key=lambda one: one.__name__):
        if not issubclass(cls, Part):
            for name in cls.model_fields:
                yield cls, name, {}


def classes() -> set[type[Config]]:
    """Every configuration class of the package that has fields."""

    def below(cls: type[Config]) -> Iterator[type[Config]]:
        for sub in cls.__subclasses__():
            yield sub
            yield from below(sub)

    found = {cls for cls in below(Config) if cls.__module__.startswith("coterie.")}
    return {cls for cls in found if cls.model_fields}


def built(run: RunConfig, path: str, value: Any) -> bool:
    """Makes what a changed run asks for, as shapes; CoterieError where it is refused."""
    changed = override(run, {path: value})
    assert 0 <= changed.train.lr_at(0) < math.inf
    first = path.partition(".")[0]
    if first in ("model", "init") or path == "train.batch":
        check_fits(changed)
    if first == "objective" and changed.objective.kind in DRAWS:
        with torch.device("meta"):
            model = changed.model.build()
        changed.objective.build(model)
    return True


def made(cls: type[Config], fields: dict[str, Any]) -> bool:
    cls.from_dict(fields)
    return True


def refused_by_name(name: str, holder: str, work: Callable[[], bool]) -> bool:
    """Whether work is done, or refused in a line that is short and names the field."""
    try:
        return work()
    except CoterieError as error:
        said = str(error)
        # A field that does not fit others is named by them, or by what holds it.
        known = (name, holder, "model: ", "missing, and it has no default")
        if len(said) < 4000 and any(word in said for word in known if word):
            raise
        raise AssertionError(f"{name} is not named in {said[:300]}") from error


@pytest.mark.filterwarnings("error:Initializing zero-element")
def test_H_every_field_refuses_or_builds() -> None:
    """Every field with every value; in the ordinary suite with some of them."""
    outcomes, rng = Outcomes("config-fields"), random.Random(first_seed())
    outcomes.seeds = [first_seed()]
    keys = sorted(places(), key=lambda key: (key[0].__module__, key[0].__name__, key[1]))
    assert len(keys) > 250
    cases = [(key, label) for key in keys for label in VALUES]
    rng.shuffle(cases)
    end = time.perf_counter() + seconds(15)
    for key, label in cases if is_long() else cases[:ORDINARY]:
        if is_long() and time.perf_counter() > end:
            break
        (run, path), value = places()[key], VALUES[label]
        holder = path.rpartition(".")[0]
        outcomes.attempt(
            f"{key[0].__name__}.{key[1]} ({path}) = {label}",
            partial(refused_by_name, key[1], holder, partial(built, run, path, value)),
        )
    outcomes.write()
    outcomes.assert_none_wrong()


def test_H_parts_that_no_run_holds() -> None:
    outcomes = Outcomes("config-parts")
    for cls, name, base in parts():
        for label, value in VALUES.items():
            outcomes.attempt(
                f"{cls.__name__}.{name} = {label}",
                partial(refused_by_name, name, "", partial(made, cls, {**base, name: value})),
            )
    outcomes.write()
    outcomes.assert_none_wrong()


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("train.steps", True, r"^train\.steps: True is not allowed; a number is wanted$"),
        ("train.lr", "1e-3x", r"^train\.lr: '1e-3x' is not allowed; a number is wanted$"),
        ("train.ema", [True], r"^train\.ema\.0: True is not allowed"),
        (f"{EXPERT}.experts.init_std", -1, r"experts\.init_std: -1 is not allowed"),
        ("model.backbone.trunk.init_std", -1, r"^model\.backbone\.trunk\.init_std: -1 is not"),
        (
            "model.backbone.trunk.slots.0.layers",
            [],
            r"slots\.0\.layers.* is not allowed",
        ),
        ("model.backbone.trunk.window_layers", [], r"trunk\.window_layers.* is not allowed"),
        ("train.steps", 10**5000, r"^train\.steps: this int is not allowed"),
    ],
    ids=lambda value: "" if isinstance(value, int) and value > 9**99 else None,
)
def test_H_words(path: str, value: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        override(small("dit-moe"), {path: value})
    assert len(str(error.value)) < 500 and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (f"{EXPERT}.experts.ratio", 0),
        (f"{EXPERT}.experts.ratio", -2),
        (f"{EXPERT}.experts.ratio", 1e-9),
        ("model.backbone.trunk.heads", 10**9),
        ("train.threads", 100_000),
    ],
)
def test_F3_sizes_that_make_no_network_are_refused(path: str, value: float) -> None:
    changes = {f"{EXPERT}.experts.hidden": None, path: value}
    with pytest.raises(ConfigError, match=path.rpartition(".")[2]):
        check_fits(override(small("dit-moe"), changes))


def test_H_a_configuration_made_in_code_says_the_same() -> None:
    with pytest.raises(ConfigError, match=r"^weight: nan is not allowed"):
        AdapterConfig(name="a", path="b", weight=math.nan)
    assert TrainConfig(steps=20.0, lr=1).lr == 1.0  # type: ignore[arg-type]
    assert override(small("dit-moe"), {"train.steps": "1e3", "train.lr": "1"}).train.steps == 1000


def test_H_numbers_that_are_listed_are_no_truth_values() -> None:
    """``Literal[1, 3]`` as ``int``: true equals 1 and would be taken for it."""
    listed = [
        (cls, name)
        for cls in classes()
        for name, field in cls.model_fields.items()
        if any(isinstance(one, int) and type(one) is not bool for one in literals(field.annotation))
    ]
    assert ("ImageFolderConfig", "channels") in {(cls.__name__, name) for cls, name in listed}
    for cls, name in listed:
        for wrong in (True, False, "1"):
            with pytest.raises(ConfigError, match=rf"{name}[^|]*: {wrong!r} is not allowed"):
                cls.from_dict({name: wrong})
    with pytest.raises(ConfigError, match=r"^channels: True is not allowed; a number is wanted$"):
        override(SOURCES.get("image-folder")(path="."), {"channels": True})
    assert SOURCES.get("image-folder")(path=".", channels=1, held_out_one_in=2.0).channels == 1


def literals(annotation: Any) -> Iterator[Any]:
    """The values that the ``Literal`` types of an annotation list."""
    for one in get_args(annotation):
        if get_args(one):
            yield from literals(one)
        elif get_origin(annotation) is Literal:
            yield one
