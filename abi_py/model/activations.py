"""The arena: every array that a step needs between its kernels, laid out once for a number of rows and then reused.

What a block's forward saves for its backward is one table, `SAVED`; gradient checkpointing is a choice of which of
its entries are kept for every layer, and which are shared between layers and computed again.  Layers are cut into
*segments*:

    none             one segment of all layers: nothing is computed again
    every_n_layers   segments of `checkpoint_interval` layers: the input of each is kept, its inside is shared by all
    full             segments of one layer: only the input of each layer is kept
    attention_only   one segment, but what attention saves (q k v, its output, lse) is shared by all layers

A step in bfloat16 saves the entries of `NARROW` in bfloat16 (as uint16), half the bytes; the residual stream, in which
a small share of a layer would be lost, stays float32.

Where linear layers have adapters (`linear.py`), the table has their inner values uᵀ as well.

Backward runs a segment's forward again unless the shared arrays still hold it, which they do for the last one.

Scratch is used again and again within a block: entries of `PLACES` share another one's place, because the one is read
for the last time before the other is written (a linear layer's backward reads its input before it writes the input's
gradient), or because a kernel turns the one into the other (SwiGLU's backward: dh into h).  The head works between the
two passes over the blocks: its scratch spans that of the blocks' (`UNDER_HEAD`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np

from ..config import CheckpointingStrategy, Precision, TrainableModelConfig
from ..kernels.cross_entropy import scratch_floats

__all__ = ["ATTENTION_ENTRIES", "NO_ADAPTERS", "AdapterWidths", "Arena", "memory_plan", "saved_bytes"]

ATTENTION_ENTRIES = ("r_attn", "qkv", "att", "lse", "u_qkv")
NARROW = ("qkv", "gate_up")
PLACES = {"hidden": "n", "dn": "n", "datt": "n", "dh": "h", "dqkv": "h"}  # entry -> whose memory
UNDER_HEAD = ("dx", "h", "dgate_up", "du", "dropped")  # side by side in the memory of the head's scratch
COLUMNS = ("lse", "delta", "u_qkv", "u_o", "u_gate_up", "u_down", "du")  # kept as (width, N): a row for each head


@dataclass(frozen=True)
class AdapterWidths:
    """How wide the inner values of a block's adapters are: the ranks of the projections of each linear layer."""

    ranks: Mapping[str, int] = field(default_factory=dict)  # qkv, o, gate_up, down -> rank; 0 if missing
    dropped: int = 0  # the widest input that dropout has to copy


NO_ADAPTERS = AdapterWidths()


def saved_table(config: TrainableModelConfig, adapters: AdapterWidths = NO_ADAPTERS) -> dict[str, int]:
    """Return the entries that a block saves: name -> floats per row (row = token)."""
    c = config.hidden_dim
    return {
        "x": c,  # input of the block
        "r_attn": 1,  # 1 / rms of x
        "qkv": config.q_dim + 2 * config.kv_dim,  # after RoPE
        "att": config.q_dim,  # attention output, before w_o
        "lse": config.num_heads,  # log-sum-exp of each query and head
        "middle": c,  # x + attention branch: input of the feed-forward branch
        "r_ffn": 1,
        "gate_up": 2 * config.intermediate_dim,
        **{f"u_{layer}": adapters.ranks.get(layer, 0) for layer in ("qkv", "o", "gate_up", "down")},
    }


def scratch_table(config: TrainableModelConfig, adapters: AdapterWidths = NO_ADAPTERS) -> dict[str, int]:
    """Return the arrays that live only inside one operation or between two: name -> floats per row."""
    c, f = config.hidden_dim, config.intermediate_dim
    return {
        "n": c,  # normed rows
        "h": f,  # silu(gate) * up
        "final": c,  # output of the last block
        "r_final": 1,
        "hidden": c,  # final norm of it: input of the head
        "dx": c,  # gradient of the residual stream
        "dn": c,
        "dh": f,
        "dgate_up": 2 * f,
        "dqkv": config.q_dim + 2 * config.kv_dim,
        "datt": config.q_dim,
        "delta": config.num_heads,
        "losses": 1,
        "du": max(adapters.ranks.values(), default=0),
        "dropped": adapters.dropped,
    }


def segment_length(config: TrainableModelConfig) -> int:
    """Return how many layers form a segment."""
    lengths = {
        CheckpointingStrategy.FULL: 1,
        CheckpointingStrategy.EVERY_N_LAYERS: min(config.checkpoint_interval, config.num_layers),
    }
    return lengths.get(config.checkpointing, config.num_layers)


def slot(config: TrainableModelConfig, layer: int, entry: str) -> int:
    """Return which of an entry's arrays a layer uses; layers with the same slot share it."""
    length = segment_length(config)
    inside = layer % length
    if entry == "x" and inside == 0:
        return layer  # kept: where recomputation starts
    if config.checkpointing is CheckpointingStrategy.ATTENTION_ONLY and entry in ATTENTION_ENTRIES:
        return 0
    return inside if entry != "x" else -inside  # inner inputs have arrays of their own, apart from the kept ones


def saved_bytes(
    config: TrainableModelConfig, rows: int, narrow: bool = False, adapters: AdapterWidths = NO_ADAPTERS
) -> int:
    """Return the bytes of saved activations for `rows` tokens; `narrow`: of a step in bfloat16."""
    layers = range(config.num_layers)
    return rows * sum(
        _dtype(entry, narrow).itemsize * width * len({slot(config, i, entry) for i in layers})
        for entry, width in saved_table(config, adapters).items()
    )


def _dtype(entry: str, narrow: bool) -> np.dtype:
    return np.dtype(np.uint16 if narrow and entry in NARROW else np.float32)


def scratch_places(
    config: TrainableModelConfig, rows: int, adapters: AdapterWidths = NO_ADAPTERS
) -> dict[str, int]:
    """Return the floats of each piece of scratch for `rows` tokens, by the entry that it is named after."""
    places: dict[str, int] = {}
    for name, width in scratch_table(config, adapters).items():
        place = PLACES.get(name, name)
        places[place] = max(places.get(place, 0), rows * width)
    return places


def head_floats(config: TrainableModelConfig, rows: int, places: Mapping[str, int]) -> int:
    """Return the floats of the head's scratch, with all that is under it."""
    needed = scratch_floats(rows, config.vocab_size, config.hidden_dim)
    return max(needed, sum(places[name] for name in UNDER_HEAD))


def scratch_bytes(config: TrainableModelConfig, rows: int, adapters: AdapterWidths = NO_ADAPTERS) -> int:
    """Return the bytes of scratch for `rows` tokens."""
    places = scratch_places(config, rows, adapters)
    apart = sum(size for name, size in places.items() if name not in UNDER_HEAD)
    return 4 * (apart + head_floats(config, rows, places))


def memory_plan(
    config: TrainableModelConfig,
    batch_size: int,
    seq_len: int,
    precision: Precision = Precision.FP32,
    adapters: AdapterWidths = NO_ADAPTERS,
    added: int = 0,
) -> dict[str, int]:
    """Return the bytes of a training step by part, for AdamW and batches of (batch_size, seq_len); no model is needed.

    `added` is the number of weights of the adapters, which are then the only ones that are trained.
    """
    rows, trained = batch_size * seq_len, 4 * (added or config.num_params())
    return {
        "weights": 4 * (config.num_params() + added),
        "gradients": trained,
        "moments": 2 * trained,
        "saved activations": saved_bytes(config, rows, precision == Precision.BF16, adapters),
        "scratch": scratch_bytes(config, rows, adapters),
    }


def _shaped(entry: str, memory: np.ndarray, width: int, rows: int) -> np.ndarray:
    flat = memory[: rows * width]
    if entry in COLUMNS:
        return flat.reshape(width, rows)
    return flat if width == 1 and entry.startswith(("r_", "losses")) else flat.reshape(rows, width)


class Arena:
    """Activations and scratch for up to `capacity` rows; `views` hands them out, made once for each number of rows."""

    def __init__(self, config: TrainableModelConfig, adapters: AdapterWidths = NO_ADAPTERS) -> None:
        self.config, self.adapters = config, adapters
        self.capacity = 0
        self._flat: dict[tuple[str, int, np.dtype], np.ndarray] = {}
        self._scratch: dict[str, np.ndarray] = {}
        self._views: dict[tuple[int, bool], tuple[list[SimpleNamespace], SimpleNamespace]] = {}

    def _saved(self, entry: str, layer: int, width: int, rows: int, narrow: bool) -> np.ndarray:
        key = (entry, slot(self.config, layer, entry), _dtype(entry, narrow))
        if key not in self._flat:
            self._flat[key] = np.empty(self.capacity * width, key[2])
        return _shaped(entry, self._flat[key], width, rows)

    def _make_scratch(self) -> None:
        places = scratch_places(self.config, self.capacity, self.adapters)
        head, used = np.empty(head_floats(self.config, self.capacity, places), np.float32), 0
        self._scratch = {"head": head}
        for name, size in places.items():
            if name in UNDER_HEAD:
                self._scratch[name], used = head[used : used + size], used + size
            else:
                self._scratch[name] = np.empty(size, np.float32)

    def _heads(self, qkv: np.ndarray) -> list[np.ndarray]:
        """Return the columns of q, k and v in their common matrix (N, q_dim + 2 kv_dim)."""
        q, kv = self.config.q_dim, self.config.kv_dim
        return np.split(qkv, [q, q + kv], axis=1)

    def saved(self, rows: int, narrow: bool = False) -> list[np.ndarray]:
        """Return all arrays that a step of `rows` tokens keeps for its backward pass, each once."""
        layers, _ = self.views(rows, narrow)
        table = saved_table(self.config, self.adapters)
        arrays = [getattr(layer, name) for layer in layers for name, width in table.items() if width]
        return list({array.ctypes.data: array for array in arrays}.values())

    def nbytes(self) -> int:
        """Return the bytes of all arrays."""
        owned = [array for array in self._scratch.values() if array.base is None]
        return sum(array.nbytes for array in (*self._flat.values(), *owned))

    def views(self, rows: int, narrow: bool = False) -> tuple[list[SimpleNamespace], SimpleNamespace]:
        """Return each layer's saved arrays, and the scratch, for `rows` tokens of a step (`narrow`: in bfloat16)."""
        if rows > self.capacity:
            self.capacity = rows
            self._flat.clear()
            self._views.clear()
            self._make_scratch()
        if (rows, narrow) not in self._views:
            layers = [
                SimpleNamespace(
                    **{
                        name: self._saved(name, i, width, rows, narrow)
                        for name, width in saved_table(self.config, self.adapters).items()
                    }
                )
                for i in range(self.config.num_layers)
            ]
            table = scratch_table(self.config, self.adapters)
            memory = {name: self._scratch[PLACES.get(name, name)] for name in (*table, "head")}
            scratch = SimpleNamespace(**{name: _shaped(name, memory[name], table[name], rows) for name in table})
            scratch.head = memory["head"]
            for layer in layers:
                layer.q, layer.k, layer.v = self._heads(layer.qkv)
            scratch.dq, scratch.dk, scratch.dv = self._heads(scratch.dqkv)
            scratch.hits = np.empty(rows, np.uint8)
            # What forward rounds before it saves it is float32 where, later, its gradient will be.
            scratch.qkv, scratch.gate_up = scratch.dqkv, scratch.dgate_up
            self._views[rows, narrow] = layers, scratch
        return self._views[rows, narrow]
