"""NaN and infinity in weights: no writer writes them, and a reader takes them only if asked to.

The look runs at the speed of memory (7 GB/s where SHA-256 runs at 1.2), over weights that have just been read or are
about to be written.
"""

import typing
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ..errors import CheckpointError, NonFiniteError
from ..kernels.storage import STORAGES
from .encoded import Encoded
from .gguf import GgufTensor
from .safetensors import Joined, Stored

__all__ = ["check_read", "check_written", "find_nonfinite"]

ASK = "use another copy or an earlier checkpoint; in Python, allow_nonfinite=True reads it all the same"
Numbers = np.ndarray | Stored | Encoded | Joined | GgufTensor
PIECE = 1 << 18  # numbers looked at together: their marks stay in the cache


def find_nonfinite(array: np.ndarray) -> int | None:
    """Return the place, in C order, of the first NaN or infinity in an array of floats; None if there is none."""
    flat = array.reshape(-1)
    for start in range(0, flat.size, PIECE):
        finite = np.isfinite(flat[start : start + PIECE])
        if not finite.all():
            return start + int(finite.argmin())
    return None


def _first(tensors: Mapping[str, Numbers]) -> str | None:
    """Return which tensor holds NaN or infinity, and where; None if none does."""
    for name, tensor in tensors.items():
        place = _in_gguf(tensor) if isinstance(tensor, GgufTensor) else _in_pieces(tensor)
        if place is not None:
            at = np.unravel_index(place, tensor.shape)
            return f"{name} holds NaN or infinity at [{', '.join(map(str, at))}]"
    return None


def _in_pieces(tensor: np.ndarray | Stored | Encoded | Joined) -> int | None:
    if isinstance(tensor, Stored) and tensor.is_narrow and not _narrow_nonfinite(tensor):
        return None
    before = 0
    for piece in [tensor] if isinstance(tensor, np.ndarray) else tensor.numbers():
        place = find_nonfinite(piece)
        if place is not None:
            return before + place
        before += piece.size
    return None


def _narrow_nonfinite(tensor: Stored) -> bool:
    """Say whether numbers of two bytes hold NaN or infinity, by their bits and in the order of memory."""
    exponent = STORAGES["bf16" if tensor.bf16 else "float16"].exponent
    flat = tensor.raw.ravel(order="K").view(np.uint16)
    pieces = (flat[start : start + PIECE] for start in range(0, flat.size, PIECE))
    return any((piece & np.uint16(exponent) == exponent).any() for piece in pieces)


def _in_gguf(tensor: GgufTensor) -> int | None:
    """Look at scales alone where numbers share them; of a type that nothing here computes with, at nothing."""
    raw, storage = tensor.raw, tensor.storage
    if storage is None:
        return None
    step = max(1, PIECE * 4 // tensor.shape[-1])
    for first in range(0, len(raw), step):
        rows = storage.nonfinite_rows(raw[first : first + step])
        if rows.any():
            row = first + int(rows.argmax())
            with np.errstate(all="ignore"):
                column = find_nonfinite(storage.decode_ref(raw[row : row + 1]))
            return row * tensor.shape[-1] + typing.cast(int, column)
    return None


def check_written(place: str | Path, tensors: Mapping[str, Numbers], untouched: str = "") -> None:
    """Raise NonFiniteError, before anything is written to `place`, if a tensor holds NaN or infinity."""
    found = _first(tensors)
    if found is not None:
        rest = f"; {untouched}" if untouched else ""
        raise NonFiniteError(
            f"{place}: {found}, so nothing was saved{rest}; go on from the last good checkpoint, with a lower "
            "learning_rate"
        )


def check_read(place: str | Path, tensors: Mapping[str, Numbers], remedy: str = ASK) -> None:
    """Raise CheckpointError, with the remedy, if a tensor that came from `place` holds NaN or infinity."""
    found = _first(tensors)
    if found is not None:
        raise CheckpointError(f"{place}: {found}, and would make all that is computed with it NaN; {remedy}")
