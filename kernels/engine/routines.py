"""Routines: LLVM functions emitted from Python, compiled once for a machine and called by their address.

The tile and the packers are at the heart of every product and of attention.  Were they part of the kernels that call
them, each kernel would compile them again, and Numba several times for each kernel: most of the time of a cold start
(docs/log.md).  So they are compiled apart, at first use and in a fraction of a second, all of one number format
together; the machine code is kept where compiled kernels are.  A kernel takes their addresses as an argument, its
*table*:

    table (SLOTS,) int64
        FORMAT          which number format, see panels.FORMATS
        FOLD            elements of the sum in a place of a panel, 1 or 2
        PARTS           places that an element, or a pair of them, takes: one for each of its parts (`parts.py`)
        STORED          how the model stores such numbers, see panels.ELEMENTS
        ROWS, COLUMNS   of the register tile, and so of a panel of A and of B
        UNIT            elements of the sum, a power of two, to a multiple of which a panel's depth is filled up
        SLICE_TERMS     elements of the sum of a pass of the tile: the order of a sum follows from it
        SLAB_COLUMNS    columns of a packed slab of B    BLOCK_ROWS: rows of a packed block of A
        TILE ...        addresses

Under NUMBA_DISABLE_JIT=1 nothing is compiled: the addresses are zero, and the operations' twins read what is before.
"""

from collections.abc import Callable, Mapping
from typing import Any

import llvmlite.binding as llvm
import llvmlite.ir as ir
import numpy as np

from .cache import STORE, numba_config
from .jit import JIT

__all__ = [
    "BEGIN",
    "BLOCK_ROWS",
    "COLUMNS",
    "END",
    "FOLD",
    "FORMAT",
    "PACKERS",
    "PARTS",
    "ROWS",
    "SLAB_COLUMNS",
    "SLICE_TERMS",
    "STORED",
    "TILE",
    "UNIT",
    "Routine",
    "call_routine",
    "compiled_functions",
    "entry_of",
    "routine_table",
    "routines_file",
]

FORMAT, FOLD, STORED, ROWS, COLUMNS, UNIT, SLICE_TERMS, SLAB_COLUMNS, BLOCK_ROWS, PARTS = range(10)
TILE, BEGIN, END, PACKERS = range(10, 14)  # from PACKERS on, one for each packer and kind of elements
SLOTS = PACKERS + 8

Routine = tuple[list[ir.Type], Callable[..., None]]  # types of the arguments; emits the body: body(builder, *arguments)
Function = tuple[ir.FunctionType, Callable[..., None]]  # the same of one whose body returns, and what

_engines: list[Any] = []  # the machine code lives as long as they do


def routines_file(name: str) -> str:
    """Return the name under which the cache keeps the machine code of the routines called `name`."""
    return f"routines-{name}.o"


def routine_table(name: str, header: Mapping[int, int], routines: Mapping[int, Routine]) -> np.ndarray:
    """Return a table, (SLOTS,) int64: the numbers of the header, and routines for slots from TILE on.

    The routines are compiled, or read from the cache.
    """
    table = np.zeros(SLOTS, np.int64)
    for slot, number in header.items():
        table[slot] = number
    if JIT:
        functions = {slot: _returning(routine) for slot, routine in routines.items()}
        for slot, address in compiled_functions(name, functions).items():
            table[slot] = address
    return table


def compiled_functions(name: str, functions: Mapping[int, Function]) -> dict[int, int]:
    """Return the addresses of numbered functions, compiled together or read from the cache under a name."""
    return _load(_kept(routines_file(name), lambda: _module(name, functions)), functions)


def _module(name: str, functions: Mapping[int, Function]) -> str:
    module = ir.Module(name)
    for slot, (kind, body) in functions.items():
        function = ir.Function(module, kind, _symbol(slot))
        body(ir.IRBuilder(function.append_basic_block("entry")), *function.args)
    return str(module)


def _returning(routine: Routine) -> Function:
    """Return a routine as a function, with the return after its body."""
    arguments, body = routine

    def whole(builder: ir.IRBuilder, *values: ir.Value) -> None:
        body(builder, *values)
        builder.ret_void()

    return ir.FunctionType(ir.VoidType(), arguments), whole


def _symbol(slot: int) -> str:
    return f"abi_routine_{slot}"


def _target_machine() -> Any:
    """Return LLVM's description of this machine, with the settings that Numba has for its own code."""
    llvm.initialize_native_target()  # Numba does it as well, but perhaps later
    llvm.initialize_native_asmprinter()
    features = numba_config.CPU_FEATURES
    return llvm.Target.from_default_triple().create_target_machine(
        cpu=numba_config.CPU_NAME or llvm.get_host_cpu_name(),
        features=llvm.get_host_cpu_features().flatten() if features is None else features,
        opt=3,
        reloc="static" if llvm.get_process_triple().startswith("x86") else "default",
        codemodel="jitdefault",
    )


def _compiled(assembly: str) -> bytes:
    """Return the object file of an LLVM module."""
    machine = _target_machine()
    module = llvm.parse_assembly(assembly)
    module.triple, module.data_layout = llvm.get_process_triple(), str(machine.target_data)
    module.verify()
    builder = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
    builder.getModulePassManager().run(module, builder)
    return bytes(machine.emit_object(module))


def _kept(file: str, assembly: Callable[[], str]) -> bytes | memoryview:
    """Return what is kept under the name `file`, or compile and keep it."""
    kept = STORE.read(file)
    if kept is not None:
        return kept
    code = _compiled(assembly())
    STORE.write(file, code)
    return code


def _load(code: bytes | memoryview, slots: Mapping[int, Any]) -> dict[int, int]:
    """Return the address of each slot's routine in an object file, ready to be called."""
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _target_machine())
    engine.add_object_file(llvm.ObjectFileRef.from_data(bytes(code)))
    engine.finalize_object()
    _engines.append(engine)
    return {slot: engine.get_function_address(_symbol(slot)) for slot in slots}


def entry_of(context: Any, builder: Any, table_type: Any, table: Any, slot: Any) -> Any:
    """Emit the reading of a table's entry, for an intrinsic of which the table is an argument; slot: int or i64."""
    entries = context.make_array(table_type)(context, builder, table).data
    index = slot if isinstance(slot, ir.Value) else ir.Constant(ir.IntType(64), slot)
    return builder.load(builder.gep(entries, [index]))


def call_routine(context: Any, builder: Any, table_type: Any, table: Any, slot: Any, arguments: list[Any]) -> None:
    """Emit a call of the routine in a slot of a table."""
    address = entry_of(context, builder, table_type, table, slot)
    kind = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
    builder.call(builder.inttoptr(address, kind.as_pointer()), arguments)
