"""What the slots of a decoder have read, so that texts that begin alike are computed once.

A conversation that goes on, prompts with the same instructions before them, several continuations of one prompt: the
keys and values of the common beginning are there already, in the slot where the new text then goes on, or in another
one from which they are copied.  What a token's keys and values are depends on it and those before it alone (see
`decoder.py`), so the result has the same bits as without.

Memory is that of the slots, used or not: what a slot holds stays until another text needs the slot that was used
longest ago.
"""

import numpy as np

from .decoder import Decoder

__all__ = ["NOTHING", "Prefixes"]

NOTHING = np.empty(0, np.int32)


class Prefixes:
    """The ids that each slot holds; whoever reads or writes with the decoder says so here."""

    def __init__(self, decoder: Decoder) -> None:
        """Begin with what an empty decoder holds."""
        self.decoder = decoder
        self._held: list[np.ndarray] = []
        self._used: list[int] = []  # when, by a clock that ticks at each text
        self._clock = 0
        self.reserve(decoder.cache.slots)

    def reserve(self, slots: int) -> None:
        """Have at least so many slots."""
        self.decoder.reserve_slots(slots)
        more = slots - len(self._held)
        self._held += [NOTHING] * more
        self._used += [0] * more

    def begin(self, ids: np.ndarray, free: list[int]) -> tuple[int, int]:
        """Choose one of the free slots for a text (T,); return it, and how many ids of the text it holds.

        At least one id is left to read: the logits after the last one are wanted.
        """
        found = [self._common(slot, ids) for slot in range(len(self._held))]
        source = max(range(len(found)), key=lambda slot: (found[slot], slot in free))
        common, goes_on = found[source], found[source] == len(self._held[source])
        slot = source if source in free and goes_on and common else min(free, key=lambda slot: self._used[slot])
        if slot != source and common:
            self._held[slot] = NOTHING  # true, too, if Ctrl-C comes in the middle
            self.decoder.copy(source, slot, common)
        self.decoder.clear(slot, common)
        self.hold(slot, ids[:common])
        self._clock += 1
        self._used[slot] = self._used[source] = self._clock
        return slot, common

    def hold(self, slot: int, ids: np.ndarray) -> None:
        """Say what a slot holds now."""
        self._held[slot] = ids

    def _common(self, slot: int, ids: np.ndarray) -> int:
        """Return how many ids at the beginning are in a slot; none where keys depend on the length of a text."""
        held = self._held[slot]
        length = min(len(ids) - 1, len(held))
        if max(len(ids), len(held)) > self.decoder.longest_kept:
            return 0
        differ = np.flatnonzero(ids[:length] != held[:length])
        return int(differ[0]) if differ.size else length
