"""What a layer is, and what a pass tells it.

A model is a list of layers: an embedding, residual branches, a head.  A layer says, in one place, what it is made of
and what it needs; everything else reads the list: parameters, names, the arena and its memory plan, operations, LoRA's
targets, the decoder, the reference, the trace.

    tensors()          its weights: local name, shape, initial value, whether weight decay applies
    saved(), scratch() the arrays of a training pass, `decoding()` those of generation: name -> `Entry`
    linears            its linear layers, which may get adapters
    bind(weights)      take views of the weights; before, a layer is a description, costs nothing, and counts as trained
    flops(...)         operations for each token
    kernels()          those that not every model runs: what is compiled ahead follows from it

A branch works in place: its input x is saved for backward, and its backward turns dx, the gradient of its output, into
that of its input.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from ...parameters import TensorSpec, Weight
from .linear import Linear
from .norm import Norm
from .run import Chunk, Entry, KeysAndValues, Run

__all__ = ["Branch", "Layer", "Noted"]


class Layer(ABC):
    """A layer; `at` is what its tensors' names begin with, as in `layers.3.`.

    `only_kernels`, in a class's own body, says that its passes do nothing but call kernels, `between` and `by_numpy`
    (`kernels/engine/replay.py`); what does not say it for itself, as a class made from another one, is run by Python.
    So is a layer that has, itself or in one of its `pieces`, a method of its own in place of its class's, as a hook is.
    """

    only_kernels: ClassVar[bool] = False

    def __init__(self, at: str) -> None:
        """Describe it."""
        self.at = at
        self.linears: tuple[Linear, ...] = ()
        self.weights: list[Weight] = []  # bound, and its own

    @abstractmethod
    def tensors(self) -> tuple[TensorSpec, ...]:
        """Return its tensors in flat order, by local name."""

    @abstractmethod
    def bind(self, weights: Callable[[str], Weight]) -> None:
        """Take its weights by their full names."""

    @abstractmethod
    def flops(self, seq_len: int, below: bool) -> float:
        """Return the operations of forward and backward for a token of a row of seq_len; a multiply-add counts two.

        `below`: something below it is trained, so the gradient of its input is wanted.
        """

    def pieces(self) -> tuple[object, ...]:
        """Return the parts of a layer that have passes of their own and say `only_kernels` for themselves.

        Here its linear layers.
        """
        return self.linears

    def overwritten(self) -> set[str]:
        """Return the tensors, by full names, whose gradients backward overwrites unless it must add to them.

        It adds to all others, which hold 0 when it begins.  Those of a branch lend their memory to activations
        (`model/lent.py`); so the memory plan follows from them, and they are known before weights are bound.
        """
        return {self.at + projection.name for linear in self.linears for projection in linear.projections}

    def kernels(self) -> set[str]:
        """Return the kernels that not every layer of its kind runs."""
        return set()

    def idle(self) -> int:
        """Return how many of its weights a token is not computed with."""
        return 0

    def is_trained(self) -> bool:
        """Say whether a backward pass has anything to write here."""
        own = any(weight.dw is not None for weight in self.weights) or not self.weights
        return own or any(linear.is_trained() for linear in self.linears)

    def trains_norms(self) -> bool:
        """Say whether something is trained at its very beginning, so that backward must come through all of it."""
        return False


class Noted:
    """Those of a list of bound layers whose calls can be noted.  Classes are looked at once, instances in each pass."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        """Look at the classes."""
        self._watched: dict[int, list[tuple[frozenset[str], dict[str, Any]]]] = {}  # methods, and the instance's own
        for layer in layers:
            pieces = layer, *layer.pieces()
            if all(vars(type(each)).get("only_kernels", False) for each in pieces):
                self._watched[id(layer)] = [(_methods_of(each), vars(each)) for each in pieces]
        watched = [each for pieces in self._watched.values() for each in pieces]
        self._methods, self._own = [methods for methods, _ in watched], [own for _, own in watched]
        self._all = frozenset(self._watched)

    def now(self) -> frozenset[int]:
        """Return their ids, without those where an instance, such as one with a hook, has a method of its own."""
        if all(map(frozenset.isdisjoint, self._methods, self._own)):  # nearly always, and microseconds
            return self._all
        return frozenset(i for i, pieces in self._watched.items() if all(m.isdisjoint(own) for m, own in pieces))


def _methods_of(piece: object) -> frozenset[str]:
    """Return the names of a piece's methods, those of its class."""
    kind = type(piece)
    return frozenset(name for name in dir(kind) if name[:2] != "__" and inspect.isroutine(getattr(kind, name)))


class Branch(Layer):
    """A residual branch: out = x + f(x)."""

    Saved: ClassVar[type]  # dataclasses of named arrays, made by the arena
    Scratch: ClassVar[type]
    Decoding: ClassVar[type]
    norm: Norm  # at its beginning
    reference: ClassVar[tuple[Callable[..., Any], Callable[..., Any]]]  # forward, backward: `model/reference.py`
    keys_and_values: tuple[int, int] | None = None  # G, D of those that a decoder keeps of it

    def __init__(self, at: str, block: int) -> None:
        """Describe it; `block` is the number of the transformer block that it is a part of."""
        super().__init__(at)
        self.block = block
        self.inner_norms: tuple[Norm, ...] = ()  # all others

    def pieces(self) -> tuple[object, ...]:
        """Return its linear layers and its norms."""
        return (*super().pieces(), self.norm, *self.inner_norms)

    def bind(self, weights: Callable[[str], Weight]) -> None:
        """Take the weights of its linear layers and of its norms by their full names."""
        parts: list[Linear | Norm] = [*self.linears, self.norm, *self.inner_norms]
        for part in parts:
            part.bind(self.at, weights)
        self.weights = [weight for part in parts for weight in part.weights]

    def trains_norms(self) -> bool:
        """Say whether one of its norms is trained."""
        norms = (self.norm, *self.inner_norms)
        return any(weight.dw is not None for norm in norms for weight in norm.weights)

    def kernels(self) -> set[str]:
        """Return those of its norms and biases."""
        found = {kernel for norm in (self.norm, *self.inner_norms) for kernel in norm.kernels}
        biased = any(linear.biases() for linear in self.linears)
        return found | {"bias_forward", "bias_backward"} if biased else found

    @abstractmethod
    def saved(self) -> dict[str, Entry]:
        """Return what forward keeps for backward; `x` is its input."""

    @abstractmethod
    def scratch(self) -> dict[str, Entry]:
        """Return the arrays that live only inside one operation or between two."""

    @abstractmethod
    def decoding(self) -> dict[str, Entry]:
        """Return the arrays of `decode`."""

    def parts(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return views of saved or scratch arrays that have names of their own, such as q in q k v."""
        return {}

    @abstractmethod
    def fill(self, a: Any, s: Any, run: Run) -> None:
        """Compute the entries `again` of a from a.x."""

    @abstractmethod
    def forward(self, out: np.ndarray, a: Any, s: Any, run: Run) -> None:
        """Write out (N, C) from a.x (N, C), and fill the other arrays of a."""

    @abstractmethod
    def backward(self, dx: np.ndarray, a: Any, s: Any, run: Run, below: bool) -> None:
        """Turn dx (N, C) from the gradient of out into that of a.x, in place, and write the gradients of its weights.

        Without `below` nothing below is trained: then dx is not wanted and is left unfinished.
        """

    @abstractmethod
    def decode(self, x: np.ndarray, s: Any, kept: KeysAndValues | None, run: Run, chunks: Sequence[Chunk]) -> None:
        """Turn x (rows, C) into out in place, for new tokens over those that are `kept`."""
