"""Time our own training step in a process of its own, and print the JSON line that the scripts in peers/ print.

    python bench/step_worker.py --shape tiny --threads 2

A step is zero gradients, forward and backward, the global norm, and AdamW with clipping at 1.
"""

import argparse
import json
import resource
import statistics
import sys
import time

import numba
import numpy as np
from shapes import SHAPES

from abi_py.config import CheckpointingStrategy, Precision, TrainableModelConfig
from abi_py.kernels.optimizers import adamw_, parameter_chunks
from abi_py.model import TrainableModel

STRATEGIES = [strategy.value for strategy in CheckpointingStrategy]


class Step:
    """One training step of a model of the given shape, on a random batch that stays the same."""

    def __init__(self, shape, precision="fp32", **options):
        self.precision = Precision(precision)
        self.model = TrainableModel(TrainableModelConfig(**shape.model_fields(), **options))
        rng = np.random.default_rng(0)
        self.ids, self.labels = rng.integers(0, shape.vocab_size, (2, shape.batch_size, shape.seq_len)).astype(np.int32)
        table = self.model.parameters.table
        columns = ([tensor.offset for tensor in table], [tensor.size for tensor in table], [t.decay for t in table])
        self.chunks, self.decay = parameter_chunks(*columns)
        self.m, self.v = (np.zeros(self.model.num_params(), np.float32) for _ in range(2))
        self.count = 0

    def gradients(self):
        """Fill the gradients; return the loss."""
        self.model.zero_gradients()
        return self.model.compute_loss(self.ids, self.labels, backward=True, precision=self.precision).loss

    def norm(self):
        """Return the length of the gradient."""
        return self.model.compute_gradient_norm()

    def update(self, norm):
        """Clip to 1 and apply AdamW, in one pass."""
        self.count += 1
        weights, gradients = self.model.parameters.weights_flat, self.model.parameters.gradients_flat
        scale = min(1.0, 1.0 / norm)
        state = weights, self.m, self.v, gradients, self.chunks, self.decay
        adamw_(*state, 1e-4, 0.9, 0.999, 1e-8, 0.01, self.count, scale)

    def __call__(self):
        """Run the whole step; return the loss."""
        loss = self.gradients()
        self.update(self.norm())
        return loss


def main():
    """Read the options, time the steps, print the line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="tiny", help="model and batch, see shapes.py")
    parser.add_argument("--threads", type=int, default=numba.config.NUMBA_NUM_THREADS, help="threads of the kernels")
    parser.add_argument("--steps", type=int, default=6, help="steps that count")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="operands of the products")
    parser.add_argument("--checkpointing", choices=STRATEGIES, default="none", help="gradient checkpointing strategy")
    options = parser.parse_args()
    if not 1 <= options.threads <= numba.config.NUMBA_NUM_THREADS:
        parser.error(f"--threads ({options.threads}) must lie between 1 and {numba.config.NUMBA_NUM_THREADS}")
    numba.set_num_threads(options.threads)
    shape = SHAPES[options.shape]
    step = Step(shape, options.precision, checkpointing=options.checkpointing)
    losses, seconds = [], []
    for _ in range(options.warmup + options.steps):
        start = time.perf_counter()
        losses.append(step())
        seconds.append(time.perf_counter() - start)
    counted = seconds[options.warmup :]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kilobytes, on a Mac bytes
    median = statistics.median(counted)
    line = {
        "peer": "abi_py",
        "shape": options.shape,
        "precision": options.precision,
        "threads": options.threads,
        "parameters": step.model.num_params(),
        "first_loss": round(losses[0], 4),
        "step_s": round(median, 5),
        "best_step_s": round(min(counted), 5),
        "tokens_per_s": round(shape.tokens / median, 1),
        "peak_rss_mb": round(peak / (2**20 if sys.platform == "darwin" else 2**10)),
        "version": f"numba {numba.__version__}",
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
