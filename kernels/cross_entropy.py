"""Output head and cross-entropy in one operation: the logits of all rows never exist at once.

    forward    z = x Wᵀ      lse_n = log sum_v exp(z_nv)      t_nv = (1 - s) [v = label_n] + s / V
               loss_n = - sum_v t_nv log p_nv = lse_n - (1 - s) z_n,label - s mean_v z_nv      p_nv = exp(z_nv - lse_n)
    backward   dz_nv = scale (p_nv - t_nv)        dx = dz W        dW = dzᵀ x

    x dx (N, C)   w dw (V, C)   labels (N,) int32, negative = not counted   losses (N,)   hits (N,) uint8
    s = label smoothing

The rows that count go through in chunks.  A chunk's logits are made, become probabilities, become dz, and feed both
products of the backward while they are still in cache, so the backward needs nothing saved but x and W.  Rows that do
not count cost nothing. dx is overwritten (zero for rows that do not count); dw is overwritten or added to.  `scale`
is 1 for a sum, 1 / count for a mean. Label smoothing: Szegedy et al. 2016, section 7, as in PyTorch (the smoothed
mass includes the label itself).
"""

import math

import numpy as np

from ._jit import kernel, prange
from .matmul import product
from .simd import exp, largest, total
from .tiles import FLOAT32

CHUNK = 1 << 24  # floats of logits at a time: 64 MiB
STRETCH = 4096

# -- reference -----------------------------------------------------------------------------------


def cross_entropy_ref(z, labels, smoothing=0.0):
    """Return losses (N,), hits (N,) and dz (N, V) of the sum of losses, for logits z (N, V) in any float dtype."""
    counted = labels >= 0
    rows, label = np.arange(len(z)), np.where(counted, labels, 0)
    m = z.max(-1, keepdims=True)
    lse = m + np.log(np.exp(z - m).sum(-1, keepdims=True))
    t = np.full_like(z, smoothing / z.shape[1])
    t[rows, label] += 1 - smoothing
    losses = np.where(counted, -(t * (z - lse)).sum(-1), 0)
    hits = counted & (z.argmax(-1) == label)
    return losses, hits, np.where(counted[:, None], np.exp(z - lse) - t, 0)


def head_loss_ref(x, w, labels, scale=1.0, smoothing=0.0):
    """Return losses, hits, dx and dw."""
    losses, hits, dz = cross_entropy_ref(x @ w.T, labels, smoothing)
    return losses, hits, scale * dz @ w, scale * dz.T @ x


# -- kernel --------------------------------------------------------------------------------------


@kernel
def cross_entropy(z, losses, hits, labels, rows, first, smoothing, scale, backward):
    """Write losses and hits of `rows[first:first+len(z)]`, whose logits are z (n, V); z becomes dz, or scratch."""
    columns = z.shape[1]
    spread = np.float32(smoothing / columns)
    kept = np.float32(1 - smoothing)
    for r in prange(z.shape[0]):
        n = rows[first + r]
        label = labels[n]
        line = z[r]
        m = largest(line)
        at_label = line[label]
        hit = at_label == m
        if hit:  # the prediction is the first of equal maxima
            for j in range(label):
                if line[j] == m:
                    hit = False
        hits[n] = hit
        exponentials = np.float64(0)
        logits = np.float64(0)
        for j0 in range(0, columns, STRETCH):  # float32 sums of stretches, float64 sums of those
            part = line[j0 : min(j0 + STRETCH, columns)]
            logits += total(part)
            for j in range(part.size):
                part[j] = exp(part[j] - m)
            exponentials += total(part)
        lse = m + math.log(exponentials)
        losses[n] = lse - kept * at_label - spread * logits
        if backward:
            inverse = np.float32(scale / exponentials)
            down = np.float32(scale) * spread
            for j in range(columns):
                line[j] = line[j] * inverse - down
            line[label] -= np.float32(scale) * kept


# -- calling it ----------------------------------------------------------------------------------


class _Scratch:
    """The chunk of logits, and gathered rows where some rows do not count; made once for a shape and kept."""

    def __init__(self):
        self.logits = np.empty(0, np.float32)
        self.gathered = np.empty(0, np.float32)

    def rows_of(self, name, rows, columns):
        if getattr(self, name).size < rows * columns:
            setattr(self, name, np.empty(rows * columns, np.float32))
        return getattr(self, name)[: rows * columns].reshape(rows, columns)


_scratch = _Scratch()


def chunk_rows(vocabulary):
    """Rows of logits that are in memory at once."""
    return max(CHUNK // vocabulary // 16 * 16, 16)


def head_loss(losses, hits, x, w, labels, smoothing=0.0, numbers=FLOAT32):
    """Write losses (N,) and hits (N,); see the top of the file."""
    _head(losses, hits, None, None, x, w, labels, 1.0, smoothing, False, numbers)


def head_loss_backward(losses, hits, dx, dw, x, w, labels, scale, smoothing=0.0, accumulate=True, numbers=FLOAT32):
    """Write losses, hits and dx; add to dw, or overwrite it if not `accumulate`; None: w is frozen and has no dw.

    Forward and backward in one pass.
    """
    _head(losses, hits, dx, dw, x, w, labels, scale, smoothing, accumulate, numbers)


def _head(losses, hits, dx, dw, x, w, labels, scale, smoothing, accumulate, numbers):
    rows = np.flatnonzero(labels >= 0)
    whole = len(rows) == len(labels)
    backward = dx is not None
    if not whole:
        losses[...] = 0
        hits[...] = 0
        if backward:
            dx[...] = 0
    if dw is not None and len(rows) == 0 and not accumulate:
        dw[...] = 0
    step = min(chunk_rows(w.shape[0]), max(len(rows), 1))
    for first in range(0, len(rows), step):
        count = min(step, len(rows) - first)
        chunk = slice(first, first + count) if whole else rows[first : first + count]
        if whole:
            x_rows = x[chunk]
        else:
            x_rows = _scratch.rows_of("gathered", count, x.shape[1])
            np.take(x, chunk, axis=0, out=x_rows, mode="clip")  # mode "raise" would go through a copy
        z = _scratch.rows_of("logits", count, w.shape[0])
        product(z, x_rows, w, transpose_b=True, numbers=numbers)
        cross_entropy(z, losses, hits, labels, rows, first, float(smoothing), float(scale), backward)
        if backward:
            if dw is not None:
                base = dw if accumulate or first > 0 else None
                product(dw, z, x_rows, transpose_a=True, addend=base, numbers=numbers)
            if whole:
                product(dx[chunk], z, w, numbers=numbers)
            else:
                product(x_rows, z, w, numbers=numbers)  # x_rows is a copy and no longer needed
                dx[chunk] = x_rows
