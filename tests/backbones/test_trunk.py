"""The block's algebra with arbitrary masks, and configurations that do not fit together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from coterie.backbones import DiTConfig, Trunk, TrunkConfig
from coterie.backbones.causal import TEXT_TRUNK, CausalConfig
from coterie.backbones.trunk import Block, modulate
from coterie.core.config import override
from coterie.core.context import Context
from coterie.core.errors import ConfigError
from coterie.experts.layer import ExpertOutput

WIDTH, TOKENS, BATCH = 16, 5, 3
EXPERT = {"num_experts": 2, "experts": {"kind": "swiglu", "hidden": 4}}


def trunk_config(**changes: Any) -> TrunkConfig:
    return TrunkConfig.from_dict({"width": WIDTH, "depth": 3, "heads": 2, **changes})


def inputs(seed: int = 0) -> tuple[Tensor, Context]:
    rng = torch.Generator().manual_seed(seed)
    z = torch.randn(BATCH, TOKENS, WIDTH, generator=rng, dtype=torch.float64)
    embedding = torch.randn(BATCH, WIDTH, generator=rng, dtype=torch.float64)
    return z, Context(batch=BATCH, tokens=TOKENS, embedding=embedding)


class GivenMask(nn.Module):
    """Stands in the pre_block slot and answers y whatever it is asked."""

    def __init__(self, y: Tensor) -> None:
        super().__init__()
        self.y = y

    def forward(self, z: Tensor, ctx: Context) -> ExpertOutput:
        assert ctx.slot == "pre_block"
        return ExpertOutput(self.y, ())


def awake_block(**changes: Any) -> Block:
    torch.manual_seed(0)
    block = Trunk(trunk_config(**changes), TOKENS).double().blocks[0]
    assert isinstance(block, Block)
    return block


def branches(block: Block, u: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
    """What attention and the feed-forward network add when the block reads ``u``."""
    assert block.modulation is not None and ctx.embedding is not None
    parts = block.modulation(ctx.embedding * torch.sigmoid(ctx.embedding))
    shift1, scale1, gate1, shift2, scale2, gate2 = (
        parts[:, None, i * WIDTH : (i + 1) * WIDTH] for i in range(6)
    )
    attended = gate1 * block.attention(modulate(block.norm1(u), shift1, 1 + scale1))
    h = modulate(block.norm2(u + attended), shift2, 1 + scale2)
    return attended, gate2 * block.ffn(h)


def test_the_skip_is_exact_and_the_mask_gates_reading_only() -> None:
    block = awake_block()
    z, ctx = inputs()
    y = torch.randn(z.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    block.pre_block = GivenMask(y)
    out, routings = block(z, ctx)
    attended, fed = branches(block, (1 + y) * z, ctx)
    torch.testing.assert_close(out - z, attended + fed)
    assert routings == [] and (attended + fed).abs().max() > 0.01


def test_a_mask_of_one_is_no_mask() -> None:
    block = awake_block()
    z, ctx = inputs()
    plain, _ = block(z, ctx)
    block.pre_block = GivenMask(torch.zeros_like(z))
    assert torch.equal(block(z, ctx)[0], plain)


def test_closed_gates_leave_the_stream_alone_under_any_mask() -> None:
    block = awake_block()
    z, ctx = inputs()
    assert block.modulation is not None
    with torch.no_grad():  # shift and scale stay random; only the two gates are closed
        for start in (2, 5):
            block.modulation.weight[start * WIDTH : (start + 1) * WIDTH] = 0
            block.modulation.bias[start * WIDTH : (start + 1) * WIDTH] = 0
    block.pre_block = GivenMask(torch.full_like(z, -1.0))
    assert torch.equal(block(z, ctx)[0], z)


def test_masked_channels_are_felt_through_the_skip_only() -> None:
    block = awake_block()
    z, ctx = inputs()
    z.requires_grad_(True)
    y = torch.zeros_like(z)
    y[..., 10:] = -1.0
    block.pre_block = GivenMask(y)
    out, _ = block(z, ctx)
    weights = torch.randn(z.shape, generator=torch.Generator().manual_seed(4)).double()
    (gradient,) = torch.autograd.grad((out * weights).sum(), z)
    torch.testing.assert_close(gradient[..., 10:], weights[..., 10:])
    assert ((gradient - weights)[..., :10].abs() > 1e-6).float().mean() > 0.9


def test_every_block_is_the_identity_at_the_start() -> None:
    trunk = Trunk(trunk_config(slots=[{"slot": "ffn", "expert": EXPERT}]), TOKENS)
    trunk.reset_parameters()
    z, ctx = inputs()
    ctx = ctx.replace(embedding=ctx.embedding.float())
    out, routings = trunk(z.float(), ctx)
    assert torch.equal(out, z.float())
    assert [r.layer for r in routings] == [0, 1, 2]


@pytest.mark.parametrize(
    ("layers", "sites"),
    [
        ("all", [0, 1, 2]),
        ("odd", [1]),
        ("even", [0, 2]),
        ("except_first", [1, 2]),
        ((2, 0), [0, 2]),
    ],
)
def test_slots_stand_where_they_were_put(layers: Any, sites: list[int]) -> None:
    config = trunk_config(slots=[{"slot": "ffn", "layers": layers, "expert": EXPERT}])
    trunk = Trunk(config, TOKENS)
    has = [i for i, block in enumerate(trunk.blocks) if hasattr(block.ffn, "routers")]
    assert has == sites
    z, ctx = inputs()
    made = trunk(z.float(), ctx.replace(embedding=ctx.embedding.float()))[1]
    assert [(r.slot, r.layer) for r in made] == [("ffn", layer) for layer in sites]


def test_both_slots_of_a_block_may_be_taken_and_keep_their_losses_apart() -> None:
    balanced = {**EXPERT, "balance": [{"kind": "switch", "weight": 0.5}]}
    plain = {**EXPERT, "balance": [{"kind": "z_loss", "weight": 0.25}]}
    slots = [
        {"slot": "ffn", "layers": "odd", "expert": balanced},
        {"slot": "pre_block", "layers": "all", "expert": plain},
    ]
    trunk = Trunk(trunk_config(slots=slots), TOKENS)
    z, ctx = inputs()
    routings = trunk(z.float(), ctx.replace(embedding=ctx.embedding.float()))[1]
    found = [(item.name, item.layer, item.weight) for item in trunk.aux_losses(routings)]
    expected = [("switch", 1, 0.5), *(("z_loss", layer, 0.25) for layer in range(3))]
    assert found == expected


KERNELS = {"experts": "conv", "router": {"unit": "sample"}}
CHOICE = {**EXPERT, "router": {"select": {"kind": "expert_choice"}}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 3}, r"heads: 3 .*divisor of width = 16"),
        ({"kv_heads": 4}, r"kv_heads: 4 .*divisor of heads = 2"),
        (
            {"slots": [{"expert": EXPERT}, {"layers": "odd", "expert": EXPERT}]},
            r"slots\.1\.layers: 1 .*slots\.0 has it",
        ),
        ({"slots": [{"layers": [1, 1], "expert": EXPERT}]}, r"slots\.0\.layers: 1 .*slots\.0"),
        ({"slots": [{"layers": [3], "expert": EXPERT}]}, r"slots\.0\.layers: 3 .*blocks 0\.\.2"),
        ({"slots": [{"layers": [-1], "expert": EXPERT}]}, r"slots\.0\.layers: -1"),
        ({"slots": [{"slot": "conv", "expert": EXPERT}]}, r"slots\.0\.expert.*grids"),
        ({"slots": [{"slot": "conv", "expert": KERNELS}]}, r"slots\.0\.slot: 'conv'.*unet"),
        ({"slots": [{"expert": KERNELS}]}, r"slots\.0\.expert.*'conv'.*'ffn' reads tokens"),
        ({"slots": [{"names": ["*"], "expert": EXPERT}]}, r"slots\.0\.names: .*use layers"),
        ({"rotary": True, "width": 6}, r"heads: 2 .*even head width"),
        ({"causal": True, "slots": [{"expert": CHOICE}]}, r"router\.select.*see the future"),
        ({"slotz": []}, r"slotz.*did you mean 'slots'"),
        ({"depth": 0}, r"depth: 0"),
    ],
)
def test_trunks_that_cannot_be_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        trunk_config(**changes)


def test_errors_name_the_whole_path() -> None:
    slots = [{"layers": (9,), "expert": EXPERT}]
    with pytest.raises(ConfigError, match=r"^trunk\.slots\.0\.layers: 9 "):
        DiTConfig.from_dict({"trunk": {"depth": 2, "slots": slots}})
    with pytest.raises(ConfigError, match=r"^trunk\.heads: 7 "):
        override(DiTConfig(), {"trunk.heads": 7})
    with pytest.raises(ConfigError, match=r"^patch: 5 .*divisor of image_size = 28"):
        DiTConfig.from_dict({"patch": 5})
    with pytest.raises(ConfigError, match=r"^trunk\.modulation: 'adaln_zero'"):
        CausalConfig(trunk=TEXT_TRUNK).replace(trunk=TrunkConfig())


def pooled(reuse: int, depth: int = 5, layers: Any = "all", **expert: Any) -> Trunk:
    torch.manual_seed(0)
    slot = {"layers": layers, "reuse": reuse, "expert": {**EXPERT, **expert}}
    made = Trunk(trunk_config(depth=depth, slots=[slot]), TOKENS)
    made.reset_parameters()
    for parameter in made.parameters():  # open the gates, so that every layer speaks
        parameter.data.add_(0.02 * torch.randn(parameter.shape))
    return made.double()


def test_a_pool_is_owned_once_by_the_layers_of_its_group() -> None:
    trunk, plain = pooled(2), pooled(1)
    first, second, last = (layer.pool for layer in trunk.expert_layers()[::2])
    assert list(trunk.pools) == [first, second, last]
    assert [pool.num_experts for pool in trunk.pools] == [4, 4, 2]
    layers = trunk.expert_layers()
    assert layers[0].pool is layers[1].pool and layers[1].pool is not layers[2].pool
    assert [layer.pool_layers for layer in layers] == [(0, 1), (0, 1), (2, 3), (2, 3), (4,)]
    extra = 4 * (2 - 1) * 2 * WIDTH  # four layers see as many candidates again
    assert sum(p.numel() for p in trunk.parameters()) == extra + sum(
        p.numel() for p in plain.parameters()
    )
    names = [name for name in trunk.state_dict() if "gate_up" in name]
    assert names == ["pools.0.gate_up", "pools.1.gate_up", "pools.2.gate_up"]


def test_layers_say_whose_experts_they_choose_among() -> None:
    routings = pooled(2, layers=(1, 2, 4))(*inputs())[1]
    assert [(r.layer, r.num_experts, r.pool_layers) for r in routings] == [
        (1, 4, (1, 2)), (2, 4, (1, 2)), (4, 2, (4,)),
    ]  # fmt: skip
    own = {
        "router": {
            "select": {"kind": "top_k", "k": 1},
            "edits": [{"kind": "candidates", "own": True}],
        }
    }
    kept = pooled(2, layers=(1, 2), **own)(*inputs())[1]
    assert kept[0].ids.max() <= 1 and kept[1].ids.min() >= 2


def test_own_candidates_alone_are_a_plain_layer() -> None:
    own = {"router": {"edits": [{"kind": "candidates", "own": True}]}}
    plain, shared = pooled(1, depth=4), pooled(2, depth=4, **own)
    state = {n: v for n, v in plain.state_dict().items() if "routers" not in n and "pool" not in n}
    shared.load_state_dict(state, strict=False)
    with torch.no_grad():
        for place, (a, b) in enumerate(zip(plain.expert_layers(), shared.expert_layers())):
            rows = slice(2 * (place % 2), 2 * (place % 2) + 2)
            b.router(0).score.proj.weight[rows] = a.router(0).score.proj.weight
            for name, stack in b.pool.stacks().items():
                stack[rows] = a.pool.stacks()[name]
    z, ctx = inputs()
    torch.testing.assert_close(shared(z, ctx)[0], plain(z, ctx)[0], atol=1e-7, rtol=0)


def test_a_pooled_balance_counts_the_layers_of_a_pool_together() -> None:
    trunk = pooled(2, depth=3, balance=[{"kind": "switch", "pooled": True}, {"kind": "switch"}])
    routings = trunk(*inputs())[1]
    found = {aux.key: float(aux.value.detach()) for aux in trunk.aux_losses(routings)}
    assert list(found) == [
        "switch_pooled/layer0", "switch/layer0", "switch/layer1", "switch_pooled/layer2",
        "switch/layer2",
    ]  # fmt: skip
    rows = [routings[0], routings[1]]
    f = sum(r.counts() for r in rows) / sum(r.counts().sum() for r in rows)
    p = torch.cat([r.probs for r in rows]).mean(0)
    assert found["switch_pooled/layer0"] == pytest.approx(4 * (f * p).sum().item(), rel=1e-5)


RECURRENT = {"router": {"score": {"kind": "recurrent", "state": 3}}}


def test_one_memory_serves_the_layers_of_a_slot_and_skips_dense_blocks() -> None:
    trunk = pooled(1, layers="even", **RECURRENT)
    memories = {id(layer.router(0).score.memory) for layer in trunk.expert_layers()}
    assert len(memories) == 1
    z, ctx = inputs()
    routings = trunk(z, ctx)[1]
    assert [r.layer for r in routings] == [0, 2, 4]
    loss = routings[-1].logits.square().sum()
    loss.backward()
    assert trunk.expert_layers()[0].router(0).score.inner.weight.grad.abs().max() > 0


def test_router_states_of_two_slots_do_not_mix() -> None:
    small = {"slot": "pre_block", "layers": (0, 1)}
    small["expert"] = {**EXPERT, "router": {"score": {"kind": "recurrent", "state": 2}}}
    large = {"slot": "ffn", "layers": (0, 1), "expert": {**EXPERT, **RECURRENT}}
    routings = Trunk(trunk_config(slots=[small, large]), TOKENS).double()(*inputs())[1]
    assert [(r.slot, r.state.shape[1]) for r in routings] == [("pre_block", 2), ("ffn", 3)] * 2


def test_an_answer_may_replace_the_stream() -> None:
    """CoE's released block: what comes out is the last round, RMSNorm(s) + its experts."""
    expert = {**EXPERT, "answer": "output"}
    slot = {"expert": expert, "residual": False}
    plain = trunk_config(depth=1, modulation="none", norm="rms", slots=[slot])
    block = Trunk(plain, TOKENS).double().blocks[0]
    z, ctx = inputs()
    middle = block.norm2(z + block.attention(block.norm1(z), None))
    want = middle + block.ffn.combine(middle, block.ffn.router(0)(middle, ctx))
    torch.testing.assert_close(block(z, ctx)[0], want)


@pytest.mark.parametrize(
    ("slot", "message"),
    [
        ({"reuse": 4}, r"slots\.0\.reuse: 4 .*1\.\.3"),
        ({"reuse": 0}, r"slots\.0\.reuse"),
        ({"reuse": 2, "expert": {"slot_map": [0, 0]}}, "reuse: 2 .*merged"),
        ({"residual": False}, r"slots\.0\.residual.*gate starts at zero"),
        ({"residual": False, "slot": "pre_block"}, r"residual.*only ffn"),
        ({"expert": {"rounds": 0}}, r"rounds"),
    ],
)
def test_pools_and_residuals_that_cannot_be(slot: dict[str, Any], message: str) -> None:
    expert = {**EXPERT, **slot.pop("expert", {})}
    with pytest.raises(ConfigError, match=message):
        trunk_config(slots=[{**slot, "expert": expert}])
