"""The gradient checks, for the user's own machine: no PyTorch, no stored figures.

    kernels    speed        the float32 kernel against its float64 reference            forward 1e-5, backward 1e-4
               derivation   the reference's gradient against central differences        1e-7
    model      loss         the float32 model against the whole model in float64 (`model/reference.py`)  1e-5
               speed        each tensor's gradient against that of the float64 model                     1e-4
               derivation   that of the float64 model against central differences of its loss            1e-7

Errors are those of `gradcheck.py`: a difference of arrays is measured against the largest element of the right one,
that of a gradient from central differences against the gradient's length.
Longer than 400 lines because every operation has a function here, one like the other.
`checks()` yields one `Check` after the other; `abi-train verify` prints them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .config import TrainableModelConfig
from .gradcheck import TOLERANCE as DERIVATION
from .gradcheck import gradient_error, relative_error
from .kernels import (
    adamw_8bit,
    attention,
    bias,
    cross_entropy,
    dropout,
    embedding,
    experts,
    gelu,
    global_norm,
    layer_norm,
    matmul,
    muon,
    optimizers,
    rms_norm,
    rope,
    router,
    swiglu,
)
from .model import reference
from .model.reference_experts import closest_choice
from .model.transformer import TrainableModel
from .shape import LayerType, ModelFamily

__all__ = ["Check", "checks"]

FORWARD, BACKWARD = 1e-5, 1e-4  # tolerances, with DERIVATION
SEED = 20240229
CLOSEST = 1e-3  # logits of routers: no step of a difference changes what a token chose
# What a model of the families that have these is checked with; some rows are longer than the window.
CHOICES: dict[str, Any] = {
    "sliding_window": 4,
    "layer_types": (LayerType.SLIDING, LayerType.FULL),
    "query_pre_attn_scalar": 3,  # small: with flat scores the heads' norms have next to no gradient
    "rope_local_theta": 50.0,
    "router_aux_loss_coef": 0.1,
    "router_z_loss_coef": 0.01,
}


@dataclass(frozen=True)
class Check:
    """One comparison: what of which kernel or tensor, how far off, and how far it may be."""

    group: str  # "kernels", or the family and "model"
    name: str
    what: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """NaN and infinity fail."""
        return self.error <= self.tolerance


def checks(seed: int = SEED) -> Iterator[Check]:
    """Run all checks, one after the other."""
    rng = np.random.default_rng(seed)
    for make in (
        _matmul,
        _bias,
        _embedding,
        _rms_norm,
        _layer_norm,
        _rope,
        _attention,
        _swiglu,
        _gelu,
        _router,
        _experts,
        _cross_entropy,
        _dropout,
        _optimizers,
        _adamw_8bit,
        _muon,
        _norm,
    ):
        yield from make(rng)
    for family in ModelFamily:
        yield from _model(rng, family)


def _single(*arrays: Any) -> list[Any]:
    return [np.ascontiguousarray(array, np.float32) for array in arrays]


def _wide(*arrays: Any) -> list[Any]:
    return [np.asarray(array, np.float64) for array in arrays]


def _speed(name: str, what: str, actual: Any, expected: Any) -> Check:
    return Check("kernels", name, f"{what}: kernel = reference", relative_error(actual, expected), _tolerance(what))


def _tolerance(what: str) -> float:
    return FORWARD if what in ("forward", "loss", "update") else BACKWARD


def _derivation(name: str, what: str, f: Callable[[Any], float], x: Any, dx: Any, rng: np.random.Generator) -> Check:
    return Check("kernels", name, f"{what}: reference = differences", gradient_error(f, x, dx, rng), DERIVATION)


# -- kernels, in the order of the forward pass ---------------------------------------------------


def _embedding(rng: np.random.Generator) -> Iterator[Check]:
    w, dx = _single(rng.standard_normal((19, 37)), rng.standard_normal((23, 37)))
    ids = rng.integers(0, 19, 23).astype(np.int32)
    x, dw = np.empty_like(dx), np.zeros_like(w)
    embedding.embedding_forward(x, ids, w)
    embedding.embedding_backward(dw, dx, ids)
    wide, d = _wide(w, dx)
    dw_ref = embedding.embedding_backward_ref(d, ids, 19)
    yield _speed("embedding", "forward", x, embedding.embedding_forward_ref(ids, w))
    yield _speed("embedding", "dw", dw, dw_ref)
    f = lambda w: float((embedding.embedding_forward_ref(ids, w) * d).sum())  # noqa: E731
    yield _derivation("embedding", "dw", f, wide, dw_ref, rng)


def _rms_norm(rng: np.random.Generator) -> Iterator[Check]:
    for heads in (1, 3):
        name, C = "rms_norm" if heads == 1 else "rms_norm of heads", 67
        x, dy, w = _single(*rng.standard_normal((2, 29, heads * C)), 1 + 0.3 * rng.standard_normal(C))
        y, r, dx, dw = np.empty_like(x), np.empty(29 * heads, np.float32), np.empty_like(x), np.zeros_like(w)
        rms_norm.rms_norm_forward(y, r, x, w, 1e-5)
        rms_norm.rms_norm_backward(dx, dw, dy, x, w, r, False)
        x, dy, w = _wide(x.reshape(-1, C), dy.reshape(-1, C), w)
        y_ref, r_ref = rms_norm.rms_norm_forward_ref(x, w, 1e-5)
        dx_ref, dw_ref = rms_norm.rms_norm_backward_ref(dy, x, w, r_ref)
        yield _speed(name, "forward", y.reshape(-1, C), y_ref)
        yield _speed(name, "dx", dx.reshape(-1, C), dx_ref)
        yield _speed(name, "dw", dw, dw_ref)
        loss = lambda x, w: float((rms_norm.rms_norm_forward_ref(x, w, 1e-5)[0] * dy).sum())  # noqa: B023, E731
        yield _derivation(name, "dx", lambda v: loss(v, w), x, dx_ref, rng)  # noqa: B023
        yield _derivation(name, "dw", lambda v: loss(x, v), w, dw_ref, rng)  # noqa: B023


def _layer_norm(rng: np.random.Generator) -> Iterator[Check]:
    x, dy, w, b = _single(*(1 + 0.3 * rng.standard_normal(shape) for shape in ((29, 67), (29, 67), 67, 67)))
    y, r, dx, dw, db = np.empty_like(x), np.empty(29, np.float32), np.empty_like(x), np.zeros_like(w), np.zeros_like(b)
    layer_norm.layer_norm_forward(y, r, x, w, b, 1e-5)
    layer_norm.layer_norm_backward(dx, dw, db, dy, x, w, r, False)
    x, dy, w, b = _wide(x, dy, w, b)
    y_ref, r_ref = layer_norm.layer_norm_forward_ref(x, w, b, 1e-5)
    expected = layer_norm.layer_norm_backward_ref(dy, x, w, r_ref)
    yield _speed("layer_norm", "forward", y, y_ref)
    loss = lambda x, w, b: float((layer_norm.layer_norm_forward_ref(x, w, b, 1e-5)[0] * dy).sum())  # noqa: E731
    moved = (lambda v: loss(v, w, b), lambda v: loss(x, v, b), lambda v: loss(x, w, v))
    for i, what in enumerate(("dx", "dw", "db")):
        yield _speed("layer_norm", what, (dx, dw, db)[i], expected[i])
        yield _derivation("layer_norm", what, moved[i], (x, w, b)[i], expected[i], rng)


def _matmul(rng: np.random.Generator) -> Iterator[Check]:
    x, w, dy = _single(*(rng.standard_normal(shape) for shape in ((53, 61), (71, 61), (53, 71))))
    y = matmul.matmul(x, w, transpose_b=True)
    dx, dw = matmul.matmul(dy, w), matmul.matmul(dy, x, transpose_a=True)
    x, w, dy = _wide(x, w, dy)
    dx_ref, dw_ref = matmul.product_ref(dy, w), matmul.product_ref(dy, x, transpose_a=True)
    yield _speed("matmul", "forward", y, matmul.product_ref(x, w, transpose_b=True))
    yield _speed("matmul", "dx", dx, dx_ref)
    yield _speed("matmul", "dw", dw, dw_ref)
    loss = lambda x, w: float((matmul.product_ref(x, w, transpose_b=True) * dy).sum())  # noqa: E731
    yield _derivation("matmul", "dx", lambda v: loss(v, w), x, dx_ref, rng)
    yield _derivation("matmul", "dw", lambda v: loss(x, v), w, dw_ref, rng)


def _bias(rng: np.random.Generator) -> Iterator[Check]:
    y, dy, b = _single(*(rng.standard_normal(shape) for shape in ((37, 23), (37, 23), 23)))
    out, db = y.copy(), np.zeros_like(b)
    bias.bias_forward(out, b)
    bias.bias_backward(db, dy)
    y, dy, b = _wide(y, dy, b)
    db_ref = bias.bias_backward_ref(dy)
    yield _speed("bias", "forward", out, bias.bias_forward_ref(y, b))
    yield _speed("bias", "db", db, db_ref)
    yield _derivation("bias", "db", lambda v: float((bias.bias_forward_ref(y, v) * dy).sum()), b, db_ref, rng)


def _rope(rng: np.random.Generator) -> Iterator[Check]:
    x, dy = _single(rng.standard_normal((22, 30)), rng.standard_normal((22, 30)))
    cos, sin = rope.rope_table(11, 10, 10000.0)
    positions = np.tile(np.arange(11, dtype=np.int32), 2)
    y, dx = x.copy(), dy.copy()
    rope.rope_forward(y, cos, sin, positions, 2)
    rope.rope_backward(dx, cos, sin, positions, 2)
    x, dy, c, s = _wide(x, dy, cos, sin)
    dx_ref = rope.rope_backward_ref(dy, c, s, positions, 2)
    yield _speed("rope", "forward", y, rope.rope_forward_ref(x, c, s, positions, 2))
    yield _speed("rope", "dx", dx, dx_ref)
    f = lambda x: float((rope.rope_forward_ref(x, c, s, positions, 2) * dy).sum())  # noqa: E731
    yield _derivation("rope", "dx", f, x, dx_ref, rng)


def _attention(rng: np.random.Generator) -> Iterator[Check]:
    yield from _attention_of(rng, "attention", None, None)
    yield from _attention_of(rng, "attention, window and scale", 9, 0.2)


def _attention_of(rng: np.random.Generator, name: str, window: int | None, scale: float | None) -> Iterator[Check]:
    batch, length, heads, kv_heads, width = 2, 37, 4, 2, 10
    rows, sizes = batch * length, (heads * width, kv_heads * width)
    joined = _single(rng.standard_normal((rows, sizes[0] + 2 * sizes[1])))[0]  # q, k, v side by side, as in the model
    q, k, v = np.split(joined, (sizes[0], sum(sizes)), axis=1)
    (do,) = _single(rng.standard_normal((rows, sizes[0])))
    starts = np.tile(np.where(np.arange(length) < 20, 0, 20).astype(np.int32), batch)  # two segments in a row
    starts = attention.starts_within(starts, length, window)
    sizes_and_scale = batch, heads, kv_heads, scale
    o, lse = np.empty_like(do), np.empty((heads, rows), np.float32)
    d_joined = np.empty_like(joined)
    dq, dk, dv = gradients = np.split(d_joined, (sizes[0], sum(sizes)), axis=1)
    attention.attention_forward(o, lse, q, k, v, starts, *sizes_and_scale)
    attention.attention_backward(dq, dk, dv, do, q, k, v, o, lse, starts, *sizes_and_scale)
    inputs, do = _wide(q, k, v), do.astype(np.float64)

    def reference(q: Any, k: Any, v: Any) -> Any:
        return attention.attention_forward_ref(q, k, v, starts, *sizes_and_scale)[0]

    q, k, v = inputs
    expected = attention.attention_backward_ref(do, q, k, v, starts, *sizes_and_scale)
    yield _speed(name, "forward", o, reference(q, k, v))
    for index, what in enumerate(("dq", "dk", "dv")):
        yield _speed(name, what, gradients[index], expected[index])
    for index, what in enumerate(("dq", "dk", "dv")):

        def loss(value: Any, index: int = index) -> float:
            changed = [*inputs[:index], value, *inputs[index + 1 :]]
            return float((reference(*changed) * do).sum())

        yield _derivation(name, what, loss, inputs[index], expected[index], rng)


def _swiglu(rng: np.random.Generator) -> Iterator[Check]:
    gate_up, dh = _single(2 * rng.standard_normal((23, 62)), rng.standard_normal((23, 31)))
    h, d = np.empty_like(dh), np.empty_like(gate_up)
    swiglu.swiglu_forward(h, gate_up)
    again = dh.copy()
    swiglu.swiglu_backward(d, again, gate_up)  # turns it into h
    gate_up, dh = _wide(gate_up, dh)
    d_ref = swiglu.swiglu_backward_ref(dh, gate_up)
    yield _speed("swiglu", "forward", h, swiglu.swiglu_forward_ref(gate_up))
    yield _speed("swiglu", "dgate_up", d, d_ref)
    yield _speed("swiglu", "h again", again, swiglu.swiglu_forward_ref(gate_up))
    f = lambda x: float((swiglu.swiglu_forward_ref(x) * dh).sum())  # noqa: E731
    yield _derivation("swiglu", "dgate_up", f, gate_up, d_ref, rng)


def _gelu(rng: np.random.Generator) -> Iterator[Check]:
    for exact in (False, True):
        name, options = "gelu exact" if exact else "gelu tanh", (exact, True)
        gate_up, dh = _single(2 * rng.standard_normal((23, 62)), rng.standard_normal((23, 31)))
        h, d = np.empty_like(dh), np.empty_like(gate_up)
        gelu.gelu_forward(h, gate_up, exact)
        again = dh.copy()
        gelu.gelu_backward(d, again, gate_up, exact)  # turns it into h
        gate_up, dh = _wide(gate_up, dh)
        h_ref, d_ref = gelu.gelu_forward_ref(gate_up, *options), gelu.gelu_backward_ref(dh, gate_up, *options)
        yield _speed(name, "forward", h, h_ref)
        yield _speed(name, "du", d, d_ref)
        yield _speed(name, "h again", again, h_ref)
        f = lambda u: float((gelu.gelu_forward_ref(u, *options) * dh).sum())  # noqa: B023, E731
        yield _derivation(name, "du", f, gate_up, d_ref, rng)


def _router(rng: np.random.Generator) -> Iterator[Check]:
    N, K, E = 23, 2, 7
    logits, dgates, balance = _single(*(rng.standard_normal(shape) for shape in ((N, E), (N, K), E)))
    chosen, slot, token = np.empty((N, K), np.int32), np.empty((N, K), np.int32), np.empty(N * K, np.int32)
    weights, lse, sums = np.empty(N * K, np.float32), np.empty(N, np.float32), (np.empty(E), np.empty(E), np.empty(1))
    offsets, dweights, dlogits = np.empty(E + 1, np.int32), np.empty(N * K, np.float32), np.empty_like(logits)
    for renormalised in (True, False):
        name = f"router{'' if renormalised else ', plain'}"
        router.route_forward(chosen, weights, lse, token, slot, offsets, *sums, logits, None, renormalised)
        dweights[slot] = dgates
        saved = logits, lse, chosen, slot, weights
        router.route_backward(dlogits, dweights, *saved, balance, 0.3, None, renormalised)
        wide, d, b = _wide(logits, dgates, balance)
        choice, gates, p, sums_ref = router.route_forward_ref(wide, K, renormalised)
        expected = router.route_backward_ref(d, choice, gates, p, sums_ref, renormalised, 1.0, b, 0.3)
        yield _speed(name, "forward", weights[slot], gates)
        yield _speed(name, "dlogits", dlogits, expected)

        def loss(x: Any, renormalised: bool = renormalised, d: Any = d, b: Any = b) -> float:
            _, gates, p, lse = router.route_forward_ref(x, K, renormalised)
            return float((gates * d).sum() + (p * b).sum() + 0.15 * (lse**2).sum())

        yield _derivation(name, "dlogits", loss, wide, expected, rng)


def _experts(rng: np.random.Generator) -> Iterator[Check]:
    N, K, E, C, F = 37, 2, 5, 29, 19
    x, dout = _single(rng.standard_normal((N, C)), rng.standard_normal((N, C)))
    gate, up, down = _single(*(rng.standard_normal(shape) for shape in ((E, F, C), (E, F, C), (E, C, F))))
    (weights,) = _single(rng.random(N * K))
    chosen = np.stack([rng.permutation(E - 1)[:K] for _ in range(N)])  # the last expert has no token
    token, _, offsets = (each.astype(np.int32) for each in router.dispatch_ref(chosen, E))
    gate_up, h, out = np.empty((N * K, 2 * F), np.float32), np.empty((N * K, F), np.float32), np.empty_like(x)
    experts.to_experts(gate_up, x, token, offsets, gate, up)
    swiglu.weighted_swiglu_forward(h, gate_up, weights)
    experts.from_experts(out, h, token, offsets, down, addend=x)
    dh, dgate_up, dweights = np.empty_like(h), np.empty_like(gate_up), np.empty_like(weights)
    dx, (dgate, dup, ddown) = np.empty_like(x), (np.empty_like(w) for w in (gate, up, down))
    experts.to_experts(dh, dout, token, offsets, down, transposed=False)
    swiglu.weighted_swiglu_backward(dgate_up, dweights, dh, gate_up, weights)  # leaves h in dh
    experts.expert_gradients(ddown, dout, dh, token, offsets, gather_left=True, accumulate=False)
    experts.expert_gradients(dgate, dgate_up, x, token, offsets, dup, accumulate=False)
    experts.from_experts(dx, dgate_up, token, offsets, gate, up, transposed=False, addend=dout)
    wide = dict(zip(("x", "weights", "gate", "up", "down"), _wide(x, weights, gate, up, down), strict=True))

    def forward(x: Any, weights: Any, gate: Any, up: Any, down: Any) -> tuple[Any, Any, Any]:
        gate_up = experts.to_experts_ref(x, token, offsets, gate, up)
        h = swiglu.weighted_swiglu_forward_ref(gate_up, weights)
        return experts.from_experts_ref(x, h, token, offsets, down), gate_up, h

    out_ref, gate_up_ref, h_ref = forward(**wide)
    (dout,) = _wide(dout)
    dh_ref = experts.to_experts_ref(dout, token, offsets, wide["down"], transposed=False)
    dgate_up_ref, dweights_ref = swiglu.weighted_swiglu_backward_ref(dh_ref, gate_up_ref, wide["weights"])
    both = wide["gate"], wide["up"]
    expected = {
        "x": experts.from_experts_ref(dout, dgate_up_ref, token, offsets, *both, transposed=False),
        "weights": dweights_ref,
        "gate": experts.expert_gradients_ref(dgate_up_ref[:, :F], wide["x"][token], offsets),
        "up": experts.expert_gradients_ref(dgate_up_ref[:, F:], wide["x"][token], offsets),
        "down": experts.expert_gradients_ref(dout[token], h_ref, offsets),
    }
    yield _speed("experts", "forward", out, out_ref)
    for (name, value), actual in zip(expected.items(), (dx, dweights, dgate, dup, ddown), strict=True):
        yield _speed("experts", f"d{name}", actual, value)

        def loss(changed: Any, name: str = name) -> float:
            return float((forward(**{**wide, name: changed})[0] * dout).sum())

        yield _derivation("experts", f"d{name}", loss, wide[name], value, rng)


def _cross_entropy(rng: np.random.Generator) -> Iterator[Check]:
    x, w = _single(rng.standard_normal((31, 24)), rng.standard_normal((53, 24)))
    labels = rng.integers(0, 53, 31).astype(np.int32)
    labels[::5] = -100
    losses, hits, dx, dw = np.empty(31, np.float32), np.empty(31, np.uint8), np.empty_like(x), np.empty_like(w)
    scratch = np.empty(cross_entropy.scratch_floats(31, 53, 24), np.float32)
    options: dict[str, Any] = {"smoothing": 0.1, "z_loss": 0.01}
    cross_entropy.head_loss_backward(losses, hits, dx, dw, x, w, labels, scratch, 1.0, accumulate=False, **options)
    x, w = _wide(x, w)
    losses_ref, _, _, dx_ref, dw_ref = cross_entropy.head_loss_ref(x, w, labels, 1.0, **options)
    yield _speed("cross_entropy", "loss", losses, losses_ref)
    yield _speed("cross_entropy", "dx", dx, dx_ref)
    yield _speed("cross_entropy", "dw", dw, dw_ref)

    def loss(x: np.ndarray, w: np.ndarray) -> float:
        losses, _, lse, *_ = cross_entropy.head_loss_ref(x, w, labels, 1.0, **options)
        return float(losses.sum() + options["z_loss"] * (lse**2).sum())

    yield _derivation("cross_entropy", "dx", lambda v: loss(v, w), x, dx_ref, rng)
    yield _derivation("cross_entropy", "dw", lambda v: loss(x, v), w, dw_ref, rng)


def _dropout(rng: np.random.Generator) -> Iterator[Check]:
    x, dy = _single(rng.standard_normal((23, 41)), rng.standard_normal((23, 41)))
    y, dx = np.empty_like(x), np.empty_like(x)
    dropout.dropout_forward(y, x, 0.3, 7)
    dropout.dropout_backward(dx, dy, 0.3, 7)
    x, dy = _wide(x, dy)
    dx_ref = dropout.dropout_backward_ref(dy, 0.3, 7)
    yield _speed("dropout", "forward", y, dropout.dropout_forward_ref(x, 0.3, 7))
    yield _speed("dropout", "dx", dx, dx_ref)
    f = lambda x: float((dropout.dropout_forward_ref(x, 0.3, 7) * dy).sum())  # noqa: E731
    yield _derivation("dropout", "dx", f, x, dx_ref, rng)


def _muon(rng: np.random.Generator) -> Iterator[Check]:
    for shape in ((24, 53), (53, 24)):
        w, m, g = _single(*rng.standard_normal((3, *shape)))
        settings = 0.02, muon.muon_ratio(*shape, True), 0.95, True, 0.1, 5, 0.5
        wide = _wide(w, m, g)
        expected = muon.muon_ref(wide[0], wide[1], wide[2], *settings)
        muon.muon_(w, m, g, *settings)
        yield _speed("muon", f"w {shape[0]}x{shape[1]}", w, expected[0])
        yield _speed("muon", f"m {shape[0]}x{shape[1]}", m, expected[1])


def _adamw_8bit(rng: np.random.Generator) -> Iterator[Check]:
    size, decays = 700, np.ones(700)  # three blocks, of which the last is not full
    w, m, g = _single(*rng.standard_normal((3, size)))
    m_codes, m_scales = adamw_8bit.encode_blocks_ref(m, True)
    v_codes, v_scales = adamw_8bit.encode_blocks_ref(np.square(m), False)
    chunks, decay = adamw_8bit.block_chunks([0], [size], [True])
    settings = 0.01, 0.9, 0.999, 1e-8, 0.1, 3, 0.5
    wide_w, wide_m, wide_v, wide_g = _wide(w, m_scales, v_scales, g)
    expected = adamw_8bit.adamw_8bit_ref(wide_w, m_codes, wide_m, v_codes, wide_v, wide_g, decays, *settings)
    adamw_8bit.adamw_8bit_(w, m_codes, m_scales, v_codes, v_scales, g, chunks, decay, *settings)
    found = w, m_codes, m_scales, v_codes, v_scales
    for name, actual, exact in zip(("w", "m_codes", "m_scales", "v_codes", "v_scales"), found, expected, strict=True):
        if actual.dtype == np.uint8:  # of a number in the middle of two codes either is right
            near = np.abs(actual.astype(int) - exact.astype(int)) <= 1
            actual = np.where(near, exact, actual)
        yield _speed("adamw_8bit", f"{name} {size}", actual, exact)


def _optimizers(rng: np.random.Generator) -> Iterator[Check]:
    start = _single(*(rng.standard_normal(101) for _ in range(3)))
    start.append(np.abs(start[1]))
    chunks, decay = optimizers.parameter_chunks([0, 60], [60, 41], [True, False])
    decays = np.repeat(decay, (60, 41)).astype(np.float64)
    adam = (0.01, 0.9, 0.999, 1e-8, 0.1, 3, 0.5)
    for name, settings in (("sgd", (0.01, 0.9, 0.1, True, 0.5)), ("adam", adam), ("adamw", adam)):
        w, m, g, v = (array.copy() for array in start)
        moments, wide = ((m,), _wide(w, m)) if name == "sgd" else ((m, v), _wide(w, m, v))
        getattr(optimizers, f"{name}_")(w, *moments, g, chunks, decay, *settings)
        expected = getattr(optimizers, f"{name}_ref")(*wide, *_wide(g), decays, *settings)
        yield _speed(name, "update", w, expected[0])


def _norm(rng: np.random.Generator) -> Iterator[Check]:
    (g,) = _single(rng.standard_normal(70001))
    yield _speed("global_norm", "forward", global_norm.global_norm(g), global_norm.global_norm_ref(*_wide(g)))


# -- the whole model -----------------------------------------------------------------------------


def _model(rng: np.random.Generator, family: ModelFamily) -> Iterator[Check]:
    config = TrainableModelConfig(
        hidden_dim=24,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        intermediate_dim=36,
        vocab_size=61,
        max_seq_len=13,
        tie_embeddings=False,
        seed=int(rng.integers(1 << 31)),
    ).replace(family=family)
    config = config.replace(**{name: value for name, value in CHOICES.items() if name in family.fields})
    model = TrainableModel(config)
    model.parameters.weights_flat *= np.float32(3)  # away from the initial, almost linear, state; not too curved
    for tensor in model.parameters.table:
        if tensor.initial == "zeros":
            model.weights[tensor.name] = 0.1 * rng.standard_normal(tensor.shape)
    weights = reference.widened(model.weights)
    ids = rng.integers(0, 61, (2, 13)).astype(np.int32)
    while closest_choice(reference.forward(model.layers, weights, ids)[1]) < CLOSEST:
        ids = rng.integers(0, 61, (2, 13)).astype(np.int32)
    labels = rng.integers(0, 61, (2, 13)).astype(np.int32)
    labels[1, :3] = -100
    out = model.compute_loss(ids, labels, backward=True)
    loss = out.loss + sum(out.penalties.values())
    expected, gradients = reference.loss_and_gradients(model.layers, weights, ids, labels)
    group = f"{family.value} model"
    yield Check(group, "loss", "model = reference", abs(loss - expected) / abs(expected), FORWARD)
    for name, gradient in gradients.items():
        error = relative_error(model.gradients[name], gradient)
        yield Check(group, name, "gradient: model = reference", error, BACKWARD)

        def f(value: Any, name: str = name) -> float:
            return reference.loss(model.layers, {**weights, name: value}, ids, labels)

        error = gradient_error(f, weights[name], gradient, rng, directions=1)
        yield Check(group, name, "gradient: reference = differences", error, DERIVATION)
