"""The feature network for metrics of a source: a small classifier for grey images, trained once per
source and kept in the user cache; EfficientNet-Lite0 for colour."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from coterie.core.batch import Source
from coterie.core.registry import Part
from coterie.core.rng import derive
from coterie.core.tensors import read_tensors, write_tensors
from coterie.core.user_cache import cache_root
from coterie.data import Subset
from coterie.data.download.cache import locked
from coterie.encoders import Features, SmallClassifier, lite0_extractor
from coterie.train.config import TrainConfig
from coterie.train.loop import Trainer
from coterie.train.objectives.classification import Classification

SETTINGS = TrainConfig(steps=300, batch=64, lr=2e-3, weight_decay=1e-2, ema=(0.98,), clip=1.0)
WIDTH = 16
BATCH = 128  # pictures whose class is read at once


def feature_network(data: Part) -> Features:
    """The feature network for images of ``data`` (a source configuration)."""
    source: Source = data.build(split="train")
    if source.shape[0] == 3:
        return lite0_extractor()
    return _classifier(data, source).as_features(f"SmallClassifier trained on {source.name}")


def read_labels(data: Part, images: Tensor) -> Tensor | None:
    """The classes i64 [S] that a classifier of ``data`` predicts for pictures; None if there is
    none (colour, or no classes)."""
    source: Source = data.build(split="train")
    if source.shape[0] == 3 or not source.num_classes:
        return None
    network = _classifier(data, source)
    with torch.inference_mode():
        return torch.cat([network(part).argmax(1) for part in images.float().split(BATCH)])


def learnt_rows(size: int) -> np.ndarray:
    """Every second row of a training split, on which the classifier is trained.

    The others are the reference of the metrics, so that the classifier has seen neither them nor
    new images.
    """
    return np.arange(0, size, 2)


def reference_rows(size: int) -> np.ndarray:
    """The other half of :func:`learnt_rows`."""
    return np.arange(1, size, 2)


def _classifier(data: Part, source: Source) -> SmallClassifier:
    """Trained once per source and settings; a second process waits for the first."""
    network = SmallClassifier(source.shape[0], source.num_classes, WIDTH)
    key = derive(0, data.to_json(), SETTINGS.to_json())
    path = cache_root() / "classifiers" / f"{source.name}-{key:016x}.safetensors"
    with locked(path.with_suffix(".lock")):
        if not path.is_file():
            partial = path.with_suffix(".partial")
            write_tensors(partial, _train(network, source))
            partial.replace(path)
    network.load_state_dict(read_tensors(path))
    return network.eval()


def _train(network: SmallClassifier, source: Source) -> dict[str, Tensor]:
    seen = Subset(source, learnt_rows(len(source)))
    trainer = Trainer(SETTINGS, network, Classification(), seen, 0, None)
    trainer.fit(progress=False)
    with trainer.ema.swap(network):
        return {name: value.clone() for name, value in network.state_dict().items()}
