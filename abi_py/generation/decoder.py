"""The forward pass for decoding: new tokens only, over a cache of the keys and values of all earlier ones.

    prefill   the ids of one sequence, as rows; whole samples through `attention_forward`
    step      one id for each of several sequences, as rows; through `cached_attention_forward`

Both give the logits of the next token.  The kernels are those of training but for that one, and so is their order
(`model/block.py`); nothing is kept for a backward pass, so one set of arrays serves all layers.

A sequence is computed by itself when it is read, and at most FEW rows go through a step together: kernels give a row
the same bits whatever is beside it, so a prompt in a batch has the logits that it has alone.
"""

from types import SimpleNamespace
from typing import Any

import numba
import numpy as np

from ..errors import DataError
from ..kernels.matmul import FEW
from ..kernels.unchecked import (
    attention_forward,
    cache_append,
    cached_attention_forward,
    embedding_forward,
    rms_norm_forward,
    rope_forward,
    streamed_product,
    swiglu_forward,
)
from ..model.inputs import Angles
from ..parameters import head_name

__all__ = ["FEW", "Cache", "Decoder"]

CHUNK = 512  # rows of a prompt that go through the wide products at once: bounds the memory of a long prompt
BYTES_OF_A_THREAD = 2 << 20  # weights that one thread reads in the time of a few kernel calls: fewer need no second
FIRST_CAPACITY = 256  # positions of a new cache


class Cache:
    """Keys and values of `slots` sequences: for each layer two arrays (slots, G, capacity, D) float32.

    G is the number of key/value heads, so grouped-query attention shrinks the cache.  `lengths[slot]` tokens are there.
    """

    def __init__(self, config: Any, slots: int) -> None:
        """Begin empty, with room for few positions."""
        self.config, self.slots = config, slots
        self.capacity = 0
        self.lengths = np.zeros(slots, np.int32)
        self.keys: list[np.ndarray] = []
        self.values: list[np.ndarray] = []

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self.keys + self.values)

    def reserve(self, positions: int) -> None:
        """Make room for so many positions in every slot, at most max_seq_len; growth doubles, so copies are rare."""
        if positions <= self.capacity:
            return
        c = self.config
        grown = max(positions, 2 * self.capacity, FIRST_CAPACITY)
        self.capacity, before = min(grown, c.max_seq_len), self.capacity
        used = int(self.lengths.max(initial=0))
        shape = self.slots, c.num_kv_heads, self.capacity, c.resolved_head_dim
        for arrays in (self.keys, self.values):
            for i in range(c.num_layers):
                grown_array = np.empty(shape, np.float32)
                if before:
                    grown_array[:, :, :used] = arrays[i][:, :, :used]
                    arrays[i] = grown_array
                else:
                    arrays.append(grown_array)


class Decoder:
    """A model's weights, read for decoding, and the cache of up to `slots` sequences.

    The weights are views: a model that is trained further is decoded as it is at that moment, but what a slot holds
    then belongs to older weights and must be read again (`clear`).  Those of a LoraModel are a merged copy, so that a
    token costs no more than without adapters; after further training, make a new Decoder.
    """

    def __init__(self, model: Any, slots: int = 1) -> None:
        """Make an empty cache; nothing is copied from a model without adapters, others are merged into a copy."""
        model = model.merged()
        self.config = model.config
        self.cache = Cache(self.config, slots)
        parameters = model.parameters
        weights, flat = parameters.weights, parameters.weights_flat
        self._embedding, self._final_norm = weights["token_embedding"], weights["final_norm"]
        self._head = weights[head_name(self.config)]
        self._layers = []
        for i in range(self.config.num_layers):
            at = f"layers.{i}."
            layer = SimpleNamespace(
                qkv=parameters.joined(flat, at + "w_q", at + "w_v"),  # (q_dim + 2 kv_dim, C)
                w_o=weights[at + "w_o"],
                attn_norm=weights[at + "attn_norm"],
                gate_up=parameters.joined(flat, at + "w_gate", at + "w_up"),  # (2F, C)
                w_down=weights[at + "w_down"],
                ffn_norm=weights[at + "ffn_norm"],
            )
            self._layers.append(layer)
        self._angles = Angles(self.config)
        self._threads = max(1, flat.nbytes // BYTES_OF_A_THREAD)
        self._few = {n: self._arrays(n, n) for n in range(1, min(slots, FEW) + 1)}
        self._logits = np.empty((slots, self.config.vocab_size), np.float32)

    def _arrays(self, rows: int, wide_rows: int) -> SimpleNamespace:
        """Return the arrays between the kernels for `rows` tokens, of which `wide_rows` pass the wide products."""
        c = self.config
        widths = {"x": c.hidden_dim, "qkv": c.q_dim + 2 * c.kv_dim, "att": c.q_dim}
        arrays = {name: np.empty((rows, width), np.float32) for name, width in widths.items()}
        wide = {"n": c.hidden_dim, "gate_up": 2 * c.intermediate_dim, "h": c.intermediate_dim}
        arrays |= {name: np.empty((wide_rows, width), np.float32) for name, width in wide.items()}
        qkv, q, kv = arrays["qkv"], c.q_dim, c.kv_dim
        return SimpleNamespace(
            **arrays,
            r=np.empty(wide_rows, np.float32),
            ids=np.empty(rows, np.int32),
            slots=np.empty(rows, np.int32),
            positions=np.empty(rows, np.int32),
            q=qkv[:, :q],
            k=qkv[:, q : q + kv],
            v=qkv[:, q + kv :],
        )

    # -- the two ways in -------------------------------------------------------------------------

    @property
    def lengths(self) -> np.ndarray:
        """Tokens that each slot holds, int32 (slots,)."""
        return self.cache.lengths

    def clear(self, slot: int, length: int = 0) -> None:
        """Forget what slot holds after its first `length` tokens."""
        self.cache.lengths[slot] = min(length, int(self.cache.lengths[slot]))

    def prefill(self, slot: int, ids: np.ndarray) -> np.ndarray:
        """Append ids (T,) to a slot and return the logits (V,) after the last: a view, valid until the next call.

        DataError for no ids, ids outside the vocabulary, or more tokens than max_seq_len.
        """
        ids = np.asarray(ids)
        self._check(ids, int(self.lengths[slot]) + ids.size)
        past = int(self.lengths[slot])
        rows = ids.size
        self.cache.reserve(past + rows)
        a = self._few[rows] if rows in self._few else self._arrays(rows, min(rows, CHUNK))
        a.ids[:], a.slots[:], a.positions[:] = ids, slot, np.arange(past, past + rows)
        starts = np.zeros(rows, np.int32) if past == 0 and rows > 1 else None
        self._run(a, starts)
        self.lengths[slot] += rows
        return self._output(a.x[-1:], a, self._logits[slot : slot + 1])[0]

    def step(self, slots: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Append ids[i] to slots[i] and return the logits (N, V): a view, valid until the next call.

        DataError for ids outside the vocabulary or a slot that holds max_seq_len tokens.
        """
        self._check(ids, int(self.lengths[slots].max()) + 1)
        self.cache.reserve(int(self.lengths[slots].max()) + 1)
        allowed = numba.get_num_threads()
        numba.set_num_threads(min(allowed, self._threads))
        try:
            for first in range(0, len(slots), FEW):
                some = slots[first : first + FEW]
                a = self._few[len(some)]
                a.ids[:], a.slots[:], a.positions[:] = ids[first : first + FEW], some, self.lengths[some]
                self._run(a, None)
                self._output(a.x, a, self._logits[first : first + len(some)])
        finally:
            numba.set_num_threads(allowed)
        self.lengths[slots] += 1
        return self._logits[: len(slots)]

    def _check(self, ids: np.ndarray, length: int) -> None:
        if ids.size == 0:
            raise DataError("there is nothing to read; give at least one token id")
        if ids.min() < 0 or ids.max() >= self.config.vocab_size:
            at = int(np.flatnonzero((ids < 0) | (ids >= self.config.vocab_size))[0])
            raise DataError(
                f"id {ids[at]} at place {at} must be 0 ... {self.config.vocab_size - 1} (vocab_size - 1); "
                "tokenize with this model's vocabulary"
            )
        if length > self.config.max_seq_len:
            raise DataError(f"{length} tokens exceed max_seq_len ({self.config.max_seq_len}); give fewer tokens")

    # -- the pass --------------------------------------------------------------------------------

    def _run(self, a: SimpleNamespace, starts: np.ndarray | None) -> None:
        """Turn a.ids into a.x, the output of the last block; `starts`: the rows are a whole sample from position 0."""
        embedding_forward(a.x, a.ids, self._embedding)
        for i, w in enumerate(self._layers):
            self._attention(a, w, i, starts)
            self._feed_forward(a, w)

    def _chunks(self, a: SimpleNamespace) -> list[tuple[slice, slice]]:
        """Return (rows of the long arrays, rows of the wide ones) piece by piece."""
        rows, wide = len(a.x), len(a.n)
        return [(slice(i, min(i + wide, rows)), slice(0, min(wide, rows - i))) for i in range(0, rows, wide)]

    def _attention(self, a: SimpleNamespace, w: SimpleNamespace, i: int, starts: np.ndarray | None) -> None:
        heads, kv_heads = self.config.num_heads, self.config.num_kv_heads
        for rows, wide in self._chunks(a):
            rms_norm_forward(a.n[wide], a.r[wide], a.x[rows], w.attn_norm, self.config.norm_eps)
            streamed_product(a.qkv[rows], a.n[wide], w.qkv)
        rope_forward(a.qkv, *self._angles.upto(self.cache.capacity), a.positions, heads + kv_heads)
        keys, values = self.cache.keys[i], self.cache.values[i]
        cache_append(keys, values, a.k, a.v, a.slots, a.positions)
        if starts is None:
            cached_attention_forward(a.att, a.q, keys, values, a.slots, a.positions)
        else:
            lse = np.empty((heads, len(starts)), np.float32)
            attention_forward(a.att, lse, a.q, a.k, a.v, starts, 1, heads, kv_heads)
        streamed_product(a.x, a.att, w.w_o, addend=a.x)

    def _feed_forward(self, a: SimpleNamespace, w: SimpleNamespace) -> None:
        for rows, wide in self._chunks(a):
            x = a.x[rows]
            rms_norm_forward(a.n[wide], a.r[wide], x, w.ffn_norm, self.config.norm_eps)
            streamed_product(a.gate_up[wide], a.n[wide], w.gate_up)
            swiglu_forward(a.h[wide], a.gate_up[wide])
            streamed_product(x, a.h[wide], w.w_down, addend=x)

    def _output(self, x: np.ndarray, a: SimpleNamespace, logits: np.ndarray) -> np.ndarray:
        """Write the logits (N, V) of the last block's output x (N, C)."""
        n, r = a.n[: len(x)], a.r[: len(x)]
        rms_norm_forward(n, r, x, self._final_norm, self.config.norm_eps)
        streamed_product(logits, n, self._head)
        return logits
