"""Storages of matrices that are not trained, a file each; what one is, `base.py` says.

    STORAGES["bf16"]        a storage by its name; a new one is a file and its name below
"""

from . import bf16, float16, float32
from .base import Storage

__all__ = ["STORAGES", "Storage"]

STORAGES: dict[str, Storage] = {file.STORAGE.name: file.STORAGE for file in (float32, bf16, float16)}
