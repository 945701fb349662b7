"""What the verbs that use a trained model share: finding it, its tokenizer and its settings, and showing text."""

import dataclasses
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import ConfigError

if TYPE_CHECKING:
    from ..generation import GenerationConfig
    from ..generation.text import TextCodec
    from ..training.loading import LoadedModel

__all__ = [
    "compile_for_decoding",
    "find_tokenizer",
    "generation_settings",
    "note",
    "open_model",
    "printable",
    "set_threads_option",
]


class ModelPath(click.Path):
    """A path that must exist; llm_step_N.ckpt, the Zig trainer's name, means our directory llm_step_N."""

    def __init__(self) -> None:
        """Take click's type with these settings."""
        super().__init__(path_type=Path, exists=True)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path."""
        from ..training.checkpoint import named_like_zig

        ours = None if os.path.exists(value) else named_like_zig(Path(value))
        return super().convert(value if ours is None else ours, param, ctx)


def note(text: str) -> None:
    """Tell the user something that is not the output."""
    click.echo(text, err=True)


def open_model(path: Path) -> "LoadedModel":
    """Load the model that `path` means, of a run wherever its checkpoints are; tell what a search passed over."""
    from ..training.loading import load_model
    from .session import place_of_checkpoints

    place = path if (path / "config.json").is_file() else place_of_checkpoints(path)  # that of a model comes first
    loaded = load_model(place)
    if place != path:
        loaded = dataclasses.replace(loaded, run=path)
    for reason in loaded.skipped:
        note(f"passed over: {reason}")
    return loaded


def compile_for_decoding() -> None:
    """Compile or load the kernels, once all that can be wrong with flags and files has been told."""
    from .compiling import compile_missing, decode_once, kernels_of_generation

    compile_missing(kernels_of_generation(), note)
    decode_once()  # so that no speed that is shown later has compiling or loading in it


def find_tokenizer(loaded: "LoadedModel", given: Path | None) -> "TextCodec | None":
    """Return the tokenizer that was given, or is with the model or its run, or that of byte-level models; or None."""
    from ..generation.text import text_codec

    return text_codec(load_tokenizer(loaded, given), loaded.model.config.vocab_size)


def load_tokenizer(loaded: "LoadedModel", given: Path | None) -> Any:
    """Return the tokenizer that was given, or that is beside the model, or in the directory of its run; or None."""
    from ..data.tokenizer import TOKENIZER_FILE, Tokenizer

    if given is not None:
        return Tokenizer.load(given)
    around = loaded.directory.parent, loaded.directory.parent.parent  # RUN/llm_step_N, RUN/checkpoints/llm_step_N
    for directory in (loaded.directory, *(around if loaded.run is None else (loaded.run,))):
        if (directory / TOKENIZER_FILE).is_file() and (directory == loaded.directory or _is_run(directory)):
            return Tokenizer.load(directory)
    return None


def _is_run(directory: Path) -> bool:
    return any((directory / name).is_file() for name in ("config.yaml", "training_args.json"))  # of run, of deepzig


def generation_settings(loaded: "LoadedModel", file: Path | None, flags: dict[str, Any]) -> "GenerationConfig":
    """Return the settings: flag beats file beats the model's own generation_config.json beats the defaults.

    ConfigError for a flag without effect: what only matters for drawing, beside temperature 0, or an id that the model
    does not have.
    """
    from ..generation import GenerationConfig
    from ..generation.settings import CONFIG_FILE

    beside = loaded.directory / CONFIG_FILE
    if file is None and beside.is_file():
        file = beside
    config = GenerationConfig.load(file) if file is not None else GenerationConfig()
    if "max_length" in flags and "max_new_tokens" not in flags:
        flags = {**flags, "max_new_tokens": None}  # as in a generation_config.json that has the one alone
    config = config.replace(**flags)
    config.require_acting(flags)
    config.check_vocabulary(loaded.model.config.vocab_size, *flags.keys() & {"stop_ids"})
    return config


def set_threads_option(threads: int | None) -> None:
    """Use so many threads, all for 0; ConfigError if this machine has fewer."""
    if threads is None:
        return
    from ..training.trainer import set_threads

    if threads < 0:
        raise ConfigError(f"threads ({threads}) must be at least 0; use 0 for all")
    set_threads(threads)


def printable(text: str) -> str:
    """Return text that a terminal shows and does not obey: control characters other than line ends as U+FFFD."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def write(pieces: Iterable[str]) -> None:
    """Write text to stdout at once; made printable if that is a terminal."""
    for piece in pieces:
        sys.stdout.write(printable(piece) if sys.stdout.isatty() else piece)
    sys.stdout.flush()


def read_stdin() -> str:
    """Return all of stdin as text without its last line end; ConfigError if it is a terminal, empty, or not UTF-8."""
    if sys.stdin.isatty():
        raise ConfigError("prompt () must be given: --prompt TEXT, or text on standard input")
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"standard input must be UTF-8 text, but byte {error.start} is not; convert it") from None
    text = text.removesuffix("\n").removesuffix("\r")
    if not text:
        raise ConfigError("prompt () must not be empty; standard input was, so give --prompt TEXT")
    return text


def utf8_output() -> None:
    """Write UTF-8 whatever the locale says: a model may write any character."""
    if isinstance(sys.stdout, os.PathLike) or not hasattr(sys.stdout, "reconfigure"):
        return
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")
