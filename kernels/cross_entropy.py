"""Output head and cross-entropy in one operation: the logits of all rows never exist at once.

    forward    z = x Wᵀ      lse_n = log sum_v exp(z_nv)      t_nv = (1 - s) [v = label_n] + s / V
               loss_n = - sum_v t_nv log p_nv = lse_n - (1 - s) z_n,label - s mean_v z_nv      p_nv = exp(z_nv - lse_n)
    z-loss     loss_n + λ lse_n²                  pulls the normalizer of the softmax towards 1; off with λ = 0
    objective  scale sum_n a_n (loss_n + λ lse_n²)                a_n = weight of a row, 1 if none is given
    backward   dz_nv = scale a_n (p_nv (1 + 2 λ lse_n) - t_nv)    dx = dz W        dW = dzᵀ x

    x dx (N, C)   w dw (V, C)   labels (N,) int32, negative = not counted   losses lse (N,)   hits (N,) uint8
    s = label smoothing   λ = z_loss; losses are without it and without weights, and who wants its value has lse
    weights a (N,), of any sign: where the gradient of another objective in the same losses comes in, such as that of
    preferences (docs/4-cross_entropy.md)

The rows that count go through in chunks.  A chunk's logits are made, become probabilities, become dz, in the same
memory, and feed both products of the backward, which so needs nothing saved but x and W.  Rows that do not count cost
nothing.  dx is overwritten (zero for rows that do not count) and may be x itself; dw is overwritten or
added to.  `scale` is 1 for a sum, 1 / count for a mean. Label smoothing: Szegedy et al. 2016, section 7, as in PyTorch
(the smoothed mass includes the label itself).  z-loss: Chowdhery et al. 2022 (PaLM), section 5, with λ = 1e-4;
d lse_n / dz_nv = p_nv, so that d(λ lse_n²) / dz_nv = 2 λ lse_n p_nv.  A W that is not trained may be in any storage
(`stored_matmul.py`).

An adapter of the head adds a second product to the logits, z += u Bᵀ (`Second`), with du = dz B and dB = dzᵀ u.  Where
rows have trained lengths (`Lengths`), the logits are y = g z instead, and dx = dz W with dz = g dy (`dora.py`).  Where
the adapter reads h, what dropout leaves of x, they are y = x Wᵀ + (g - 1) h Wᵀ + g u Bᵀ; dx = dy W, dh = (dz - dy) W.

Longer than 400 lines because what an adapter adds is made and undone in the same chunks.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .dora import dora_backward, dora_forward
from .engine.checks import Array, checked, unchecked
from .engine.jit import kernel, prange
from .engine.number_formats import FLOAT32, AnyFormat
from .engine.vectors import largest, soften
from .matmul import product
from .storage import STORAGES, Storage
from .stored_matmul import stored_product, stored_product_backward

CHUNK_LOGITS = 3 << 22  # floats of logits at a time: 48 MiB; dw is read and written once for each chunk (docs/log.md)
PARTIAL_LOGITS = 4096


class Lengths(NamedTuple):
    """Lengths of the rows of W with an adapter in it (DoRA).  In backward dh is overwritten, and dm as db is."""

    g: Array  # (V,)
    n: Array  # (V,)
    dm: Array  # (V,)
    h: Array | None = None  # (N, C): what the adapter reads where something is dropped, else x
    dh: Array | None = None  # (N, C)


class Second(NamedTuple):
    """What is added to the logits: u Bᵀ.  In backward du is overwritten, and db added to or overwritten, as dw is."""

    u: Array  # (N, R)
    b: Array  # (V, R)
    du: Array  # (N, R)
    db: Array  # (V, R)
    lengths: Lengths | None = None

    @property
    def logits(self) -> int:
        """How many arrays of a chunk's logits are needed: y, of DoRA z, and with h u Bᵀ apart."""
        return 1 if self.lengths is None else 2 if self.lengths.h is None else 3


# -- reference -----------------------------------------------------------------------------------


def cross_entropy_ref(
    z: Array, labels: Array, smoothing: float = 0.0, z_loss: float = 0.0
) -> tuple[Array, Array, Array, Array]:
    """Return losses, hits, lse (N,), and dz (N, V) of the sum of losses and z-losses, for logits z (N, V) of any float.

    losses are without the z-loss; all of a row that does not count is 0.
    """
    counted = labels >= 0
    rows, label = np.arange(len(z)), np.where(counted, labels, 0)
    m = z.max(-1, keepdims=True)
    lse = m + np.log(np.exp(z - m).sum(-1, keepdims=True))
    t = np.full_like(z, smoothing / z.shape[1])
    t[rows, label] += 1 - smoothing
    losses = np.where(counted, -(t * (z - lse)).sum(-1), 0)
    hits = counted & (z.argmax(-1) == label)
    dz = np.exp(z - lse) * (1 + 2 * z_loss * lse) - t
    return losses, hits, np.where(counted, lse[:, 0], 0), np.where(counted[:, None], dz, 0)


def head_loss_ref(
    x: Array,
    w: Array,
    labels: Array,
    scale: float = 1.0,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
    weights: Array | None = None,
) -> tuple[Array, Array, Array, Array, Array]:
    """Return losses, hits, lse, dx and dw."""
    losses, hits, lse, dz = cross_entropy_ref(x @ w.T, labels, smoothing, z_loss)
    dz *= scale if weights is None else scale * weights[:, None]
    return losses, hits, lse, dz @ w, dz.T @ x


# -- kernel --------------------------------------------------------------------------------------


def _labels_fit(labels, vocabulary):
    if labels.size and labels.max() >= vocabulary:
        n = int(labels.argmax())
        raise ValueError(f"labels[{n}] is {labels[n]}; labels are 0 ... {vocabulary - 1} or, not counted, negative")


def _smoothing_fits(smoothing):
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing ({smoothing}) must be at least 0 and below 1; try 0.1")


def _z_loss_fits(z_loss):
    if not 0 <= z_loss < math.inf:
        raise ValueError(f"z_loss ({z_loss}) must be zero or more; try 1e-4")


def _rows_fit(sizes, labels, rows, first, smoothing, z_loss, **others):
    _smoothing_fits(smoothing)
    _z_loss_fits(z_loss)
    _labels_fit(labels, sizes["V"])
    chunk = rows[first : first + sizes["n"]] if first >= 0 else rows[:0]
    if len(chunk) < sizes["n"] or (labels[chunk] < 0).any():
        raise ValueError(
            f"z has {sizes['n']} rows of logits; cross_entropy takes one for each of rows[{first}:], whose labels count"
        )


@checked("z! (n, V); losses! lse! weights (N); hits! (N) uint8; labels (N) int; rows (R) int < N", _rows_fit)
@kernel
def cross_entropy(
    z: Array,
    losses: Array,
    hits: Array,
    lse: Array,
    labels: Array,
    weights: Array,
    rows: Array,
    first: int,
    smoothing: float,
    z_loss: float,
    scale: float,
    backward: bool,
) -> None:
    """Write losses, hits and lse of `rows[first:first+len(z)]`, whose logits are z (n, V); z becomes dz, or scratch."""
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
        for j0 in range(0, columns, PARTIAL_LOGITS):  # float32 sums of stretches, float64 sums of those
            part = line[j0 : min(j0 + PARTIAL_LOGITS, columns)]
            before, after = soften(part, m)
            logits += before
            exponentials += after
        log_sum = m + math.log(exponentials)
        lse[n] = log_sum
        losses[n] = log_sum - kept * at_label - spread * logits
        if backward:
            weight = scale * weights[n]
            inverse = np.float32(weight * (1 + 2 * z_loss * log_sum) / exponentials)  # without z-loss times exactly 1
            down = np.float32(weight) * spread
            for j in range(columns):
                line[j] = line[j] * inverse - down
            line[label] -= np.float32(weight) * kept


# -- calling it ----------------------------------------------------------------------------------


def chunk_rows(vocabulary: int) -> int:
    """Rows of logits that are in memory at once."""
    return max(CHUNK_LOGITS // vocabulary // 16 * 16, 16)


def scratch_floats(rows: int, vocabulary: int, width: int, logits: int = 1) -> int:
    """Return how many floats of scratch the head needs: the logits of a chunk, and its rows of x where they are few.

    logits   how many arrays of a chunk's logits (`Second.logits`)
    """
    return min(rows, chunk_rows(vocabulary)) * (logits * vocabulary + width)


def _lengths_fit(sizes, lengths, dw):
    found = [None if array is None else array.shape for array in lengths[: 3 if lengths.h is None else 5]]
    wanted = ([(sizes["V"],)] * 3 + [(sizes["N"], sizes["C"])] * 2)[: len(found)]
    if found != wanted:
        raise ValueError(f"second.lengths have shapes {found}; here they must be {wanted}")
    if dw is not None:
        raise ValueError("dw is an array; a w whose rows have lengths (second.lengths) is not trained: pass None")


def _head_fits(sizes, w, labels, scratch, smoothing, storage, dw=None, z_loss=0.0, second=None, **others):
    _smoothing_fits(smoothing)
    if second is not None:
        wanted = [(sizes[axis], second.b.shape[-1]) for axis in "NVNV"]
        if (found := [array.shape for array in second[:4]]) != wanted:
            raise ValueError(f"second has shapes {found}; here they must be {wanted}")
        if second.lengths is not None:
            _lengths_fit(sizes, second.lengths, dw)
    _z_loss_fits(z_loss)
    (storage or STORAGES["float32"]).check(w, sizes["C"], "w")
    if storage is not None and dw is not None:
        raise ValueError(f"w is kept as {storage} and is not trained, but dw is an array; pass None")
    _labels_fit(labels, sizes["V"])
    needed = scratch_floats(sizes["N"], sizes["V"], sizes["C"], 1 if second is None else second.logits)
    if scratch.size < needed:
        raise ValueError(f"scratch has {scratch.size} floats; the head needs {needed}: see scratch_floats")


@checked(
    "losses! (N); hits! (N) uint8; x (N, C); w (V, items) float32|float16|uint16|uint8; labels (N) int; "
    "scratch! (floats)",
    _head_fits,
    number_format=AnyFormat,
    storage=Storage | None,
    check=object,
    second=Second | None,
)
def head_loss(
    losses: Array,
    hits: Array,
    x: Array,
    w: Array,
    labels: Array,
    scratch: Array,
    smoothing: float = 0.0,
    number_format: AnyFormat = FLOAT32,
    storage: Storage | None = None,
    check: Callable[[], None] | None = None,
    second: Second | None = None,
) -> None:
    """Write losses (N,) and hits (N,); see the top of the file.  scratch: `scratch_floats` float32.

    With a `storage`, w is the raw array of a matrix that is not trained (`stored_matmul.py`).  `check` is called after
    each chunk of rows; what it raises gives the pass up.
    """
    outputs = losses, hits, None, None, None
    _head(*outputs, x, w, labels, scratch, 1.0, smoothing, 0.0, False, number_format, storage, check, second)


@checked(
    "dx! x (N, C); dw?! (V, C); w (V, items) float32|float16|uint16|uint8; losses! lse?! weights? (N); "
    "hits! (N) uint8; labels (N) int; scratch! (floats)",
    _head_fits,
    number_format=AnyFormat,
    storage=Storage | None,
    check=object,
    second=Second | None,
)
def head_loss_backward(
    losses: Array,
    hits: Array,
    dx: Array,
    dw: Array,
    x: Array,
    w: Array,
    labels: Array,
    scratch: Array,
    scale: float,
    smoothing: float = 0.0,
    accumulate: bool = True,
    number_format: AnyFormat = FLOAT32,
    storage: Storage | None = None,
    z_loss: float = 0.0,
    lse: Array | None = None,
    check: Callable[[], None] | None = None,
    second: Second | None = None,
    weights: Array | None = None,
) -> None:
    """Write losses, hits and dx; add to dw, or overwrite it if not `accumulate`; None: w is frozen and has no dw.

    Forward and backward in one pass.  `storage` (dw is then None) and `check` as in `head_loss`.  With z_loss,
    dx and dw have its part, and losses do not; lse (N,) is written where it is given.  weights (N,) multiply the
    gradients of rows, and not their losses.
    """
    outputs = losses, hits, lse, dx, dw
    numbers = scale, smoothing, z_loss, accumulate
    _head(*outputs, x, w, labels, scratch, *numbers, number_format, storage, check, second, weights)


def _products(w, storage, number_format):
    """Return two functions: one writes x Wᵀ, the other dy W."""
    if storage is None:
        return (
            lambda z, x: unchecked(product)(z, x, w, transpose_b=True, number_format=number_format),
            lambda dx, dz: unchecked(product)(dx, dz, w, number_format=number_format),
        )
    return (
        lambda z, x: unchecked(stored_product)(z, x, w, storage, number_format=number_format),
        lambda dx, dz: unchecked(stored_product_backward)(dx, dz, w, storage, number_format=number_format),
    )


class _Adapter:
    """What an adapter adds to the passes over a chunk of rows; spare is the scratch behind logits and rows of x."""

    def __init__(self, second, spare, number_format):
        self.second, self.spare, self.options = second, spare, {"number_format": number_format}

    def _spare(self, z, place):
        return self.spare[place * z.size : (place + 1) * z.size].reshape(z.shape)

    def add(self, z, chunk, write_logits):
        """Turn z (n, V), which is x Wᵀ, into the logits."""
        u, b, _, _, lengths = self.second
        if lengths is None:
            unchecked(product)(z, u[chunk], b, transpose_b=True, addend=z, **self.options)
            return
        own = t = self._spare(z, 0)
        if given := lengths.h is not None:
            t = self._spare(z, 1)
            write_logits(own, lengths.h[chunk])
        unchecked(product)(t, u[chunk], b, transpose_b=True, **self.options)
        unchecked(dora_forward)(z, own, t, lengths.g, None, given)

    def backward(self, dz, chunk, write_dx, accumulate):
        """Write the rows of du and dh, add to db and dm or overwrite them; return the gradient (n, V) of x Wᵀ.

        dz (n, V) is that of the logits, and may be overwritten.
        """
        (u, b, du, db, lengths), dy = self.second, dz
        if lengths is not None:
            if not accumulate:
                lengths.dm[...] = 0
            dz = self._spare(dy, 0)
            unchecked(dora_backward)(dz, lengths.dm, dy, dz, lengths.g, lengths.n)
        u_rows, base = u[chunk], db if accumulate else None
        unchecked(product)(db, dz, u_rows, transpose_a=True, addend=base, **self.options)  # forward: z += u Bᵀ
        du_rows = np.empty_like(u_rows)
        unchecked(product)(du_rows, dz, b, **self.options)
        du[chunk] = du_rows
        if lengths is None or lengths.h is None:
            return dz
        np.subtract(dz, dy, out=dz)  # forward: y = x Wᵀ + (g - 1) h Wᵀ + ...
        dh_rows = np.empty((len(u_rows), lengths.dh.shape[1]), np.float32)
        write_dx(dh_rows, dz)
        lengths.dh[chunk] = dh_rows
        return dy

    def gradients(self):
        _, _, du, db, lengths = self.second
        return [du, lengths and lengths.dh], [db, lengths and lengths.dm]


def _head(
    losses,
    hits,
    lse,
    dx,
    dw,
    x,
    w,
    labels,
    scratch,
    scale,
    smoothing,
    z_loss,
    accumulate,
    number_format,
    storage,
    check,
    second,
    weights=None,
):
    write_logits, write_dx = _products(w, storage, number_format)
    lse = np.empty(len(losses), np.float32) if lse is None else lse
    weights = np.ones(len(losses), np.float32) if weights is None else weights
    counted = labels >= 0
    rows = np.flatnonzero(counted)
    whole = len(rows) == len(labels)
    vocabulary, width = len(w), x.shape[1]
    step = min(chunk_rows(vocabulary), len(labels))
    logits, gathered = scratch[: step * vocabulary], scratch[step * vocabulary : step * (vocabulary + width)]
    adapter = None if second is None else _Adapter(second, scratch[step * (vocabulary + width) :], number_format)
    for first in range(0, len(rows), step):
        count = min(step, len(rows) - first)
        chunk = slice(first, first + count) if whole else rows[first : first + count]
        if whole:
            x_rows = x[chunk]
        else:
            x_rows = gathered[: count * width].reshape(count, width)
            np.take(x, chunk, axis=0, out=x_rows, mode="clip")  # mode "raise" would go through a copy
        z = logits[: count * vocabulary].reshape(count, vocabulary)
        write_logits(z, x_rows)  # forward: z = x Wᵀ
        if adapter is not None:
            adapter.add(z, chunk, write_logits)
        numbers = float(smoothing), float(z_loss), float(scale)
        unchecked(cross_entropy)(z, losses, hits, lse, labels, weights, rows, first, *numbers, dx is not None)
        if dw is not None:
            base = dw if accumulate or first > 0 else None
            unchecked(product)(dw, z, x_rows, transpose_a=True, addend=base, number_format=number_format)
        dv = z  # the gradient of x Wᵀ
        if adapter is not None and dx is not None:
            dv = adapter.backward(z, chunk, write_dx, accumulate or first > 0)
        if dx is not None and whole:
            write_dx(dx[chunk], dv)
        elif dx is not None:
            write_dx(x_rows, dv)  # x_rows is a copy and no longer needed
            dx[chunk] = x_rows
        if check is not None:
            check()
    of_rows, of_weights = ([], []) if adapter is None or dx is None else adapter.gradients()
    if not whole:
        for out in (losses, hits, lse, dx, *of_rows):
            if out is not None:
                out[~counted] = 0
    if len(rows) == 0 and not accumulate:
        for gradient in (dw, *of_weights):
            if gradient is not None:
                gradient[...] = 0
