"""The two checkpoint files of the Zig trainer: `ABIC` (weights) and `ABLC` (weights and Adam's moments).

All numbers are little-endian and packed without padding; there is no checksum and no model configuration.

    ABIC  0  "ABIC"             ABLC  0  "ABLC"
          4  u16 version = 1          4  u16 version = 1
          6  u64 step                 6  u64 step
         14  u64 timestamp           14  u32 epoch
         22  u32 count               18  u64 tokens_processed
         26  f32 x count             26  u64 timestamp
                                     34  u32 n_weights, n_m, n_v
                                     46  f32 x (n_weights + n_m + n_v)

The floats are the flat parameter buffer: token_embedding; per layer w_q w_k w_v w_o attn_norm w_gate w_up w_down
ffn_norm; final_norm; output_proj if untied.  Timestamps are Unix seconds.  Files may have any size and are written
atomically.
"""

import struct
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..errors import CheckpointError
from ..fields import fields_of
from ..files import atomic_file, write_pieces
from ..reprs import Shown
from ..shape import ModelFamily, ModelShape
from .finite import check_read, check_written

__all__ = ["AbicCheckpoint", "AblcCheckpoint", "load_abic", "load_ablc", "load_zig", "misfit", "save_abic", "save_ablc"]

VERSION = 1
ABIC = struct.Struct("<4sHQQI")
ABLC = struct.Struct("<4sHQIQQIII")
MAX_COUNT = 2**32 - 1
# Fields of a shape that the Zig code knows, or that mean no other numbers; all else must have its default there.
KNOWN = {
    *("hidden_dim", "num_layers", "num_heads", "num_kv_heads", "intermediate_dim", "vocab_size", "max_seq_len"),
    *("rope_theta", "norm_eps", "tie_embeddings", "checkpointing", "checkpoint_interval", "head_dim", "seed", "family"),
}


def misfit(shape: ModelShape) -> str | None:
    """Return what of a model the Zig code does not compute, in words; None if it computes all of it."""
    if shape.family is not ModelFamily.LLAMA:
        return f"family {shape.family.value}"
    odd = (option.name for option in fields_of(type(shape)) if option.name not in KNOWN
           and getattr(shape, option.name) != option.default)  # fmt: skip
    return next((f"{name} {getattr(shape, name)}" for name in odd), None)


def _empty() -> np.ndarray:
    return np.zeros(0, np.float32)


@dataclass(frozen=True, kw_only=True)
class AbicCheckpoint(Shown):
    """Content of an `ABIC` file; `weights` is the flat buffer (P,) float32."""

    step: int
    weights: np.ndarray
    timestamp: int = 0


@dataclass(frozen=True, kw_only=True)
class AblcCheckpoint(Shown):
    """Content of an `ABLC` file; weights, m and v are flat float32 buffers."""

    step: int
    epoch: int
    tokens_processed: int
    weights: np.ndarray
    m: np.ndarray = field(default_factory=_empty)
    v: np.ndarray = field(default_factory=_empty)
    timestamp: int = 0


def save_abic(path: str | Path, weights: np.ndarray, step: int, timestamp: int | None = None) -> None:
    """Write an `ABIC` file; weights (P,) float32; timestamp in Unix seconds, now by default.

    NonFiniteError for NaN or infinity, here and in `save_ablc`.
    """
    stamp = int(time.time()) if timestamp is None else timestamp
    _check_range(path, step=(step, 64), timestamp=(stamp, 64))
    _check_arrays(path, weights=weights)
    _write(path, ABIC.pack(b"ABIC", VERSION, step, stamp, weights.size), weights)


def save_ablc(
    path: str | Path,
    weights: np.ndarray,
    m: np.ndarray,
    v: np.ndarray,
    *,
    step: int,
    epoch: int,
    tokens_processed: int,
    timestamp: int | None = None,
) -> None:
    """Write an `ABLC` file; the arrays are flat float32 buffers; timestamp in Unix seconds, now by default."""
    stamp = int(time.time()) if timestamp is None else timestamp
    _check_range(path, step=(step, 64), epoch=(epoch, 32), timestamp=(stamp, 64))
    _check_range(path, tokens_processed=(tokens_processed, 64))
    _check_arrays(path, weights=weights, m=m, v=v)
    header = ABLC.pack(b"ABLC", VERSION, step, epoch, tokens_processed, stamp, weights.size, m.size, v.size)
    _write(path, header, weights, m, v)


def load_abic(path: str | Path, *, allow_nonfinite: bool = False) -> AbicCheckpoint:
    """Read an `ABIC` file; a file that breaks the format is a `CheckpointError` that names the offset.

    NaN or infinity is a `CheckpointError`, too, unless `allow_nonfinite`; so it is in `load_ablc` and `load_zig`.
    """
    step, stamp, count = _header(path, b"ABIC", ABIC)
    (weights,) = _arrays(path, ABIC.size, allow_nonfinite, weights=count)
    return AbicCheckpoint(step=step, timestamp=stamp, weights=weights)


def load_ablc(path: str | Path, *, allow_nonfinite: bool = False) -> AblcCheckpoint:
    """Read an `ABLC` file; a file that breaks the format is a `CheckpointError` that names the offset."""
    step, epoch, tokens, stamp, *counts = _header(path, b"ABLC", ABLC)
    sizes = dict(zip(("weights", "m", "v"), counts, strict=True))
    weights, m, v = _arrays(path, ABLC.size, allow_nonfinite, **sizes)
    return AblcCheckpoint(step=step, epoch=epoch, tokens_processed=tokens, timestamp=stamp, weights=weights, m=m, v=v)


def load_zig(path: str | Path, *, allow_nonfinite: bool = False) -> AbicCheckpoint | AblcCheckpoint:
    """Read either kind of file, told apart by its first four bytes."""
    with open(path, "rb") as file:
        magic = file.read(4)
    if magic == b"ABIC":
        return load_abic(path, allow_nonfinite=allow_nonfinite)
    if magic == b"ABLC":
        return load_ablc(path, allow_nonfinite=allow_nonfinite)
    raise CheckpointError(f"{path}: offset 0 must hold ABIC or ABLC, got {magic!r}; this is another kind of file")


def _check_range(path: str | Path, **values: tuple[int, int]) -> None:
    for name, (value, bits) in values.items():
        if not 0 <= value < 2**bits:
            raise CheckpointError(f"{path}: {name} ({value}) must be a whole number from 0 to 2^{bits} - 1")


def _check_arrays(path: str | Path, **arrays: np.ndarray) -> None:
    for name, array in arrays.items():
        if array.dtype != np.float32 or array.ndim != 1:
            raise TypeError(f"{name} ({array.dtype}, {array.ndim} axes) must be a flat float32 array; convert it first")
        if array.size > MAX_COUNT:
            rule = f"the format holds at most {MAX_COUNT}; use a checkpoint directory"
            raise CheckpointError(f"{path}: {name} has {array.size} numbers, {rule}")
    check_written(path, arrays)


def _write(path: str | Path, header: bytes, *arrays: np.ndarray) -> None:
    with atomic_file(path) as file:
        write_pieces(file, [header, *(np.ascontiguousarray(array, dtype="<f4") for array in arrays)])


def _header(path: str | Path, magic: bytes, layout: struct.Struct) -> tuple[int, ...]:
    """Return the numbers after magic and version."""
    with open(path, "rb") as file:
        raw = file.read(layout.size)
    if raw[:4] != magic[: len(raw[:4])] or not raw:
        rule = f"offset 0 must hold {magic.decode()}, got {raw[:4]!r}"
        raise CheckpointError(f"{path}: {rule}; this is another kind of file")
    if len(raw) < layout.size:
        place = f"ends at offset {len(raw)} inside the {layout.size}-byte header"
        raise CheckpointError(f"{path}: {place}; the file is truncated, copy it again")
    _, version, *numbers = layout.unpack(raw)
    if version != VERSION:
        raise CheckpointError(f"{path}: version at offset 4 is {version}, must be {VERSION}; it is newer, or damaged")
    return tuple(numbers)


def _arrays(path: str | Path, start: int, allow_nonfinite: bool, **counts: int) -> list[np.ndarray]:
    size, end = Path(path).stat().st_size, start + 4 * sum(counts.values())
    if size != end:
        problem = "is truncated" if size < end else "has bytes after its end"
        wanted = " + ".join(map(str, counts.values()))
        raise CheckpointError(
            f"{path}: {problem}: {wanted} floats from offset {start} end at offset {end}, the file at {size}; "
            "copy it again"
        )
    arrays = {}
    for name, count in counts.items():
        arrays[name] = np.fromfile(path, "<f4", count, offset=start).astype(np.float32, copy=False)
        start += 4 * count
    if not allow_nonfinite:
        check_read(path, arrays)
    return list(arrays.values())
