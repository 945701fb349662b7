"""Values of a GGUF file's metadata: each has a type of its own, which a reader of the file may insist on.

    U8 I8 U16 I16 U32 I32 U64 I64     a whole number of that type:  U32(4096)
    F32 F64                           a number:                     F32(1e-5)
    bool  str                         Python's own
    list[str]                         an array of strings
    np.ndarray (n,)                   an array of numbers or bools, of its dtype

Reading gives the same, so what was read can be written again: the numbers are ints and floats that know their type.
"""

import math
import struct
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ...errors import shown

__all__ = [
    "ARRAY",
    "BOOL",
    "F32",
    "F64",
    "I8",
    "I16",
    "I32",
    "I64",
    "STRING",
    "U8",
    "U16",
    "U32",
    "U64",
    "VALUE_TYPES",
    "Value",
    "ValueType",
    "text_bytes",
    "value_bytes",
]


class _Whole(int):
    bits: ClassVar[int]
    signed: ClassVar[bool]

    def __new__(cls, value: int) -> "_Whole":
        number = super().__new__(cls, value)
        low, high = (-(1 << cls.bits - 1), 1 << cls.bits - 1) if cls.signed else (0, 1 << cls.bits)
        if not low <= number < high:
            raise ValueError(f"{shown(value)} is no {cls.__name__}; it must be from {low} to {high - 1}")
        return number


class U8(_Whole):
    """A number of 8 bits without sign."""

    bits, signed = 8, False


class I8(_Whole):
    """A number of 8 bits."""

    bits, signed = 8, True


class U16(_Whole):
    """A number of 16 bits without sign."""

    bits, signed = 16, False


class I16(_Whole):
    """A number of 16 bits."""

    bits, signed = 16, True


class U32(_Whole):
    """A number of 32 bits without sign."""

    bits, signed = 32, False


class I32(_Whole):
    """A number of 32 bits."""

    bits, signed = 32, True


class U64(_Whole):
    """A number of 64 bits without sign."""

    bits, signed = 64, False


class I64(_Whole):
    """A number of 64 bits."""

    bits, signed = 64, True


class F32(float):
    """A number in single precision."""

    def __new__(cls, value: float) -> "F32":
        with np.errstate(over="ignore"):
            number = super().__new__(cls, np.float32(value))
        if math.isinf(number) and math.isfinite(value):
            raise ValueError(f"{value} is no F32; it must be at most {float(np.finfo(np.float32).max)} in size")
        return number


class F64(float):
    """A number in double precision."""


Value = int | float | bool | str | list[Any] | np.ndarray


@dataclass(frozen=True)
class ValueType:
    """A type of values: its number in a file, its name there, its form (None: a string or an array), its class."""

    id: int
    name: str
    code: str | None
    kind: Any

    @property
    def number(self) -> struct.Struct:
        """How one of them is packed."""
        return struct.Struct(f"<{self.code}")

    @property
    def dtype(self) -> np.dtype:
        """Of an array of them."""
        return np.dtype(f"<{self.code}")

    @property
    def least(self) -> int:
        """The fewest bytes that one of them takes: an empty string has its length, an array type and length."""
        return self.dtype.itemsize if self.code else 12 if self.name == "array" else 8


_TYPES = (
    *(("uint8", "B", U8), ("int8", "b", I8), ("uint16", "H", U16), ("int16", "h", I16), ("uint32", "I", U32)),
    *(("int32", "i", I32), ("float32", "f", F32), ("bool", "?", bool), ("string", None, str), ("array", None, list)),
    *(("uint64", "Q", U64), ("int64", "q", I64), ("float64", "d", F64)),
)
VALUE_TYPES = {number: ValueType(number, *entry) for number, entry in enumerate(_TYPES)}
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
BOOL, STRING, ARRAY = VALUE_TYPES[7], VALUE_TYPES[8], VALUE_TYPES[9]


# -- writing -------------------------------------------------------------------------------------

_BY_CLASS: dict[type, ValueType] = {each.kind: each for each in VALUE_TYPES.values() if each.code}
_BY_DTYPE = {each.dtype: each for each in VALUE_TYPES.values() if each.code}


def text_bytes(text: str) -> bytes:
    """Return a string as it is written: its length, its bytes in UTF-8; ValueError for half of a surrogate pair."""
    try:
        raw = text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{shown(text)} holds half of a surrogate pair, which is no character") from None
    return _U64.pack(len(raw)) + raw


def value_bytes(key: str, value: Value) -> bytes:
    """Return a value as it is written, its type before it; TypeError, with its key, for what has no type here."""
    if isinstance(value, np.ndarray) and value.ndim == 1:
        item = _BY_DTYPE.get(value.dtype.newbyteorder("<"))
        if item is not None:
            content = value.astype(item.dtype, copy=False).tobytes()
            return _U32.pack(ARRAY.id) + _U32.pack(item.id) + _U64.pack(len(value)) + content
    elif isinstance(value, list) and all(isinstance(item, str) for item in value):
        return _U32.pack(ARRAY.id) + _U32.pack(STRING.id) + _U64.pack(len(value)) + b"".join(map(text_bytes, value))
    elif isinstance(value, str):
        return _U32.pack(STRING.id) + text_bytes(value)
    elif type(value) in _BY_CLASS:
        kind = _BY_CLASS[type(value)]
        return _U32.pack(kind.id) + kind.number.pack(value)
    rule = "give U32(...), F32(...) and the like, a bool, a str, a list of str or an array of numbers of one axis"
    raise TypeError(f"{key} is {shown(value)} ({type(value).__name__}), which has no type of GGUF's; {rule}")
