"""Layers of Hugging Face models as ours and back, and the check that we read them rightly."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tiny_hf_models import EXPERTS, KINDS, WIDTH, make_model, tokens
from torch import Tensor

from coterie.adapters import LoraConfig, LowRank, attach, merge
from coterie.core.context import Context
from coterie.core.errors import ConfigError
from coterie.experts import ExpertLayer, ExpertPool
from coterie.experts.kinds import SwiGLU
from coterie.interop.transformers import (
    MismatchError,
    MoESite,
    find_moe_layers,
    selfcheck,
)
from coterie.interop.transformers.selfcheck import inputs_for


def layer_io(site: MoESite) -> tuple[Tensor, Tensor]:
    """What the layer read and answered: the block, or its experts where the block does more."""
    seen: dict[str, Tensor] = {}
    module = site.experts if site.kind == "diffusion_gemma" else site.block
    hook = module.register_forward_hook(lambda m, a, out: seen.update(x=a[0], y=out))
    with torch.no_grad():
        site.model(**inputs_for(site.model, tokens()))
    hook.remove()
    return seen["x"].reshape(2, -1, WIDTH), seen["y"].reshape(2, -1, WIDTH)


def run(layer: ExpertLayer, x: Tensor) -> Any:
    with torch.no_grad():
        return layer(x, Context(x.shape[0], x.shape[1]))


@pytest.mark.parametrize("kind", KINDS)
def test_our_layer_gives_equal_outputs_and_choices(model_of, kind: str) -> None:
    for site in find_moe_layers(model_of(kind)):
        records: list[Any] = []
        with site.tap(records.append):
            x, y = layer_io(site)
        out = run(site.to_expert_layer(), x)
        assert (out.y - y).abs().max() < 1e-5 * y.abs().max().clamp_min(1)
        (routing,) = out.routings
        assert torch.equal(routing.ids, records[0].ids)
        torch.testing.assert_close(routing.gates, records[0].gates, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_converted_layer_is_a_copy_with_its_own_gradients(model_of, kind: str) -> None:
    site = find_moe_layers(model_of(kind))[-1]
    before = {name: value.clone() for name, value in site.model.state_dict().items()}
    layer = site.to_expert_layer()
    x, _ = layer_io(site)
    layer(x, Context(2, x.shape[1])).y.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(1.0)
    for name, value in site.model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_of_ours_is_written_back(kind: str) -> None:
    """A layer with other weights, put into their model, makes theirs answer like ours."""
    pytest.importorskip("transformers")
    model = make_model(kind)
    site = find_moe_layers(model)[-1]
    layer = site.to_expert_layer()
    rng = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for value in [*layer.parameters(), *layer.buffers()]:
            value.add_(torch.randn(value.shape, generator=rng).mul(0.1))
    x, y = layer_io(site)
    held = [parameter.data_ptr() for parameter in model.parameters()]
    site.load_expert_layer(layer)
    assert [parameter.data_ptr() for parameter in model.parameters()] == held
    x, after = layer_io(site)
    assert (after - y).abs().max() > 0.01
    assert (run(layer, x).y - after).abs().max() < 2e-5 * after.abs().max().clamp_min(1)
    selfcheck(model)


def test_a_written_model_survives_saving(tmp_path) -> None:
    """Files of transformers hold one expert each under the old names; they are fused at loading."""
    hf = pytest.importorskip("transformers")
    model = make_model("deepseek_v2")
    site = find_moe_layers(model)[0]
    layer = site.to_expert_layer()
    with torch.no_grad():
        layer.pool.down.mul_(2.0)
    site.load_expert_layer(layer)
    model.save_pretrained(tmp_path)
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)
    assert torch.equal(find_moe_layers(again)[0].expert(3)[2], layer.pool.down[3])


def test_types_are_kept_and_routers_stay_float32() -> None:
    pytest.importorskip("transformers")
    model = make_model("deepseek_v3", moe_intermediate_size=16).to(torch.bfloat16)
    site = find_moe_layers(model)[0]
    layer = site.to_expert_layer()
    assert layer.pool.down.dtype == torch.bfloat16
    assert layer.router(0).selection_bias is not None
    assert layer.router(0).selection_bias.dtype == torch.float32
    x, y = layer_io(site)
    assert (run(layer, x).y.float() - y.float()).abs().max() < 0.05 * y.float().abs().max()


def test_what_does_not_convert_is_refused(model_of) -> None:
    site = find_moe_layers(model_of("mixtral"))[0]
    pool = ExpertPool(SwiGLU(hidden=4), EXPERTS, WIDTH)
    match = "its experts are replaced; undo that first"
    with site.replace_experts(pool), pytest.raises(ConfigError, match=match):
        site.to_expert_layer()
    other = site.to_expert_layer().config.replace(num_experts=4).build(WIDTH)
    with pytest.raises(ConfigError, match=r"layers\.0\.mlp: the layer's configuration is not"):
        site.load_expert_layer(other)
    config = site.experts.config
    try:
        config.hidden_act = "relu"
        with pytest.raises(ConfigError, match="activation: 'relu' is not allowed; allowed: silu"):
            site.to_expert_layer()
    finally:
        config.hidden_act = "silu"


def test_shared_experts_with_biases_are_refused() -> None:
    pytest.importorskip("transformers")
    model = make_model("deepseek_v2", mlp_bias=True)
    (site,) = find_moe_layers(model)
    with pytest.raises(ConfigError, match="shared experts with biases"):
        site.to_expert_layer()
    assert selfcheck(model)[0].error < 1e-5  # read all the same


def test_a_zero_in_the_norm_before_the_experts_is_refused() -> None:
    pytest.importorskip("transformers")
    site = find_moe_layers(make_model("diffusion_gemma"))[0]
    with torch.no_grad():
        site.block.pre_feedforward_layernorm_2.weight[3] = 0.0
    with pytest.raises(ConfigError, match="the router reads dimensions that the experts do not"):
        site.to_expert_layer()


@pytest.mark.parametrize("kind", KINDS)
def test_selfcheck_agrees_with_every_class(model_of, kind: str) -> None:
    checks = selfcheck(model_of(kind))
    assert len(checks) == len(find_moe_layers(model_of(kind)))
    assert max(check.error for check in checks) < 2e-6
    assert not any(module._forward_hooks for module in model_of(kind).modules())


def test_selfcheck_allows_short_types_their_rounding() -> None:
    pytest.importorskip("transformers")
    model = make_model("qwen3_moe", moe_intermediate_size=16).to(torch.bfloat16)
    checks = selfcheck(model)
    assert 1e-4 < max(check.error for check in checks) < 5e-2
    with pytest.raises(MismatchError):
        selfcheck(model, tolerance=1e-5)


TENSORS = {
    "experts": lambda site: site.experts.down_proj,
    "router": lambda site: site.router_weight,
    "shared": lambda site: site.shared.up_proj.weight,
    "shared gate": lambda site: site.shared_gate.weight,
    "bias": lambda site: site.router.e_score_correction_bias,
    "scale": lambda site: site.router.per_expert_scale,
}
PARTS = [
    *((kind, name) for kind in KINDS for name in ("experts", "router")),
    *((kind, "shared") for kind in ("qwen2_moe", "deepseek_v2", "deepseek_v3")),
    *(("qwen2_moe", "shared gate"), ("deepseek_v3", "bias"), ("diffusion_gemma", "scale")),
]


@pytest.mark.parametrize(("kind", "name"), PARTS)
def test_selfcheck_sees_a_weight_changed_on_one_side(kind: str, name: str) -> None:
    """The model computes with a changed tensor, which is put back before it is read again."""
    pytest.importorskip("transformers")
    model = make_model(kind)
    site = find_moe_layers(model)[0]
    tensor = TENSORS[name](site)
    original = tensor.detach().clone()
    # The holder's own hooks stand first and last around the use of the tensor.
    holders = {"experts": site.experts, "shared": site.shared, "shared gate": site.shared_gate}
    holder = holders.get(name, site.router)

    def change(module: Any, args: Any) -> None:
        with torch.no_grad():
            tensor.view(-1)[::3] += 0.5

    def restore(module: Any, args: Any, output: Any) -> None:
        with torch.no_grad():
            tensor.copy_(original)

    holder.register_forward_pre_hook(change)
    holder.register_forward_hook(restore)
    with pytest.raises(MismatchError, match=rf"{site.path}: not computed as {kind} layers"):
        selfcheck(model)


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        ("olmoe", "norm_topk_prob", True),
        ("deepseek_v2", "routed_scaling_factor", 1.0),
        ("deepseek_v3", "topk_group", 3),
        ("mixtral", "top_k", 2),
    ],
)
def test_selfcheck_sees_another_rule(kind: str, name: str, value: Any) -> None:
    pytest.importorskip("transformers")
    model = make_model(kind)
    router = find_moe_layers(model)[-1].router
    before = getattr(router, name)
    router.register_forward_pre_hook(lambda m, a: setattr(m, name, value))
    router.register_forward_hook(lambda m, a, out: setattr(m, name, before))
    with pytest.raises(MismatchError):
        selfcheck(model)


def test_selfcheck_refuses_what_is_not_a_number_or_not_theirs() -> None:
    pytest.importorskip("transformers")
    model = make_model("mixtral")
    site = find_moe_layers(model)[1]
    with site.edit_logits(torch.ones(EXPERTS).cumsum(0)), pytest.raises(MismatchError):
        selfcheck(model)
    replaced = site.replace_experts(torch.nn.Identity())
    with replaced, pytest.raises(MismatchError, match="its experts are replaced"):
        selfcheck(model)
    with replaced, pytest.raises(ConfigError, match=r"mlp: its experts are replaced by Identity"):
        site.expert(0)
    model.train()
    selfcheck(model)
    assert all(module.training for module in model.modules())
    with torch.no_grad():
        site.experts.down_proj[:] = math.nan
    with pytest.raises(MismatchError, match=r"output (inf|nan)"):
        selfcheck(model)


@pytest.mark.parametrize("part", ["shared_expert.up_proj", "shared_expert_gate", "gate_proj"])
def test_B6_an_adapter_on_the_layer_is_not_left_behind(part: str) -> None:
    """Refused while it acts, carried along once it is merged."""
    pytest.importorskip("transformers")
    model = make_model("qwen2_moe")
    site = find_moe_layers(model)[0]
    parts = attach(model, "own", LoraConfig(targets=(f"*layers.0.mlp.*{part}",), rank=1))
    with torch.no_grad():
        for added in parts.values():
            assert isinstance(added, LowRank)
            added.up.add_(1.0)
    match = r"layers\.0\.mlp\.shared_expert.*adapters\.parts.* has no place in ours; merge or det"
    layer = find_moe_layers(make_model("qwen2_moe"))[0].to_expert_layer()
    for change in (site.to_expert_layer, lambda: site.load_expert_layer(layer)):
        with pytest.raises(ConfigError, match=match):
            change()
    x, y = layer_io(site)
    merge(model)
    assert (run(site.to_expert_layer(), x).y - y).abs().max() < 1e-5 * y.abs().max()


def test_B6_noise_edits_and_hooks_are_not_left_behind() -> None:
    pytest.importorskip("transformers")
    site = find_moe_layers(make_model("mixtral", router_jitter_noise=0.1))[0]
    with pytest.raises(ConfigError, match=r"mlp: jitter_noise: 0\.1 is not allowed; allowed: 0"):
        site.to_expert_layer()
    site.block.jitter_noise = 0.0
    with (
        site.edit_logits(torch.ones(EXPERTS)),
        pytest.raises(ConfigError, match="routing is chang"),
    ):
        site.to_expert_layer()
    with site.tap(lambda routing: None):
        site.to_expert_layer()
    hook = site.experts.register_forward_hook(lambda m, a, out: 2 * out)
    with pytest.raises(ConfigError, match=r"layers\.0\.mlp\.experts: a hook acts on it; remove"):
        site.to_expert_layer()
    hook.remove()
    site.to_expert_layer()
