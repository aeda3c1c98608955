"""The report with floors, and the loss per noise level."""

import json

import numpy as np
import pytest
import torch

from coterie.core.errors import ConfigError, DataError
from coterie.data import build_source
from coterie.encoders import ModuleFeatures, SmallClassifier
from coterie.metrics import NoiseBins, evaluate_images, format_evaluation


@pytest.fixture(scope="module")
def pictures():
    train, held_out = build_source("digits"), build_source("digits", "held_out")
    return train.get(np.arange(len(train))).x, held_out.get(np.arange(len(held_out))).x


def _features():
    return ModuleFeatures("pixels", 64, lambda images: images.flatten(1))


def test_real_data_score_their_floor_and_noise_scores_worse(pictures):
    train, held_out = pictures
    real = evaluate_images(_features(), held_out, train, held_out)
    assert real["n"] == len(held_out) and real["extractor"] == "pixels"
    for name in ("frechet", "kid", "precision", "recall"):
        assert real[name]["value"] == pytest.approx(real[name]["floor"])
    noisy = held_out + torch.randn(held_out.shape, generator=torch.Generator().manual_seed(0)) / 2
    found = evaluate_images(_features(), noisy.clamp(-1, 1), train, held_out)
    assert found["frechet"]["value"] > 1.5 * found["frechet"]["floor"]
    assert found["kid"]["value"] - found["kid"]["floor"] > 5 * found["kid"]["stderr"]
    assert found["precision"]["value"] < found["precision"]["floor"]
    assert found["kid"]["floor"] < 5 * found["kid"]["floor_stderr"]


def test_report_is_json_and_reads_well(pictures):
    train, held_out = pictures
    net = SmallClassifier(1, 10).as_features("untrained net")
    report = evaluate_images(net, held_out[:50], train, held_out)
    assert json.loads(json.dumps(report)) == report and report["n"] == 50
    text = format_evaluation(report)
    assert "n = 50" in text and "untrained net" in text and "real (floor)" in text
    assert report == evaluate_images(net, held_out[:50], train, held_out)


def test_too_few_pictures(pictures):
    with pytest.raises(DataError, match="number of pictures: 3"):
        evaluate_images(_features(), pictures[0][:3], *pictures)


def test_bins_hold_means_and_errors():
    rng = np.random.default_rng(0)
    noise, losses = rng.uniform(size=1000), rng.normal(size=1000)
    bins = NoiseBins(4)
    for part in np.array_split(np.arange(1000), 7):
        bins.add(torch.from_numpy(losses[part]), torch.from_numpy(noise[part]))
    for index, found in enumerate(bins.result()):
        inside = losses[(noise >= index / 4) & (noise < (index + 1) / 4)]
        assert (found.low, found.high) == (index / 4, (index + 1) / 4)
        assert found.num_samples == len(inside)
        assert found.mean == pytest.approx(inside.mean())
        assert found.stderr == pytest.approx(inside.std(ddof=1) / np.sqrt(len(inside)))


def test_edges_and_empty_bins():
    bins = NoiseBins()
    bins.add([1.0, 2.0, 4.0], [0.0, 1.0, 1.0])
    first, *middle, last = bins.result()
    assert len(middle) == 8 and all(b.num_samples == 0 and b.mean is None for b in middle)
    assert (first.mean, first.stderr) == (1.0, None)
    assert last.mean == 3.0 and last.stderr == pytest.approx(1.0)
    bins.add(np.zeros(0), np.zeros(0))
    assert bins.result()[0].num_samples == 1


@pytest.mark.parametrize(
    ("losses", "noise", "message"),
    [
        ([1.0], [1.5], "noise"),
        ([1.0], [-0.1], "noise"),
        ([1.0], [np.nan], "noise"),
        ([np.nan], [0.5], "per_sample"),
        ([1.0, 2.0], [0.5], "shapes"),
        ([[1.0]], [[0.5]], "shapes"),
    ],
)
def test_bad_losses_are_refused_and_leave_no_trace(losses, noise, message):
    bins = NoiseBins(2)
    with pytest.raises(DataError, match=message):
        bins.add(losses, noise)
    assert all(found.num_samples == 0 for found in bins.result())


def test_bins_need_one():
    with pytest.raises(ConfigError, match="num_bins: 0"):
        NoiseBins(0)
