"""Storages of matrices that are not trained, a file each; what one is, `base.py` says.

STORAGES["bf16"]        a storage by its name; a new one is a file and its name below
OF_A_MATRIX["nf4"]      one that keeps something beside raw: `encoded` returns raw and the storage of this matrix
"""

from . import bf16, float16, float32, iq4_nl, mxfp4, nf4, q2_k, q3_k, q4_0, q4_1, q4_k, q5_0, q5_1, q5_k, q6_k, q8_0
from .base import Storage

__all__ = ["OF_A_MATRIX", "STORAGES", "Storage"]

_FILES = (float32, bf16, float16, q8_0, q6_k, q5_k, q5_1, q5_0, q4_k, q4_1, q4_0, iq4_nl, mxfp4, q3_k, q2_k)
STORAGES: dict[str, Storage] = {file.STORAGE.name: file.STORAGE for file in _FILES}
OF_A_MATRIX: dict[str, Storage] = {storage.name: storage for storage in (nf4.STORAGE, nf4.DOUBLE)}
