"""Adapters: several by name on one model, of which one is active, or none; the model is there once.

    adapters = Adapters(model)
    adapters.add("sums", "path/of/an/adapter")
    generate(adapters.use("sums"), prompt)          # the model with these
    generate(adapters.use(None), prompt)            # the model alone, with the bits that it had before

Each is a LoraModel on the same weights, so a switch reads no file; what a `Generator` keeps of a text belongs to the
model that it was given, and is never read by another.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

from ..errors import ConfigError, listed
from ..reprs import Shown
from .frozen import FrozenModel
from .lora import LoraModel
from .transformer import TrainableModel, Transformer

__all__ = ["Adapters"]


class Adapters(Shown, Mapping[str, LoraModel]):
    """Adapters by name, and which of them are active: `active`, None for none."""

    def __init__(self, model: TrainableModel | FrozenModel) -> None:
        """Begin with none; TypeError if `model` has adapters itself."""
        if not isinstance(model, TrainableModel | FrozenModel):
            raise TypeError(f"model is a {type(model).__name__}; adapters go on a TrainableModel or a FrozenModel")
        self.base: TrainableModel | FrozenModel = model
        self.active: str | None = None
        self._of: dict[str, LoraModel] = {}

    def add(self, name: str, adapters: LoraModel | str | Path) -> LoraModel:
        """Take adapters of the model by a name, or read them: what `LoraModel.load` takes; return them.

        ConfigError for a name that is taken, or adapters that are on another model; errors of `LoraModel.load`.
        """
        if name in self._of:
            raise ConfigError(f"adapter ({name}) is there already; give another name")
        lora = adapters if isinstance(adapters, LoraModel) else LoraModel.load(self.base, adapters)
        if lora.model is not self.base:
            raise ConfigError(f"adapter ({name}) is on another model; load it on this one")
        self._of[name] = lora
        return lora

    def use(self, name: str | None) -> Transformer:
        """Make adapters the active ones, or for None none, and return the model as it then computes.

        ConfigError for a name that is not there; RuntimeError while others are merged into the model's own weights.
        """
        if name is not None and name not in self._of:
            known = f"there are {listed([*self._of], 10)}" if self._of else "there are none"
            raise ConfigError(f"adapter ({name}) is not there; {known}")
        merged = next((each for each, lora in self._of.items() if lora.is_merged and each != name), None)
        if merged is not None:
            raise RuntimeError(f"the adapters {merged} are merged into the model's weights; call their unmerge() first")
        self.active = name
        return self.model

    @property
    def model(self) -> Transformer:
        """The model with the active adapters, or alone."""
        return self.base if self.active is None else self._of[self.active]

    def _says(self) -> str:
        each = [f"{name}{' (active)' if name == self.active else ''}" for name in self._of]
        return f"{', '.join(each) or 'none'}, on {self.base!r}"

    def __getitem__(self, name: str) -> LoraModel:
        return self._of[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._of)

    def __len__(self) -> int:
        return len(self._of)
