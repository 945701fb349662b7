"""Make gguf.npz: a GGUF file that the `gguf` package wrote, and what its reader finds in it.

    python tests/golden/make_gguf.py            make it
    python tests/golden/make_gguf.py --check    make it in memory and compare; exit 1 if it differs

This script needs the gguf package; the tests read only the .npz file, which holds

    content     the bytes of the file, uint8
    metadata    JSON: [[key, type, value], ...] as its reader has them
    NAME        each tensor, float32, by its `dequantize`
"""

import json
import tempfile
from importlib.metadata import version
from pathlib import Path

import gguf
import numpy as np
from stored import main, meta

SEED = 15
T = gguf.GGUFValueType
METADATA = (
    *(("a.u8", 200, T.UINT8), ("a.i8", -3, T.INT8), ("a.u16", 60_000, T.UINT16), ("a.i16", -300, T.INT16)),
    *(("a.u32", 4_000_000_000, T.UINT32), ("a.i32", -70_000, T.INT32), ("a.f32", 1e-5, T.FLOAT32)),
    *(("a.yes", True, T.BOOL), ("a.u64", 2**63 + 1, T.UINT64), ("a.i64", -(2**62), T.INT64), ("a.f64", 0.1, T.FLOAT64)),
    ("a.text", "\u4f60\u597d \U0001f600 e\u0301", T.STRING),
)
ARRAYS = (
    *(("a.words", ["x", "\u0120the", "\u4f60"]), ("a.numbers", [1, -2, 3]), ("a.floats", [0.5, -1.5])),
    ("a.bools", [True, False]),
)
TENSORS = (("experts", (2, 3, 64), "F32"), ("half", (3, 32), "F16"), ("brain", (5, 33), "BF16"),
           ("blocks", (4, 96), "Q8_0"), ("fours", (2, 32), "Q4_0"), ("vector", (7,), "F32"))  # fmt: skip


def container():
    """Return the arrays of gguf.npz."""
    chance = np.random.default_rng(SEED)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_custom_alignment(64)
        for key, value, kind in METADATA:
            writer.add_key_value(key, value, kind)
        for key, values in ARRAYS:
            writer.add_array(key, values)
        for name, shape, kind in TENSORS:
            quantised = gguf.quants.quantize(chance.standard_normal(shape, np.float32), gguf.GGMLQuantizationType[kind])
            writer.add_tensor(name, quantised, raw_dtype=gguf.GGMLQuantizationType[kind])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        raw = np.frombuffer(path.read_bytes(), np.uint8)
        reader = gguf.GGUFReader(path)
        found = []
        for key, field in reader.fields.items():
            if not key.startswith("GGUF."):
                found.append([key, [kind.name.lower() for kind in field.types], field.contents()])
        tensors = {each.name: gguf.quants.dequantize(each.data, each.tensor_type) for each in reader.tensors}
        tensors = {name: np.ascontiguousarray(array, np.float32) for name, array in tensors.items()}
        del reader
    arrays = {"content": raw, "metadata": np.asarray(json.dumps(found)), **tensors}
    gguf.__version__ = version("gguf")  # as `meta` takes libraries
    return {**arrays, **meta(SEED, "python tests/golden/make_gguf.py", gguf)}


if __name__ == "__main__":
    main(__doc__, {"gguf": container}, lambda name, array: (0, 0))
