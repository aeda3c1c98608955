"""A tiny regression problem with everything the training loop can meet."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from coterie.core.batch import Batch, Losses
from coterie.core.prediction import Condition
from coterie.core.routing import Aux, Routing
from coterie.train import TrainConfig, Trainer


class ToySource:
    """``size`` points on a noisy plane; sample ids in ``bad`` are NaN."""

    name = "plane"
    modality = "vector"
    shape = (3,)
    num_classes = 0
    class_names = ()
    licence = "none"

    def __init__(self, size: int = 50, bad: tuple[int, ...] = ()) -> None:
        self.x = torch.randn(size, 3, generator=torch.Generator().manual_seed(5))
        for row in bad:
            self.x[row, 0] = float("nan")

    def __len__(self) -> int:
        return len(self.x)

    def get(self, indices: np.ndarray) -> Batch:
        ids = torch.as_tensor(np.asarray(indices))
        return Batch(self.x[ids], Condition(), ids)


class ToyModel(nn.Module):
    """Two layers with dropout, a tied weight, and a selection bias set outside the optimiser."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(1)
        self.first = nn.Linear(3, 4)
        self.drop = nn.Dropout(dropout)
        self.second = nn.Linear(4, 1)
        self.tied = self.first
        self.register_buffer("bias", torch.zeros(4))
        self.seen_routings: list[int] = []
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=rng))

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        h = torch.tanh(self.first(x))
        logits = (h + self.bias).detach()
        routing = Routing(
            unit="sample",
            num_experts=4,
            ids=logits.argmax(1, keepdim=True),
            gates=torch.ones(len(x), 1),
            probs=logits.softmax(1),
            logits=logits,
            batch=(len(x), 1),
        )
        return self.second(self.drop(h)), routing

    def after_step(self, routings: tuple[Routing, ...]) -> None:
        self.seen_routings.append(len(routings))
        load = torch.stack([routing.counts() for routing in routings]).sum(0)
        self.bias += 0.01 * (load.mean() - load).sign()


class ToyObjective(nn.Module):
    """Regression with injected noise, a learned scale, and failures on demand."""

    lr = 0.05

    def __init__(self, poison: dict[int, str] | None = None, noisy: bool = True) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(()))
        self.poison = poison or {}
        self.noisy = noisy
        self.steps = 0

    def forward(self, model: nn.Module, batch: Batch, rng: object, progress: float) -> Losses:
        target = batch.x.sum(1, keepdim=True)
        noise = torch.rand(len(batch.x), generator=rng)
        x = batch.x + 0.1 * noise[:, None] if self.noisy else batch.x
        answer, routing = model(x)
        per_sample = (answer - target).square().mean(1)
        loss = per_sample.mean() * torch.exp(-self.scale) + self.scale
        kind = self.poison.get(round(progress * POISON_STEPS))
        if kind == "loss":
            loss = loss * float("nan")
        if kind == "grad":
            # sqrt has an infinite slope at 0: a finite loss with a non-finite gradient.
            loss = loss + (answer * 0).abs().sqrt().sum()
        aux = Aux("balance", routing.probs.square().mean(), 0.01, 0)
        return Losses({"mse": loss}, (aux,), (routing,), per_sample.detach(), noise)


POISON_STEPS = 20


def toy_config(**changes: object) -> TrainConfig:
    values: dict[str, object] = {
        "steps": POISON_STEPS,
        "batch": 8,
        "lr": 0.02,
        "warmup": 3,
        "schedule": "cosine",
        "weight_decay": 0.01,
        "ema": [0.9, 0.5],
        "log_every": 3,
        "checkpoint_every": 4,
        "threads": 1,
        "device": "cpu",
        **changes,
    }
    return TrainConfig.from_dict(values)


def without_machine(records: list[dict]) -> list[dict]:
    """Records without the fields that depend on the clock."""
    return [{k: v for k, v in record.items() if k != "machine"} for record in records]


def train(
    run_dir: Path | None = None,
    objective: object = None,
    dropout: float = 0.1,
    source: ToySource | None = None,
    callbacks: tuple = (),
    **changes: object,
) -> tuple[Trainer, list[dict]]:
    """Train the toy problem to the end; the trainer and every record."""
    trainer = Trainer(
        toy_config(**changes),
        ToyModel(dropout),
        objective or ToyObjective(),
        source or ToySource(),
        seed=3,
        run_dir=run_dir,
    )
    records = []
    trainer.fit(False, (lambda _, record: records.append(record), *callbacks))
    return trainer, records


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_equal(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
