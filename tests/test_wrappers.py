"""Whatever is put around a network: its answers and gradients stay, or it is refused.

Adapters of zero, deep copies, states through files, gradient checkpointing in both forms, autocast,
torch.jit.trace, torch.compile and torch.export, around layers that hold every part and value of the
registries, around layers drawn at random from all of them, and around every backbone. The dear
forms take their turns among these; a long run (``make fuzz``) draws layers and forms as long as it
may.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

import pytest
import torch
from hypothesis.strategies import booleans, integers, sampled_from
from torch import Tensor, nn

from combination_parts import factors, model_fields
from combinations import simplest
from coterie.core.errors import CoterieError
from fuzz_budget import Outcomes, is_long
from wrapper_forms import (
    CHEAP,
    DEAR,
    Case,
    Form,
    ModelCall,
    drawn_row,
    layer_cases,
    layer_rows,
    owned,
)

FORMS = {**CHEAP, **DEAR}
EXAMPLES = 20  # layers drawn at random
TURNS = {"compile": 20, "export": 10}  # which rows of all the dear forms take


def asked(network: nn.Module, x: Tensor, grad: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """The answer, and the gradients of the parameters that have one."""
    with torch.set_grad_enabled(grad):
        y = network(x)
    if grad and y.requires_grad:
        weight = torch.linspace(-1, 1, y.numel()).view(y.shape)
        (y * weight).sum().backward()
    found = {n: p.grad for n, p in network.named_parameters() if p.grad is not None}
    return y.detach(), found


def wrong(case: Case, form: Form, training: bool) -> str:
    """What differs from the network alone; "" where nothing does, or the form is refused."""
    plain, x = case.build()
    inner, _ = case.build()
    # Sums may be taken in another order, and each kind of expert has its own.
    limit = {"atol": 2e-5, "rtol": 1e-4} if form.exact else {"atol": 0.15, "rtol": 0.1}
    y, gradients = asked(plain.train(training), x, form.trains)
    try:
        around = form.wrap(inner.train(training), x)
        z, others = asked(around, x, form.trains)
    except CoterieError as error:
        return "" if "\n" not in str(error) else f"refused in several lines: {error}"
    except Exception as error:
        first = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {first[0][:160]}"
    if z.shape != y.shape:
        return f"shape {tuple(z.shape)} for {tuple(y.shape)}"
    near = torch.isclose(z.float(), y, **limit)
    if not bool(near.all()) and (form.exact or float(near.float().mean()) < 0.7):
        return f"answers differ by {float((z - y).abs().max()):.2g}"
    named = {n.removeprefix("network.").removeprefix("_orig_mod."): g for n, g in others.items()}
    for name, gradient in gradients.items() if form.trains else ():
        other = named.get(name)
        if other is None:
            if float(gradient.abs().max()) > 1e-6:
                return f"{name} has no gradient"
        elif not torch.allclose(other, gradient, atol=1e-4, rtol=1e-3):
            return f"gradients of {name} differ by {float((other - gradient).abs().max()):.2g}"
    return ""


def failures(cases: list[Case], forms: Mapping[str, Form]) -> list[str]:
    found = []
    for case in cases:
        for name, form in forms.items():
            for training in form.modes:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    what = wrong(case, form, training)
                if what:
                    found.append(
                        f"{name}, {'training' if training else 'eval'}, {case.name}: {what}"
                    )
    return found


def backbone_cases() -> list[Case]:
    """Each backbone with its default experts."""
    names = [factor.name for factor in factors()]
    place, out = names.index("backbone"), []
    for level, label in enumerate(factors()[place].labels):
        row = simplest(place, level)
        if row is not None:
            fields = model_fields(row)
            make: Callable[[], nn.Module] = lambda f=fields: ModelCall(f)  # type: ignore[misc]  # noqa: E731
            out.append(Case(label, make, lambda network: network.given))  # type: ignore[arg-type, return-value]
    return out


def test_every_part_of_a_layer_is_among_the_rows() -> None:
    held = {level for row in layer_rows() for level in enumerate(row)}
    labels = [factors()[place].labels for place in owned()]
    missed = {(p, lv) for p, own in enumerate(labels) for lv in range(len(own))} - held
    told = [f"{factors()[owned()[p]].name}={labels[p][lv]}" for p, lv in sorted(missed)]
    assert told == []


@pytest.mark.parametrize("form", CHEAP)
def test_layers_in_every_wrapper(form: str) -> None:
    assert failures(list(layer_cases(layer_rows())), {form: CHEAP[form]}) == []


@pytest.mark.parametrize("form", DEAR)
def test_layers_compiled_and_exported(form: str) -> None:
    """Of the rows some, by turns, so that the suite stays short."""
    cases = list(layer_cases(layer_rows()))
    assert failures(cases[list(DEAR).index(form) :: TURNS[form]], {form: DEAR[form]}) == []


def test_layers_drawn_at_random_in_a_wrapper() -> None:
    outcomes = Outcomes("wrappers")

    def attempt(seed: int, name: str, training: bool) -> None:
        (case,) = layer_cases([drawn_row(seed)])
        form = FORMS[name]
        mode = training and True in form.modes
        where = f"{name}, {'training' if mode else 'eval'}, {case.name}"
        told: list[str] = []

        def judge(answer: object) -> bool:
            told.append(str(answer))
            return not answer

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outcomes.attempt(where, lambda: wrong(case, form, mode), judge, limit=300.0)
        if told and told[-1]:
            outcomes.faults[-1:] = [f"{where}: {told[-1]}"]

    names = sampled_from(list(FORMS) if is_long() else list(CHEAP))
    outcomes.repeat(attempt, integers(0, 2**32), names, booleans(), examples=EXAMPLES)
    outcomes.write()
    outcomes.assert_none_wrong()


def test_backbones_in_every_wrapper() -> None:
    assert failures(backbone_cases(), FORMS if is_long() else CHEAP) == []


def test_wrappers_that_change_something_are_noticed() -> None:
    """The suite can fail: a form that moves one parameter, one that loses the gradients."""

    def moved(network: nn.Module, x: Tensor) -> nn.Module:
        with torch.no_grad():
            next(iter(network.parameters())).mul_(1.5)
        return network

    def closed(network: nn.Module, x: Tensor) -> nn.Module:
        return network.requires_grad_(False)

    (case,) = layer_cases(layer_rows()[:1])
    assert "differ" in wrong(case, Form(moved), False)
    assert "no gradient" in wrong(case, Form(closed), False)
