"""From the logits of one position to one token id.

p = softmax(z / temperature)                              temperature 0: the largest logit, the first of equals
top_k   only the k likeliest tokens stay (0 = all)        Fan et al. 2018, section 5
top_p   of those, the likeliest stay until their probabilities reach top_p (1 = all); never none
                                                          Holtzman et al. 2020, section 3.1
"""

import math

import numpy as np

from ..errors import ConfigError, NonFiniteError

__all__ = ["sample"]


def sample(
    logits: np.ndarray, rng: np.random.Generator, *, temperature: float = 0.7, top_k: int = 40, top_p: float = 0.9
) -> int:
    """Return an id drawn from logits (V,); ConfigError for settings out of range, NonFiniteError for NaN logits."""
    _check(temperature, top_k, top_p)
    z = np.asarray(logits, np.float64)
    if not np.isfinite(z.max()):
        raise NonFiniteError("the model's logits are not finite; load an earlier checkpoint")
    if temperature == 0:
        return int(z.argmax())
    order = np.argsort(-z, kind="stable")  # likeliest first; equal logits by id
    if top_k:
        order = order[:top_k]
    p = np.exp((z[order] - z[order[0]]) / temperature)
    p /= p.sum()
    if top_p < 1:
        before = np.cumsum(p) - p  # probability of all likelier tokens
        order, p = order[before < top_p], p[before < top_p]
        p /= p.sum()
    return int(rng.choice(order, p=p))


def _check(temperature: float, top_k: int, top_p: float) -> None:
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ConfigError(f"temperature ({temperature}) must be zero or more; use 0 for the likeliest token always")
    if top_k < 0:
        raise ConfigError(f"top_k ({top_k}) must be zero or more; use 0 to keep all tokens")
    if not 0 < top_p <= 1:
        raise ConfigError(f"top_p ({top_p}) must lie above 0 and at most be 1; use 1 to keep all tokens")
