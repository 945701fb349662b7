"""Vectors by hand: the instruction set, and the building blocks of what is emitted as LLVM IR from Python.

    ISA, LANES        the instruction set, and how many float32 are in a vector
    with_twin         an operation in LLVM and its twin in plain Python
    constant ...      the blocks from which halves.py, vectors.py, panels.py and tiles.py are built

The vector width follows from the host's features, and so do the tiles that fit; `ABI_SIMD=avx512|avx2|neon|generic`
overrides them, so that every path can be tested on any machine (LLVM splits vectors that the host does not have).
Under NUMBA_DISABLE_JIT=1 the plain-Python twin of each operation runs instead; the twins are also its definition.
"""

import functools
import os
from dataclasses import dataclass
from typing import Any

import llvmlite.binding as llvm
import llvmlite.ir as ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .jit import JIT


@dataclass(frozen=True)
class Isa:
    """An instruction set as the kernels see it: floats per vector, and the register tiles that fit its registers."""

    name: str
    lanes: int  # float32 per vector
    tiles: tuple[tuple[int, int], ...]  # rows and vectors; the fastest on a machine is measured (`number_formats.py`)

    @property
    def tile_rows(self) -> int:
        """Rows of the first tile."""
        return self.tiles[0][0]

    @property
    def tile_columns(self) -> int:
        """Columns of the first tile, in floats."""
        return self.tiles[0][1] * self.lanes


# rows * vectors sums, vectors of B and one of A must fit the vector registers: 32, 16, 32, 16 or more.
ISAS = {
    "avx512": Isa("avx512", 16, ((8, 3), (12, 2))),
    "avx2": Isa("avx2", 8, ((6, 2), (4, 3))),
    "neon": Isa("neon", 4, ((8, 2), (6, 4))),
    "generic": Isa("generic", 4, ((4, 2),)),
}


def host_isa() -> str:
    """Name the widest instruction set of this machine that the kernels know."""
    features = llvm.get_host_cpu_features()
    if features.get("avx512f") and features.get("avx512vl"):
        return "avx512"
    if features.get("avx2") and features.get("fma"):
        return "avx2"
    if features.get("neon"):
        return "neon"
    return "generic"


def _chosen_isa() -> Isa:
    name = os.environ.get("ABI_SIMD") or host_isa()
    if name not in ISAS:
        raise ValueError(f"ABI_SIMD ({name}) must be one of {', '.join(ISAS)}; unset it to use this machine's own")
    return ISAS[name]


ISA = _chosen_isa()
LANES = ISA.lanes

F32 = ir.FloatType()
FP16 = ir.HalfType()
I1 = ir.IntType(1)
I8 = ir.IntType(8)
I16 = ir.IntType(16)
I32 = ir.IntType(32)
I64 = ir.IntType(64)
VECTOR = ir.VectorType(F32, LANES)
ZERO = ir.Constant(VECTOR, [0.0] * LANES)
# Of arrays, and their bytes: half precision is kept as int16.
OF_ARRAYS = {types.float32: (F32, 4), types.uint16: (I16, 2), types.int16: (FP16, 2), types.uint8: (I8, 1)}


# -- operations in LLVM and in plain Python ------------------------------------------------------


def with_twin(twin):
    """Use the LLVM version of an operation, or its twin where nothing is compiled.

    Its arrays are float32, uint16 (bfloat16), int16 (half precision), or uint8 (what is kept in blocks); int64 is the
    table of routines.  Another type would be read as if it were one of these, so it is refused while Numba compiles,
    which costs no call anything.
    """
    return (lambda typed: intrinsic(_of_known_elements(typed))) if JIT else (lambda typed: twin)


def _of_known_elements(typed):
    @functools.wraps(typed)
    def check(typing, *arguments):
        for kind in arguments:
            if isinstance(kind, types.Array) and kind.dtype not in (*OF_ARRAYS, types.int64):
                raise TypeError(
                    f"{typed.__name__.lstrip('_')} is given an array of {kind.dtype}; kernels compute in float32; "
                    "use .astype(np.float32)"
                )
        return typed(typing, *arguments)

    return check


# -- LLVM building blocks ------------------------------------------------------------------------


def constant(value: int) -> ir.Constant:
    """An i64 constant: all offsets and counts are i64."""
    return ir.Constant(I64, value)


def element_type(array_type):
    """LLVM type of the elements of an array, one of OF_ARRAYS, and their bytes."""
    return OF_ARRAYS[array_type.dtype]


def pointer(context, builder, array_type, array, *indices):
    """Address of array[indices]; the last axis has unit stride (checked where Python meets the kernels)."""
    struct = context.make_array(array_type)(context, builder, array)
    element, size = element_type(array_type)
    offset = builder.mul(indices[-1], constant(size))
    if len(indices) == 2:
        row_bytes = builder.extract_value(struct.strides, 0)
        offset = builder.add(offset, builder.mul(indices[0], row_bytes))
    base = builder.bitcast(struct.data, ir.IntType(8).as_pointer())
    return builder.bitcast(builder.gep(base, [offset]), element.as_pointer())


def row_length(context, builder, array_type, array):
    """Elements from one row of a matrix to the next."""
    strides = context.make_array(array_type)(context, builder, array).strides
    return builder.sdiv(builder.extract_value(strides, 0), constant(element_type(array_type)[1]))


def move(builder, pointer, elements):
    """The address `elements` elements (int or i64 value) further."""
    step = elements if isinstance(elements, ir.Value) else constant(elements)
    return builder.gep(pointer, [step])


def load(builder, pointer, vector=VECTOR):
    """Read a vector from any address."""
    value = builder.load(builder.bitcast(pointer, vector.as_pointer()))
    value.align = _bytes(vector)
    return value


def of_shape(kind, element):
    """The type of one `element`, or of a vector of as many as the type `kind` has."""
    return ir.VectorType(element, kind.count) if isinstance(kind, ir.VectorType) else element


def each(value, kind):
    """The constant of a type, with equal elements if it is a vector."""
    return ir.Constant(kind, [value] * kind.count if isinstance(kind, ir.VectorType) else value)


def sum_of_lanes(builder, vector):
    """Add up a vector: the upper half to the lower, until one element is left."""
    lanes = vector.type.count
    while lanes > 1:
        lanes //= 2
        lower, upper = (ir.Constant(ir.VectorType(I32, lanes), [at + i for i in range(lanes)]) for at in (0, lanes))
        halves = builder.shuffle_vector(vector, vector, lower), builder.shuffle_vector(vector, vector, upper)
        vector = builder.fadd(*halves)
    return builder.extract_element(vector, ir.Constant(I32, 0))


def _bytes(vector):
    return 2 if vector.element in (FP16, I16) else 4


def store(builder, value, pointer):
    """Write a vector of floats to any address."""
    builder.store(value, builder.bitcast(pointer, value.type.as_pointer())).align = 4


def declare(builder, name, result, arguments):
    """The LLVM function `name`, declared in this module at its first use."""
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, arguments), name)


def masked_load(builder, pointer, mask, otherwise=None, vector=VECTOR):
    """The lanes of `mask` from memory, the others from `otherwise` (zero if not given)."""
    address = builder.bitcast(pointer, vector.as_pointer())
    name = f"llvm.masked.load.v{vector.count}{vector.element.intrinsic_name}.p0"
    function = declare(builder, name, vector, [address.type, I32, mask.type, vector])
    if otherwise is None:
        otherwise = ir.Constant(vector, None)
    return builder.call(function, [address, ir.Constant(I32, _bytes(vector)), mask, otherwise])


def masked_store(builder, value, pointer, mask):
    """Write the lanes of `mask`; memory of the others is not touched."""
    address = builder.bitcast(pointer, value.type.as_pointer())
    name = f"llvm.masked.store.v{value.type.count}f32.p0"
    function = declare(builder, name, ir.VoidType(), [value.type, address.type, I32, mask.type])
    builder.call(function, [value, address, ir.Constant(I32, 4), mask])


def fetch(builder, pointer, write=False, near=False):
    """Ask for a cache line ahead: into the first-level cache to be written or if `near`, else the second-level one."""
    address = builder.bitcast(pointer, F32.as_pointer())
    prefetch = declare(builder, "llvm.prefetch.p0", ir.VoidType(), [address.type, I32, I32, I32])
    flags = int(write), 3 if write or near else 2, 1  # to be written, how close, data
    builder.call(prefetch, [address, *(ir.Constant(I32, flag) for flag in flags)])


def broadcast(builder, value, vector):
    """A vector with `value` in every lane."""
    single = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(I32, 0))
    zeros = ir.Constant(ir.VectorType(I32, vector.count), [0] * vector.count)
    return builder.shuffle_vector(single, ir.Constant(vector, ir.Undefined), zeros)


def first_lanes(builder, count, lanes=LANES):
    """Mask of the lanes below `count`, which may be negative or larger than the vector."""
    wide = ir.VectorType(I64, lanes)
    return builder.icmp_signed("<", ir.Constant(wide, list(range(lanes))), broadcast(builder, count, wide))


def load_first(builder, pointer, vector, left):
    """Read a vector of which `left` elements exist (None: all); zero in place of the others."""
    if left is None:
        return load(builder, pointer, vector)
    return masked_load(builder, pointer, first_lanes(builder, left, vector.count), vector=vector)


def describe() -> dict[str, Any]:
    """Say which vectors the kernels use on this machine."""
    return {"simd": ISA.name, "lanes": LANES, "host": host_isa()}
