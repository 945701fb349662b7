"""Pipelines: training runs with defaults of their own.

presets.py        what a DeepZig run takes for settings that are not given, by size
deepzig.py        such a run from Python
training_args.py  its settings as a file, in the names of transformers' TrainingArguments
"""

from .deepzig import train_deepzig
from .presets import ModelSize, deepzig_preset

__all__ = ["ModelSize", "deepzig_preset", "train_deepzig"]
