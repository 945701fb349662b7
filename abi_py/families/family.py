"""What a family is: its list of layers, what its tensors are called, and how its config.json is read and written.

A family is a file of this folder with a `FAMILY`, and a line of `shape.ModelFamily`.  Nothing else knows of it:
everything reads the list of layers.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..model.layers.layer import Layer
from ..parameters import HfName, Tensor
from ..shape import ModelShape
from .gguf_keys import Gguf

__all__ = ["Family", "HfNames"]

HfNames = str | HfName | tuple[str | HfName, ...]
ROTARY = r"(^|\.)rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)$"


@dataclass(frozen=True, kw_only=True, eq=False)
class Family:
    """One family; it is itself alone, whatever its fields, so that what is made of it can be kept by it.

    names        ours -> (Hugging Face's, GGUF's); {i} is the number of the block.  Hugging Face's may be a form
                 (`HfName`), or several of which the first is written and any is read
    layers       the list: embedding, branches, head
    model_types  of config.json
    read         turns the content of a config.json at a place into the fields of `TrainableModelConfig`;
                 CheckpointError names what the family does not compute
    write        returns the content of a config.json that the Transformers library reads
    prefix       what Hugging Face's names of all but the head begin with, and some folders leave out
    derived      pattern of stored buffers that follow from config.json, and are not read
    entries      of a config.json that `read` knows, and neither `write` writes nor other families have
    gguf         its entry for GGUF files; None where llama.cpp does not have the family
    """

    names: Mapping[str, tuple[HfNames, str]]
    layers: Callable[[ModelShape], list[Layer]]
    model_types: tuple[str, ...]
    read: Callable[[Mapping[str, Any], str], dict[str, Any]]
    write: Callable[[ModelShape], dict[str, Any]]
    prefix: str = "model."
    derived: str = ROTARY
    entries: tuple[str, ...] = ()
    gguf: Gguf | None = None

    def tensor_table(self, shape: ModelShape) -> tuple[Tensor, ...]:
        """Return the tensors of a model in flat order."""
        table: list[Tensor] = []
        offset = 0
        for layer in self.layers(shape):
            for spec in layer.tensors():
                name = layer.at + spec.name
                begin, kind = (spec.initial, spec.std), (spec.hidden, spec.embedding)
                table.append(Tensor(name, *self.names_of(name), spec.shape, offset, spec.decay, *begin, *kind))
                offset += table[-1].size
        return tuple(table)

    def names_of(self, name: str) -> tuple[tuple[HfName, ...], str]:
        """Return Hugging Face's names of a tensor, and GGUF's."""
        first, _, rest = name.partition(".")
        number, _, local = rest.partition(".")
        hf_names, gguf_name = self.names[f"{first}.{{i}}.{local}" if local else name]
        several = hf_names if isinstance(hf_names, tuple) else (hf_names,)
        forms = [HfName(form) if isinstance(form, str) else form for form in several]
        numbered = tuple(replace(form, name=form.name.replace("{i}", number)) for form in forms)
        return numbered, gguf_name.replace("{i}", number)

    def bare(self, name: str) -> str:
        """Return a stored tensor's name without the prefix."""
        return name.removeprefix(self.prefix)

    def is_derived(self, name: str) -> bool:
        """Say whether a stored tensor follows from config.json."""
        return re.search(self.derived, name) is not None
