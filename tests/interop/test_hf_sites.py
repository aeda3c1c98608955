"""Expert layers of Hugging Face models: found, read and recorded as they are."""

from __future__ import annotations

import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from hand_layers import always_on, answer, gates_of, logits_of
from tiny_hf_models import EXPERTS, HIDDEN, KINDS, WIDTH, make_model, tokens
from torch import nn

from coterie.core.errors import ConfigError
from coterie.core.routing import Routing
from coterie.interop.transformers import MoESite, find_moe_layers, tap
from coterie.interop.transformers.selfcheck import inputs_for

PLACES = {
    "deepseek_v2": [("ffn", 1)],
    "deepseek_v3": [("ffn", 1)],
    "diffusion_gemma": [("encoder", 0), ("encoder", 1), ("decoder", 0), ("decoder", 1)],
}


class Watch:
    """What one layer really received and answered, by hooks of the test's own."""

    def __init__(self, site: MoESite) -> None:
        self.seen: dict[str, Any] = {}
        self.hooks = [
            site.router.register_forward_hook(lambda m, a, out: self.keep("router", a[0], out)),
            site.experts.register_forward_hook(lambda m, a, out: self.keep("experts", a[0], out)),
            site.block.register_forward_hook(lambda m, a, out: self.keep("block", a[0], out)),
        ]

    def keep(self, name: str, given: torch.Tensor, out: Any) -> None:
        self.seen[name] = (given.reshape(-1, WIDTH), out)

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()


@pytest.mark.parametrize("kind", KINDS)
def test_layers_are_found_with_their_rule(model_of, kind: str) -> None:
    sites = find_moe_layers(model_of(kind))
    assert [(s.slot, s.layer) for s in sites] == PLACES.get(kind, [("ffn", 0), ("ffn", 1)])
    for site in sites:
        assert site.kind == kind
        assert (site.num_experts, site.top_k) == (EXPERTS, 3)
        assert (site.width, site.hidden) == (WIDTH, HIDDEN)
        assert site.model.get_submodule(site.path) is site.block
    rule = sites[0].rule
    assert rule.renorm == (kind not in ("olmoe", "deepseek_v2"))
    assert rule.probability == ("sigmoid" if kind == "deepseek_v3" else "softmax")
    deepseek = kind.startswith("deepseek")
    assert (rule.groups, rule.top_groups, rule.scale) == ((4, 2, 1.5) if deepseek else (1, 1, 1.0))
    assert rule.selection_bias == (kind == "deepseek_v3")
    assert rule.expert_scale == (kind == "diffusion_gemma")
    assert (sites[0].shared is not None) == (deepseek or kind == "qwen2_moe")
    assert (sites[0].shared_gate is not None) == (kind == "qwen2_moe")


def test_an_expert_is_a_view_of_the_models_weights(model_of) -> None:
    site = find_moe_layers(model_of("mixtral"))[1]
    gate, up, down = site.expert(5)
    stack = site.experts.gate_up_proj
    assert torch.equal(torch.cat([gate, up]), stack[5]) and gate.shape == (HIDDEN, WIDTH)
    assert gate.untyped_storage().data_ptr() == stack.untyped_storage().data_ptr()
    assert torch.equal(down, site.experts.down_proj[5])
    with pytest.raises(ConfigError, match=r"expert: 8 is not allowed; allowed: 0\.\.7"):
        site.expert(8)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tap_records_what_a_layer_does_by_hand(model_of, kind: str) -> None:
    """Logits, order of choices, gates and the layer's output against the written-out formulas."""
    model = model_of(kind)
    records: list[Routing] = []
    sites = find_moe_layers(model)
    watches = [Watch(site) for site in sites]
    with torch.no_grad(), tap(sites, records.append):
        model(**inputs_for(model, tokens()))
    for watch in watches:
        watch.close()
    assert len(records) == len(sites)
    for site, watch, record in zip(sites, watches, records):
        x, h = watch.seen["router"][0], watch.seen["experts"][0]
        logits = logits_of(kind, site.router, x)
        expected = gates_of(kind, site.router, logits)
        assert (record.layer, record.slot, record.unit) == (site.layer, site.slot, "token")
        assert record.batch == (2, len(x) // 2)
        assert record.inputs is not None and torch.equal(record.inputs, x)
        torch.testing.assert_close(record.logits.double(), logits, rtol=0, atol=1e-5)
        assert record.ids.tolist() == [list(gates) for gates in expected]
        torch.testing.assert_close(
            record.gates.double(),
            torch.tensor([list(gates.values()) for gates in expected], dtype=torch.float64),
            rtol=0,
            atol=1e-5,
        )
        routed = answer(kind, site.experts, h, expected)
        if kind == "diffusion_gemma":
            out = watch.seen["experts"][1]
        else:
            routed = routed + always_on(kind, site.block, h)
            out = watch.seen["block"][1].reshape(-1, WIDTH)
        assert (out.double() - routed).abs().max() < 1e-5 * routed.abs().max().clamp_min(1)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_is_marked_and_not_counted(model_of, kind: str) -> None:
    model = model_of(kind)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, :5] = 0
    given = inputs_for(model, tokens())
    records: list[Routing] = []
    with torch.no_grad(), tap(model, records.append):
        model(**given, attention_mask=mask)
        if kind == "diffusion_gemma":
            given["decoder_attention_mask"] = torch.cat([mask, torch.ones(2, 8).long()], 1)
            given["decoder_attention_mask"][0, -1] = 0
            model(**given, attention_mask=mask)
    for record in records[:2]:
        assert record.mask is not None and record.mask.tolist() == mask.bool().flatten().tolist()
        assert record.counts().sum() == 3 * mask.sum()
    if kind == "diffusion_gemma":
        assert [r.mask is None for r in records] == [False, False, True, True] + [False] * 4
        assert records[-1].counts().sum() == 3 * 15


def test_a_mask_holds_for_its_own_pass_only(model_of) -> None:
    model, records = model_of("olmoe"), list[Routing]()
    with torch.no_grad(), tap(model, records.append):
        model(tokens(), torch.tensor([[1] * 12, [0] * 4 + [1] * 8]))  # by position
        model(tokens())
        model.model(tokens(), attention_mask=torch.ones(2, 12))  # the inner model alone
    found = [None if r.mask is None else int(r.mask.sum()) for r in records]
    assert found == [20, 20, None, None, 24, 24]


def test_decoding_with_a_cache_records_the_new_tokens(model_of) -> None:
    model, records = model_of("qwen3_moe"), list[Routing]()
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :2] = 0
    with torch.no_grad(), tap(model, records.append):
        model.generate(tokens(), attention_mask=mask, max_new_tokens=3, do_sample=False)
    assert [r.batch for r in records] == [(2, 12)] * 2 + [(2, 1)] * 4
    assert [int(r.rows_mask().sum()) for r in records] == [22] * 2 + [2] * 4


def test_nothing_is_left_behind(model_of) -> None:
    model = model_of("deepseek_v3")
    site = find_moe_layers(model)[0]
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    with site.tap(lambda routing: None), site.edit_logits(lambda logits: logits):
        assert site.router._forward_hooks
    for name, module in model.named_modules():
        assert module.__dict__.keys() == before[name].keys(), name
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_a_gate_whose_k_was_changed_is_read_as_it_is(model_of) -> None:
    site = find_moe_layers(model_of("olmoe"))[0]
    records: list[Routing] = []
    try:
        site.router.top_k = 5
        assert site.top_k == 5 and site.router_config().select.k == 5
        with site.tap(records.append), torch.no_grad():
            site.model(tokens())
    finally:
        site.router.top_k = 3
    assert records[0].ids.shape == (24, 5)
    assert (records[0].gates.diff(dim=1) <= 0).all()


def test_unknown_layers_are_refused_by_name(model_of) -> None:
    hf = pytest.importorskip("transformers")
    model = make_model("mixtral")
    model.model.layers[1].mlp.gate.__class__ = type("NovelRouter", (nn.Module,), {})
    with pytest.raises(
        ConfigError,
        match=r"layers\.1\.mlp: MixtralSparseMoeBlock with router "
        r"NovelRouter is of no known kind; known: mixtral, olmoe",
    ):
        find_moe_layers(model)
    small = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "head_dim": 8}
    oss = hf.GptOssConfig(
        **small,
        intermediate_size=8,
        num_local_experts=4,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    with pytest.raises(ConfigError, match="GptOss"):
        find_moe_layers(hf.AutoModelForCausalLM.from_config(oss))
    config = hf.SwitchTransformersConfig(
        vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2, num_experts=4
    )
    with pytest.raises(ConfigError, match="of no known kind"):
        find_moe_layers(hf.SwitchTransformersForConditionalGeneration(config))


def test_a_dense_model_says_so_and_an_odd_one_is_not_called_dense() -> None:
    hf = pytest.importorskip("transformers")
    config = hf.LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = hf.LlamaForCausalLM(config)
    with pytest.raises(ConfigError, match="LlamaForCausalLM: no MoE layers; this is a dense model"):
        find_moe_layers(model)
    config.num_local_experts = 8
    with pytest.raises(ConfigError, match="says num_local_experts=8, but no layer has a structure"):
        find_moe_layers(model)


def test_other_selections_of_deepseek_v2_are_refused(model_of) -> None:
    router = find_moe_layers(model_of("deepseek_v2"))[0].router
    try:
        router.topk_method = "noaux_tc"
        with pytest.raises(ConfigError, match="topk_method: 'noaux_tc' is not allowed"):
            _ = find_moe_layers(model_of("deepseek_v2"))[0].rule
    finally:
        router.topk_method = "group_limited_greedy"


def test_one_expert_per_row_raises_no_warning_while_it_is_only_watched() -> None:
    pytest.importorskip("transformers")
    model = make_model("mixtral", num_experts_per_tok=1)
    records: list[Routing] = []
    with warnings.catch_warnings(), tap(model, records.append), torch.no_grad():
        warnings.simplefilter("error")
        model(tokens())
    assert torch.equal(records[0].gates, torch.ones(24, 1))


def test_the_bridge_itself_loads_nothing_of_transformers() -> None:
    code = (
        "import sys; import coterie.interop.transformers, coterie.interop.transformers.report; "
        "print('transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
