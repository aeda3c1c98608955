"""U-Nets of diffusers layer by layer: the same answer as whole, and the published points."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from coterie.backbones.taps import finish, lockstep
from coterie.core.errors import ConfigError, DataError
from coterie.core.prediction import Condition
from coterie.ensembles import AggregateConfig, AggregatorConfig
from coterie.interop.diffusers import DiffusersDenoiser
from coterie.process import PROCESSES

diffusers = pytest.importorskip("diffusers")
DDPM = PROCESSES.parse({"kind": "ddpm"}).build()
SMALL = AggregatorConfig(width=8, layers=2, heads=2, groups=4)
LATENT = {"sample_size": 16, "in_channels": 4, "out_channels": 4}


def stable(**changes: Any) -> Any:
    """Stable Diffusion 1.5 in small: its blocks and layers, 1 / 40 of its channels."""
    sizes = {"block_out_channels": (8, 16, 32, 32), "layers_per_block": 2, "norm_num_groups": 4}
    heads = {"cross_attention_dim": 12, "attention_head_dim": 4}
    return diffusers.UNet2DConditionModel(**{**LATENT, **sizes, **heads, **changes})


def plain() -> Any:
    return diffusers.UNet2DModel(
        **LATENT,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=4,
        resnet_time_scale_shift="scale_shift",
        downsample_type="resnet",
        upsample_type="resnet",
    )


def denoiser(network: Any) -> DiffusersDenoiser:
    return DiffusersDenoiser(network, DDPM, "eps").eval()


def asked(
    tokens: int = 5, width: int = 12, side: tuple[int, int] = (16, 16), classes: bool = True
) -> Any:
    rng = torch.Generator().manual_seed(0)
    mask = torch.ones(2, tokens, dtype=torch.bool)
    mask[1, 2:] = False
    seen = torch.randn(2, tokens, width, generator=rng)
    cond = Condition(tokens=seen, tokens_mask=mask, label=torch.tensor([1, 2]) if classes else None)
    return torch.randn(2, 4, *side, generator=rng), torch.tensor([0.3, 0.7]), cond


CASES: dict[str, tuple[Any, Any]] = {
    "stable diffusion": (stable, asked),
    "sides that do not halve": (stable, lambda: asked(side=(12, 20))),
    "classes": (lambda: stable(num_class_embeds=5), asked),
    "projected text": (lambda: stable(encoder_hid_dim=7), lambda: asked(width=7)),
    "linear projections": (lambda: stable(use_linear_projection=True), asked),
    "residual samplers": (plain, lambda: asked(classes=False)),
}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_layer_by_layer_is_the_network_to_the_bit(case: str) -> None:
    make, given = CASES[case]
    network = denoiser(make())
    assert torch.equal(finish(network.layers(*given())).value, network(*given()).value)


def test_stable_diffusion_has_25_points() -> None:
    """Wang et al. 2024: every layer on the way down with its downsampler, the middle, every layer
    on the way up but the last, and both ends."""
    names = [point.name for point in denoiser(stable()).topology().points]
    assert len(names) == 25
    assert [n for n in names if n.startswith("down.3")] == ["down.3.0", "down.3.1"]
    assert [n for n in names if n.startswith("up.3")] == ["up.3.0", "up.3.1"]
    assert names[0] == "conv_in" and names[13 - 1] == "mid" and names[-1] == "conv_out"
    assert [n for n in names if n.endswith("down")] == ["down.0.down", "down.1.down", "down.2.down"]


@torch.no_grad()
def test_skip_connections_carry_what_came_in() -> None:
    """Zeros in the place of every feature on the way down leave nothing of x."""
    network = denoiser(stable())

    def erased(x: torch.Tensor) -> torch.Tensor:
        def join(taps: Any) -> list[torch.Tensor]:
            ahead = taps[0].name.startswith(("conv_in", "down"))
            return [torch.zeros_like(taps[0].feature) if ahead else taps[0].feature]

        return lockstep([network.layers(x, *asked()[1:])], join)[0].value

    first, second = asked()[0], torch.randn(2, 4, 16, 16)
    assert torch.equal(erased(first), erased(second))


def test_text_encoders_of_their_own_give_tokens_of_their_own() -> None:
    networks = [denoiser(stable()) for _ in range(3)]
    fused = AggregateConfig(aggregator=SMALL, own_tokens=True).build(networks)
    x, t, _ = asked()
    rng = torch.Generator().manual_seed(1)
    tokens = torch.randn(2, 15, 12, generator=rng)
    with torch.no_grad():
        answer = fused(x, t, Condition(tokens=tokens)).value
        swapped = fused(x, t, Condition(tokens=tokens[:, [*range(5, 15), *range(5)]])).value
        assert answer.shape == x.shape and not torch.allclose(answer, swapped)
        shared = AggregateConfig(aggregator=SMALL).build(networks)
        same = fused(x, t, Condition(tokens=tokens[:, :5].repeat(1, 3, 1))).value
        assert torch.allclose(shared(x, t, Condition(tokens=tokens[:, :5])).value, same, atol=1e-6)
    with pytest.raises(DataError, match=r"cond\.tokens"):
        fused(x, t, Condition(tokens=tokens[:, :14]))
    with pytest.raises(DataError, match=r"cond\.tokens"):
        shared(x, t, Condition())


def test_what_cannot_run_by_layers_is_refused_by_name() -> None:
    other = stable(
        down_block_types=("SimpleCrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "SimpleCrossAttnUpBlock2D"),
        block_out_channels=(8, 16),
    )
    with pytest.raises(ConfigError, match=r"down_blocks\.0: 'SimpleCrossAttnDownBlock2D'"):
        denoiser(other).topology()
    with pytest.raises(ConfigError, match=r"members\.expert 1: point mid"):
        AggregateConfig().build([denoiser(stable()), denoiser(plain())])
    sdxl = stable(addition_embed_type="text", addition_embed_type_num_heads=4)
    with pytest.raises(ConfigError, match="addition_embed_type"):
        denoiser(sdxl).topology()
    transformer = torch.nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="network: 'Linear'"):
        DiffusersDenoiser(transformer, DDPM, "eps").topology()
