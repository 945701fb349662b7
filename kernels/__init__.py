"""Functions on arrays, nothing else: one operation per file, with mathematics, NumPy reference and Numba kernel.

    import abi_py as abi

    help(abi.kernels.rms_norm)                                    the formulas, then each function and what it takes
    abi.kernels.rms_norm.rms_norm_forward(y, r, x, w, 1e-5)       float32, compiled; outputs first, the caller allocates
    y, r = abi.kernels.rms_norm.rms_norm_forward_ref(x, w, 1e-5)  the same in plain NumPy, any float type

A row of tokens goes through embedding, rms_norm or layer_norm, matmul, rope, attention, swiglu or gelu (router and
experts in a mixture) to cross_entropy; optimizers, adamw_8bit and muon change the weights.  kernels/README.md has all
of them with their shapes, and a page to type along.  Files are loaded when they are first used: this one compiles
nothing, and compiled kernels do not depend on it.
"""

import importlib
from types import ModuleType

__all__ = [  # noqa: RUF022 (in the order of kernels/README.md; a test holds it equal to the files)
    "embedding",
    "rms_norm",
    "layer_norm",
    "matmul",
    "streamed_matmul",
    "stored_matmul",
    "integer_matmul",
    "bias",
    "rope",
    "attention",
    "cached_attention",
    "swiglu",
    "gelu",
    "router",
    "experts",
    "cross_entropy",
    "dropout",
    "dora",
    "global_norm",
    "optimizers",
    "adamw_8bit",
    "muon",
    "unchecked",
    "engine",
    "storage",
]


def __getattr__(name: str) -> ModuleType:
    """Import what was asked for, at its first use (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"abi_py.kernels has no {name!r}; it has {', '.join(__all__)}")
    return importlib.import_module(f".{name}", __name__)


def __dir__() -> list[str]:
    return sorted(__all__)
