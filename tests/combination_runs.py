"""Trains, saves, traces one combination of parts, and lists what is wrong with it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from combination_parts import CLASSES, TASKS, Combination, model_fields
from combination_rules import Call, Gradients, watched
from coterie.core.batch import Batch, Losses
from coterie.core.prediction import Condition
from coterie.core.routing import Routing
from coterie.denoiser import MODELS
from coterie.experts import plan
from coterie.experts.dispatch import BACKENDS, available
from coterie.hub import load_pretrained, save_pretrained
from coterie.inspect import Trace, analyse
from coterie.inspect.page.report_json import routing_numbers
from coterie.train import TrainConfig, Trainer
from coterie.train.objectives import OBJECTIVES

SAMPLES, BATCH, STEPS = 12, 6, 2
TRAIN = TrainConfig(
    steps=STEPS, batch=BATCH, lr=0.01, clip=None, ema=(), threads=1, device="cpu", log_every=1
)
OBJECTIVE = {
    "denoiser": "denoising",
    "cluster_router": "cluster_posterior",
    "next_token": "next_token",
    "masked": "masked_token",
}


class TinySource:
    """Noise of the shape a backbone asks for; every class, task and the null label occur."""

    name, modality, class_names, licence = "tiny", "image", (), "none"
    num_classes, num_tasks = CLASSES, TASKS

    def __init__(self, backbone: Any) -> None:
        rng = torch.Generator().manual_seed(1)
        self.shape = (SAMPLES, *backbone.sample_shape)
        self.words = getattr(backbone, "vocabulary", 0)
        self.x = torch.randn(self.shape, generator=rng).clamp(-2, 2)
        if self.words:
            self.x = torch.randint(self.words - 1, self.shape, generator=rng)

    def __len__(self) -> int:
        return SAMPLES

    def get(self, indices: Any) -> Batch:
        ids = torch.as_tensor(indices)
        cond = Condition(label=ids % (CLASSES + 1) - 1, task=ids % TASKS)
        return Batch(self.x[ids], cond, ids)

    def call(self, model: Any, samples: int = 4) -> tuple[Tensor, Tensor, Condition]:
        """What a model is called with: noisy samples, their times, their condition."""
        batch = self.get(torch.arange(samples))
        shorter = getattr(model.config, "masking", "") == "next_token"
        x = batch.x[:, :-1] if shorter else batch.x
        return x, torch.linspace(0.1, 0.9, samples), batch.cond


class Recorder:
    """The model's objective; keeps the routings of every step."""

    def __init__(self, model: Any) -> None:
        masking = getattr(model.config, "masking", model.config.kind)
        self.objective = OBJECTIVES.parse(OBJECTIVE[masking]).build(model)
        self.routings: list[tuple[Routing, ...]] = []

    def __call__(self, model: Any, batch: Batch, rng: Any, progress: float) -> Losses:
        losses: Losses = self.objective(model, batch, rng, progress)
        self.routings.append(losses.routings)
        return losses


def build(combination: Combination, seed: int = 0) -> Any:
    """The model with every parameter moved, as after some training: no gate is closed."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore", UserWarning)
        torch.manual_seed(seed)
        model = MODELS.parse(model_fields(combination)).build()
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng))
    return model


def evaluate(model: Any, source: TinySource) -> tuple[Tensor, tuple[Routing, ...]]:
    """The answer on some samples outside training."""
    with torch.no_grad():
        prediction = model.eval()(*source.call(model))
    return prediction.value, prediction.routings


def train(model: Any, source: TinySource) -> tuple[Gradients, Recorder]:
    """A few real steps of the trainer, and what each of them did."""
    seen, recorder = Gradients(model), Recorder(model)
    with watched(model) as calls:

        def after_step(*_: Any) -> None:
            seen.collect(calls, recorder.routings[-1])
            calls.clear()

        Trainer(TRAIN, model, recorder, source, seed=3).fit(False, (after_step,))
    return seen, recorder


def problems(combination: Combination, folder: Path) -> list[str]:
    """Everything a combination does wrong; [] for a sound one."""
    model = build(combination)
    source = TinySource(model.config.backbone)
    with watched(model) as calls:
        answer, _ = evaluate(model, source)
    wrong = backends(calls) + saving(model, answer, source, folder)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    seen, recorder = train(model, source)
    wrong += seen.problems()
    for name, parameter in model.named_parameters():
        if torch.equal(parameter, before[name]) == bool(seen.largest[name] > 0):
            wrong.append(f"{name}: gradient {seen.largest[name]:.2g}, but changed the other way")
    after, routings = evaluate(model, source)
    if not torch.equal(after, evaluate(model, source)[0]):
        wrong.append("a second evaluation differs from the first")
    if not (after.isfinite().all() and answer.isfinite().all()):
        wrong.append("the answer is not finite")
    return wrong + report([*recorder.routings, routings])


def backends(calls: list[Call]) -> list[str]:
    """Every dispatch backend that can serve a layer's plan equals the loop."""
    wrong = []
    for call in calls:
        pool = call.layer.pool
        made = plan(call.routing, call.layer._slots, pool.num_experts)
        rows = call.x.flatten(0, 1) if call.routing.unit == "token" else call.x
        expected = BACKENDS["loop"](rows, made, pool, False)
        for name in available(rows, made, pool) if sum(made.counts) else []:
            found = BACKENDS[name](rows, made, pool, False)
            if not torch.allclose(found, expected, atol=1e-5, rtol=1e-5):
                wrong.append(f"backend {name}: {(found - expected).abs().max():.1e} off")
    return wrong


def saving(model: Any, answer: Tensor, source: TinySource, folder: Path) -> list[str]:
    """A model directory gives every tensor and the answer back, to the bit."""
    save_pretrained(model, folder, model.config.model_dump(mode="json"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        loaded: Any = load_pretrained(folder)
    own, theirs = model.state_dict(), loaded.state_dict()
    wrong = [f"{name}: not as saved" for name in own if not torch.equal(own[name], theirs[name])]
    if loaded.config != model.config:
        wrong.append("the configuration is not as saved")
    if not torch.equal(answer, evaluate(loaded, source)[0]):
        wrong.append("the loaded model answers otherwise")
    return wrong


def report(steps: list[tuple[Routing, ...]]) -> list[str]:
    """The routings can be traced and analysed, and every router is in the numbers."""
    trace = Trace()
    for routings in steps:
        trace.add(routings)
    numbers = routing_numbers(trace, analyse(trace))
    missing = len(steps[0]) - len(numbers["routers"])
    return [f"{missing} routers are missing in the report"] if missing else []
