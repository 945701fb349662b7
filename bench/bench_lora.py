"""Check and time a step of LoRA beside a step of the whole model.

    python bench/bench_lora.py --save                   the goal: at most 0.75 of a full step, shape deepzig, rank 16
    python bench/bench_lora.py --dora                   and of the same adapters with DoRA
    python bench/bench_lora.py --shape tiny --steps 3   shows that it works; its figures mean little

The trainers are in one process, and their steps take turns.  With one thread the time is that of the processor, so
that other programs disturb it little; with more, it is that of the clock.  The share of the operations is printed
beside the share of the time: no program that does all of them at one speed can be below it.  The last line is JSON.
"""

import argparse
import json
import statistics
import sys
import time

import numba
import numpy as np
from _bench import header, run_script, save_rows
from shapes import SHAPES

from abi_py.config import LlmTrainingConfig, LoraConfig, TrainableModelConfig
from abi_py.model import LoraModel, TrainableModel
from abi_py.training.trainer import LlamaTrainer

GOAL = 0.75  # of a full step


def make(shape, rank, dropout, precision, dora):
    """Return the trainers of a whole model, of adapters on another with the same weights, and of those with DoRA."""
    config = TrainableModelConfig(**shape.model_fields())
    training = LlmTrainingConfig(
        batch_size=shape.batch_size, max_seq_len=shape.seq_len, grad_accum_steps=1, mixed_precision=precision
    )
    models = [TrainableModel(config)]
    for use_dora in (False, True) if dora else (False,):
        settings = LoraConfig(rank=rank, alpha=2 * rank, dropout=dropout, use_dora=use_dora)
        models.append(LoraModel(TrainableModel(config), settings))
    return [LlamaTrainer(model, training) for model in models]


def check(full, lora, ids, labels):
    """Exit unless fresh adapters give the losses of the model, bit for bit, and their gradient is not zero."""
    expected, found = (each.model.compute_loss(ids, labels).token_losses for each in (full, lora))
    if found.tobytes() != expected.tobytes():
        sys.exit(f"fresh adapters change losses by up to {np.abs(found - expected).max():.1e}; nothing was timed")
    lora.model.compute_loss(ids, labels, backward=True)
    if not 0 < lora.model.compute_gradient_norm() < np.inf:
        sys.exit(f"the adapters' gradient has length {lora.model.compute_gradient_norm()}; nothing was timed")
    lora.model.zero_gradients()


def seconds_of_a_step(trainers, ids, labels, steps, clock):
    """Return the median seconds of each trainer's steps; the first of each is not counted."""
    samples = [[] for _ in trainers]
    for _ in range(steps + 1):
        for trainer, times in zip(trainers, samples, strict=True):
            start = clock()
            trainer.train_step(ids, labels)
            times.append(clock() - start)
    return [statistics.median(times[1:]) for times in samples]


def main():
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="deepzig", help="model and batch  [deepzig]")
    parser.add_argument("--rank", type=int, default=16, help="rank of the adapters  [16]")
    parser.add_argument("--dropout", type=float, default=0.0, help="share of their input that is dropped  [0]")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="  [fp32]")
    parser.add_argument("--dora", action="store_true", help="time the same adapters with DoRA as well")
    parser.add_argument("--steps", type=int, default=10, help="steps of each kind  [10]")
    parser.add_argument("--threads", type=int, default=1, help="threads of the kernels  [1]")
    parser.add_argument("--save", action="store_true", help="add the row to bench/results/<machine>-lora.csv")
    options = parser.parse_args()
    if not 1 <= options.threads <= numba.config.NUMBA_NUM_THREADS:
        parser.error(f"--threads ({options.threads}) must be between 1 and {numba.config.NUMBA_NUM_THREADS}")
    if options.steps < 1:
        parser.error(f"--steps ({options.steps}) must be at least 1")
    numba.set_num_threads(options.threads)
    shape, about = SHAPES[options.shape], header("lora", options.threads)
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    trainers = make(shape, options.rank, options.dropout, options.precision, options.dora)
    full, lora = trainers[:2]
    batch = np.random.default_rng(0).integers(0, shape.vocab_size, (shape.batch_size, shape.seq_len + 1))
    ids, labels = batch[:, :-1], batch[:, 1:]
    for trainer in trainers[1:]:
        check(full, trainer, ids, labels)
    print(f"checked: fresh adapters change no bit of the losses; {lora.model.report()}")
    clock = time.process_time if options.threads == 1 else time.perf_counter
    whole, adapters, *others = seconds_of_a_step(trainers, ids, labels, options.steps, clock)
    bound = lora.model.flops_per_token(shape.seq_len) / full.model.flops_per_token(shape.seq_len)
    verdict = "met" if adapters / whole <= GOAL else "MISSED"
    print(f"{options.shape}, rank {options.rank}, dropout {options.dropout:g}, {options.precision}")
    print(f"full step {1e3 * whole:.1f} ms, with LoRA {1e3 * adapters:.1f} ms: {adapters / whole:.3f} of it, ", end="")
    print(f"{bound:.3f} of its operations; goal {GOAL}: {verdict}")
    for seconds in others:
        print(f"with DoRA {1e3 * seconds:.1f} ms: {seconds / adapters:.3f} of a step with LoRA")
    row = {"shape": options.shape, "rank": options.rank, "dropout": options.dropout, "precision": options.precision}
    row |= {"full_ms": round(1e3 * whole, 3), "lora_ms": round(1e3 * adapters, 3)}
    row |= {"share": round(adapters / whole, 4), "share_of_operations": round(bound, 4), "goal": GOAL}
    row["dora_ms"] = "".join(f"{1e3 * seconds:.3f}" for seconds in others)
    if options.save:
        save_rows([about | row], "-lora")
    print(json.dumps(about | row))


if __name__ == "__main__":
    run_script(main)
