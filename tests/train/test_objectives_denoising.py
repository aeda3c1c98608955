"""The denoising objective against its formula, written out from what the model was shown."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from coterie.core.batch import Batch
from coterie.core.context import NULL_LABEL
from coterie.core.prediction import VIEWS, Condition, Prediction
from coterie.core.rng import generator
from coterie.core.routing import Aux
from coterie.process import PROCESSES
from coterie.recipes.common import DDPM
from coterie.train.objectives import ClassificationConfig, DenoisingConfig
from small_models import images, small, woken


class Stub:
    """Answers 0.3 x in ``view`` and notes what it was shown."""

    def __init__(self, process: str = "rectified_flow", view: str = "flow") -> None:
        self.process = PROCESSES.parse(process).build()
        self.view = view
        self.shown: dict[str, Any] = {}
        self.aux: tuple[Aux, ...] = ()

    def __call__(self, x: Tensor, t: Tensor, cond: Condition, **facts: Any) -> Prediction:
        self.shown = {"x": x, "t": t, "label": cond.label, **facts}
        return Prediction(0.3 * x, self.view)  # type: ignore[arg-type]

    def aux_losses(self, routings: Any, rng: Any = None) -> tuple[Aux, ...]:
        return self.aux


def batch_of(size: int, seed: int = 0) -> Batch:
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 1, 4, 4, generator=rng)
    return Batch(x, Condition(label=torch.arange(size) % 10), torch.arange(size) + 100)


def targets(stub: Stub, x0: Tensor) -> dict[str, Tensor]:
    """All views of the pair behind x_t, from the definition of the process."""
    t = stub.shown["t"].double()
    at = [getattr(stub.process, name)(t)[:, None, None, None] for name in ("alpha", "sigma")]
    rate = [getattr(stub.process, name)(t)[:, None, None, None] for name in ("dalpha", "dsigma")]
    (alpha, sigma), (dalpha, dsigma) = at, rate
    eps = (stub.shown["x"].double() - alpha * x0) / sigma
    return {
        "x0": x0,
        "eps": eps,
        "score": -eps / sigma,
        "flow": dalpha * x0 + dsigma * eps,
        "v": alpha * eps - sigma * x0,
    }


@pytest.mark.parametrize("process", ["rectified_flow", "ddpm", "cosine", "trig"])
@pytest.mark.parametrize("view", VIEWS)
def test_loss_is_the_mean_square_in_the_models_own_view(process: str, view: str) -> None:
    stub, batch = Stub(process, view), batch_of(6)
    objective = DenoisingConfig().build(stub)
    losses = objective(stub, batch, generator(0, "t"), 0.5)
    x0 = batch.x.double()
    gap = 0.3 * stub.shown["x"].double() - targets(stub, x0)[view]
    expected = gap.square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(losses.per_sample.double(), expected, rtol=1e-3, atol=1e-5)
    main = losses.main["denoising"]
    torch.testing.assert_close(main.double(), expected.mean(), rtol=1e-3, atol=1e-5)
    assert torch.equal(losses.noise, stub.process.unit_time(stub.shown["t"]))


def test_the_noise_is_standard_normal_and_its_own_for_every_sample() -> None:
    stub, batch = Stub(), batch_of(2000)
    DenoisingConfig().build(stub)(stub, batch, generator(0, "t"), 0.5)
    eps = targets(stub, batch.x.double())["eps"]
    assert eps.mean().abs() < 0.02 and (eps.var() - 1).abs() < 0.05
    correlation = (eps[:-1] * eps[1:]).mean()
    assert correlation.abs() < 0.02


def test_weights_of_noise_levels_multiply_the_error() -> None:
    stub, batch = Stub("ddpm", "eps"), batch_of(8)
    config = DenoisingConfig.from_dict({"weighting": {"kind": "min_snr", "gamma": 5.0}})
    losses = config.build(stub)(stub, batch, generator(0, "t"), 0.5)
    snr = stub.process.snr(stub.shown["t"].double())
    weight = snr.clamp(max=5.0) / snr
    expected = (weight * losses.per_sample.double()).mean()
    torch.testing.assert_close(losses.main["denoising"].double(), expected, rtol=1e-4, atol=0)
    assert (weight.min() < 0.9) and (weight.max() > 0.999)


def test_balance_losses_are_added_with_their_weights() -> None:
    stub, batch = Stub(), batch_of(4)
    stub.aux = (Aux("a", torch.tensor(2.0), 0.5, 0), Aux("b", torch.tensor(3.0), 0.1, 1))
    losses = DenoisingConfig().build(stub)(stub, batch, generator(0, "t"), 0.5)
    torch.testing.assert_close(losses.total, losses.main["denoising"] + 1.0 + 0.3)


def test_the_model_is_told_ids_progress_and_generator() -> None:
    stub, batch, rng = Stub(), batch_of(4), generator(0, "t")
    DenoisingConfig().build(stub)(stub, batch, rng, 0.7)
    assert stub.shown["sample_ids"] is batch.ids
    assert stub.shown["progress"] == 0.7 and stub.shown["rng"] is rng


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_the_share_of_dropped_labels(share: float) -> None:
    stub, batch = Stub(), batch_of(4000)
    DenoisingConfig(label_dropout=share).build(stub)(stub, batch, generator(0, "t"), 0.5)
    label = stub.shown["label"]
    dropped = label == NULL_LABEL
    deviation = 4 * (share * (1 - share) / 4000) ** 0.5
    assert abs(dropped.float().mean().item() - share) <= deviation
    assert torch.equal(label[~dropped], batch.cond.label[~dropped])
    assert (batch.cond.label >= 0).all()  # the data themselves are left alone


def test_everything_random_follows_the_generator() -> None:
    def shown(seed: int) -> dict[str, Any]:
        stub = Stub()
        torch.manual_seed(torch.initial_seed() + 1)  # the global generator does not matter
        config = DenoisingConfig(label_dropout=0.5)
        config.build(stub)(stub, batch_of(64), generator(seed, "t"), 0.5)
        return stub.shown

    first, again, other = shown(0), shown(0), shown(1)
    for name in ("x", "t", "label"):
        assert torch.equal(first[name], again[name])
        assert not torch.equal(first[name], other[name])


def test_unlabelled_data_need_no_dropout() -> None:
    stub, batch = Stub(), batch_of(4)
    losses = DenoisingConfig().build(stub)(
        stub, Batch(batch.x, Condition(), batch.ids), generator(0, "t"), 0.5
    )
    assert stub.shown["label"] is None and losses.total.isfinite()


# A learnt variance


def learned():
    config = small("dense-ddpm")
    model = config.model.replace(
        **DDPM, backbone=config.model.backbone.replace(learned_variance=True)
    )
    return config.replace(model=model)


def variance_losses(model: Any, weight: float = 1.0):
    objective = DenoisingConfig(vlb_weight=weight).build(model)
    return objective(model, images(16), generator(0, "t"), 0.5)


def test_the_bound_trains_the_variance_and_leaves_the_mean_alone() -> None:
    """Rows of the head: first half the mean, second half the variance."""
    for name, moved, still in (
        ("vlb", slice(4, 8), slice(0, 4)),
        ("denoising", slice(0, 4), slice(4, 8)),
    ):
        model = woken(learned())
        losses = variance_losses(model)
        assert losses.main.keys() == {"denoising", "vlb"} and losses.main[name].isfinite()
        losses.main[name].backward()
        for gradient in (model.backbone.head.weight.grad, model.backbone.head.bias.grad):
            assert gradient.shape[0] == 8
            assert not gradient[still].any()
            assert (gradient[moved] != 0).all()


def test_the_bound_has_its_weight_and_is_finite_at_every_step() -> None:
    model = woken(learned())
    one, three = (variance_losses(model, weight).main["vlb"] for weight in (1.0, 3.0))
    torch.testing.assert_close(three, 3 * one)
    assert one.item() > 0
    objective = DenoisingConfig().build(model)
    x0 = images(5).x
    t = model.process.time_of_index(torch.tensor([0, 1, 500, 998, 999]))
    x_t = model.process.diffuse(x0, torch.randn(x0.shape), t)
    bits = objective._vlb(model(x_t, t, images(5).cond), x0, x_t, t)
    assert bits.shape == (5,) and bits.isfinite().all()


# Classification


def test_classification_is_cross_entropy_and_counts_hits() -> None:
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 3.0]])
    batch = Batch(torch.zeros(2, 1), Condition(label=torch.tensor([0, 1])), torch.arange(2))
    losses = ClassificationConfig().build(None)(lambda x: logits, batch, generator(0, "t"))
    probs = logits.softmax(1)
    expected = -(probs[0, 0].log() + probs[1, 1].log()) / 2
    torch.testing.assert_close(losses.main["classification"], expected)
    assert losses.extras["accuracy"].item() == 0.5
