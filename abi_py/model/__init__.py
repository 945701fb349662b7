"""The model: parameters in, logits or loss and gradients out.

    reference.py     the whole model on a page, forward and backward, in float64 NumPy: read this first
    reference_experts.py  the same of a mixture of experts
    transformer.py   the model as its users see it; TrainableModel: all of its weights are trained
    lora.py          LoraModel: low-rank adapters on a frozen model
    adapters.py      Adapters: several of them by name, of which one is active
    stack.py         the two passes over the list of layers
    layers/          the layers, a file each
    arena.py         the arrays between the operations, and what gradient checkpointing keeps of them
    lent.py          which of them lie in the memory of gradients that are not written yet
    passes.py        which passes are replayed, and for what
    inputs.py        ids, labels and marks, checked
    folder.py        a Hugging Face folder as a model
    gguf_model.py    a GGUF file as a model
    stored.py        either, by its path
    stored_adapter.py  adapters from the disk, as PEFT's folder, mlx_adapter.py or gguf_adapter.py
    presets.py       shapes with a name

The names are loaded when they are first used: the layers are imported by the families, and those by the model.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapters import Adapters as Adapters
    from .lora import LoraModel as LoraModel
    from .loss_output import LossOutput as LossOutput
    from .transformer import TrainableModel as TrainableModel

__all__ = ["Adapters", "LoraModel", "LossOutput", "TrainableModel"]

_HOMES = {
    "Adapters": "adapters",
    "LoraModel": "lora",
    "LossOutput": "loss_output",
    "TrainableModel": "transformer",
}


def _load(name: str) -> Any:
    """Return a name of `__all__`; AttributeError if it is none."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


if not TYPE_CHECKING:  # a type checker knows the names above, and would take any other for one of these
    __getattr__ = _load
