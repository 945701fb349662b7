# ruff: noqa: RUF009 (a call of `opt` declares a field, it is not a shared default)
"""Token files from text, in constant memory, and only when they are not there yet.

    X.bin         u32 ids of all documents, each between what the tokenizer's post-processor puts around a text and
                  followed by an end-of-document token (tokens.py)
    X.bin.json    the sidecar: tokenizer, counts, settings, what was read (sidecar.py)

Files appear when all is written, X.bin last; whatever happens before that leaves what was there.
"""

import dataclasses
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..config import ON, Config, opt
from ..errors import ConfigError, DataError, counted
from ..files import atomic_files, atomic_text
from .documents import Documents, Listing, Paths, TextFormat, list_inputs, sidecar_path
from .encoders import ByteEncoder, Encoder, TextEncoder
from .pipeline import TRAIN, Divider, Tally, batches, encoded, pieces
from .sidecar import TokenizerRef, TokensInfo, around_documents, read_sidecar
from .tokenizer import Tokenizer
from .tokens import check_output

__all__ = ["TokenizeConfig", "TokenizeReport", "tokenize_if_needed", "tokenize_to_file", "valid_path"]

Progress = Callable[[int, int], None]

READING = 2  # changes when the same files and settings give other documents than with an earlier version


@dataclass(frozen=True, kw_only=True)
class TokenizeConfig(Config):
    """What decides which ids come of the inputs."""

    tokenizer: str | None = opt(
        None,
        "tokenizer.json, a directory with one, or a GGUF file; text becomes bytes when not given",
        common=True,
        path=True,
    )
    end_of_document: str | None = opt(
        None, "token after each document; the tokenizer's own when not given", acts={"tokenizer": ON}
    )
    plain: bool = opt(
        False, "special tokens that are written in the text are ordinary characters", acts={"tokenizer": ON}
    )
    format: TextFormat = opt(
        TextFormat.AUTO,
        "what files hold; jsonl: a document in each row; auto: by the file's name",
        flag="data-format",
        common=True,
    )
    field: str = opt("text", "key of the text in a row", common=True)
    skip_bad_rows: bool = opt(
        False, "leave out rows that cannot be read; damaged, or without the key; they are counted", common=True
    )
    valid_fraction: float = opt(
        0.0, "share kept for validation (0 = none); of the documents, in a second file", common=True
    )
    seed: int = opt(0, "which documents these are", acts={"valid_fraction": ON})

    def validate(self) -> None:
        """Raise `ConfigError` naming field, value, rule and remedy."""
        self._require(
            "valid_fraction", 0 <= self.valid_fraction < 1, "be at least 0 and below 1", "a usual value is 0.01"
        )
        self._require("field", self.field != "", "not be empty", "the usual key is text")
        self._require_at_least(0, "seed")

    def settings(self) -> dict[str, Any]:
        """Return what the sidecar remembers: all but the tokenizer, which it knows by its hash."""
        return {"reading": READING, **{name: value for name, value in self.to_dict().items() if name != "tokenizer"}}


@dataclass(frozen=True)
class TokenizeReport:
    """What was written, or was there already (`reused`).

    documents, bytes, tokens  of all files together; bytes are those of the text
    skipped                   files of directories that were left out, and why
    bad_rows, empty_rows      rows that were left out; `first_bad_row` says where and why
    notes                     lines about these, and about what was read in another way than one might think
    forced_cuts               places where ids may differ from those of the whole document (data/pieces.py)
    files                     path -> what its sidecar says
    """

    documents: int
    bytes: int
    tokens: int
    skipped: tuple[str, ...] = ()
    bad_rows: int = 0
    empty_rows: int = 0
    first_bad_row: str = ""
    notes: tuple[str, ...] = ()
    forced_cuts: int = 0
    reused: bool = False
    files: dict[Path, TokensInfo] = dataclasses.field(default_factory=dict)


def valid_path(output: Path) -> Path:
    """Return where the validation part goes: beside the training part, valid.bin beside train.bin."""
    if "train" in output.name:
        return output.with_name("valid".join(output.name.rsplit("train", 1)))
    return output.with_name(f"{output.stem}-valid{output.suffix}")


# -- writing -----------------------------------------------------------------------------------


def tokenize_to_file(
    inputs: Paths,
    output: str | os.PathLike[str],
    config: TokenizeConfig | None = None,
    *,
    stdin: BinaryIO | None = None,
    progress: Progress | None = None,
) -> TokenizeReport:
    """Write the ids of `inputs` (files, directories, "-" for standard input) and their sidecar; return the counts.

    Memory does not grow with the texts.  With `config.valid_fraction`, whole documents go to `valid_path`.
    progress(bytes read, tokens written) is called after each batch.  DataError names the file and place of what is
    wrong; OSError passes through.
    """
    return _Job(inputs, output, config, stdin).write(progress)


class _Job:
    """Inputs that become one file, or one of training and one of validation, in one way."""

    def __init__(
        self, inputs: Paths, output: str | os.PathLike[str], config: TokenizeConfig | None, stdin: BinaryIO | None
    ) -> None:
        self.inputs, self.output, self.config = list(inputs), Path(output), config or TokenizeConfig()
        self.stdin = stdin
        self.encoder = _encoder(self.config)
        self.listing = list_inputs(self.inputs)
        self.outputs = [self.output, valid_path(self.output)] if self.config.valid_fraction else [self.output]

    def documents(self) -> Documents:
        """Return the documents of the inputs, unread."""
        return Documents(
            self.inputs,
            format=self.config.format,
            field=self.config.field,
            skip_bad_rows=self.config.skip_bad_rows,
            utf8=self.config.tokenizer is not None,
            stdin=self.stdin,
        )

    def write(self, progress: Progress | None) -> TokenizeReport:
        """Write the files and their sidecars."""
        documents, tallies = self.documents(), [Tally() for _ in self.outputs]
        with atomic_files(self.output) as open_new:
            sidecars = [open_new(sidecar_path(path)) for path in self.outputs]  # in place before what they describe
            files = [open_new(check_output(path)) for path in self.outputs]
            divider = Divider(self.config.valid_fraction, self.config.seed)
            for piece, ids in encoded(batches(pieces(documents, self.encoder, divider, tallies)), self.encoder):
                files[piece.part].write(ids.astype("<u4", copy=False).data)
                tallies[piece.part].tokens += len(ids)
                if piece.last and progress is not None:
                    progress(documents.bytes_read, sum(tally.tokens for tally in tallies))
            self._check_parts(documents, tallies)
            infos = [self._describe(tally, part, documents.content) for part, tally in enumerate(tallies)]
            for sidecar, info in zip(sidecars, infos, strict=True):
                sidecar.write(info.to_json().encode())
        return TokenizeReport(
            **_sums(infos),
            skipped=tuple(documents.skipped),
            bad_rows=documents.bad_rows,
            empty_rows=documents.empty_rows,
            first_bad_row=documents.first_bad_row,
            notes=tuple(documents.notes()),
            forced_cuts=self.encoder.forced,
            files=dict(zip(self.outputs, infos, strict=True)),
        )

    def _check_parts(self, documents: Documents, tallies: list[Tally]) -> None:
        count = sum(tally.documents for tally in tallies)
        if count == 0:
            raise documents.nothing_left()
        if not all(tally.documents for tally in tallies):
            name = "validation" if tallies[TRAIN].documents else "training"
            parted = f"valid_fraction ({self.config.valid_fraction:g}) of {counted(count, 'document')}"
            raise DataError(
                f"{', '.join(documents.inputs)}: {parted} leaves none for "
                f"{name}; a file is one document, a row of JSONL too: give more of them or another share, or leave "
                "--valid-fraction out, and abi-train run keeps the last tokens for validation (--valid-fraction)"
            )

    def _describe(self, tally: Tally, part: int, content: str) -> TokensInfo:
        reference, encoder = None, self.encoder
        if isinstance(encoder, TextEncoder):
            place = _relative(Path(encoder.tokenizer.name), self.output.parent)
            reference = TokenizerRef(place, encoder.tokenizer.hash)
        return TokensInfo(
            tokens=tally.tokens,
            documents=tally.documents,
            bytes=tally.size,
            vocab_size=encoder.vocab_size,
            end_of_document=encoder.after[-1],
            part=("train", "valid")[part] if self.config.valid_fraction else "all",
            tokenizer=reference,
            settings=self.config.settings(),
            given=[str(given) for given in self.inputs],
            listing=self.listing,
            content=content,
            before_document=encoder.before,
            after_document=encoder.after,
        )

    # -- what is there already -----------------------------------------------------------------

    def problem(self, path: Path) -> str:
        """Return what speaks against using or replacing a file; "" for nothing, or if there is no such file."""
        info = read_sidecar(path)  # DataError if what has its name is something else
        if not path.is_file():
            return ""
        if info is None:
            return f"is there, without {sidecar_path(path).name} that says what it is"
        encoder = self.encoder
        made_with = None if info.tokenizer is None else info.tokenizer.sha256
        wanted = encoder.tokenizer.hash if isinstance(encoder, TextEncoder) else None
        changes = [f"tokenizer {_short(made_with)}, now {_short(wanted)}"] if made_with != wanted else []
        if not changes and (info.before_document, info.after_document) != (encoder.before, encoder.after):
            changes.append(f"ids around documents {info.around}, now {around_documents(encoder.before, encoder.after)}")
        inputs = list(map(str, self.inputs))
        if list(map(os.path.normpath, info.given)) != list(map(os.path.normpath, inputs)):  # texts/, texts
            changes.append(f"inputs {' '.join(info.given)}, now {' '.join(inputs)}")
        for name, value in self.config.settings().items():
            if info.settings.get(name) != value:
                changes.append(f"{name} {info.settings.get(name)}, now {value}")
        return f"was made in another way ({'; '.join(changes)})" if changes else ""

    def made(self) -> dict[Path, TokensInfo] | None:
        """Return the sidecars of the files if all are there, whole, made in this way and of these data."""
        info = read_sidecar(self.output)
        if info is None or self.listing is None or self.problem(self.output):
            return None
        found: dict[Path, TokensInfo] = {}
        for path in self.outputs:
            each = read_sidecar(path)
            if each is None or each.content != info.content or not path.is_file():
                return None
            if path.stat().st_size != 4 * each.tokens:
                return None
            found[path] = each
        return found if self._holds_same(info, self.listing) else None

    def _holds_same(self, info: TokensInfo, listing: Listing) -> bool:
        """Say whether the inputs are those that `info` describes: by their listing, else by reading them."""
        if info.listing == listing:
            return True
        if info.listing is None or (info.listing.files, info.listing.bytes) != (listing.files, listing.bytes):
            return False
        documents = self.documents()
        for document in documents:
            for _ in document.blocks:
                pass
        return documents.content == info.content


def _encoder(config: TokenizeConfig) -> Encoder:
    if config.tokenizer is None:
        return ByteEncoder()
    encoder = TextEncoder(Tokenizer.load(config.tokenizer), config.end_of_document, config.plain)
    if not encoder.after:
        raise ConfigError(
            f"{encoder.tokenizer.name} says nothing about an end-of-text token; name the token that follows each "
            "document with --end-of-document"
        )
    return encoder


def _relative(path: Path, start: Path) -> str:
    try:
        return Path(os.path.relpath(path, start)).as_posix()
    except ValueError:  # on another drive of Windows
        return os.path.abspath(path)


def _short(digest: str | None) -> str:
    return "none (bytes)" if digest is None else digest[:12]


def _sums(infos: Collection[TokensInfo]) -> dict[str, Any]:
    return {name: sum(getattr(info, name) for info in infos) for name in ("documents", "bytes", "tokens")}


def tokenize_if_needed(
    inputs: Paths,
    output: str | os.PathLike[str],
    config: TokenizeConfig | None = None,
    *,
    replace: bool = False,
    stdin: BinaryIO | None = None,
    progress: Progress | None = None,
) -> TokenizeReport:
    """Do what `tokenize_to_file` does, unless `output` is there and was made of the same data in the same way.

    Files whose path, size and time of change are the same hold the same data; if only path or time differ, they are
    read once more.  Changed data are tokenized again.  A file that was made in another way, or by something else, is
    replaced if `replace` says so; else it is a ConfigError (a sidecar that cannot be read: DataError).
    """
    job = _Job(inputs, output, config, stdin)
    if not replace:  # an output of ours vouches for the files beside it; without one, each must be ours
        for path in [job.output] if job.output.is_file() else job.outputs:
            problem = job.problem(path)
            if problem:
                raise ConfigError(f"out ({path}) {problem}; choose another name, or replace it with --force")
            if job.listing is None and path.is_file():
                raise ConfigError(
                    f"out ({path}) must not be there yet when standard input is read, which cannot be compared with "
                    "what made it; choose another name, or replace it with --force"
                )
    made = job.made() if job.output.is_file() else None
    if made is None:
        return job.write(progress)
    for path, info in made.items():
        if info.listing != job.listing:
            atomic_text(sidecar_path(path), dataclasses.replace(info, listing=job.listing).to_json())
    return TokenizeReport(**_sums(made.values()), reused=True, files=made)
