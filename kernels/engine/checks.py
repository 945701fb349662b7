"""What an operation takes, declared in one line and held against what Python calls it with.

    @checked("y! x (N, C); r! (N); w (C)")

    y! x (N, C)                   two float32 arrays of one shape; `!` marks what is written
    gate_up (N, 2 F) float32|uint16    other types; `int` is int32 or int64; a size may be a product or a part (`D/2`)
    dw?! (V, C)                   an array or None
    ids (N) int < V               numbers from 0 to V - 1
    N = batch T; W >= heads D     what holds between sizes; the function's own numbers (`batch`) are sizes as well

An argument that is neither an array nor a number is named apart: `@checked("...", storage=Storage)`.

A kernel trusts its arrays: a wrong type is read as other numbers, and an output that is too small is written past its
end.  So `abi_py.kernels.rms_norm.rms_norm_forward` checks, some microseconds a call; a caller that lays out its arrays
itself, as the model does, takes the same function from `unchecked.py`.
"""

import functools
import inspect
import math
import numbers
import re
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias, TypeVar, cast

import numpy as np

__all__ = ["Array", "check_apart", "checked", "unchecked"]

Array: TypeAlias = np.ndarray  # what operations take; which types and shapes, `checked` says
Function = TypeVar("Function", bound=Callable[..., Any])

ENTRY = re.compile(r"(?P<names>[^()=<>]+)\((?P<shape>[^()]*)\)\s*(?P<types>[\w|]+)?\s*(?:<\s*(?P<below>\w+))?")
RELATION = re.compile(r"(?P<left>[^()=<>]+)(?P<sign>>=|=)(?P<right>[^()=<>]+)")
Class = type | types.UnionType
TYPES = {"int": ("int32", "int64")}  # names of several


@dataclass(frozen=True)
class _Size:
    """A product of names and a number, over another number: `2 F`, `heads D`, `D/2`, `16`."""

    text: str
    names: tuple[str, ...]
    times: int
    over: int

    @classmethod
    def read(cls, text: str) -> "_Size":
        product, _, over = text.partition("/")
        words = product.split()
        names = tuple(word for word in words if not word.isdigit())
        times = math.prod(int(word) for word in words if word.isdigit())
        return cls(text.strip(), names, times, int(over or 1))

    def value(self, known: dict[str, int]) -> int | None:
        """Return it, or None if a name is not known yet."""
        if not all(name in known for name in self.names):
            return None
        return self.times * math.prod(known[name] for name in self.names) // self.over

    def equals(self, value: int, known: dict[str, int]) -> bool | None:
        """Say whether it is `value`, learning the one name that is not known; None if there are two."""
        unknown = [name for name in self.names if name not in known]
        if len(unknown) > 1:
            return None
        factor = self.times * math.prod(known[name] for name in self.names if name in known)
        if not unknown:
            return factor == value * self.over
        whole, rest = divmod(value * self.over, factor) if factor else (0, value)
        if rest == 0:
            known[unknown[0]] = whole
        return rest == 0


@dataclass(frozen=True)
class _Array:
    name: str
    sizes: tuple[_Size, ...]
    types: tuple[np.dtype, ...]
    below: str  # the name of a size, or nothing
    written: bool
    optional: bool

    @property
    def shape(self) -> str:
        return f"({', '.join(size.text for size in self.sizes)})"


@dataclass(frozen=True)
class _Signature:
    function: str
    arrays: tuple[_Array, ...]
    relations: tuple[tuple[_Size, str, _Size], ...]
    others: dict[str, Class]  # arguments that are neither arrays nor numbers

    @classmethod
    def read(cls, function: str, text: str, others: dict[str, Class]) -> "_Signature":
        arrays: list[_Array] = []
        relations = []
        for part in text.split(";"):
            if relation := RELATION.fullmatch(part.strip()):
                relations.append((_Size.read(relation["left"]), relation["sign"], _Size.read(relation["right"])))
                continue
            entry = ENTRY.fullmatch(part.strip())
            if entry is None:
                raise ValueError(f"{function}: {part.strip()!r} is no entry of a signature; see engine/checks.py")
            sizes = tuple(_Size.read(size) for size in entry["shape"].split(",") if size.strip())
            words = entry["types"] or "float32"
            kinds = tuple(np.dtype(name) for name in TYPES.get(words, words.split("|")))
            for name in entry["names"].split():
                arrays.append(_Array(name.rstrip("!?"), sizes, kinds, entry["below"] or "", "!" in name, "?" in name))
        return cls(function, tuple(arrays), tuple(relations), others)

    def check(self, given: dict[str, Any]) -> dict[str, int]:
        """Raise TypeError or ValueError for what does not fit; return the sizes by name."""
        arrays = [array for array in self.arrays if not (array.optional and given[array.name] is None)]
        for array in arrays:
            self._check_kind(array, given[array.name])
        for name, kind in self.others.items():
            if not isinstance(given[name], kind):
                wanted = name.replace("_", " ")
                raise TypeError(f"{name} is {_kind(given[name])}; {self.function} takes a {wanted} ({_names(kind)})")
        named = {*self.others, *(array.name for array in self.arrays)}
        scalars = {name: self._number(name, value) for name, value in given.items() if name not in named}
        known = self._check_sizes(arrays, given, {name: size for name, size in scalars.items() if size is not None})
        for array in arrays:
            if array.below:
                self._check_values(array, given[array.name], known[array.below])
        return known

    def _number(self, name: str, value: Any) -> int | None:
        """Return what may be a size; None for another number."""
        if not isinstance(value, (numbers.Number, np.bool_)):
            raise TypeError(f"{name} is {_kind(value)}; {self.function} takes a number")
        is_size = any(name in size.names for size in self._sizes())
        if not is_size:
            return None
        if not isinstance(value, numbers.Integral) or value < 1:
            raise ValueError(f"{name} ({value}) must be a whole number from 1 on; {self.function} divides by it")
        return int(value)

    def _sizes(self) -> list[_Size]:
        of_arrays = [size for array in self.arrays for size in array.sizes]
        return of_arrays + [size for left, _, right in self.relations for size in (left, right)]

    def _check_kind(self, array: _Array, x: Any) -> None:
        name, function = array.name, self.function
        if not isinstance(x, np.ndarray) or x.dtype not in array.types:
            takes = f"{' or '.join(map(str, array.types))} arrays" + (" or None" if array.optional else "")
            wanted = f"np.{array.types[0]}"
            if not isinstance(x, np.ndarray):
                remedy = f"use np.asarray({name}, {wanted})"
            else:
                remedy = f"make it with dtype {wanted}" if array.written else f"use {name}.astype({wanted})"
            raise TypeError(f"{name} is {_kind(x)}; {function} takes {takes}; {remedy}")
        if x.ndim != len(array.sizes):
            raise ValueError(f"{name} has shape {x.shape}; {function} takes {array.shape}")
        if array.written and not x.flags.writeable:
            raise ValueError(f"{name} is read-only, and {function} writes to it; pass a writable array")
        if x.size and (x.shape[-1] > 1 and x.strides[-1] != x.itemsize):
            self._refuse_layout(array, f"numbers {x.strides[-1]} bytes apart")
        if not x.flags.aligned or any(stride % x.itemsize for stride in x.strides):
            self._refuse_layout(array, "rows that do not begin at a whole number")

    def _refuse_layout(self, array: _Array, found: str) -> NoReturn:
        remedy = "pass an array of its own" if array.written else f"use np.ascontiguousarray({array.name})"
        raise ValueError(
            f"{array.name} has {found}; {self.function} takes rows whose numbers are side by side; {remedy}"
        )

    def _check_sizes(self, arrays: list[_Array], given: dict[str, Any], known: dict[str, int]) -> dict[str, int]:
        """Learn the names from the arrays that are read, then from those that are written: these are to blame."""
        in_order = sorted(arrays, key=lambda array: array.written)
        waiting = [(array, axis) for array in in_order for axis in range(len(array.sizes))]
        equations = [(left, right) for left, sign, right in self.relations if sign == "="]
        while True:
            before = len(waiting), len(equations), len(known)
            left_over = []
            for array, axis in waiting:
                fits = array.sizes[axis].equals(given[array.name].shape[axis], known)
                if fits is False:
                    self._refuse_shape(array, given[array.name], known)
                if fits is None:
                    left_over.append((array, axis))
            waiting = left_over
            equations = [pair for pair in equations if not self._holds(*pair, known)]
            if (len(waiting), len(equations), len(known)) == before:
                break
        for left, sign, right in self.relations:
            a, b = left.value(known), right.value(known)
            if a is None or b is None or (sign == ">=" and a < b):
                raise ValueError(f"{left.text} ({a}) must be at least {right.text} ({b}) in {self.function}")
        return known

    def _holds(self, left: _Size, right: _Size, known: dict[str, int]) -> bool:
        value = left.value(known)
        fits = None if value is None else right.equals(value, known)
        if fits is False:
            of = ", ".join(f"{name} = {known[name]}" for name in right.names if name in known)
            raise ValueError(f"{left.text} ({value}) must be {right.text} with {of}; {self.function} divides it so")
        return fits is True

    def _refuse_shape(self, array: _Array, x: np.ndarray, known: dict[str, int]) -> NoReturn:
        sizes = [size.value(known) for size in array.sizes]
        here = f"({', '.join(size.text if n is None else str(n) for size, n in zip(array.sizes, sizes))})"
        here = f", here {here}" if here != array.shape else ""
        raise ValueError(f"{array.name} has shape {x.shape}; {self.function} takes {array.shape}{here}")

    def _check_values(self, array: _Array, x: np.ndarray, below: int) -> None:
        wrong = (x < 0) | (x >= below)
        if wrong.any():
            at = ", ".join(map(str, np.argwhere(wrong)[0]))
            raise ValueError(
                f"{array.name}[{at}] is {x[wrong][0]}; {self.function} takes 0 ... {below - 1} "
                f"({array.below} - 1, {array.below} = {below})"
            )


def _names(kind: Class) -> str:
    return " or ".join(one.__name__ for one in (kind.__args__ if isinstance(kind, types.UnionType) else (kind,)))


def _kind(x: Any) -> str:
    return str(x.dtype) if isinstance(x, np.ndarray) else type(x).__name__


def checked(signature: str, also: Callable[..., None] | None = None, **others: Class) -> Callable[[Function], Function]:
    """Check the arguments of a kernel, or of a function that calls kernels, at each call; see the top of the file.

    `also(sizes, **arguments)` raises ValueError for what a signature cannot say; `others` are the classes of arguments
    that are neither arrays nor numbers.  The function without its checks is the `unchecked` of what is returned.
    """

    def decorate(function: Function) -> Function:
        python: Function = getattr(function, "py_func", function)
        parameters = inspect.signature(python)
        declared = _Signature.read(python.__name__, signature, others)
        unknown = {*others, *(array.name for array in declared.arrays)} - set(parameters.parameters)
        if unknown:
            raise ValueError(f"{python.__name__} has no argument {', '.join(sorted(unknown))}")

        @functools.wraps(python)
        def call(*arguments: Any, **named: Any) -> Any:
            bound = parameters.bind(*arguments, **named)
            bound.apply_defaults()
            sizes = declared.check(bound.arguments)
            if also is not None:
                also(sizes, **bound.arguments)
            return function(*arguments, **named)

        call.unchecked = function  # type: ignore[attr-defined]
        call.signature = declared  # type: ignore[attr-defined]
        call.__doc__ = f"{python.__doc__}\n\n    Takes {signature}\n    (! is written; float32 where no type is named)"
        return cast(Function, call)

    return decorate


def check_apart(name: str, out: np.ndarray, addend: np.ndarray | None, **operands: np.ndarray) -> None:
    """Raise ValueError if a product would write over what it still reads; it may write over the addend in its place."""
    for operand, x in operands.items():
        if _share(out, x):
            raise ValueError(f"{name} overlaps {operand}, which is read after it is written; pass {operand}.copy()")
    if addend is None or not _share(out, addend):
        return
    if (addend.ctypes.data, addend.strides) != (out.ctypes.data, out.strides):
        raise ValueError(f"{name} overlaps addend elsewhere than in its place; pass addend.copy()")


def _share(x: np.ndarray, y: np.ndarray) -> bool:
    """Say whether two arrays have a number in common; columns of one matrix side by side do not."""
    return np.may_share_memory(x, y) and np.shares_memory(x, y)


def unchecked(function: Any) -> Any:
    """Return a checked function without its checks, any other as it is."""
    return getattr(function, "unchecked", function)
