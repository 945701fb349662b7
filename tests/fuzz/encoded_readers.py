"""Models in the blocks of other programs: GGUF files of every family, folders in NF4, and a file of importance."""

import functools
import json
from pathlib import Path

import numpy as np
from reader import Reader, small_model, write_json
from world import parts_in_nf4

import abi_py as abi
from abi_py.data.tokenizer import Tokenizer
from abi_py.families import FAMILIES
from abi_py.formats.gguf import U32, PlannedTensor, write_gguf
from abi_py.formats.gguf.ggml_types import BY_NAME
from abi_py.formats.gguf.importance import read_importance
from abi_py.formats.gguf.quantising import file_type
from abi_py.formats.safetensors import read_safetensors, write_safetensors
from abi_py.model.frozen import FrozenModel
from abi_py.model.stored import read_shape
from abi_py.runs.base import digest_of
from abi_py.runs.quantizing import open_source
from abi_py.shape import ModelFamily

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def _gguf_family(family: ModelFamily, folder: Path) -> None:
    shape = small_model(hidden_dim=32, intermediate_dim=32).config.replace(family=family)
    if family is ModelFamily.QWEN3_MOE:
        shape = shape.replace(norm_topk_prob=True)  # llama.cpp computes no other
    abi.TrainableModel(shape).export_to_gguf(folder / "x.gguf", "F16")


def _read_gguf_family(folder: Path) -> None:
    read_shape(folder / "x.gguf")
    FrozenModel.from_gguf(folder / "x.gguf")


def write_gguf_with(tokenizer: Tokenizer, folder: Path) -> None:
    """Write a model whose tokenizer is in the file, too."""
    tokenizer.save(folder)
    model = small_model(vocab_size=tokenizer.vocab_size, hidden_dim=32, intermediate_dim=32)
    model.save_pretrained(folder / "hf", files={name: (folder / name).read_text() for name in TOKENIZER_FILES})
    abi.TrainableModel.from_pretrained(folder / "hf").export_to_gguf(folder / "x.gguf", "Q8_0")


def read_gguf_with_tokenizer(folder: Path) -> None:
    """Read the model and its tokenizer, and what its verbs ask for besides."""
    FrozenModel.from_gguf(folder / "x.gguf")
    tokenizer = Tokenizer.load(folder / "x.gguf")
    tokenizer.decode(tokenizer.encode("ab the fox \u4f60"))
    digest_of(folder / "x.gguf")
    source = open_source(folder / "x.gguf")
    source.described()
    source.predict(file_type("Q4_0"))
    _ = source.files, source.shape


def _nf4(double: bool, folder: Path) -> None:
    small_model(hidden_dim=16).save_pretrained(folder)
    tensors = {}
    for name, w in read_safetensors(folder / "model.safetensors").items():
        tensors |= parts_in_nf4(name, np.array(w), double) if name.endswith("_proj.weight") else {name: np.array(w)}
    write_safetensors(folder / "model.safetensors", tensors)
    said = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "quant_method": "bitsandbytes"}
    write_json(folder / "config.json", json.loads((folder / "config.json").read_text()) | {"quantization_config": said})


def _read_nf4(folder: Path) -> None:
    FrozenModel.from_pretrained(folder)
    abi.TrainableModel.from_pretrained(folder)


def _importance(folder: Path) -> None:
    """Write a file of importance as llama-imatrix does: of a matrix, and of three experts."""
    arrays = {
        "blk.0.attn_q.weight.in_sum2": np.arange(64, dtype=np.float32),
        "blk.0.attn_q.weight.counts": np.float32([100]),
        "blk.1.ffn_up_exps.weight.in_sum2": np.ones((3, 32), np.float32),
        "blk.1.ffn_up_exps.weight.counts": np.float32([[9], [0], [30]]),
    }
    planned = []
    for name, array in arrays.items():
        rows = array.reshape(-1, array.shape[-1])
        planned.append(
            PlannedTensor(name=name, shape=array.shape, kind=BY_NAME["F32"], rows=lambda a, b, rows=rows: rows[a:b])
        )
    known = {"general.type": "imatrix", "imatrix.datasets": ["some.txt"], "imatrix.chunk_count": U32(3)}
    write_gguf(folder / "x.gguf", known, planned)


def _read_importance(folder: Path) -> None:
    read_importance(folder / "x.gguf").check({"blk.0.attn_q.weight": (8, 64), "blk.1.ffn_up_exps.weight": (3, 4, 32)})


WEIGHTS = ("config.json", "model.safetensors")
ENCODED = (
    *(
        Reader(
            f"gguf of {family.value}", functools.partial(_gguf_family, family), ("x.gguf",), _read_gguf_family, share=2
        )
        for family, entry in FAMILIES.items()
        if entry.gguf is not None
    ),
    Reader("nf4 folder", functools.partial(_nf4, False), WEIGHTS, _read_nf4, share=3),
    Reader("nf4-dq folder", functools.partial(_nf4, True), WEIGHTS, _read_nf4, share=3),
    Reader("importance", _importance, ("x.gguf",), _read_importance, share=16),
)
