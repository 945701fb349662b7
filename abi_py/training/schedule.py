"""Learning-rate schedules: the rate of an update as a function of how many updates were done before it.

s = updates done so far, W = warmup_steps, D = decay_steps, b = learning_rate, m = min_learning_rate, p = min(1, s / D)

    constant               b
    cosine                 m + (b - m) (1 + cos(pi p)) / 2             falls once; stays at m from s = D on
    warmup_cosine          s < W:  b (s + 1) / W                       so the first update has a rate above zero
                           else    m + (b - m) (1 + cos(pi q)) / 2     q = min(1, (s - W) / (D - W))
    linear                 b (1 - p) + m p
    step                   max(m, b 0.1^floor(s / D))
    polynomial             m + (b - m) (1 - p)^0.9
    cosine_warm_restarts   m + (b - m) (1 + cos(pi t / L)) / 2         t = place in the cycle, L = D, 2 D, 4 D, ...

Warm-up belongs to warmup_cosine alone.  Its first updates may lie below m, which is where the schedules end.  A skipped
update (NaN guard) is not counted in s.  Everything is float64.

Sources: cosine and warm restarts from Loshchilov & Hutter 2017 (arXiv:1608.03983), section 3; power 0.9 is the ABI's.
"""

import math

from ..config import LearningRateSchedule, LlmTrainingConfig

__all__ = ["learning_rate"]

POWER = 0.9  # of polynomial decay
STEP_FACTOR = 0.1  # of the step schedule


def learning_rate(config: LlmTrainingConfig, step: int) -> float:
    """Return the learning rate of the update that follows `step` finished updates (0 for the first one)."""
    base, least = config.learning_rate, config.min_learning_rate
    warmup, decay = config.warmup_steps, config.decay_steps
    schedule = config.lr_schedule
    if schedule is LearningRateSchedule.CONSTANT:
        return base
    if schedule is LearningRateSchedule.WARMUP_COSINE and step < warmup:
        return base * (step + 1) / warmup
    if schedule is LearningRateSchedule.WARMUP_COSINE:
        return _cosine(base, least, _progress(step - warmup, decay - warmup))
    if schedule is LearningRateSchedule.COSINE:
        return _cosine(base, least, _progress(step, decay))
    if schedule is LearningRateSchedule.LINEAR:
        p = _progress(step, decay)
        return base * (1 - p) + least * p
    if schedule is LearningRateSchedule.STEP:
        return max(least, base * STEP_FACTOR ** (step // decay))
    if schedule is LearningRateSchedule.POLYNOMIAL:
        return least + (base - least) * (1 - _progress(step, decay)) ** POWER
    # Cycle k has length D 2^k and starts at D (2^k - 1), so k = floor(log2(s / D + 1)), in whole numbers.
    cycle = (step // decay + 1).bit_length() - 1
    start, length = decay * (2**cycle - 1), decay * 2**cycle
    return _cosine(base, least, (step - start) / length)


def _progress(done: int, length: int) -> float:
    """Return done / length within [0, 1]; a decay without length is over at once."""
    return min(1.0, max(0.0, done / length)) if length > 0 else 1.0


def _cosine(base: float, least: float, progress: float) -> float:
    return least + (base - least) * 0.5 * (1.0 + math.cos(math.pi * progress))
