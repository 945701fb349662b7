"""Memory that gradients lend to activations: the activations of a step lie where its gradients will be written.

The first micro-batch of a window overwrites the gradients that a branch names in `overwritten`, its matrices', and does
not add to them, so until its backward pass has come to the branch, nobody reads what their memory holds.  Backward goes
through the branches in reverse.  So what a branch has saved is read for the last time before a branch *below* it writes
its gradients, and may lie there.

    step        ... branch 2 writes its saved arrays, some of them in the gradients of branches 0 and 1 ...
                ... branch 2 reads them in backward; then branch 1 writes its gradients over them ...

All other gradients are added to: they are filled with 0 when backward begins, while saved arrays are still to be read,
so they lend nothing.  Later micro-batches of a window add to the gradients; they need arrays of their own.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ..kernels.engine.scratch import whole_lines
from ..parameters import Tensor
from .layers.layer import Branch

__all__ = ["Piece", "lay_out", "lent_ranges"]

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Piece:
    """An array to be saved: how many floats of memory it takes, and the first branch in the list that uses it."""

    floats: int
    first: int


def lent_ranges(table: Sequence[Tensor], branches: Sequence[Branch]) -> list[list[slice]]:
    """Return of each branch the ranges of the flat buffer that it lends: what it overwrites, neighbours together.

    `table` is that of the buffer; what is not in it is frozen and has no gradient.
    """
    places = {tensor.name: tensor.slice for tensor in table}
    lent: list[list[slice]] = []
    for branch in branches:
        ranges: list[slice] = []
        lends = (places[name] for name in branch.overwritten() if name in places)
        for place in sorted(lends, key=lambda each: each.start):
            joins = ranges and ranges[-1].stop == place.start
            ranges.append(slice(ranges.pop().start if joins else place.start, place.stop))
        lent.append(ranges)
    return lent


def lay_out(pieces: Mapping[Key, Piece], lent: Sequence[Sequence[slice]]) -> dict[Key, slice]:
    """Return where in the flat buffer pieces lie; those that find no room are left out.  All begin at cache lines.

    What few pieces may use is given away first: the gradients of the uppermost branch that lends, then those below.
    """
    laid: dict[Key, slice] = {}
    largest = sorted(pieces.items(), key=lambda item: -item[1].floats)
    for branch in reversed(range(len(lent))):
        for room in lent[branch]:
            start = whole_lines(room.start)
            for key, piece in largest:
                if key not in laid and piece.first > branch and 0 < piece.floats <= room.stop - start:
                    laid[key] = slice(start, start + piece.floats)
                    start = whole_lines(start + piece.floats)
    return laid
