"""All weights in one float32 buffer, all gradients in another, and the table that names what is where.

The order is the ABI's: token_embedding; for each layer w_q w_k w_v w_o attn_norm w_gate w_up w_down ffn_norm;
final_norm; output_proj if untied.  Matrices are (out, in).  So the optimizer, the norm and saving are each one pass
over one array, the ABI's own checkpoint files are that array with a header, and neighbours can be used as one matrix:
w_q, w_k, w_v are the rows of one projection, w_gate and w_up those of another (`Parameters.joined`).
"""

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from .config import TrainableModelConfig
from .errors import ConfigError

__all__ = ["Buffers", "Parameters", "Tensor", "Views", "head_name", "tensor_table"]

INITIAL_STD = 0.02  # Radford et al. 2019 (GPT-2), section 2.3, and every Llama configuration since: initializer_range


@dataclass(frozen=True)
class Tensor:
    """One named tensor: its three names, its place in the flat buffer, and whether weight decay applies."""

    name: str
    hf_name: str
    gguf_name: str
    shape: tuple[int, ...]
    offset: int
    decay: bool

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def slice(self) -> slice:
        """Place in the flat buffer."""
        return slice(self.offset, self.offset + self.size)


def tensor_table(config: TrainableModelConfig) -> tuple[Tensor, ...]:
    """Return the tensors of a model in flat order."""
    c, f = config.hidden_dim, config.intermediate_dim
    q, kv = config.q_dim, config.kv_dim
    rows: list[tuple[str, str, str, tuple[int, ...]]] = [
        ("token_embedding", "model.embed_tokens.weight", "token_embd.weight", (config.vocab_size, c))
    ]
    for i in range(config.num_layers):
        hf, gguf = f"model.layers.{i}.", f"blk.{i}."
        block: tuple[tuple[str, str, str, tuple[int, ...]], ...] = (
            ("w_q", "self_attn.q_proj", "attn_q", (q, c)),
            ("w_k", "self_attn.k_proj", "attn_k", (kv, c)),
            ("w_v", "self_attn.v_proj", "attn_v", (kv, c)),
            ("w_o", "self_attn.o_proj", "attn_output", (c, q)),
            ("attn_norm", "input_layernorm", "attn_norm", (c,)),
            ("w_gate", "mlp.gate_proj", "ffn_gate", (f, c)),
            ("w_up", "mlp.up_proj", "ffn_up", (f, c)),
            ("w_down", "mlp.down_proj", "ffn_down", (c, f)),
            ("ffn_norm", "post_attention_layernorm", "ffn_norm", (c,)),
        )
        for name, hf_name, gguf_name, shape in block:
            rows.append((f"layers.{i}.{name}", f"{hf}{hf_name}.weight", f"{gguf}{gguf_name}.weight", shape))
    rows.append(("final_norm", "model.norm.weight", "output_norm.weight", (c,)))
    if not config.tie_embeddings:
        rows.append(("output_proj", "lm_head.weight", "output.weight", (config.vocab_size, c)))
    table, offset = [], 0
    for name, hf_name, gguf_name, shape in rows:
        tensor = Tensor(name, hf_name, gguf_name, shape, offset, decay=len(shape) > 1)
        table.append(tensor)
        offset += tensor.size
    return tuple(table)


def head_name(config: TrainableModelConfig) -> str:
    """Return the name of the matrix that turns the last hidden row into logits: the embedding itself, if tied."""
    return "token_embedding" if config.tie_embeddings else "output_proj"


def physical_memory() -> int:
    """Return the memory of this machine in bytes; without bound where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 1 << 62


class Views(Mapping[str, np.ndarray]):
    """Named views of a flat buffer; assigning to a name copies into the buffer."""

    def __init__(self, flat: np.ndarray, table: tuple[Tensor, ...]) -> None:
        self._views = {tensor.name: flat[tensor.slice].reshape(tensor.shape) for tensor in table}

    def __getitem__(self, name: str) -> np.ndarray:
        try:
            return self._views[name]
        except KeyError:
            raise KeyError(f"{name!r} is no tensor of this model; list(model.weights) names them all") from None

    def __setitem__(self, name: str, value: np.ndarray) -> None:
        if np.shape(value) != self[name].shape:
            raise ValueError(f"{name} has shape {self[name].shape}; the value given has {np.shape(value)}")
        self[name][...] = value

    def __iter__(self) -> Iterator[str]:
        return iter(self._views)

    def __len__(self) -> int:
        return len(self._views)


class Buffers:
    """The flat buffers of some tensors and of their gradients, float32 (P,), with their named views."""

    def __init__(self, table: tuple[Tensor, ...]) -> None:
        """Allocate both; the weights are not filled, the gradients are 0.

        ConfigError if they are larger than the machine's memory: the system would grant it, and kill the process later.
        """
        self.table = table
        self.size = sum(tensor.size for tensor in self.table)
        needed, memory = 2 * 4 * self.size, physical_memory()
        if needed > memory:
            raise ConfigError(
                f"{self.size:,} parameters and their gradients need {needed / 1e9:,.1f} GB, and this machine has "
                f"{memory / 1e9:.1f} GB; take a smaller vocab_size, hidden_dim, intermediate_dim or num_layers"
            )
        self.weights_flat = np.empty(self.size, np.float32)
        self.weights = Views(self.weights_flat, self.table)
        self._gradients_flat = np.zeros(self.size, np.float32)
        self._gradients = Views(self._gradients_flat, self.table)
        self._stale = False
        self._by_name = {tensor.name: tensor for tensor in self.table}

    # Zeroing the gradients is put off: a backward that comes next overwrites them, which saves a pass over memory.

    def zero_gradients(self) -> None:
        """Make all gradients read as zero; a backward that comes first saves the pass over memory."""
        self._stale = True

    @property
    def gradients_flat(self) -> np.ndarray:
        """All gradients, float32 (P,)."""
        if self._stale:
            self._gradients_flat.fill(0)
            self._stale = False
        return self._gradients_flat

    @property
    def gradients(self) -> Views:
        """The gradients by name."""
        if self._stale:
            self._gradients_flat.fill(0)
            self._stale = False
        return self._gradients

    def gradients_to_write(self) -> tuple[Views, bool]:
        """Return the gradients for a backward pass, and whether it must add to them; if not, it overwrites them all."""
        accumulate, self._stale = not self._stale, False
        return self._gradients, accumulate

    def joined(self, flat: np.ndarray, first: str, last: str) -> np.ndarray:
        """Return the neighbouring matrices `first` ... `last`, which have equal columns, as one matrix (view)."""
        start, end = self._by_name[first], self._by_name[last]
        return flat[start.offset : end.offset + end.size].reshape(-1, start.shape[1])

    def joined_weights(self, first: str, last: str) -> np.ndarray:
        """Return neighbouring weights as one matrix."""
        return self.joined(self.weights_flat, first, last)

    def joined_gradients(self, first: str, last: str) -> np.ndarray:
        """Return neighbouring gradients as one matrix."""
        return self.joined(self._gradients_flat, first, last)


class Parameters(Buffers):
    """All weights of a model, and their gradients."""

    def __init__(self, config: TrainableModelConfig, weights: np.ndarray | None = None) -> None:
        """Allocate both buffers, gradients 0; weights are copied if given (P,).

        Otherwise matrices are N(0, 0.02) from `config.seed`, and norms are 1.
        """
        super().__init__(tensor_table(config))
        if weights is not None:
            self.weights_flat[...] = weights
            return
        random = np.random.default_rng(config.seed)
        for tensor in self.table:
            view = self.weights[tensor.name]
            if len(tensor.shape) == 1:
                view[...] = 1
            else:
                random.standard_normal(out=view, dtype=np.float32)
                view *= np.float32(INITIAL_STD)
