"""The operations without their checks, for callers whose arrays fit by construction.

    from abi_py.kernels.unchecked import rms_norm_forward

The model lays out all arrays of a step once and checks what comes in at its own border; a small step has fifty calls,
and their checks would be a tenth of it.
"""

from importlib import import_module
from typing import Any

from .engine.checks import unchecked

__all__ = []  # names are found when they are asked for, so that a process that compiles can replace kernels before

MODULES = (
    *("embedding", "rms_norm", "layer_norm", "matmul", "streamed_matmul", "stored_matmul", "bias", "rope", "attention"),
    *("cached_attention", "swiglu", "gelu", "router", "experts", "cross_entropy", "dropout", "dora", "global_norm"),
    *("optimizers", "adamw_8bit", "muon"),
)


def __getattr__(name: str) -> Any:
    """Return an operation by its name; AttributeError if there is none."""
    if not name.startswith("_"):
        for module in MODULES:
            found = getattr(import_module(f"{__package__}.{module}"), name, None)
            if callable(found):
                return unchecked(found)
    raise AttributeError(f"module {__name__} has no operation {name}")
