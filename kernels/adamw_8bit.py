"""AdamW with its moments in 8 bits: 256 numbers of a tensor share a scale, and each is a byte.

    decode     m_i = number(a_i) s                 s = scale of the block, a_i b_i codes; v_i = number'(b_i) s'
    update     w, m and v as adamw does it (optimizers.py), in float32
    encode     s = max_i |m_i|                     a_i = the code whose number is nearest to m_i / s; v alike

    w g (P,) float32   m_codes v_codes (S, 256) uint8   m_scales v_scales (S,) float32
    chunks (n, 3) int64: [start, stop) in w, and the block where it begins   decay (n,) bool
    w, codes and scales are changed in place; g is only read.

A tensor has ceil(size / 256) blocks of its own; what the last one has too many stays 0.  So a number takes
2 + 2 4 / 256 = 2.03 bytes where float32 takes 8.  Weights are updated by the moments as they are before they are
encoded.  A block begins with scale 0, whatever its codes are.  The numbers of the codes, and how the nearest is found,
are in `engine/dynamic_codes.py`: m may have both signs, v has one, so one bit more.

A block of which a number is not finite decodes to NaN.  One whose largest number is below 2^-126, which has no
reciprocal in float32, is 0.  A block is computed by one thread: same bits for every number of threads.

Blocks, map and the numbers that are coded are those of bitsandbytes' AdamW8bit; but decay comes first here, as in
`adamw`, and no v above 0 is coded as 0.
Source: Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization", section 2.
"""

import math
from collections.abc import Sequence

import numpy as np

from .engine.checks import Array, checked
from .engine.dynamic_codes import (
    ZERO_CODE,
    decode_ref,
    decode_signed,
    decode_unsigned,
    encode_ref,
    encode_signed,
    encode_unsigned,
)
from .engine.jit import helper, kernel, prange
from .engine.shares import elements_each, round_up
from .engine.vectors import bits_of, float_from_bits
from .optimizers import adamw_ref

__all__ = [
    "SHARING",
    "adamw_8bit_",
    "adamw_8bit_ref",
    "block_chunks",
    "blocks_of",
    "decode_blocks_ref",
    "encode_blocks_ref",
]

SHARING = 256  # numbers of a block (Dettmers et al. have 2048; bitsandbytes has 256)


def blocks_of(size: int) -> int:
    """Return how many blocks a tensor of so many numbers has."""
    return -(-size // SHARING)


def block_chunks(offsets: Sequence[int], sizes: Sequence[int], decays: Sequence[bool]) -> tuple[Array, Array]:
    """Cut tensors into ranges of whole blocks; return chunks (n, 3), decay (n,) bool.

    offsets, sizes and decays have one entry for each tensor, as in `parameter_chunks`; blocks follow one another.
    """
    each, block = round_up(elements_each(sum(sizes)), SHARING), 0
    chunks, decay = [], []
    for offset, count, decays_here in zip(offsets, sizes, decays, strict=True):
        for start in range(0, count, each):
            chunks.append((offset + start, offset + min(start + each, count), block + start // SHARING))
            decay.append(bool(decays_here))
        block += blocks_of(count)
    return np.array(chunks, np.int64).reshape(-1, 3), np.array(decay, np.bool_)


# -- reference: plain NumPy, any float dtype ---------------------------------------------------
LEAST_SCALE = 2.0**-126  # of float32's normal numbers


def encode_blocks_ref(x: Array, signed: bool) -> tuple[Array, Array]:
    """Return the codes (S, 256) uint8 and the scales (S,) of a tensor's numbers x (n,), each of which is finite."""
    blocks = np.zeros((blocks_of(x.size), SHARING), x.dtype)
    blocks.ravel()[: x.size] = x
    scales = np.abs(blocks).max(axis=1, initial=0)
    scales = np.where(scales < LEAST_SCALE, 0, scales).astype(x.dtype)
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = encode_ref(np.where(scales[:, None] > 0, blocks / scales[:, None], 0), signed)
    return codes, scales


def decode_blocks_ref(codes: Array, scales: Array, size: int, signed: bool) -> Array:
    """Return the numbers (size,) of codes (S, 256) uint8 and scales (S,), in the type of the scales."""
    return (decode_ref(codes, signed).astype(scales.dtype) * scales[:, None]).ravel()[:size]


def adamw_8bit_ref(
    w: Array,
    m_codes: Array,
    m_scales: Array,
    v_codes: Array,
    v_scales: Array,
    g: Array,
    decay: Array,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    scale: float,
) -> tuple[Array, Array, Array, Array, Array]:
    """Return the new w (P,), m_codes, m_scales, v_codes and v_scales of one tensor; decay is 1 where it applies."""
    m, v = decode_blocks_ref(m_codes, m_scales, w.size, True), decode_blocks_ref(v_codes, v_scales, w.size, False)
    w, m, v = adamw_ref(w, m, v, g, decay, lr, beta1, beta2, eps, weight_decay, step, scale)
    return w, *encode_blocks_ref(m, True), *encode_blocks_ref(v, False)


# -- kernels: Numba, float32, outputs first ----------------------------------------------------
_SIZE = np.int32(0x7FFFFFFF)  # of the bits of a float32: all but the sign; as integers they are in the numbers' order
_SMALLEST_BITS, _INFINITY_BITS = np.int32(0x00800000), np.int32(0x7F800000)


@helper
def _scale_of(bits):
    """Return the scale of a block, given the largest bits of its numbers without their signs."""
    if bits < _SMALLEST_BITS:
        return np.float32(0)
    return float_from_bits(bits) if bits < _INFINITY_BITS else np.float32(np.nan)


def _chunks_inside(sizes, chunks, step, **others):
    start, stop, block = chunks.T
    fit = (start >= 0) & (start <= stop) & (stop <= sizes["P"])
    fit &= (block >= 0) & (block + (stop - start + SHARING - 1) // SHARING <= sizes["S"])
    if not fit.all():
        raise ValueError(
            f"chunks must be ranges inside 0 ... {sizes['P']}, the length of w, of blocks inside 0 ... {sizes['S']}; "
            "see block_chunks"
        )
    if step < 1:
        raise ValueError(f"step ({step}) must be 1 at the first update")


@checked(
    "w! g (P); m_codes! v_codes! (S, 256) uint8; m_scales! v_scales! (S); chunks (n, 3) int64; decay (n) bool",
    _chunks_inside,
)
@kernel
def adamw_8bit_(
    w: Array,
    m_codes: Array,
    m_scales: Array,
    v_codes: Array,
    v_scales: Array,
    g: Array,
    chunks: Array,
    decay: Array,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    scale: float,
) -> None:
    """Update w (P,), codes and scales in place, decay first; step is 1 at the first update."""
    b1, b2, epsilon, factor = np.float32(beta1), np.float32(beta2), np.float32(eps), np.float32(scale)
    c1, c2 = np.float32(1.0 - beta1), np.float32(1.0 - beta2)
    rate = np.float32(lr / (1.0 - beta1**step))
    root = np.float32(1.0 / math.sqrt(1.0 - beta2**step))
    for c in prange(chunks.shape[0]):
        start, stop, block = chunks[c, 0], chunks[c, 1], chunks[c, 2]
        keep = np.float32(1.0 - lr * weight_decay) if decay[c] else np.float32(1)
        moments = np.empty((2, SHARING), np.float32)
        m, v = moments[0], moments[1]
        for at in range(start, stop, SHARING):
            count = min(SHARING, stop - at)
            wb, gb = w[at : at + count], g[at : at + count]
            decode_signed(m, m_codes[block], m_scales[block])
            decode_unsigned(v, v_codes[block], v_scales[block])
            most_m, most_v = np.int32(0), np.int32(0)
            for i in range(count):
                gi = factor * gb[i]
                mi = b1 * m[i] + c1 * gi
                vi = b2 * v[i] + c2 * gi * gi
                m[i] = mi
                v[i] = vi
                wb[i] = keep * wb[i] - rate * mi / (np.sqrt(vi) * root + epsilon)
                most_m = max(most_m, bits_of(mi) & _SIZE)
                most_v = max(most_v, bits_of(vi) & _SIZE)
            m[count:] = 0
            v[count:] = 0
            m_scales[block], v_scales[block] = _scale_of(most_m), _scale_of(most_v)
            if m_scales[block] > 0:
                encode_signed(m_codes[block], m, np.float32(1) / m_scales[block])
            else:
                m_codes[block] = ZERO_CODE
            if v_scales[block] > 0:
                encode_unsigned(v_codes[block], v, np.float32(1) / v_scales[block])
            else:
                v_codes[block] = 0
            block += 1
