"""Training: one loop (`train`), its optimizer and schedule, checkpoints, metrics and plots."""

from gdn2.training.checkpoint import CheckpointError
from gdn2.training.train import Outcome, TrainingError, train

__all__ = ["CheckpointError", "Outcome", "TrainingError", "train"]
