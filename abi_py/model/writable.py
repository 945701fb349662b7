"""What every model can do with its weights: write them as a folder, or as a GGUF file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ..config import TrainableModelConfig
from ..formats.companions import Companions
from ..formats.gguf.checking import Written
from ..formats.gguf.companion_files import metadata_of_companions
from ..formats.gguf.writing import Progress
from ..formats.merged import Kept
from ..parameters import Tensor
from .folder_writing import Savable, write_folder
from .gguf_writing import write_gguf_model

__all__ = ["Writable"]


class Writable(ABC):
    """A network of some shape, with all its weights."""

    config: TrainableModelConfig
    companions = Companions()  # what belongs to it beside its weights, and goes along into folders and checkpoints

    def stored_config(self) -> TrainableModelConfig:
        """Return the shape of what is written."""
        return self.config

    @abstractmethod
    def stored_tensors(self) -> tuple[tuple[Tensor, ...], Mapping[str, Kept]]:
        """Return the table of all tensors of the network, and their numbers by name."""

    def save_pretrained(
        self,
        folder: str | Path,
        dtype: str = "float32",
        max_shard_size: int | str = "5GB",
        *,
        tokenizer: Savable | None = None,
        files: Mapping[str, str] | None = None,
        replace: bool = False,
    ) -> None:
        """Write the model, adapters merged, as a Hugging Face folder, or leave what was there as it was.

        dtype is float32, bfloat16 or float16.  The `companions`, of the folder that it came from, go along: tokenizer,
        chat template, settings of generation, and the entries of config.json that others need.  `tokenizer` takes the
        place of theirs, and `files` are texts by name that are written besides.
        Of a folder that is there, weights, adapters and settings of generation go; a tokenizer stays if the model has
        none, as one that was saved before it, unless with `replace`; so does what belongs to no model, as a LICENSE.
        NonFiniteError for a weight that is NaN or infinite, or would be in this type; CheckpointError for a full disk;
        ConfigError for other values, or a folder that holds directories, or is that of a checkpoint or a run.
        """
        model, besides = (self.stored_config(), *self.stored_tensors()), (self.companions, tokenizer, files or {})
        write_folder(Path(folder), model, besides, dtype=dtype, max_shard_size=max_shard_size, replace=replace)

    def export_to_gguf(
        self,
        path: str | Path,
        quantize: str = "F32",
        *,
        name: str | None = None,
        importance: Mapping[str, np.ndarray] | None = None,
        max_shard_size: int | str | None = None,
    ) -> tuple[Path, ...]:
        """Write the model, adapters merged, as a GGUF file for llama.cpp, and return the files that it is in.

        quantize        F32, F16, BF16, Q8_0, Q6_K, Q4_K_M ...: what each tensor is kept in follows (docs/7-gguf.md)
        name            of the model; that of the file when not given
        importance      by GGUF's names, how much an error in each column of a matrix counts, float32 (K,)
        max_shard_size  largest file, as in "4GB"; above it several, PATH-00001-of-00003.gguf ...
        Its tokenizer and chat template, of the `companions`, go along.  ConfigError for what such a file cannot say,
        with the reason; DataError for a tokenizer that llama.cpp would not follow; NonFiniteError for a weight that is
        NaN or infinite, or larger than its type holds; OSError.
        """
        return self.write_gguf(
            path, quantize, name=name, importance=importance, max_shard_size=max_shard_size, check=False
        ).files

    def write_gguf(
        self,
        path: str | Path,
        quantize: str,
        *,
        name: str | None = None,
        importance: Mapping[str, np.ndarray] | None = None,
        max_shard_size: int | str | None = None,
        check: bool = True,
        progress: Progress | None = None,
    ) -> Written:
        """Do the same, read what was written again if `check`, and return what each tensor lost.

        `progress` is told of every strip; CheckpointError if it does not read as it was written.
        """
        model = self.stored_config(), *self.stored_tensors()
        written = metadata_of_companions(self.companions, self.config.vocab_size)
        tokenizer = {"tokenizer.ggml.model": "none"} if written is None else written.metadata
        metadata = {"general.name": name or Path(path).stem, **tokenizer}
        return write_gguf_model(
            *(path, model, quantize),
            metadata=metadata,
            importance=importance,
            max_shard_size=max_shard_size,
            check=check,
            progress=progress,
        )
