"""Storages of matrices that are not trained, a file each; what one is, `base.py` says.

    STORAGES["bf16"]        a storage by its name; a new one is its file and a line here
"""

from .base import Storage
from .bf16 import BF16
from .float16 import FLOAT16
from .float32 import FLOAT32

__all__ = ["STORAGES", "Storage"]

STORAGES: dict[str, Storage] = {storage.name: storage for storage in (FLOAT32, BF16, FLOAT16)}
