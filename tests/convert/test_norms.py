"""Experts without their norm answer as with it: in a multi-task model and in a denoiser."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from coterie.convert import fold_norms, folded_config
from coterie.core.config import override
from coterie.core.errors import ConfigError
from coterie.data import build_source
from coterie.hub import load_pretrained, save_pretrained
from coterie.recipes import home
from coterie.runs.build import build_model
from coterie.runs.training import make_trainer
from small_models import IMAGE, image_tiny, images, times

SHORT = {"train.steps": 3, "train.batch": 64, "train.threads": 1}


def test_a_multitask_model_folds_and_saves(tmp_path: Path) -> None:
    config = override(home.tiny(), SHORT)
    trainer = make_trainer(config)
    trainer.fit(progress=False)
    model = trainer.model.eval()
    changed, folded = fold_norms(model)
    x = build_source("movielens", "held_out").get(np.arange(50)).x
    assert torch.allclose(folded(x).value, model(x).value, atol=1e-5)
    assert not any("variance" in name or "gain" in name for name in folded.state_dict())
    save_pretrained(folded, tmp_path / "m", changed.model_dump(mode="json"))
    assert torch.equal(load_pretrained(tmp_path / "m").eval()(x).value, folded(x).value)


def test_a_denoiser_folds() -> None:
    model = build_model(override(image_tiny("home", home.slot(4, 16)), IMAGE))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    batch, t = images(6), times(6)
    model.train()(batch.x, t, batch.cond)  # statistics that are not those of the start
    _, folded = fold_norms(model.eval())
    expected = model(batch.x, t, batch.cond).value
    assert expected.std() > 0.01
    assert torch.allclose(folded(batch.x, t, batch.cond).value, expected, atol=1e-5)


def test_a_model_without_norms_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing is to be folded"):
        folded_config(image_tiny("dit").model)
