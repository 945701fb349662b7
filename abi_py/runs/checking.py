"""Whether what was written quantised is the model that it was made of: the logits of some tokens, compared."""

from pathlib import Path

import numpy as np

from ..errors import CheckpointError
from ..model.frozen import FrozenModel
from ..model.transformer import Transformer

__all__ = ["logits_off"]

# How far logits may be from those of the source, as a share of their deviation: what the types explain, with room.  Of
# a model with other weights it is 1.4.
EXPLAINED = {"F32": 1e-5, "F16": 0.02, "BF16": 0.1, "Q8_0": 0.2, "Q6_K": 0.4, "Q5": 0.7, "Q4": 1.0, "IQ4": 1.0}
TOKENS = 16


def logits_off(model: Transformer, path: Path, quantize: str) -> float:
    """Return how far the logits of a file are from the model's; CheckpointError if its type does not explain it."""
    again = FrozenModel.from_gguf(path)
    shape = model.config
    ids = np.random.default_rng(0).integers(0, shape.vocab_size, (1, min(shape.max_seq_len, TOKENS)))
    wanted, found = model.forward(ids), again.forward(ids)
    off = float((found - wanted).std() / max(float(wanted.std()), 1e-30))
    limit = next((share for name, share in EXPLAINED.items() if quantize.startswith(name)), 1.2)
    if not off <= limit:
        raise CheckpointError(
            f"{path} was written, but its logits are {off:.2g} of their deviation away from the source's, and "
            f"{quantize} explains {limit:g}; check the disk and export again, or take --no-check if the model is one "
            "that small errors change"
        )
    return off
