"""All weights in one float32 buffer, all gradients in another, and the table that names what is where.

The order is that of the layers (`families/`), for Llama the ABI's: token_embedding; for each block w_q w_k w_v w_o
attn_norm w_gate w_up w_down ffn_norm; final_norm; output_proj if untied.  Matrices are (out, in).  So the optimizer,
the norm and saving are each one pass over one array, the ABI's own checkpoint files are that array with a header, and
neighbours can be used as one matrix (`joined`): w_q, w_k, w_v are the rows of one projection.
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np

from .errors import ConfigError
from .kernels.engine.scratch import aligned_empty
from .kernels.storage import Storage
from .kernels.storage.float32 import STORAGE as FLOAT32
from .reprs import Shown

__all__ = ["Buffers", "HfName", "Parameters", "Tensor", "TensorSpec", "Views", "Weight", "adjoin", "joined"]

INITIAL_STD = 0.02  # Radford et al. 2019 (GPT-2), section 2.3, and every Llama configuration since: initializer_range


@dataclass(frozen=True)
class TensorSpec:
    """A tensor as its layer describes it: local name, shape, and how it begins: normal, ones or zeros.

    `std` is that of a normal one.  Weight decay applies to matrices.
    """

    name: str
    shape: tuple[int, ...]
    initial: str = "normal"
    std: float = INITIAL_STD
    hidden: bool = False  # a matrix, or a stack of them, from activations to activations: what `muon` takes
    embedding: bool = False  # rows chosen by ids: `adamw_8bit` keeps their moments in 32 bits

    @property
    def decay(self) -> bool:
        """Say whether weight decay applies."""
        return len(self.shape) > 1


@dataclass(frozen=True)
class HfName:
    """What a tensor of ours is called in Hugging Face's files, and the form in which it is stored there.

    name        with {e}, for a tensor that stacks experts along its first axis: there is a stored tensor for each
    transposed  stored (in, out), as GPT-2's Conv1D keeps it, and not (out, in)
    part        (k, n): ours is the k-th of n equal parts of the stored one's out axis, as in a fused gate_up_proj
    stacked     ours (E, out, in) is stored as one matrix, as PEFT keeps the adapters of experts: those below each other
                (E out, in), or their columns in turns (out, in E)
    """

    name: str
    transposed: bool = False
    part: tuple[int, int] = (0, 1)
    stacked: Literal["", "rows", "columns"] = ""


@dataclass(frozen=True)
class Tensor:
    """One named tensor: its names, its place in the flat buffer, whether weight decay applies, how it begins.

    Of Hugging Face's names the first is written, and any is read.
    """

    name: str
    hf_names: tuple[HfName, ...]
    gguf_name: str
    shape: tuple[int, ...]
    offset: int
    decay: bool
    initial: str = "normal"
    std: float = INITIAL_STD
    hidden: bool = False  # as in `TensorSpec`
    embedding: bool = False  # as in `TensorSpec`

    @property
    def hf_name(self) -> str:
        """The name in Hugging Face's files, as it is written."""
        return self.hf_names[0].name

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def slice(self) -> slice:
        """Place in the flat buffer."""
        return slice(self.offset, self.offset + self.size)


def physical_memory() -> int:
    """Return the memory of this machine in bytes; without bound where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 1 << 62


@dataclass(frozen=True)
class Weight:
    """A tensor as a layer uses it: its numbers, where its gradient goes (None if it is frozen), how it is stored."""

    name: str
    w: np.ndarray  # as its storage keeps it
    dw: np.ndarray | None
    storage: Storage = FLOAT32
    each: tuple["Weight", ...] = ()  # of stacked matrices that are kept as they lie, one by one; w is then empty


def adjoin(one: Weight, other: Weight) -> bool:
    """Say whether two weights, and their gradients, are float32 neighbours of equal rows: then they can be `joined`."""
    if (one.dw is None) != (other.dw is None) or not one.storage is other.storage is FLOAT32:
        return False
    pairs = [(one.w, other.w)]
    if one.dw is not None and other.dw is not None:
        pairs.append((one.dw, other.dw))
    return all(_adjoin(*pair) for pair in pairs)


def _adjoin(one: np.ndarray, other: np.ndarray) -> bool:
    alike = one.dtype == other.dtype == np.float32 and one.shape[1:] == other.shape[1:]
    whole = one.flags.c_contiguous and other.flags.c_contiguous and one.base is not None and one.base is other.base
    return alike and whole and one.ctypes.data + one.nbytes == other.ctypes.data


def joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Return neighbours that adjoin as one array, a view of their memory."""
    first = arrays[0]
    shape = (sum(len(array) for array in arrays), *first.shape[1:])
    return first if len(arrays) == 1 else np.lib.stride_tricks.as_strided(first, shape, first.strides)


class Views(Shown, Mapping[str, np.ndarray]):
    """Named views of a flat buffer; assigning to a name copies into the buffer."""

    def __init__(self, flat: np.ndarray, table: tuple[Tensor, ...]) -> None:
        self._views = {tensor.name: flat[tensor.slice].reshape(tensor.shape) for tensor in table}

    def _says(self) -> str:
        named = [f"{name} {view.shape}" for name, view in self._views.items()]
        if len(named) > 6:
            named[3:-2] = ["..."]
        numbers = sum(view.size for view in self._views.values())
        return f"{len(self._views)} tensors of {numbers:,} numbers: {', '.join(named)}"

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


class Buffers(Shown):
    """The flat buffers of some tensors and of their gradients, float32 (P,), with their named views."""

    def __init__(self, table: tuple[Tensor, ...]) -> None:
        """Allocate both; the weights are not filled, the gradients read as 0.

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
        self.weights_flat = aligned_empty(self.size)
        self.weights = Views(self.weights_flat, self.table)
        self._gradients_flat = aligned_empty(self.size)
        self._gradients = Views(self._gradients_flat, self.table)
        self._stale = True
        self._lent = False
        self.passes = 0  # backward passes that have begun

    def _says(self) -> str:
        return f"{self.size:,} trained weights in {len(self.table)} tensors, with gradients"

    # Zeroing the gradients is put off: a backward that comes next overwrites them, which saves a pass over memory.

    @property
    def lends(self) -> bool:
        """Whether what the gradients' memory holds is read by nobody: the next backward pass overwrites it."""
        return self._stale

    @property
    def gradients_memory(self) -> np.ndarray:
        """The gradients' memory, float32 (P,), whatever it holds."""
        return self._gradients_flat

    @contextmanager
    def lending(self) -> Iterator[bool]:
        """Lend the gradients' memory to a pass, if it `lends`, which is yielded; till the end they cannot be read."""
        try:
            self._lent = self.lends
            yield self._lent
        finally:
            self._lent = False

    def zero_gradients(self) -> None:
        """Make all gradients read as zero; a backward that comes first saves the pass over memory.

        Only a new look at `gradients` or `gradients_flat` finds the zeros: until then, views that were taken before
        show what the memory holds, which is activations after the next forward.
        """
        self._stale = True

    @property
    def gradients_flat(self) -> np.ndarray:
        """All gradients, float32 (P,); RuntimeError and views as in `gradients`."""
        self._settle()
        return self._gradients_flat

    @property
    def gradients(self) -> Views:
        """The gradients by name: views, which hold them until `zero_gradients`, and again after the next backward.

        Between the two a view that was taken before may show activations; look again, or keep a copy.
        RuntimeError inside a pass whose activations lie there (a `check`, another thread): they come with its backward.
        """
        self._settle()
        return self._gradients

    def _settle(self) -> None:
        """Make the memory hold the gradients."""
        if self._lent:
            raise RuntimeError(
                "the gradients cannot be read inside a pass that keeps activations in their memory; read them after "
                "its backward, when compute_loss or train_step has returned"
            )
        if self._stale:
            self._gradients_flat.fill(0)
            self._stale = False

    def gradients_to_write(self) -> tuple[Views, bool]:
        """Return the gradients for a backward pass, and whether it must add to them; if not, it overwrites them all."""
        accumulate, self._stale = not self._stale, False
        self.passes += 1
        return self._gradients, accumulate

    def weight(self, name: str) -> Weight:
        """Return a tensor for a layer; its gradient may be stale, see `gradients_to_write`."""
        return Weight(name, self.weights[name], self._gradients[name])


class Parameters(Buffers):
    """All weights of a model, and their gradients."""

    def __init__(self, table: tuple[Tensor, ...], seed: int, weights: np.ndarray | None = None) -> None:
        """Allocate both buffers, gradients 0; weights are copied if given (P,).

        Otherwise they begin as the table says: N(0, std) from `seed`, ones, or zeros.
        """
        super().__init__(table)
        if weights is not None:
            self.weights_flat[...] = weights
            return
        random = np.random.default_rng(seed)
        for tensor in self.table:
            view = self.weights[tensor.name]
            if tensor.initial == "normal":
                random.standard_normal(out=view, dtype=np.float32)
                view *= np.float32(tensor.std)
            else:
                view.fill({"ones": 1, "zeros": 0}[tensor.initial])
