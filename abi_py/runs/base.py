"""The model that a run starts from: any folder of Hugging Face's kind, a GGUF file, what a run left, a checkpoint.

Its shape, its tokenizer and its chat template are the run's.  Where it is and its digest are recorded in config.yaml;
a run that goes on needs it no more.
"""

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import TrainableModelConfig, convert, fields_of
from ..errors import ConfigError
from ..fields import plain
from ..files import sha256_of
from ..formats.checkpoint_names import is_checkpoint_name
from .conversations import ends_of_answers, find_files, no_tokenizer
from .directory import MODEL
from .models import find_tokenizer_beside
from .settings import BaseConfig, ChatConfig, DataConfig

if TYPE_CHECKING:
    from ..formats.companions import Companions
    from ..model import TrainableModel
    from ..model.frozen import FrozenModel

__all__ = ["Base", "with_tokenizer"]

# What is no property of the weights: a run may choose it.
FREE = ("checkpointing", "checkpoint_interval", "router_aux_loss_coef", "router_z_loss_coef")
WITHOUT_EFFECT = ("seed",)


@dataclass(frozen=True)
class Base:
    """A model to start from.

    given      what was asked for, as the run records it: the path, absolute, and the digest
    place      the folder or GGUF file of the weights; another than the path where that is a run
    shape      as its config.json, or its metadata, have it
    tokenizer  the directory or GGUF file of its tokenizer, or None
    skipped    what a search passed over, and why
    notes      what a user should know of its tokenizer
    said       which step of a run it is, and why that was taken; "" of a folder that does not say so
    replaced   whether it is inside of a run that replaces it when it is trained further
    """

    given: BaseConfig
    place: Path
    shape: TrainableModelConfig
    tokenizer: Path | None
    skipped: tuple[str, ...] = ()
    said: str = ""
    notes: tuple[str, ...] = ()
    replaced: bool = False

    @classmethod
    def open(cls, given: BaseConfig, remedy: str = "") -> "Base":
        """Find it, read its shape, and see that its files hold the weights; these are not read.

        `remedy` is that for a base which is not there or is another one, where these are of a run that goes on.
        ConfigError if there is no such model, or it has another digest than was asked for; CheckpointError if its
        files are damaged, or of a model that this package does not compute.
        """
        from ..data.tokenizer import Tokenizer
        from ..formats.gguf.container import is_gguf
        from ..formats.huggingface import CONFIG, INDEX, WEIGHTS
        from ..formats.peft import ADAPTER_CONFIG
        from ..model.stored import open_stored
        from ..training.checkpoint import STATE
        from ..training.finding import find_place, has_checkpoint
        from ..training.loading import find_folder, holds_adapters

        path = Path(given.path or "")
        if not path.is_dir() and not is_gguf(path):
            what = "is a file" if path.exists() else "does not exist"
            usual = "give the folder of a model (config.json and model.safetensors), or a GGUF file"
            raise ConfigError(f"base ({path}) {what}; {remedy or usual}")
        place = find_place(path, given.which.value if given.which is not None else None)
        files = (CONFIG, WEIGHTS, INDEX, ADAPTER_CONFIG, STATE)
        if path.is_dir() and not any((place.folder / name).is_file() for name in files) and not has_checkpoint(path):
            file = next(iter(sorted(path.glob("*.gguf"))), None)
            one = "give the folder of one" if file is None else f"give the GGUF file: {file}"
            raise ConfigError(f"base ({path}) holds no model: neither {CONFIG} and weights nor a checkpoint; {one}")
        found = find_folder(place.folder)
        if holds_adapters(found.path):
            own = "BASE " if is_gguf(found.path) else ""  # a GGUF file does not say where the model under them is
            raise ConfigError(
                f"base ({path}) holds adapters, not a whole model; merge them first: abi-train merge {own}{path} "
                "-o MERGED"
            )
        stored = open_stored(found.path)  # before a run writes anything: what is missing is told
        shape = stored.config
        digest = digest_of(found.path)
        if given.digest and not digest.startswith(given.digest.lower()):
            raise ConfigError(
                f"base ({path}) has the digest {digest[:12]}, but {given.digest[:12]} is asked for: these are other "
                "weights, as of a run that was trained further; "
                f"{remedy or 'give the one with that digest, or leave digest out'}"
            )
        tokenizer = find_tokenizer_beside(found.path, place.run)
        if tokenizer is not None:
            ids = Tokenizer.load(tokenizer).vocab_size
            if ids > shape.vocab_size:
                raise ConfigError(
                    f"base ({path}): its tokenizer has {ids:,} ids, its model {shape.vocab_size:,}; the two do not "
                    "belong together"
                )
        notes = () if tokenizer is None else stored.companions.notes
        recorded = BaseConfig(path=str(path.absolute()), digest=digest, which=given.which)
        skipped, inside = (*place.skipped, *found.skipped), place.run is not None or _is_in_run(found.path)
        return cls(recorded, found.path, shape, tokenizer, skipped, place.said, notes, inside)

    @property
    def is_byte_level(self) -> bool:
        """Whether the model reads text as bytes."""
        return self.tokenizer is None and self.shape.vocab_size == 257

    def model_values(self, values: Mapping[str, Any], flags: Collection[str]) -> dict[str, Any]:
        """Return the fields of the run's model: those of the base, with what `values` may change of them.

        ConfigError for a value that contradicts the base, or a flag without effect, which names both.
        """
        own = {**self.shape.to_dict(), "head_dim": self.shape.resolved_head_dim}
        options = {option.name: option for option in fields_of(TrainableModelConfig)}
        for name, value in values.items():
            converted = convert(options[name], value)
            wanted = plain(converted)
            if name in WITHOUT_EFFECT and name in flags:
                raise ConfigError(
                    f"{name} ({wanted}) of the model has no effect with base ({self.given.path}), whose weights are "
                    "taken; leave it out"
                )
            if name not in (*FREE, *WITHOUT_EFFECT) and wanted is not None and wanted != own[name]:
                raise ConfigError(
                    f"{name} ({wanted}) of the model contradicts base ({self.given.path}), whose {name} is "
                    f"{own[name]}; leave {name} out"
                )
        return {**self.shape.to_dict(), **{name: values[name] for name in FREE if name in values}}

    def check_data(self, data: DataConfig, chat: ChatConfig) -> None:
        """Raise ConfigError if the model cannot read data that are so described."""
        from ..data.tokenizer import Tokenizer

        reads = "bytes" if self.is_byte_level else "the ids of its tokenizer" if self.tokenizer else "ids it was given"
        if data.train_tokenizer:
            raise ConfigError(
                f"train_tokenizer ({data.train_tokenizer}) is for a model that begins with random weights, and base "
                f"({self.given.path}) knows {reads}; leave it out"
            )
        if self.is_byte_level and data.path and data.tokenizer is None and find_files(data.path, chat):
            raise no_tokenizer(f"base ({self.given.path})", self.shape.vocab_size, "give a base with one, or texts")
        if data.tokenizer is not None and self.tokenizer is not None:
            given, own = Tokenizer.load(data.tokenizer), Tokenizer.load(self.tokenizer)
            if given.hash != own.hash:
                raise ConfigError(
                    f"tokenizer ({data.tokenizer}) is another one (hash {given.hash[:12]}) than that of base "
                    f"({self.given.path}, hash {own.hash[:12]}), whose ids the model knows; leave it out"
                )
        if not data.path and not self.is_byte_level:
            raise ConfigError(
                f"data must be given with base ({self.given.path}): the standard library is read as bytes, which this "
                "model does not read; give --data"
            )
        if data.path and data.tokenizer is None and self.tokenizer is None and not self.is_byte_level:
            from ..data.sources import is_token_file

            texts = [path for path in (*data.path, *data.valid_path) if not is_token_file(path)]
            if texts:
                raise ConfigError(
                    f"tokenizer must be given for {texts[0]}: base ({self.given.path}) has none; give --tokenizer, the "
                    "one that the model was trained with"
                )

    def make_model(self, config: TrainableModelConfig) -> "TrainableModel":
        """Read the weights into a model of its shape, with the choices of a run."""
        from ..model.transformer import TrainableModel

        return TrainableModel.from_pretrained(self.place, config)

    def make_frozen(self, config: TrainableModelConfig, storage: str | None = None) -> "TrainableModel | FrozenModel":
        """Read the weights for adapters on them: as they are kept, mapped, where they are narrow, or encoded."""
        from ..model.frozen import read_frozen

        return read_frozen(self.place, config, storage=storage)

    def frozen_bytes(self, config: TrainableModelConfig, storage: str | None = None) -> int:
        """Return the bytes that they so take; ConfigError where a matrix does not fit into the storage."""
        from ..model.frozen import frozen_bytes

        return frozen_bytes(self.place, config, storage)

    def companions(self, directory: Path, conversations: bool = False) -> "Companions":
        """Return what the checkpoints of a run in `directory` carry along: the base's files as they are.

        A tokenizer that the run was given takes the place of theirs, or its chat template that of theirs.  Where it
        trains on `conversations`, a text ends at the ids that end an answer, too.
        """
        companions = self._companions(directory)
        return companions.with_ends(ends_of_answers(directory)) if conversations else companions

    def _companions(self, directory: Path) -> "Companions":
        from ..data.tokenizer import TOKENIZER_FILE, Tokenizer
        from ..model.stored import companions_at

        companions = companions_at(self.place)
        if not (directory / TOKENIZER_FILE).is_file():
            return companions
        kept = Tokenizer.load(directory)
        own = None if self.tokenizer is None else Tokenizer.load(self.tokenizer)
        if self.tokenizer is None or own is None or own.hash != kept.hash:
            return companions.with_tokenizer_of(directory)
        if self.tokenizer != self.place:
            companions = companions.with_tokenizer_of(self.tokenizer)
        if own.chat_template == kept.chat_template or kept.chat_template is None:
            return companions
        return companions.with_chat_template(kept.chat_template)


def _is_in_run(place: Path) -> bool:
    """Say whether a folder is a run's RUN/model, or one of its checkpoints."""
    from ..training.finding import is_run

    place = place.absolute()
    of_checkpoints = is_checkpoint_name(place) and any(map(is_run, place.parents[:2]))
    return of_checkpoints or (place.name == MODEL and is_run(place.parent))


def digest_of(place: Path) -> str:
    """Return the SHA-256 of a model: of a GGUF file its own, of several that of their hashes, of a folder that of the
    names and hashes of config.json and the files of weights."""
    from ..formats.gguf.container import is_gguf, open_gguf
    from ..formats.huggingface import CONFIG, INDEX, WEIGHTS

    if is_gguf(place):
        hashes = [sha256_of(path)[1] for path in open_gguf(place).files]
        return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
    names = {CONFIG, WEIGHTS, INDEX} | {path.name for path in place.glob("*.safetensors")}
    names -= {"optimizer.safetensors"}  # of a checkpoint: it is no part of the model
    lines = [f"{name} {sha256_of(place / name)[1]}\n" for name in sorted(names) if (place / name).is_file()]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def with_tokenizer(data: DataConfig, place: Path | None) -> DataConfig:
    """Return how data are opened where the tokenizer in `place` is taken for them, unless they name one."""
    return data.replace(tokenizer=str(place)) if place is not None and data.path and data.tokenizer is None else data
