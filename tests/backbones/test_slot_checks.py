"""Expert systems that cannot stand in a trunk; routers that nobody would tell what they read."""

from __future__ import annotations

from typing import Any

import pytest

from coterie.backbones import CausalConfig, TrunkConfig
from coterie.backbones.causal import TEXT_TRUNK
from coterie.core.errors import ConfigError
from coterie.denoiser import DenoiserConfig, TokenDenoiserConfig
from coterie.runs.build import build_source
from coterie.runs.config import RunConfig

EXPERT = {"num_experts": 4, "experts": {"kind": "swiglu", "hidden": 4}}


def trunk(*slots: dict[str, Any], **fields: Any) -> TrunkConfig:
    made = [{**slot, "expert": {**EXPERT, **slot.get("expert", {})}} for slot in slots]
    return TrunkConfig.from_dict({"width": 8, "depth": 3, "heads": 2, "slots": made, **fields})


def routed(**router: Any) -> dict[str, Any]:
    return {"expert": {"router": router}}


@pytest.mark.parametrize(
    "slot, message",
    [
        (routed(score="given"), r"slots\.0\.expert\.router\.score\.kind: 'given' .*8 experts"),
        ({"reuse": 2, **routed(edits=[{"kind": "progressive", "start": 5}])},
         r"slots\.0\.expert\.router\.edits\.0\.start: 5 .*1\.\.4; a layer owns 4"),
        ({"reuse": 4}, r"slots\.0\.reuse: 4 .*1\.\.3"),
        ({"expert": {"experts": "affine", "num_experts": None}}, r"num_experts: None .*number"),
        ({"residual": False, "expert": {"experts": "channel_window", "num_experts": None}},
         r"residual: False .*ignore what the block reads"),
    ],
)  # fmt: skip
def test_slots_that_cannot_be(slot: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        trunk(slot, modulation="none")


def test_a_pool_is_checked_with_the_experts_of_all_its_layers() -> None:
    """Width 8 is the logits of 8 candidates: of two layers with 4 experts each."""
    trunk({"reuse": 2, "layers": (0, 1), **routed(score="given")})
    with pytest.raises(ConfigError, match=r"score\.kind: 'given' .*8 experts"):
        trunk({"reuse": 2, **routed(score="given")})  # the third layer's pool is its own


@pytest.mark.parametrize("other", [{"state": 2}, {"state": 3, "unit": "sample"}])
def test_a_state_travels_through_one_slot_in_one_shape(other: dict[str, Any]) -> None:
    unit = other.pop("unit", "token")
    first = {"layers": (0,), **routed(score={"kind": "recurrent", "state": 3})}
    second = {"layers": (1,), **routed(score={"kind": "recurrent", **other}, unit=unit)}
    with pytest.raises(ConfigError, match=r"slots\.1\.expert\.router\.score\.state: .*3 values"):
        trunk(first, second)
    trunk(first, {**second, "slot": "pre_block"})  # another slot has its own state
    trunk(first, {"layers": (1,)})  # what has no state passes it on


@pytest.mark.parametrize(
    "router, missing",
    [
        ({"score": "noise_level"}, "time_embedding"),
        ({"score": {"kind": "recurrent", "start": "time"}}, "time_embedding"),
        ({"score": {"kind": "fixed", "by": "modality"}}, "modality"),
        ({"score": {"kind": "fixed", "by": "sample"}}, "sample_ids"),
    ],
)
def test_a_text_router_may_read_what_text_models_tell(router: dict[str, Any], missing: str) -> None:
    data = TEXT_TRUNK.model_dump(mode="json")
    slot = {"expert": {**EXPERT, "router": router}}
    where = r"^trunk\.slots\.0\.expert\.router\.score: "
    with pytest.raises(ConfigError, match=rf"{where}.*tells routers no {missing}"):
        CausalConfig.from_dict({"trunk": {**data, "slots": [slot]}})


@pytest.mark.parametrize(
    "router, where",
    [
        ({"score": {"kind": "task_linear", "num_tasks": 2}}, r"score: 'task_linear'"),
        ({"edits": [{"kind": "candidates", "by_task": [[0, 1], [2, 3]]}]},
         r"edits\.0: 'candidates'"),
    ],
)  # fmt: skip
def test_a_run_tells_no_task_where_the_data_have_none(router: dict[str, Any], where: str) -> None:
    slot = {"expert": {**EXPERT, "router": router}}
    backbone = {"kind": "dit", "image_size": 8, "patch": 2, "trunk": {"slots": [slot]}}
    run = RunConfig.from_dict({"model": {"kind": "denoiser", "backbone": backbone}})
    message = rf"model\.backbone\.trunk\.slots\.0\.expert\.router\.{where} .*'digits' tells .* task"
    with pytest.raises(ConfigError, match=message):
        build_source(run)


def test_a_model_takes_the_backbones_that_answer_its_way() -> None:
    with pytest.raises(ConfigError, match=r"backbone: 'causal' .*use the model token_denoiser"):
        DenoiserConfig.from_dict({"backbone": "causal"})
    with pytest.raises(ConfigError, match=r"backbone: 'dit' .*use the model denoiser"):
        TokenDenoiserConfig.from_dict({"backbone": "dit"})
