"""What belongs to a model beside its weights: tokenizer, chat template, how it writes, and what config.json says more.

A model that is trained further, or written in another form, keeps them as they are, byte for byte: a tokenizer's files
say more than a `tokenizer.json` (the class that reads it, how long a text may be, names of roles).
"""

import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, DataError
from ..files import json_text
from ..reprs import Shown
from ..untrusted import json_in, read_bytes, read_json
from .checkpoint_names import CARD
from .huggingface import CONFIG
from .special_tokens import REMEDY, token_ids

__all__ = ["COMPANIONS", "END", "GENERATION", "TOKENIZER_FILES", "Companions", "is_one_of"]

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
)
SETTINGS = "tokenizer_config.json"
GENERATION, END = "generation_config.json", "eos_token_id"
COMPANIONS = (*TOKENIZER_FILES, GENERATION)


@dataclass(frozen=True, repr=False)
class Companions(Shown):
    """The files by name, and the content of config.json."""

    files: Mapping[str, bytes] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path) -> "Companions":
        """Read those of a folder; CheckpointError for a file that is damaged or absurdly large."""
        found = (path for pattern in COMPANIONS for path in sorted(folder.glob(pattern)) if path.is_file())
        files = {path.relative_to(folder).as_posix(): read_bytes(path, error=CheckpointError) for path in found}
        return cls(files, read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {})

    def _says(self) -> str:
        return ", ".join([*self.files, *([CONFIG] if self.config else [])])

    def __bool__(self) -> bool:
        """Say whether there is anything."""
        return bool(self.files or self.config)

    @property
    def ids(self) -> dict[str, Any]:
        """The ids of special tokens that config.json states."""
        return {name: value for name, value in self.config.items() if name.endswith("_token_id")}

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of the files, where they were made of something else: of a GGUF file's tokenizer."""
        found: tuple[str, ...] = getattr(self.files, "notes", ())
        return found

    @property
    def size(self) -> int:
        """The bytes of the files."""
        return sum(map(len, self.files.values()))

    def with_tokenizer(self, files: Mapping[str, bytes]) -> "Companions":
        """Return the same with the files of another tokenizer."""
        rest = {name: content for name, content in self.files.items() if not is_one_of(name, TOKENIZER_FILES)}
        return Companions({**files, **rest}, self.config)

    def with_tokenizer_of(self, folder: Path) -> "Companions":
        """Return the same with the files of the tokenizer in a folder, as they are there."""
        files = Companions.of(folder).files
        return self.with_tokenizer({name: text for name, text in files.items() if is_one_of(name, TOKENIZER_FILES)})

    def with_chat_template(self, source: str) -> "Companions":
        """Return the same with another chat template, in the one file that all readers of today look into first."""
        files = {name: text for name, text in self.files.items() if name != "chat_template.json"}
        if SETTINGS in files:
            settings = json_in(files[SETTINGS], dict[str, Any], SETTINGS, error=DataError, remedy=REMEDY)
            if settings.pop("chat_template", None) is not None:
                files[SETTINGS] = json_text(settings).encode()
        return Companions({**files, "chat_template.jinja": source.encode()}, self.config)

    def under(self, own: "Companions") -> "Companions":
        """Return `own`, those of adapters, completed by these, of the model under them; a tokenizer is never mixed."""
        speaks = any(is_one_of(name, TOKENIZER_FILES) for name in own.files)
        below = self.with_tokenizer({}) if speaks else self
        return Companions({**below.files, **own.files}, own.config or self.config)

    def with_card(self, text: str) -> "Companions":
        """Return the same with a model card; that of a folder is not read: it speaks of other weights."""
        return Companions({**self.files, CARD: text.encode()}, self.config)

    def with_ends(self, ids: Iterable[int]) -> "Companions":
        """Return the same, whose generation_config.json ends a text at these ids too; unchanged where it does.

        Without that file config.json says where a text ends, as for transformers.  DataError for what is not an id.
        """
        text, ids = self.files.get(GENERATION), tuple(ids)
        settings = {} if text is None else json_in(text, dict[str, Any], GENERATION, error=DataError, remedy=REMEDY)
        own = settings.get(END)
        stated = self.config.get(END) if own is None else own
        known = () if stated is None else token_ids(stated, END, CONFIG if own is None else GENERATION)
        if not ids or (set(ids) <= set(known) and (own is not None or text is None)):
            return self
        ends = list(dict.fromkeys((*known, *ids)))
        content = {**settings, END: ends[0] if len(ends) == 1 else ends}
        return Companions({**self.files, GENERATION: json_text(content).encode()}, self.config)


def is_one_of(name: str, patterns: Iterable[str] = COMPANIONS) -> bool:
    """Say whether a file in a model's folder is one of those that a list of patterns names."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
