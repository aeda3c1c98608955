"""EfficientNet-Lite0: the architecture always, its ImageNet weights where they are in the cache."""

import io

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from coterie.core.errors import DataError
from coterie.data.download.cache import problem
from coterie.data.download.fetch import DOWNLOADS
from coterie.encoders import Features, Lite0, lite0_extractor, lite0_features, load_lite0
from coterie.encoders.lite0 import SameConv, prepare

DOWNLOAD = DOWNLOADS["efficientnet-lite0"]
CACHED = problem(DOWNLOAD.folder) is None
needs_weights = pytest.mark.skipif(not CACHED, reason="ImageNet weights are not in the cache")


@pytest.fixture(scope="module")
def network():
    return load_lite0()


def test_size_is_the_published_one():
    net = Lite0()
    count = sum(p.numel() for p in net.parameters())
    assert count == 4_652_008 and len(net._blocks) == 16
    # what the packaged weights hold: parameters and running statistics
    assert len(net.state_dict()) == 296


@pytest.mark.parametrize("side", [31, 32])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 2), (5, 1)])
def test_same_padding(side, kernel, stride):
    conv = SameConv(1, 1, kernel, stride, bias=False)
    x = torch.randn(1, 1, side, side, generator=torch.Generator().manual_seed(0))
    out = conv(x)
    assert out.shape[-1] == -(-side // stride)
    total = max((out.shape[-1] - 1) * stride + kernel - side, 0)
    padded = F.pad(x, (total // 2, total - total // 2) * 2)  # the odd pixel: right and below
    assert torch.allclose(out, F.conv2d(padded, conv.weight, stride=stride))


def test_features_of_an_untrained_network_have_their_shapes():
    net = Lite0().eval()
    x = torch.rand(3, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = lite0_features(x, net, batch=2)
    assert found["stage5"].shape == (3, 112) and found["head"].shape == (3, 1280)
    for layer in ("stage5", "head"):
        extractor = lite0_extractor(layer, net)
        assert isinstance(extractor, Features) and layer in extractor.name
        assert np.allclose(extractor(x), found[layer], atol=1e-4)
    assert net(prepare(x)).shape == (3, 1000)


def test_preparing_keeps_range_and_brightness():
    x = torch.rand(2, 1, 40, 40, generator=torch.Generator().manual_seed(0)) * 2 - 1
    ready = prepare(x)
    assert ready.shape == (2, 3, 64, 64) and ready.abs().max() <= 1
    assert torch.equal(ready[:, 0], ready[:, 2])
    assert torch.allclose(ready.mean((1, 2, 3)), x.mean((1, 2, 3)), atol=0.02)
    assert torch.equal(prepare(ready), ready)


def test_weights_are_converted_without_running_anything(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "canary"), "w"))

    buffer = io.BytesIO()
    torch.save({"x": Evil()}, buffer)
    with pytest.raises(Exception, match=r"Unsupported|weights_only|Weights only"):
        DOWNLOAD.convert([{"w.pth": buffer.getvalue()}], tmp_path)
    assert not (tmp_path / "canary").exists()
    buffer = io.BytesIO()
    torch.save(Lite0().state_dict(), buffer)
    DOWNLOAD.convert([{"w.pth": buffer.getvalue()}], tmp_path)
    assert (tmp_path / "weights.safetensors").stat().st_size > 18_000_000


def test_foreign_weights_are_refused(tmp_path, monkeypatch):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "weights.safetensors")
    monkeypatch.setattr("coterie.encoders.lite0.fetch", lambda kind: tmp_path)
    with pytest.raises(DataError, match="cannot be loaded"):
        load_lite0()


@needs_weights
def test_photographs_are_recognised(network):
    from sklearn.datasets import load_sample_image

    for name, classes in (("china.jpg", 698), ("flower.jpg", 985)):  # palace, daisy
        photo = torch.from_numpy(load_sample_image(name)[:, 106:533].copy())
        x = photo.permute(2, 0, 1)[None].float() / 127.5 - 1
        assert int(network(prepare(x, 224)).argmax()) == classes
    assert not any(p.requires_grad for p in network.parameters()) and not network.training


@needs_weights
def test_distances_grow_with_damage(network):
    from sklearn.datasets import load_sample_image

    from coterie.metrics import frechet_distance

    rng = np.random.default_rng(0)
    photos = [load_sample_image(name) for name in ("china.jpg", "flower.jpg")]
    crops = []
    for index in range(200):
        top, left = rng.integers(0, 427 - 64), rng.integers(0, 640 - 64)
        crops.append(photos[index % 2][top : top + 64, left : left + 64])
    x = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() / 127.5 - 1
    real, other = x[:100], x[100:]
    noise = torch.randn(other.shape, generator=torch.Generator().manual_seed(0))
    sets = {
        "floor": other,
        "noise 4": (other + noise * 4 / 127.5).clamp(-1, 1),
        "noise 25": (other + noise * 25 / 127.5).clamp(-1, 1),
        "blur 2": F.interpolate(F.avg_pool2d(other, 2), scale_factor=2.0, mode="bilinear"),
        "blur 4": F.interpolate(F.avg_pool2d(other, 4), scale_factor=4.0, mode="bilinear"),
    }
    wanted = lite0_features(real, network)["stage5"]
    found = {
        name: frechet_distance(lite0_features(images, network)["stage5"], wanted)
        for name, images in sets.items()
    }
    assert found["floor"] < found["noise 4"] < found["noise 25"]
    assert found["floor"] < found["blur 2"] < found["blur 4"]
