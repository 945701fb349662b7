# ruff: noqa: RUF009 (a call of `opt` declares a field, it is not a shared default)
"""Token files from text, in constant memory, and only when they are not there yet.

    X.bin         u32 ids of all documents, each between what the tokenizer's post-processor puts around a text and
                  followed by an end-of-document token (tokens.py)
    X.bin.json    the sidecar: tokenizer, counts, settings, what was read (sidecar.py)

Files appear when all is written, X.bin last; whatever happens before that leaves what was there.
"""

import dataclasses
import os
from collections.abc import Callable
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

    tokenizer: str | None = opt(None, "tokenizer.json, or a directory with one; text becomes bytes when not given")
    end_of_document: str | None = opt(
        None, "token after each document; the tokenizer's own when not given", acts={"tokenizer": ON}
    )
    plain: bool = opt(
        False, "special tokens that are written in the text are ordinary characters", acts={"tokenizer": ON}
    )
    format: TextFormat = opt(TextFormat.AUTO, "text, jsonl (a document in each row), or by the file's name")
    field: str = opt("text", "key of the text in a row")
    skip_bad_rows: bool = opt(False, "leave out rows that are damaged or lack the key; they are counted")
    valid_split: float = opt(0.0, "share of the documents for a second file, for validation (0 = none)")
    seed: int = opt(0, "which documents these are", acts={"valid_split": ON})

    def validate(self) -> None:
        """Raise `ConfigError` naming field, value, rule and remedy."""
        self._require("valid_split", 0 <= self.valid_split < 1, "be at least 0 and below 1", "a usual value is 0.01")
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

    Memory does not grow with the texts.  With `config.valid_split`, whole documents go to a second file, `valid_path`.
    progress(bytes read, tokens written) is called after each batch.  DataError names the file and place of what is
    wrong; OSError passes through.
    """
    inputs, config = list(inputs), config or TokenizeConfig()
    return _write(inputs, Path(output), config, _encoder(config), list_inputs(inputs), stdin, progress)


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


def _documents(inputs: Paths, config: TokenizeConfig, stdin: BinaryIO | None) -> Documents:
    return Documents(
        inputs,
        format=config.format,
        field=config.field,
        skip_bad_rows=config.skip_bad_rows,
        utf8=config.tokenizer is not None,
        stdin=stdin,
    )


def _outputs(output: Path, config: TokenizeConfig) -> list[Path]:
    return [output, valid_path(output)] if config.valid_split else [output]


def _write(
    inputs: Paths,
    output: Path,
    config: TokenizeConfig,
    encoder: Encoder,
    listing: Listing | None,
    stdin: BinaryIO | None,
    progress: Progress | None,
) -> TokenizeReport:
    outputs = _outputs(output, config)
    documents = _documents(inputs, config, stdin)
    tallies = [Tally() for _ in outputs]
    with atomic_files(output) as open_new:
        sidecars = [open_new(sidecar_path(path)) for path in outputs]  # in place before the file that they describe
        files = [open_new(check_output(path)) for path in outputs]
        stream = pieces(documents, encoder, Divider(config.valid_split, config.seed), tallies)
        for piece, ids in encoded(batches(stream), encoder):
            files[piece.part].write(ids.astype("<u4", copy=False).data)
            tallies[piece.part].tokens += len(ids)
            if piece.last and progress is not None:
                progress(documents.bytes_read, sum(tally.tokens for tally in tallies))
        _check_parts(documents, tallies, config)
        infos = [
            _describe(tally, part, inputs, output, config, encoder, listing, documents.content)
            for part, tally in enumerate(tallies)
        ]
        for sidecar, info in zip(sidecars, infos, strict=True):
            sidecar.write(info.to_json().encode())
    return _report(dict(zip(outputs, infos, strict=True)), documents, encoder)


def _check_parts(documents: Documents, tallies: list[Tally], config: TokenizeConfig) -> None:
    count = sum(tally.documents for tally in tallies)
    if count == 0:
        raise documents.nothing_left()
    if not all(tally.documents for tally in tallies):
        name = "validation" if tallies[TRAIN].documents else "training"
        parted = f"valid_split ({config.valid_split:g}) of {counted(count, 'document')}"
        raise DataError(
            f"{', '.join(documents.inputs)}: {parted} leaves none for "
            f"{name}; a file is one document, a row of JSONL too: give more of them or another share, or leave "
            "--valid-split out, and abi-train run keeps the last tokens for validation (--valid-fraction)"
        )


def _describe(
    tally: Tally,
    part: int,
    inputs: Paths,
    output: Path,
    config: TokenizeConfig,
    encoder: Encoder,
    listing: Listing | None,
    content: str,
) -> TokensInfo:
    reference = None
    if isinstance(encoder, TextEncoder):
        reference = TokenizerRef(_relative(Path(encoder.tokenizer.name), output.parent), encoder.tokenizer.hash)
    return TokensInfo(
        tokens=tally.tokens,
        documents=tally.documents,
        bytes=tally.size,
        vocab_size=encoder.vocab_size,
        end_of_document=encoder.after[-1],
        part=("train", "valid")[part] if config.valid_split else "all",
        tokenizer=reference,
        settings=config.settings(),
        given=[str(given) for given in inputs],
        listing=listing,
        content=content,
        before_document=encoder.before,
        after_document=encoder.after,
    )


def _relative(path: Path, start: Path) -> str:
    try:
        return Path(os.path.relpath(path, start)).as_posix()
    except ValueError:  # on another drive of Windows
        return os.path.abspath(path)


def _report(files: dict[Path, TokensInfo], documents: Documents | None, encoder: Encoder) -> TokenizeReport:
    infos = files.values()
    sums = {name: sum(getattr(info, name) for info in infos) for name in ("documents", "bytes", "tokens")}
    if documents is None:
        return TokenizeReport(**sums, reused=True, files=files)
    return TokenizeReport(
        **sums,
        skipped=tuple(documents.skipped),
        bad_rows=documents.bad_rows,
        empty_rows=documents.empty_rows,
        first_bad_row=documents.first_bad_row,
        notes=tuple(documents.notes()),
        forced_cuts=encoder.forced,
        files=files,
    )


# -- what is there already ---------------------------------------------------------------------


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
    replaced if `replace` says so; else it is a ConfigError (a sidecar that is none: DataError).
    """
    inputs, output, config = list(inputs), Path(output), config or TokenizeConfig()
    encoder, listing = _encoder(config), list_inputs(inputs)
    if not replace:  # where there is an output of ours, the rest is its own; where there is none, each must be ours
        for path in [output] if output.is_file() else _outputs(output, config):
            problem = _problem(inputs, path, config, encoder)
            if problem:
                raise ConfigError(f"output ({path}) {problem}; choose another name, or replace it with --force")
            if listing is None and path.is_file():
                raise ConfigError(
                    f"output ({path}) must not be there yet when standard input is read, which cannot be compared with "
                    "what made it; choose another name, or replace it with --force"
                )
    if output.is_file():
        there = _there(inputs, output, config, encoder)
        if there is not None and listing is not None and _same_data(inputs, config, there[output], listing):
            for path, info in there.items():
                if info.listing != listing:
                    atomic_text(sidecar_path(path), dataclasses.replace(info, listing=listing).to_json())
            return _report(there, None, encoder)
    return _write(inputs, output, config, encoder, listing, stdin, progress)


def _problem(inputs: list[Any], path: Path, config: TokenizeConfig, encoder: Encoder) -> str:
    """Return what speaks against using or replacing a file; "" for nothing, or if there is no such file."""
    info = read_sidecar(path)  # DataError if what has its name is something else
    if not path.is_file():
        return ""
    if info is None:
        return f"is there, without {sidecar_path(path).name} that says what it is"
    made_with = None if info.tokenizer is None else info.tokenizer.sha256
    wanted = encoder.tokenizer.hash if isinstance(encoder, TextEncoder) else None
    changes = [f"tokenizer {_short(made_with)}, now {_short(wanted)}"] if made_with != wanted else []
    if not changes and (info.before_document, info.after_document) != (encoder.before, encoder.after):
        changes.append(f"ids around documents {info.around}, now {around_documents(encoder.before, encoder.after)}")
    if list(map(os.path.normpath, info.given)) != [os.path.normpath(str(given)) for given in inputs]:  # texts/, texts
        changes.append(f"inputs {' '.join(info.given)}, now {' '.join(map(str, inputs))}")
    for name, value in config.settings().items():
        if info.settings.get(name) != value:
            changes.append(f"{name} {info.settings.get(name)}, now {value}")
    if changes:
        return f"was made in another way ({'; '.join(changes)})"
    return ""


def _there(inputs: list[Any], output: Path, config: TokenizeConfig, encoder: Encoder) -> dict[Path, TokensInfo] | None:
    """Return the sidecars of the files if all are there, whole, and made in this way."""
    info = read_sidecar(output)
    if info is None or _problem(inputs, output, config, encoder):
        return None
    found = {path: read_sidecar(path) for path in _outputs(output, config)}
    whole = {path: each for path, each in found.items() if each is not None and _is_whole(path, each, info.content)}
    return whole if len(whole) == len(found) else None


def _is_whole(path: Path, info: TokensInfo, content: str) -> bool:
    return info.content == content and path.is_file() and path.stat().st_size == 4 * info.tokens


def _short(digest: str | None) -> str:
    return "none (bytes)" if digest is None else digest[:12]


def _same_data(inputs: Paths, config: TokenizeConfig, info: TokensInfo, listing: Listing) -> bool:
    if info.listing == listing:
        return True
    if info.listing is None or (info.listing.files, info.listing.bytes) != (listing.files, listing.bytes):
        return False
    documents = _documents(inputs, config, None)
    for document in documents:
        for _ in document.blocks:
            pass
    return documents.content == info.content
