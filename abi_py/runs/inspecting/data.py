"""Token files, tokenizers, conversations, texts."""

import codecs
import itertools
import shlex
from pathlib import Path
from typing import Any

from ...data.conversation_rows import RowReader
from ...data.documents import expand, sidecar_path
from ...data.rows import first_row
from ...data.selection import conversation_files
from ...data.sidecar import TokensInfo, read_sidecar
from ...data.sources import ROWS, is_token_file, kind_of, look_alike, utf_16
from ...data.tokenizer import TOKENIZER_FILE, Tokenizer
from ...errors import DataError, counted, shown
from ...formats.gguf.container import SUFFIX
from ...formats.special_tokens import ROLES
from ...untrusted import JSON_BYTES, read_json
from .facts import Inspection

__all__ = [
    "TOKENIZER_FILE",
    "describe_tokenizer",
    "directory",
    "file",
    "read_object",
    "sidecar",
    "tokenizer",
    "tokenizer_directory",
]

ROWS_READ = 1000  # of a file of rows; more would take long and say little
TORCH = (".bin", ".pt", ".pth", ".ckpt")
SHOWN = 12  # special tokens by name


def read_object(found: Inspection) -> dict[str, Any] | None:
    """Return the content of a .json file if it is one object; None for rows, and for what is too large to be settings.

    DataError if it is not JSON.
    """
    if found.bytes > JSON_BYTES:
        return None
    content = read_json(found.path, Any, error=DataError, remedy="it is damaged: copy it again")
    return content if isinstance(content, dict) else None


# -- tokenizers --------------------------------------------------------------------------------------


def describe_tokenizer(found: Inspection, place: Path) -> Tokenizer:
    """Add the facts of the tokenizer in `place`, and return it; DataError if it is damaged."""
    loaded = Tokenizer.load(place)
    roles = {}
    for role in ROLES:
        token_id = getattr(loaded, f"{role}_id")
        if token_id is not None:
            roles[role] = f"{token_id} {loaded.token_of(token_id)}"
    special = [str(loaded.token_of(i)) for i in sorted(loaded.special_ids)]
    template = loaded.chat_template
    found.facts["tokenizer"] = {
        "file": loaded.name,
        "ids": loaded.vocab_size,
        **roles,
        "special tokens": special if len(special) <= SHOWN else [*special[:SHOWN], f"and {len(special) - SHOWN} more"],
        "hash": loaded.hash,
        "chat template": None if template is None else f"{counted(len(template), 'character')} of Jinja",
    }
    return loaded


def tokenizer(found: Inspection, place: Path) -> None:
    """A tokenizer.json, alone or in a directory."""
    found.kind = "tokenizer"
    describe_tokenizer(found, place)
    name = shlex.quote(str(found.path))
    found.uses += [f"abi-train tokenize TEXTS --tokenizer {name} -o train.bin", f"abi-train run --data TEXTS "
                   f"--tokenizer {name}", f"abi-train tokenizer info {name}"]  # fmt: skip


def tokenizer_directory(found: Inspection) -> None:
    """A directory of a tokenizer's files."""
    found.bytes = sum(path.stat().st_size for path in found.path.iterdir() if path.is_file())
    tokenizer(found, found.path)


# -- token files -------------------------------------------------------------------------------------


def _describe_sidecar(found: Inspection, info: TokensInfo) -> None:
    found.facts |= {"documents": info.documents, "bytes of text": info.bytes, "vocabulary": info.vocab_size}
    found.facts |= {"around a document": info.around, "part": info.part}
    made = "bytes" if info.tokenizer is None else f"{info.tokenizer.path} (hash {info.tokenizer.sha256[:12]})"
    found.facts["ids of"] = made


def sidecar(found: Inspection) -> None:
    """X.bin.json."""
    found.kind = "description of a token file"
    tokens = found.path.with_suffix("")
    info = read_sidecar(tokens)
    if info is None:
        raise DataError(f"{found.path} is not called as the file that it describes, X.bin.json for X.bin; rename it")
    found.facts["tokens"] = info.tokens
    _describe_sidecar(found, info)
    if not tokens.is_file():
        found.problems.append(f"{tokens}, which it describes, is not there")
    else:
        found.uses.append(f"abi-train run --data {shlex.quote(str(tokens))}")


def _token_file(found: Inspection) -> None:
    found.kind = "token ids (u32)"
    tokens, rest = divmod(found.bytes, 4)
    found.facts["tokens"] = tokens
    if rest or not tokens:
        found.problems.append(f"{found.bytes:,} bytes are no whole number of 32-bit ids; damaged, or of another kind")
    info = found.attempt(read_sidecar, found.path)
    if info is not None:
        _describe_sidecar(found, info)
        if info.tokens != tokens:
            said = counted(info.tokens, "token")
            found.problems.append(f"{sidecar_path(found.path)} speaks of {said}; make both again")
        found.attempt(info.load_tokenizer, found.path)
    elif not found.problems:
        found.facts["ids of"] = f"unknown: there is no {sidecar_path(found.path).name}"
    if not rest and tokens:
        found.uses.append(f"abi-train run --data {shlex.quote(str(found.path))}")
        found.uses.append(f"abi-train eval MODEL {shlex.quote(str(found.path))}")


# -- rows and texts ----------------------------------------------------------------------------------


def _conversations(found: Inspection, files: list[Path]) -> None:
    found.kind = "conversations"
    good = turns = 0
    bad: list[str] = []
    whole = True
    for path in files:
        rows = RowReader(path, skip_bad_rows=True)
        try:
            for talk in itertools.islice(rows, max(0, ROWS_READ - good)):
                good += 1
                turns += len(talk.to_dicts())
        except DataError as problem:
            found.problems.append(str(problem))
        bad += rows.skipped
        whole = whole and good < ROWS_READ
    found.facts["conversations"] = good if whole else f"{good:,} were looked at; there may be more"
    found.facts["turns in one, on average"] = round(turns / max(1, good), 1)
    if bad:
        found.problems.append(f"{counted(len(bad), 'bad row')}; the first: {bad[0]}")
    name = shlex.quote(str(found.path))
    found.uses.append(f"abi-train preview {name} --tokenizer TOKENIZER")
    found.uses.append(f"abi-train run --data {name} --base FOLDER")
    found.uses.append(f"abi-train deepzig --data {name}")


def file(found: Inspection, head: bytes) -> None:
    """Anything else: rows, a token file, a text, or what is none of these."""
    path = found.path
    if not found.bytes:
        found.kind = "empty file"
        found.problems.append("there is nothing in it")
        return
    if path.suffix in TORCH and (head[:2] in (b"PK", b"\x80\x02") or path.name.startswith("pytorch_model")):
        found.kind = "PyTorch's file of a model, a pickle"
        found.problems.append("a pickle is a program and never opened; save the model as safetensors (save_pretrained)")
        return
    other = look_alike(head)
    packed = head[:2] == b"\x1f\x8b" and path.suffix == ".gz"
    table = head[:4] == b"PAR1" and path.suffix == ".parquet"
    if other is not None and not packed and not table:
        found.kind = other[0]
        found.problems.append(f"this version does not read it here; {other[1]}")
    elif is_token_file(path):
        _token_file(found)
    elif files := conversation_files(path):
        _conversations(found, files)
    elif kind_of(path) in ROWS:
        found.kind = f"{kind_of(path).value}, no conversations"
        row = first_row(path)
        if isinstance(row, Exception):
            raise DataError(f"{path}: {row}")
        found.facts["first row"] = shown(row)
        found.uses.append(f"abi-train run --data {shlex.quote(str(path))}")
    elif encoding := utf_16(head):
        found.kind = f"text in {encoding}"
        found.problems.append("texts are read as UTF-8; convert it (iconv does that)")
    elif b"\0" in head:
        found.problems.append("neither text nor a kind of file that this version knows")
    else:
        found.kind = "text"
        try:
            codecs.getincrementaldecoder("utf-8")().decode(head, final=found.bytes <= len(head))
        except UnicodeDecodeError as problem:
            found.problems.append(f"byte {problem.start} is not UTF-8; convert it (iconv does that)")
        name = shlex.quote(str(path))
        found.uses += [f"abi-train run --data {name}", f"abi-train eval MODEL {name}"]


def directory(found: Inspection) -> None:
    """A directory of GGUF files, of data, or of nothing that is known."""
    if models := sorted(path for path in found.path.glob(f"*{SUFFIX}") if path.is_file()):
        found.kind = "directory of GGUF files"
        found.facts["files"] = {path.name: path.stat().st_size for path in models}
        found.bytes = sum(found.facts["files"].values())
        found.uses.append(f"one of them: abi-train inspect {shlex.quote(str(models[0]))}")
        return
    files = [each.path for each in expand([str(found.path)]) if not each.problem]
    found.bytes = sum(path.stat().st_size for path in files)
    if not files:
        found.problems.append("no file in it that this version knows")
    elif talks := conversation_files(found.path):
        _conversations(found, talks)
        found.facts["files"] = len(talks)
    else:
        found.kind = "directory of texts"
        found.facts["files"] = len(files)
        name = shlex.quote(str(found.path))
        found.uses += [f"abi-train run --data {name}", f"abi-train tokenize {name} -o train.bin"]
