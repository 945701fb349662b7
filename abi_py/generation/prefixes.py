"""What the slots of a decoder have read, so that texts that begin alike are computed once.

A conversation that goes on, prompts with the same instructions before them, several continuations of one prompt: the
keys and values of the common beginning are there already, in the slot where the new text then goes on, or in another
one from which they are copied.  What a token's keys and values are depends on it and those before it alone (see
`decoder.py`), so the result has the same bits as without.

What a slot holds stays until another text needs the slot that was used longest ago, or the memory: slots that a call
does not need go before the others are made longer.
"""

from collections.abc import Sequence as SequenceOf

import numpy as np

from .decoder import Decoder

__all__ = ["NOTHING", "Prefixes"]

NOTHING = np.empty(0, np.int32)


class Prefixes:
    """The ids that each slot holds; whoever reads or writes with the decoder says so here."""

    def __init__(self, decoder: Decoder) -> None:
        """Begin with what an empty decoder holds."""
        self.decoder = decoder
        self._held = [NOTHING] * decoder.cache.slots
        self._used = [0] * decoder.cache.slots  # when, by a clock that ticks at each text
        self._clock = 0

    def make_room(self, texts: list[np.ndarray], slots: int, positions: int, most: int) -> None:
        """Have at least so many slots for the texts, which take up to so many positions; none may be in use.

        Slots x capacity stays within `most` positions if slots x positions does.  So where slots become longer, no
        more of them stay than are needed: first those that a text begins like, then those that were used last.  And
        where so many of the present length are too many, they become shorter, and what is longer is forgotten.
        """
        cache = self.decoder.cache
        capacity = cache.capacity if slots * cache.capacity <= most else min(positions, cache.capacity)
        count = slots if positions > capacity else max(slots, cache.slots)
        if count != cache.slots or capacity != cache.capacity:
            sources = [self._source(ids) for ids in texts[:count]] if count < cache.slots else []
            begun = {slot for slot, common in sources if common}
            order = sorted(range(cache.slots), key=lambda slot: (slot in begun, self._used[slot]), reverse=True)
            kept, more = sorted(order[:count]), max(count - cache.slots, 0)
            self._held = [self._held[i] if cache.lengths[i] <= capacity else NOTHING for i in kept] + [NOTHING] * more
            self._used = [self._used[i] for i in kept] + [0] * more
            self.decoder.move(kept, count, capacity)
        cache.doubles_to = max(positions, most // count)

    def begin(self, ids: np.ndarray, free: list[int]) -> tuple[int, int]:
        """Choose one of the free slots for a text (T,); return it, and how many ids of the text it holds.

        At least one id is left to read: the logits after the last one are wanted.
        """
        source, common = self._source(ids, free)
        goes_on = common == len(self._held[source])
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

    def _source(self, ids: np.ndarray, free: SequenceOf[int] = ()) -> tuple[int, int]:
        """Return the slot that holds most of a text's beginning, a free one if there is, and how many ids that is."""
        found = [self._common(slot, ids) for slot in range(len(self._held))]
        source = max(range(len(found)), key=lambda slot: (found[slot], slot in free))
        return source, found[source]

    def _common(self, slot: int, ids: np.ndarray) -> int:
        """Return how many ids at the beginning are in a slot; none where keys depend on the length of a text."""
        held = self._held[slot]
        length = min(len(ids) - 1, len(held))
        if max(len(ids), len(held)) > self.decoder.longest_kept:
            return 0
        differ = np.flatnonzero(ids[:length] != held[:length])
        return int(differ[0]) if differ.size else length
