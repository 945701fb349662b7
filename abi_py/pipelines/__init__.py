"""Pipelines: from a few settings to a finished model folder.

    deepzig_config.py   the settings of a DeepZig run, and what each size takes for those that are not given
    deepzig.py          the run: conversations, tokenizer, model, training, the folder
"""

from .deepzig import DeepZigRun, train_deepzig
from .deepzig_config import DeepZigConfig, ModelSize

__all__ = ["DeepZigConfig", "DeepZigRun", "ModelSize", "train_deepzig"]
