"""What belongs to a model beside its weights: tokenizer, chat template, how it writes, and the ids of special tokens.

A model that is trained further, or written in another form, keeps them as they are, byte for byte: a tokenizer's files
say more than a `tokenizer.json` (the class that reads it, how long a text may be, names of roles).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..untrusted import read_bytes, read_json
from .huggingface import CONFIG

__all__ = ["COMPANIONS", "TOKENIZER_FILES", "Companions"]

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json"),
)
COMPANIONS = (*TOKENIZER_FILES, "generation_config.json")
IDS = tuple(f"{role}_token_id" for role in ("bos", "eos", "pad"))  # of config.json


@dataclass(frozen=True)
class Companions:
    """The files by name, and the ids that config.json states (only those that it states)."""

    files: Mapping[str, bytes] = field(default_factory=dict)
    ids: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path) -> "Companions":
        """Read those of a folder; CheckpointError for a file that is damaged or absurdly large."""
        files = {
            name: read_bytes(folder / name, error=CheckpointError)
            for name in COMPANIONS
            if (folder / name).is_file()
        }
        config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
        return cls(files, {name: config[name] for name in IDS if name in config})

    @property
    def size(self) -> int:
        """The bytes of the files."""
        return sum(map(len, self.files.values()))

    def with_tokenizer(self, files: Mapping[str, bytes]) -> "Companions":
        """Return the same with the files of another tokenizer."""
        rest = {name: content for name, content in self.files.items() if name not in TOKENIZER_FILES}
        return Companions({**files, **rest}, self.ids)
