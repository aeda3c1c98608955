"""The small classifier: shapes, gradients, independence of batch mates; the extractor's door."""

import numpy as np
import pytest
import torch

from coterie.core.errors import ConfigError, DataError
from coterie.encoders import Features, ModuleFeatures, SmallClassifier


@pytest.mark.parametrize(("channels", "side"), [(1, 8), (1, 28), (3, 32)])
def test_shapes_and_gradients(channels, side):
    net = SmallClassifier(channels, 10)
    x = torch.randn(6, channels, side, side, generator=torch.Generator().manual_seed(0))
    loss = torch.nn.functional.cross_entropy(net(x), torch.arange(6))
    loss.backward()
    assert net(x).shape == (6, 10) and net.features(x).shape == (6, 64)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())
    assert sum(p.numel() for p in net.parameters()) < 250_000


def test_a_picture_does_not_see_its_batch_mates():
    net = SmallClassifier(1, 4).train()
    x = torch.randn(5, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(net(x)[2], net(x[2:3])[0], atol=1e-5)


def test_initial_weights_come_from_the_generator():
    def weights(seed):
        return SmallClassifier(1, 4, rng=torch.Generator().manual_seed(seed)).embed.weight

    torch.manual_seed(0)
    first = weights(1)
    assert torch.equal(first, weights(1)) and not torch.equal(first, weights(2))


def test_it_can_learn_digits():
    from coterie.data import build_source, order

    source, held_out = build_source("digits"), build_source("digits", "held_out")
    net = SmallClassifier(1, 10, width=8)
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-2)
    for step in range(60):
        batch = source.get(order(0, step * 64, 64, len(source)))
        loss = torch.nn.functional.cross_entropy(net(batch.x), batch.cond.label)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    test = held_out.get(np.arange(len(held_out)))
    features = net.as_features("digits classifier")
    assert (net(test.x).argmax(1) == test.cond.label).float().mean() > 0.9
    rows = features(test.x)
    means = np.stack([rows[test.cond.label == k].mean(0) for k in range(10)])
    nearest = np.square(rows[:, None] - means).sum(2).argmin(1)
    assert (nearest == test.cond.label.numpy()).mean() > 0.9  # features separate the classes


def test_extractor_is_the_same_in_any_batches():
    net = SmallClassifier(1, 4).eval()
    x = torch.rand(7, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    whole = net.as_features("a net")
    parts = ModuleFeatures("a net", 64, net.features, batch=3)
    assert isinstance(whole, Features) and whole.dim == 64 and whole.name == "a net"
    assert whole(x).dtype == np.float32
    assert np.allclose(whole(x), parts(x), atol=1e-5)


@pytest.mark.parametrize(
    ("images", "field"),
    [
        (torch.zeros(2, 28, 28), "images.shape"),
        (torch.zeros(2, 2, 8, 8), "images.shape"),
        (torch.zeros(0, 1, 8, 8), "images.shape"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), "images.dtype"),
        (torch.full((2, 1, 8, 8), float("nan")), "picture 0 holds NaN"),
    ],
)
def test_bad_pictures_are_refused(images, field):
    with pytest.raises(DataError, match=field):
        SmallClassifier(1, 4).as_features("a net")(images)


def test_wrong_width_is_caught():
    with pytest.raises(DataError, match=r"output shape: \(2, 8\)"):
        ModuleFeatures("wrong", 9, lambda x: x.flatten(1)[:, :8])(torch.zeros(2, 1, 4, 4))


def test_bad_sizes_are_named():
    with pytest.raises(ConfigError, match="num_classes: 0"):
        SmallClassifier(1, 0)
