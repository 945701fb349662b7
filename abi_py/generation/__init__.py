"""Text from a trained model: pick the next token, append it, repeat.

sampler.py   from logits to one token id
"""

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError, DataError
from ..model import TrainableModel
from .sampler import sample

__all__ = ["generate", "sample"]

STRIDE = 32  # contexts are padded to a multiple of this, so that few array sizes occur


def generate(
    model: TrainableModel,
    prompt: npt.ArrayLike,
    max_new_tokens: int = 256,
    *,
    temperature: float = 0.7,
    top_k: int = 40,
    top_p: float = 0.9,
    seed: int = 0,
    stop: int | None = None,
) -> np.ndarray:
    """Return up to `max_new_tokens` ids (int32) that continue the ids `prompt` (n,), n >= 1.

    temperature 0 always takes the likeliest token; top_k 0 and top_p 1 switch those off.  Generation ends before the
    id `stop`. A context longer than the model's max_seq_len loses its beginning.  Each token costs a whole forward
    pass.
    ConfigError for settings out of range; DataError for an empty prompt or ids outside the vocabulary.
    """
    ids = np.asarray(prompt)
    if ids.ndim != 1 or ids.size == 0:
        raise DataError(
            f"prompt has shape {ids.shape}; generation continues at least one token, as a flat array of ids"
        )
    if max_new_tokens < 0:
        raise ConfigError(f"max_new_tokens ({max_new_tokens}) must be zero or more")
    rng = np.random.default_rng(seed)
    longest = model.config.max_seq_len
    context, made = [int(i) for i in ids], 0
    while made < max_new_tokens:
        recent = context[-longest:]
        # What stands after a position cannot change its logits, so the padding may be any id.
        padded = np.zeros(min(-(-len(recent) // STRIDE) * STRIDE, longest), np.int64)
        padded[: len(recent)] = recent
        logits = model.forward(padded.reshape(1, -1))[0, len(recent) - 1]
        token = sample(logits, rng, temperature=temperature, top_k=top_k, top_p=top_p)
        if token == stop:
            break
        context.append(token)
        made += 1
    return np.array(context[len(context) - made :], np.int32)
