"""Which conversations of a run are kept for evaluation, and what each part of them can show.

    told    all answers of the conversation are, word for word, in the training part as well: it shows whether a
            question that is asked in other words is recognised
    new     an answer that no training row has: it shows what the model makes of what it was never told

A figure of one says nothing about the other, so both are reported, each by its name.
"""

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..errors import DataError
from .conversation import Conversation

__all__ = ["AGAIN", "PARTS", "Holdout", "hold_out", "told_and_new"]

PARTS = {"told": "answers told, asked anew", "new": "answers never told"}  # the words of tables for them

AGAIN = "again"  # category of the package's own rows that ask in other words what another row answers


@dataclass(frozen=True)
class Holdout:
    """A division of conversations by their numbers, each part in the order in which it came.

    train  those to train on       told  kept; all of their answers are told in training       new  kept, and are not
    """

    train: tuple[int, ...]
    told: tuple[int, ...]
    new: tuple[int, ...]

    @property
    def kept(self) -> tuple[int, ...]:
        """All that is not trained on."""
        return self.told + self.new


def hold_out(rows: Sequence[Conversation], share: float, *, again: bool, name: str) -> Holdout:
    """Keep the share of the rows for evaluation, rounded up: the last ones, which are as mixed as all.

    With `again`, half of them are rows of the category "again" whose answer stays in the training part, and the others
    are new in content: with such a row all rows of the same answers are kept.  DataError if there is only one row.
    """
    if share == 0:
        return Holdout(tuple(range(len(rows))), (), ())
    if len(rows) < 2:
        raise DataError(f"{name}: one conversation cannot be split; give more, or --valid-fraction 0")
    count = min(len(rows) - 1, math.ceil(round(share * len(rows), 9)))
    kept = _both_parts(rows, count) if again else set(range(len(rows) - count, len(rows)))
    train = [i for i in range(len(rows)) if i not in kept]
    told, new = told_and_new([rows[i] for i in train], rows, sorted(kept))
    return Holdout(tuple(train), told, new)


def told_and_new(
    train: Iterable[Conversation], rows: Sequence[Conversation], numbers: Iterable[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Divide some of the rows by whether all of their answers are told in `train`."""
    known = {answer for row in train for answer in _answers(row)}
    told: list[int] = []
    new: list[int] = []
    for i in numbers:
        (told if known.issuperset(_answers(rows[i])) else new).append(i)
    return tuple(told), tuple(new)


def _both_parts(rows: Sequence[Conversation], count: int) -> set[int]:
    same: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        same[_answers(row)].append(i)
    kept: set[int] = set()
    for i in reversed(range(len(rows))):
        group = same[_answers(rows[i])]
        if rows[i].category != AGAIN and len(kept) + len(group) <= count - count // 2:
            kept.update(group)
    rest = sorted(set(range(len(rows))) - kept, key=lambda i: rows[i].category == AGAIN)  # stable: those at the end
    kept.update(rest[len(rest) - (count - len(kept)) :])
    return kept


def _answers(row: Conversation) -> tuple[str, ...]:
    """Return what is told in a row, calls of tools among it; of plain text, the text."""
    answers = [turn for turn in row.to_dicts() if turn["role"] == "assistant"]
    return tuple(json.dumps(turn, sort_keys=True) for turn in answers) or (row.text or "",)
