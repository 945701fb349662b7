"""Time reading and writing with quantised models beside llama.cpp, on the same file, with the same threads.

    python bench/bench_llama_cpp.py --shape 0.3B --type Q8_0 --peer-python PYTHON    one that has llama-cpp-python

A file of random weights is written once for each shape and type.  Each contender runs in processes of its own, in turn:
seconds from the start of the process to the first token after a prompt, tokens per second of a prompt of 512, tokens
per second of what is written after it, and the peak of its memory.  Decoding reads all weights for each token, so it is
also stated as a share of the bandwidth of a read of memory, measured in between.  The last line on stdout is JSON.
"""

import argparse
import ctypes
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from shapes import Shape
from worker import peak_rss_mb

SHAPES = {
    #               V       C   L   H  G      F  B    T
    "0.3B": Shape(32_000, 1024, 20, 16, 4, 2_816, 1, 1024),
    "1B": Shape(32_000, 2048, 22, 32, 4, 5_632, 1, 1024),
}
TYPES = ("F16", "Q8_0", "Q4_K_M")
PROMPT, WRITTEN = 512, 64


def write_file(name, kind, folder):
    """Return a GGUF file with random weights of a shape, written now or before."""
    from abi_py.config import TrainableModelConfig
    from abi_py.families import tensor_table, write_gguf
    from abi_py.formats.gguf.ggml_types import BY_STORAGE
    from abi_py.formats.gguf.quantising import file_type
    from abi_py.formats.gguf.values import U32
    from abi_py.formats.gguf.writing import PlannedTensor
    from abi_py.formats.gguf.writing import write_gguf as write_container
    from abi_py.model.gguf_writing import plan_gguf

    path = Path(folder) / f"{name}-{kind}.gguf"
    if path.exists():
        return path
    config = TrainableModelConfig(**SHAPES[name].model_fields())
    plan = plan_gguf(config, kind)
    rng = np.random.default_rng(0)

    def rows_of(width, is_norm):
        def rows(first, last):
            if is_norm:
                return np.ones((last - first, width), np.float32)
            drawn = rng.standard_normal((last - first, width), np.float32)
            drawn *= np.float32(0.02)
            return drawn

        return rows

    planned = [
        PlannedTensor(
            name=tensor.gguf_name,
            shape=tensor.shape,
            kind=BY_STORAGE[plan.storages[tensor.gguf_name]],
            rows=rows_of(tensor.shape[-1], len(tensor.shape) == 1),
        )
        for tensor in tensor_table(config)
    ]
    metadata = {**write_gguf(config), "general.type": "model", "general.file_type": U32(file_type(kind).id)}
    metadata["tokenizer.ggml.model"] = "none"
    write_container(path, metadata, planned)
    return path


# -- the contenders ------------------------------------------------------------------------------


def ours(path, threads, extra):
    """Return a function from ids to the logits of the last of them, which clears what was before if asked."""
    import numba

    from abi_py.generation.decoder import Decoder
    from abi_py.model.frozen import FrozenModel

    numba.set_num_threads(threads)
    model = FrozenModel.from_gguf(path)
    decoder = Decoder(model, 1)
    slot = np.zeros(1, np.int32)

    def run(ids, anew):
        if anew:
            decoder.clear(0)
            return decoder.prefill(0, ids)
        return decoder.step(slot, ids)[0]

    return run


def theirs(path, threads, extra):
    """Do the same with llama.cpp."""
    import llama_cpp

    quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    loading = llama_cpp.llama_model_default_params()
    loading.use_extra_bufts = extra
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), loading)
    options = llama_cpp.llama_context_default_params()
    options.n_ctx, options.n_batch, options.n_ubatch = PROMPT + 2 * WRITTEN, PROMPT, PROMPT
    options.n_threads = options.n_threads_batch = threads
    context = llama_cpp.llama_init_from_model(model, options)
    memory, place = llama_cpp.llama_get_memory(context), [0]
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    def run(ids, anew):
        if anew:
            llama_cpp.llama_memory_clear(memory, True)
            place[0] = 0
        batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = int(token), place[0] + i, 1
            batch.seq_id[i][0], batch.logits[i] = 0, i == len(ids) - 1
        if llama_cpp.llama_decode(context, batch):
            sys.exit("llama.cpp could not decode")
        llama_cpp.llama_batch_free(batch)
        place[0] += len(ids)
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, -1), (vocabulary,))

    run.keep = quiet
    return run


CONTENDERS = {"abi_py": ours, "llama.cpp": theirs}


def work(options):
    """Be one contender: measure, print a line of JSON."""
    began = time.time() - float(options.born)  # interpreter and imports of this file are part of a cold start
    start = time.perf_counter()
    run = CONTENDERS[options.worker](options.file, options.threads, options.extra)
    ids = np.random.default_rng(1).integers(0, 32_000, PROMPT).astype(np.int32)
    first = run(ids[:16], True).copy()
    cold = began + time.perf_counter() - start
    run(ids, True)
    prefill, decode = [], []
    for _ in range(options.times):
        start = time.perf_counter()
        run(ids, True)
        prefill.append(time.perf_counter() - start)
        for i in range(WRITTEN):
            start = time.perf_counter()
            run(ids[i : i + 1], False)
            decode.append(time.perf_counter() - start)
    line = {"cold_s": cold, "prefill_s": statistics.median(prefill), "step_s": statistics.median(decode)}
    print(json.dumps(line | {"peak_rss_mb": peak_rss_mb(), "first": first[:8].tolist()}))


def main():
    """Read the options, measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, action="append", help="repeatable (default: 0.3B)")
    parser.add_argument("--type", choices=TYPES, action="append", help="repeatable (default: all)")
    parser.add_argument("--rounds", type=int, default=3, help="times that each contender runs")
    parser.add_argument("--times", type=int, default=3, help="prompts in each run")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of each contender")
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has llama-cpp-python")
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where the files are kept")
    parser.add_argument(
        "--extra",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="llama.cpp repacks weights, as it does unless told otherwise; on one machine its AMX ended the process",
    )
    parser.add_argument("--save", action="store_true", help="add the rows to bench/results/<machine>-llama-cpp.csv")
    parser.add_argument("--worker", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--file", help=argparse.SUPPRESS)
    parser.add_argument("--born", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options)
        return
    from _bench import header, save_rows
    from bench_vs_peers import run

    rows = []
    for shape in options.shape or ["0.3B"]:
        for kind in options.type or TYPES:
            path = write_file(shape, kind, options.folder)
            size, found = path.stat().st_size, {name: [] for name in CONTENDERS}
            words = ["--file", path, "--threads", options.threads, "--times", options.times]
            words += ["--extra" if options.extra else "--no-extra"]
            for turn in range(options.rounds):
                for name in sorted(CONTENDERS, reverse=bool(turn % 2)):
                    python = options.peer_python if name == "llama.cpp" else sys.executable
                    command = [python, Path(__file__), "--worker", name, *words, "--born", time.time()]
                    found[name].append(run(command, options.threads, PYTHONDONTWRITEBYTECODE=""))  # as users have it
            for name, lines in found.items():
                best = {key: statistics.median(line[key] for line in lines) for key in lines[0] if key != "first"}
                rows.append(
                    {
                        "name": f"{shape} {kind} {name}",
                        "cold_s": round(best["cold_s"], 3),
                        "prefill_tokens_per_s": round(PROMPT / best["prefill_s"], 1),
                        "decode_tokens_per_s": round(1 / best["step_s"], 2),
                        "gb_per_s": round(size / best["step_s"] / 1e9, 2),
                        "peak_rss_mb": round(best["peak_rss_mb"]),
                        "file_mb": round(size / 2**20),
                    }
                )
                print(json.dumps(rows[-1]), flush=True)
    about = header("llama.cpp", options.threads)
    if options.save:
        save_rows([about | row for row in rows], "-llama-cpp")
    print(json.dumps(about | {"rows": rows}))


if __name__ == "__main__":
    main()
