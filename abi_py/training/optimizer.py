"""The optimizer: moments beside the flat weights, and one kernel call for an update.

What is kept: m (P,) for sgd with momentum; m and v (P,) for adam and adamw; nothing for plain sgd.  The formulas are
in `kernels/optimizers.py`.
"""

from collections.abc import Mapping

import numpy as np

from ..config import LlmTrainingConfig, OptimizerType
from ..errors import CheckpointError
from ..kernels.engine.threads import PASS, threads_as_before
from ..kernels.optimizers import parameter_chunks
from ..kernels.unchecked import adam_, adamw_, sgd_
from ..parameters import Buffers

__all__ = ["Optimizer"]


class Optimizer:
    """Update rule and its memory; `step` counts the updates made (Adam's t)."""

    def __init__(self, parameters: Buffers, config: LlmTrainingConfig) -> None:
        """Allocate the moments for `parameters` (model.parameters): flat float32 buffers of the weights' length."""
        self.parameters, self.config, self.step = parameters, config, 0
        size = parameters.weights_flat.size
        kind = config.optimizer
        self.moments: dict[str, np.ndarray] = {}
        if kind is not OptimizerType.SGD or config.momentum > 0:
            self.moments["m"] = np.zeros(size, np.float32)
        if kind is not OptimizerType.SGD:
            self.moments["v"] = np.zeros(size, np.float32)
        table = parameters.table
        self.chunks, self.decay = parameter_chunks(
            [entry.offset for entry in table],
            [entry.size for entry in table],
            [entry.decay or config.decay_norms_and_biases for entry in table],
        )

    def update(self, scale: float, learning_rate: float) -> None:
        """Apply one update; the gradient buffer is multiplied by `scale` (1 / tokens x clip factor) on the way."""
        self.step += 1
        config, weights, gradients = self.config, self.parameters.weights_flat, self.parameters.gradients_flat
        m, v = self.moments.get("m", np.zeros(0, np.float32)), self.moments.get("v")
        cut, rate, decay = (self.chunks, self.decay), float(learning_rate), config.weight_decay
        rule = adam_ if config.optimizer is OptimizerType.ADAM else adamw_
        betas = (config.beta1, config.beta2, config.epsilon)
        with threads_as_before(PASS * weights.size):
            if config.optimizer is OptimizerType.SGD:
                sgd_(weights, m, gradients, *cut, rate, config.momentum, decay, config.nesterov, float(scale))
            else:
                rule(weights, m, v, gradients, *cut, rate, *betas, decay, self.step, float(scale))

    def load(self, moments: Mapping[str, np.ndarray], step: int) -> None:
        """Take over moments (P,) float32 under the names m and v, and the number of updates in them."""
        if set(moments) != set(self.moments):
            found, wanted = sorted(moments) or ["none"], sorted(self.moments) or ["none"]
            raise CheckpointError(
                f"the checkpoint holds the moments {', '.join(found)}, but {self.config.optimizer.value} (momentum "
                f"{self.config.momentum}) needs {', '.join(wanted)}; resume with the optimizer of the checkpoint"
            )
        for name, moment in moments.items():
            if moment.shape != self.moments[name].shape:
                raise CheckpointError(
                    f"{name} has {moment.size} numbers, the model {self.moments[name].size}; this is another model"
                )
        for name, moment in moments.items():
            self.moments[name][:] = moment
        self.step = step

    def reset(self) -> None:
        """Forget all updates."""
        self.step = 0
        for moment in self.moments.values():
            moment.fill(0)

    def copy_moments(self) -> dict[str, np.ndarray]:
        """Return copies of the moments."""
        return {name: moment.copy() for name, moment in self.moments.items()}
