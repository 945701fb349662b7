"""Inside a process that compiles kernels: tiny steps in which only one kernel is real at a time."""

import os
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from ..errors import AbiError
from ..lora_config import LoraConfig
from ..shape import ModelFamily, Precision
from .compiling import (
    DORA,
    GENERATION,
    HEADS,
    LORA,
    LORA_BF16,
    LORA_NARROW,
    OF_COLUMNS,
    OPTIMIZERS,
    ROUTINES,
    STORED_ROWS,
    dispatchers,
    list_of,
    of_layers,
    routines_of,
)
from .tiny_models import decode_once, tiny, tiny_frozen, tiny_shape

if TYPE_CHECKING:
    from ..model import TrainableModel

__all__ = ["exercise", "worker"]


def worker(names: list[str]) -> None:
    """Compile the named kernels one after the other and print name and seconds of each."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    from ..kernels.engine.cache import STORE

    switches, kernels = {}, dispatchers()  # which imports the files of all of them
    files = [module for name, module in sys.modules.items() if name.startswith("abi_py.kernels.")]
    for name, (module, real) in kernels.items():  # before anything else imports them
        switches[name] = _Switch(real)
        known = getattr(sys.modules[module], name)
        for file in files:  # a kernel's file may have another's, as Muon has the norm
            if vars(file).get(name) is known:
                setattr(file, name, switches[name])
    for name in sorted(names, key=_after_plain):
        kernel, _, variant = name.partition(":")
        began = time.perf_counter()
        if kernel == ROUTINES:
            routines_of(name)[1]()
        elif kernel == STORED_ROWS:
            STORE.write(list_of(name), "\n".join(_read_rows(variant)).encode())
        else:
            switch = switches[kernel]
            switch.on = True
            if variant and variant not in {*Precision}:
                exercise(kernel)  # a step of float32, too: its types are the plain kernel's, not this variant's
            before = set(switch.real.overloads)
            exercise(kernel, variant)
            switch.on = False
            new = [types for types in switch.real.overloads if types not in before]
            if not new:
                raise AbiError(f"{name}: nothing that is run for it calls it")
            if variant:
                STORE.write(list_of(name), "\n".join(map(switch.real._cache.name, new)).encode())
        if STORE.problem is not None:
            raise OSError(STORE.problem)
        print(name, time.perf_counter() - began, flush=True)


def _after_plain(name: str) -> bool:
    """Sort variants of kernels last: their runs call the plain kernels, too; routines of all kinds are first anyway."""
    return ":" in name and not name.startswith(ROUTINES)


def _end_with_parent() -> None:
    """Wait for the end of the input, which comes when the parent has closed it or was killed, however; then end."""
    while os.read(0, 1):  # not sys.stdin: Python could not end while a thread reads that
        pass
    os._exit(1)


def _read_rows(storage: str) -> list[str]:
    """Read rows of a matrix as the embedding and products do; return the names of the files that keep what does it."""
    import numpy as np

    from ..kernels.storage import STORAGES

    kept = STORAGES[storage]
    out = np.zeros((2, 2), np.float32)
    raw = kept.encode_ref(out)
    kept.rows(out, np.arange(2, dtype=np.int32), raw)
    kept.decode(out, raw, 0)
    return [kept._rows._cache.name(types) for types in kept._rows.overloads]


class _Switch:
    """A kernel that does nothing, and returns zero, until it is switched on."""

    def __init__(self, real: Any) -> None:
        self.real, self.on = real, False

    def __call__(self, *arguments: Any) -> Any:
        return self.real(*arguments) if self.on else 0.0


def _family_of(name: str) -> ModelFamily:
    """Return the first family whose layers run a kernel."""
    speak = (family for family in ModelFamily if name in of_layers(tiny_shape(family)))
    return next(speak, ModelFamily.LLAMA)


def exercise(name: str, variant: str = "", family: ModelFamily | None = None) -> None:
    """Run what calls a kernel, with the types of training: a step of a family, or of the first that has it."""
    import numpy as np

    from ..config import LlmTrainingConfig, OptimizerType
    from ..kernels import dropout
    from ..model import LoraModel
    from ..training.trainer import LlamaTrainer

    precision = variant if variant in {*Precision} else Precision.FP32.value
    family = family or _family_of(f"{name}:{HEADS}" if variant == HEADS else name)
    x = np.zeros((2, 2), np.float32)
    if name == "_dropout":  # which no step of a model without adapters calls
        dropout.dropout_forward(x, x, 0.5, 1)
        return
    if name in GENERATION:
        decode_once([tiny(family)])
        return
    kinds = {kernel: kind for kind, kernels in reversed(OPTIMIZERS.items()) for kernel in kernels}
    # No NaN guard: what the silent kernels leave unwritten may be anything.
    config = LlmTrainingConfig(
        optimizer=OptimizerType(kinds.get(name, "adamw")), grad_accum_steps=1, max_seq_len=8, nan_guard=False
    )
    ids = np.arange(16, dtype=np.uint32).reshape(2, 8)
    model: TrainableModel | LoraModel = tiny(family)
    if name in (*DORA, OF_COLUMNS) or variant in (LORA, LORA_BF16, LORA_NARROW):
        base = tiny_frozen(family, "bf16") if variant in (LORA_BF16, LORA_NARROW) else tiny(family)
        lengths, targets = name in (*DORA, OF_COLUMNS), ("embed_tokens", "lm_head") if name == OF_COLUMNS else None
        model = LoraModel(base, LoraConfig(rank=2, use_dora=lengths, target_modules=targets))
    for array in model.stack.arena.saved(ids.size, precision == "bf16", borrows=True):
        array.fill(0)  # rows of experts, which a kernel would look for where silent ones left anything
    if precision == "fp32":
        LlamaTrainer(model, config).train_step(ids, ids)
        model.forward(ids)
        if variant == HEADS:
            decode_once([model])
    else:
        model.compute_loss(ids, ids, backward=True, precision=Precision(precision))
