"""Check and time generation: decoding as a share of the memory's speed, prefill as a share of the product's.

    python bench/bench_generate.py --shape deepzig --shape medium --save    on a quiet machine: some minutes
    python bench/bench_generate.py --quick                                  shows that it works; its figures mean little

A step of decoding reads every weight of a matrix once for all sequences, and the keys and values of each: these bytes
over its time are held against the bandwidth of a read of an array far beyond the caches, measured before and after in
the same process.  A batch is held against as many sequences alone: `rate` is its tokens per second over theirs.  A
prefill is held against the same products alone, with the same number of rows.  Goals: at least 90 % of the bandwidth
for one sequence, four times its tokens per second for eight, and 60 % of the products' speed.  The last line on stdout
is JSON.
"""

import argparse
import json
import statistics
import sys
import time

import numba
import numpy as np
from _bench import header, save_rows
from roofline import bandwidth
from shapes import SHAPES

from abi_py.config import TrainableModelConfig
from abi_py.generation import GenerationConfig, Generator
from abi_py.generation.decoder import Decoder
from abi_py.kernels.unchecked import product
from abi_py.model import TrainableModel

GOALS = {"decode": 90.0, "prefill": 60.0}  # per cent
SEQUENCES = (1, 2, 4, 8, 16, 32)
RATES = {8: 4.0}  # goals: tokens per second of so many sequences, over those of one
SETTINGS = {"greedy": {"temperature": 0}, "drawn": {"temperature": 0.8, "top_k": 40, "top_p": 0.95}}


def median_seconds(function, runs):
    """Return the median seconds of a call; the first one does not count."""
    samples = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        function()
        samples.append(time.perf_counter() - start)
    return statistics.median(samples[1:])


def make_model(name, length):
    """Return a model of a shape, with room for `length` tokens."""
    fields = SHAPES[name].model_fields()
    return TrainableModel(TrainableModelConfig(**fields | {"max_seq_len": max(length, fields["max_seq_len"])}))


def matrix_weights(config):
    """Return the weights of the matrices that a row passes in the layers, and in the head."""
    layer = 2 * config.q_dim + 2 * config.kv_dim + 3 * config.intermediate_dim
    return config.num_layers * config.hidden_dim * layer, config.vocab_size * config.hidden_dim


def check(model, rng):
    """Exit unless the logits of a prefill and of steps are those of the forward pass of training."""
    ids = rng.integers(0, model.config.vocab_size, 24)
    expected, decoder = model.forward(ids)[0], Decoder(model)
    found = [decoder.prefill(0, ids[:16]).copy()]
    found += [decoder.step(np.zeros(1, np.int32), ids[t : t + 1])[0].copy() for t in range(16, 24)]
    error = np.abs(np.array(found) - expected[15:]).max() / np.abs(expected).max()
    if not error < 1e-4:
        sys.exit(f"logits are wrong by {error:.1e}, allowed 1e-4; nothing was timed")
    print(f"checked logits: off by {error:.1e}, allowed 1e-4")


def decode_rows(model, rng, context, steps, read):
    """Time single steps after `context` tokens: one sequence, and more that share a step."""
    layers, head = matrix_weights(model.config)
    alone = None
    for sequences in SEQUENCES:
        decoder = Decoder(model, sequences)
        decoder.reserve(context + steps + 2)
        decoder.prefill(0, rng.integers(0, model.config.vocab_size, context))
        for slot in range(1, sequences):
            decoder.copy(0, slot, context)
        slots, ids = np.arange(sequences, dtype=np.int32), np.full(sequences, 7, np.int32)
        seconds = median_seconds(lambda d=decoder, s=slots, i=ids: d.step(s, i), steps)
        moved = 4 * (layers + head) + sequences * context * decoder.cache.bytes_of_position
        alone = alone or seconds
        one = sequences == 1
        yield {
            "name": f"step of {sequences} after {context}",
            "median_us": seconds * 1e6,
            "tokens_per_s": sequences / seconds,
            "gb_per_s": moved / seconds / 1e9,
            "share": 100 * moved / seconds / read if one else None,
            "rate": None if one else sequences * alone / seconds,
            "goal": GOALS["decode"] if one else RATES.get(sequences),
        }


def generation_rows(model, rng, context, tokens, read):
    """Time whole continuations: steps, choosing tokens and Python's share."""
    layers, head = matrix_weights(model.config)
    prompt = rng.integers(0, model.config.vocab_size, context)
    for name, settings in SETTINGS.items():
        config, generator = GenerationConfig(max_new_tokens=tokens, **settings), Generator(model)
        generator.run([prompt], config)
        start = time.perf_counter()
        (result,) = generator.run([prompt], config)
        seconds = (time.perf_counter() - start - generator.prefill_seconds) / (len(result.ids) - 1)
        moved = 4 * (layers + head) + context * Decoder(model).cache.bytes_of_position
        yield {
            "name": f"generate, {name}",
            "median_us": seconds * 1e6,
            "tokens_per_s": 1 / seconds,
            "gb_per_s": moved / seconds / 1e9,
            "share": 100 * moved / seconds / read,
            "goal": GOALS["decode"],
        }


def products_alone(config, rows):
    """Return a function that computes the products of a prefill, and nothing else."""
    c, f, qkv = config.hidden_dim, config.intermediate_dim, config.q_dim + 2 * config.kv_dim
    shapes = [(qkv, c), (c, config.q_dim), (2 * f, c), (c, f)]
    work = []
    for width, depth in shapes:
        arrays = np.empty((rows, width), np.float32), np.ones((rows, depth), np.float32)
        work.append((*arrays, np.ones((width, depth), np.float32)))

    def run():
        for _ in range(config.num_layers):
            for out, x, w in work:
                product(out, x, w, transpose_b=True)

    return run


def prefill_row(model, rng, length, runs):
    """Time the reading of a prompt against the products of its layers alone."""
    layers, head = matrix_weights(model.config)
    ids, decoder = rng.integers(0, model.config.vocab_size, length), Decoder(model)

    def read():
        decoder.clear(0)
        decoder.prefill(0, ids)

    seconds, alone = median_seconds(read, runs), median_seconds(products_alone(model.config, length), runs)
    flops = 2 * layers * length + 2 * head + 2 * model.config.num_layers * model.config.q_dim * length * (length + 1)
    speed, possible = flops / seconds, 2 * layers * length / alone
    return {
        "name": f"prefill of {length}",
        "median_us": seconds * 1e6,
        "tokens_per_s": length / seconds,
        "gflop_per_s": speed / 1e9,
        "product_gflop_per_s": possible / 1e9,
        "share": 100 * speed / possible,
        "goal": GOALS["prefill"],
    }


def show(shape, row):
    """Print a row."""
    speed = f"{row['gb_per_s']:8.1f} GB/s   " if "gb_per_s" in row else f"{row['gflop_per_s']:8.1f} GFLOP/s"
    value, unit = (row["share"], "%") if row["share"] is not None else (row["rate"], "x")
    verdict = "met" if row["goal"] is not None and value >= row["goal"] else "MISSED"
    goal = "" if row["goal"] is None else f"  goal {row['goal']:.0f} {unit}: {verdict}"
    head = f"{shape:12}{row['name']:30}{row['median_us'] / 1000:10.3f} ms{row['tokens_per_s']:12,.0f} tokens/s"
    print(f"{head}{speed}{value:7.1f} {unit}{goal}", flush=True)


def main():
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", action="append", choices=sorted(SHAPES), help="may be repeated  [deepzig, medium]")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt  [512]")
    parser.add_argument("--tokens", type=int, default=128, help="tokens that are made  [128]")
    parser.add_argument("--threads", type=int, default=numba.get_num_threads(), help="threads of the kernels")
    parser.add_argument("--quick", action="store_true", help="few runs, one small shape")
    parser.add_argument("--save", action="store_true", help="add the rows to bench/results/<machine>-generate.csv")
    options = parser.parse_args()
    if not 1 <= options.threads <= numba.config.NUMBA_NUM_THREADS:
        parser.error(f"--threads ({options.threads}) must be between 1 and {numba.config.NUMBA_NUM_THREADS}")
    if min(options.prompt, options.tokens) < 2:
        parser.error("--prompt and --tokens must be at least 2")
    numba.set_num_threads(options.threads)
    shapes = options.shape or (["small"] if options.quick else ["deepzig", "medium"])
    tokens, runs = (8, 3) if options.quick else (options.tokens, 20)
    about, rows = header("generate", options.threads), []
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    for shape in shapes:
        rng, model = np.random.default_rng(0), make_model(shape, options.prompt + 2 * options.tokens)
        check(model, rng)
        read = bandwidth(*(256, 3) if options.quick else ())[0]
        print(f"read of an array far beyond the caches: {read / 1e9:.1f} GB/s")
        for row in [
            *decode_rows(model, rng, options.prompt, tokens, read),
            *generation_rows(model, rng, options.prompt, tokens, read),
            prefill_row(model, rng, options.prompt, runs),
        ]:
            show(shape, row)
            rows.append({"shape": shape, "read_gb_per_s": read / 1e9} | row)
        again = bandwidth(*(256, 3) if options.quick else ())[0]
        if not 0.9 < again / read < 1.1:
            print(f"the bandwidth was {again / 1e9:.1f} GB/s afterwards: other programs ran, measure again")
    columns = dict.fromkeys(key for row in rows for key in row)
    rows = [{key: round(v, 3) if isinstance(v := row.get(key), float) else v for key in columns} for row in rows]
    if options.save:
        save_rows([about | row for row in rows], "-generate")
    print(json.dumps(about | {"rows": rows}))


if __name__ == "__main__":
    main()
