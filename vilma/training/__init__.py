"""One trainer for policies and backbones: exact resume, atomic checkpoints, precision, Accelerate."""

from .checkpoint import CheckpointError, Checkpoints
from .diagnosis import NonFiniteError, describe_idle
from .optim import OptimConfig, build_optimizer
from .plan import backward_memory, describe_plan
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
    "backward_memory",
    "build_optimizer",
    "derive_seed",
    "describe_idle",
    "describe_plan",
    "ema_decay",
    "find_trained",
    "seed_all",
    "tristage_lr",
]
