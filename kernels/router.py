"""The router of a mixture of experts: which experts read a token, with what weight, and in what order rows lie.

    forward    p_ne = exp(l_ne - lse_n)            lse_n = log Σ_e exp(l_ne)            softmax over all E experts
               chosen_n = the K largest l_n, the largest first; of equal ones the expert of the lower number
               g_nj = p_n,chosen_j  /  Σ_i p_n,chosen_i     renormalised (Mixtral; Qwen3-MoE with norm_topk_prob)
               g_nj = p_n,chosen_j                          or not
    backward   renormalised    dl_n,chosen_j = g_nj (dg_nj - Σ_i g_ni dg_ni)                 softmax over the K chosen
               or not          dl_ne = p_ne ([e = chosen_j] dg_nj - Σ_i g_ni dg_ni)
               and, from penalties, for every expert      p_ne m_n (b_e - Σ_i p_ni b_i + z lse_n)

    l dl (N, E) logits   chosen slot (N, K)   g dg: weights, in the order of rows   lse (N,)   m (N,): what counts

Renormalising a softmax over all experts is a softmax over the chosen: the sum over all cancels.  Which experts are
chosen has no gradient.  torch.topk on a CPU chooses the same where no two logits are equal; of equal ones its choice is
not defined.

Dispatch.  Each token has K rows, S = N K in all.  A counting sort puts the rows of an expert one after the other, in
the order of the tokens: row s belongs to token[s], expert e has the rows offsets[e] ... offsets[e + 1] - 1, and
slot[n, j] is the row of token n for its j-th expert.  No expert has a capacity, and no token is dropped.

Penalties, means over the R = Σ_layers Σ_n m_n pairs of a layer and a token that counts:

    load balancing   E Σ_e f_e P_e        f_e = Σ m_n [e in chosen_n] / R     P_e = Σ m_n p_ne / R     b_e = E f_e / R
    z-loss           Σ m_n lse_n² / R                                                                   z = 2 / R

each times its coefficient.  f has no gradient.  `load` and `share` are what a layer adds to the two sums.

Sources: Shazeer et al. 2017, "Outrageously Large Neural Networks", section 2.1; Fedus et al. 2021, "Switch
Transformers", equations 4 to 6, over all layers together as transformers computes it (load_balancing_loss_func, 5.24);
Zoph et al. 2022, "ST-MoE", equation 5.
"""

import math

import numpy as np

from .engine.checks import Array, checked
from .engine.jit import helper, kernel, prange
from .engine.scratch import scratch
from .engine.shares import partial_sums
from .engine.vectors import dot, exp, total

__all__ = [
    "dispatch_ref",
    "load_balancing",
    "route_backward",
    "route_backward_ref",
    "route_forward",
    "route_forward_ref",
    "z_loss",
]

# -- reference: plain NumPy, any float dtype ---------------------------------------------------


def _softmax_ref(logits):
    high = logits.max(1, keepdims=True)
    lse = high + np.log(np.exp(logits - high).sum(1, keepdims=True))
    return np.exp(logits - lse), lse[:, 0]


def route_forward_ref(logits: Array, K: int, renormalised: bool) -> tuple[Array, Array, Array, Array]:
    """Return chosen (N, K), gates g (N, K) in the same order, p (N, E) and lse (N,)."""
    p, lse = _softmax_ref(logits)
    chosen = np.argsort(-logits, axis=1, kind="stable")[:, :K]
    gates = np.take_along_axis(p, chosen, 1)
    return chosen, gates / gates.sum(1, keepdims=True) if renormalised else gates, p, lse


def dispatch_ref(chosen: Array, E: int) -> tuple[Array, Array, Array]:
    """Return token (S,), slot (N, K) and offsets (E + 1,)."""
    N, K = chosen.shape
    order = np.argsort(chosen.ravel(), kind="stable")
    slot = np.empty(N * K, np.int64)
    slot[order] = np.arange(N * K)
    return order // K, slot.reshape(N, K), np.searchsorted(chosen.ravel()[order], np.arange(E + 1))


def route_backward_ref(
    dgates: Array,
    chosen: Array,
    gates: Array,
    p: Array,
    lse: Array,
    renormalised: bool,
    counted: Array | float = 1.0,
    balance: Array | float = 0.0,
    z: float = 0.0,
) -> Array:
    """Return dl (N, E) for dgates (N, K), what forward returned, and the penalties' m (N,), b (E,) and z."""
    dl, inner = np.zeros_like(p), (gates * dgates).sum(1, keepdims=True)
    np.put_along_axis(dl, chosen, gates * (dgates - inner if renormalised else dgates), 1)
    if not renormalised:
        dl -= p * inner
    counted = np.broadcast_to(counted, lse.shape)[:, None]
    return dl + counted * p * (balance - (p * balance).sum(1, keepdims=True) + z * lse[:, None])


# -- penalties: of sums that the kernels make, for a layer and for the reference -----------------


def load_balancing(load: Array, share: Array, pairs: float) -> tuple[float, Array]:
    """Return a layer's part of the load-balancing loss, of which all layers' parts are the whole, and b (E,).

    load (E,) is the sum of all layers, share (E,) that of the layer; pairs is R.
    """
    b = len(load) * load / pairs**2
    return float((b * share).sum()), b


def z_loss(squares: float, pairs: float) -> tuple[float, float]:
    """Return a layer's part of the router's z-loss, and z, of the layer's sum of squares."""
    return squares / pairs, 2 / pairs


# -- kernels: Numba, float32, outputs first ----------------------------------------------------


@helper
def _choose(chosen, values, logits):
    """Write the numbers of the K largest logits (E,) to chosen (K,), and these logits to values (K,)."""
    K, count = chosen.size, 0
    for e in range(logits.size):
        value = logits[e]
        if count == K and not value > values[K - 1]:
            continue
        place = min(count, K - 1)
        while place > 0 and value > values[place - 1]:  # an equal one stays before it
            chosen[place], values[place] = chosen[place - 1], values[place - 1]
            place -= 1
        chosen[place], values[place] = e, value
        count = min(count + 1, K)


@kernel
def _route(
    chosen, weights, lse, token, slot, offsets, load, share, squares, logits, counted, renormalised,
    places, p, loads, shares, parts, gates,
):
    N, E = logits.shape
    K = chosen.shape[1]
    sums = len(p)  # partial sums over rows
    for q in prange(sums):
        part = np.int64(q)
        row = p[part]
        parts[part] = 0.0
        for e in range(E):
            places[part, e], loads[part, e], shares[part, e] = 0, 0.0, 0.0
        for n in range(N * part // sums, N * (part + 1) // sums):
            _choose(chosen[n], gates[n], logits[n])
            high = gates[n, 0]
            for e in range(E):
                row[e] = exp(logits[n, e] - high)
            whole = total(row)
            lse[n] = high + np.float32(math.log(whole))
            some = np.float32(0)
            for j in range(K):
                gates[n, j] = exp(gates[n, j] - high) / whole
                some += gates[n, j]
                places[part, chosen[n, j]] += 1
            if renormalised:
                for j in range(K):
                    gates[n, j] /= some
            if counted.size == 0 or counted[n] != 0:
                for e in range(E):
                    shares[part, e] += row[e] / whole
                for j in range(K):
                    loads[part, chosen[n, j]] += 1.0
                parts[part] += np.float64(lse[n]) * lse[n]
    squares[0] = 0.0
    for part in range(sums):  # not `parts.sum()`: Numba would share it among threads
        squares[0] += parts[part]
    at = 0
    for e in range(E):  # how many rows there are becomes where they begin
        offsets[e], load[e], share[e] = at, 0.0, 0.0
        for part in range(sums):
            load[e] += loads[part, e]
            share[e] += shares[part, e]
            count = places[part, e]
            places[part, e] = at
            at += count
    offsets[E] = at
    for q in prange(sums):
        part = np.int64(q)
        for n in range(N * part // sums, N * (part + 1) // sums):
            for j in range(K):
                s = places[part, chosen[n, j]]
                places[part, chosen[n, j]] = s + 1
                token[s], slot[n, j], weights[s] = n, s, gates[n, j]


@kernel
def _route_backward(dlogits, dweights, logits, lse, chosen, slot, weights, counted, balance, z, renormalised):
    N, E = logits.shape
    K = chosen.shape[1]
    for n in prange(N):
        p = dlogits[n]
        for e in range(E):
            p[e] = exp(logits[n, e] - lse[n])
        counts = np.float32(1) if counted.size == 0 or counted[n] != 0 else np.float32(0)
        common = counts * (z * lse[n] - dot(p, balance))
        inner = np.float32(0)
        for j in range(K):
            inner += weights[slot[n, j]] * dweights[slot[n, j]]
        if not renormalised:
            common -= inner
        for e in range(E):
            p[e] *= counts * balance[e] + common
        for j in range(K):
            s = slot[n, j]
            p[chosen[n, j]] += weights[s] * (dweights[s] - (inner if renormalised else np.float32(0)))


# -- calling them ------------------------------------------------------------------------------

_EVERY = np.empty(0, np.uint8)


def _fits(sizes, **arrays):
    if sizes["K"] > sizes["E"]:
        raise ValueError(f"K ({sizes['K']}) experts cannot be chosen of E ({sizes['E']}); choose at most E")
    counted = arrays["counted"]
    if counted is not None and counted.shape != (sizes["N"],):
        raise ValueError(f"counted has shape {counted.shape}; it says of each of {sizes['N']} tokens if it counts")


def _forward_fits(sizes, **arrays):
    _fits(sizes, **arrays)
    if sizes["ends"] != sizes["E"] + 1:
        raise ValueError(f"offsets has {sizes['ends']} numbers; {sizes['E']} experts take one more than there are")


def _backward_fits(sizes, **arrays):
    _fits(sizes, **arrays)
    slot, rows = arrays["slot"], sizes["N"] * sizes["K"]
    if slot.size and not 0 <= slot.min() <= slot.max() < rows:
        raise ValueError(f"slot names rows {slot.min()} to {slot.max()}; there are 0 ... {rows - 1}")


@checked(
    "chosen! slot! (N, K) int32; weights! (N K); token! (N K) int32; lse! (N); offsets! (ends) int32; "
    "load! share! (E) float64; squares! (1) float64; logits (N, E); counted? (M) uint8",
    _forward_fits,
)
def route_forward(
    chosen: Array,
    weights: Array,
    lse: Array,
    token: Array,
    slot: Array,
    offsets: Array,
    load: Array,
    share: Array,
    squares: Array,
    logits: Array,
    counted: Array | None = None,
    renormalised: bool = True,
) -> None:
    """Overwrite everything but logits (N, E) and counted (N,), which says what the last three sum over; None: all.

    offsets (E + 1,).  load, share (E,) and squares (1,) are sums over tokens: of chosen experts, of p, of lse².
    NaN in a row makes its lse and its weights NaN.
    """
    (N, E), K = logits.shape, chosen.shape[1]
    parts = partial_sums(N)
    wide = (parts, 2 * E), (parts, 2 * E), (2 * parts,)  # float64
    places, p, gates, *sums = scratch("router", (parts, E), (parts, E), (N, K), *wide)
    outputs = chosen, weights, lse, token, slot, offsets, load, share, squares
    every = _EVERY if counted is None else counted
    between = places.view(np.int32), p, *(each.view(np.float64) for each in sums), gates
    _route(*outputs, logits, every, renormalised, *between)


@checked(
    "dlogits! (N, E); dweights weights (N K); logits (N, E); lse (N); chosen (N, K) int32 < E; "
    "slot (N, K) int32; balance (E); "
    "counted? (M) uint8",
    _backward_fits,
)
def route_backward(
    dlogits: Array,
    dweights: Array,
    logits: Array,
    lse: Array,
    chosen: Array,
    slot: Array,
    weights: Array,
    balance: Array,
    z: float = 0.0,
    counted: Array | None = None,
    renormalised: bool = True,
) -> None:
    """Overwrite dlogits (N, E) from dweights (S,), what forward saved, and the penalties' b (E,) and z."""
    every = _EVERY if counted is None else counted
    _route_backward(
        dlogits, dweights, logits, lse, chosen, slot, weights, every, balance, np.float32(z), renormalised
    )
