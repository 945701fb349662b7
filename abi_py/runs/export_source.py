"""What is exported: a model that a path means, its tokenizer, and what else goes along with it."""

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path

from ..choices import ExportFormat, MergeBase
from ..config import TrainableModelConfig
from ..data.corpus import BYTE_VOCAB_SIZE
from ..data.tokenizer import TOKENIZER_FILE, Tokenizer
from ..errors import CheckpointError, ConfigError
from ..formats.checkpoint_names import CARD, ORIGIN
from ..formats.companions import Companions
from ..formats.gguf.container import SUFFIX, is_gguf, open_gguf
from ..formats.gguf.quantising import FILE_TYPES
from ..model import LoraModel, TrainableModel
from ..model.frozen import FrozenModel
from ..training.finding import Origin, find_place
from ..training.loading import LoadedModel, find_folder
from ..untrusted import read_text
from .companions import with_bytes, with_tokenizer_from
from .directory import ADAPTER, MODEL
from .model_card import card_of_another_form
from .models import find_model, find_tokenizer_beside

__all__ = ["Source", "name_of"]

STORAGES = {"bf16": "bfloat16", "float16": "float16"}  # a storage of frozen weights -> what a folder of it is called


def name_of(model: Path) -> str:
    """Return what a model is called: as its GGUF file says, or as its place is."""
    named = open_gguf(model).get("general.name", str) if is_gguf(model) else None
    return named or (model.stem if model.suffix == SUFFIX else model.absolute().name)


@dataclass(frozen=True)
class Source:
    """What is exported.

    loaded     the model, its weights mapped where they are narrow, or are under adapters that were asked for
    said       which step of a run it is, and why that is taken; "" where nothing says so
    place      the directory of its tokenizer: its own, or its run's; None where there is none
    step       optimizer steps that made the weights; 0 where nothing says so
    """

    loaded: LoadedModel
    said: str
    place: Path | None
    step: int

    @classmethod
    def open(
        cls,
        path: Path,
        which: str | None = None,
        base: Path | None = None,
        *,
        adapters: bool = False,
        merge_base: MergeBase = MergeBase.ORIGINAL,
    ) -> "Source":
        """Load what `path` means: of a run what it left, or its newest checkpoint, or as `which` says (`find_model`).

        Adapters that were trained on encoded weights are put on those that `merge_base` says.
        With `adapters` these are wanted, on `base` if that is given: of a run that left a model, those beside it.
        ConfigError for a choice where there is none, or where there are no adapters; errors of `load_model`.
        """
        original, place = merge_base is MergeBase.ORIGINAL, find_place(path, which) if adapters else None
        if place is not None and place.folder == path / MODEL and (path / ADAPTER).is_dir():
            found = find_model(path / ADAPTER, base=base, original=original, mapped=True)
            loaded = dataclasses.replace(found, run=path, skipped=place.skipped)
        else:
            if place is not None:
                find_folder(place.folder, adapters=True)  # says what is lacking for adapters
            loaded = find_model(path, which, base, original=original, mapped=adapters)
        if adapters and not isinstance(loaded.model, LoraModel):
            raise ConfigError(f"{path} is a whole model, and has no adapters; abi-train export {path} writes it")
        step = loaded.origin.step if loaded.origin is not None else 0
        said = loaded.origin.said if loaded.origin is not None else ""
        return cls(loaded, said, find_tokenizer_beside(loaded.directory, loaded.run), step)

    @property
    def name(self) -> str:
        """What the model is called: as its GGUF file says, or as its run or folder is."""
        return name_of(self.loaded.run or self.loaded.directory)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer | None:
        """That of the model or its run."""
        return None if self.place is None else Tokenizer.load(self.place)

    @functools.cached_property
    def companions(self) -> Companions:
        """What goes along: the model's own files, or those of the base under adapters, as they are.

        A tokenizer that is kept elsewhere, with adapters or in an old run from scratch, takes the place of theirs, and
        what ends its texts, and the answers of its chat template, ends them too.
        """
        model, context = self.loaded.model, self.shape.max_seq_len
        own = model.companions
        below = model.model.companions if isinstance(model, LoraModel) else own  # whose config.json is taken
        if self.place is not None and not Companions.of(self.place).files.items() <= below.files.items():
            return with_tokenizer_from(own, self.place, context)
        is_bytes = self.place is None and self.shape.vocab_size == BYTE_VOCAB_SIZE and TOKENIZER_FILE not in below.files
        return with_bytes(own, context) if is_bytes else own

    @functools.cached_property
    def model(self) -> TrainableModel | FrozenModel | LoraModel:
        """The model with these files; adapters are merged into it as it is written, a strip of rows at a time."""
        model = self.loaded.model
        model.companions = self.companions
        return model

    def texts(self, form: str) -> dict[str, str]:
        """What goes along besides: the card of a run's model as it fits that form, and which step of the run it is."""
        origin, card = self.loaded.origin, self._card
        if origin is None:
            return {}
        found = {ORIGIN: origin.to_json()}
        if card is not None and form in {each.value for each in ExportFormat}:
            text = read_text(card, error=CheckpointError, remedy="correct it, or remove it and go without a card")
            found[CARD] = card_of_another_form(text, self.companions, ExportFormat(form), origin)
        return found

    @property
    def _card(self) -> Path | None:
        """The model card: beside the weights, or, of the adapters of a run, beside the model that it left with them."""
        place, model = self.loaded.directory, self.loaded.directory.parent / MODEL
        if place.name == ADAPTER and Origin.read(model) == self.loaded.origin:
            place = model
        return place / CARD if (place / CARD).is_file() else None

    @property
    def type_of_base(self) -> str | None:
        """The type of the GGUF file of the model under adapters; None where it is none, or does not say one we know."""
        base = self.loaded.base
        if base is None or not is_gguf(base):
            return None
        number = open_gguf(base).get("general.file_type", int)
        return next((kind.name for kind in FILE_TYPES.values() if kind.id == number), None)

    @property
    def adapters(self) -> LoraModel:
        """Its adapters; ConfigError where it has none."""
        if not isinstance(self.loaded.model, LoraModel):
            raise ConfigError(f"{self.loaded.directory} is a whole model, and has no adapters; use --format hf")
        return self.loaded.model

    @property
    def shape(self) -> TrainableModelConfig:
        """The shape of the model."""
        return self.loaded.model.config

    @property
    def has_tokenizer(self) -> bool:
        """Whether a tokenizer comes along: its own, its run's, or that of the model under adapters."""
        return TOKENIZER_FILE in self.companions.files

    @property
    def dtype(self) -> str:
        """The type of its weights: that of its matrices where all are of one."""
        model = self.loaded.model
        kinds = model.storages() if isinstance(model, FrozenModel) else ()
        return STORAGES.get(kinds[0], "float32") if len(kinds) == 1 else "float32"
