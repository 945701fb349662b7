"""What the verbs that use a trained model share."""

import dataclasses
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..errors import ConfigError
from ..runs import compiling
from ..runs.models import find_model, open_adapters
from ..training.finding import BEST, LAST, find_place
from .compiling import compile_showing, compiling_told
from .console import note, stderr_console
from .options import PathType

if TYPE_CHECKING:
    from ..model import Adapters
    from ..model.transformer import Transformer
    from ..training.loading import LoadedModel

__all__ = [
    "INTERRUPTED",
    "TOKENIZER_HELP",
    "ModelPath",
    "adapter_option",
    "compile_for_decoding",
    "described",
    "find_folder",
    "named_models",
    "open_model",
    "put_on_model",
    "set_threads",
    "threads_option",
    "which_options",
]

Command = TypeVar("Command", bound=Callable[..., Any])
threads_option = click.option(
    "--num-threads", "threads", type=int, help="threads of the kernels (0 = all)  [all]"
)
INTERRUPTED = 130  # the exit code after Ctrl-C
TOKENIZER_HELP = "tokenizer.json, a directory with one, or a GGUF file  [the model's own]"


class ModelPath(PathType):
    """A path that must exist; llm_step_N.ckpt, the Zig trainer's name, means our directory llm_step_N."""

    def __init__(self) -> None:
        """Take click's type with these settings."""
        super().__init__(path_type=Path, exists=True)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path."""
        from ..training.checkpoint import named_like_zig

        ours = None if value == "" or os.path.exists(value) else named_like_zig(Path(value))
        return super().convert(value if ours is None else ours, param, ctx)


class NamedPath(ModelPath):
    """NAME=PATH, or a path alone; a path that is there is one, whatever is in its name."""

    name = "NAME=PATH"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the name, or None, and the path."""
        if isinstance(value, tuple):
            return value
        name, equals, path = str(value).partition("=")
        if not equals or os.path.exists(value):
            return None, super().convert(value, param, ctx)
        if not name or name.split() != [name]:
            self.fail(f"the name {name!r} must be one word, as in sums={path}", param, ctx)
        return name, super().convert(path, param, ctx)


def adapter_option(command: Command) -> Command:
    """Add --adapter to a verb, the parameter `adapters`: pairs of a name, or None, and a path."""
    return click.option(
        *("--adapter", "adapters"), type=NamedPath(), multiple=True, metavar="[NAME=]PATH",
        help="adapters on MODEL, of PEFT, llama.cpp or mlx-lm; may be repeated  [none]",
    )(command)  # fmt: skip


def which_options(command: Command) -> Command:
    """Add --best and --last to a verb, the parameter `which`: what is taken of a run."""
    best = click.option(
        *("--best", "which"), flag_value=BEST, default=None,
        help="of a run, its best checkpoint by validation loss, even while it is trained",
    )  # fmt: skip
    last = click.option("--last", "which", flag_value=LAST, help="of a run, its newest checkpoint  [its model/]")
    return best(last(command))


def find_folder(path: Path, which: str) -> Path:
    """Return the folder of a run that `which` means; tell which step that is, and what the search passed over."""
    place = find_place(path, which)
    _tell(place.skipped, place.said)
    return place.folder


def open_model(path: Path, which: str | None = None) -> "LoadedModel":
    """Load the model that `path` means; tell which step of a run that is, and what a search passed over."""
    loaded = find_model(path, which)
    _tell(loaded.skipped, loaded.said)
    for text in (*loaded.notes, *loaded.model.companions.notes):
        note(f"note: {text}")
    return loaded


def put_on_model(loaded: "LoadedModel", given: Sequence[tuple[str | None, Path]]) -> "Adapters":
    """Put adapters on a model, none of them active; tell what a user should know of them."""
    adapters, notes = open_adapters(loaded, given)
    for text in notes:
        note(f"note: {text}")
    return adapters


def named_models(
    loaded: "LoadedModel", given: Sequence[tuple[str | None, Path]]
) -> "list[tuple[str | None, LoadedModel]]":
    """Return the model with each of some adapters, by name; without any the model as it is."""
    if not given:
        return [(None, loaded)]
    adapters = put_on_model(loaded, given)
    return [(name, dataclasses.replace(loaded, model=adapters[name])) for name in adapters]


def _tell(skipped: Iterable[str], said: str) -> None:
    for reason in skipped:
        note(f"passed over: {reason}")
    if said:
        note(f"model: {said}")


def described(loaded: "LoadedModel", adapter: str | None = None) -> dict[str, Any]:
    """Return what --json says of the model: its folder, and which step of a run that is, where it is known; and which
    adapters are on it."""
    origin = loaded.origin
    known = {} if origin is None else {"step": origin.step, "steps": origin.steps, "is_best": origin.is_best}
    return {"model": {"folder": str(loaded.directory), **known}, **({} if adapter is None else {"adapter": adapter})}


def compile_for_decoding(model: "Transformer", *more: str, integer: bool = True) -> None:
    """Compile or load the kernels for a model, once all that can be wrong with flags and files has been told.

    `more` kernels are compiled too, if need be: those of a verb that does not only write.
    """
    compile_showing(compiling.kernels_of_generation(model.config, *more), stderr_console(), note)
    with compiling_told(note):  # so that no speed that is shown later has compiling or loading in it
        compiling.decode_like(model, integer=integer)


def set_threads(threads: int | None) -> None:
    """Use so many threads, all for 0; ConfigError if this machine has fewer."""
    if threads is None:
        return
    from ..training import session

    if threads < 0:
        raise ConfigError(f"num_threads ({threads}) must be at least 0; use 0 for all")
    session.set_threads(threads)
