"""Telling a file of u32 token ids from one of another type, by a sample of it.

Read as u32, other files look like this:

    int64             every second id is 0 (or 2^32 - 1, for -100)          big-endian u32    ids in the millions
    uint16            two ids in one: mostly far above any vocabulary       float32, text     likewise

No tokenizer has MOST_IDS ids, so a file with a larger one is of another type unless the caller says how large its
vocabulary is.  Which type is likely follows from reading the same bytes in each: text must decode, integers must be
small.
"""

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..errors import DataError
from ..formats.special_tokens import MOST_IDS
from .sources import look_alike

__all__ = ["check_token_type"]

SAMPLE = 4096  # ids looked at at the beginning, and as many at the end
FEWEST = 16  # ids from which a pattern is more than chance


def check_token_type(path: Path, vocab_size: int | None) -> None:
    """Raise DataError naming file and likely type if what a file holds is not u32 little-endian.

    Ids below a given `vocab_size` are never too large.  Reads at most 32 KB; OSError passes through.
    """
    with open(path, "rb") as file:
        raw = file.read(4 * SAMPLE)
        size = file.seek(0, os.SEEK_END)
        file.seek(max(len(raw), size - 4 * SAMPLE))
        raw += file.read()
    found = look_alike(raw)
    if found is not None:
        raise DataError(f"{path} is {found[0]}, not a file of u32 token ids; {found[1]}")
    sample = np.frombuffer(raw[: len(raw) // 4 * 4], "<u4")
    kind, what = "", "its size is no multiple of 4"
    if size % 8 == 0:
        kind, what = _in_pairs(sample), "every second id is 0"
    if not kind:
        largest = int(sample.max(initial=0))
        if size % 4 == 0 and largest < max(MOST_IDS, vocab_size or 0):
            return
        if size % 4 == 0:
            what = f"read as u32, it has ids as large as {largest:,}"
        kind = _likely(raw)
        if not kind and size % 4:
            return  # cut short, says who reads it
    raise DataError(f"{path} is no file of u32 token ids: {what}; {_remedy(kind, path)}")


def _in_pairs(sample: npt.NDArray[np.uint32]) -> str:
    """Return the type of 64-bit integers that u32 ids are the halves of; "" if they are not."""
    if len(sample) < FEWEST:
        return ""
    for dtype, upper, lower in (("<i8", sample[1::2], sample[::2]), (">i8", sample[::2], sample[1::2])):
        varied = (lower != lower[0]).any() and 2 * np.count_nonzero(lower) >= len(lower)
        if varied and np.isin(upper, (0, 0xFFFFFFFF)).all():
            values = lower if dtype == "<i8" else lower.byteswap()
            if int(values[values < 0xFFFFFF00].max(initial=0)) < MOST_IDS:  # -100 marks what is not trained
                return dtype
    return ""


def _likely(raw: bytes) -> str:
    """Return the likely type of bytes that are not u32 ids: "text", a NumPy dtype, or "" if unknown."""
    if raw and not raw.translate(None, _TEXT_BYTES):
        return "text"
    raw = raw[: len(raw) // 4 * 4]
    if len(raw) < 4 * FEWEST:
        return ""
    if int(np.frombuffer(raw, ">u4").max()) < MOST_IDS:
        return ">u4"
    with np.errstate(all="ignore"):
        floats = np.frombuffer(raw, "<f4")
        sizes = np.abs(floats[floats != 0])
        if sizes.size and ((sizes > 1e-8) & (sizes < 1e8)).all():
            return "<f4"
    # Of small numbers the upper bytes are smaller than the lower ones.
    first, second = (np.frombuffer(raw, np.uint8)[i::2].mean() for i in (0, 1))
    return "<u2" if second < 0.8 * first else ">u2" if first < 0.8 * second else ""


_TEXT_BYTES = bytes([*b"\t\n\r\f", *range(32, 127), *range(128, 256)])  # those of a text in ASCII or UTF-8
_NAMES = {"<i8": "int64", ">i8": "big-endian int64", "<u2": "uint16", ">u2": "big-endian uint16"}
_NAMES |= {">u4": "big-endian u32", "<f4": "float32"}


def _remedy(kind: str, path: Path) -> str:
    if kind == "text":
        return "it is text: give it another name, or write its ids with abi-train tokenize"
    if not kind:
        return "it is of no type of integers known here: write its ids with abi-train tokenize"
    convert = f'numpy.fromfile("{path.name}", "{kind}").astype("<u4").tofile("NEW.bin")'
    return f"it is likely {_NAMES[kind]}: convert it with {convert}"
