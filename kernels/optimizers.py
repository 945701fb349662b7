"""SGD, Adam and AdamW: one pass over the flat buffers, gradient scale and weight decay included.

    all        g_i <- scale g_i                      scale = clip factor / number of trained tokens
    sgd        g_i <- g_i + wd w_i                   m_i <- momentum m_i + g_i
               w_i <- w_i - lr m_i                   with nesterov: w_i <- w_i - lr (g_i + momentum m_i)
    adam       g_i <- g_i + wd w_i                   (wd is an L2 penalty: it goes through the moments)
               m_i <- b1 m_i + (1 - b1) g_i          v_i <- b2 v_i + (1 - b2) g_i^2
               w_i <- w_i - lr (m_i / (1 - b1^t)) / (sqrt(v_i / (1 - b2^t)) + eps)             t = step = 1, 2, ...
    adamw      w_i <- w_i - lr wd w_i, then adam's update without its penalty: decay never enters the moments

    w m v g (P,) float32   chunks (n, 2) int64: ranges [start, stop) that never cross a tensor   decay (n,) bool
    w, m and v are changed in place; g is only read.  wd is zero in a chunk whose `decay` is false (norms and biases).

The formulas, and the place of eps, are PyTorch's.  Without momentum sgd does not touch m, which may then be empty.  The
powers of b1 and b2 are computed in float64.  A chunk is computed by one thread, element by element: same bits for every
number of threads.
Source: Kingma and Ba, "Adam" (2015), algorithm 1; Loshchilov and Hutter, "Decoupled Weight Decay Regularization"
(2019), algorithm 2.
"""

import math
from collections.abc import Sequence

import numpy as np

from .engine.checks import Array, checked
from .engine.jit import kernel, prange
from .engine.shares import elements_each

__all__ = ["adam_", "adam_ref", "adamw_", "adamw_ref", "parameter_chunks", "sgd_", "sgd_ref"]


def parameter_chunks(
    offsets: Sequence[int], sizes: Sequence[int], decays: Sequence[bool], size: int | None = None
) -> tuple[Array, Array]:
    """Cut tensors into ranges of at most `size` elements (`elements_each`); return chunks (n, 2), decay (n,) bool.

    offsets, sizes and decays have one entry for each tensor: where it begins in the flat buffer, how many elements it
    has, and whether weight decay applies to it.
    """
    size = elements_each(sum(sizes)) if size is None else size
    chunks, decay = [], []
    for offset, count, decays_here in zip(offsets, sizes, decays, strict=True):
        for start in range(offset, offset + count, size):
            chunks.append((start, min(start + size, offset + count)))
            decay.append(bool(decays_here))
    return np.array(chunks, np.int64).reshape(-1, 2), np.array(decay, np.bool_)


# -- reference: plain NumPy, any float dtype ---------------------------------------------------
def sgd_ref(
    w: Array,
    m: Array,
    g: Array,
    decay: Array,
    lr: float,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
    scale: float,
) -> tuple[Array, Array]:
    """Return the new w and m (P,); decay (P,) is 1 where weight decay applies and 0 elsewhere."""
    g = g * scale + weight_decay * decay * w
    if momentum == 0:
        return w - lr * g, m
    m = momentum * m + g
    return w - lr * (g + momentum * m if nesterov else m), m


def adam_ref(
    w: Array,
    m: Array,
    v: Array,
    g: Array,
    decay: Array,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    scale: float,
) -> tuple[Array, Array, Array]:
    """Return the new w, m and v (P,); decay (P,) is 1 where weight decay applies and 0 elsewhere."""
    g = g * scale + weight_decay * decay * w
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    return w - lr * (m / (1 - beta1**step)) / (np.sqrt(v / (1 - beta2**step)) + eps), m, v


def adamw_ref(
    w: Array,
    m: Array,
    v: Array,
    g: Array,
    decay: Array,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    scale: float,
) -> tuple[Array, Array, Array]:
    """Return the new w, m and v (P,); decay (P,) is 1 where weight decay applies and 0 elsewhere."""
    w = w - lr * weight_decay * decay * w
    return adam_ref(w, m, v, g, decay, lr, beta1, beta2, eps, 0.0, step, scale)


# -- kernels: Numba, float32, outputs first ----------------------------------------------------
# Each chunk is cut out as views that begin at 0: LLVM then sees plain vector code (five times as fast as w[start + i]).


def _chunks_inside(sizes, chunks, step=1, **others):
    if chunks.size and not (chunks.min() >= 0 and (chunks[:, 0] <= chunks[:, 1]).all() and chunks.max() <= sizes["P"]):
        raise ValueError(f"chunks must be ranges inside 0 ... {sizes['P']}, the length of w; see parameter_chunks")
    if step < 1:
        raise ValueError(f"step ({step}) must be 1 at the first update")


def _sgd_fits(sizes, m, momentum, chunks, **others):
    _chunks_inside(sizes, chunks)
    if momentum != 0 and m.size != sizes["P"]:
        raise ValueError(f"m has shape {m.shape}; sgd_ with momentum takes ({sizes['P']},), as w has")


@checked("w! g (P); m! (M); chunks (n, 2) int64; decay (n) bool", _sgd_fits)
@kernel
def sgd_(
    w: Array,
    m: Array,
    g: Array,
    chunks: Array,
    decay: Array,
    lr: float,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
    scale: float,
) -> None:
    """Update w (P,), and m (P,) unless momentum is 0, in place."""
    rate, mu, factor = np.float32(lr), np.float32(momentum), np.float32(scale)
    for c in prange(chunks.shape[0]):
        start, stop = chunks[c, 0], chunks[c, 1]
        wc, mc, gc = w[start:stop], m[start:stop], g[start:stop]
        penalty = np.float32(weight_decay) if decay[c] else np.float32(0)
        if momentum == 0:
            for i in range(stop - start):
                wc[i] -= rate * (factor * gc[i] + penalty * wc[i])
        elif nesterov:
            for i in range(stop - start):
                gi = factor * gc[i] + penalty * wc[i]
                mi = mu * mc[i] + gi
                mc[i] = mi
                wc[i] -= rate * (gi + mu * mi)
        else:
            for i in range(stop - start):
                mi = mu * mc[i] + (factor * gc[i] + penalty * wc[i])
                mc[i] = mi
                wc[i] -= rate * mi


@checked("w! m! v! g (P); chunks (n, 2) int64; decay (n) bool", _chunks_inside)
@kernel
def adam_(
    w: Array,
    m: Array,
    v: Array,
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
    """Update w, m and v (P,) in place; step is 1 at the first update."""
    b1, b2, epsilon, factor = np.float32(beta1), np.float32(beta2), np.float32(eps), np.float32(scale)
    c1, c2 = np.float32(1.0 - beta1), np.float32(1.0 - beta2)
    rate = np.float32(lr / (1.0 - beta1**step))
    root = np.float32(1.0 / math.sqrt(1.0 - beta2**step))
    for c in prange(chunks.shape[0]):
        start, stop = chunks[c, 0], chunks[c, 1]
        wc, mc, vc, gc = w[start:stop], m[start:stop], v[start:stop], g[start:stop]
        penalty = np.float32(weight_decay) if decay[c] else np.float32(0)
        for i in range(stop - start):
            gi = factor * gc[i] + penalty * wc[i]
            mi = b1 * mc[i] + c1 * gi
            vi = b2 * vc[i] + c2 * gi * gi
            mc[i] = mi
            vc[i] = vi
            wc[i] -= rate * mi / (np.sqrt(vi) * root + epsilon)


@checked("w! m! v! g (P); chunks (n, 2) int64; decay (n) bool", _chunks_inside)
@kernel
def adamw_(
    w: Array,
    m: Array,
    v: Array,
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
    """Update w, m and v (P,) in place, decay first; step is 1 at the first update."""
    b1, b2, epsilon, factor = np.float32(beta1), np.float32(beta2), np.float32(eps), np.float32(scale)
    c1, c2 = np.float32(1.0 - beta1), np.float32(1.0 - beta2)
    rate = np.float32(lr / (1.0 - beta1**step))
    root = np.float32(1.0 / math.sqrt(1.0 - beta2**step))
    for c in prange(chunks.shape[0]):
        start, stop = chunks[c, 0], chunks[c, 1]
        wc, mc, vc, gc = w[start:stop], m[start:stop], v[start:stop], g[start:stop]
        keep = np.float32(1.0 - lr * weight_decay) if decay[c] else np.float32(1)
        for i in range(stop - start):
            gi = factor * gc[i]
            mi = b1 * mc[i] + c1 * gi
            vi = b2 * vc[i] + c2 * gi * gi
            mc[i] = mi
            vc[i] = vi
            wc[i] = keep * wc[i] - rate * mi / (np.sqrt(vi) * root + epsilon)
