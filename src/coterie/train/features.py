"""Which feature network measures a source: a small classifier trained here for grey images, the
packaged EfficientNet-Lite0 for colour. Trained once per source and kept in the user cache."""

from __future__ import annotations

import os
from typing import Any

import torch

from coterie.core.batch import Source
from coterie.core.registry import Part
from coterie.core.rng import derive
from coterie.core.tensors import read_tensors, write_tensors
from coterie.data import cache_dir
from coterie.encoders import ClassifierFeatures, SmallClassifier, lite0_features
from coterie.train.config import TrainConfig
from coterie.train.loop import Trainer
from coterie.train.objectives.classification import Classification

STEPS = 600
SETTINGS = TrainConfig(steps=STEPS, batch=128, lr=2e-3, ema=(0.99,), clip=1.0)


def feature_network(data: Part) -> Any:
    """Features of the images of ``data`` (a source configuration): f32 [n, dim] on call."""
    source: Source = data.build(split="train")
    if source.shape[0] == 3:
        return lite0_features()
    return ClassifierFeatures(_classifier(data, source), f"SmallClassifier({source.name})")


def _classifier(data: Part, source: Source) -> SmallClassifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(0, "classifier"))
        network = SmallClassifier(source.shape[0], source.num_classes)
    key = derive(0, data.to_json(), SETTINGS.to_json())
    path = cache_dir() / "classifiers" / f"{source.name}-{key:016x}.safetensors"
    if path.is_file():
        network.load_state_dict(read_tensors(path))
        return network.eval()
    trainer = Trainer(SETTINGS, network, Classification(), source, 0, None)
    trainer.fit(progress=False)
    with trainer.ema.swap(network):
        state = {name: value.clone() for name, value in network.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    write_tensors(partial, state)
    partial.replace(path)
    network.load_state_dict(state)
    return network.eval()
