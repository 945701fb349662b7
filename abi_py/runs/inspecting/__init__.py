"""What a path holds, of ours or of others: `inspect(path)`, for `abi-train inspect` and for programs.

    facts.py     what is found, and in which form it is handed on
    models.py    folders of models, runs, checkpoints, adapters, files of weights
    gguf.py      files of llama.cpp
    data.py      token files, tokenizers, conversations, texts

Weights are never loaded: their names, types and shapes are in the heads of files.  What is damaged, missing or unknown
is among the problems, and everything that can be read beside it is told all the same.
"""

import shlex
import stat
from pathlib import Path

from ...errors import AbiError
from ...formats.gguf.container import is_gguf
from ...formats.huggingface import CONFIG, INDEX, WEIGHTS
from ...formats.peft import ADAPTER_CONFIG
from ...training.checkpoint import STATE, is_checkpoint_name, list_checkpoints
from ..directory import is_run
from . import data, gguf, models
from .facts import Inspection, TensorFacts

__all__ = ["Inspection", "TensorFacts", "inspect"]


def inspect(path: Path) -> Inspection:
    """Say what `path` is, and what it can be used for; FileNotFoundError if there is nothing."""
    found = Inspection(path)
    try:
        kind = path.stat().st_mode
        (_directory if stat.S_ISDIR(kind) else _file if stat.S_ISREG(kind) else _stream)(found)
    except AbiError as problem:
        found.problems.append(str(problem))
    if not found.kind:
        found.kind = "unknown"
    return found


def _directory(found: Inspection) -> None:
    path = found.path
    has_weights = any((path / name).is_file() for name in (WEIGHTS, INDEX))
    if is_run(path):
        models.run(found)
    elif (path / STATE).is_file() or is_checkpoint_name(path):
        models.checkpoint(found)
    elif (path / CONFIG).is_file() or has_weights:
        models.folder(found)
    elif (path / ADAPTER_CONFIG).is_file():
        models.adapter(found)
    elif there := list_checkpoints(path) or list_checkpoints(path / "checkpoints"):
        found.kind = "directory of checkpoints"
        models.checkpoints(found, [place for _, place in there])
    elif (path / data.TOKENIZER_FILE).is_file():
        data.tokenizer_directory(found)
    else:
        data.directory(found)


def _stream(found: Inspection) -> None:
    """What is read once, or has no end: neither its size nor its kind can be told without taking it from its reader."""
    found.kind = "pipe, socket or device"
    found.problems.append(f"{found.path} is no file; write what comes out of it into one, and give that")


# What a file begins with, and what inspects it.
MAGIC = {b"ABIC": models.zig, b"ABLC": models.zig}


def _file(found: Inspection) -> None:
    path = found.path
    with open(path, "rb") as file:
        head = file.read(1 << 12)
    found.bytes = path.stat().st_size
    if is_gguf(path):  # or is called so, whatever it is
        gguf.gguf(found)
    elif head[:4] in MAGIC:
        MAGIC[head[:4]](found)
    elif path.suffix == ".safetensors" or head[8:10] == b'{"':
        models.safetensors(found)
    elif path.suffix in (".yaml", ".yml"):
        models.yaml(found)
    elif path.suffix == ".json" and head.lstrip()[:1] != b"[":
        _json(found)
    else:
        data.file(found, head)


def _json(found: Inspection) -> None:
    """Tell one file of JSON from another by its keys, and by its name where that is all there is."""
    content = data.read_object(found)
    if content is None:
        data.file(found, b"{")
    elif "model_type" in content:
        models.config(found, content)
    elif "weight_map" in content:
        models.index(found)
    elif "peft_type" in content:
        found.kind = "adapter_config.json of PEFT"
        found.uses.append(f"its folder: abi-train inspect {shlex.quote(str(found.path.parent))}")
    elif isinstance(content.get("model"), dict) and "added_tokens" in content:
        data.tokenizer(found, found.path)
    elif "tokens" in content and "end_of_document" in content:
        data.sidecar(found)
    elif found.path.name in models.KNOWN_JSON:
        found.kind = models.KNOWN_JSON[found.path.name]
        found.facts["entries"] = content
    else:
        data.file(found, b"{")
