"""DiT: patches, its start at exactly zero, what it refuses, and samples that stay apart."""

from __future__ import annotations

import pytest
import torch

from coterie.backbones import DiTConfig, TrunkConfig
from coterie.core.context import NULL_LABEL, Context
from coterie.core.errors import DataError
from coterie.core.prediction import Condition
from coterie.runs.build import build_model
from small_models import IMAGES, images, small, times, woken

SMALL = TrunkConfig(width=16, depth=2, heads=2)


def dit(**changes: object) -> tuple[DiTConfig, torch.nn.Module]:
    sizes = {"image_size": 8, "channels": 3, "patch": 2, "num_classes": 4, "trunk": SMALL}
    config = DiTConfig.from_dict({**sizes, **changes})
    torch.manual_seed(0)
    return config, config.build()


def context(batch: int) -> Context:
    return Context(batch=batch, tokens=0, time_input=1000 * times(batch))


def test_patches_are_read_row_by_row_with_channels_outermost() -> None:
    _, model = dit()
    x = torch.arange(2 * 3 * 8 * 8.0).reshape(2, 3, 8, 8)
    tokens = model._patchify(x)
    assert tokens.shape == (2, 16, 12)
    for row, column in ((0, 0), (0, 3), (2, 1), (3, 3)):
        patch = x[1, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        assert torch.equal(tokens[1, 4 * row + column], patch.flatten())


def test_unpatchify_inverts_patchify_for_both_halves() -> None:
    x, v = torch.randn(2, 2, 3, 8, 8)
    _, plain = dit()
    sample, none = plain._unpatchify(plain._patchify(x))
    assert torch.equal(sample, x) and none is None
    _, learned = dit(learned_variance=True)
    both = torch.cat([learned._patchify(x), learned._patchify(v)], dim=-1)
    sample, variance = learned._unpatchify(both)
    assert torch.equal(sample, x) and torch.equal(variance, v)


@pytest.mark.parametrize("patch", [1, 2, 4, 8])
@pytest.mark.parametrize("learned", [False, True])
def test_shapes_at_every_patch_size(patch: int, learned: bool) -> None:
    config, model = dit(patch=patch, learned_variance=learned)
    out = model(torch.randn(2, 3, 8, 8), context(2), Condition(label=torch.tensor([0, -1])))
    assert config.tokens == (8 // patch) ** 2 and config.sample_shape == (3, 8, 8)
    assert out.sample.shape == (2, 3, 8, 8)
    assert (out.variance is not None) is learned
    assert not learned or out.variance.shape == (2, 3, 8, 8)


@pytest.mark.parametrize("name", IMAGES)
def test_every_image_model_answers_exactly_zero_at_the_start(name: str) -> None:
    model = build_model(small(name)).eval()
    batch = images(4)
    out = model(batch.x, times(4), batch.cond)
    assert out.value.abs().max() == 0
    seen: list[torch.Tensor] = []
    trunk = model.backbone.trunk
    for block in trunk.blocks:
        block.register_forward_hook(lambda _, args, out: seen.extend((args[0], out[0])))
    model(batch.x, times(4), batch.cond)
    assert len(seen) == 2 * len(trunk.blocks)
    assert all(torch.equal(a, b) for a, b in zip(seen[::2], seen[1::2], strict=True))
    assert seen[0].abs().max() > 0


@pytest.mark.parametrize("name", IMAGES)
def test_a_sample_does_not_depend_on_its_batch_mates(name: str) -> None:
    model = woken(small(name)).double()
    batch, t = images(5), times(5)
    x = batch.x.double()
    with torch.no_grad():
        whole = model(x, t, batch.cond).value
        order = torch.tensor([4, 2, 0, 1, 3])
        shuffled = model(x[order], t[order], batch.cond.index(order)).value
        torch.testing.assert_close(shuffled, whole[order], rtol=1e-4, atol=1e-5)
        for i in (0, 3):  # with a label, and without
            rows = torch.tensor([i])
            alone = model(x[rows], t[rows], batch.cond.index(rows)).value
            torch.testing.assert_close(alone, whole[rows], rtol=1e-4, atol=1e-5)
    assert whole.abs().max() > 0.01


@pytest.mark.parametrize("name", IMAGES)
def test_a_broken_sample_does_not_spread(name: str) -> None:
    model = woken(small(name))
    batch, t = images(4), times(4)
    with torch.no_grad():
        whole = model(batch.x, t, batch.cond).value
        x = batch.x.clone()
        x[2, 0, 3, 3] = float("nan")
        broken = model(x, t, batch.cond).value
    keep = torch.tensor([0, 1, 3])
    assert broken[2].isnan().any()
    torch.testing.assert_close(broken[keep], whole[keep], rtol=1e-4, atol=1e-5)


def test_the_answer_depends_on_time_label_and_every_pixel() -> None:
    model = woken(small("dit"))
    batch, t = images(2, labels=[1, 1]), torch.tensor([0.5, 0.5])
    x = batch.x[:1].expand(2, 1, 8, 8).clone().requires_grad_(True)
    same = model(x, t, batch.cond).value
    torch.testing.assert_close(same[0], same[1])
    (gradient,) = torch.autograd.grad(same.square().sum(), x)
    assert (gradient.abs() > 0).all()
    later = model(x, torch.tensor([0.5, 0.6]), batch.cond).value
    assert (later[0] - later[1]).abs().max() > 1e-3
    for label in (2, NULL_LABEL):
        other = model(x, t, Condition(label=torch.tensor([1, label]))).value
        assert (other[0] - other[1]).abs().max() > 1e-3


def test_a_model_without_classes_needs_no_label_and_ignores_one() -> None:
    _, model = dit(num_classes=0)
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        model.head.weight.normal_()
    a = model(x, context(2), Condition())
    b = model(x, context(2), Condition(label=torch.tensor([0, 3])))
    assert torch.equal(a.sample, b.sample) and a.sample.abs().max() > 0


@pytest.mark.parametrize(
    ("shape", "label", "message"),
    [
        ((2, 1, 8, 8), [0, 1], r"x: \(2, 1, 8, 8\).*\[B, \(3, 8, 8\)\]"),
        ((2, 3, 8, 4), [0, 1], r"x: \(2, 3, 8, 4\)"),
        ((3, 8, 8), [0], r"x: \(3, 8, 8\)"),
        ((2, 3, 8, 8), [0, 4], r"label: 4 .*0\.\.3"),
        ((2, 3, 8, 8), [0, -2], r"label: -2"),
        ((2, 3, 8, 8), None, r"cond\.label: None .*B = 2"),
        ((2, 3, 8, 8), [0], r"cond\.label: \(1,\) .*B = 2"),
    ],
)
def test_inputs_that_do_not_fit_are_named(shape: tuple, label: list | None, message: str) -> None:
    _, model = dit()
    cond = Condition(label=None if label is None else torch.tensor(label))
    with pytest.raises(DataError, match=message):
        model(torch.zeros(shape), context(shape[0]), cond)
