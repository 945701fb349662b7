"""What belongs to a model beside its weights: tokenizer, chat template, how it writes, and what config.json says more.

A model that is trained further, or written in another form, keeps them as they are, byte for byte: a tokenizer's files
say more than a `tokenizer.json` (the class that reads it, how long a text may be, names of roles).
"""

import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..untrusted import read_bytes, read_json
from .huggingface import CONFIG

__all__ = ["COMPANIONS", "TOKENIZER_FILES", "Companions", "is_one_of"]

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
)
COMPANIONS = (*TOKENIZER_FILES, "generation_config.json")


@dataclass(frozen=True)
class Companions:
    """The files by name, and the content of config.json."""

    files: Mapping[str, bytes] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path) -> "Companions":
        """Read those of a folder; CheckpointError for a file that is damaged or absurdly large."""
        found = (path for pattern in COMPANIONS for path in sorted(folder.glob(pattern)) if path.is_file())
        files = {path.relative_to(folder).as_posix(): read_bytes(path, error=CheckpointError) for path in found}
        return cls(files, read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {})

    def __bool__(self) -> bool:
        """Say whether there is anything."""
        return bool(self.files or self.config)

    @property
    def ids(self) -> dict[str, Any]:
        """The ids of special tokens that config.json states."""
        return {name: value for name, value in self.config.items() if name.endswith("_token_id")}

    @property
    def size(self) -> int:
        """The bytes of the files."""
        return sum(map(len, self.files.values()))

    def with_tokenizer(self, files: Mapping[str, bytes]) -> "Companions":
        """Return the same with the files of another tokenizer."""
        rest = {name: content for name, content in self.files.items() if not is_one_of(name, TOKENIZER_FILES)}
        return Companions({**files, **rest}, self.config)


def is_one_of(name: str, patterns: Iterable[str] = COMPANIONS) -> bool:
    """Say whether a file in a model's folder is one of those that a list of patterns names."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
