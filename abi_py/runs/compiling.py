"""Compiling kernels ahead of their first use, in parallel processes.

A process runs tiny training steps in which only *its* kernels are real and all others do nothing; so each is compiled
with exactly the types that training gives it, and the disk cache holds it for every later process.

Which kernels a model runs, its layers say (`Layer.kernels`); those that no layer speaks of, all models run.

A kernel that is called with other types is compiled for them apart: `swiglu_backward` is that of float32,
`swiglu_backward:bf16` that of bfloat16, `rms_norm_forward:heads` that of the norms of queries and keys, `_product:lora`
that of adapters, and `_product:lora_bf16` that of adapters on weights in bfloat16.  The routines of each precision
(`kernels/engine/routines.py`) count as a kernel named `routines`, and what reads the rows of a storage
(`kernels/storage/base.py`) as one named `stored_rows`.
"""

import contextlib
import functools
import importlib
import itertools
import os
import pkgutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ..errors import AbiError, counted
from ..lora_config import LoraConfig
from ..shape import ModelFamily, ModelShape, Precision
from .tiny_models import decode_like, tiny_shape

if TYPE_CHECKING:
    from ..config import LlmTrainingConfig
    from ..kernels.engine.number_formats import AnyFormat
    from ..model import LoraModel, TrainableModel

__all__ = [
    "compile_kernels",
    "compile_missing",
    "counting_compilations",
    "decode_like",
    "is_cached",
    "kernel_names",
    "kernels_of_generation",
    "kernels_of_step",
    "kernels_of_training",
]

# Seconds that the slow ones took to compile on one machine; only the ratios matter, for sharing out the work.
SECONDS = {
    **{"_attention_backward": 4.4, "_attention_forward": 2.9, "_cached_attention": 2.5, "_attention_of_rows": 4.2},
    **{"_product": 1.3, "_product:lora": 3.6, "_product:lora_bf16": 3.5},
    **{"_from_experts": 2.3, "_to_experts": 2.0, "_expert_gradients": 2.5, "_route": 2.0, "layer_norm_backward": 1.4},
    **{"routines": 1.7, "routines:stream": 2.0, "routines:bf16": 2.2, "routines:bf16x3": 2.9, "routines:fp16": 2.0},
}
USUAL_SECONDS = 0.6
OPTIMIZERS: dict[str, tuple[str, ...]] = {
    **{"sgd": ("sgd_",), "adam": ("adam_",), "adamw": ("adamw_",)},
    "muon": ("adamw_", "_muon_direction", "_muon_polynomial", "_muon_step"),
    "adamw_8bit": ("adamw_", "adamw_8bit_"),
}
GENERATION = ("cache_append", "_cached_attention", "_attention_of_rows", "_streamed", "_checksum")
FORWARD = ("embedding_forward", "_product")  # the last where a prompt is long
TRAINS = ("_backward", "_rounded", "_gradients", "_in_place")  # end the names of layers' kernels that generation lacks
DORA = ("row_squares", "row_lengths", "row_factors", "_dora_forward", "dora_backward")
OF_COLUMNS = "column_squares"  # of DoRA, where tables of the embedding have adapters
NOT_IN_A_STEP = ("_dropout", *DORA, OF_COLUMNS, *GENERATION)
ONLY_NARROW = (  # not in float32
    *("rope_forward_rounded", "swiglu_forward_rounded", "gelu_forward_rounded"),
    "weighted_swiglu_forward_rounded",
)
ON_BLOCKS = ("_few_product", "_integer_product", "_encode_nf4")  # compiled when a quantised model is first opened
ROUTINES = "routines"
STREAM = f"{ROUTINES}:stream"  # those that multiply with weights as they are in memory
EXPERTS = {"_to_experts", "_from_experts"}  # kernels that take them, too
HEADS = "heads"
STORED_ROWS, NARROW = "stored_rows", ("bf16", "float16")  # of the storages of weights that are not trained
LORA, LORA_BF16, LORA_NARROW = "lora", "lora_bf16", "lora_narrow"  # adapters on float32, on bfloat16, on either half
# Kernels that a precision calls with other types.
OTHER_TYPES = {Precision.BF16: ("swiglu_backward", "weighted_swiglu_backward", "gelu_backward", *ONLY_NARROW)}
VARIANTS = {"fp32": ()} | {p.value: (ROUTINES, *OTHER_TYPES.get(p, ())) for p in Precision if p is not Precision.FP32}
VARIANTS[HEADS] = ("rms_norm_forward", "rms_norm_backward")
VARIANTS |= {LORA: ("_product",), LORA_BF16: ("_product",), LORA_NARROW: ("bias_forward",)}


@functools.cache
def dispatchers() -> dict[str, tuple[str, Any]]:
    """Return name -> (module, compiled function) of all kernels; none under NUMBA_DISABLE_JIT=1."""
    package = importlib.import_module("abi_py.kernels")
    found = {}
    for module in pkgutil.walk_packages(package.__path__, "abi_py.kernels."):
        name = module.name
        for attribute, value in vars(importlib.import_module(name)).items():
            compiled = getattr(value, "unchecked", value)
            options = getattr(compiled, "targetoptions", {})
            if options.get("parallel") and compiled.__module__ == name:
                found[attribute] = (name, compiled)
    return found


def kernel_names() -> list[str]:
    """Return the names of all kernels, with those of reduced precision, in the order in which they are compiled."""
    plain = dispatchers()
    if not plain:
        return []
    names = [ROUTINES, *(name for name in plain if name not in (*ONLY_NARROW, *ON_BLOCKS))]
    names += [f"{name}:{variant}" for variant, kernels in VARIANTS.items() for name in kernels]
    names += [f"{STORED_ROWS}:{storage}" for storage in NARROW]
    names.append(STREAM)
    return sorted(names, key=_order)


def _seconds(name: str) -> float:
    return SECONDS.get(name) or SECONDS.get(name.partition(":")[0], USUAL_SECONDS)


def _order(name: str) -> tuple[bool, bool, float, str]:
    """Sort routines first, so that most processes find them on disk when they need them; then what takes long.

    Those of float32 are before all: kernels need them, and other precisions where they have no way of their own.
    """
    return name.partition(":")[0] != ROUTINES, name != ROUTINES, -_seconds(name), name


def of_layers(shape: ModelShape) -> set[str]:
    """Return the kernels that the layers of such a model speak of."""
    from ..families import layers

    return {kernel for layer in layers(shape) for kernel in layer.kernels()}


def _of_other_layers(own: set[str]) -> set[str]:
    """Return the kernels of which only layers of other models speak."""
    return {kernel for family in ModelFamily for kernel in of_layers(tiny_shape(family))} - own


def kernels_of_training(
    shape: ModelShape,
    optimizer: str,
    precision: str = "fp32",
    lora: LoraConfig | None = None,
    storages: Collection[str] = (),
    adapts_tables: bool = False,
) -> list[str]:
    """Return the kernels that a training step of such a model with this optimizer and precision runs.

    lora      the adapters that are trained, if it is they; `adapts_tables`: some are on tables of the embedding
    storages  how the matrices under them are kept
    """
    own = of_layers(shape)
    rules = {name for names in OPTIMIZERS.values() for name in names} - {*OPTIMIZERS[optimizer]}
    elsewhere = _of_other_layers(own)
    others = rules | elsewhere | {*NOT_IN_A_STEP, *VARIANTS[precision]}
    others.discard(ROUTINES)  # of float32: a kernel that all precisions share is compiled in a step of float32
    wanted = {name for name in kernel_names() if ":" not in name and name not in others}
    wanted |= {f"{kernel}:{precision}" for kernel in VARIANTS[precision] if kernel not in elsewhere} | own
    wanted |= {STREAM} if own & EXPERTS else set()
    if lora is not None:
        more_kernels = {"_dropout"} if lora.dropout else set()
        more_kernels |= {*DORA, "_checksum"} if lora.use_dora else set()
        more_kernels |= {OF_COLUMNS} if lora.use_dora and adapts_tables else set()
        others -= more_kernels
        variants = [LORA, *([LORA_BF16] if "bf16" in storages else []), *([LORA_NARROW] if storages else [])]
        more = {f"{kernel}:{variant}" for variant in variants for kernel in set(VARIANTS[variant]) - elsewhere}
        wanted |= more_kernels | more
        wanted |= {f"{STORED_ROWS}:{storage}" for storage in storages}
    return [name for name in kernel_names() if name in wanted and name not in others]


def kernels_of_step(model: "TrainableModel | LoraModel", config: "LlmTrainingConfig") -> list[str]:
    """Return the kernels that a training step of this model runs."""
    from ..model import LoraModel
    from ..model.frozen import FrozenModel
    from ..model.lora_targets import Kind

    lora = model.lora if isinstance(model, LoraModel) else None
    below = model.model if isinstance(model, LoraModel) else model
    storages = set(below.storages()) & {*NARROW} if isinstance(below, FrozenModel) else ()
    adapts_tables = isinstance(model, LoraModel) and any(target.kind is Kind.TABLE for target in model.targets())
    choices = config.optimizer.value, config.mixed_precision.value, lora, storages, adapts_tables
    return kernels_of_training(model.config, *choices)


def kernels_of_generation(shape: ModelShape, *more: str) -> list[str]:
    """Return the kernels that reading a prompt and writing a text with such a model run, and `more`."""
    own = {name for name in of_layers(shape) if not name.partition(":")[0].endswith(TRAINS)}
    wanted = {ROUTINES, STREAM, *FORWARD, *GENERATION, *own, *more}
    return [name for name in kernel_names() if name in wanted]


def is_cached(name: str) -> bool:
    """Say whether the disk cache holds a kernel, undamaged."""
    from ..kernels.engine.cache import STORE

    def whole(file: str) -> bool:
        return STORE.read(file) is not None

    kernel, _, variant = name.partition(":")
    if kernel == ROUTINES:
        return whole(routines_of(name)[0])
    if not variant:
        variants = (f"{kernel}:{each}" for each, kernels in VARIANTS.items() if kernel in kernels)
        others = {file for each in variants for file in _files(each)}
        files = STORE.names(dispatchers()[kernel][1]._cache.beginning)
        return any(whole(file) for file in files if file not in others)
    files = _files(name)
    return bool(files) and all(map(whole, files))


def _files(name: str) -> list[str]:
    """Return the files of a variant; their names do not show types."""
    from ..kernels.engine.cache import STORE

    return bytes(STORE.read(list_of(name)) or b"").decode().split()


def routines_of(name: str) -> tuple[str, Callable[[], object]]:
    """Return the file that keeps some routines, and what compiles them; nothing of the model is loaded."""
    if name == STREAM:
        from ..kernels.engine.routines import routines_file
        from ..kernels.engine.streams import NAME, streams

        return routines_file(NAME), streams
    from ..kernels.engine.number_formats import PRECISIONS

    number_format: AnyFormat = PRECISIONS[name.partition(":")[2] or "fp32"]
    return number_format.file, lambda: number_format.table


def list_of(name: str) -> str:
    """Return under which name the cache keeps the list of a variant's files."""
    return f"{name.replace(':', '-')}.list"


def compile_missing(
    names: Iterable[str],
    report: Callable[[str], None],
    count: Callable[[int, int], object] = lambda done, total: None,
) -> None:
    """Compile those kernels that the cache does not hold, and `report` it in one line before and one after.

    `count` is called with the number of those that are done, and that of all.

    Where that is impossible, `report` says so: each kernel is then compiled at its first call.
    """
    from ..kernels.engine.cache import STORE

    missing = [name for name in names if not is_cached(name)]
    if not missing:
        return
    kernels = counted(len(missing), "kernel")
    if not STORE.has_room():  # which has told why
        report(f"{kernels} for this run alone, each at its first call")
        return
    report(f"{kernels} for this processor, once; later runs find them in the cache ...")
    began, done = time.perf_counter(), itertools.count(1)
    count(0, len(missing))
    try:
        compile_kernels(missing, lambda name, seconds: count(next(done), len(missing)))
    except (AbiError, OSError) as error:
        report(f"{error}; one by one instead")
        return
    report(f"done in {time.perf_counter() - began:.0f} s")


class Compilations:
    """How many kernels have begun to be compiled in this process, and how many are done."""

    began = done = 0


@contextlib.contextmanager
def counting_compilations(count: Callable[[int, int], object]) -> Iterator[Compilations]:
    """Call `count(done, begun)` when a kernel is compiled at its first call, before and after.

    Not for the helpers inside of a kernel, which are never parallel.
    """
    from numba.core import event

    found = Compilations()

    class Listener(event.Listener):  # type: ignore[misc]
        def on_start(self, event: Any) -> None:
            if event.data["dispatcher"].targetoptions.get("parallel"):
                found.began += 1
                count(found.done, found.began)

        def on_end(self, event: Any) -> None:
            if event.data["dispatcher"].targetoptions.get("parallel"):
                found.done += 1
                count(found.done, found.began)

    with event.install_listener("numba:compile", Listener()):
        yield found


def compile_kernels(names: Iterable[str], done: Callable[[str, float], object], processes: int | None = None) -> None:
    """Compile kernels in one process for each core; call `done(name, seconds)` for each.

    AbiError if one fails, or if the cache can't keep them.
    """
    from ..kernels.engine.cache import STORE

    if not STORE.has_room():
        raise AbiError("nothing is compiled ahead, because nothing can be kept")  # why, the store has told
    groups = _share_out(list(names), processes or os.cpu_count() or 1)
    running: list[subprocess.Popen[str]] = []
    with contextlib.ExitStack() as stack:
        logs = [
            stack.enter_context(tempfile.TemporaryFile("w+")) for _ in groups
        ]  # a pipe that nobody reads may fill up
        try:
            for group, log in zip(groups, logs):
                # A process of its own, not a fork: compiler and thread pools do not survive a fork.
                words = [sys.executable, "-c", _start(), *group]
                pipe = subprocess.PIPE
                running.append(subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=log, text=True))
            _relay(running, done)
            for process, log in zip(running, logs):
                _check(process, log)
        finally:
            for process in running:
                process.kill()  # the ones that have ended do not mind
                process.wait()
                for end in (process.stdin, process.stdout):
                    if end is not None:
                        end.close()


def _start() -> str:
    """Return the program of a worker process.

    Python puts the current directory first where modules are looked for, and a user's `uuid.py` there would be taken
    for the library's.  So a worker looks where this process does, and in the current directory it does not; this
    package it loads by its place.
    """
    here = Path.cwd()
    path = [entry for entry in sys.path if entry and Path(entry).absolute() != here]
    package = Path(__file__).absolute().parents[1]
    return f"""
import sys
sys.path[:] = {path!r}
from importlib.util import module_from_spec, spec_from_file_location
file, folder = {str(package / "__init__.py")!r}, {str(package)!r}
spec = spec_from_file_location("abi_py", file, submodule_search_locations=[folder])
sys.modules["abi_py"] = module_from_spec(spec)
spec.loader.exec_module(sys.modules["abi_py"])
from abi_py.runs.compile_worker import worker
worker(sys.argv[1:])
"""


def _share_out(names: list[str], count: int) -> list[list[str]]:
    """Give each kernel, in order, to the group with the least to do."""
    groups: list[list[str]] = [[] for _ in range(max(1, min(count, len(names))))]
    load = [0.0] * len(groups)
    for name in sorted(names, key=_order):
        least = load.index(min(load))
        groups[least].append(name)
        load[least] += _seconds(name)
    return [group for group in groups if group]


def _relay(running: list["subprocess.Popen[str]"], done: Callable[[str, float], object]) -> None:
    import selectors

    with selectors.DefaultSelector() as selector:
        for process in running:
            if process.stdout is not None:
                selector.register(process.stdout, selectors.EVENT_READ)
        while selector.get_map():
            for key, _ in selector.select():
                line = key.fileobj.readline()  # type: ignore[union-attr]
                if line:
                    name, seconds = line.split()
                    done(name, float(seconds))
                else:
                    selector.unregister(key.fileobj)


def _check(process: "subprocess.Popen[str]", log: IO[str]) -> None:
    if process.wait():
        log.seek(0)
        last = log.read().strip().splitlines()[-1:] or [f"exit code {process.returncode}"]
        raise AbiError(f"compiling in a process of its own failed: {last[0]}; abi-train run can do without one")
