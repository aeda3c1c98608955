"""Configurations of networks of diffusers that do not agree with the files beside them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny_diffusers_networks as tiny
import torch

from coterie.core import memory
from coterie.core.errors import ConfigError
from coterie.interop.diffusers import load_noise_ranges
from coterie.interop.diffusers.expert import DiffusersConfig, DiffusersNetworkConfig


@pytest.fixture(autouse=True)
def library() -> None:
    pytest.importorskip("diffusers")


@pytest.mark.parametrize("kind", ["../evil", "UNet2DConditionModel", ["UNet2DModel"], 7, ""])
def test_A1_a_network_of_two_classes_is_refused(tmp_path: Path, kind: Any) -> None:
    tiny.saved(tiny.plain_unet(), tmp_path, _class_name=kind)
    where = re.escape(str(tmp_path / "unet" / "config.json"))
    said = rf"^{where}: _class_name: {re.escape(repr(kind))} .*says 'UNet2DModel'$"
    for work in (DiffusersConfig(path=str(tmp_path)).build, lambda: load_noise_ranges(tmp_path)):
        with pytest.raises(ConfigError, match=said):
            work()


def test_A1_the_index_names_the_class_of_a_network_that_does_not(tmp_path: Path) -> None:
    tiny.saved(tiny.plain_unet(), tmp_path, _class_name=None)
    made = DiffusersConfig(path=str(tmp_path)).build()
    assert type(made.network).__name__ == "UNet2DModel"


@pytest.mark.parametrize("width", [1024, 4_000_000, 2**40, 2**62])
def test_G10_a_network_larger_than_its_file_is_never_made(
    tmp_path: Path, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, devices = tiny.there().UNet2DModel, []
    make = kind.from_config

    def watched(config: dict[str, Any]) -> Any:
        devices.append(torch.get_default_device().type)
        return make(config)

    tiny.saved(tiny.plain_unet(), tmp_path, block_out_channels=[8, width])
    where = re.escape(str(tmp_path / "unet" / "config.json"))
    monkeypatch.setattr(kind, "from_config", watched)
    for work in (DiffusersConfig(path=str(tmp_path)).build, lambda: load_noise_ranges(tmp_path)):
        with pytest.raises(
            ConfigError, match=rf"^{where}: UNet2DModel: .*block_out_channels"
        ) as error:
            work()
        assert "\n" not in str(error.value)
        if width < 2**40:
            said = "iB are needed; .*iB, 64.0 MiB or 4 times diffusion_pytorch_model.safetensors"
            assert re.search(said, str(error.value))
    assert devices == ["meta", "meta"]


def test_G10_a_network_without_weights_is_counted_against_the_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network = json.loads(tiny.plain_unet().to_json_string())
    assert DiffusersNetworkConfig(network=network).build().network is not None
    monkeypatch.setattr(memory, "memory_bytes", lambda: 2**12)
    with pytest.raises(ConfigError, match=r"^UNet2DModel: .*allowed: 0\.0 MiB, what this machine"):
        DiffusersNetworkConfig(network=network).build()
