"""What an optimizer remembers, by name, and of which weights.

    sgd            m (P,) with momentum; nothing without
    adam, adamw    m and v (P,)
    muon           m (P,), and v for what is no hidden matrix and so is adamw's
    adamw_8bit     m_codes, v_codes (S, 256) uint8 and m_scales, v_scales (S,) of large tensors, in blocks of 256;
                   m and v of the others, which are adamw's: small ones and embeddings

All but codes is float32.  P counts the weights, or those that a moment is kept of; S the blocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..config import LlmTrainingConfig, OptimizerType
from ..kernels.adamw_8bit import SHARING, blocks_of
from ..parameters import Tensor

__all__ = ["MOMENTS", "Kept", "coded_of", "matrices_of", "moments_of", "ranges_of", "setting_that_differs", "without"]

SMALLEST_CODED = 4096  # numbers; bitsandbytes' min_8bit_size: below, codes save little, and such tensors are sensitive
MOMENTS = "m", "v", "m_codes", "m_scales", "v_codes", "v_scales"


@dataclass(frozen=True)
class Kept:
    """Shape and type of an array that an optimizer keeps."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of it."""
        return int(np.prod(self.shape)) * self.dtype.itemsize


def matrices_of(table: Sequence[Tensor], config: LlmTrainingConfig) -> list[Tensor]:
    """Return the tensors that muon takes: hidden matrices, and stacks of them; none with another optimizer."""
    return [entry for entry in table if entry.hidden and config.optimizer is OptimizerType.MUON]


def coded_of(table: Sequence[Tensor], config: LlmTrainingConfig) -> list[Tensor]:
    """Return the tensors whose moments adamw_8bit keeps in 8 bits; none with another optimizer.

    Embeddings are none of them, as in bitsandbytes: most of their rows have no gradient in a step (Dettmers et al.
    2022, section 2.3).
    """
    if config.optimizer is not OptimizerType.ADAMW_8BIT:
        return []
    return [entry for entry in table if entry.size >= SMALLEST_CODED and not entry.embedding]


def without(table: Sequence[Tensor], taken: Sequence[Tensor]) -> list[slice]:
    """Return the ranges of the flat buffer without the tensors `taken`, neighbours together."""
    ranges: list[slice] = []
    names = {entry.name for entry in taken}
    for entry in table:
        if entry.name in names:
            continue
        joins = ranges and ranges[-1].stop == entry.offset
        start = ranges.pop().start if joins else entry.offset
        ranges.append(slice(start, entry.offset + entry.size))
    return ranges


def ranges_of(table: Sequence[Tensor], config: LlmTrainingConfig) -> dict[str, list[slice]]:
    """Return the moments of which there is a float32 number for each weight, with the ranges of the flat buffer."""
    if config.optimizer is OptimizerType.SGD:
        return {"m": without(table, ())} if config.momentum > 0 else {}
    coded = coded_of(table, config)
    return {"m": without(table, coded), "v": without(table, [*coded, *matrices_of(table, config)])}


def moments_of(table: Sequence[Tensor], config: LlmTrainingConfig) -> dict[str, Kept]:
    """Return all arrays that an optimizer keeps, by name."""
    numbers = np.dtype(np.float32)
    ranges = ranges_of(table, config).items()
    kept = {name: Kept((sum(each.stop - each.start for each in found),), numbers) for name, found in ranges}
    if config.optimizer is OptimizerType.ADAMW_8BIT:
        blocks = sum(blocks_of(entry.size) for entry in coded_of(table, config))
        for name in ("m", "v"):
            kept[f"{name}_codes"] = Kept((blocks, SHARING), np.dtype(np.uint8))
            kept[f"{name}_scales"] = Kept((blocks,), numbers)
    return kept


def setting_that_differs(one: LlmTrainingConfig, other: LlmTrainingConfig) -> str | None:
    """Return the name of the setting by which two optimizers keep other moments, of whatever model; None: the same."""
    if one.optimizer is not other.optimizer:
        alike = {one.optimizer, other.optimizer} == {OptimizerType.ADAM, OptimizerType.ADAMW}
        return None if alike else "optimizer"
    with_m = one.momentum > 0, other.momentum > 0
    return "momentum" if one.optimizer is OptimizerType.SGD and with_m[0] != with_m[1] else None
