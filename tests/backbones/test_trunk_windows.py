"""Which blocks of a trunk look through windows, on images and on nothing but text."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from coterie.backbones import DiTConfig, Trunk, TrunkConfig
from coterie.backbones.causal import TEXT_TRUNK, CausalConfig
from coterie.core.config import override
from coterie.core.context import Context
from coterie.core.errors import ConfigError

WIDTH, GRID = 16, (4, 4)


def config(**changes: Any) -> TrunkConfig:
    return TrunkConfig.from_dict({"width": WIDTH, "depth": 3, "heads": 2, **changes})


def trunk(**changes: Any) -> Trunk:
    torch.manual_seed(0)
    return Trunk(config(**changes), 16, GRID).double()


def inputs() -> tuple[torch.Tensor, Context]:
    rng = torch.Generator().manual_seed(0)
    z, embedding = (
        torch.randn(size, generator=rng, dtype=torch.float64) for size in ((2, 16, 16), (2, 16))
    )
    return z, Context(batch=2, tokens=16, embedding=embedding)


def heard(model: Trunk, block: int) -> int:
    """How many tokens feel a change of the first one through one block."""
    z, ctx = inputs()
    moved = z.clone()
    moved[:, 0] *= -1.0
    before, after = (model.blocks[block](x, ctx)[0] for x in (z, moved))
    return int((before != after).any(dim=2)[0].sum())


def test_only_the_named_blocks_have_windows() -> None:
    model = trunk(window=2, window_layers=(1, 2))
    assert [heard(model, block) for block in range(3)] == [16, 4, 4]
    assert [heard(trunk(window=2), block) for block in range(3)] == [4, 4, 4]
    assert [heard(trunk(), block) for block in range(3)] == [16, 16, 16]


def test_windows_change_no_parameter_and_the_widest_changes_nothing() -> None:
    plain, wide, narrow = trunk(), trunk(window=4), trunk(window=2)
    assert plain.state_dict().keys() == narrow.state_dict().keys()
    z, ctx = inputs()
    torch.testing.assert_close(wide(z, ctx)[0], plain(z, ctx)[0])
    assert (narrow(z, ctx)[0] - plain(z, ctx)[0]).abs().max() > 1e-3


def test_the_condition_may_have_another_width() -> None:
    model = Trunk(config(), 16, condition_width=6)
    assert model.blocks[0].modulation.weight.shape == (6 * WIDTH, 6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 0}, "window: 0"),
        ({"window": 2, "causal": True}, "window: 2 .*null.*one line"),
        ({"window": 2, "rotary": True}, "window: 2 .*null.*one line"),
        ({"window": 2, "window_layers": (0, 3)}, r"window_layers: 3 .*0\.\.2"),
    ],
)
def test_windows_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**changes)


def test_backbones_check_their_grid() -> None:
    fits = override(DiTConfig(), {"trunk.window": 2})
    assert fits.build().trunk.blocks[0].attention.windows.grid == fits.grid == (4, 4)
    with pytest.raises(ConfigError, match=r"trunk\.window: 3 .*\(4, 4\)"):
        override(DiTConfig(), {"trunk.window": 3})
    bidirectional = TEXT_TRUNK.replace(causal=False, rotary=False, window=2)
    with pytest.raises(ConfigError, match=r"trunk\.window: 2 .*no grid"):
        CausalConfig.from_dict({"trunk": bidirectional})
