"""GGUF files: models, adapters and vocabularies of llama.cpp."""

import re
import shlex
from collections.abc import Iterable
from typing import Any

from ...formats.gguf.adapter import is_gguf_adapter, open_gguf_adapter
from ...formats.gguf.companion_files import WITHOUT
from ...formats.gguf.container import GgufFile, GgufTensor, open_gguf
from ...formats.gguf.quantising import FILE_TYPES
from ...formats.special_tokens import special_token_ids
from ...model.gguf_model import companions_of_gguf, open_gguf_weights, read_gguf_config
from .facts import Inspection, TensorFacts
from .models import describe_shape, tokenizer_beside, uses_of_model

__all__ = ["gguf"]

# What is shown elsewhere, or is as long as the vocabulary.
APART = ("tokenizer.", "split.", "general.file_type")
LONG, FEW = 80, 8  # characters of a text, values of a list: of longer ones the number is shown


def gguf(found: Inspection) -> None:
    """A file of llama.cpp's, or all the files that it is one of; its tensors are not read."""
    found.kind = "GGUF file (llama.cpp)"
    file = open_gguf(found.path)
    if len(file.files) > 1:
        found.facts["files"] = {path.name: path.stat().st_size for path in file.files}
        found.bytes = sum(found.facts["files"].values())
    number = file.get("general.file_type", int)
    known = {kind.id: kind.name for kind in FILE_TYPES.values()}
    if number is not None:
        found.facts["type"] = known.get(number, f"number {number} of general.file_type")
    found.tensors = list(_tensors(file.tensors.values()))
    found.facts["metadata"] = {key: _shown(file, key) for key in file.metadata if not key.startswith(APART)}
    if is_gguf_adapter(found.path):
        _adapter(found)
        return
    shape = found.attempt(read_gguf_config, file)
    if shape is None:
        found.facts["parameters"] = sum(tensor.size for tensor in found.tensors)
    else:
        describe_shape(found, shape)
    computed = shape is not None and found.attempt(open_gguf_weights, file, shape) is not None
    talks = tokenizer_beside(found, found.path)
    companions = companions_of_gguf(file)
    if ends := found.attempt(special_token_ids, companions.files, "eos"):
        found.facts["ends a text"] = list(ends)
    if notes := found.attempt(lambda: companions.notes):
        found.facts["notes"] = "; ".join(notes)
    if computed:
        uses_of_model(found, found.path, talks)
        name = shlex.quote(str(found.path))
        if companions.files:
            found.uses.append(f"abi-train llm {name} --data DATA")
        found.uses.append(f"abi-train quantize {name} OUT.gguf Q4_K_M")
        if file.get("tokenizer.ggml.model", str) not in WITHOUT:  # llama.cpp opens no file without a tokenizer
            found.uses.append(f"llama.cpp: llama-cli -m {name}")


def _adapter(found: Inspection) -> None:
    """A file of adapters, which does not say on which model."""
    found.kind = "adapters of LoRA (GGUF)"
    found.facts["parameters"] = sum(tensor.size for tensor in found.tensors)
    file = found.attempt(open_gguf_adapter, found.path)
    if file is None:
        return
    ranks = sorted({pair.rank for pair in file.pairs.values()})
    adapted = dict.fromkeys(re.sub(r"^blk\.\d+\.|\.weight$", "", name) for name in file.pairs)
    found.facts |= {"rank": ranks[0] if len(ranks) == 1 else ranks, "alpha": file.alpha, "adapted": list(adapted)}
    name = shlex.quote(str(found.path))
    found.uses.append(f"abi-train generate BASE --adapter {name}")
    found.uses.append(f"abi-train merge BASE {name} -o FOLDER")
    found.uses.append(f"llama.cpp: llama-cli -m BASE.gguf --lora {name}")


def _tensors(tensors: Iterable[GgufTensor]) -> Iterable[TensorFacts]:
    return (TensorFacts(each.name, str(each.kind), each.shape, each.size) for each in tensors)


def _shown(file: GgufFile, key: str) -> Any:
    """Return a value of the metadata, of a long one how long it is."""
    value = file.metadata[key]
    if isinstance(value, str):
        return value if len(value) <= LONG else f"{value[:LONG]}... ({len(value):,} characters)"
    if isinstance(value, bool | int | float):
        return value
    values = list(value)
    if len(values) > FEW:
        return f"{len(values):,} values"
    return [each.item() if hasattr(each, "item") else each for each in values]
