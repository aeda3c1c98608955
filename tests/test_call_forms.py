"""Calls in the forms that people try first: taken where they are unambiguous, else one line."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from coterie.core.context import Context
from coterie.core.errors import CoterieError, DataError
from coterie.core.prediction import Condition
from coterie.denoiser import DenoiserConfig, TokenDenoiserConfig
from coterie.experts import ExpertLayerConfig
from coterie.solvers import GRIDS, SOLVERS, sample

TRUNK = {"width": 8, "depth": 1, "heads": 2, "mlp_hidden": 8}
DIT = {"kind": "dit", "image_size": 4, "patch": 2, "num_classes": 3, "trunk": TRUNK}
TEXT = {
    "kind": "causal",
    "vocabulary": 12,
    "context": 6,
    "trunk": {**TRUNK, "causal": True, "modulation": "none"},
}


def layer(**config: object) -> Any:
    torch.manual_seed(0)
    return ExpertLayerConfig.from_dict({"num_experts": 4, **config}).build(8).eval()


def test_D8_a_layer_without_a_context_and_rows_without_samples() -> None:
    made, rows = layer(), torch.randn(6, 8)
    asked = made(rows[None], Context(batch=1, tokens=6)).y
    assert torch.equal(made(rows[None]).y, asked)
    assert torch.equal(made(rows).y, asked[0])
    apart = made(rows.view(2, 3, 8), Context(batch=2, tokens=3))
    flat = made(rows, Context(batch=2, tokens=3))
    assert torch.equal(flat.y, apart.y.flatten(0, 1)) and flat.routings[0].batch == (2, 3)
    made.train()
    assert made(rows).y.requires_grad


@pytest.mark.parametrize(
    ("config", "shape", "ctx", "told"),
    [
        ({}, (2, 3, 8), Context(batch=2, tokens=4), r"ctx\.batch, ctx\.tokens: \(2, 4\)"),
        ({}, (2, 3, 8), Context(batch=3, tokens=2), r"ctx\.batch, ctx\.tokens: \(3, 2\)"),
        ({}, (2, 3, 7), None, r"h\.shape: \(2, 3, 7\)"),
        ({}, (2, 2, 3, 8), None, r"h\.shape: "),
        ({}, (8,), None, r"h\.shape: \(8,\)"),
        ({}, (5, 8), Context(batch=2, tokens=3), "2 x 3 rows"),
        ({"router": {"unit": "sample"}}, (6, 8), None, "whole samples"),
        ({"router": {"select": {"kind": "expert_choice"}}}, (6, 8), None, "whole samples"),
        ({"router": {"score": {"kind": "noise_level"}}}, (2, 3, 8), None, "time embedding"),
        (
            {},
            (2, 3, 8),
            Context(batch=2, tokens=3, token_mask=torch.ones(2, 4, dtype=torch.bool)),
            r"ctx\.token_mask: \(2, 4\)",
        ),
    ],
)
def test_D8_what_does_not_agree_is_one_line(
    config: dict[str, object], shape: tuple[int, ...], ctx: Context | None, told: str
) -> None:
    with pytest.raises(CoterieError, match=told) as error:
        layer(**config)(torch.randn(shape), ctx)
    assert "\n" not in str(error.value)


def test_D8_numbers_for_times_and_no_condition() -> None:
    torch.manual_seed(0)
    model = DenoiserConfig.from_dict({"backbone": DIT}).build().eval()
    x, half = torch.randn(2, 1, 4, 4), torch.full((2,), 0.5)
    label = Condition(label=torch.tensor([0, 2]))
    wanted = model(x, half, label).value
    assert torch.equal(model(x, 0.5, label).value, wanted)
    assert torch.equal(model(x, 1, label).value, model(x, 2 * half, label).value)
    plain = DenoiserConfig.from_dict({"backbone": {**DIT, "num_classes": 0}}).build().eval()
    assert torch.equal(plain(x, 0.5).value, plain(x, half, Condition()).value)
    text = TokenDenoiserConfig.from_dict({"backbone": TEXT}).build().eval()
    ids = torch.zeros(2, 6, dtype=torch.long)
    assert torch.equal(text(ids, 0).value, text(ids, torch.zeros(2), Condition()).value)


@pytest.mark.parametrize("t", ["0.5", True, None, torch.zeros(()), torch.zeros(3)])
def test_D8_times_that_are_none_are_one_line(t: Any) -> None:
    model = DenoiserConfig.from_dict({"backbone": DIT}).build()
    with pytest.raises(DataError, match=r"t: .* is not allowed"):
        model(torch.zeros(2, 1, 4, 4), t, Condition())


def test_D8_a_condition_that_is_none_is_one_line() -> None:
    model = DenoiserConfig.from_dict({"backbone": DIT}).build()
    with pytest.raises(DataError, match=r"cond: 'Tensor' is not allowed; .*label"):
        model(torch.zeros(2, 1, 4, 4), 0.5, torch.tensor([0, 1]))  # type: ignore[arg-type]


def test_D8_solvers_and_grids_by_name() -> None:
    torch.manual_seed(0)
    model = DenoiserConfig.from_dict({"backbone": DIT}).build().eval()
    x, label = torch.randn(2, 1, 4, 4), Condition(label=torch.tensor([0, 2]))
    parts = {"solver": SOLVERS.parse("heun"), "grid": GRIDS.parse("uniform")}
    wanted = sample(model, x, label, **parts, steps=3)  # type: ignore[arg-type]
    assert torch.equal(sample(model, x, label, solver="heun", grid="uniform", steps=3), wanted)
    with pytest.raises(CoterieError, match=r"kind: 'huen' .*did you mean 'heun'"):
        sample(model, x, label, solver="huen", grid="uniform", steps=3)
