"""The learning-rate schedule of a run that begins or goes on: where it ends, and what becomes of it."""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..config import LearningRateSchedule, LlmTrainingConfig
from ..errors import ConfigError
from ..training.schedule import cooldown_start, ends, learning_rate, restarted, stretched
from .opening import RunData
from .run import count_steps

__all__ = ["Reschedule", "note_on_schedule"]


def _ends_apart(config: LlmTrainingConfig, total: int) -> str:
    return f"the schedule ends at step {config.schedule_start + config.decay_steps} (decay_steps), the run at {total}"


def _at_minimum(config: LlmTrainingConfig) -> str:
    return f"between them the rate is its minimum, {config.min_learning_rate:.3g}"


def note_on_schedule(config: LlmTrainingConfig, total: int) -> str | None:
    """Return what to say where the decay, given by a flag or a file, and the run do not end together, else None."""
    end = config.schedule_start + config.decay_steps
    if not ends(config) or end == total:
        return None
    what = _at_minimum(config)
    if end > total:
        what = f"the last rate is {learning_rate(config, total - 1):.3g}, not {config.min_learning_rate:.3g}"
    return f"{_ends_apart(config, total)}: {what}; --decay-steps {total - config.schedule_start} ends both together"


@dataclass(frozen=True)
class Reschedule:
    """What becomes of the learning-rate schedule: what was asked for, and what the run had before."""

    choice: str | None
    before: LlmTrainingConfig
    given: Mapping[str, Any]  # flags of the section

    def apply(self, config: LlmTrainingConfig, step: int, data: RunData) -> LlmTrainingConfig:
        """Return the training with the schedule that was chosen, at `step`; ConfigError if the choice has no effect."""
        total = count_steps(config, data)[1]
        planned = count_steps(self.before, data)[1]
        if self.choice is None and self._is_stable(config, step, planned):
            return stretched(config, planned, total)
        if self.choice == "stretch":
            if "decay_steps" in self.given:
                raise ConfigError("schedule (stretch) works out decay_steps; leave one of the two flags out")
            return stretched(config, planned, total)
        if self.choice == "restart":
            lengths = {"warmup": self.given.get("warmup_steps"), "decay": self.given.get("decay_steps")}
            return restarted(config, step, total, **lengths)
        if step < config.schedule_start:
            raise ConfigError(
                f"schedule must be given: the run began its schedule anew at step {config.schedule_start}, after this "
                f"checkpoint (step {step}); --schedule restart begins it here"
            )
        return config

    def _is_stable(self, config: LlmTrainingConfig, step: int, planned: int) -> bool:
        """Say whether the end of a wsd schedule is still open: it was that of the run, and the cooldown has not begun.

        Then it moves with the run's end, as if that had been planned from the beginning.
        """
        before, wsd = self.before, LearningRateSchedule.WSD
        if not before.lr_schedule is config.lr_schedule is wsd or "decay_steps" in self.given:
            return False
        return step <= cooldown_start(before) and before.schedule_start + before.decay_steps == planned

    def describe(self, config: LlmTrainingConfig, step: int, data: RunData) -> list[tuple[str, str]]:
        """Return lines that tell the rate of the steps to come, and the other choices where it is the minimum."""
        total = count_steps(config, data)[1]
        peak = config.schedule_start + max(1, config.warmup_steps) - 1
        falls = [cooldown_start(config)] if config.lr_schedule is LearningRateSchedule.WSD else []
        places = sorted({step, *(max(step, min(place, total - 1)) for place in (peak, *falls, total - 1))})
        lines = [("rate", ", ".join(f"{learning_rate(config, place):.3g} at step {place + 1}" for place in places))]
        end = config.schedule_start + config.decay_steps
        if falls and falls != [cooldown_start(self.before)] and falls[0] < step < end:
            began = f"the cooldown to step {end} begins at step {falls[0]}, before this checkpoint (step {step})"
            lines.append(("note", f"{began}: the rate falls at once; --cooldown-steps {end - step} begins it here"))
        if not ends(config) or total <= end or self.choice == "continue":
            return lines
        higher = [f"stretch ({learning_rate(stretched(config, total, total), step):.3g} at step {step + 1})"]
        with contextlib.suppress(ConfigError):  # what is left may be too short for a cooldown of so many steps
            anew = restarted(config, step, total)
            higher.append(f"restart ({anew.learning_rate:.3g} at step {step + max(1, anew.warmup_steps)})")
        text = f"{_ends_apart(config, total)}: {_at_minimum(config)}; for more: --schedule {' or '.join(higher)}"
        return [*lines, ("note", text)]
