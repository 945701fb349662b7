"""What the directories of checkpoints and runs are known by, for those who must not write over them."""

import re
from pathlib import Path

from ..files import OLD

__all__ = ["CARD", "MODEL", "NAME", "ORIGIN", "SETTINGS", "STATE", "is_checkpoint_name"]

STATE, SETTINGS = "state.json", "config.yaml"  # of a checkpoint; of a checkpoint and of a run
MODEL, ORIGIN = "model", "origin.json"  # the folder that a run leaves; in it, which step of the run it is
CARD = "README.md"  # the model card, of that folder and of a checkpoint
NAME = re.compile(r"llm_step_(\d+)")


def is_checkpoint_name(path: Path) -> bool:
    """Say whether a directory has the name of a checkpoint, and so must be a whole one."""
    return NAME.fullmatch(path.name.removeprefix(OLD)) is not None
