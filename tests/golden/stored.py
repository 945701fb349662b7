"""What the scripts that make .npz files share: their command line, and the comparison with the stored file."""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent


def meta(seed, command, *libraries, **more):
    """Return what each file says of its own making, as the array `meta`: versions, seed, command, and `more`."""
    versions = {library.__name__: library.__version__ for library in libraries}
    return {"meta": np.asarray(json.dumps({**versions, "seed": seed, "command": command, **more}))}


def differences(name, arrays, tolerance):
    """Return one line for each array that is not what `name`.npz holds."""
    with np.load(HERE / f"{name}.npz") as stored:
        if set(stored.files) != set(arrays):
            return [f"{name}: stored {sorted(stored.files)}, made {sorted(arrays)}"]
        lines = []
        for key in set(arrays) - {"meta"}:  # versions may differ; that the figures do not is the point
            was, made = stored[key], arrays[key]
            if made.dtype.kind != "f" or made.dtype == np.float16:
                same = np.array_equal(was, made)
            else:
                rtol, atol = tolerance(name, made)
                same = was.shape == made.shape and np.allclose(was, made, rtol=rtol, atol=atol)
            if not same:
                lines.append(f"{name}: {key} differs")
        return sorted(lines)


def main(text, table, tolerance):
    """Make the files of a table, or compare them; the script's exit code.

    `text` is the script's docstring; `table` has a function without arguments for each file, which returns its arrays
    by name; `tolerance(name, array)` returns (rtol, atol) of the comparison of floats.
    """
    parser = argparse.ArgumentParser(description=text.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[[], *table], help="files to make, without .npz (default: all)")
    parser.add_argument("--check", action="store_true", help="compare with the stored files and write nothing")
    options = parser.parse_args()
    wrong = []
    for name in options.names or table:
        arrays = {key: np.asarray(value) for key, value in table[name]().items()}
        if options.check:
            lines = differences(name, arrays, tolerance)
            wrong += lines
            print("\n".join(lines) or f"{name}: same")
            continue
        path = HERE / f"{name}.npz"
        np.savez_compressed(path, **arrays)
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} KB, {len(arrays)} arrays")
    sys.exit(1 if wrong else 0)
