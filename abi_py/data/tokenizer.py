"""Text to token ids and back, by any `tokenizer.json` of the `tokenizers` library.

    encode        special tokens that are written in the text become their ids       "<s>hi</s>" -> [1, ..., 2]
    encode_plain  they do not: text from a user cannot open or close a turn          "<s>hi</s>" -> "<", "s", ...
    encode_pieces both in one text, each piece encoded in its place (places.py)      a conversation
    decode        text of ids, special tokens written out                            [1, ..., 2] -> "<s>hi</s>"
    stream        the same text, token by token, in whole characters, as the continuation of ids before it

The files are in `tokenizer_files.py`.  Truncation and padding that a file asks for are switched off: nothing here
shortens a text that was not asked to.
"""

import contextlib
import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers

from ..errors import DataError
from ..files import atomic_files
from ..formats.library import library_errors
from ..formats.special_tokens import ROLES, check_name, token_name
from ..reprs import Shown
from .places import Place, PlacedBackend, without_strip
from .token_bytes import TokenBytes
from .token_stream import REPLACEMENT, ByteStream, TokenStream, WindowStream
from .tokenizer_files import CONFIG_FILE, FILES, TOKENIZER_FILE, default_template, read_tokenizer

__all__ = ["FILES", "TOKENIZER_FILE", "Tokenizer"]

# What each role is usually called, best first: used only where no file says anything about the role.
USUAL_NAMES = {
    "bos": ("<s>", "<|begin_of_text|>", "<bos>", "<|startoftext|>", "[BOS]"),
    "eos": ("</s>", "<|im_end|>", "<|end_of_text|>", "<eos>", "<|endoftext|>", "[EOS]"),
    "pad": ("<pad>", "<|pad|>", "[PAD]", "<|endoftext|>"),
    "unk": ("<unk>", "[UNK]"),
}


class Tokenizer(Shown):
    """A tokenizer of the `tokenizers` library, the names of its special tokens, and its chat template.

    chat_template  Jinja text or None; may be set, and `save` writes it
    config         what tokenizer_config.json says, as plain values
    name           what error messages call it
    template_name  what they call the chat template: the file that it came from
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, config: Mapping[str, Any] | None = None, name: str = "the tokenizer"
    ) -> None:
        """Wrap a tokenizer; it is changed (no truncation, no padding).

        DataError if `config` names a special token that the vocabulary lacks.
        """
        backend.no_truncation()
        backend.no_padding()
        self.backend, self.name, self.template_name = backend, name, name
        self.config = dict(config or {})
        self.chat_template: str | None = default_template(self.config.get("chat_template"), name)
        self._described = json.loads(backend.to_str())
        self.bos_id, self.eos_id, self.pad_id, self.unk_id = map(self._role, ROLES)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Tokenizer":
        """Read a tokenizer.json, or the one in a directory, and the tokenizer_config.json beside it if there is one.

        DataError names the file and what is wrong with it; errors of the system but a missing file are OSError.
        """
        files = read_tokenizer(Path(path))
        made = cls(files.backend, files.settings, str(files.path))
        made.template_name = str(files.template)
        return made

    def _says(self) -> str:
        return f"{self.name!r}, vocab_size={self.vocab_size}"

    # -- text to ids ---------------------------------------------------------------------------

    def encode(self, text: str, add_special_tokens: bool = False, place: Place = Place.FIRST) -> list[int]:
        """Return the ids of a text; special tokens written in it are recognised.

        `add_special_tokens` also adds what the tokenizer's post-processor puts around a text.  `place` says what comes
        before it, if it is a piece of a longer one.  DataError if the text holds half a surrogate pair, which no UTF-8
        file can.
        """
        with self._library(text):
            return self._recognising.encode(text, place, add_special_tokens)

    def encode_batch(
        self, texts: Sequence[str], add_special_tokens: bool = False, places: Sequence[Place] | None = None
    ) -> list[list[int]]:
        """Return the ids of each text, as `encode` does; the texts are divided among the processor's cores."""
        with self._library(*texts):
            return self._recognising.encode_batch(texts, places, add_special_tokens)

    def encode_plain(self, text: str, place: Place = Place.FIRST) -> list[int]:
        """Return the ids of a text in which the names of special tokens are ordinary characters.

        The result holds no special id, except that of the unknown token.  Tokens that were added without the mark
        `special` (Qwen's "<tool_call>") are ordinary vocabulary, and are recognised here too.
        """
        with self._library(text):
            ids = self._plain.encode(text, place)
            return ids if self._forbidden.isdisjoint(ids) else self._taken_apart(text, place)

    def encode_plain_batch(self, texts: Sequence[str], places: Sequence[Place] | None = None) -> list[list[int]]:
        """Return the ids of each text, as `encode_plain` does, on all cores."""
        with self._library(*texts):
            found = self._plain.encode_batch(texts, places)
            for i, ids in enumerate(found):
                if not self._forbidden.isdisjoint(ids):
                    found[i] = self._taken_apart(texts[i], Place.FIRST if places is None else places[i])
        return found

    def encode_pieces(self, pieces: Sequence[tuple[str, bool]]) -> list[list[int]]:
        """Return the ids of each piece of one text: (its text, whether it is a special token), in their order.

        Joined, they are the ids of the whole text, except that a piece that is not a special token is plain
        (`encode_plain`) and that no token crosses the border of two pieces.  White space that a special token takes
        away beside it (lstrip, rstrip) has no ids.  DataError for a special token that the vocabulary lacks.
        """
        made: list[list[int]] = []
        place = Place.FIRST
        for (name, special), text in zip(pieces, without_strip(pieces, self._strips), strict=True):
            if special:
                if (token_id := self.id_of(name)) is None:
                    raise DataError(f"{self.name}: {name!r} is not in the vocabulary, and cannot be a special token")
                made.append([token_id])
                place = Place.AFTER_SPECIAL
            else:
                made.append(list(self._piece(text, place)) if text else [])
                place = Place.AFTER_TEXT if text else place
        return made

    def encode_prompt(self, text: str) -> list[int]:
        """Return the ids of a text that is to be continued: what the post-processor puts before it, and its own.

        What the post-processor puts after a text ends it, so that is left out.
        """
        return [*self.around[0], *self.encode(text)]

    @cached_property
    def around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The ids that the post-processor puts before a text, and those after it: most often BOS and nothing."""
        candidates = ("a", "0", *(token for token in self._tokens if token))
        with self._library():
            probe = next((text for text in candidates if self._recognising.encode(text)), "")
            encoding = self.backend.encode(probe, add_special_tokens=True)
        own = [i for i, added in enumerate(encoding.special_tokens_mask) if not added] or [len(encoding.ids)]
        return tuple(encoding.ids[: own[0]]), tuple(encoding.ids[own[-1] + 1 :])

    def around_document(self, end: int | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the ids before and after a document that `end` ends: the post-processor's, and `end` if it is not the
        last of them."""
        before, after = self.around
        return before, after if end is None or after[-1:] == (end,) else (*after, end)

    @cached_property
    def _piece(self) -> Callable[[str, Place], tuple[int, ...]]:
        """`encode_plain`, which remembers: the pieces that a template writes are the same in every conversation."""
        return functools.lru_cache(maxsize=4096)(lambda text, place: tuple(self.encode_plain(text, place)))

    @cached_property
    def _strips(self) -> dict[str, tuple[bool, bool]]:
        return {entry["content"]: (entry["lstrip"], entry["rstrip"]) for entry in self._described["added_tokens"]}

    def _taken_apart(self, text: str, place: Place) -> list[int]:
        """Return the ids of a text in which the model itself (unigram, or one that looks up whole words) finds special
        tokens: cut inside their names."""
        ids: list[int] = []
        for piece in re.split(self._inside_specials, text):
            ids += self._plain.encode(piece, place)
            place = Place.AFTER_TEXT if piece else place
        return ids

    @cached_property
    def _recognising(self) -> PlacedBackend:
        return PlacedBackend(self.backend, self._described, plain=False)

    @cached_property
    def _plain(self) -> PlacedBackend:
        return PlacedBackend(self.backend, self._described, plain=True)

    @cached_property
    def _forbidden(self) -> frozenset[int]:
        return self.special_ids - {self.unk_id}  # type: ignore[arg-type]

    @cached_property
    def _inside_specials(self) -> re.Pattern[str]:
        names = [name for name in map(self.token_of, self._forbidden) if name]
        return re.compile("|".join(f"(?<={re.escape(name[:1])})(?={re.escape(name[1:])})" for name in names))

    # -- ids to text ---------------------------------------------------------------------------

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """Return the text of ids; an id that no token has gives U+FFFD, as do bytes that are not UTF-8."""
        parts: list[list[int]] = [[]]
        for i in map(int, ids):
            if self.token_of(i) is None:
                parts.append([])
            else:
                parts[-1].append(i)
        return REPLACEMENT.join(self.decode_known(part, skip_special_tokens) for part in parts)

    def decode_known(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        """Return the text of ids that all have a token."""
        with self._library():
            return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def stream(self, skip_special_tokens: bool = False, context: Sequence[int] = ()) -> TokenStream:
        """Return a decoder that takes ids one by one; its text is that of the continuation of `context`."""
        kind = ByteStream if self._is_byte_level else WindowStream
        return kind(self, skip_special_tokens, context)

    @property
    def begins_after(self) -> frozenset[int]:
        """The added tokens after which the text begins anew, with a space mark (see `places`)."""
        return self._plain.begins_after

    @property
    def _is_byte_level(self) -> bool:
        return (self._described.get("decoder") or {}).get("type") == "ByteLevel"

    def count_bytes(self, ids: npt.ArrayLike, before: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Return the bytes of text that each id is where it follows the id in `before` (-1: none), of the same shape.

        A special token has none; a byte that is not UTF-8 is one.
        """
        return self._token_bytes.count(ids, before)

    @cached_property
    def _token_bytes(self) -> TokenBytes:
        edges = {self.bos_id, self.eos_id, *self.around[0], *self.around[1], *self.begins_after} - {None}
        return TokenBytes(self, edges, self._is_byte_level, self._plain.begins_with_space)  # type: ignore[arg-type]

    @contextlib.contextmanager
    def _library(self, *texts: str) -> Iterator[None]:
        """Make DataErrors of what the library says of its rules and of `texts`; every text and id goes through here."""
        remedy = "its normalizer, pre_tokenizer or decoder asks for more than the library can do: correct them"
        try:
            with library_errors(f"{self.name}: the `tokenizers` library fails on this text", remedy):
                yield
        except TypeError:  # half a surrogate pair, of which it only says that a text must be a str
            for text in texts:
                _check_unicode(text)
            raise

    # -- vocabulary ----------------------------------------------------------------------------

    @cached_property
    def _tokens(self) -> list[str | None]:
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        tokens: list[str | None] = [None] * (max(vocabulary.values(), default=-1) + 1)
        for token, i in vocabulary.items():
            tokens[i] = token
        return tokens

    @property
    def vocab_size(self) -> int:
        """The largest id plus one: what a model's vocab_size must be at least."""
        return len(self._tokens)

    def id_of(self, token: str) -> int | None:
        """Return the id of a token by its name in the vocabulary, or None."""
        return self.backend.token_to_id(token)

    def token_of(self, token_id: int) -> str | None:
        """Return the name of an id in the vocabulary, or None."""
        return self._tokens[token_id] if 0 <= token_id < len(self._tokens) else None

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """The ids of all tokens that are marked as special."""
        return frozenset(entry["id"] for entry in self._described["added_tokens"] if entry["special"])

    def _role(self, role: str) -> int | None:
        key = f"{role}_token"
        named = self.config.get(key)
        if named is not None:
            check_name(named, key, f"{self.name}, configuration", self.id_of)
            return self.id_of(token_name(named))
        unknown = self._described["model"].get("unk_token") if role == "unk" else None
        if unknown is not None:
            return self.id_of(unknown)
        if key in self.config:
            return None  # null: there is none
        usual = (self.id_of(name) for name in USUAL_NAMES[role])
        return next((i for i in usual if i is not None and i in self.special_ids), None)

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the library's JSON with sorted keys and no spaces: the same for every file that gives the same
        tokenizer."""
        canonical = json.dumps(self._described, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(canonical.encode("utf-8")).hexdigest()

    # -- on the disk ---------------------------------------------------------------------------

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write tokenizer.json and tokenizer_config.json into a directory, in the form that `transformers` reads."""
        directory = Path(directory)
        settings: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": 1 << 30,
            "clean_up_tokenization_spaces": False,
            **self.config,
        }
        for role in ROLES:
            token_id = getattr(self, f"{role}_id")
            settings.setdefault(f"{role}_token", None if token_id is None else self.token_of(token_id))
        settings.pop("chat_template", None)
        if self.chat_template is not None:
            settings["chat_template"] = self.chat_template
        texts = {
            CONFIG_FILE: json.dumps(settings, indent=2, ensure_ascii=False) + "\n",
            TOKENIZER_FILE: self.backend.to_str(pretty=True),
        }
        with atomic_files(directory / TOKENIZER_FILE) as open_new:
            for name, text in texts.items():
                open_new(directory / name).write(text.encode("utf-8"))


def _check_unicode(text: str) -> None:
    """Raise DataError for half a surrogate pair, of which the library only says that the text must be a str."""
    if not isinstance(text, str):
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"text: character {error.start} is U+{ord(text[error.start]):04X}, half of a surrogate pair, which UTF-8 "
            "cannot hold; replace it, for example by text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')"
        ) from None
