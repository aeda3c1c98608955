"""Adapters on a model of diffusers: found by name, and its PEFT files are ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from coterie.adapters import (
    BasisConfig,
    LoraConfig,
    adapters_of,
    attach,
    load_adapter,
    merge,
    save_adapter,
)


def unet() -> Any:
    diffusers: Any = pytest.importorskip("diffusers")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return diffusers.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            cross_attention_dim=8,
            attention_head_dim=4,
            norm_num_groups=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ).eval()


def ask(model: Any) -> torch.Tensor:
    rng = torch.Generator().manual_seed(1)
    x, text = torch.randn(2, 4, 8, 8, generator=rng), torch.randn(2, 3, 8, generator=rng)
    with torch.no_grad():
        answer: torch.Tensor = model(x, torch.tensor([10, 500]), text).sample
    return answer


def test_a_unet_of_diffusers_takes_adapters(tmp_path: Path) -> None:
    model = unet()
    before = ask(model)
    targets = ("*.attn?.to_?", "*.to_out.0", "down_blocks.*.conv1")
    for index in range(2):
        config = LoraConfig(targets=targets, rank=2, basis=BasisConfig(index=index))
        attach(model, f"c{index}", config)
    assert torch.equal(ask(model), before)
    rng = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parts in adapters_of(model).values():
            for part in parts.values():
                for parameter in part.parameters():
                    parameter.add_(0.2 * torch.randn(parameter.shape, generator=rng))
    both = ask(model)
    assert not torch.allclose(both, before, atol=1e-3)
    again = unet()
    for name in ("c0", "c1"):
        load_adapter(again, name, save_adapter(model, name, tmp_path / name))
    torch.testing.assert_close(ask(again), both, rtol=1e-5, atol=1e-5)
    merge(model)
    torch.testing.assert_close(ask(model), both, rtol=1e-4, atol=1e-5)
