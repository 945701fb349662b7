"""What a family is: its list of layers, what its tensors are called, and how its config.json is read and written.

A family is a file of this folder with a `FAMILY`, and a line of `shape.ModelFamily`.  Nothing else knows of it:
everything reads the list of layers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..model.layers.layer import Layer
from ..parameters import Tensor
from ..shape import ModelShape

__all__ = ["Family"]


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family.

    names        ours -> (Hugging Face's, GGUF's); {i} is the number of the block
    layers       the list: embedding, branches, head
    model_types  of config.json
    read         turns the content of a config.json at a place into the fields of `TrainableModelConfig`;
                 CheckpointError names what the family does not compute
    write        returns the content of a config.json that the Transformers library reads
    """

    names: Mapping[str, tuple[str, str]]
    layers: Callable[[ModelShape], list[Layer]]
    model_types: tuple[str, ...]
    read: Callable[[Mapping[str, Any], str], dict[str, Any]]
    write: Callable[[ModelShape], dict[str, Any]]

    def tensor_table(self, shape: ModelShape) -> tuple[Tensor, ...]:
        """Return the tensors of a model in flat order."""
        table: list[Tensor] = []
        offset = 0
        for layer in self.layers(shape):
            for spec in layer.tensors():
                hf_name, gguf_name = self.names_of(layer.at + spec.name)
                made = Tensor(layer.at + spec.name, hf_name, gguf_name, spec.shape, offset, spec.decay, spec.initial)
                table.append(made)
                offset += made.size
        return tuple(table)

    def names_of(self, name: str) -> tuple[str, str]:
        """Return Hugging Face's and GGUF's names of a tensor."""
        first, _, rest = name.partition(".")
        number, _, local = rest.partition(".")
        hf_name, gguf_name = self.names[f"{first}.{{i}}.{local}" if local else name]
        return hf_name.replace("{i}", number), gguf_name.replace("{i}", number)
