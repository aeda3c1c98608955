"""Parts of other packages, found by their entry points."""

from __future__ import annotations

import importlib.metadata
from types import SimpleNamespace
from typing import Any, Literal

import pytest

from coterie.core.errors import ConfigError
from coterie.core.registry import Part, Registry


def entries(registry: Registry) -> list[Any]:
    class Other(Part):
        kind: Literal["other"] = "other"

    def broken() -> None:
        raise ModuleNotFoundError("No module named 'gone'")

    def worse() -> None:
        raise RuntimeError("no card\nsecond line")

    package = SimpleNamespace(name="their-package")
    return [
        SimpleNamespace(name="broken", value="theirs:part", dist=package, load=broken),
        SimpleNamespace(name="worse", value="more:part", dist=None, load=worse),
        SimpleNamespace(
            name="other", value="own:part", dist=package, load=lambda: registry.register(Other)
        ),
    ]


def test_D6_a_plug_in_that_cannot_be_imported_is_named_and_the_rest_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    registry = Registry("toy", "toy.group")
    found = entries(registry)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: found)
    with pytest.warns(UserWarning) as told:
        assert registry.kinds() == ["other"]
    first, second = (str(one.message) for one in told)
    assert "'broken' of their-package is left out" in first and "No module named 'gone'" in first
    assert "'worse'" in second and "no card" in second and "second line" not in second
    with pytest.raises(ConfigError, match="left out: their-package"):
        registry.get("gone")
