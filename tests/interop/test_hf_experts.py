"""Other experts in the place of theirs, and changes that do not fit."""

from __future__ import annotations

import pytest
import torch
from hand_layers import answer, gates_of
from hf_runs import experts_seen, logits_after
from tiny_hf_models import WIDTH
from torch import Tensor, nn

from coterie.core.errors import ConfigError
from coterie.core.routing import Routing
from coterie.experts import ExpertPool, RouterConfig
from coterie.experts.kinds import SwiGLU
from coterie.interop.transformers import MoESite, PoolExperts, find_moe_layers


def pool_of(site: MoESite) -> ExpertPool:
    pool = ExpertPool(SwiGLU(hidden=site.hidden), site.num_experts, site.width)
    with torch.no_grad():
        pool.gate_up.copy_(site.experts.gate_up_proj)
        pool.down.copy_(site.experts.down_proj)
    return pool


def test_a_pool_of_ours_in_the_place_of_their_experts(model_of) -> None:
    model = model_of("qwen2_moe")
    site = find_moe_layers(model)[0]
    before, theirs, names = logits_after(model), site.experts, list(model.state_dict())
    records: list[Routing] = []
    with site.tap(records.append):
        with site.replace_experts(pool_of(site)):
            torch.testing.assert_close(logits_after(model), before, rtol=1e-5, atol=1e-5)
            assert isinstance(site.experts, PoolExperts) and site.width == WIDTH
            assert [s.path for s in find_moe_layers(model)] == [
                "model.layers.0.mlp",
                "model.layers.1.mlp",
            ]
        logits_after(model)
    assert len(records) == 2 and torch.equal(records[0].ids, records[1].ids)
    assert site.experts is theirs and list(model.state_dict()) == names
    assert torch.equal(before, logits_after(model))


def test_merged_experts_serve_several_candidates(model_of) -> None:
    """Candidates 0..7 on 3 tensors; the router keeps its rows, gates of one tensor add up."""
    model = model_of("mixtral")
    site = find_moe_layers(model)[1]
    slots = (0, 1, 2, 0, 1, 2, 0, 1)
    pool = ExpertPool(SwiGLU(hidden=5), 3, WIDTH)
    records: list[Routing] = []
    with site.replace_experts(pool, slots), site.tap(records.append):
        seen, logits, _ = experts_seen(site)
        assert torch.equal(site.expert(4)[2], pool.down[1])
    gates = gates_of("mixtral", site.router, logits)
    assert records[0].ids.tolist() == [list(row) for row in gates]
    held = type(
        "Held", (), {"gate_up_proj": pool.gate_up[list(slots)], "down_proj": pool.down[list(slots)]}
    )
    expected = answer("mixtral", held, seen["h"], gates)
    torch.testing.assert_close(seen["y"].double(), expected, rtol=1e-5, atol=1e-5)


def test_any_module_of_the_same_call_may_stand_in(model_of) -> None:
    class Mean(nn.Module):
        def forward(self, h: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            return h * weights.sum(1, keepdim=True)

    site = find_moe_layers(model_of("olmoe"))[0]
    with site.replace_experts(Mean()):
        seen, logits, _ = experts_seen(site)
    total = [sum(row.values()) for row in gates_of("olmoe", site.router, logits)]
    expected = seen["h"].double() * torch.tensor(total)[:, None]
    torch.testing.assert_close(seen["y"].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s: s.edit_logits(torch.zeros(3)), r"edit: \(3,\) is not allowed; allowed: \[8\]"),
        (
            lambda s: s.reroute(RouterConfig.from_dict({"select": {"kind": "top_k", "k": 9}})),
            r"select\.k: 9 is not allowed",
        ),
        (lambda s: s.reroute(RouterConfig.from_dict({"unit": "sample"})), "a rule of tokens"),
        (
            lambda s: s.replace_experts(ExpertPool(SwiGLU(hidden=4), 3, WIDTH)),
            r"pool\.num_experts: 3 is not allowed; allowed: 8",
        ),
        (lambda s: s.replace_experts(ExpertPool(SwiGLU(hidden=4), 8, 4)), r"pool\.width: 4"),
        (
            lambda s: s.replace_experts(ExpertPool(SwiGLU(hidden=4), 3, WIDTH), [0] * 7),
            r"slot_map: 7 is not allowed; allowed: 8 entries",
        ),
        (
            lambda s: s.replace_experts(ExpertPool(SwiGLU(hidden=4), 3, WIDTH), [3] * 8),
            r"each in 0\.\.2",
        ),
        (lambda s: s.replace_experts(nn.Identity(), [0] * 8), "unless experts are a pool"),
    ],
)
def test_changes_that_do_not_fit_are_refused_at_once(model_of, change, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        change(find_moe_layers(model_of("mixtral"))[0])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s: s.edit_logits(lambda logits: logits[:, :3]), r"edited logits: \(24, 3\)"),
        (lambda s: s.edit_logits(lambda logits: None), "edited logits: 'NoneType'"),
        (lambda s: s.reroute(lambda r: r.replace(ids=r.ids[:, :1])), "ids and gates"),
        (lambda s: s.reroute(lambda r: r.replace(ids=r.ids + 2)), r"routing\.ids: \(\d, \d+\)"),
    ],
)
def test_functions_that_answer_nonsense_are_told_so(model_of, change, match: str) -> None:
    model = model_of("mixtral")
    site = find_moe_layers(model)[0]
    with change(site), pytest.raises(ConfigError, match=match):
        logits_after(model)
    assert not site.router._forward_hooks
