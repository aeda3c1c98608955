"""Weather over photographs: identities, the scattering model, splits, determinism."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from coterie.core.errors import ConfigError
from coterie.data.images import photos
from coterie.data.images.photos import CROP, HELD_OUT, PHOTOS
from coterie.data.source import ArraySource
from coterie.data.worlds import weather
from coterie.data.worlds.weather import WEATHERS, WeatherConfig, WeatherSource

WEATHER_NAMES = tuple(WEATHERS)


def picture(seed: int = 0, side: int = 32) -> np.ndarray:
    return np.random.default_rng(seed).random((3, side, side))


@pytest.mark.parametrize("name", WEATHER_NAMES)
def test_no_strength_is_no_weather(name: str) -> None:
    clean = picture()
    np.testing.assert_allclose(WEATHERS[name](clean, 0.0, np.random.default_rng(1)), clean)


@pytest.mark.parametrize("name", WEATHER_NAMES)
def test_weather_is_a_function_of_its_generator_and_stays_in_range(name: str) -> None:
    clean = picture(2)
    one, same, other = (WEATHERS[name](clean, 1.0, np.random.default_rng(s)) for s in (3, 3, 4))
    assert np.array_equal(one, same) and not np.array_equal(one, other)
    assert np.abs(one - clean).mean() > 0.005
    assert one.min() >= -1e-9 and one.max() <= 1.1


def test_haze_hides_all_where_nothing_passes() -> None:
    clean = picture()
    assert (weather.haze_through(clean, np.zeros((32, 32)), 0.8) == 0.8).all()
    half = weather.haze_through(clean, np.full((32, 32), 0.5), 0.8)
    np.testing.assert_allclose(half, 0.5 * clean + 0.4)


def fake_photos(split: str) -> ArraySource:
    rng = np.random.default_rng(0 if split == "train" else 1)
    data = rng.integers(0, 255, (6, 3, CROP, CROP), dtype=np.uint8)
    config = photos.PhotosConfig()
    return ArraySource(
        "photos", "image", data, shape=config.shape(), licence="", transform=config.transform
    )


@pytest.fixture
def no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        photos.PhotosConfig, "build", lambda self, split="train": fake_photos(split)
    )


@pytest.mark.usefixtures("no_download")
def test_pairs_are_fixed_and_differ_between_splits() -> None:
    config = WeatherConfig(size=16, count=40)
    train, again, held_out = config.build(), config.build(), config.build("held_out")
    assert (len(train), len(held_out), train.shape) == (40, 4, (3, 16, 16))
    batch, same = train.get(np.arange(8)), again.get(np.arange(8))
    assert (batch.x == same.x).all() and (batch.cond.channels == same.cond.channels).all()
    assert batch.cond.label.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert train.class_names == WEATHER_NAMES and batch.x.abs().max() <= 1
    assert not (batch.x[:4] == held_out.get(np.arange(4)).x).all()
    for row in range(4):
        assert (batch.x[row] - batch.cond.channels[row]).abs().mean() > 0.003


@pytest.mark.usefixtures("no_download")
def test_a_prefix_of_a_longer_set_is_the_shorter_set() -> None:
    short, long = (WeatherSource(WeatherConfig(size=16, count=n), "train") for n in (6, 12))
    assert (short.get(np.arange(4)).cond.channels == long.get(np.arange(4)).cond.channels).all()


def test_crops_cover_a_photograph() -> None:
    pixels = np.zeros((100, 150, 3), np.uint8)
    pixels[:, 75:] = 255
    cut = photos.crops(Image.fromarray(pixels))
    assert cut.shape == (7 * 11, 3, CROP, CROP)
    assert cut[0].max() == 0 and cut[-1].min() == 255
    assert set(HELD_OUT) < set(PHOTOS) and len(PHOTOS) == 16


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"strength": (0.7, 0.2)}, r"strength.*low <= high"),
        ({"strength": (0.0, 1.5)}, r"strength"),
        ({"weathers": ()}, r"weathers"),
        ({"weathers": ("hail",)}, r"weathers.*hail"),
        ({"size": 97}, r"size: 97"),
    ],
)
def test_impossible_weather_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        WeatherConfig.from_dict(fields)
