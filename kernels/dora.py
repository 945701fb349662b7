"""DoRA: the rows of W + s B A, each given a length of its own, which is trained.

    lengths    n_r² = |w_r + s b_r A|² = |w_r|² + Σ_k b_rk (2 s (W Aᵀ)_rk + s² (A Aᵀ b_r)_k)         g_r = m_r / n_r
    forward    v = h Wᵀ    t = s h Aᵀ Bᵀ    z = v + t    y = y + (g - 1) v + g t        y: what it is without adapters
    backward   dz = g dy    dm_r = Σ dy_r z_r / n_r                       n is a constant in backward

    y v t z dy dz (N, M)   g n m dm |w_r|² (M,)   W (M, K)   A (R, K)   B (M, R)   W Aᵀ as its transpose (R, M)
    y and z are changed in place, dz and n are overwritten, dm is added to; saved for backward: z g n

A table of ids E (V, C), whose adapter is s A[id] Bᵀ with A (V, R) and B (C, R), has such lengths of its *columns*,
m and n (C,): it is W = Eᵀ above, with Aᵀ in the place of A, and |w_r|² is that of a column of E.

h is what the adapter reads: x, or x with some of it dropped.  Then v is not what y holds: y keeps x Wᵀ, as in PEFT, and
what is added to it is all of h.  Where nothing is dropped, v is y, or what is left of y without the residual that the
product has begun with; so a layer of which g is 1 and B is 0 changes no bit.

n needs no row of B A: W Aᵀ is R products for a row of W, where (B A)_r is as many and a pass over memory besides.
|w_r|² is worked out once, because W is frozen.  A row whose length is 0 has no direction: its g is 1, and its dm 0.
Sums of n and dm run in float64.

Source: Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", equation 5; the constant n is its section 4.3.
Columns of a table: PEFT 0.21, `DoraEmbeddingLayer`.
"""

import numpy as np

from .engine.checks import Array, checked
from .engine.jit import kernel, prange
from .engine.shares import add_partial_sums, partial_sums
from .engine.vectors import sum_of_squares

__all__ = [
    "column_squares",
    "column_squares_ref",
    "dora_backward",
    "dora_backward_ref",
    "dora_forward",
    "dora_forward_ref",
    "row_factors",
    "row_factors_ref",
    "row_lengths",
    "row_lengths_ref",
    "row_squares",
    "row_squares_ref",
]

# -- reference: plain NumPy, any float dtype ---------------------------------------------------


def row_squares_ref(w: Array) -> Array:
    """Return |w_r|² (M,)."""
    return np.square(w).sum(1)


def column_squares_ref(e: Array) -> Array:
    """Return the squared lengths of the columns of e, (C,)."""
    return np.square(e).sum(0)


def row_lengths_ref(w: Array, a: Array, b: Array, scale: float) -> Array:
    """Return n (M,), by the definition."""
    return np.linalg.norm(w + scale * (b @ a), axis=1)


def row_factors_ref(m: Array, n: Array) -> Array:
    """Return g (M,)."""
    return np.where(n == 0, 1, m / np.where(n == 0, 1, n))


def dora_forward_ref(y: Array, v: Array, t: Array, g: Array) -> tuple[Array, Array]:
    """Return y (N, M) and z (N, M), given y without adapters, v, t (N, M) and g (M,)."""
    return y + (g - 1) * v + g * t, v + t


def dora_backward_ref(dy: Array, z: Array, g: Array, n: Array) -> tuple[Array, Array]:
    """Return dz (N, M), the gradient of t, and dm (M,)."""
    dm = np.where(n == 0, 0, (dy * z).sum(0) / np.where(n == 0, 1, n))  # forward: y = ... + (m / n) z
    return g * dy, dm


# -- kernels: Numba, float32, outputs first ----------------------------------------------------


@checked("squares! (M) float64; w (M, K)")
@kernel
def row_squares(squares: Array, w: Array) -> None:
    """Overwrite squares (M,) with the squared lengths of the rows of w (M, K)."""
    for r in prange(len(w)):
        squares[r] = sum_of_squares(w[r])


@checked("squares! (C) float64; e (V, C)")
@kernel
def column_squares(squares: Array, e: Array) -> None:
    """Add to squares (C,) the squared lengths of the columns of e (V, C), which may be some rows of a table."""
    V, C = e.shape
    parts = partial_sums(V)
    partial = np.zeros((parts, C), np.float64)
    for p in prange(parts):
        part = np.int64(p)
        for v in range(V * part // parts, V * (part + 1) // parts):
            for j in range(C):
                partial[part, j] += np.float64(e[v, j]) * np.float64(e[v, j])
    for p in range(parts):
        for j in range(C):
            squares[j] += partial[p, j]


@checked("n! (M); squares (M) float64; wa (R, M); b (M, R); gram (R, R)")
@kernel
def row_lengths(n: Array, squares: Array, wa: Array, b: Array, gram: Array, scale: float) -> None:
    """Overwrite n (M,) from |w_r|² (M,), W Aᵀ as its transpose wa (R, M), b (M, R) and gram = A Aᵀ (R, R).

    A row of b that is 0 gives the root of its square, to the bit.
    """
    M, R = b.shape
    for r in prange(M):
        total = squares[r]
        for k in range(R):
            inner = np.float64(0)
            for j in range(R):
                inner += np.float64(gram[k, j]) * np.float64(b[r, j])
            total += np.float64(b[r, k]) * scale * (2 * np.float64(wa[k, r]) + scale * inner)
        n[r] = np.float32(np.sqrt(0.0 if total < 0 else total))  # NaN stays NaN; below 0 is rounding


@checked("g! m n (M)")
@kernel
def row_factors(g: Array, m: Array, n: Array) -> None:
    """Overwrite g (M,) with m / n, and with 1 where n is 0."""
    for r in prange(g.size):
        g[r] = np.float32(1) if n[r] == 0 else m[r] / n[r]


@kernel
def _dora_forward(y, z, t, g, addend, source):
    N, M = y.shape
    one = np.float32(1)
    for i in prange(N):
        for j in range(M):
            if source == 0:
                v = z[i, j]
            elif source == 1:
                v = y[i, j]
            else:
                v = y[i, j] - addend[i, j]
            y[i, j] += (g[j] - one) * v + g[j] * t[i, j]
            z[i, j] = v + t[i, j]


@checked("y! z! t addend? (N, M); g (M)")
def dora_forward(y: Array, z: Array, t: Array, g: Array, addend: Array | None = None, given: bool = False) -> None:
    """Turn y (N, M) from what it is without adapters into what it is with them, and write z; t (N, M), g (M,).

    v is z if it is `given` there, else y without the `addend` (N, M) that its product began with; z may then be t.
    """
    source = 0 if given else 1 if addend is None else 2
    _dora_forward(y, z, t, g, y if addend is None else addend, source)


@checked("dz! dy z (N, M); dm! g n (M)")
@kernel
def dora_backward(dz: Array, dm: Array, dy: Array, z: Array, g: Array, n: Array) -> None:
    """Overwrite dz (N, M) with g dy, and add to dm (M,); dz may be dy, or z."""
    N, M = dy.shape
    parts = partial_sums(N)
    partial = np.empty((parts, M), np.float64)
    for p in prange(parts):
        part = np.int64(p)
        for j in range(M):
            partial[part, j] = 0
        for i in range(N * part // parts, N * (part + 1) // parts):
            for j in range(M):
                d = dy[i, j]
                partial[part, j] += d * z[i, j]  # forward: y = ... + (m / n) z
                dz[i, j] = g[j] * d
    for p in range(parts):
        for j in range(M):
            partial[p, j] = partial[p, j] / np.float64(n[j]) if n[j] != 0 else 0.0
    add_partial_sums(dm, partial)
