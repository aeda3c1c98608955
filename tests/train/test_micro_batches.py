"""Micro-batches of one step are one big batch: every objective, every balance loss, to 1e-5."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from together import Threads, in_threads
from torch import Tensor, nn

from coterie.core.batch import Batch, Losses
from coterie.core.errors import ConfigError, TrainingError
from coterie.core.prediction import Condition
from coterie.core.share import Turns, largest, summed
from coterie.data.ratings.rating_rows import TaskToyConfig
from coterie.denoiser import MODELS
from coterie.experts.balance import BALANCES
from coterie.guides import Guide, ReaderConfig, suggested
from coterie.process import PROCESSES
from coterie.process.ranges import equal_ranges
from coterie.recipes import get_recipe
from coterie.runs.build import build_model
from coterie.train import TrainConfig, Trainer
from coterie.train.objectives import OBJECTIVES
from coterie.train.world import World

BATCH, PARTS = 8, 4
IMAGE = {"kind": "dit", "image_size": 4, "patch": 2, "channels": 1, "num_classes": 3}
TRUNK = {"width": 8, "depth": 2, "heads": 2, "mlp_hidden": 8}
WORDS = {"kind": "causal", "vocabulary": 12, "context": 10}
TEXT_TRUNK = {**TRUNK, "modulation": "none", "norm": "rms", "rotary": True}

MIXED = {
    "num_experts": 3,
    "experts": "modulation",
    "stem": "star",
    "adaptor": 2.0,
    "router_reads": "stream",
    "router": {"when": "after", "score": "uncertain"},
}
RESTORER = {
    "kind": "restorer",
    "image_size": 16,
    "stem": 4,
    "tail": 8,
    "trunk": {
        **{"modulation": "none", "width": 16, "depth": 1, "heads": 2},
        "slots": [{"expert": MIXED}],
    },
}
TOY = TaskToyConfig(count=60, users=9, items=12, observed=(1.0, 1.0, 0.5, 0.5))
TASKS = {
    "kind": "multitask",
    "fields": [{"name": f.name, "size": f.size, "columns": f.columns} for f in TOY.fields],
    "tasks": TOY.task_names,
    "embedding": 4,
    "levels": [{"shared": 2, "task": 1, "width": 6}],
}


class Samples:
    """Pictures or words of which every micro-batch has another number that counts."""

    name, modality, class_names, licence, num_classes = "samples", "image", (), "none", 3

    def __init__(self, words: bool = False, size: int = 4) -> None:
        rng = torch.Generator().manual_seed(1)
        self.words = words
        self.x = torch.randn(BATCH, 1, size, size, generator=rng)
        if words:
            self.x = torch.randint(12, (BATCH, 10), generator=rng)

    def __len__(self) -> int:
        return BATCH

    def get(self, indices: Any) -> Batch:
        ids = torch.as_tensor(np.asarray(indices))
        if self.words:
            mask = torch.arange(10)[None] < (2 + ids[:, None])
            return Batch(self.x[ids], Condition(tokens_mask=mask), ids)
        # The null class in some of them, which the router of the tests reserves an expert for.
        label = torch.where(ids < 3, -1, ids % 3)
        return Batch(self.x[ids], Condition(label=label, task=ids % 3), ids)


class Degraded(Samples):
    def __init__(self) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(2)
        self.x = torch.rand(BATCH, 3, 16, 16, generator=rng) - 0.5

    def get(self, indices: Any) -> Batch:
        batch = super().get(indices)
        return replace(batch, cond=batch.cond.replace(label=None, task=None, channels=batch.x / 2))


class Classes(Samples):
    """Every sample has its class."""

    def get(self, indices: Any) -> Batch:
        batch = super().get(indices)
        return replace(batch, cond=batch.cond.replace(label=batch.ids % 3, task=None))


def moved(model: nn.Module) -> Any:
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng))
    return model


def made(config: dict[str, Any]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return moved(MODELS.parse(config).build())


def slot(balance: Any = (), **router: Any) -> dict[str, Any]:
    expert = {
        "num_experts": 4,
        "experts": {"kind": "swiglu", "hidden": 8},
        "router": router,
        "balance": balance,
    }
    return {"slot": "ffn", "expert": expert}


def images(*slots: Any, **fields: Any) -> Any:
    return made({"kind": "denoiser", "backbone": {**IMAGE, "trunk": {**TRUNK, "slots": slots}}})


def text(*slots: Any, masking: str = "next_token") -> Any:
    trunk = {**TEXT_TRUNK, "causal": masking == "next_token", "slots": slots}
    backbone = {**WORDS, "trunk": trunk}
    return made({"kind": "token_denoiser", "masking": masking, "backbone": backbone})


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 3)
        nn.init.ones_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(1))


class Unlabelled(Samples):
    """Ratings of which tasks know some: every micro-batch another number."""

    def __init__(self) -> None:
        super().__init__()
        self.source = TOY.build()

    def get(self, indices: Any) -> Batch:
        batch = self.source.get(np.asarray(indices))
        assert batch.targets is not None
        known = torch.arange(batch.targets.shape[1])[None] <= torch.as_tensor(indices)[:, None]
        return replace(batch, targets=torch.where(known, batch.targets, torch.nan))


def guide() -> Any:
    reading = {"task": "map", "image_size": 8, "width": 8, "feature_dim": 16, "classes": 3}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        process = PROCESSES.parse("ddpm").build()
        network = ReaderConfig.from_dict(reading).build()
        return Guide(
            network,
            process,
            equal_ranges(process, 2),
            suggested(network, rank=2).replace(copies=()),
        )


Case = tuple[Callable[[], Any], dict[str, Any], Callable[[], Any]]
TEACHER = {"kind": "denoiser", "backbone": {**IMAGE, "trunk": TRUNK}}
SWITCH = ["switch", "z_loss", "entropy"]
OBJECTIVE_CASES: dict[str, Case] = {
    "denoising": (
        lambda: images(slot(SWITCH, partition="null_label")),
        {"weighting": {"kind": "uncertainty", "clusters": 3}, "times": "stratified"},
        Samples,
    ),
    "distillation": (lambda: images(slot(SWITCH)), {"teacher": TEACHER}, Samples),
    "next_token": (lambda: text(slot(SWITCH)), {}, lambda: Samples(words=True)),
    "masked_token": (lambda: text(slot(SWITCH), masking="masked"), {}, lambda: Samples(True)),
    "classification": (lambda: moved(Network()), {}, Classes),
    "restoration": (
        lambda: made({"kind": "denoiser", "backbone": RESTORER, "view": "x0"}),
        {},
        Degraded,
    ),
    "recognition": (guide, {"times": "uniform"}, lambda: Samples(size=8)),
    "cluster_posterior": (
        lambda: made(
            {
                "kind": "cluster_router",
                "num_clusters": 3,
                "backbone": {**IMAGE, "num_classes": 0, "trunk": TRUNK},
            }
        ),
        {},
        Samples,
    ),
    "multitask": (lambda: made({"kind": "predictor", "backbone": TASKS}), {}, Unlabelled),
}

COSINE = {"score": "cosine"}
TABLE = {"score": {"kind": "noise_level", "table": True}, "unit": "sample"}
BALANCE_CASES: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {
    "none": [({}, {})],
    "switch": [
        ({}, {}),
        ({}, {"select": {"kind": "top_p", "p": 0.5}}),
        ({"statistics": "sequence"}, {}),
        ({"groups": 2, "per_choice": False, "importance": "gates"}, {}),
        ({"pooled": True}, {}),
    ],
    "z_loss": [({}, {})],
    "entropy": [({}, {})],
    "contrastive": [({}, COSINE), ({"statistics": "sequence"}, COSINE)],
    "diffusion_prior": [({}, TABLE)],
    "selection_bias": [({}, {"selection_bias": True})],
}
BALANCED = [(kind, number) for kind, cases in BALANCE_CASES.items() for number in range(len(cases))]


class Cut(World):
    """The part of one of several threads."""

    def __init__(self, thread: Threads) -> None:
        self.count, self._rank = 2, thread.rank

    def own(self, indices: np.ndarray) -> np.ndarray:
        return np.split(indices, 2)[self._rank]


def step_of(
    case: Case, kind: str, accumulate: int, world: World | None = None
) -> tuple[dict[str, Tensor], Losses, nn.Module]:
    """Gradients and (mean) losses of one step, and the model after it."""
    build, fields, source = case
    model = build()
    objective = OBJECTIVES.parse({"kind": kind, **fields}).build(model)
    config = TrainConfig(
        batch=BATCH, accumulate=accumulate, clip=None, ema=(), device="cpu", steps=10, threads=1
    )
    given = {} if world is None else {"world": world}
    trainer = Trainer(config, model, objective, source(), seed=3, **given)
    model.train()
    result = trainer._gradients(4, 0, keep_routings=True)
    if hasattr(model, "after_step"):
        model.after_step(result.routings)
    grads = {n: p.grad.clone() for n, p in trainer.parameters.items() if p.grad is not None}
    values = [
        {**one.main, **{aux.key: aux.value for aux in one.aux}, "total": torch.tensor(result.loss)}
        for one in result.losses
    ]
    means = {key: torch.stack([one[key] for one in values]).mean() for key in values[0]}
    return grads, means, model


def assert_same_step(found: Any, expected: Any) -> None:
    for ours, theirs in zip(found[:2], expected[:2]):
        assert ours.keys() == theirs.keys() and ours
        for name, value in theirs.items():
            scale = max(float(value.abs().max()), 1e-2)
            assert float((ours[name] - value).abs().max()) <= 1e-5 * scale, name
    for (name, one), other in zip(found[2].named_buffers(), expected[2].buffers()):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, msg=name)


def test_C1_every_objective_and_balance_loss_has_a_case() -> None:
    assert {*OBJECTIVE_CASES} == {*OBJECTIVES.kinds()}
    assert {*BALANCE_CASES} == {*BALANCES.kinds()}


@pytest.mark.parametrize("kind", OBJECTIVE_CASES)
def test_C1_micro_batches_equal_one_big_batch(kind: str) -> None:
    case = OBJECTIVE_CASES[kind]
    whole = step_of(case, kind, 1)
    for accumulate in (2, PARTS):
        assert_same_step(step_of(case, kind, accumulate), whole)


def balanced(kind: str, number: int, words: bool) -> Case:
    fields, router = BALANCE_CASES[kind][number]
    balance = [{"kind": kind, **fields}, *([] if kind == "none" else ["none"])]
    if "weight" in BALANCES.get(kind).model_fields:
        balance[0]["weight"] = 1.0  # so that its gradients are not lost beside the others
    if words:
        return lambda: text(slot(balance, **router)), {}, lambda: Samples(words=True)
    return lambda: images(slot(balance, **router, partition="null_label")), {}, Samples


@pytest.mark.parametrize(("kind", "number"), BALANCED)
def test_C1_balance_losses_count_the_whole_step(kind: str, number: int) -> None:
    """On padded text, and on pictures of which the router scores some."""
    for words in (False, True):
        if words and kind == "diffusion_prior":
            continue  # text has no noise levels
        case, objective = balanced(kind, number, words), "next_token" if words else "denoising"
        assert_same_step(step_of(case, objective, PARTS), step_of(case, objective, 1))


@pytest.mark.parametrize("words", [False, True])
def test_C1_several_processes_with_micro_batches_equal_one(words: bool) -> None:
    case, objective = balanced("switch", 0, words), "next_token" if words else "denoising"
    whole = step_of(case, objective, 1)
    ready = [case[0](), case[0]()]  # first weights are drawn from what threads have in common

    def part(thread: Threads) -> Any:
        return step_of((lambda: ready[thread.rank], *case[1:]), objective, 2, Cut(thread))

    grads, losses, models = zip(*in_threads(2, part))
    means = [{key: (one[key] + two[key]) / 2 for key in one} for one, two in (grads, losses)]
    assert_same_step((*means, models[0]), whole)


def test_C1_what_goes_back_into_the_model_is_counted_until_it_settles() -> None:
    """A score that keeps running statistics, in two layers, the second below experts that moved."""
    uncertain = {"score": {"kind": "uncertain", "passes": 2, "dropout": 0.3}}
    case: Case = (lambda: images(slot(["switch"], **uncertain)), {}, Samples)
    assert_same_step(step_of(case, "denoising", PARTS), step_of(case, "denoising", 1))


def test_C1_a_norm_over_the_batch_is_refused_with_micro_batches() -> None:
    config = get_recipe("home").config()
    case: Case = (lambda: build_model(config), {}, Samples)
    with pytest.raises(ConfigError, match=r"^train\.accumulate: .* normalises over its batch"):
        step_of(case, "multitask", 2)


def test_C1_turns_sum_what_all_parts_say() -> None:
    turns = Turns(3)
    values = [torch.tensor([float(number)], requires_grad=True) for number in (1, 10, 100)]

    def run(turn: int) -> tuple[Tensor, int]:
        longest = largest(turn)
        (total,) = summed(values[turn] * longest)  # needs the first answer to be right
        return total, longest

    assert turns.count_first(run)
    for turn in range(3):
        with turns.part(turn):
            total, longest = run(turn)
        assert (float(total.detach()), longest) == (222.0, 2)
        total.square().sum().backward()
        assert float(values[turn].grad) / 3 == 2 * 222.0 * 2
    assert not turns.asked
    with turns.part(0):
        summed(torch.ones(1))
        summed(torch.ones(1))
        summed(torch.ones(1))
    assert turns.asked


def test_C1_an_objective_that_sums_in_some_parts_only_is_refused() -> None:
    class Sometimes:
        def __init__(self) -> None:
            self.calls = 0

        def __call__(self, model: Any, batch: Batch, rng: Any, progress: float) -> Losses:
            loss = model(batch.x).square().mean()
            if int(batch.ids[0]) > 3:
                loss = loss + summed(loss)[0]
            return Losses({"loss": loss})

    trainer = Trainer(
        TrainConfig(batch=BATCH, accumulate=2, device="cpu", ema=(), threads=1),
        Network(), Sometimes(), Samples(), seed=3,
    )  # fmt: skip
    with pytest.raises(TrainingError, match=r"^train\.accumulate: not all micro-batches"):
        trainer._gradients(0, 0, keep_routings=False)
