"""The kernels of a training step, each by itself on arrays of the step's shapes: what roofline.py and growth.py time.

Every layer has activations and weights of its own, as in a step, so a call finds in the caches about what it would
find there; scratch is shared, as in a step.  Only the public functions of the kernels are called.
"""

import statistics
import time

import numpy as np
from arithmetic import head_dim, kv_width, linear_layers, parameters

from abi_py.kernels.engine.halves import round_to_bf16_ref
from abi_py.kernels.engine.number_formats import BFLOAT16, FLOAT32
from abi_py.kernels.unchecked import (
    adamw_,
    attention_backward,
    attention_forward,
    embedding_backward,
    embedding_forward,
    global_norm,
    head_loss_backward,
    parameter_chunks,
    product,
    rms_norm_backward,
    rms_norm_forward,
    rope_backward,
    rope_forward,
    rope_forward_rounded,
    rope_table,
    scratch_floats,
    swiglu_backward,
    swiglu_forward,
    swiglu_forward_rounded,
)

EPS, THETA = 1e-5, 1e4


class Draw:
    """Random float32 arrays; one block of numbers is drawn and repeated, which is a hundred times as fast."""

    def __init__(self):
        self.block = np.random.default_rng(0).standard_normal(1 << 16, np.float32)

    def __call__(self, *size, scale=1.0):
        flat = np.resize(self.block, int(np.prod(size)))
        return (flat * np.float32(scale)).reshape(size)


def saved(x, bf16):
    """Return x as a step of that precision saves it."""
    return (round_to_bf16_ref(x).view(np.uint32) >> np.uint32(16)).astype(np.uint16) if bf16 else x


def format_of(bf16):
    """Return what products multiply."""
    return BFLOAT16 if bf16 else FLOAT32


def attention_stages(shape, bf16):
    """Return {name: function of the layer} of attention, forward and backward."""
    draw, rows, c, kv = Draw(), shape.tokens, shape.hidden_dim, kv_width(shape)
    layers = range(shape.num_layers)
    ends = np.cumsum((c, kv))
    qkv = [np.split(saved(draw(rows, c + 2 * kv), bf16), ends, axis=1) for _ in layers]
    att, lse = ([np.zeros(size, np.float32) for _ in layers] for size in ((rows, c), (shape.num_heads, rows)))
    dqkv, datt = np.split(np.zeros((rows, c + 2 * kv), np.float32), ends, axis=1), draw(rows, c)
    starts = np.zeros(rows, np.int32)
    last = starts, shape.batch_size, shape.num_heads, shape.num_kv_heads

    def forward(i):
        attention_forward(att[i], lse[i], *qkv[i], *last)

    def backward(i):
        attention_backward(*dqkv, datt, *qkv[i], att[i], lse[i], *last)

    for i in layers:  # backward reads what forward saved
        forward(i)
    return {"attention y": forward, "attention dx": backward}


def product_stages(shape, bf16):
    """Return {name: function of the layer} of the linear layers' products."""
    draw, rows, found = Draw(), shape.tokens, {}
    for name, (outputs, inputs) in linear_layers(shape).items():
        w, dw = ([draw(outputs, inputs, scale=0.02) for _ in range(shape.num_layers)] for _ in range(2))
        x, y = ([draw(rows, width) for _ in range(shape.num_layers)] for width in (inputs, outputs))
        dx, dy = draw(rows, inputs), draw(rows, outputs)

        def y_product(i, x=x, y=y, w=w):
            product(y[i], x[i], w[i], transpose_b=True, number_format=format_of(bf16))

        def dx_product(i, dx=dx, dy=dy, w=w):
            product(dx, dy, w[i], number_format=format_of(bf16))

        def dw_product(i, dw=dw, dy=dy, x=x):
            product(dw[i], dy, x[i], transpose_a=True, number_format=format_of(bf16))

        found |= {f"{name} y": y_product, f"{name} dx": dx_product, f"{name} dw": dw_product}
    return found


def row_stages(shape, bf16):
    """Return {name: function of the layer} of norms, RoPE and SwiGLU."""
    draw, rows, c, f = Draw(), shape.tokens, shape.hidden_dim, shape.intermediate_dim
    layers = range(shape.num_layers)
    turned = shape.num_heads + shape.num_kv_heads
    x, gate_up = ([draw(rows, width) for _ in layers] for width in (c, 2 * f))
    qkv = [draw(rows, c + 2 * kv_width(shape)) for _ in layers]
    n, dn, dx, h, dh, dgate_up, dqkv = (
        draw(rows, width) for width in (c, c, c, f, f, 2 * f, c + 2 * kv_width(shape))
    )
    kept = [saved(x, bf16) for x in (*gate_up, *qkv)]
    kept_gate_up, kept_qkv = kept[: shape.num_layers], kept[shape.num_layers :]
    r, w, dw = np.ones(rows, np.float32), draw(c), np.zeros(c, np.float32)
    cos, sin = rope_table(shape.seq_len, head_dim(shape), THETA)
    positions = np.tile(np.arange(shape.seq_len, dtype=np.int32), shape.batch_size)
    if bf16:
        own = {
            "rope y": lambda i: rope_forward_rounded(kept_qkv[i], qkv[i], cos, sin, positions, turned),
            "swiglu y": lambda i: swiglu_forward_rounded(h, kept_gate_up[i], gate_up[i]),
        }
    else:
        own = {
            "rope y": lambda i: rope_forward(qkv[i], cos, sin, positions, turned),
            "swiglu y": lambda i: swiglu_forward(h, gate_up[i]),
        }
    return own | {
        "rms_norm y": lambda i: rms_norm_forward(n, r, x[i], w, EPS),
        "rms_norm dx": lambda i: rms_norm_backward(dx, dw, dn, x[i], w, r, True),
        "final rms_norm y": lambda i: rms_norm_forward(n, r, x[-1], w, EPS),
        "final rms_norm dx": lambda i: rms_norm_backward(dx, dw, dn, x[-1], w, r, False),
        "rope dx": lambda i: rope_backward(dqkv, cos, sin, positions, turned),
        "swiglu dx": lambda i: swiglu_backward(dgate_up, dh, kept_gate_up[i]),
    }


def once_stages(shape, bf16):
    """Return {name: function, whose argument does nothing} of what a step does once: head, embedding, norm, update."""
    draw, rows, c = Draw(), shape.tokens, shape.hidden_dim
    size = parameters(shape)
    w, m, v, g = (draw(size, scale=scale) for scale in (0.02, 1e-3, 1e-3, 1e-3))
    np.abs(v, out=v)
    table, dtable = (flat[: shape.vocab_size * c].reshape(-1, c) for flat in (w, g))
    hidden, dhidden = draw(rows, c), draw(rows, c)
    ids, labels = np.random.default_rng(0).integers(0, shape.vocab_size, (2, rows)).astype(np.int32)
    losses, hits = np.empty(rows, np.float32), np.empty(rows, np.uint8)
    chunks, decay = parameter_chunks([0], [size], [True])
    scratch = np.empty(scratch_floats(rows, shape.vocab_size, c), np.float32)
    head = losses, hits, dhidden, dtable, hidden, table, labels, scratch, 1 / rows, 0.0, False, format_of(bf16)
    return {
        "head and loss": lambda i: head_loss_backward(*head),
        "embedding y": lambda i: embedding_forward(hidden, ids, table),
        "embedding dx": lambda i: embedding_backward(dtable, dhidden, ids),
        "global norm": lambda i: global_norm(g),
        "clip and AdamW": lambda i: adamw_(w, m, v, g, chunks, decay, 1e-4, 0.9, 0.999, 1e-8, 0.01, 10, 1.0),
    }


def seconds_per_call(function, layers, runs):
    """Return the median seconds of a call, over `runs` sweeps through all layers after one that does not count."""
    samples = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        for i in range(layers):
            function(i)
        samples.append((time.perf_counter() - start) / layers)
    return statistics.median(samples[1:])


def measured_stages(shape, stages, bf16, runs):
    """Return {name: seconds of one call} of `stages`, group by group, so that not all arrays exist at once."""
    wanted, found = {stage.name: stage for stage in stages}, {}
    groups = (
        lambda: product_stages(shape, bf16),
        lambda: attention_stages(shape, bf16),
        lambda: row_stages(shape, bf16),
        lambda: once_stages(shape, bf16),
    )
    for group in groups:
        for name, function in group().items():
            if name in wanted:
                found[name] = seconds_per_call(function, wanted[name].layers, runs)
    missing = wanted.keys() - found.keys()
    if missing:
        raise KeyError(f"stages.py has no function for {', '.join(sorted(missing))}, which arithmetic.py lists")
    return found
