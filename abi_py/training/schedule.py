"""Learning-rate schedules: the rate of an update as a function of how many updates were done before it.

s = updates done so far, s0 = schedule_start, W = warmup_steps, D = decay_steps, b = learning_rate, m its minimum

    s - s0 < W             b (s - s0 + 1) / W       warm-up of every schedule; its first update has a rate above zero

and then, with u = s - s0 - W and p = min(1, u / (D - W)):

    constant               b
    cosine, warmup_cosine  m + (b - m) (1 + cos(pi p)) / 2             falls once; stays at m from s = s0 + D on
    linear                 b (1 - p) + m p
    polynomial             m + (b - m) (1 - p)^0.9
    step                   max(m, b 0.1^floor(u / D))
    cosine_warm_restarts   m + (b - m) (1 + cos(pi t / L)) / 2         t = place in the cycle, L = D, 2 D, 4 D, ...
    wsd                    b until step D - L of the schedule, and then, with q = min(1, (s - s0 - (D - L)) / L):
                           b (1 - q) + m q  (linear),  or  m + (b - m) (1 - sqrt q)  (1-sqrt)

`cosine` and `warmup_cosine` differ in their default of W alone: 0 and 100.  L, the cooldown of `wsd`, has
cooldown_steps, or the share cooldown_share of D - W, at least 1.  The decay lasts from the end of the warm-up to step
D, as in transformers; of `step` and `cosine_warm_restarts`, D is the period, counted from the warm-up's end.
The first updates of a warm-up may be below m, which is where the schedules end.  A skipped update (NaN guard) is not
counted in s.  Everything is float64.

Sources: cosine and warm restarts from Loshchilov & Hutter 2017 (arXiv:1608.03983), section 3; power 0.9 is the ABI's;
wsd from Hu et al. 2024 (MiniCPM, arXiv:2404.06395), section 4, its 1-sqrt from Hägele et al. 2024 (arXiv:2405.18392).
"""

import math

from ..config import CooldownShape, LearningRateSchedule, LlmTrainingConfig
from ..errors import ConfigError
from ..fields import in_words

__all__ = ["check_own_schedule", "cooldown_start", "ends", "learning_rate", "restarted", "stretched"]

POWER = 0.9  # of polynomial decay
STEP_FACTOR = 0.1  # of the step schedule
PERIODIC = (LearningRateSchedule.STEP, LearningRateSchedule.COSINE_WARM_RESTARTS)
COSINES = (LearningRateSchedule.COSINE, LearningRateSchedule.WARMUP_COSINE)


def learning_rate(config: LlmTrainingConfig, step: int) -> float:
    """Return the learning rate of the update that follows `step` finished updates (0 for the first one)."""
    base, least, schedule = config.learning_rate, config.min_learning_rate, config.lr_schedule
    warmup, decay = config.warmup_steps, config.decay_steps
    since = max(0, step - config.schedule_start)
    if since < warmup:
        return base * (since + 1) / warmup
    if schedule is LearningRateSchedule.CONSTANT:
        return base
    if schedule is LearningRateSchedule.WSD:
        length = _cooldown(config)
        q = min(1.0, max(0, since - (decay - length)) / length)
        if config.cooldown_shape is CooldownShape.LINEAR:
            return base * (1 - q) + least * q
        return least + (base - least) * (1 - math.sqrt(q)) if q > 0 else base  # the sum would round
    since -= warmup
    if schedule is LearningRateSchedule.STEP:
        return max(least, base * STEP_FACTOR ** (since // decay))
    if schedule is LearningRateSchedule.COSINE_WARM_RESTARTS:
        # Cycle k has length D 2^k and starts at D (2^k - 1), so k = floor(log2(u / D + 1)), in whole numbers.
        cycle = (since // decay + 1).bit_length() - 1
        start, length = decay * (2**cycle - 1), decay * 2**cycle
        return _cosine(base, least, (since - start) / length)
    p = min(1.0, since / (decay - warmup)) if decay > warmup else 1.0  # a decay without length is over at once
    if schedule in COSINES:
        return _cosine(base, least, p)
    if schedule is LearningRateSchedule.LINEAR:
        return base * (1 - p) + least * p
    return least + (base - least) * (1 - p) ** POWER


def check_own_schedule(config: LlmTrainingConfig) -> None:
    """Raise ConfigError for a setting that has no effect beside a schedule that the user gives as a function."""
    usual = LlmTrainingConfig()
    names = ("lr_schedule", "warmup_steps", "decay_steps", "min_learning_rate", "schedule_start")
    for name in (*names, "cooldown_share", "cooldown_steps", "cooldown_shape"):
        if getattr(config, name) != getattr(usual, name):
            raise ConfigError(
                f"{name} ({in_words(getattr(config, name))}) has no effect beside a schedule of your own; leave it out"
            )


def _cosine(base: float, least: float, progress: float) -> float:
    return least + (base - least) * 0.5 * (1.0 + math.cos(math.pi * progress))


def _cooldown(config: LlmTrainingConfig) -> int:
    """Return the number of steps in which wsd decays."""
    after = config.decay_steps - config.warmup_steps
    return config.cooldown_steps or max(1, round(config.cooldown_share * after))


def cooldown_start(config: LlmTrainingConfig) -> int:
    """Return how many updates are done when the rate of wsd begins to fall; before, its end may still be moved."""
    return config.schedule_start + config.decay_steps - _cooldown(config)


def ends(config: LlmTrainingConfig) -> bool:
    """Return whether a schedule falls to its minimum and stays there, from schedule_start + decay_steps on."""
    return config.lr_schedule not in (*PERIODIC, LearningRateSchedule.CONSTANT)


def stretched(config: LlmTrainingConfig, planned: int, total: int) -> LlmTrainingConfig:
    """Return the configuration whose schedule has the same shape over `total` steps as now over `planned`.

    A decay ends with the run; a period grows in the ratio of the two.  The warm-up keeps its length.  ConfigError for a
    constant rate, which has nothing to stretch.
    """
    if config.lr_schedule is LearningRateSchedule.CONSTANT:
        raise ConfigError("schedule (stretch) must not be chosen with lr_schedule constant; its rate stays as it is")
    length = total - config.schedule_start
    if config.lr_schedule in PERIODIC:
        length = round(config.decay_steps * total / planned)
    return config.replace(decay_steps=max(length, 1, config.warmup_steps))


def restarted(
    config: LlmTrainingConfig, step: int, total: int, *, warmup: int | None = None, decay: int | None = None
) -> LlmTrainingConfig:
    """Return the configuration whose schedule begins anew at `step` and ends at `total`.

    The warm-up has `warmup` steps; None takes as many as now, but at most a twentieth of what is left.  None for
    `decay` lets the decay end with the run.  ConfigError where nothing would change: a constant rate without warm-up.
    """
    left = max(1, total - step)
    if warmup is None:
        warmup = min(config.warmup_steps, left // 20)
    if config.lr_schedule is LearningRateSchedule.CONSTANT:
        if warmup == 0:
            raise ConfigError(
                "schedule (restart) must come with warmup_steps above 0 for lr_schedule constant; give --warmup-steps"
            )
        return config.replace(schedule_start=step, warmup_steps=warmup)
    return config.replace(schedule_start=step, warmup_steps=warmup, decay_steps=left if decay is None else decay)
