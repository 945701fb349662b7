"""X.bin.json beside a token file X.bin: which tokenizer made the ids, how many, from what, with which settings.

A run reads from it how large the vocabulary is and which tokenizer turns ids into text; `abi-train tokenize` reads
from it whether there is anything to do.
"""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from ..errors import DataError
from ..files import json_text
from ..untrusted import check, read_json
from .documents import Listing, sidecar_path
from .tokenizer import Tokenizer

__all__ = ["TokenizerRef", "TokensInfo", "read_sidecar"]

FORMAT = 2  # 1 had no before_document and after_document: nothing but end_of_document was around a document


@dataclass(frozen=True)
class TokenizerRef:
    """Path of a tokenizer.json, relative to the sidecar if that is how it was found last, and the tokenizer's hash."""

    path: str
    sha256: str


@dataclass(frozen=True)
class TokensInfo:
    """What a sidecar says.

    tokens, documents, bytes   of this file; bytes are those of its text as UTF-8
    vocab_size                 every id is below it
    end_of_document            the id after each document
    part                       "all", or "train" or "valid" of documents that were divided
    tokenizer                  None: ids are bytes
    settings                   all that decides which ids come of the same inputs
    given                      the inputs as they were named
    listing                    files, bytes and digest of `list_inputs`; None for standard input
    content                    SHA-256 of what was read
    before_document            ids that begin each document, and those that end it: what the tokenizer's post-processor
    after_document             puts around a text, and then end_of_document
    """

    tokens: int
    documents: int
    bytes: int
    vocab_size: int
    end_of_document: int
    part: str
    tokenizer: TokenizerRef | None
    settings: dict[str, Any]
    given: list[str]
    listing: Listing | None
    content: str
    before_document: tuple[int, ...]
    after_document: tuple[int, ...]

    @property
    def around(self) -> str:
        """What is around a document, for messages."""
        return around_documents(self.before_document, self.after_document)

    def to_json(self) -> str:
        """Return the text of the sidecar."""
        return json_text({"format": FORMAT, **dataclasses.asdict(self)})

    def load_tokenizer(self, path: str | os.PathLike[str]) -> Tokenizer | None:
        """Return the tokenizer that made the token file `path`; None if the ids are bytes.

        DataError if it is not where it was, or is another one.
        """
        if self.tokenizer is None:
            return None
        place = Path(path).parent / self.tokenizer.path
        remedy = "put it back, or name the place of that tokenizer with --tokenizer"
        if not place.is_file():
            raise DataError(f"{path} was made with the tokenizer {place}, which is not there; {remedy}")
        tokenizer = Tokenizer.load(place)
        self.check_tokenizer(tokenizer, path, remedy)
        return tokenizer

    def check_tokenizer(self, tokenizer: Tokenizer, path: str | os.PathLike[str], remedy: str) -> None:
        """Raise DataError if `tokenizer` is not the one that made the token file `path`."""
        if self.tokenizer is None or tokenizer.hash != self.tokenizer.sha256:
            made = "as bytes" if self.tokenizer is None else f"with another one (hash {self.tokenizer.sha256[:12]})"
            raise DataError(
                f"{tokenizer.name} has the hash {tokenizer.hash[:12]}, but {path} was made {made}; {remedy}"
            )

    def other_convention(self, tokenizer: Tokenizer, path: str | os.PathLike[str]) -> str | None:
        """Return what to say if the documents of the token file `path` do not begin and end as the post-processor of
        its tokenizer, which encodes prompts and evaluated texts, begins and ends a text; None if they do."""
        wanted = tokenizer.around_document(self.end_of_document)
        if self.tokenizer is None or (self.before_document, self.after_document) == wanted:
            return None
        return (
            f"{path} has ids {self.around} around its documents, but generate and eval put {around_documents(*wanted)} "
            "around a text, as the tokenizer says; make the file again with `abi-train tokenize --force`"
        )


# What is an object of ours, or a tuple, is another thing in JSON.
SCHEMA = get_type_hints(TokensInfo) | {
    "tokenizer": dict[str, str] | None,
    "listing": dict[str, int | str] | None,
    "before_document": list[int],
    "after_document": list[int],
}


def around_documents(before: tuple[int, ...], after: tuple[int, ...]) -> str:
    """Return ids before and after a document in words."""
    return " ".join([*map(str, before), "TEXT", *map(str, after)])


def read_sidecar(path: str | os.PathLike[str]) -> TokensInfo | None:
    """Return what the sidecar of the token file `path` says, None if there is none; DataError if it is damaged."""
    file = sidecar_path(path)
    remedy = "delete it, or make both files again with `abi-train tokenize --force`"
    try:
        values = read_json(file, {"format": int}, error=DataError, remedy=remedy)
        version = values.pop("format")
        if version not in (1, FORMAT):
            raise DataError(f"{file} has format {version}, this version reads 1 and {FORMAT}; {remedy}")
        if version == 1:
            values |= {"before_document": [], "after_document": [values.get("end_of_document")]}
        check(values, SCHEMA, str(file), error=DataError, remedy=remedy)
        if values["tokenizer"] is not None:
            values["tokenizer"] = TokenizerRef(**values["tokenizer"])
        if values["listing"] is not None:
            sizes = {"files": int, "bytes": int, "digest": str}
            check(values["listing"], sizes, f"{file}: listing", error=DataError, remedy=remedy)
            values["listing"] = Listing(**values["listing"])
        for name in ("before_document", "after_document"):
            values[name] = tuple(values[name])
        info = TokensInfo(**values)
    except FileNotFoundError:
        return None
    except (TypeError, KeyError) as error:  # a field too many, or too few
        raise DataError(f"{file} does not describe a token file ({error}); {remedy}") from None
    return info
