"""Loss scaling for fp16: keep small gradients from vanishing in halves, and large ones from staying infinite.

A half (IEEE binary16) has 11 bits of significand and reaches from 2^-24 to 65 504; what is smaller becomes zero, what
is larger infinite.  So the gradient of S times the loss is computed, and divided by S before it is used
(Micikevicius et al. 2018, "Mixed Precision Training", section 3.2).  S follows the gradients:

    not all finite               S <- max(S backoff_factor, min_scale), and the update is dropped
    finite, `growth_interval`    S <- min(S growth_factor, max_scale)
    times in a row

Scales and factors are powers of two, so that neither the multiplication nor the division rounds.

The loss that S multiplies is the mean over a micro-batch, as in the ABI and in PyTorch.  The trainer computes gradients
of sums, so it multiplies them by `gradient_factor`, S / n with n the labels of a full micro-batch.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..config import ON, Config, LlmTrainingConfig, Precision, check_loss_scaling, opt
from ..reprs import Shown

__all__ = [
    "LossScaler",
    "LossScalerStats",
    "MixedPrecisionConfig",
    "fp16_to_fp32",
    "fp32_to_fp16",
    "gradient_factor",
    "scaler_for",
]


@dataclass(frozen=True, kw_only=True)
class MixedPrecisionConfig(Config):
    """How the loss is scaled; names and defaults are the ABI's."""

    enabled: bool = opt(False, "scale at all; false makes the scaler leave everything as it is")
    initial_scale: float = opt(65536.0, "scale at the beginning", acts={"enabled": ON})
    growth_factor: float = opt(2.0, "factor of the scale after growth_interval good updates", acts={"enabled": ON})
    backoff_factor: float = opt(0.5, "factor of the scale after an overflow", acts={"enabled": ON})
    min_scale: float = opt(1.0, "smallest scale", acts={"enabled": ON})
    max_scale: float = opt(2147483648.0, "largest scale", acts={"enabled": ON})
    growth_interval: int = opt(2000, "good updates in a row before the scale grows", acts={"enabled": ON})

    def validate(self) -> None:
        """Raise `ConfigError` naming field, value, rule and remedy."""
        scales = ("initial_scale", "min_scale", "max_scale")
        check_loss_scaling(self, *scales, "growth_factor", "backoff_factor", "growth_interval")


@dataclass(frozen=True, kw_only=True)
class LossScalerStats(Shown):
    """Figures of a `LossScaler`."""

    current_scale: float
    overflow_count: int
    steps_since_overflow: int


class LossScaler(Shown):
    """The scale, and the rule by which it follows the gradients.

    A loop of your own is `compute_loss(..., backward=True, loss_scale=scaler.get_scale())`, or `scale_loss` on a loss
    that you differentiate yourself; then `unscale_gradients`, the update if that returned True, and `update`.
    Disabled, it changes nothing: the scale is 1, `unscale_gradients` returns True and `update` does nothing.
    """

    def __init__(self, config: MixedPrecisionConfig) -> None:
        """Begin at the configuration's initial scale."""
        self.config = config
        self._scale = config.initial_scale
        self._overflow_count = self._steps_since_overflow = 0

    def _says(self) -> str:
        return f"scale {self.get_scale():g}, {self._overflow_count} overflows" if self.config.enabled else "disabled"

    def get_scale(self) -> float:
        """Return the factor of the loss: 1 when disabled."""
        return self._scale if self.config.enabled else 1.0

    def scale_loss(self, loss: float) -> float:
        """Return the loss times the scale."""
        return loss * self.get_scale()

    def unscale_gradients(self, gradients: npt.NDArray[np.floating]) -> bool:
        """Divide gradients (any shape, float) by the scale in place; return whether all of them are finite.

        If one is not, all become zero.  TypeError unless it is an array of floats.
        """
        if not isinstance(gradients, np.ndarray) or not np.issubdtype(gradients.dtype, np.floating):
            kind = getattr(gradients, "dtype", type(gradients).__name__)
            raise TypeError(f"gradients ({kind}) must be an array of floats, because it is changed in place")
        if not self.config.enabled:
            return True
        wide = np.promote_types(gradients.dtype, np.float32)  # halves have no room for 1 / S
        np.multiply(gradients, wide.type(1.0 / self._scale), out=gradients, casting="same_kind")
        if np.isfinite(gradients).all():
            return True
        gradients.fill(0)
        return False

    def update(self, valid: bool) -> None:
        """Let the scale follow: `valid` says whether the gradients of this update were finite."""
        config = self.config
        if not config.enabled:
            return
        if not valid:
            self._scale = max(self._scale * config.backoff_factor, config.min_scale)
            self._overflow_count, self._steps_since_overflow = self._overflow_count + 1, 0
            return
        self._steps_since_overflow += 1
        if self._steps_since_overflow >= config.growth_interval:
            self._scale = min(self._scale * config.growth_factor, config.max_scale)
            self._steps_since_overflow = 0

    def get_stats(self) -> LossScalerStats:
        """Return the scale and the counters."""
        return LossScalerStats(
            current_scale=self.get_scale(),
            overflow_count=self._overflow_count,
            steps_since_overflow=self._steps_since_overflow,
        )

    def load(self, stats: LossScalerStats) -> None:
        """Go on from stored figures; a scale beyond the configuration's limits is brought to the nearer one."""
        self._scale = min(max(stats.current_scale, self.config.min_scale), self.config.max_scale)
        self._overflow_count, self._steps_since_overflow = stats.overflow_count, stats.steps_since_overflow


def scaler_for(config: LlmTrainingConfig) -> LossScaler:
    """Return the scaler of a training: enabled for fp16, and only there."""
    return LossScaler(
        MixedPrecisionConfig(
            enabled=config.mixed_precision is Precision.FP16,
            initial_scale=config.initial_loss_scale,
            growth_factor=config.loss_scale_growth_factor,
            backoff_factor=config.loss_scale_backoff_factor,
            min_scale=config.min_loss_scale,
            max_scale=config.max_loss_scale,
            growth_interval=config.loss_scale_growth_interval,
        )
    )


def gradient_factor(scaler: LossScaler, config: LlmTrainingConfig) -> float:
    """Return the factor of the gradient of summed losses; 1 unless the scaler is enabled.

    n is brought down to a power of two, so that S / n is one as well.
    """
    if not scaler.config.enabled:
        return 1.0
    n = config.batch_size * config.max_seq_len
    return scaler.get_scale() / (1 << n.bit_length() - 1)


def fp32_to_fp16(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float16]:
    """Return float32 x rounded to halves, to nearest even; from 65 520 on that is infinity.  TypeError otherwise."""
    _check_dtype(x, np.dtype(np.float32))
    with np.errstate(over="ignore", under="ignore"):  # both are what is asked for
        return x.astype(np.float16)


def fp16_to_fp32(x: npt.NDArray[np.float16]) -> npt.NDArray[np.float32]:
    """Return halves x as float32; every half is one exactly.  TypeError for another dtype."""
    _check_dtype(x, np.dtype(np.float16))
    return x.astype(np.float32)


def _check_dtype(x: Any, wanted: np.dtype[Any]) -> None:
    if not isinstance(x, np.ndarray) or x.dtype != wanted:
        found = getattr(x, "dtype", type(x).__name__)
        raise TypeError(f"x ({found}) must be a {wanted} array; np.asarray(x, np.{wanted}) makes one")
