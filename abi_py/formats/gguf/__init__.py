"""GGUF, the file of llama.cpp: metadata and tensors in one, quantised or not.

ggml_types   the types of tensors                    header      what a file says, every bound checked
values       the types of metadata                   container   a file or the parts of one, opened
"""

from .container import GgufFile, GgufTensor, open_gguf
from .ggml_types import GGML_TYPES, GgmlType
from .values import F32, F64, I8, I16, I32, I64, U8, U16, U32, U64, Value
from .writing import PlannedFile, PlannedTensor, plan_gguf, write_gguf

__all__ = [
    "F32",
    "F64",
    "GGML_TYPES",
    "I8",
    "I16",
    "I32",
    "I64",
    "U8",
    "U16",
    "U32",
    "U64",
    "GgmlType",
    "GgufFile",
    "GgufTensor",
    "PlannedFile",
    "PlannedTensor",
    "Value",
    "open_gguf",
    "plan_gguf",
    "write_gguf",
]
