"""Experts that cannot be composed, each with an error that names it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from coterie import DenoiserConfig
from coterie.backbones import DiTConfig, TrunkConfig
from coterie.core.errors import CheckpointError, ConfigError
from coterie.core.prediction import Condition, Prediction
from coterie.denoiser import TokenDenoiserConfig
from coterie.ensembles import Members, compose

TRUNK = TrunkConfig(width=16, depth=1, heads=2)


def model(process: str = "cosine", view: Any = "flow", **backbone: Any) -> Any:
    settings = {"image_size": 8, "patch": 4, "num_classes": 0, **backbone}
    config = DenoiserConfig(
        backbone=DiTConfig(trunk=TRUNK, **settings),
        process=process,
        view=view,  # type: ignore[arg-type]
    )
    return config.build().eval()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: model(image_size=12), r"members\.other\.sample_shape: \(1, 12, 12\)"),
        (lambda: model(channels=3), r"members\.other\.sample_shape: \(3, 8, 8\)"),
        (lambda: model(num_classes=4), r"members\.other\.num_classes: 4"),
        (lambda: model(process="vp_linear"), r"process: .*same process for all experts"),
        (lambda: None, r"experts\.other: .*every expert"),
        (
            lambda: TokenDenoiserConfig().build(),
            r"experts\.other: 'TokenDenoiser'.*no token denoiser",
        ),
    ],
)
def test_experts_of_other_data_or_process(other: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose({"one": model(), "other": other()})


def test_experts_of_another_latent_space() -> None:
    traits = {"one": {"space": "latents"}, "other": {"space": "data"}}
    with pytest.raises(ConfigError, match=r"members\.other\.space: 'data'.*'one' has 'latents'"):
        compose(Members({"one": model(), "other": model()}, traits=traits))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_experts_whose_weights_are_not_finite(bad: float) -> None:
    broken = model()
    with torch.no_grad():
        next(broken.backbone.parameters()).view(-1)[3] = bad
    with pytest.raises(
        CheckpointError, match=r"experts\.other: backbone\..* holds NaN or infinity"
    ):
        compose({"one": model(), "other": broken})


def test_a_view_that_is_no_denoiser_s_is_refused_when_it_answers() -> None:
    class Reader:
        process, view = model().process, "logits"

        def __call__(self, x: Any, t: Any, cond: Any) -> Prediction:
            return Prediction(x, "logits")

    made = compose({"one": model(), "other": Reader()})
    with pytest.raises(ConfigError, match="'logits'"):
        made(torch.randn(2, 1, 8, 8), torch.full((2,), 0.5), Condition())


def test_experts_of_several_views_are_converted() -> None:
    made = compose({"one": model(view="eps"), "other": model(view="v")})
    found = made(torch.randn(2, 1, 8, 8), torch.full((2,), 0.5), Condition())
    assert found.view == "eps" and bool(torch.isfinite(found.value).all())
