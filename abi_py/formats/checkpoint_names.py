"""What the directories of models, checkpoints and runs are known by, for those who look for one or must spare it."""

import re
from pathlib import Path

from ..files import OLD

__all__ = [
    "ADAPTER",
    "ADAPTER_CONFIG",
    "BASE_DIGEST",
    "BASE_FINGERPRINT",
    "BASE_STORAGE",
    "CARD",
    "CONFIG",
    "MODEL",
    "NAME",
    "ORIGIN",
    "RANDOM_BASE",
    "SETTINGS",
    "STATE",
    "TRAINING_ARGS",
    "is_checkpoint_name",
]

CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"  # of a Hugging Face folder, of PEFT's
STATE, SETTINGS = "state.json", "config.yaml"  # of a checkpoint; of a checkpoint and of a run
MODEL, ORIGIN = "model", "origin.json"  # the folder that a run leaves; in it, which step of the run it is
ADAPTER = "adapter"  # beside it, the adapters of a run that trained these
# In the files of adapters, what the weights that they were trained on are known by (model/identity.py).
BASE_DIGEST, BASE_FINGERPRINT = "abi_py.base_digest", "abi_py.base_fingerprint"
BASE_STORAGE = "abi_py.base_storage"  # beside them, the storage that these were encoded in meanwhile
RANDOM_BASE = "random_base.json"  # beside adapters, the shape and seed of the random weights that they were trained on
TRAINING_ARGS = "training_args.json"  # how a model was trained, in the names of transformers' TrainingArguments
CARD = "README.md"  # the model card, of that folder and of a checkpoint
NAME = re.compile(r"llm_step_(\d+)")


def is_checkpoint_name(path: Path) -> bool:
    """Say whether a directory has the name of a checkpoint, and so must be a whole one."""
    return NAME.fullmatch(path.name.removeprefix(OLD)) is not None
