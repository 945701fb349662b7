"""A trained model for use: finding it, its tokenizer, and the settings of generation."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from .directory import CONFIG

if TYPE_CHECKING:
    from ..data.tokenizer import Tokenizer
    from ..generation import GenerationConfig
    from ..generation.text import TextCodec
    from ..model import Adapters
    from ..training.loading import LoadedModel

__all__ = [
    "codec_of_run",
    "find_codec",
    "find_model",
    "find_tokenizer_beside",
    "generation_settings",
    "load_tokenizer",
    "open_adapters",
]

WITHOUT = "none"  # what is said for no adapters, and so no name of any


def find_model(
    path: Path, which: str | None = None, base: Path | None = None, *, original: bool = False, mapped: bool = False
) -> "LoadedModel":
    """Load the model that `path` means, of a run the "best" checkpoint, the "last", or what the rule says (`which`);
    weights that are not trained stay as they are stored, and adapters may be put on another `base` than they name, or
    on the `original` weights where they were trained on encoded ones.  `mapped`: as in `load_model`.
    """
    from ..training.loading import load_model

    return load_model(path, which, base=base, frozen=True, original=original, mapped=mapped)


def open_adapters(
    loaded: "LoadedModel", given: Sequence[tuple[str | None, Path]]
) -> "tuple[Adapters, tuple[str, ...]]":
    """Return adapters of paths, by name, on a model, and what a user should know of them; none is active.

    If all were trained on the model in one storage it is encoded in that, as for one that is opened by its path.
    Without a name they are called as their run, their folder or their file is.  ConfigError for a name that is given
    twice; CheckpointError for adapters that do not fit, were trained on other weights, or are a whole model.
    """
    from ..model import Adapters, LoraModel
    from ..model.frozen import read_frozen
    from ..training.loading import find_adapters, put_on, storage_under

    if isinstance(loaded.model, LoraModel):
        raise ConfigError(
            f"{loaded.directory} holds adapters itself, and --adapter puts others on a whole model; give the model "
            f"that they are of, and them as --adapter {loaded.directory}"
        )
    places = [find_adapters(path) for _, path in given]
    storages = [storage_under(place, loaded.directory) for place in places]
    storage = storages[0] if len({*storages}) == 1 else None
    model, notes = loaded.model, []
    if storage is not None and model.storage != storage:
        model = read_frozen(loaded.directory, storage=storage)
        notes.append(f"the model is encoded in {storage}, as it was when the adapters were trained")
    adapters = Adapters(model)
    own = load_tokenizer(loaded, None) if given else None
    for (asked, path), place, trained_in in zip(given, places, storages, strict=True):
        name = asked or (path.stem if place.is_file() else path.absolute().name)
        if name in adapters:
            raise ConfigError(f"adapter ({name}) is given twice; name them: --adapter a={path} --adapter b=...")
        if name == WITHOUT:
            raise ConfigError(f"adapter ({name}) is what stands for no adapter; give another name: --adapter a={path}")
        lora = adapters.add(name, put_on(replace(loaded, model=model), place))
        notes += [lora.other_type] if lora.other_type else []
        if trained_in not in (None, model.storage):
            notes.append(
                f"adapter {name} was trained on the model in {trained_in}, and others here were not: it is on the "
                "weights as they are stored; alone it is on those that it was trained on"
            )
        beside = find_tokenizer_beside(place, None)
        if beside is not None and own is not None and _differs(beside, own):
            notes.append(
                f"adapter {name} comes with another tokenizer or chat template than the model; --tokenizer {beside} "
                "takes it"
            )
    return adapters, tuple(notes)


def _differs(place: Path, own: "Tokenizer") -> bool:
    from ..data.tokenizer import Tokenizer

    theirs = Tokenizer.load(place)
    if (theirs.chat_template or own.chat_template) != own.chat_template:
        return True
    if theirs.hash == own.hash:
        return False
    # One that comes out of a GGUF file is the same with other entries in its file, so the words are looked at too.
    one, other = (each.backend.get_vocab(with_added_tokens=True) for each in (theirs, own))
    return one != other or theirs.special_ids != own.special_ids


def find_codec(loaded: "LoadedModel", given: Path | None) -> "TextCodec | None":
    """Return the tokenizer that was given, or is with the model or its run, or that of byte-level models; or None."""
    from ..generation.text import text_codec

    return text_codec(load_tokenizer(loaded, given), loaded.model.config.vocab_size)


def load_tokenizer(loaded: "LoadedModel", given: Path | None) -> "Tokenizer | None":
    """Return the tokenizer that was given, or that is beside the model, or in the directory of its run, or of adapters
    beside the model under them; or None."""
    from ..data.tokenizer import Tokenizer

    place = given or find_tokenizer_beside(loaded.directory, loaded.run)
    if place is None and loaded.base is not None:
        place = find_tokenizer_beside(loaded.base, None)
    return None if place is None else Tokenizer.load(place)


def find_tokenizer_beside(folder: Path, run: Path | None) -> Path | None:
    """Return where the tokenizer of the model in `folder` is: that folder or GGUF file, or the directory of its run.

    The files that a byte-level model has for other programs are none: its text is read as bytes.
    """
    from ..data.byte_tokenizer import is_byte_tokenizer
    from ..data.tokenizer import TOKENIZER_FILE
    from ..formats.checkpoint_names import TRAINING_ARGS
    from ..formats.gguf.companion_files import WITHOUT
    from ..formats.gguf.container import is_gguf, open_gguf

    if is_gguf(folder):
        has_one = open_gguf(folder).get("tokenizer.ggml.model", str) not in WITHOUT
        return folder if has_one and not is_byte_tokenizer(folder) else None
    runs = [folder.parent, folder.parent.parent]  # of RUN/llm_step_N, RUN/checkpoints/llm_step_N
    runs = [place for place in runs if any((place / name).is_file() for name in (CONFIG, TRAINING_ARGS))]
    places = (folder, *runs, *([run] if run else []))
    found = next((place for place in places if (place / TOKENIZER_FILE).is_file()), None)
    return None if found is None or is_byte_tokenizer(found) else found


def codec_of_run(directory: Path, vocab_size: int) -> "TextCodec | None":
    """Return the tokenizer that a run keeps in its directory, or that of byte-level models, or None."""
    from ..data.tokenizer import TOKENIZER_FILE, Tokenizer
    from ..generation.text import text_codec

    there = (directory / TOKENIZER_FILE).is_file()
    return text_codec(Tokenizer.load(directory) if there else None, vocab_size)


def generation_settings(loaded: "LoadedModel", file: Path | None, flags: Mapping[str, Any]) -> "GenerationConfig":
    """Return the settings: flag beats file beats the model's own generation_config.json beats the defaults.

    ConfigError for a flag without effect: what only matters for drawing, beside temperature 0, products of
    whole numbers where no weight is quantised, or an id that the model does not have.
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
    if "integer_products" in flags and not loaded.model.is_quantized:
        raise ConfigError(
            f"integer_products ({str(flags['integer_products']).lower()}) has no effect: no matrix of "
            f"{loaded.directory} is quantised; leave it out"
        )
    config.check_vocabulary(loaded.model.config.vocab_size, *flags.keys() & {"stop_ids"})
    return config
