"""Experts: matrices of which each multiplies only the rows that the router gives to it (`router.py`).

    forward    u_s = x_token[s] Wᵀ         h_s = g_s silu(gate_s) up_s         out_n = x_n + Σ_{s of n} h_s W_downᵀ
               W = W_gate[e], W_up[e] side by side, e the expert of row s; u = gate, up
    backward   dh_s = dout_token[s] W_down            dg_s = dh_s · h_s / g_s           du_s from g_s dh_s (`swiglu.py`)
               dn_n = Σ_{s of n} du_s W               dW_gate_e = Σ_{s of e} dgate_sᵀ x_token[s]       dW_up_e likewise
               dW_down_e = Σ_{s of e} dout_token[s]ᵀ h_s

    x out (N, C)   u du (S, 2F)   h dh (S, F)   g dg (S,)   token (S,)   offsets (E + 1,)
    W_gate W_up (E, F, C)   W_down (E, C, F)

So there are three products, each of all experts in one call, on the panels and tiles of `matmul.py`:

    to_experts         y_s = x_token[s] op(W_e)                     rows of x are gathered while they are packed
    from_experts       out_n = a_n + Σ_{s of n} y_s op(W_e)         a tile is made apart and added to its tokens' rows
    expert_gradients   dW_e (+)= Σ_{s of e} left_sᵀ right_s         of which one is gathered; 0 without rows

The first two take one matrix for each expert or two side by side.  Rows are never copied as a whole, and no expert
has a fixed number of them: a tile at its edge is cut.  Each thread has an equal share of the work, whatever the loads
of experts are: of the S rows; of the tokens, whose rows are neighbours in each expert, because they are in the order of
tokens; of the rows of dW, weighed by the rows that are summed.  What an element is the sum of, and in what order
(experts, then depth), does not depend on how work is shared, so its bits are the same for any number of threads.

An expert with few rows multiplies each of them with W as it is in memory (`engine/streams.py`): so decoding one text
reads the weights of the chosen experts, once, and nothing else.  The bits are the same.

Longer than 400 lines because the three products, in reference and kernel, are read side by side.
"""

import numba
import numpy as np

from .engine.checks import Array, check_apart, checked
from .engine.jit import helper, kernel, prange
from .engine.number_formats import FLOAT32, AnyFormat
from .engine.panels import pack_a, pack_a_transposed, pack_b, pack_b_transposed, panel_depth
from .engine.routines import BLOCK_ROWS, COLUMNS, ROWS, SLAB_COLUMNS, SLICE_TERMS
from .engine.scratch import scratch
from .engine.shares import round_up
from .engine.streams import stream, streams
from .engine.threads import ONE_THREAD, thread_count
from .engine.tiles import begin, end, tile
from .matmul import THREADS, panels

__all__ = [
    "expert_gradients",
    "expert_gradients_ref",
    "from_experts",
    "from_experts_ref",
    "to_experts",
    "to_experts_ref",
]

ONE_BY_ONE = 3  # rows of an expert: each reads W anew, and packing W once costs about as much as four (docs/log.md)

SHARE = 4  # rows that are worth a thread of their own; with fewer, threads share columns

# -- reference: plain NumPy, any float dtype ---------------------------------------------------


def _rows(offsets):
    """Yield (expert, slice of its rows)."""
    return ((e, slice(offsets[e], offsets[e + 1])) for e in range(len(offsets) - 1))


def _matrix(ws, e, transposed):
    """Return op(W) of an expert: its matrices side by side in what they multiply to, or one above the other."""
    joined = np.concatenate([w[e] for w in ws])
    return joined.T if transposed else joined


def to_experts_ref(x: Array, token: Array, offsets: Array, *ws: Array, transposed: bool = True) -> Array:
    """Return y (S, .): x_token[s] op(W_e), op(W) = Wᵀ if transposed; several matrices are side by side."""
    return np.concatenate([x[token[rows]] @ _matrix(ws, e, transposed) for e, rows in _rows(offsets)])


def from_experts_ref(
    addend: Array, y: Array, token: Array, offsets: Array, *ws: Array, transposed: bool = True
) -> Array:
    """Return addend (N, .) + Σ_{s of n} y_s op(W_e)."""
    out = addend.copy()
    for e, rows in _rows(offsets):
        np.add.at(out, token[rows], y[rows] @ _matrix(ws, e, transposed))
    return out


def expert_gradients_ref(left: Array, right: Array, offsets: Array) -> Array:
    """Return dW (E, ., .) of rows that are gathered already: Σ_{s of e} left_sᵀ right_s."""
    return np.stack([left[rows].T @ right[rows] for _, rows in _rows(offsets)])


# -- kernels: the three products, float32, outputs first -----------------------------------------


@helper
def _pack_matrix(panels, at, w, k0, j0, k, width, transposed, table):
    if transposed:
        pack_b_transposed(panels, at, w, j0, k0, width, k, table)
    else:
        pack_b(panels, at, w, k0, j0, width, k, table)


@helper
def _gather(rows, x, token, s0, count, j0, width):
    """Copy columns of the rows of x that the rows s0 ... belong to."""
    for r in range(count):
        line, row = x[token[s0 + r], j0 : j0 + width], rows[r]  # indices from 0: only these become vectors
        for c in range(width):
            row[c] = line[c]


@kernel
def _to_experts(
    y, x, token, offsets, w, v, matrices, transposed, few, table, routines, packed_a, packed_b, gathered, down, across
):
    columns = w.shape[1] if transposed else w.shape[2]  # of y, for each of the matrices
    tile_rows, tile_columns, block_rows = table[ROWS], table[COLUMNS], table[BLOCK_ROWS]
    slab = table[SLAB_COLUMNS] // matrices // tile_columns * tile_columns
    terms, slice_terms = x.shape[1], table[SLICE_TERMS]
    for each in prange(down * across):
        part = np.int64(each)
        thread = numba.get_thread_id()
        a_panels, b_panels, rows = packed_a[thread], packed_b[thread], gathered[thread]
        begin(table)
        first, last = y.shape[0] * (part // across) // down, y.shape[0] * (part // across + 1) // down
        left = min(columns, round_up(columns * (part % across) // across, tile_columns))
        right = min(columns, round_up(columns * (part % across + 1) // across, tile_columns))
        for e in range(w.shape[0]):
            top, bottom = max(first, offsets[e]), min(last, offsets[e + 1])
            if top >= bottom:
                continue
            if offsets[e + 1] - offsets[e] <= few:
                for p in range(matrices):
                    matrix = w[e] if p == 0 else v[e]
                    for s in range(top, bottom):
                        a, c = x[token[s] : token[s] + 1], y[s : s + 1, p * columns : (p + 1) * columns]
                        if left < right:
                            stream(c, c, 0, left, 1, right - left, a, matrix, left, False, routines)
                continue
            for j0 in range(left, right, slab):
                width = min(slab, right - j0)
                for k0 in range(0, terms, slice_terms):
                    k = min(slice_terms, terms - k0)
                    steps, more = panel_depth(k, table), k0 > 0
                    size = round_up(width, tile_columns) * steps
                    for p in range(matrices):
                        matrix = w[e] if p == 0 else v[e]
                        _pack_matrix(b_panels, p * size, matrix, k0, j0, k, width, transposed, table)
                    for i0 in range(top, bottom, block_rows):
                        height = min(block_rows, bottom - i0)
                        for i in range(0, height, tile_rows):
                            m = min(tile_rows, height - i)
                            _gather(rows, x, token, i0 + i, m, k0, k)
                            pack_a(a_panels, i * steps, rows, 0, 0, m, k, table)
                        for p in range(matrices):
                            at = p * columns + j0
                            for j in range(0, width, tile_columns):
                                n = min(tile_columns, width - j)
                                for i in range(0, height, tile_rows):
                                    m = min(tile_rows, height - i)
                                    place = i0 + i, at + j, m, n, a_panels, i * steps, b_panels, p * size + j * steps
                                    tile(y, y, *place, steps, more, table)
        end(table)


@helper
def _first_of(token, low, high, n):
    """Return the first of an expert's rows, low ... high - 1, that is of token n or a later one."""
    while low < high:
        middle = (low + high) // 2
        if token[middle] < n:
            low = middle + 1
        else:
            high = middle
    return low


@kernel
def _from_experts(
    out, base, y, token, offsets, w, v, matrices, transposed, few, add, table, routines,
    packed_a, packed_b, sums, down, across
):
    N, columns = out.shape
    tile_rows, tile_columns, block_rows = table[ROWS], table[COLUMNS], table[BLOCK_ROWS]
    slab = table[SLAB_COLUMNS] // matrices // tile_columns * tile_columns
    terms, slice_terms = w.shape[2] if transposed else w.shape[1], table[SLICE_TERMS] // matrices
    for each in prange(down * across):
        part = np.int64(each)
        thread = numba.get_thread_id()
        a_panels, b_panels, some = packed_a[thread], packed_b[thread], sums[thread]
        first, last = N * (part // across) // down, N * (part // across + 1) // down
        left = min(columns, round_up(columns * (part % across) // across, tile_columns))
        right = min(columns, round_up(columns * (part % across + 1) // across, tile_columns))
        for n in range(first, last):
            line, before = out[n, left:right], base[n, left:right]
            for j in range(right - left):
                line[j] = before[j] if add else np.float32(0)
        begin(table)
        for e in range(w.shape[0]):
            top = _first_of(token, offsets[e], offsets[e + 1], first)
            bottom = _first_of(token, offsets[e], offsets[e + 1], last)
            if top >= bottom:
                continue
            if offsets[e + 1] - offsets[e] <= few:
                for s in range(top, bottom):
                    c = out[token[s] : token[s] + 1]
                    if left < right:
                        stream(c, c, 0, left, 1, right - left, y[s : s + 1], w[e], left, True, routines)
                continue
            for j0 in range(left, right, slab):
                width = min(slab, right - j0)
                for k0 in range(0, terms, slice_terms):
                    k = min(slice_terms, terms - k0)
                    steps = panel_depth(k, table)
                    size = round_up(width, tile_columns) * steps
                    for p in range(matrices):
                        matrix = w[e] if p == 0 else v[e]
                        _pack_matrix(b_panels, p * size, matrix, k0, j0, k, width, transposed, table)
                    for i0 in range(top, bottom, block_rows):
                        height = min(block_rows, bottom - i0)
                        block = round_up(height, tile_rows) * steps
                        for p in range(matrices):
                            pack_a(a_panels, p * block, y, i0, p * terms + k0, height, k, table)
                        for j in range(0, width, tile_columns):
                            n = min(tile_columns, width - j)
                            for i in range(0, height, tile_rows):
                                m = min(tile_rows, height - i)
                                for p in range(matrices):
                                    more = p > 0
                                    place = 0, 0, m, n, a_panels, p * block + i * steps, b_panels, p * size + j * steps
                                    tile(some, some, *place, steps, more, table)
                                for r in range(m):
                                    line, more_of_it = out[token[i0 + i + r], j0 + j : j0 + j + n], some[r]
                                    for c in range(n):
                                        line[c] += more_of_it[c]
        end(table)


@helper
def _piece(block_rows, tile_columns):
    """Return how many columns of rows are gathered at a time: they stay in cache."""
    return max(1, block_rows // tile_columns) * tile_columns


@helper
def _cut(size, share, whole, tile_rows):
    """Return where the share (of `whole`) of `size` rows ends, at the edge of a tile."""
    share = max(0, min(share, whole))
    return min(size, (size + tile_rows - 1) // tile_rows * share // whole * tile_rows)


@kernel
def _expert_gradients(
    dw, dv, left, right, token, offsets, matrices, gather_left, add, table, packed_a, packed_b, gathered, parts
):
    E, M, K = dw.shape
    slice_terms, slab_columns, block_rows = table[SLICE_TERMS], table[SLAB_COLUMNS], table[BLOCK_ROWS]
    tile_rows, tile_columns = table[ROWS], table[COLUMNS]
    piece = _piece(block_rows, tile_columns)
    for each in prange(parts):
        part = np.int64(each)
        thread = numba.get_thread_id()
        a_panels, b_panels, some = packed_a[thread], packed_b[thread], gathered[thread]
        first, last = token.size * part // parts, token.size * (part + 1) // parts
        if not add:
            for e in range(E * part // parts, E * (part + 1) // parts):
                if offsets[e] == offsets[e + 1]:  # a sum of nothing
                    dw[e] = 0
                    if matrices == 2:
                        dv[e] = 0
        begin(table)
        for e in range(E):
            whole = offsets[e + 1] - offsets[e]
            if whole == 0:
                continue
            top = _cut(M, first - offsets[e], whole, tile_rows)
            bottom = _cut(M, last - offsets[e], whole, tile_rows)
            if top >= bottom:
                continue
            for j0 in range(0, K, slab_columns):
                width = min(slab_columns, K - j0)
                for k0 in range(0, whole, slice_terms):
                    k, s0 = min(slice_terms, whole - k0), offsets[e] + k0
                    steps, more = panel_depth(k, table), add or k0 > 0
                    if gather_left:
                        pack_b(b_panels, 0, right, s0, j0, width, k, table)
                    else:
                        for j in range(0, width, piece):
                            _gather(some, right, token, s0, k, j0 + j, min(piece, width - j))
                            pack_b(b_panels, j * steps, some, 0, 0, min(piece, width - j), k, table)
                    for p in range(matrices):
                        c = dw[e] if p == 0 else dv[e]
                        for i0 in range(top, bottom, block_rows):
                            height = min(block_rows, bottom - i0)
                            if gather_left:
                                _gather(some, left, token, s0, k, p * M + i0, height)
                                pack_a_transposed(a_panels, 0, some, 0, 0, height, k, table)
                            else:
                                pack_a_transposed(a_panels, 0, left, s0, p * M + i0, height, k, table)
                            for j in range(0, width, tile_columns):
                                n = min(tile_columns, width - j)
                                for i in range(0, height, tile_rows):
                                    m = min(tile_rows, height - i)
                                    place = i0 + i, j0 + j, m, n, a_panels, i * steps, b_panels, j * steps
                                    tile(c, c, *place, steps, more, table)
        end(table)


# -- calling them ------------------------------------------------------------------------------


def _grid(rows, columns, operations, number_format):
    """Return by how many parts down and across work is shared: one for each thread."""
    threads = 1 if operations < ONE_THREAD else thread_count()
    down = max(1, min(threads, rows // SHARE))
    return down, max(1, min(threads // down, columns // number_format.columns))


def _matrices(w, v):
    return (w, w, 1) if v is None else (w, v, 2)


def _few(transposed, number_format, matrices=1):
    """Return up to how many rows of an expert are multiplied with its matrix as it is; `matrices` in one sum."""
    return ONE_BY_ONE if transposed and number_format is FLOAT32 and matrices == 1 else 0


def _check(sizes, offsets, w, v, inner, outer):
    """Hold what a signature cannot say against the sizes: E + 1 offsets, and what one or two matrices multiply."""
    if len(offsets) != sizes["E"] + 1 or offsets[0] != 0 or offsets[-1] != sizes["S"] or (np.diff(offsets) < 0).any():
        raise ValueError(f"offsets must be {sizes['E']} + 1 rising numbers from 0 to {sizes['S']}, the number of rows")
    if v is not None and v.dtype != w.dtype:
        raise TypeError(f"v is {v.dtype} and w {w.dtype}; both matrices of an expert are kept in one type")
    for name, given, wanted in (inner, outer):
        if given != wanted:
            raise ValueError(f"{name} has rows of {given} numbers; {1 if v is None else 2} matrices take {wanted}")


def _to_fits(sizes, y, x, offsets, w, v, transposed, **_):
    inner, outer = ("x", x.shape[1], w.shape[1 + transposed]), ("y", y.shape[1], w.shape[2 - transposed])
    _check(sizes, offsets, w, v, inner, (*outer[:2], outer[2] * _matrices(w, v)[2]))
    check_apart("y", y, None, x=x)


def _from_fits(sizes, out, y, token, offsets, w, v, transposed, addend, **_):
    inner, outer = ("y", y.shape[1], w.shape[1 + transposed]), ("out", out.shape[1], w.shape[2 - transposed])
    _check(sizes, offsets, w, v, (*inner[:2], inner[2] * _matrices(w, v)[2]), outer)
    falls = np.setdiff1d(np.flatnonzero(np.diff(token) < 0) + 1, offsets)
    if falls.size:
        s = falls[0]
        raise ValueError(f"token[{s}] is {token[s]}, after {token[s - 1]}; an expert takes its rows in order of tokens")
    check_apart("out", out, addend, y=y)


def _gradients_fit(sizes, dw, left, right, token, offsets, dv, gather_left, **_):
    sizes = {**sizes, "S": len(token)}
    outer = "left", left.shape[1], dw.shape[1] * _matrices(dw, dv)[2]
    _check(sizes, offsets, dw, dv, ("right", right.shape[1], dw.shape[2]), outer)
    whole, name = (right, "right") if gather_left else (left, "left")
    if len(whole) != len(token):
        raise ValueError(f"{name} has {len(whole)} rows, token {len(token)}; it must have a row for each")
    others = len(left if gather_left else right)
    outside = token[(token < 0) | (token >= others)]
    if outside.size:
        raise ValueError(f"token names row {outside[0]}; there are 0 ... {others - 1}")


@checked(
    "y! (S, columns); x (N, C); token (S) int32 < N; offsets (ends) int32; w v? (E, out, in) float32|uint16",
    _to_fits,
    number_format=AnyFormat,
)
def to_experts(
    y: Array,
    x: Array,
    token: Array,
    offsets: Array,
    w: Array,
    v: Array | None = None,
    transposed: bool = True,
    number_format: AnyFormat = FLOAT32,
) -> None:
    """Overwrite y (S, .) with x_token[s] W_eᵀ, or x_token[s] W_e if not `transposed`; of two matrices side by side."""
    w, v, matrices = _matrices(w, v)
    if not y.size:
        return
    kind = number_format.chosen
    memory = scratch("experts", *panels(kind), (THREADS, kind.rows, kind.slice_terms))  # rows that are gathered
    grid = _grid(len(y), y.shape[1] // matrices, y.size * x.shape[1], kind)
    options = matrices, transposed, _few(transposed, number_format), kind.table, streams()
    _to_experts(y, x, token, offsets, w, v, *options, *memory, *grid)


@checked(
    "out! addend? (N, C); y (S, columns); token (S) int32 < N; offsets (ends) int32; "
    "w v? (E, out, in) float32|uint16",
    _from_fits,
    number_format=AnyFormat,
)
def from_experts(
    out: Array,
    y: Array,
    token: Array,
    offsets: Array,
    w: Array,
    v: Array | None = None,
    transposed: bool = True,
    addend: Array | None = None,
    number_format: AnyFormat = FLOAT32,
) -> None:
    """Overwrite out (N, .) with the sum of y_s op(W_e) over each token's rows (+ addend, which may be out).

    The rows of an expert are in the order of their tokens.
    """
    w, v, matrices = _matrices(w, v)
    if not out.size:
        return
    kind = number_format.chosen
    memory = scratch("experts: sums", *panels(kind), (THREADS, kind.rows, kind.columns))  # a tile
    grid = _grid(len(out), out.shape[1], y.size * out.shape[1], kind)
    few = _few(transposed, number_format, matrices)
    options = matrices, transposed, few, addend is not None, kind.table, streams()
    _from_experts(out, out if addend is None else addend, y, token, offsets, w, v, *options, *memory, *grid)


@checked(
    "dw! dv?! (E, out, in); left (A, B); right (D, F); token (S) int32; offsets (ends) int32",
    _gradients_fit,
    number_format=AnyFormat,
)
def expert_gradients(
    dw: Array,
    left: Array,
    right: Array,
    token: Array,
    offsets: Array,
    dv: Array | None = None,
    gather_left: bool = False,
    accumulate: bool = True,
    number_format: AnyFormat = FLOAT32,
) -> None:
    """Add Σ_{s of e} left_sᵀ right_s to dw (E, ., .), or overwrite it; with dv, the halves of left_s are for one each.

    right (N, .) is gathered by token (S,), and left (S, .) is in the order of rows, or the other way round.
    """
    w, v, matrices = _matrices(dw, dv)
    kind = number_format.chosen
    widest = max(kind.block_rows, _piece(kind.block_rows, kind.columns))
    memory = scratch("experts: gradients", *panels(kind), (THREADS, kind.slice_terms, widest))
    down, _ = _grid(len(token), 0, len(token) * dw.shape[1] * dw.shape[2], kind)
    options = matrices, gather_left, accumulate, kind.table
    _expert_gradients(w, v, left, right, token, offsets, *options, *memory, down)  # type: ignore[call-arg]
