"""The ABI's module of that name: the model, its configuration, and what its methods return."""

from .config import CheckpointingStrategy, TrainableModelConfig
from .model.transformer import LossOutput, TrainableModel

__all__ = ["CheckpointingStrategy", "LossOutput", "TrainableModel", "TrainableModelConfig"]
