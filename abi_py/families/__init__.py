"""The families of models, a file each; `family.py` says what one is.

family(shape)          the family of a model of this shape
layers(shape)          its list of layers
tensor_table(shape)    its tensors in flat order, with their three names
read_config(content)   the shape that a Hugging Face config.json describes
write_config(shape)    the content of such a file
difference(content, shape)   in what such a file describes another shape
read_gguf(file)        the shape that the metadata and tensors of a GGUF file describe
write_gguf(shape)      the metadata of such a file
"""

from collections.abc import Mapping
from functools import lru_cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, ConfigError, shown
from ..fields import either
from ..model.layers.layer import Layer
from ..parameters import Tensor
from ..shape import EXPERTS, ModelFamily, ModelShape
from .family import Family
from .gguf_keys import Gguf, Keys

if TYPE_CHECKING:
    from ..formats.gguf.container import GgufFile

__all__ = [
    "FAMILIES",
    "Family",
    "difference",
    "family",
    "gguf_entry",
    "layers",
    "read_config",
    "read_gguf",
    "tensor_table",
    "write_config",
    "write_gguf",
]

FAMILIES: dict[ModelFamily, Family] = {name: import_module(f"{__name__}.{name.value}").FAMILY for name in ModelFamily}
KINDS = [kind for each in FAMILIES.values() for kind in each.model_types]
if len(set(KINDS)) < len(KINDS):
    twice = next(kind for kind in KINDS if KINDS.count(kind) > 1)
    raise TypeError(f"two families read model_type {twice}; a config.json could not tell which is meant")


def family(shape: ModelShape) -> Family:
    """Return the family of a model of this shape."""
    return FAMILIES[shape.family]


def layers(shape: ModelShape) -> list[Layer]:
    """Return the layers of a model of this shape, not bound to weights."""
    return family(shape).layers(shape)


@lru_cache(maxsize=8)
def _table_of(kind: Family, shape: ModelShape) -> tuple[Tensor, ...]:
    return kind.tensor_table(shape)


def tensor_table(shape: ModelShape) -> tuple[Tensor, ...]:
    """Return the tensors of a model of this shape in flat order; an adapter asks for them about twenty times."""
    return _table_of(family(shape), shape)


def read_config(content: Mapping[str, Any], place: str = "config.json") -> dict[str, Any]:
    """Return the fields of the shape that a config.json describes.

    CheckpointError names its place, and a kind of model, or an entry, that is not computed here.
    """
    kind = content.get("model_type")
    for name, found in FAMILIES.items():
        if kind in found.model_types:
            return {**found.read(content, place), "family": name}
    raise CheckpointError(f"{place}: model_type is {shown(kind)}; this version reads {either(KINDS)}")


def difference(content: Mapping[str, Any], shape: ModelShape) -> str | None:
    """Return the first field that a config.json is read with another value of than a shape has, or what is wrong."""
    try:
        fields = read_config(content)
        back = ModelShape.from_dict(fields)
    except (CheckpointError, ConfigError) as problem:
        return str(problem)
    if back.resolved_head_dim != shape.resolved_head_dim:  # None is a width too
        return "head_dim"
    found, own = back.to_dict(), shape.to_dict()
    return next((name for name in fields if name != "head_dim" and found[name] != own[name]), None)


def write_config(shape: ModelShape) -> dict[str, Any]:
    """Return the content of a config.json for a model of this shape.

    RuntimeError if the family would not read it as the same: nothing could open what was saved with it.
    """
    content = family(shape).write(shape)
    wrong = difference(content, shape)
    if wrong is not None:
        raise RuntimeError(f"{shape.family.value}: its `read` does not give back what its `write` wrote: {wrong}")
    return content


# -- GGUF files ---------------------------------------------------------------------------------------


def gguf_entry(shape: ModelShape) -> Gguf:
    """Return the entry for GGUF files of the family of a shape; ConfigError if it has none."""
    entry = family(shape).gguf
    if entry is None:
        raise ConfigError(
            f"family ({shape.family.value}) cannot be written as GGUF: llama.cpp does not have it; export a Hugging "
            "Face folder"
        )
    return entry


def read_gguf(file: "GgufFile") -> dict[str, Any]:
    """Return the fields of the shape that a GGUF file describes.

    CheckpointError names an architecture, or an entry of its metadata, that is not computed here.
    """
    kind = file.get("general.type", str)
    if kind not in (None, "model"):
        remedy = "give it as --adapter, beside its model" if kind == "adapter" else "get the file of the model"
        raise CheckpointError(f"{file.path}: general.type is {shown(kind)}, so it holds no whole model; {remedy}")
    found = file.require("general.architecture", str)
    known = {name: each.gguf for name, each in FAMILIES.items() if each.gguf is not None and each.gguf.read is not None}
    keys = Keys(file, found)
    has_experts = keys.whole("expert_count", 0) > 0
    for name, entry in known.items():
        if entry.architecture == found and (name in EXPERTS) == has_experts and entry.read is not None:
            fields = {**entry.read(keys), "family": name}
            keys.refuse_unknown()
            return fields
    architectures = list(dict.fromkeys(entry.architecture for entry in known.values()))
    if found in architectures:
        count = keys.whole("expert_count", 0)
        raise CheckpointError(f"{file.path}: {found}.expert_count is {count}, which this version does not compute")
    raise CheckpointError(
        f"{file.path}: general.architecture is {shown(found)}; this version reads {either(architectures)}"
    )


def write_gguf(shape: ModelShape) -> dict[str, Any]:
    """Return the metadata of a GGUF file that describes a shape, with its types; ConfigError if none can."""
    entry = gguf_entry(shape)
    return {
        "general.architecture": entry.architecture,
        **{f"{entry.architecture}.{name}": value for name, value in entry.write(shape).items()},
    }
