"""Replay: the calls of a pass, made again in compiled code.

A small training step is a hundred calls of kernels, and what Python does between two of them takes longer than many a
kernel: views, checks, unpacking of arguments, and an interpreter that the arrays have pushed out of the caches
(docs/log.md).  But from step to step a pass makes the same calls with the same arrays, of which only the numbers
change.  So a pass is noted once, as Python runs it, and then made again from a table:

    a call      [trampoline, function, argument, argument ...]     64-bit words; an array is seven or more of them
    trampoline  loads the words, and calls the function with them; one for each list of types
    walk        calls the trampolines one after the other

Python stays the text of a pass, and a `Recording` is that text's calls: the same functions, arguments, order, threads,
and so the same bits.  What a pass does otherwise than by kernels it says by `between` and `by_numpy`, and Python does
that again.

A recording is right for as long as the same Python would make the same calls; who keeps it has to know that
(`abi_py/model/passes.py`).  It keeps the memory that its calls name.  A kernel that fails is called once more from
Python, which raises what the kernel raises.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import llvmlite.ir as ir
import numpy as np
from numba.core.registry import cpu_target

from .calls import Call, NotNumbers, noted, words_of
from .jit import JIT
from .routines import compiled_functions
from .threads import forked, taking_turns

__all__ = ["Recording", "between", "by_numpy", "python_alone", "recorded", "replays"]

WORD = ir.IntType(64)
STATUS = ir.IntType(32)
WORDS = WORD.as_pointer()


SETTING = os.environ.get("ABI_REPLAY") or "1"
if SETTING not in ("0", "1"):
    raise ValueError(f"ABI_REPLAY ({SETTING}) must be 0 or 1; unset it to replay passes where that is faster")


_python_alone = False


def replays() -> bool:
    """Say whether passes are replayed here: not if ABI_REPLAY is 0, if nothing is compiled, or in a forked child."""
    return JIT and SETTING == "1" and not (_python_alone or forked())


@contextlib.contextmanager
def python_alone() -> Iterator[None]:
    """Replay nothing in the block: for who watches the calls of a pass."""
    global _python_alone
    before, _python_alone = _python_alone, True
    try:
        yield
    finally:
        _python_alone = before


class Recording:
    """The calls of a pass, in their order."""

    def __init__(self, notes: list[Any]) -> None:
        """Take what was noted; NotNumbers if a call cannot be made again."""
        self._parts: list[Callable[..., object]] = []
        calls: list[Call] = []
        for note in notes:
            if isinstance(note, Call):
                calls.append(note)
                continue
            if calls:
                self._parts.append(_Table(calls))
            self._parts.append(note)
            calls = []
        if calls:
            self._parts.append(_Table(calls))

    def replay(self, *now: Any) -> None:
        """Make the calls again; `now` is given to what is done between them."""
        for part in self._parts:
            part(*now)


@contextlib.contextmanager
def recorded() -> Iterator[list[Any]]:
    """Note what the block does, for a `Recording`."""
    notes: list[Any] = []
    with noted(notes):
        yield notes


def between(function: Callable[..., object], *now: Any) -> None:
    """Call function(*now), and again in each replay with what that is given: a piece of a pass that stays Python's.

    The kernels that it calls are not noted.
    """
    with noted(None) as notes:
        if notes is not None:
            notes.append(function)
        function(*now)


def by_numpy(function: Callable[..., object], *arguments: Any, **named: Any) -> None:
    """Call function(*arguments, **named), and again in each replay: an operation of NumPy between two kernels."""
    between(lambda *now: function(*arguments, **named))


# -- calls without Python between them -----------------------------------------------------------


class _Table:
    """Calls that follow each other, as numbers."""

    def __init__(self, calls: list[Call]) -> None:
        self._calls = calls  # they keep their arrays
        lines = [_line(call) for call in calls]
        trampolines = _trampolines(sorted({kind for kind, _ in lines}))
        table, starts = list[int](), list[int]()
        for kind, words in lines:
            starts.append(len(table))
            table += [trampolines[kind], *words]
        self._table = np.array([word % 2**64 for word in table], np.uint64)
        self._starts = np.array(starts, np.int64)
        self._walk = _walk()
        self._where = self._table.ctypes.data, self._starts.ctypes.data, len(starts)

    def __call__(self, *now: Any) -> None:
        done = 0
        with taking_turns():
            done = self._walk(*self._where, 0)
        while done < len(self._calls):  # this one failed
            self._calls[done].again()
            with taking_turns():
                done = self._walk(*self._where, done + 1)


def _line(call: Call) -> tuple[str, list[int]]:
    """Return the type of a call's function, as LLVM writes it, and the function's address and arguments."""
    compiled = call.kernel.compiled
    kinds = tuple(compiled.typeof_pyval(argument) for argument in call.arguments)
    found = compiled.overloads.get(kinds)
    if found is None:
        raise NotNumbers(f"{call.kernel.__name__} leaves an argument to its default, or takes it as another type")
    if str(found.signature.return_type) != "none":
        raise NotNumbers(f"{call.kernel.__name__} returns something")
    address = found.library.get_pointer_to_function(found.fndesc.llvm_func_name)
    words = [word for kind, value in zip(kinds, call.arguments, strict=True) for word in words_of(kind, value)]
    convention = cpu_target.target_context.call_conv
    kind = convention.get_function_type(found.fndesc.restype, found.fndesc.argtypes)
    if len(kind.args) != 2 + len(words):
        raise NotNumbers(f"{call.kernel.__name__} takes {len(kind.args) - 2} numbers and was given {len(words)}")
    _types[str(kind)] = kind
    return str(kind), [address, *words]


_types: dict[str, ir.FunctionType] = {}  # as they are written
_addresses: dict[str, int] = {}  # of the trampolines that are compiled


def _trampolines(kinds: list[str]) -> dict[str, int]:
    """Return the address of each type's trampoline; those that are missing are compiled together."""
    missing = [kind for kind in kinds if kind not in _addresses]
    if missing:
        name = "replay-" + hashlib.sha256("\n".join(missing).encode()).hexdigest()[:16]
        taking = ir.FunctionType(STATUS, [WORDS])
        bodies = (functools.partial(_trampoline, kind=_types[kind]) for kind in missing)
        found = compiled_functions(name, {i: (taking, body) for i, body in enumerate(bodies)})
        _addresses.update({kind: found[i] for i, kind in enumerate(missing)})
    return {kind: _addresses[kind] for kind in kinds}


def _trampoline(builder: ir.IRBuilder, words: ir.Value, *, kind: ir.FunctionType) -> None:
    """Emit: load the arguments from words[2], ... and call words[1]; the first two are Numba's, for what it returns."""
    result, error = (builder.alloca(each.pointee) for each in kind.args[:2])
    builder.store(ir.Constant(result.type.pointee, None), result)

    def word(index: int) -> ir.Value:
        return builder.load(builder.gep(words, [ir.Constant(WORD, index)]))

    arguments = [_as(builder, word(2 + i), each) for i, each in enumerate(kind.args[2:])]
    function = builder.inttoptr(word(1), kind.as_pointer())
    builder.ret(builder.call(function, [result, error, *arguments]))


def _as(builder: ir.IRBuilder, word: ir.Value, kind: ir.Type) -> ir.Value:
    """Emit: a word as what it stands for."""
    if isinstance(kind, ir.PointerType):
        return builder.inttoptr(word, kind)
    if isinstance(kind, ir.DoubleType):
        return builder.bitcast(word, kind)
    if isinstance(kind, ir.FloatType):
        return builder.bitcast(builder.trunc(word, ir.IntType(32)), kind)
    return word if kind == WORD else builder.trunc(word, kind)


@functools.cache
def _walk() -> Any:
    """Return the function walk(table, starts, count, first): the number of the call that failed, or count."""
    kind = ir.FunctionType(WORD, [WORDS, WORDS, WORD, WORD])
    address = compiled_functions("replay-walk", {0: (kind, _walking)})[0]
    word, pointer = ctypes.c_int64, ctypes.c_void_p
    return ctypes.CFUNCTYPE(word, pointer, pointer, word, word)(address)  # releases the interpreter's lock


def _walking(builder: ir.IRBuilder, table: ir.Value, starts: ir.Value, count: ir.Value, first: ir.Value) -> None:
    entry = builder.block
    head, body, tail, end = (builder.append_basic_block(name) for name in ("head", "body", "tail", "end"))
    builder.branch(head)
    builder.position_at_end(head)
    at = builder.phi(WORD)
    at.add_incoming(first, entry)
    builder.cbranch(builder.icmp_signed("<", at, count), body, end)
    builder.position_at_end(body)
    words = builder.gep(table, [builder.load(builder.gep(starts, [at]))])
    kind = ir.FunctionType(STATUS, [WORDS])
    status = builder.call(builder.inttoptr(builder.load(words), kind.as_pointer()), [words])
    builder.cbranch(builder.icmp_signed("==", status, ir.Constant(STATUS, 0)), tail, end)
    builder.position_at_end(tail)
    at.add_incoming(builder.add(at, ir.Constant(WORD, 1)), tail)
    builder.branch(head)
    builder.position_at_end(end)
    builder.ret(at)
