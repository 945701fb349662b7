"""Make nf4.npz: how bitsandbytes keeps matrices in NF4, and what it reads in them.

    python tests/golden/make_nf4.py [--check]

    CASE/x                            a matrix: with a block of zeros; rows that are no whole blocks; of 258 blocks
    CASE/codes, CASE/absmax           its codes and scales
    CASE/double/...                   the same with double quantisation: tensors by the ends of their names in a folder
    CASE/values, CASE/double/values   the numbers that bitsandbytes decodes
    signed, unsigned                  its dynamic maps

This script needs `bitsandbytes` and `torch`; the tests read the file.
"""

import bitsandbytes
import numpy as np
import torch
from bitsandbytes import functional
from stored import main, meta

SEED = 16
CASES = {"plain": (4, 128), "across": (6, 90), "long": (86, 192)}


def kept():
    """Return all arrays."""
    rng = np.random.default_rng(SEED)
    arrays = {name: functional.create_dynamic_map(signed=name == "signed").numpy() for name in ("signed", "unsigned")}
    for case, shape in CASES.items():
        x = rng.standard_normal(shape).astype(np.float32)
        if case == "plain":
            x[2, :64] = 0
        arrays[f"{case}/x"] = x
        for double in (True,) if case == "long" else (False, True):
            packed, state = functional.quantize_4bit(
                torch.from_numpy(x), blocksize=64, quant_type="nf4", compress_statistics=double
            )
            place = f"{case}/double" if double else case
            arrays[f"{place}/codes"] = packed.numpy()
            arrays |= {f"{place}/{name}": part.numpy() for name, part in state.as_dict(packed=True).items()}
            arrays[f"{place}/values"] = functional.dequantize_4bit(packed, state).numpy()
    return arrays | meta(SEED, "python tests/golden/make_nf4.py", np, torch, bitsandbytes)


if __name__ == "__main__":
    main(__doc__, {"nf4": kept}, lambda name, array: (1e-6, 0))
