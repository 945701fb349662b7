"""Text from a trained model: read the prompt, pick the next token, append it, repeat.

    settings.py    GenerationConfig: every setting, and generation_config.json
    decoder.py     the forward pass with a cache of keys and values
    sampler.py     from logits to one token id
    text.py        text and ids, stop strings
    sequence.py    one continuation while it grows
    generator.py   the loop; `generate`

The names are loaded when they are first used: the command line reads the settings of its flags without the kernels.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .generator import Generator, generate, generate_stream
    from .sampler import sample
    from .sequence import Generation, Token
    from .settings import GenerationConfig

__all__ = ["Generation", "GenerationConfig", "Generator", "Token", "generate", "generate_stream", "sample"]

_HOMES = {
    "Generation": "sequence",
    "GenerationConfig": "settings",
    "Generator": "generator",
    "Token": "sequence",
    "generate": "generator",
    "generate_stream": "generator",
    "sample": "sampler",
}


def _load(name: str) -> Any:
    """Import what was asked for, at its first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"abi_py.generation has no {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


if not TYPE_CHECKING:  # a type checker knows the names above, and would take any other for one of these
    __getattr__ = _load
