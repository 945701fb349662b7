"""What a Hugging Face folder holds besides weights and shape, to be carried along where a folder is written anew.

    config.json     entries that this package does not compute with, but others need: ids of special tokens ...
    files           the tokenizer, its chat template, the settings of generation

The files are copied from where they are, when they are needed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..untrusted import read_json
from .huggingface import CONFIG

__all__ = ["CARRIED", "GENERATION", "TOKENIZER_FILES", "Origin"]

GENERATION = "generation_config.json"
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
    *("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model"),
)
CARRIED = (*TOKENIZER_FILES, GENERATION)


@dataclass(frozen=True)
class Origin:
    """The facts of a folder: the content of its config.json, and its other files by name."""

    config: Mapping[str, Any]
    files: Mapping[str, Path]

    @classmethod
    def of(cls, folder: str | Path) -> "Origin":
        """Read those of a folder; CheckpointError for a damaged config.json.  Without one, there are only files."""
        place = Path(folder).absolute()
        content = read_json(place / CONFIG) if (place / CONFIG).is_file() else {}
        found = sorted(path for pattern in CARRIED for path in place.glob(pattern) if path.is_file())
        return cls(content, {path.relative_to(place).as_posix(): path for path in found})
