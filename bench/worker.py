"""What the workers of `bench_vs_peers.py` share, ours and the peers': options, first weights, clock, the JSON line.

Standard library and NumPy only, because the interpreter of a peer reads it, too.  All workers begin with the same
weights and the same batch, so their losses must agree; `bench_vs_peers.py` checks that they do.
"""

import argparse
import json
import os
import re
import resource
import statistics
import sys
import time
from pathlib import Path

import numpy as np
from shapes import SHAPES

EPS, THETA = 1e-5, 1e4
LEARNING_RATE, BETA1, BETA2, ADAM_EPS, WEIGHT_DECAY, MAX_NORM = 1e-4, 0.9, 0.999, 1e-8, 0.01, 1.0


def options_of(title, *flags, precisions=("fp32", "bf16", "bf16x3", "bf16x6")):
    """Return the options that every worker has, and those of `flags`: (name, keywords of add_argument)."""
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--shape", choices=SHAPES, default="tiny", help="model and batch, see shapes.py")
    parser.add_argument("--precision", choices=precisions, default="fp32", help="of the products' operands")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads inside operations")
    parser.add_argument("--steps", type=int, default=6, help="steps that count")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    for name, keywords in flags:
        parser.add_argument(name, **keywords)
    options = parser.parse_args()
    if options.steps < 1 or options.warmup < 0 or not 1 <= options.threads <= os.cpu_count():
        parser.error(f"--steps must be at least 1, --warmup at least 0, --threads 1 to {os.cpu_count()}")
    return options


def first_weights(shape):
    """Yield (name, float32 array) of every weight: matrices (out, in) from N(0, 0.02), norms 1."""
    c, f, kv = shape.hidden_dim, shape.intermediate_dim, shape.num_kv_heads * shape.hidden_dim // shape.num_heads
    block = {
        "w_q": (c, c), "w_k": (kv, c), "w_v": (kv, c), "w_o": (c, c), "attn_norm": (c,),
        "w_gate": (f, c), "w_up": (f, c), "w_down": (c, f), "ffn_norm": (c,),
    }  # fmt: skip
    plan = {"token_embedding": (shape.vocab_size, c)}
    for layer in range(shape.num_layers):
        plan |= {f"layers.{layer}.{name}": size for name, size in block.items()}
    plan["final_norm"] = (c,)
    rng = np.random.default_rng(0)
    for name, size in plan.items():
        if len(size) == 1:
            yield name, np.ones(size, np.float32)
        else:
            weight = rng.standard_normal(size, np.float32)
            weight *= np.float32(0.02)
            yield name, weight


def batch(shape):
    """Return ids and labels, each (B, T) int32, the same in every worker."""
    drawn = np.random.default_rng(1).integers(0, shape.vocab_size, (2, shape.batch_size, shape.seq_len))
    return drawn.astype(np.int32)


def timed(step, options):
    """Run `step`, which returns the loss, so often as asked; return the losses of all and the seconds that count."""
    losses, seconds = [], []
    for _ in range(options.warmup + options.steps):
        start = time.perf_counter()
        losses.append(float(step()))
        seconds.append(time.perf_counter() - start)
    return losses, seconds[options.warmup :]


def peak_rss_mb():
    """Return the most memory that this process has held, in MiB."""
    try:  # ru_maxrss would count the parent's as well: it survives fork and exec
        held = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
        return round(int(held[1]) / 2**10)
    except (OSError, TypeError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kilobytes, on a Mac bytes
        return round(peak / (2**20 if sys.platform == "darwin" else 2**10))


def print_line(peer, version, options, losses, seconds, parameters):
    """Print the JSON line: the last line of every worker."""
    median = statistics.median(seconds)
    line = {
        "peer": peer,
        "shape": options.shape,
        "precision": options.precision,
        "threads": options.threads,
        "parameters": parameters,
        "first_loss": round(losses[0], 5),
        "last_loss": round(losses[-1], 5),
        "step_s": round(median, 6),
        "best_step_s": round(min(seconds), 6),
        "steps_s": [round(value, 6) for value in seconds],
        "tokens_per_s": round(SHAPES[options.shape].tokens / median, 1),
        "peak_rss_mb": peak_rss_mb(),
        "version": version,
    }
    print(json.dumps(line))
