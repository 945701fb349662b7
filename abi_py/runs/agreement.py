"""Whether a model that was written computes what the one that it was made from does: logits of some tokens.

    off          sqrt(sum (z' - z)^2 / sum (z - mean z)^2)   over all logits z, z'
    explained    the root of the sum of the squares of the relative errors of all matrices: as if each moved the logits
                 by its own share of them, one independent of the other; times ROOM, and what float32 rounds; 1 at most

Two models that have nothing to do with each other are sqrt(2) apart.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from ..config import TrainableModelConfig
from ..errors import CheckpointError
from ..formats.gguf.checking import Loss, Written
from ..model.frozen import FrozenModel
from ..model.transformer import Transformer

__all__ = ["Agreement", "Expected", "agreement", "expected", "logits_of"]

TOKENS = 16
ROOM = 8.0  # models pass on more of an error or less: 0.1 to 4.4 of it were measured, of all families and seven types
MOST = 1.0  # as much of something else as of the model
ROUNDING = 1e-4  # of float32, and of angles that a file says in other numbers


@dataclass(frozen=True)
class Agreement:
    """How far logits are from those of the source: as a share of theirs, the largest, and what the types explain.

    kl     mean over the tokens of sum p log(p / p'), in nats
    """

    tokens: int
    off: float
    largest: float
    kl: float
    explained: float


@dataclass(frozen=True)
class Expected:
    """Logits of some tokens, which a file that will be written must give again: ids (1, T), logits (T, V).

    They are taken before it is written, so that source and file are never in memory together.
    """

    ids: np.ndarray
    logits: np.ndarray

    def compare(self, written: Written) -> Agreement:
        """Return how near the logits of what was written are; CheckpointError if its types do not explain it."""
        path = written.files[0]
        found = agreement(self.logits, logits_of(FrozenModel.from_gguf(path), self.ids), written.losses)
        if not found.off <= found.explained:
            raise CheckpointError(
                f"{path} was written, and its tensors are as near as their types keep them, but its logits are "
                f"{found.off:.3g} of their spread away from the source's, of which that explains "
                f"{found.explained:.3g}; do not use the file, and report it; --no-check leaves the comparison out"
            )
        return found


def expected(logits: Callable[[np.ndarray], np.ndarray], shape: TrainableModelConfig) -> Expected:
    """Return what is expected of a model's file; `logits` are the model's, (T, V)."""
    ids = np.random.default_rng(0).integers(0, shape.vocab_size, (1, min(TOKENS, shape.max_seq_len)))
    return Expected(ids, logits(ids))


def logits_of(model: Transformer, ids: np.ndarray) -> np.ndarray:
    """Return the logits (T, V) of ids (1, T)."""
    return model.forward(ids)[0]


def agreement(wanted: np.ndarray, found: np.ndarray, losses: Mapping[str, Loss] | None = None) -> Agreement:
    """Return how far logits (T, V) are from those that are wanted, and how far the losses of tensors explain it."""
    difference = (found - wanted).astype(np.float64)
    spread = (wanted - wanted.mean(1, keepdims=True)).astype(np.float64)
    size = math.sqrt(float(np.vdot(spread, spread)))
    off = math.sqrt(float(np.vdot(difference, difference))) / max(size, 1e-30)
    p, q = _log_softmax(wanted), _log_softmax(found)
    kl = float((np.exp(p) * (p - q)).sum(1).mean())
    moved = math.sqrt(sum(loss.error**2 for loss in (losses or {}).values()))
    explained = min(ROOM * moved + ROUNDING, MOST)
    return Agreement(len(wanted), off, float(np.abs(difference).max()), max(kl, 0.0), explained)


def _log_softmax(z: np.ndarray) -> np.ndarray:
    z = z.astype(np.float64)
    z -= z.max(1, keepdims=True)
    return z - np.log(np.exp(z).sum(1, keepdims=True))
