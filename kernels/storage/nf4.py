"""NF4: four bits for a number, one of sixteen values, times a scale of 64 neighbours; as bitsandbytes keeps it.

    raw (M, K / 2)   byte j of all: q_2j in its upper half, q_(2j+1) in its lower; numbers are counted through all rows,
                     n = i K + k, so blocks of 64 go on from row to row; the last one may be short
    decode           x_n = VALUES[q_n] s_b,   b = n / 64
    encode           s_b = max |x_n| of the block;   q_n: the nearest value to x_n / s_b, of equally near the lower

The scales are beside raw (`side`), and belong to one matrix.  So a storage is made for each: `encoded` returns it.

    nf4       s_b, float32                                       4.5 bits a number
    nf4-dq    s_b = MAP[c_b] t_g + offset,   g = b / 256         4.127: of a block a byte, of 256 blocks a float32
              offset = the mean of all s_b;   t_g = max |s_b - offset|;   c_b: the nearest, as q is

VALUES are the quantiles of N(0, 1) that sixteen equally likely numbers have, 0 among them, scaled to -1 ... 1; MAP is
the signed dynamic map (`engine/dynamic_map.py`), or that of the file which the matrix is from.

Source: Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", section 3.
"""

import math
from collections.abc import Iterable

import numpy as np

from ..engine.dynamic_map import dynamic_map
from ..engine.jit import helper, kernel, prange
from ..engine.lookups import scaled_lookup
from ..engine.vectors import bits_of, float_from_bits
from .base import NO_FLOATS, SIZE, Side, Storage, read_only

__all__ = ["DOUBLE", "NF4", "NUMBERS", "SCALES", "STORAGE", "VALUES"]

VALUES = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)
MIDDLES = (VALUES[:-1] + VALUES[1:]) / np.float32(2)
NUMBERS, SCALES = 64, 256  # numbers that share a scale; scales that share theirs
LEAST = np.float32(1e-38)  # a block's largest number is taken to be at least that, so that 0 / 0 is not asked
MAP = dynamic_map(signed=True)

# -- reference ---------------------------------------------------------------------------------


def blocks_ref(x, size):
    """Return x (n,) float32 as blocks (n / size, size), the last one filled with zeros."""
    return np.pad(x, (0, -len(x) % size)).reshape(-1, size)


def nearest_ref(x, size, values):
    """Return the largest size of blocks of x (n,), and which of rising values is nearest to x over that, (n,) uint8."""
    blocks = blocks_ref(x, size)
    largest = np.abs(blocks).max(1, initial=0)
    share = np.clip(blocks * (np.float32(1) / np.maximum(largest, LEAST))[:, None], np.float32(-1), np.float32(1))
    q = np.searchsorted((values[:-1] + values[1:]) / np.float32(2), share).astype(np.uint8)
    return largest, q.reshape(-1)[: len(x)]


# -- kernels -----------------------------------------------------------------------------------

lookup = scaled_lookup(VALUES)


@helper
def decode_at(out, raw, i, first, small, wide, table):
    """Decode row i of raw: block by block, the first and the last maybe in part."""
    columns, packed = out.size, raw[i]
    n = (first + i) * columns  # of the row's first number
    k = 0
    while k < columns:
        b = (n + k) // NUMBERS
        stop = min((b + 1) * NUMBERS - n, columns)
        scale = table[small[b]] * wide[1 + b // SCALES] + wide[0] if small.size else wide[b]
        lookup(out[k:stop], packed[k // 2 : stop // 2], scale)
        k = stop


@kernel
def _encode_nf4(raw, scales, x):
    """raw (n / 2,) and scales (n / NUMBERS,) from x (n,), n even."""
    for b in prange(scales.size):
        numbers = x[NUMBERS * b : min(NUMBERS * b + NUMBERS, x.size)]
        size = np.int32(0)
        for k in range(numbers.size):
            size = max(size, bits_of(numbers[k]) & SIZE)
        scales[b] = float_from_bits(size)
        inverse = np.float32(1) / max(scales[b], LEAST)
        q = np.empty(NUMBERS, np.int32)
        for k in range(numbers.size):
            share, above = numbers[k] * inverse, np.int32(0)
            for middle in MIDDLES:
                above += np.int32(middle < share)
            q[k] = above
        for j in range(numbers.size // 2):
            raw[NUMBERS // 2 * b + j] = np.uint8(q[2 * j] << np.int32(4) | q[2 * j + 1])


# -- the class ---------------------------------------------------------------------------------


class NF4(Storage):
    """The storage of one matrix, or, without scales, what makes them."""

    dtype, block, bytes_per_block = np.dtype(np.uint8), 2, 1
    decode_at = staticmethod(decode_at)

    def __init__(self, double: bool, side: Side | None = None) -> None:
        """Take what is beside raw: see `single` and `double`."""
        self.name, self.is_double, self._side = "nf4-dq" if double else "nf4", double, side

    @classmethod
    def of_scales(cls, scales: np.ndarray, first: int = 0) -> "NF4":
        """Return the storage of a matrix with scales (blocks,) float32."""
        return cls(False, (first, Storage.side[1], read_only(scales), NO_FLOATS))

    @classmethod
    def of_bytes(cls, codes: np.ndarray, wide: np.ndarray, table: np.ndarray = MAP, first: int = 0) -> "NF4":
        """Return that of one with codes (blocks,) uint8, and the offset, then scales of these: wide float32."""
        return cls(True, (first, read_only(codes), read_only(wide), read_only(table)))

    @property
    def side(self) -> Side:  # type: ignore[override]
        """What is beside raw; TypeError for a storage of no matrix."""
        if self._side is None:
            raise TypeError(f"{self} keeps scales beside raw, and this one has none: `encoded` returns both")
        return self._side

    @property
    def side_bytes(self) -> int:
        return sum(part.nbytes for part in self.side[1:3])

    def scales(self) -> np.ndarray:
        """Return the scales of all blocks, float32."""
        _, small, wide, table = self.side
        if not self.is_double:
            return wide
        return table[small] * wide[1 + np.arange(len(small)) // SCALES] + wide[0]

    def from_row(self, first: int) -> "NF4":
        before, *parts = self.side
        return NF4(self.is_double, (before + first, *parts))  # type: ignore[arg-type]

    def check(self, raw: np.ndarray, columns: int, name: str = "raw") -> None:
        super().check(raw, columns, name)
        first, small, wide, _ = self.side
        blocks, needed = len(small) if self.is_double else len(wide), (first + len(raw)) * columns
        if blocks * NUMBERS < needed:
            raise ValueError(
                f"{name} has {len(raw)} rows of {columns} numbers from row {first} on, and {self} here {blocks} scales "
                f"of {NUMBERS} numbers; it is of another matrix"
            )

    def encode(self, raw: np.ndarray, x: np.ndarray, importance: np.ndarray | None = None, first_row: int = 0) -> None:
        raise TypeError(f"{self} keeps scales beside raw; `encoded` returns both")

    def encode_ref(self, x: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
        return self.encoded_ref(x)[0]

    def nbytes(self, rows: int, columns: int) -> int:
        blocks = math.ceil(rows * columns / NUMBERS)
        beside = blocks + 4 * (1 + math.ceil(blocks / SCALES)) if self.is_double else 4 * blocks
        return super().nbytes(rows, columns) + beside

    def encoded_strips(
        self, shape: tuple[int, int], strips: Iterable[np.ndarray], importance: np.ndarray | None = None
    ) -> tuple[np.ndarray, "NF4"]:
        self.weights(importance, shape[1])  # is checked, and changes nothing
        raw = np.empty((shape[0], self.items(shape[1])), np.uint8)
        scales, first = np.empty(math.ceil(math.prod(shape) / NUMBERS), np.float32), 0
        for strip in strips:
            x = self.check_numbers(strip)
            flat, begin = read_only(np.ascontiguousarray(x).reshape(-1)), first * shape[1] // NUMBERS
            own = scales[begin : begin + math.ceil(flat.size / NUMBERS)]
            with np.errstate(invalid="ignore"):  # of what is refused below
                _encode_nf4(raw[first : first + len(x)].reshape(-1), own, flat)
            if not (own <= self.largest).all():
                self.refuse(x, int((~np.isfinite(x)).any(1).argmax()), first)
            first += len(x)
        return raw, self._kept(scales)

    def encoded_ref(self, x: np.ndarray) -> tuple[np.ndarray, "NF4"]:
        scales, q = nearest_ref(np.asarray(x, np.float32).reshape(-1), NUMBERS, VALUES)
        raw = (q[::2] << np.uint8(4) | q[1::2]).reshape(len(x), self.items(x.shape[1]))
        return raw, self._kept(scales)

    def _kept(self, scales: np.ndarray) -> "NF4":
        if not self.is_double:
            return self.of_scales(scales)
        offset = np.float32(scales.mean(dtype=np.float64)) if scales.size else np.float32(0)
        sizes, codes = nearest_ref(scales - offset, SCALES, MAP)
        return self.of_bytes(codes, np.append(offset, sizes).astype(np.float32))

    def decode_ref(self, raw: np.ndarray) -> np.ndarray:
        columns = self.columns(raw)
        q = np.stack([raw >> np.uint8(4), raw & np.uint8(15)], -1).reshape(-1)
        n = self.side[0] * columns + np.arange(q.size)
        return (VALUES[q] * self.scales()[n // NUMBERS]).reshape(len(raw), columns)

    def nonfinite_rows(self, raw: np.ndarray) -> np.ndarray:
        columns = self.columns(raw)
        bad = np.append(~np.isfinite(self.scales()), False)  # no row: no block
        first = (self.side[0] + np.arange(len(raw))) * columns
        before = np.append(0, bad.cumsum())
        return before[(first + columns - 1) // NUMBERS + 1] > before[first // NUMBERS]


STORAGE, DOUBLE = NF4(False), NF4(True)
