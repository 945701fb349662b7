"""The types of tensors in a GGUF file: ggml's numbers for them, how many numbers a block has, and in how many bytes.

From `ggml.h` of llama.cpp.  What this project computes with has a storage (`kernels/storage`); all other types are
known by their size, so that the rest of a file can be read and the file described.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ...errors import CheckpointError

if TYPE_CHECKING:
    from ...kernels.storage import Storage

__all__ = ["BY_NAME", "BY_STORAGE", "GGML_TYPES", "GgmlType"]

STORAGE_NAMES = {"F32": "float32", "F16": "float16"}  # all others are ggml's name in lower case
DTYPES = {
    **{"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F64": "<f8"},
    **{"I8": "|i1", "I16": "<i2", "I32": "<i4", "I64": "<i8"},
}
SIZES = {  # id: name, numbers in a block, its bytes; 4, 5, 31 to 33 and 36 to 38 were withdrawn
    **{0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2), 28: ("F64", 1, 8)},
    **{2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24)},
    **{8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 36)},
    **{10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176)},
    **{14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292)},
    **{16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50)},
    **{20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136)},
    **{24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 29: ("IQ1_M", 256, 56)},
    **{34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36)},
    **{41: ("Q1_0", 128, 18), 42: ("Q2_0", 64, 18)},
}


@dataclass(frozen=True)
class GgmlType:
    """A type of tensors: `block` numbers along a row are kept together, in `bytes` bytes."""

    id: int
    name: str  # as people write it: Q4_K
    block: int
    bytes: int

    def __str__(self) -> str:
        return self.name

    @property
    def dtype(self) -> np.dtype:
        """Of a row as an array: its numbers, or the bytes of its blocks; of BF16, which NumPy lacks, uint16."""
        return np.dtype(DTYPES.get(self.name, "|u1"))

    @property
    def storage_name(self) -> str:
        """The name that a storage of this type has in `kernels.storage.STORAGES`, whether it is there or not."""
        return STORAGE_NAMES.get(self.name, self.name.lower())

    @property
    def storage(self) -> "Storage | None":
        """The storage that computes with this type; None if there is none.  Brings the compiler."""
        from ...kernels.storage import STORAGES

        return STORAGES.get(self.storage_name)

    def require_storage(self, place: str) -> "Storage":
        """Return the storage; CheckpointError, which begins with `place`, if there is none."""
        storage = self.storage
        if storage is None:
            raise CheckpointError(
                f"{place} is of type {self}, which this version does not compute with; take a file of type Q8_0, "
                "Q6_K or Q4_K_M, or F16"
            )
        return storage


GGML_TYPES = {number: GgmlType(number, *size) for number, size in sorted(SIZES.items())}
BY_NAME = {kind.name: kind for kind in GGML_TYPES.values()}
BY_STORAGE = {kind.storage_name: kind for kind in GGML_TYPES.values()}
