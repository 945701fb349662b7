"""Time our own training step in a process of its own, and print the JSON line that the scripts in peers/ print.

    python bench/step_worker.py --shape tiny --threads 2

A step is zero gradients, forward and backward, the global norm, and AdamW with clipping at 1.
"""

import numba
import numpy as np
from shapes import SHAPES
from worker import (
    ADAM_EPS,
    BETA1,
    BETA2,
    LEARNING_RATE,
    MAX_NORM,
    WEIGHT_DECAY,
    batch,
    first_weights,
    options_of,
    print_line,
    timed,
)

from abi_py.config import CheckpointingStrategy, Precision, TrainableModelConfig
from abi_py.kernels.engine.threads import PASS, threads_as_before
from abi_py.kernels.unchecked import adamw_, parameter_chunks
from abi_py.model import TrainableModel

STRATEGIES = [strategy.value for strategy in CheckpointingStrategy]


class Step:
    """One training step of a model of the given shape, on a random batch that stays the same."""

    def __init__(self, shape, precision="fp32", **options):
        self.precision = Precision(precision)
        self.model = TrainableModel(TrainableModelConfig(**shape.model_fields(), **options))
        for name, weight in first_weights(shape):
            self.model.weights[name][...] = weight
        self.ids, self.labels = batch(shape)
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
        scale = min(1.0, MAX_NORM / norm)
        state = weights, self.m, self.v, gradients, self.chunks, self.decay
        with threads_as_before(PASS * weights.size):  # as `training/optimizer.py` does
            adamw_(*state, LEARNING_RATE, BETA1, BETA2, ADAM_EPS, WEIGHT_DECAY, self.count, scale)

    def __call__(self):
        """Run the whole step; return the loss."""
        loss = self.gradients()
        self.update(self.norm())
        return loss


def main():
    """Read the options, time the steps, print the line."""
    choice = {"choices": STRATEGIES, "default": "none", "help": "gradient checkpointing strategy"}
    options = options_of(__doc__.splitlines()[0], ("--checkpointing", choice))
    numba.set_num_threads(options.threads)
    step = Step(SHAPES[options.shape], options.precision, checkpointing=options.checkpointing)
    losses, seconds = timed(step, options)
    print_line("abi_py", f"numba {numba.__version__}", options, losses, seconds, step.model.num_params())


if __name__ == "__main__":
    main()
