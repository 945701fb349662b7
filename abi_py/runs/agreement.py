"""Whether a model that was written computes what the one that it was made from does: logits of some tokens.

    off          sqrt(sum (z' - z)^2 / sum (z - mean z)^2)   over all logits z, z'
    explained    the root of the sum of the squares of the relative errors of all matrices: as if each moved the logits
                 by its own share of them, one independent of the other; times ROOM, and what float32 rounds

Two models that have nothing to do with each other are sqrt(2) apart.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import CheckpointError
from ..formats.gguf.checking import Loss
from ..model.transformer import Transformer

__all__ = ["Agreement", "agreement", "logits_of", "require_agreement", "tokens_of"]

TOKENS = 16
ROOM = 4.0  # models differ in how much of an error they pass on
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


def tokens_of(vocab_size: int, longest: int) -> np.ndarray:
    """Return ids (1, T) of all parts of a vocabulary, always the same."""
    return np.random.default_rng(0).integers(0, vocab_size, (1, min(TOKENS, longest)))


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
    explained = ROOM * math.sqrt(sum(loss.error**2 for loss in (losses or {}).values())) + ROUNDING
    return Agreement(len(wanted), off, float(np.abs(difference).max()), max(kl, 0.0), explained)


def require_agreement(found: Agreement, path: Path) -> None:
    """Raise CheckpointError if logits are further off than the types of the tensors explain."""
    if not found.off <= found.explained:
        raise CheckpointError(
            f"{path} was written, and its tensors are as near as their types keep them, but its logits are "
            f"{found.off:.3g} of their spread away from the source's, of which that explains {found.explained:.3g}; "
            "do not use the file, and report it; --no-check keeps it without a word"
        )


def _log_softmax(z: np.ndarray) -> np.ndarray:
    z = z.astype(np.float64)
    z -= z.max(1, keepdims=True)
    return z - np.log(np.exp(z).sum(1, keepdims=True))
