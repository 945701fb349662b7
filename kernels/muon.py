"""Muon: the momentum of a matrix, made orthogonal, is its update; by matrix products alone.

    momentum    m <- mu m + (1 - mu) scale g          u = mu m + (1 - mu) scale g  with nesterov,  else u = m
    normalize   X_0 = u / max(|u|, eps)               |u| Frobenius norm: so no singular value is above 1
    iterate     X_k+1 = (a I + b A + c A²) X_k        A = X_k X_kᵀ; `steps` times, a b c = COEFFICIENTS
    update      w <- (1 - lr wd) w - lr ratio X       decay as in AdamW, without ratio

    w m g u X (R, C) float32   A (n, n), n = min(R, C): with R > C it is A = Xᵀ X, and X (a I + b A + c A²)
    w and m are changed in place; g is only read.

With u = U S Vᵀ an iteration turns each singular value s into a s + b s³ + c s⁵ and leaves U and V: five of them bring
all but the smallest to about 1 (0.7 ... 1.2), so X is near U Vᵀ, the orthogonal matrix nearest to u.  a I joins the
polynomial, so that an iteration is three products.  All is float32; each product has the same bits for every number of
threads (`matmul.py`), and so has |u| (`global_norm.py`).
ratio, `muon_ratio`, makes up for the shape: the root mean square of U Vᵀ is 1 / sqrt(max(R, C)).

Sources: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"; coefficients, eps and Nesterov's
form are those of torch.optim.Muon, which iterates in bfloat16.  Liu et al. 2025, "Muon is Scalable for LLM Training"
(arXiv:2502.16982), section 2.2: the ratio that matches AdamW's root mean square.
"""

import math

import numpy as np

from .engine.checks import Array, checked, unchecked
from .engine.jit import kernel, prange
from .engine.scratch import scratch
from .global_norm import global_norm
from .matmul import product

__all__ = ["muon_", "muon_flops", "muon_ratio", "muon_ref", "orthogonal_ref"]

COEFFICIENTS = 3.4445, -4.7750, 2.0315  # a b c: the steepest at 0 that still end near 1 (Jordan et al. 2024)
EPSILON = 1e-7


def muon_ratio(rows: int, columns: int, match_rms: bool) -> float:
    """Return the factor of the learning rate for a matrix (rows, columns).

    With match_rms 0.2 sqrt(max(rows, columns)): the update has the root mean square of AdamW's, about 0.2, whatever the
    shape, so both take one learning rate.  Without, sqrt(max(1, rows / columns)), as Jordan has it.
    """
    return 0.2 * math.sqrt(max(rows, columns)) if match_rms else math.sqrt(max(1.0, rows / columns))


def muon_flops(rows: int, columns: int, steps: int = 5) -> float:
    """Return the operations of the products of an update of a matrix; a multiply-add counts two."""
    n = min(rows, columns)
    return steps * (4.0 * n * rows * columns + 2.0 * n**3)


# -- reference: plain NumPy, any float dtype ---------------------------------------------------


def orthogonal_ref(u: Array, steps: int = 5) -> Array:
    """Return X (R, C) after so many iterations, from u (R, C)."""
    a, b, c = COEFFICIENTS
    x = u / max(np.linalg.norm(u), EPSILON)
    for _ in range(steps):
        gram = x @ x.T  # (R, R): the smaller one is cheaper, and gives the same X
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def muon_ref(
    w: Array,
    m: Array,
    g: Array,
    lr: float,
    ratio: float,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
    steps: int,
    scale: float,
) -> tuple[Array, Array]:
    """Return the new w and m (R, C)."""
    m = momentum * m + (1 - momentum) * scale * g
    u = momentum * m + (1 - momentum) * scale * g if nesterov else m
    return (1 - lr * weight_decay) * w - lr * ratio * orthogonal_ref(u, steps), m


# -- kernels: Numba, float32, outputs first ----------------------------------------------------


@kernel
def _muon_direction(u, m, g, momentum, nesterov, scale):
    """Write u (R, C), and bring m (R, C) up to date."""
    mu, fresh = np.float32(momentum), np.float32((1.0 - momentum) * scale)
    for i in prange(u.shape[0]):
        ui, mi, gi = u[i], m[i], g[i]
        for j in range(ui.size):
            new = fresh * gi[j]
            kept = mu * mi[j] + new
            mi[j] = kept
            ui[j] = mu * kept + new if nesterov else kept


@kernel
def _muon_polynomial(square, gram, a, b, c):
    """Turn square = gram gram (n, n) into a I + b gram + c square."""
    once, twice = np.float32(b), np.float32(c)
    for i in prange(square.shape[0]):
        si, gi = square[i], gram[i]
        for j in range(si.size):
            si[j] = once * gi[j] + twice * si[j]
        si[i] += np.float32(a)


@kernel
def _muon_step(w, x, keep, rate):
    """w (R, C) = keep w - rate x."""
    kept, step = np.float32(keep), np.float32(rate)
    for i in prange(w.shape[0]):
        wi, xi = w[i], x[i]
        for j in range(wi.size):
            wi[j] = kept * wi[j] - step * xi[j]


# -- calling it ----------------------------------------------------------------------------------


def _numbers_fit(sizes, steps, momentum, **others):
    if steps < 1:
        raise ValueError(f"steps ({steps}) must be at least 1; try 5")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum ({momentum}) must be at least 0 and below 1; try 0.95")


@checked("w! m! g (R, C)", _numbers_fit)
def muon_(
    w: Array,
    m: Array,
    g: Array,
    lr: float,
    ratio: float,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
    steps: int,
    scale: float,
) -> None:
    """Update the matrix w (R, C) and its momentum m in place from its gradient g."""
    rows, columns = w.shape
    n = min(rows, columns)
    x, other, gram, square = scratch("muon", (rows, columns), (rows, columns), (n, n), (n, n))
    multiply = unchecked(product)
    _muon_direction(x, m, g, float(momentum), bool(nesterov), float(scale))
    np.multiply(x, np.float32(1 / max(float(unchecked(global_norm)(x.ravel())), EPSILON)), out=x)
    for _ in range(steps):
        if rows <= columns:
            multiply(gram, x, x, transpose_b=True)  # X Xᵀ
        else:
            multiply(gram, x, x, transpose_a=True)  # Xᵀ X
        multiply(square, gram, gram)
        _muon_polynomial(square, gram, *COEFFICIENTS)
        if rows <= columns:
            multiply(other, square, x)
        else:
            multiply(other, x, square)
        x, other = other, x
    _muon_step(w, x, float(1.0 - lr * weight_decay), float(lr * ratio))
