"""Time a training step of the same model in JAX on the CPU, and print one JSON line.

    pip install jax==0.10.2 jaxlib==0.10.2
    python bench/peers/jax_llama.py --shape tiny [--precision bf16]

The model is abi_py's: pre-norm Llama, RMSNorm, rotate-half RoPE, grouped heads, SwiGLU, tied head, mean cross-entropy;
AdamW and clipping at 1.  It is written as one would write it in JAX: a pure function of a tree of weights, the whole
step one compiled program (`jit`), weights and moments donated so that they are updated in place.  With bf16, weights
stay float32 and are rounded where they are used; norms, softmax and loss are computed in float32.

On a CPU JAX has no fused attention: the T x T probabilities of all layers are in memory, 15 GB for the shape `long`.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from shapes import SHAPES
from worker import (
    ADAM_EPS,
    BETA1,
    BETA2,
    EPS,
    LEARNING_RATE,
    MAX_NORM,
    THETA,
    WEIGHT_DECAY,
    batch,
    first_weights,
    options_of,
    print_line,
    timed,
)

os.environ.setdefault("JAX_PLATFORMS", "cpu")


def main():
    """Read the options, then load JAX: the size of its thread pool follows from the cores it may use at that moment."""
    options = options_of(__doc__.splitlines()[0])
    if options.threads < os.cpu_count():
        if not hasattr(os, "sched_setaffinity"):
            sys.exit(f"--threads ({options.threads}): JAX takes all {os.cpu_count()} cores, and here it can't be told")
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    import jax

    step, count = make_step(SHAPES[options.shape], options.precision)
    losses, seconds = timed(step, options)
    print_line("jax", f"jax {jax.__version__}", options, losses, seconds, count)


def make_loss(shape, dtype):
    """Return the function (weights, ids, labels) -> mean loss; products take operands of `dtype`."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    heads, kv_heads, width = shape.num_heads, shape.num_kv_heads, shape.hidden_dim // shape.num_heads
    rates = THETA ** -(np.arange(0, width, 2) / width)
    angles = np.outer(np.arange(shape.seq_len), rates)[:, None]  # (T, 1, D/2)
    cos, sin = (jnp.asarray(f(angles), dtype) for f in (np.cos, np.sin))

    def linear(x, w):
        return x @ w.astype(dtype).T

    def norm(x, w):
        wide = x.astype(jnp.float32)
        return (wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + EPS) * w).astype(dtype)

    def rotate(x):
        front, back = jnp.split(x, 2, -1)
        return jnp.concatenate((front * cos - back * sin, back * cos + front * sin), -1)

    def block(x, w):
        n = norm(x, w["attn_norm"])
        q, k, v = (
            linear(n, w[name]).reshape(*x.shape[:2], count, width)
            for name, count in (("w_q", heads), ("w_k", kv_heads), ("w_v", kv_heads))
        )
        mixed = jax.nn.dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        x = x + linear(mixed.reshape(x.shape), w["w_o"])
        n = norm(x, w["ffn_norm"])
        return x + linear(jax.nn.silu(linear(n, w["w_gate"])) * linear(n, w["w_up"]), w["w_down"])

    def loss(weights, ids, labels):
        x = weights["token_embedding"][ids].astype(dtype)
        for layer in range(shape.num_layers):
            at = f"layers.{layer}."
            x = block(x, {name.removeprefix(at): w for name, w in weights.items() if name.startswith(at)})
        logits = linear(norm(x, weights["final_norm"]), weights["token_embedding"]).astype(jnp.float32)
        right = jnp.take_along_axis(logits, labels[..., None], -1)[..., 0]
        return jnp.mean(jax.nn.logsumexp(logits, -1) - right)

    return loss


def make_step(shape, precision):
    """Return a function that runs one step and returns its loss, and the number of weights."""
    import jax
    import jax.numpy as jnp

    loss_of = make_loss(shape, jnp.bfloat16 if precision == "bf16" else jnp.float32)

    def update(weights, m, v, count, ids, labels):
        loss, gradients = jax.value_and_grad(loss_of)(weights, ids, labels)
        length = jnp.sqrt(sum(jnp.vdot(g, g) for g in gradients.values()))
        scale = jnp.minimum(1.0, MAX_NORM / length)
        rate, root = LEARNING_RATE / (1 - BETA1**count), jnp.sqrt(1 - BETA2**count)
        for name, g in gradients.items():
            decay = WEIGHT_DECAY if g.ndim == 2 else 0.0
            m[name] = BETA1 * m[name] + (1 - BETA1) * scale * g
            v[name] = BETA2 * v[name] + (1 - BETA2) * jnp.square(scale * g)
            change = rate * m[name] / (jnp.sqrt(v[name]) / root + ADAM_EPS)
            weights[name] = (1 - LEARNING_RATE * decay) * weights[name] - change
        return weights, m, v, loss

    compiled = jax.jit(update, donate_argnums=(0, 1, 2))
    weights = {name: jnp.asarray(weight) for name, weight in first_weights(shape)}
    m, v = ({name: jnp.zeros_like(w) for name, w in weights.items()} for _ in range(2))
    state = [weights, m, v]
    ids, labels = map(jnp.asarray, batch(shape))
    steps = [0]

    def step():
        steps[0] += 1
        *state[:], loss = jax.block_until_ready(compiled(*state, jnp.float32(steps[0]), ids, labels))
        return loss

    return step, sum(w.size for w in weights.values())


if __name__ == "__main__":
    main()
