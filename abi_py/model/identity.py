"""What the weights of a model are known by: a digest of them as they are kept, and a fingerprint for any type.

    digest        the SHA-256 of all that their files hold; where a family's GGUF files keep norms as 1 + w, of 1 + w
    fingerprint   of every tensor a few numbers, the largest of their neighbours, and the storage that they were kept in

Adapters keep both of the model that they were trained on.  Weights of another digest are the same model in another type
if they are kept in other storages, and no tensor is further off than its two storages explain.  With numbers x and y,
at the same places, and m the largest number of 256 neighbours, in which a block of any storage is:

    root mean square of x - y  <=  1/2 root mean square of (s_x m + s_y m)

where s is the widest step of a storage (`formats/gguf/checking.py`), of floats that of their own size.  Rounding takes
1/sqrt(12) of a step; a step of 2 bits is two thirds of m, about 1.9 standard deviations of normal weights, of which
half is allowed, and two models that know nothing of each other are 1.4 apart.  Vectors (norms, biases) stay float32 in
every GGUF file, so they are held against each other almost to the bit.  What a type hides is not seen: of a model in
4 bits, adapters that somebody merged into its matrices with less than that.
"""

import base64
import binascii
import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from ..config import TrainableModelConfig
from ..errors import CheckpointError, listed, shown
from ..families import family, tensor_table
from ..formats.checkpoint_names import BASE_DIGEST, BASE_FINGERPRINT
from ..formats.encoded import Encoded, arrays_of, storage_of
from ..formats.gguf.checking import step_of
from ..formats.safetensors import Stack, Stored
from ..kernels.storage import OF_A_MATRIX, STORAGES
from ..untrusted import check, parse_json

__all__ = ["Fingerprint", "Identity", "Sample"]

Kept = Stored | Stack | Encoded
PLACES, EACH = 4, 2  # of a tensor: stretches that are looked at, and numbers of each that are kept
STRETCH = 256  # numbers: blocks of every storage are inside of one
ROUNDED = 2.0**-23  # what a float32 loses in 1 + w and back, as Gemma's norms do
REMEDY = "get them again from who made them, or train them anew"


class Sample(NamedTuple):
    """Of one tensor: its storage, numbers (PLACES * EACH,) and the largest in each stretch (PLACES,), float32."""

    storage: str
    numbers: np.ndarray
    largest: np.ndarray

    @classmethod
    def of(cls, kept: Kept) -> "Sample":
        """Take it of a tensor; of one in blocks only some rows are decoded."""
        *stacked, columns = kept.shape
        rows, numbers, largest = math.prod(stacked), [], []
        for g in range(PLACES):
            row = _row(kept, (2 * g + 1) * rows // (2 * PLACES))
            first = (2 * g + 1) * -(-columns // STRETCH) // (2 * PLACES) * STRETCH
            stretch = row[first : first + STRETCH]
            numbers += [stretch[(2 * i + 1) * len(stretch) // (2 * EACH)] for i in range(EACH)]
            largest.append(np.abs(stretch).max())
        one = kept.parts[0] if isinstance(kept, Stack) else kept
        return cls(storage_of(one).name, np.array(numbers, np.float32), np.array(largest, np.float32))

    @property
    def narrowest(self) -> str:
        """The storage, of float32 that of the fewest bits that has these numbers: they may come out of it."""
        if self.storage != "float32":
            return self.storage
        if not (self.numbers.view(np.uint32) & 0xFFFF).any():
            return "bf16"
        with np.errstate(over="ignore"):
            return "float16" if (self.numbers.astype(np.float16) == self.numbers).all() else "float32"

    @property
    def in_blocks(self) -> bool:
        """Whether numbers depend on their neighbours, so that other programs, or weights of columns, make others."""
        return self.storage in OF_A_MATRIX or STORAGES[self.storage].block > 1

    @property
    def is_possible(self) -> bool:
        """Whether some finite weights have it."""
        inside = np.abs(self.numbers) <= np.repeat(self.largest, EACH)  # of NaN it is not so
        return bool(inside.all() and np.isfinite(self.largest).all())

    def is_kept_as(self, other: "Sample") -> bool:
        """Say whether another one is in the same storage, and may come out of the same."""
        return (self.storage, self.narrowest) == (other.storage, other.narrowest)

    def explains(self, largest: np.ndarray) -> np.ndarray:
        """Return how far each number may be off, (PLACES * EACH,), where these are the largest of the stretches."""
        by = np.repeat(largest, EACH) if self.in_blocks else np.abs(self.numbers)
        return step_of(self.narrowest, by.astype(np.float64))  # squares of which float32 does not hold

    def is_near(self, other: "Sample") -> bool:
        """Say whether two samples are of one tensor; NaN and infinity are near to nothing."""
        if not (self.is_possible and other.is_possible):
            return False
        tallest = np.maximum(self.largest, other.largest).astype(np.float64)
        allowed = self.explains(tallest) + other.explains(tallest)
        if self.narrowest == other.narrowest and not self.in_blocks:
            allowed *= 0  # the one type of both explains nothing
        off = self.numbers.astype(np.float64) - other.numbers
        return bool(np.sqrt(np.mean(off**2)) <= np.sqrt(np.mean(allowed**2)) / 2 + ROUNDED)


def _row(kept: Kept, i: int) -> np.ndarray:
    """Return a row of stacked matrices, as if each lay below the one before, or a vector; float32."""
    *stacked, columns = kept.shape
    if not stacked:
        row = kept
    else:
        *index, at = (int(each) for each in np.unravel_index(i, stacked))
        matrix = kept.at(tuple(index))
        row = matrix.part(at, at + 1)
    if isinstance(row, Encoded):  # in NumPy: nothing is compiled for so few
        return row.storage.decode_ref(row.raw).reshape(columns)
    with np.errstate(over="ignore"):
        return np.asarray(row.widened(), np.float32).reshape(columns)


class Fingerprint:
    """Samples of the tensors of a model, by our names."""

    def __init__(self, samples: Mapping[str, Sample]) -> None:
        """Take them."""
        self.samples = samples

    @classmethod
    def of(cls, config: TrainableModelConfig, tensors: Callable[[str], Kept]) -> "Fingerprint":
        """Take it of a model of this shape."""
        return cls({entry.name: Sample.of(tensors(entry.name)) for entry in tensor_table(config)})

    @classmethod
    def read(cls, text: str, place: str) -> "Fingerprint":
        """Return what `to_text` has written; CheckpointError, with the place, for anything else."""
        try:
            content = parse_json(text)
        except ValueError as problem:
            raise CheckpointError(f"{place} is not JSON ({problem}); {REMEDY}") from None
        check(content, dict[str, list[str]], place)
        samples = {}
        for name, pair in content.items():
            numbers = _numbers(pair[1]) if len(pair) == 2 else None
            if numbers is None or len(numbers) != PLACES * (EACH + 1):
                rule = f"a storage and {PLACES * (EACH + 1)} numbers in base64"
                raise CheckpointError(f"{place}: {shown(name)} must be {rule}; {REMEDY}")
            if pair[0] not in STORAGES and pair[0] not in OF_A_MATRIX:
                what = f"{shown(name)} is in {shown(pair[0])}, a storage not known here"
                raise CheckpointError(f"{place}: {what}; {REMEDY}")
            sample = Sample(pair[0], numbers[: PLACES * EACH], numbers[PLACES * EACH :])
            if not sample.is_possible:
                rule = "must have finite numbers, none above the largest of its neighbours"
                raise CheckpointError(f"{place}: {shown(name)} {rule}; {REMEDY}")
            samples[name] = sample
        return cls(samples)

    def to_text(self) -> str:
        """Return it as JSON: by name the storage, and numbers in base64."""
        content = {
            name: [sample.storage, base64.b64encode(np.concatenate(sample[1:]).astype("<f4").tobytes()).decode()]
            for name, sample in self.samples.items()
        }
        return json.dumps(content, separators=(",", ":"))

    def apart(self, other: "Fingerprint") -> str:
        """Return why another one is of other weights than these, "" where it is of the same in other storages."""
        pairs = self._pairs(other)
        if lonely := [name for name in {**self.samples, **other.samples} if name not in pairs]:
            return f"one of the two has no {lonely[0]}"
        if self.is_kept_as(other):
            return f"both are kept in {self.storages()}, and are not the same numbers"
        far = [name for name, (a, b) in pairs.items() if not a.is_near(b)]
        if not far:
            return ""
        a, b = pairs[far[0]]
        types = " and ".join(dict.fromkeys((a.narrowest, b.narrowest)))
        return f"{listed(far, 1)}, further off than {types} would explain"

    def is_kept_as(self, other: "Fingerprint") -> bool:
        """Say whether all tensors that both have are in the same storage."""
        return all(a.is_kept_as(b) for a, b in self._pairs(other).values())

    def has_numbers_of(self, other: "Fingerprint") -> bool:
        """Say whether the numbers of all tensors that both have are the same."""
        return all(np.array_equal(a.numbers, b.numbers) for a, b in self._pairs(other).values())

    def storages(self, beside: "Fingerprint | None" = None) -> str:
        """Return the storages by name, in one text: of the tensors that another one has in others, or of all."""
        if beside is None:
            found = {sample.storage for sample in self.samples.values()}
        else:
            others = [(a, b) for a, b in self._pairs(beside).values() if not a.is_kept_as(b)]
            found = {a.narrowest if a.storage == b.storage else a.storage for a, b in others}
        return " and ".join(sorted(found))

    def _pairs(self, other: "Fingerprint") -> dict[str, tuple[Sample, Sample]]:
        """Return both samples of each tensor that both have; a head that is missing is the embedding."""
        found = {name: (self._sample(name), other._sample(name)) for name in {**self.samples, **other.samples}}
        return {name: (a, b) for name, (a, b) in found.items() if a is not None and b is not None}

    def _sample(self, name: str) -> Sample | None:
        tied = "token_embedding" if name == "output_proj" else name
        return self.samples.get(name, self.samples.get(tied))


def _numbers(text: str) -> np.ndarray | None:
    """Return float32 numbers of base64; None where it is none."""
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None
    return np.frombuffer(raw, "<f4") if len(raw) % 4 == 0 else None


class Identity:
    """What weights are known by; each is worked out once, when it is asked for."""

    def __init__(self, config: TrainableModelConfig, tensors: Callable[[str], Kept]) -> None:
        """Take the weights, as their files have them, by our names; `config` is their shape."""
        self.config, self._tensors = config, tensors
        entry = family(config).gguf
        self._plus_one = entry is not None and entry.plus_one

    @functools.cached_property
    def digest(self) -> str:
        """The SHA-256 of the weights in flat order; of norms that GGUF files keep as 1 + w, of that."""
        return self._digest(self._plus_one)

    @functools.cached_property
    def fingerprint(self) -> Fingerprint:
        """What is left of them in another storage."""
        return Fingerprint.of(self.config, self._tensors)

    def has(self, digest: str) -> bool:
        """Say whether a digest is theirs, of this or of earlier versions, which had no 1 + w."""
        return digest == self.digest or (self._plus_one and digest == self._digest(False))

    def facts(self) -> dict[str, str]:
        """Return both as the files of adapters say them."""
        return {BASE_DIGEST: self.digest, BASE_FINGERPRINT: self.fingerprint.to_text()}

    def _digest(self, plus_one: bool) -> str:
        digest = hashlib.sha256()
        for array in self._arrays(plus_one):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def _arrays(self, plus_one: bool) -> Iterator[np.ndarray]:
        for entry in tensor_table(self.config):
            for _, array in arrays_of(entry.name, self._tensors(entry.name)):
                yield array + np.float32(1) if plus_one and len(entry.shape) == 1 else array
