"""Pipelines: from a few settings to a finished model folder.

deepzig_config.py   the settings of a DeepZig run, and what each size takes for those that are not given
deepzig_run.py      the run: conversations, tokenizer, model
deepzig.py          training it, and the folder at the end
"""

from .deepzig import train_deepzig
from .deepzig_config import DeepZigConfig, ModelSize
from .deepzig_run import DeepZigRun

__all__ = ["DeepZigConfig", "DeepZigRun", "ModelSize", "train_deepzig"]
