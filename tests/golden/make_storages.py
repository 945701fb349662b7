"""Make storages.npz: what bytes of GGUF files mean, and how numbers are kept in them, by the package `gguf`.

    python tests/golden/make_storages.py [--check]

    NAME/raw, NAME/values      bytes (rows, bytes), and the numbers that they are, as the bits of float32, of all NaN
                               one: random bytes with scales of every kind, among them infinity, NaN, zeros of both
                               signs and subnormal halves
    x, NAME/kept               numbers (rows, 256), and their bytes, where the package writes the type too

This script needs `gguf`; the tests read the file.
"""

import importlib.metadata

import numpy as np
from gguf import GGMLQuantizationType, quants
from stored import main, meta

SEED = 15
NAMES = ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K", "Q3_K", "Q2_K", "IQ4_NL", "MXFP4", "BF16"]
WRITTEN = ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "BF16"]
HALVES = {"Q8_0": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q4_K": [0, 2], "Q5_K": [0, 2]}
HALVES |= {"Q6_K": [208], "Q3_K": [108], "Q2_K": [80, 82], "IQ4_NL": [0]}  # the places of a block's halves
SPECIAL = np.array([0, 0x8000, 1, 0x83FF, 0x0400, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E01, 0x3C00, 0xBC00], "<u2")


def numbers(rng):
    """Return numbers as in weights, and as they are not there: rows of zeros, of one sign, tiny, large."""
    x = rng.standard_normal((12, 256)).astype(np.float32)
    x[0], x[1, :100], x[2, ::2], x[3] = 0, 0, 1, -0.5
    x[4], x[5] = np.abs(x[4]), -np.abs(x[5])
    x[6:10] *= np.float32([[1e-7], [1e-36], [3e3], [1.5e4]])
    x[10] = rng.standard_t(3, 256)
    return x


def storages():
    """Return all arrays."""
    rng = np.random.default_rng(SEED)
    arrays = {"x": numbers(rng)}
    for name in NAMES:
        kind = GGMLQuantizationType[name]
        block, size = quants.GGML_QUANT_SIZES[kind]
        raw = rng.integers(0, 256, (4, max(512 // block, 4) * size), dtype=np.uint8)
        blocks = raw.reshape(-1, size)
        for at in HALVES.get(name, []):
            rows = rng.permutation(len(blocks))[: len(blocks) // 2]
            blocks[rows, at : at + 2] = rng.choice(SPECIAL, len(rows)).view(np.uint8).reshape(-1, 2)
        with np.errstate(all="ignore"):
            values = quants.dequantize(raw, kind)
        values[np.isnan(values)] = np.nan
        arrays |= {f"{name.lower()}/raw": raw, f"{name.lower()}/values": values.view(np.uint32)}
    for name in WRITTEN:
        arrays[f"{name.lower()}/kept"] = quants.quantize(arrays["x"], GGMLQuantizationType[name])
    arrays |= meta(SEED, "python tests/golden/make_storages.py", np, gguf=importlib.metadata.version("gguf"))
    return arrays


if __name__ == "__main__":
    main(__doc__, {"storages": storages}, lambda name, array: (0, 0))
