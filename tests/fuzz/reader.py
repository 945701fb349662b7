"""What the fuzzer knows of a reader, and the small model that most of its valid files are of."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import abi_py as abi

SHAPE = {"hidden_dim": 8, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "intermediate_dim": 16}


@dataclass(frozen=True)
class Reader:
    """`make` fills a folder, `files` of it are damaged, one at a time, and `read` reads it; `mend` fits checksums.

    A quick reader has a larger `share` of the inputs.
    """

    name: str
    make: Callable[[Path], None]
    files: tuple[str, ...]
    read: Callable[[Path], Any]
    mend: Callable[[Path], None] = field(default=lambda folder: None)
    share: int = 1


def small_model(**changes: Any) -> abi.TrainableModel:
    """Return a model of random weights."""
    return abi.TrainableModel(abi.TrainableModelConfig(**{**SHAPE, "vocab_size": 32, "max_seq_len": 16, **changes}))


def write_json(path: Path, content: Any) -> None:
    """Write a value as JSON."""
    path.write_text(json.dumps(content, indent=1))
