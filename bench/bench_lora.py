"""Check and time a step of LoRA beside a full step: with DoRA, on a base in fewer bits, and beside PEFT's.

    python bench/bench_lora.py --save                   the goal: at most 0.75 of a full step, shape deepzig, rank 16
    python bench/bench_lora.py --dora                   and of the same adapters with DoRA
    python bench/bench_lora.py --threads 2 --storage nf4-dq --storage q4_k --peft --peer-python ~/peers/bin/python
    python bench/bench_lora.py --shape tiny --steps 3   shows that it works; its figures mean little

Our trainers are in one process, and their steps take turns.  With one thread the time is that of the processor, so
that other programs disturb it little; with more, it is that of the clock.  The share of the operations is printed
beside the share of the time: no program that does all of them at one speed can be below it.  PEFT's steps
(peers/peft_lora.py: transformers and PyTorch, eager, float32) are in processes of their own, before ours and after
them, from the same weights on the same batch, and the first losses must agree.  The last line is JSON.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import numba
import numpy as np
from _bench import header, run_script, save_rows
from bench_vs_peers import LOSS_TOLERANCE, run
from shapes import SHAPES
from worker import batch, first_weights

from abi_py.config import LlmTrainingConfig, LoraConfig, TrainableModelConfig
from abi_py.formats.safetensors import Stored
from abi_py.model import LoraModel, TrainableModel
from abi_py.model.frozen import FrozenModel
from abi_py.training.trainer import LlamaTrainer

GOAL = 0.75  # of a full step
ON_STORAGE, PEER = 1.25, 1.8  # of LoRA's step on float32, at most; PEFT's step over that, at least


def make(shape, options):
    """Return trainers by name: of a whole model, "lora" of adapters on the same weights, and what else is asked for."""
    config = TrainableModelConfig(**shape.model_fields())
    training = LlmTrainingConfig(
        batch_size=shape.batch_size, max_seq_len=shape.seq_len, grad_accum_steps=1, mixed_precision=options.precision
    )
    settings = LoraConfig(rank=options.rank, alpha=2 * options.rank, dropout=options.dropout)
    weights = dict(first_weights(shape))

    def model():
        made = TrainableModel(config)
        for name, weight in weights.items():
            made.weights[name] = weight
        return made

    models = {"full": model(), "lora": LoraModel(model(), settings)}
    if options.dora:
        models["dora"] = LoraModel(model(), settings.replace(use_dora=True))
    tensors = {name: Stored(weight) for name, weight in weights.items()}
    models |= {name: LoraModel(FrozenModel(config, tensors, name), settings) for name in options.storage}
    return {name: LlamaTrainer(each, training) for name, each in models.items()}


def bytes_of_matrices(lora):
    """Return the bytes of what a base multiplies but for its head: what a storage makes smaller."""
    table, _ = lora.model.stored_tensors()
    names = tuple(f"{tensor.name}." for tensor in table if tensor.hidden)
    return sum(w.nbytes for name, w in lora.base.items() if f"{name}.".startswith(names))


def check(trainer, ids, labels):
    """Exit unless fresh adapters give the losses of the model under them, bit for bit, and have a gradient."""
    expected, found = (each.compute_loss(ids, labels).token_losses for each in (trainer.model.model, trainer.model))
    if found.tobytes() != expected.tobytes():
        sys.exit(f"fresh adapters change losses by up to {np.abs(found - expected).max():.1e}; nothing was timed")
    trainer.model.compute_loss(ids, labels, backward=True)
    if not 0 < trainer.model.compute_gradient_norm() < np.inf:
        sys.exit(f"the adapters' gradient has length {trainer.model.compute_gradient_norm()}; nothing was timed")
    trainer.model.zero_gradients()


def seconds_of_a_step(trainers, ids, labels, steps, clock):
    """Return the median seconds of each trainer's steps, by its name; the first of each is not counted."""
    samples = {name: [] for name in trainers}
    for _ in range(steps + 1):
        for name, trainer in trainers.items():
            start = clock()
            trainer.train_step(ids, labels)
            samples[name].append(clock() - start)
    return {name: statistics.median(times[1:]) for name, times in samples.items()}


def peer_seconds(options, loss):
    """Return the seconds of PEFT's counted steps, from a process of its own; exit if its first loss is another."""
    script = Path(__file__).with_name("peers") / "peft_lora.py"
    words = ["--shape", options.shape, "--rank", options.rank, "--steps", options.steps, "--warmup", 1]
    line = run([options.peer_python, script, *words, "--threads", options.threads], options.threads)
    if not abs(line["first_loss"] - loss) <= LOSS_TOLERANCE["fp32"]:
        sys.exit(f"PEFT's first loss is {line['first_loss']}, ours {loss:.5f}: they do not train the same model")
    return line["steps_s"], line["version"]


def options_of():
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="deepzig", help="model and batch  [deepzig]")
    parser.add_argument("--rank", type=int, default=16, help="rank of the adapters  [16]")
    parser.add_argument("--dropout", type=float, default=0.0, help="share of their input that is dropped  [0]")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="  [fp32]")
    parser.add_argument("--dora", action="store_true", help="time the same adapters with DoRA as well")
    parser.add_argument("--storage", action="append", default=[], help="and on a base in this storage; repeatable")
    parser.add_argument("--peft", action="store_true", help="and PEFT's step")
    parser.add_argument("--peer-python", default=sys.executable, metavar="PATH", help="interpreter that has PEFT")
    parser.add_argument("--steps", type=int, default=10, help="steps of each kind  [10]")
    parser.add_argument("--threads", type=int, default=1, help="threads of the kernels  [1]")
    parser.add_argument("--save", action="store_true", help="add the rows to bench/results/<machine>-lora.csv")
    options = parser.parse_args()
    if not 1 <= options.threads <= numba.config.NUMBA_NUM_THREADS:
        parser.error(f"--threads ({options.threads}) must be between 1 and {numba.config.NUMBA_NUM_THREADS}")
    if options.steps < 1:
        parser.error(f"--steps ({options.steps}) must be at least 1")
    if options.peft and (options.threads == 1 or options.precision != "fp32"):
        parser.error("--peft is timed by the clock and in float32; take --threads 2 and no --precision")
    return options


def main():
    """Measure what is asked for."""
    options = options_of()
    numba.set_num_threads(options.threads)
    shape, about = SHAPES[options.shape], header("lora", options.threads)
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    trainers, (ids, labels) = make(shape, options), batch(shape)
    full, lora = trainers["full"], trainers["lora"]
    for name, trainer in trainers.items():
        if name != "full":
            check(trainer, ids, labels)
    print(f"checked: fresh adapters change no bit of the losses; {lora.model.report()}")
    loss, theirs, version = lora.model.compute_loss(ids, labels).loss, [], ""
    if options.peft:
        theirs, version = peer_seconds(options, loss)
    clock = time.process_time if options.threads == 1 else time.perf_counter
    seconds = seconds_of_a_step(trainers, ids, labels, options.steps, clock)
    if options.peft:
        theirs += peer_seconds(options, loss)[0]
        seconds["peft"] = statistics.median(theirs)
    whole, adapters = seconds["full"], seconds["lora"]
    bound = lora.model.flops_per_token(shape.seq_len) / full.model.flops_per_token(shape.seq_len)
    print(f"{options.shape}, rank {options.rank}, dropout {options.dropout:g}, {options.precision}")
    print(f"full step {1e3 * whole:.1f} ms, with LoRA {1e3 * adapters:.1f} ms: {adapters / whole:.3f} of it, ", end="")
    print(f"{bound:.3f} of its operations; goal {GOAL}: {verdict(adapters / whole <= GOAL)}")
    plain = bytes_of_matrices(lora.model)
    rows = []
    for name, each in seconds.items():
        if name == "full":
            continue
        ratio = each / adapters
        row = {"shape": options.shape, "rank": options.rank, "dropout": options.dropout, "precision": options.precision}
        row |= {"full_ms": round(1e3 * whole, 3), "lora_ms": round(1e3 * adapters, 3)}
        row |= {"share": round(adapters / whole, 4), "share_of_operations": round(bound, 4), "goal": GOAL}
        row |= {"of": name, "step_ms": round(1e3 * each, 3), "of_lora": round(ratio, 4), "version": ""}
        kept = bytes_of_matrices(trainers[name].model) if name in trainers else None
        row["matrices_mb"] = "" if kept is None else round(kept / 1e6, 3)
        said = f"{name} {1e3 * each:.1f} ms, {ratio:.3f} of a step with LoRA"
        if name in options.storage:
            good = verdict(ratio <= ON_STORAGE and kept <= plain / 4)
            said += f"; matrices {kept / 1e6:.1f} MB of {plain / 1e6:.1f}; goals {ON_STORAGE} and a quarter: {good}"
        if name == "peft":
            row["version"] = version
            said += f"; goal {PEER}: {verdict(ratio >= PEER)} ({version})"
        if name != "lora":
            print(said)
        rows.append(about | row)
    if options.save:
        save_rows(rows, "-lora")
    print(json.dumps(rows))


def verdict(met):
    """Return the word."""
    return "met" if met else "MISSED"


if __name__ == "__main__":
    run_script(main)
