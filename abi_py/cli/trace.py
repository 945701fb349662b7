"""`abi-train trace`: one tiny training step, stage by stage.

While the step runs, each kernel function that model and optimizer have imported is replaced by one that notes the call
and passes it on; afterwards the originals are back.  So the table is what really happened, and `docs/flow.txt` is
tested against it.
"""

import contextlib
import inspect
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import click
import numpy as np

from ..shape import ModelFamily
from .options import Verb

__all__ = ["Call", "flow", "replaced", "trace_step"]

HELPERS = ("linear.py", "norm.py", "activation.py")  # of model/layers/: the stages are their callers
HIDDEN = ("delta", "scratch", "chunks", "decay")  # scratch and bookkeeping: arrays that are no part of the mathematics
SHAPE = {
    "hidden_dim": 32,
    "num_layers": 1,
    "num_heads": 4,
    "num_kv_heads": 2,
    "intermediate_dim": 64,
    "vocab_size": 257,
}
BATCH, TIME = 2, 8


@dataclass
class Call:
    """One call of a kernel function."""

    stage: str  # the class and its method that called it
    function: str
    file: str
    outputs: list[str] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)
    saved: int = 0  # bytes of the arena's saved arrays that it was the first to write
    seconds: float = 0.0


@click.command(cls=Verb, example="abi-train trace", short_help="Show one training step stage by stage.")
@click.option("--no-times", is_flag=True, help="leave the times out: the text is then docs/flow.txt")
@click.option(
    "--family",
    type=click.Choice([family.value for family in ModelFamily]),
    default=ModelFamily.LLAMA.value,
    help="what the layers are  [llama]",
)
def command(no_times: bool, family: str) -> None:
    """Run one tiny training step and show each stage: function, file, shapes, bytes saved for backward, time."""
    shape = SHAPE if family == ModelFamily.LLAMA.value else _of_family(family)
    click.echo(flow(trace_step(shape), times=not no_times, shape=shape), nl=False)


def _of_family(family: str) -> dict[str, Any]:
    """Return the sizes of SHAPE that act in a family, and its name."""
    from ..config import TrainableModelConfig, joined

    return joined(TrainableModelConfig, SHAPE, {"family": family})


def trace_step(shape: Mapping[str, Any] = SHAPE) -> list[Call]:
    """Run a training step of a model of one block and return its kernel calls in order."""
    from ..config import LlmTrainingConfig, TrainableModelConfig
    from ..model import TrainableModel
    from ..training.trainer import LlamaTrainer

    model = TrainableModel(TrainableModelConfig.from_dict({**shape, "max_seq_len": TIME}))
    config = LlmTrainingConfig(batch_size=BATCH, max_seq_len=TIME, grad_accum_steps=1, warmup_steps=0)
    trainer = LlamaTrainer(model, config)
    ids = np.arange(BATCH * TIME + 1, dtype=np.uint32)
    inputs, labels = ids[:-1].reshape(BATCH, TIME), ids[1:].reshape(BATCH, TIME)
    trainer.train_step(inputs, labels)  # compiles or loads the kernels: not part of a step
    kept = {array.ctypes.data: array.nbytes for array in model.stack.arena.saved(BATCH * TIME, borrows=True)}
    calls: list[Call] = []
    with recorded(calls, kept):
        trainer.train_step(inputs, labels)
    return calls


@contextlib.contextmanager
def recorded(calls: list[Call], kept: dict[int, int]) -> Iterator[None]:
    """Note the kernel calls inside the block; `kept` has the bytes of the arrays that backward will read, by address.

    An array counts at the call that writes it first; RoPE changes in place what a product wrote.
    """

    def recorder(function: Callable[..., Any], name: str, home: ModuleType) -> Callable[..., Any]:
        written = {array.name for array in getattr(home, name).signature.arrays if array.written}
        return _recorder(function, name, home.__name__, written, calls, kept)

    with replaced(recorder):
        yield


@contextlib.contextmanager
def replaced(replace: Callable[[Callable[..., Any], str, ModuleType], Callable[..., Any]]) -> Iterator[None]:
    """Inside the block, replace each operation of `kernels/` that other modules have imported.

    `replace(function, name, home)` returns what is called instead; `home` is the operation's module.
    """
    before: list[tuple[ModuleType, str, Any]] = []
    try:
        users = [m for name, m in list(sys.modules.items()) if name.startswith("abi_py.") and ".kernels" not in name]
        for module in users:
            for attribute, value in list(vars(module).items()):
                home = sys.modules.get(getattr(value, "__module__", None) or "")
                if home is not None and hasattr(getattr(home, attribute, None), "signature"):  # of an operation
                    before.append((module, attribute, value))
                    setattr(module, attribute, replace(value, attribute, home))
        yield
    finally:
        for module, attribute, value in before:
            setattr(module, attribute, value)


def _recorder(
    function: Callable[..., Any], name: str, home: str, written: set[str], calls: list[Call], kept: dict[int, int]
) -> Callable[..., Any]:
    parameters = list(inspect.signature(getattr(function, "py_func", function)).parameters)

    def call(*arguments: Any, **named: Any) -> Any:
        frame = sys._getframe(1)
        while frame.f_code.co_filename.endswith(HELPERS) and frame.f_back is not None:
            frame = frame.f_back
        stage = f"{type(frame.f_locals['self']).__name__}.{frame.f_code.co_name.strip('_')}"
        began = time.perf_counter()
        result = function(*arguments, **named)
        seconds = time.perf_counter() - began
        note = Call(stage, name, f"kernels/{home.rpartition('.')[2]}.py", seconds=seconds)
        values = {**dict(zip(parameters, arguments, strict=False)), **named}
        for parameter, value in values.items():
            if not isinstance(value, np.ndarray) or parameter in HIDDEN or value.size == 0:
                continue
            turned = values.get(f"transpose_{parameter}", False) is True
            shape = ",".join(map(str, value.shape)) + ("," if value.ndim == 1 else "")
            text = f"{parameter}({shape}){'ᵀ' if turned else ''}"
            (note.outputs if parameter in written else note.inputs).append(text)
            if parameter in written:
                note.saved += kept.pop(value.ctypes.data, 0)
        if not written:
            note.outputs.append("a number")
        calls.append(note)
        return result

    return call


def flow(calls: list[Call], times: bool, shape: Mapping[str, Any] = SHAPE) -> str:
    """Return the table; without times it depends on nothing but the code."""
    whole = sum(call.seconds for call in calls)
    heads = ["stage", "function", "file", "writes", "reads", "saved"]
    rows = []
    for call in calls:
        saved = f"{call.saved} B" if call.saved else ""
        row = [call.stage, call.function, call.file, " ".join(call.outputs), " ".join(call.inputs), saved]
        if times:
            row += [f"{1000 * call.seconds:.3f} ms", f"{100 * call.seconds / whole:.1f}%"]
        rows.append(row)
    if times:
        heads += ["time", "share"]
    right = {5, 6, 7}
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]

    def line(row: list[str]) -> str:
        cells = [
            cell.rjust(width) if i in right else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths))
        ]
        return "  ".join(cells).rstrip()

    sizes = ", ".join(f"{name} {value}" for name, value in shape.items())
    total = sum(call.saved for call in calls)
    text = [
        f"One training step of a batch of {BATCH} x {TIME} tokens: N = {BATCH * TIME} rows.",
        f"{sizes}.",
        "The stages of Attention and FeedForward come once for each block.",
        "",
        line(heads),
        line(["-" * width for width in widths]),
        *map(line, rows),
        "",
        f"saved for backward: {total} bytes, {total // (BATCH * TIME)} for each token",
    ]
    if times:
        text.append(f"kernels together: {1000 * whole:.3f} ms")
    return "\n".join(text) + "\n"
