"""References: what an image attends to is the same at every step, so it is worked out once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from coterie.backbones import DiTConfig, SlotConfig, TrunkConfig
from coterie.cache import cached
from coterie.core.errors import ConfigError, DataError
from coterie.core.prediction import Condition
from coterie.core.rng import SampleNoise
from coterie.denoiser import DenoiserConfig
from coterie.solvers import GRIDS, SOLVERS, GuidanceConfig, Stepper, guide, initial_noise, sample

UNIFORM, STEPS = GRIDS.parse("uniform"), 4
EXPERTS = {"num_experts": 3, "experts": {"kind": "swiglu", "hidden": 16}}


def model(seed: int = 0, **trunk: Any) -> Any:
    config = DiTConfig.from_dict(
        {
            "image_size": 8,
            "patch": 2,
            "num_classes": 5,
            "references": {"kinds": 3, "image_size": 6},
            "trunk": TrunkConfig(width=32, depth=3, heads=4, **trunk),
        }
    )
    made = DenoiserConfig(backbone=config).build()
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng))
    return made.eval()


def asked(references: int = 2, batch: int = 2) -> Condition:
    rng = torch.Generator().manual_seed(1)
    return Condition(
        label=torch.arange(batch),
        references=torch.randn(batch, references, 1, 6, 6, generator=rng),
        reference_kinds=torch.arange(references).repeat(batch, 1),
    )


def noise(batch: int = 2) -> Tensor:
    return SampleNoise(range(batch)).normal((1, 8, 8))


def answer(made: Any, cond: Condition, t: float = 0.5) -> Tensor:
    x = noise(len(cond.tensors()["label"]))
    value: Tensor = made(x, torch.full((len(x),), t), cond).value
    return value


def drawn(denoiser: Any, cond: Condition, solver: str = "heun") -> Tensor:
    x = initial_noise(denoiser.process, (1, 8, 8), SampleNoise(range(2)))
    return sample(denoiser, x, cond, solver=SOLVERS.parse(solver), grid=UNIFORM, steps=STEPS)


class Calls:
    """How often references go through the blocks."""

    def __init__(self, made: Any) -> None:
        self.count = 0
        made.backbone.references.register_forward_hook(self)

    def __call__(self, *_: Any) -> None:
        self.count += 1


@pytest.mark.parametrize("kv_heads", [4, 2])
@torch.no_grad()
def test_samples_are_the_same_to_the_last_bit(kv_heads: int) -> None:
    made = model(
        kv_heads=kv_heads, qk_norm=True, slots=(SlotConfig.from_dict({"expert": EXPERTS}),)
    )
    times = UNIFORM.build(made.process, STEPS)
    kept = cached(made, times, caches=("references",))
    assert kept.caches == ("references",)
    calls = Calls(kept)
    assert torch.equal(drawn(kept, asked()), drawn(made, asked()))
    assert calls.count == 1
    everything = cached(made, times)
    assert everything.caches == ("modulation", "references")
    torch.testing.assert_close(drawn(everything, asked()), drawn(made, asked()), atol=1e-5, rtol=0)


@torch.no_grad()
def test_guidance_keeps_both_halves() -> None:
    made = model()
    kept = cached(made, UNIFORM.build(made.process, STEPS))
    calls = Calls(kept)
    config = GuidanceConfig(weight=3.0)
    one, two = (drawn(guide(which, config), asked()) for which in (made, kept))
    torch.testing.assert_close(two, one, atol=2e-5, rtol=1e-5)
    assert calls.count == 2
    # Without references' content, with their kinds: not the same as without references.
    null = asked().as_null(2)
    assert null.references is not None and not null.references.any()
    assert not torch.allclose(answer(made, null), answer(made, Condition(label=null.label)))


@torch.no_grad()
def test_samples_that_come_and_go_bring_their_references() -> None:
    made = model()
    kept = guide(cached(made, UNIFORM.build(made.process, STEPS)), GuidanceConfig(weight=2.0))
    calls = Calls(kept.denoiser)  # type: ignore[attr-defined]
    x, cond = noise(), asked()
    stepper = Stepper(kept, SOLVERS.parse("euler").build())
    grid = UNIFORM.build(made.process, STEPS)
    done: dict[int, Tensor] = {}
    for row in range(2):
        stepper.admit(x[row : row + 1], cond.index(torch.tensor([row])), [grid])
        done |= {one.id: one.x for one in stepper.step()}
    while len(stepper):
        done |= {one.id: one.x for one in stepper.step()}
    assert calls.count == 4
    together = drawn(guide(made, GuidanceConfig(weight=2.0)), cond, "euler")
    torch.testing.assert_close(torch.stack([done[0], done[1]]), together, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_what_an_image_sees_of_its_references() -> None:
    made = model().double()
    cond: Any = asked(3).map(lambda value: value.double() if value.is_floating_point() else value)

    def at(cond: Any, t: float = 0.5) -> Tensor:
        value: Tensor = made(noise().double(), torch.full((2,), t).double(), cond).value
        return value

    full = at(cond)
    swapped = torch.tensor([2, 0, 1])
    other = cond.replace(
        references=cond.references[:, swapped],
        reference_kinds=cond.reference_kinds[:, swapped],
    )
    torch.testing.assert_close(at(other), full)
    kinds = cond.reference_kinds.clone()
    kinds[:, 1] = -1
    absent = cond.replace(reference_kinds=kinds)
    left = torch.tensor([0, 2])
    fewer = cond.replace(
        references=cond.references[:, left],
        reference_kinds=cond.reference_kinds[:, left],
    )
    torch.testing.assert_close(at(absent), at(fewer))
    nobody = cond.replace(reference_kinds=torch.full_like(kinds, -1))
    none = cond.replace(references=None, reference_kinds=None)
    torch.testing.assert_close(at(nobody), at(none))
    for changed in (
        fewer,
        none,
        cond.replace(reference_kinds=1 - cond.reference_kinds.clamp(max=1)),
    ):
        assert float((at(changed) - full).abs().max()) > 1e-4
    # A reference's keys and values do not depend on the others.
    one = made.backbone.prepare(fewer).keys_values
    assert torch.equal(one[:, :, :, :9], made.backbone.prepare(cond).keys_values[:, :, :, :9])


def test_training_reaches_stem_and_kinds() -> None:
    made = model().train()
    answer(made, asked()).square().sum().backward()
    stem = made.backbone.references
    for parameter in (stem.patch_in.weight, stem.kind.table.weight):
        assert parameter.grad is not None and float(parameter.grad.abs().max()) > 0


def test_bad_input() -> None:
    for fields, message in (
        ({"trunk": {"rotary": True}}, "trunk.rotary"),
        ({"trunk": {"window": 2}}, "trunk.window"),
        ({"references": {"image_size": 7}}, "references.image_size: 7"),
        (
            {"trunk": {"slots": [{"expert": {**EXPERTS, "router": {"score": "noise_level"}}}]}},
            "a reference tells routers no",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            DiTConfig.from_dict({"image_size": 8, "patch": 2, "references": {}, **fields})
    made = model()
    for cond, message in (
        (asked().replace(references=torch.zeros(2, 2, 1, 8, 8)), r"cond\.references"),
        (asked().replace(reference_kinds=torch.zeros(2, 1).long()), r"cond\.reference_kinds"),
        (asked().replace(reference_kinds=torch.full((2, 2), 3)), "label: 3"),
    ):
        with pytest.raises(DataError, match=message):
            answer(made, cond)
    plain = DenoiserConfig(backbone=DiTConfig(image_size=8, patch=2)).build().eval()
    with pytest.raises(ConfigError, match="caches: 'references' is not allowed"):
        cached(plain, [0.5], caches=("references",))
