"""Training: the loop, checkpoints, learning rates and metrics."""

from coterie.train.averages import Ema
from coterie.train.checkpoint import Checkpoint, CheckpointWarning
from coterie.train.config import TrainConfig
from coterie.train.learning_rate import SCHEDULES
from coterie.train.loop import Trainer, TrainState
from coterie.train.run_directory import RunDir, read_metrics
from coterie.train.signals import Interrupted
from coterie.train.state import load_weights

__all__ = [
    "SCHEDULES",
    "Checkpoint",
    "CheckpointWarning",
    "Ema",
    "Interrupted",
    "RunDir",
    "TrainConfig",
    "TrainState",
    "Trainer",
    "load_weights",
    "read_metrics",
]
