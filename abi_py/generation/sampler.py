"""From the logits z of one position to one token id.

In this order, which is Hugging Face's (`GenerationMixin._get_logits_processor`), so that settings mean the same there:

    repetition_penalty p    of every id that came before: z / p if z > 0, else z p         Keskar et al. 2019, 4.1
    no_repeat_ngram_size n  an id that would complete n ids that came before is banned      Paulus et al. 2017, 2.5
    bad_words_ids           an id that would complete one of these sequences is banned
    min_length, min_new_tokens, forced_eos_token_id, suppress_tokens, begin_suppress_tokens: `sequence.py`
    greedy                  the largest z, the first of equals                               no further settings
    temperature T           z / T
    top_k                   only ids whose z is not below the k-th largest stay              Fan et al. 2018, 5
    top_p                   of those, the likeliest stay until their probabilities reach it  Holtzman et al. 2020, 3.1
    min_p                   of those, the ones at least min_p times as likely as the first   Nguyen et al. 2024, 3
    typical_p               of those, the ones whose -log p is nearest to the entropy stay   Meister et al. 2022, 4
                            until their probabilities reach it
    epsilon_cutoff e        of those, the ones with p >= e                                   Hewitt et al. 2022, 4
    eta_cutoff e            of those, the ones with p >= min(e, sqrt(e) exp(-entropy))       Hewitt et al. 2022, 4
    draw                    one id, by the probabilities of what is left

p are the probabilities among what the filters before have left; the likeliest always stays in the last two.  What
comes before greedy changes a copy of the logits; the filters work on the few ids that can be left, found without
sorting the vocabulary: the k-th largest of groups' maxima is a lower bound of the k-th largest logit.
"""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from ..errors import ConfigError, DataError, NonFiniteError

__all__ = [
    "ban_repeated_ngrams",
    "ban_words",
    "candidates",
    "draw",
    "log_probabilities",
    "penalise_repetition",
    "sample",
]

GROUP = 64  # logits of which one maximum is taken
FIRST_LIKELY = 256  # candidates that top_p looks at first; eight times as many when they do not reach it


# -- changing logits -----------------------------------------------------------------------------


def penalise_repetition(z: np.ndarray, ids: np.ndarray, penalty: float) -> None:
    """Make the ids (T,) that have occurred less likely (penalty > 1) in z (V,) float, in place."""
    marks = np.zeros(z.size, bool)
    marks[ids] = True
    seen = np.flatnonzero(marks)
    some = z[seen]
    factor = z.dtype.type(penalty)
    z[seen] = np.where(some < 0, some * factor, some / factor)


def ban_repeated_ngrams(z: np.ndarray, ids: np.ndarray, size: int) -> None:
    """Set z (V,) to -inf, in place, for each id that would repeat `size` ids that follow each other in ids (T,)."""
    if len(ids) < size:
        return
    starts = len(ids) - size + 1
    last = ids[len(ids) - size + 1 :]  # the size - 1 ids before the next one
    same = np.ones(starts, bool)
    for i, token in enumerate(last):
        same &= ids[i : i + starts] == token
    z[ids[size - 1 :][same]] = -np.inf


def ban_words(z: np.ndarray, ids: np.ndarray, words: Iterable[tuple[int, ...]]) -> None:
    """Set z (V,) to -inf, in place, for each id that would complete one of `words`, begun at the end of ids (T,)."""
    for *begin, last in words:
        if len(begin) <= len(ids) and ids[len(ids) - len(begin) :].tolist() == begin:
            z[last] = -np.inf


# -- what may be drawn ---------------------------------------------------------------------------


def _not_below(z: np.ndarray, count: int) -> np.ndarray:
    """Return the ids, ascending, whose z is not below the count-th largest of z (V,)."""
    if count >= z.size:
        return np.arange(z.size)
    groups = z.size // GROUP
    if groups >= 2 * count:
        # `count` groups have a maximum that is not below this, so as many elements are not: none of them is lost.
        largest = z[: groups * GROUP].reshape(GROUP, groups).max(0)
        few = np.flatnonzero(z >= np.partition(largest, -count)[-count])
    else:
        few = np.arange(z.size)
    threshold = np.partition(z[few], -count)[-count]
    return few[z[few] >= threshold]


def _ordered(z: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Return ids (ascending) with the likeliest first; equal logits by id."""
    return ids[np.argsort(-z[ids], kind="stable")]


def candidates(
    z: np.ndarray,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    typical_p: float = 1.0,
    epsilon_cutoff: float = 0.0,
    eta_cutoff: float = 0.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids (n,) that may be drawn, n >= 1, and their probabilities (n,) float64, for logits z (V,).

    With top_k or top_p the likeliest id is first; temperature is above zero.  DataError if every id is banned.
    """
    best = float(z.max())
    if best == -math.inf:
        raise DataError(
            "every token is banned; loosen no_repeat_ngram_size, bad_words_ids, suppress_tokens or min_new_tokens"
        )
    total = None
    if top_k:
        ids = _ordered(z, _not_below(z, top_k))
    elif top_p < 1:
        ids, total = _likeliest(z, best, temperature, top_p)
    elif min_p > 0:
        ids = np.flatnonzero(z >= best + temperature * math.log(min_p) - 1e-3 * temperature)  # decided below
    else:
        ids = np.arange(z.size)
    p = np.exp((z[ids].astype(np.float64) - best) / temperature)
    if top_p < 1:
        before = np.cumsum(p) - p  # of all likelier ids
        keep = before < top_p * (p.sum() if total is None else total)
        ids, p = ids[keep], p[keep]
    if min_p > 0:
        keep = p >= min_p  # p of the likeliest is 1 here
        ids, p = ids[keep], p[keep]
    if len(ids) > 1 and p.min() == 0:
        ids, p = ids[p > 0], p[p > 0]
    p = p / p.sum()
    if typical_p < 1:
        ids, p = _kept(ids, p, _typical(p, typical_p))
    if epsilon_cutoff > 0:
        ids, p = _kept(ids, p, p >= epsilon_cutoff)
    if eta_cutoff > 0:
        ids, p = _kept(ids, p, p >= min(eta_cutoff, math.sqrt(eta_cutoff) * math.exp((p * np.log(p)).sum())))
    return ids, p


def _kept(ids: np.ndarray, p: np.ndarray, keep: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids to keep, or the likeliest if there are none, and their probabilities."""
    if not keep.any():
        keep = p == p.max()
    return ids[keep], p[keep] / p[keep].sum()


def _typical(p: np.ndarray, mass: float) -> np.ndarray:
    """Return which of the probabilities p (n,), all above 0, are nearest to the entropy and together reach `mass`."""
    surprise = -np.log(p)
    distance = np.abs(surprise - (p * surprise).sum())
    order = np.argsort(distance, kind="stable")
    count = int((np.cumsum(p[order]) < mass).sum())
    return np.asarray(distance <= distance[order[min(count, len(p) - 1)]])


def _likeliest(z: np.ndarray, best: float, temperature: float, top_p: float) -> tuple[np.ndarray, float]:
    """Return ids, likeliest first, whose probabilities together reach top_p, and the sum of exp over all of z."""
    weights = np.exp((z - z.dtype.type(best)) / z.dtype.type(temperature))
    total, count = float(weights.sum(dtype=np.float64)), FIRST_LIKELY
    while True:
        ids = _not_below(z, count)
        if len(ids) == z.size or weights[ids].sum(dtype=np.float64) >= (top_p + 1e-6) * total:
            return _ordered(z, ids), total
        count *= 8


def draw(ids: np.ndarray, p: np.ndarray, rng: np.random.Generator) -> int:
    """Return one of ids (n,), by their probabilities p (n,): one number of the generator, whatever n."""
    edges = np.cumsum(p)
    return int(ids[min(np.searchsorted(edges, rng.random() * edges[-1], side="right"), len(ids) - 1)])


# -- one token -----------------------------------------------------------------------------------


def check_finite(z: np.ndarray) -> None:
    """Raise NonFiniteError for logits among which there is NaN or +infinity."""
    if not math.isfinite(z.max()):
        raise NonFiniteError("the model's logits are not finite; load an earlier checkpoint")


def sample(
    logits: np.ndarray,
    rng: np.random.Generator,
    *,
    temperature: float = 0.7,
    top_k: int = 40,
    top_p: float = 0.9,
    min_p: float = 0.0,
    typical_p: float = 1.0,
    epsilon_cutoff: float = 0.0,
    eta_cutoff: float = 0.0,
) -> int:
    """Return an id drawn from logits (V,); ConfigError for settings out of range, NonFiniteError for NaN logits."""
    filters: dict[str, Any] = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "typical_p": typical_p,
        "epsilon_cutoff": epsilon_cutoff,
        "eta_cutoff": eta_cutoff,
    }
    for name, value, holds, rule in sampling_rules(**filters):
        if not holds:
            raise ConfigError(f"{name} ({value}) must {rule}")
    z = np.asarray(logits)
    check_finite(z)
    if temperature == 0:
        return int(z.argmax())
    return draw(*candidates(z, **filters), rng)


def sampling_rules(
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    typical_p: float,
    epsilon_cutoff: float,
    eta_cutoff: float,
) -> tuple[tuple[str, float, bool, str], ...]:
    """Return (setting, value, whether it keeps its rule, rule and remedy)."""
    warm = math.isfinite(temperature) and temperature >= 0
    return (
        ("temperature", temperature, warm, "be zero or more; use 0 for the likeliest token always"),
        ("top_k", top_k, top_k >= 0, "be zero or more; use 0 to keep all tokens"),
        ("top_p", top_p, 0 < top_p <= 1, "be above 0 and at most 1; use 1 to keep all tokens"),
        ("min_p", min_p, 0 <= min_p <= 1, "be at least 0 and at most 1; use 0 to keep all tokens"),
        ("typical_p", typical_p, 0 < typical_p <= 1, "be above 0 and at most 1; use 1 to keep all tokens"),
        ("epsilon_cutoff", epsilon_cutoff, 0 <= epsilon_cutoff < 1, "be at least 0 and below 1; use 0 to keep all"),
        ("eta_cutoff", eta_cutoff, 0 <= eta_cutoff < 1, "be at least 0 and below 1; use 0 to keep all"),
    )


def log_probabilities(logits: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Return log softmax(logits)[ids], float64, for logits (V,): what the model says before any setting."""
    best = logits.max()
    total = np.exp(logits - best).sum(dtype=np.float64)
    return logits[ids].astype(np.float64) - float(best) - math.log(total)
