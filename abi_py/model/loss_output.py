"""What a pass over a batch with labels says."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from ..reprs import Shown

__all__ = ["LossOutput"]


@dataclass(frozen=True)
class LossOutput(Shown):
    """Result of one batch: sums over the labels that count, and the loss of each token."""

    loss: float  # mean over the labels that count; 0 if there is none
    loss_sum: float
    num_tokens: int
    num_correct: int
    token_losses: np.ndarray  # (B, T) float32, 0 where the label does not count
    # What a backward pass added to the loss, by name: coefficient times a mean over the batch's tokens; not in `loss`.
    penalties: Mapping[str, float] = field(default_factory=dict)
    # (layers with experts, E) int64: how many tokens that the attention mask keeps chose each; of a backward pass
    expert_loads: np.ndarray | None = None
