"""Quantising a file beside llama.cpp's own quantiser: seconds and memory, of a model of half a billion weights.

    python bench/quantize.py [--threads 1 2] [--types Q8_0 Q4_K_M] [--rounds 1] [--layers 24]

Makes a file of F16 of the shape of Qwen2-0.5B with random weights (1 GB, in a temporary directory), and quantises it by
turns in processes of their own.  `checked` reads again what was written, as `abi-train quantize` does; llama.cpp does
not.  Needs llama-cpp-python for the comparison.  The last line is JSON.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WAYS = ("plain", "checked", "llama.cpp")


def make(path: Path, layers: int) -> None:
    """Write the model, tensor by tensor."""
    import numpy as np

    from abi_py.config import TrainableModelConfig
    from abi_py.families import tensor_table, write_gguf
    from abi_py.formats.gguf import PlannedTensor, writing
    from abi_py.formats.gguf.ggml_types import BY_NAME
    from abi_py.formats.gguf.quantising import file_type

    config = TrainableModelConfig(
        family="qwen2", hidden_dim=896, num_layers=layers, num_heads=14, num_kv_heads=2, intermediate_dim=4864,
        vocab_size=151_936, rope_theta=1e6,
    )  # fmt: skip
    rng = np.random.default_rng(0)

    def planned(name: str, shape: tuple[int, ...]) -> PlannedTensor:
        def rows(first: int, last: int) -> np.ndarray:
            return rng.standard_normal((last - first, shape[-1]), np.float32) * np.float32(0.02)

        return PlannedTensor(name=name, shape=shape, kind=BY_NAME["F16" if len(shape) > 1 else "F32"], rows=rows)

    metadata = {**write_gguf(config), **file_type("F16").metadata, "tokenizer.ggml.model": "none"}
    writing.write_gguf(path, metadata, [planned(each.gguf_name, each.shape) for each in tensor_table(config)])


def run(way: str, source: str, output: str, kind: str, threads: int) -> dict[str, float]:
    """Quantise in this process; return seconds and the most memory in MB that it had."""
    if way == "llama.cpp":
        import ctypes

        import llama_cpp

        silent = llama_cpp.llama_log_callback(lambda *words: None)
        llama_cpp.llama_log_set(silent, ctypes.c_void_p())
        settings = llama_cpp.llama_model_quantize_default_params()
        settings.nthread, settings.ftype = threads, {"Q8_0": 7, "Q4_K_M": 15}[kind]
        began = time.perf_counter()
        code = llama_cpp.llama_model_quantize(source.encode(), output.encode(), ctypes.byref(settings))
        if code:
            raise SystemExit(f"llama_model_quantize returned {code}")
    else:
        from abi_py.formats.gguf.checking import write_checked
        from abi_py.formats.gguf.container import open_gguf
        from abi_py.formats.gguf.quantising import file_type
        from abi_py.formats.gguf.requantising import convert
        from abi_py.training.session import set_threads

        set_threads(threads)
        began = time.perf_counter()
        found = convert(open_gguf(source), file_type(kind))
        tensors = [move.planned() for move in found.moves]
        write_checked(output, found.metadata, tensors, check=way == "checked")
    return {"seconds": time.perf_counter() - began, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3}


def main() -> None:
    """Make the file, take turns, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--types", nargs="+", default=["Q8_0", "Q4_K_M"])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--file", type=Path, help="a file made before, or where to make it  [a temporary one]")
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.one:
        way, source, output, kind, threads = words.one
        print(json.dumps(run(way, source, output, kind, int(threads))))
        return
    with tempfile.TemporaryDirectory(prefix="abi-quantize-") as place:
        source = words.file or Path(place) / "in.gguf"
        if not source.exists():  # in a process of its own: a child's peak counts from its parent's memory
            code = f"import quantize, pathlib; quantize.make(pathlib.Path({str(source)!r}), {words.layers})"
            subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)
        results = []
        for kind in words.types:
            for threads in words.threads:
                for way in [each for _ in range(words.rounds) for each in WAYS]:
                    output = Path(place) / "out.gguf"
                    call = [sys.executable, __file__, "--one", way, source, output, kind, threads]
                    done = subprocess.run([*map(str, call)], check=True, capture_output=True, text=True, env=os.environ)
                    facts = {"type": kind, "threads": threads, "way": way, **json.loads(done.stdout.splitlines()[-1])}
                    facts |= {"in": source.stat().st_size / 1e6, "out": output.stat().st_size / 1e6}
                    output.unlink()
                    results.append(facts)
                    print(
                        f"{kind:<8}{threads} threads  {way:<10}{facts['seconds']:7.2f} s   peak {facts['peak']:6.0f} MB"
                        f"   {facts['in']:.0f} -> {facts['out']:.0f} MB",
                        flush=True,
                    )
        print(json.dumps(results))


if __name__ == "__main__":
    main()
