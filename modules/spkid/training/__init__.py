"""SpeechBrain's training loop, checkpoints and loggers, made safe."""

from spkid.training.brain import RobustBrain, explained
from spkid.training.checkpoints import AtomicCheckpointer, RunState
from spkid.training.init_from import TrainedModel
from spkid.training.loggers import EpochLogger, EpochTensorboardLogger
from spkid.training.run import RunFolder
from spkid.training.schedule import LinearRamp, WarmupCosine

__all__ = [
    "AtomicCheckpointer",
    "EpochLogger",
    "EpochTensorboardLogger",
    "LinearRamp",
    "RobustBrain",
    "RunFolder",
    "RunState",
    "TrainedModel",
    "explained",
    "WarmupCosine",
]
