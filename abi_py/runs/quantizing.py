"""A model written as a GGUF file of another type: its size said before, its numbers and logits held against the source.

A GGUF file is converted tensor by tensor, whatever architecture it has; any other model (a folder, a run, a checkpoint)
is written as `export` does.  The logits are compared where this package computes the model.
"""

import functools
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ..config import TrainableModelConfig
from ..errors import CheckpointError, ConfigError, counted
from ..files import check_place
from ..formats.gguf.checking import Written, write_checked
from ..formats.gguf.container import GgufFile, is_gguf, open_gguf
from ..formats.gguf.importance import Importance
from ..formats.gguf.quantising import FileType
from ..formats.gguf.requantising import Conversion, convert
from ..formats.gguf.writing import Progress
from ..formats.huggingface import bytes_of_size
from ..kernels.storage import STORAGES
from ..model.folder_writing import check_space
from ..model.frozen import FrozenModel
from ..model.gguf_model import open_gguf_weights, read_gguf_config
from ..model.gguf_writing import gguf_shapes, plan_gguf
from ..training.finding import find_place
from ..training.loading import load_model
from ..training.perplexity import evaluate_conversations
from .agreement import Agreement, Expected, agreement, expected, logits_of
from .export_source import Source
from .measuring import of_text, read_ids
from .models import load_tokenizer

if TYPE_CHECKING:
    from ..data.chat_dataset import ChatDataset
    from ..training.loading import LoadedModel

__all__ = [
    "TABLE",
    "Change",
    "FileSource",
    "ModelSource",
    "OnKept",
    "OnText",
    "Prediction",
    "Quantized",
    "Yardstick",
    "check_output",
    "open_source",
    "quantize",
]

TABLE = ("F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_K_S")
MOST_TOKENS = 256  # of a text, whose logits are compared


@dataclass(frozen=True)
class Prediction:
    """What a file of a type will have: bytes of its tensors, bits of a number; tensors that lose for a second time."""

    type: FileType
    nbytes: int
    bits_per_weight: float
    requantised: tuple[str, ...] = ()  # the types that these have now
    is_weighted: bool = False  # whether an importance of columns changes what is kept


class FileSource:
    """A GGUF file."""

    def __init__(self, path: Path) -> None:
        """Open it; CheckpointError if it breaks the format."""
        self.path, self.file = path, open_gguf(path)

    @property
    def files(self) -> tuple[Path, ...]:
        """What it is in."""
        return self.file.files

    @functools.cached_property
    def shape(self) -> TrainableModelConfig:
        """The shape of its model; CheckpointError if this package does not compute it."""
        shape = read_gguf_config(self.file)
        open_gguf_weights(self.file, shape)
        return shape

    def described(self) -> tuple[str, int, dict[str, int]]:
        """Return the architecture, how many numbers there are, and how many tensors of each type."""
        return (self.file.require("general.architecture", str), *_counted(self.file))

    def predict(self, type: FileType, importance: Importance | None = None) -> Prediction:
        """Return what a file of a type will have; errors of `convert`."""
        return _prediction(convert(self.file, type, importance))

    def write(
        self, output: Path, type: FileType, importance: Importance | None, largest: str | None, check: bool,
        progress: Progress | None,
    ) -> Written:  # fmt: skip
        """Write it; errors of `write_checked`."""
        found = convert(self.file, type, importance)
        size = None if largest is None else bytes_of_size(largest)
        tensors = [move.planned() for move in found.moves]
        return write_checked(output, found.metadata, tensors, largest=size, check=check, progress=progress)

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """Return the logits (T, V) of ids (1, T)."""
        found = logits_of(FrozenModel.from_gguf(self.path), ids)
        forget(self.file)
        return found

    @functools.cached_property
    def loaded(self) -> "LoadedModel":
        """The model, for use."""
        return load_model(self.path, frozen=True)


class ModelSource:
    """A model of a folder, a run or a checkpoint."""

    def __init__(self, path: Path, which: str | None = None) -> None:
        """Open it; errors of `Source.open`."""
        self.path, self.source = path, Source.open(path, which)
        self.model = self.source.model

    files = ()

    @property
    def shape(self) -> TrainableModelConfig:
        """The shape of the model."""
        return self.source.shape

    def described(self) -> tuple[str, int, dict[str, int]]:
        """Return the family and how many numbers there are."""
        return self.shape.family.value, self.shape.num_params(), {}

    def predict(self, type: FileType, importance: Importance | None = None) -> Prediction:
        """Return what a file of a type will have; ConfigError if such files cannot say the model's shape,
        CheckpointError for an importance of another model."""
        if importance is not None:
            importance.check(gguf_shapes(self.shape))
        found = plan_gguf(self.shape, type, weighted=importance is not None)
        return Prediction(type, found.nbytes, found.bits_per_weight, is_weighted=_is_weighted(found.storages.values()))

    def write(
        self, output: Path, type: FileType, importance: Importance | None, largest: str | None, check: bool,
        progress: Progress | None,
    ) -> Written:  # fmt: skip
        """Write it; errors of `Writable.write_gguf`."""
        columns = None if importance is None else importance.columns
        return self.model.write_gguf(
            *(output, type.name),
            name=self.source.name,
            importance=columns,
            max_shard_size=largest,
            check=check,
            progress=progress,
        )

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """Return the logits (T, V) of ids (1, T)."""
        return logits_of(self.model, ids)

    @property
    def loaded(self) -> "LoadedModel":
        """The model, for use."""
        return self.source.loaded


def open_source(path: Path, which: str | None = None) -> FileSource | ModelSource:
    """Return what is quantised: a GGUF file, or what else a path means as a model."""
    find_place(path, which)  # raises for a choice where there is none
    return FileSource(path) if is_gguf(path) else ModelSource(path, which)


@dataclass(frozen=True)
class Quantized:
    """What was written and how near it is: the agreement of logits, or why they were not compared."""

    written: Written
    agreement: Agreement | None
    reason: str = ""

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in self.written.files)


def quantize(
    source: FileSource | ModelSource,
    output: Path,
    type: FileType,
    *,
    importance: Importance | None = None,
    max_shard_size: str | None = None,
    check: bool = True,
    force: bool = False,
    progress: Progress | None = None,
) -> Quantized:
    """Write a model as a GGUF file of a type; unless `check` is false, read it again and compare logits.

    ConfigError for an output that is there (unless `force`), or is the source; CheckpointError for a disk that is too
    small, or if what was written is not what the type explains; errors of `Source.write`.
    """
    predicted = source.predict(type, importance)
    check_output(source, output, force)
    output.absolute().parent.mkdir(parents=True, exist_ok=True)
    check_space(output, predicted.nbytes)
    wanted = _expected(source) if check else "--no-check"
    written = source.write(output, type, importance, max_shard_size, check, progress)
    if isinstance(wanted, str):
        return Quantized(written, None, wanted)
    return Quantized(written, wanted.compare(written))


def _expected(source: FileSource | ModelSource) -> Expected | str:
    try:
        shape = source.shape
    except CheckpointError as error:  # an architecture that is unknown here
        return str(error)
    return expected(source.logits, shape)


@dataclass(frozen=True)
class Change:
    """What a file of another type makes of a text: perplexity, that of the source, and how near its logits are."""

    perplexity: float
    before: float
    agreement: Agreement

    @property
    def percent(self) -> float:
        """How much the perplexity rises."""
        return 100 * (self.perplexity / self.before - 1)


class Yardstick(Protocol):
    """What files of a model are measured on: its name, and the perplexity of the model itself."""

    @property
    def name(self) -> str: ...
    @property
    def before(self) -> float: ...
    def perplexity(self, path: Path) -> float:
        """Return that of a file."""


class OnKept:
    """Measures files of a model on the answers of conversations that a run keeps for validation."""

    def __init__(self, loaded: "LoadedModel", kept: "ChatDataset", whose: str) -> None:
        """Measure the model; `whose` conversations these are is for people."""
        self.kept = kept
        self.name = f"{counted(len(kept), 'conversation')} that {whose} keeps for validation"
        self.before = evaluate_conversations(loaded.model, kept).perplexity

    def perplexity(self, path: Path) -> float:
        """Return that of a file."""
        return evaluate_conversations(load_model(path, frozen=True).model, self.kept).perplexity


class OnText:
    """Measures files of a model on a text, as `abi-train eval` does, and compares the logits of its beginning."""

    def __init__(self, source: FileSource | ModelSource, text: Path) -> None:
        """Measure the source; errors of `load_model` and `measuring.of_text`."""
        self.text, loaded = text, source.loaded
        self.name = str(text)
        self.codec = load_tokenizer(loaded, None)
        ids, _ = read_ids(text, self.codec, loaded.model.config.vocab_size, [])
        self.ids = ids[None, : min(MOST_TOKENS, loaded.model.config.max_seq_len)].astype(np.int64)
        self.before = self._perplexity(loaded)
        self.logits = logits_of(loaded.model, self.ids)

    def change(self, path: Path) -> Change:
        """Return what a file makes of the text."""
        loaded = load_model(path, frozen=True)
        found = agreement(self.logits, logits_of(loaded.model, self.ids))
        return Change(self._perplexity(loaded), self.before, found)

    def perplexity(self, path: Path) -> float:
        """Return that of a file."""
        return self._perplexity(load_model(path, frozen=True))

    def _perplexity(self, loaded: "LoadedModel") -> float:
        results: list[float] = []
        measurement = of_text(loaded, self.text, self.codec, None, None)
        measurement.run(lambda done, total, result: results.append(result.perplexity))
        return results[-1]


def _prediction(found: Conversion) -> Prediction:
    twice = sorted({move.source.kind.name for move in found.moves if move.is_requantised})
    weighted = _is_weighted(move.kind.storage_name for move in found.moves)
    return Prediction(found.type, found.nbytes, found.bits_per_weight, tuple(twice), weighted)


def _is_weighted(storages: Iterable[str]) -> bool:
    return any(name in STORAGES and STORAGES[name].weighted for name in storages)


def _counted(file: GgufFile) -> tuple[int, dict[str, int]]:
    numbers, kinds = 0, dict[str, int]()
    for tensor in file.tensors.values():
        numbers += tensor.size // tensor.kind.bytes * tensor.kind.block
        kinds[tensor.kind.name] = kinds.get(tensor.kind.name, 0) + 1
    return numbers, kinds


def forget(file: GgufFile) -> None:
    """Let the system take back the memory of a file's tensors."""
    for tensor in file.tensors.values():
        tensor.forget()


def check_output(source: FileSource | ModelSource, output: Path, force: bool) -> None:
    """Raise ConfigError for a place where a file must not be written, or cannot be."""
    if output.is_dir():
        raise ConfigError(f"out ({output}) must be a file, and is a directory; give a name, as in {output}/model.gguf")
    if output.exists() and not output.is_file():
        raise ConfigError(f"out ({output}) must be a file, and is a device or a pipe; choose another")
    check_place("out", output)
    if not os.path.lexists(output):
        return
    if any(output.exists() and output.samefile(path) for path in source.files):
        raise ConfigError(f"out ({output}) must be another file than the model that is read; choose another name")
    if not force:
        raise ConfigError(f"out ({output}) is there already; --force replaces it, or choose another")
