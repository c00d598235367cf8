"""One trainer for policies and backbones: exact resume, atomic checkpoints, precision, Accelerate."""

from .checkpoint import CheckpointError, Checkpoints
from .diagnosis import NonFiniteError
from .optim import OptimConfig, build_optimizer
from .sampling import derive_seed, seed_all
from .schedule import EmaConfig, ScheduleConfig, ema_decay, tristage_lr
from .trainer import Trained, Trainer, TrainerConfig, find_trained

__all__ = [
    "CheckpointError",
    "Checkpoints",
    "EmaConfig",
    "NonFiniteError",
    "OptimConfig",
    "ScheduleConfig",
    "Trained",
    "Trainer",
    "TrainerConfig",
    "build_optimizer",
    "derive_seed",
    "ema_decay",
    "find_trained",
    "seed_all",
    "tristage_lr",
]
