"""Time a training step of a mixture of experts beside that of the dense model with as many active parameters.

    python bench/mixture.py                         128 experts of width 64, 8 for a token; the dense: 512
    python bench/mixture.py --expert-dim 128 --length 512 --precision bf16

Both are whole steps of AdamW with clipping: forward, backward, norm, update.  They run in turn in one process, and the
medians are compared; `CPU` is the time of the processor, which other programs do not disturb (with NUMBA_NUM_THREADS=1
that of one thread).  The optimizer passes over all experts' weights, of which a token uses K in E: it is timed apart.
The last line on stdout is JSON.
"""

import argparse
import json
import statistics
import time

import numpy as np
from _bench import header

from abi_py.config import LlmTrainingConfig, TrainableModelConfig
from abi_py.model import TrainableModel
from abi_py.training.trainer import LlamaTrainer

COUNTS = {
    "experts": (128, "experts of a layer"),
    "chosen": (8, "experts that compute a token"),
    "expert-dim": (64, "inner width of an expert"),
    "width": (512, "width of the model"),
    "layers": (6, "number of blocks"),
    "vocab": (8192, "size of the vocabulary"),
    "rows": (8, "rows of a batch"),
    "length": (512, "tokens of a row"),
    "steps": (9, "steps of each that are timed"),
}


def trainers(given):
    """Return the trainers of both models, by name."""
    active = given.chosen * given.expert_dim
    shared = {
        "hidden_dim": given.width, "num_layers": given.layers, "num_heads": given.width // 64,
        "num_kv_heads": max(1, given.width // 256), "vocab_size": given.vocab, "max_seq_len": given.length,
        "intermediate_dim": active,
    }  # fmt: skip
    sparse = {"num_experts": given.experts, "experts_per_token": given.chosen, "expert_dim": given.expert_dim}
    shapes = {
        "dense": TrainableModelConfig(**shared, family="qwen3"),
        "mixture": TrainableModelConfig(**shared, **sparse, family="qwen3_moe", norm_topk_prob=True),
    }
    config = LlmTrainingConfig(
        grad_accum_steps=1, max_seq_len=given.length, mixed_precision=given.precision, learning_rate=1e-4
    )
    return {name: LlamaTrainer(TrainableModel(shape), config) for name, shape in shapes.items()}


def main():
    """Time both and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (default, text) in COUNTS.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} ({default})")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16", "fp16"), help="number format (fp32)")
    given = parser.parse_args()
    made, rng = trainers(given), np.random.default_rng(0)
    ids = rng.integers(0, given.vocab, (given.steps + 2, given.rows, given.length + 1)).astype(np.int32)
    wall, cpu, update = ({name: [] for name in made} for _ in range(3))
    for step, each in enumerate(ids):
        for name, trainer in made.items():
            began, used = time.perf_counter(), time.process_time()
            trainer.train_step_with_metrics(each[:, :-1], each[:, 1:])
            took, used = time.perf_counter() - began, time.process_time() - used
            began = time.perf_counter()
            trainer.model.compute_gradient_norm()
            trainer.optimizer.update(1.0, 0.0)
            if step >= 2:  # the first compiles, the second fills the caches
                wall[name].append(took)
                cpu[name].append(used)
                update[name].append(time.perf_counter() - began)
    print(f"{'':10}{'parameters':>14}{'active':>14}{'step':>10}{'CPU':>10}{'update':>10}{'GFLOP':>9}")
    found = {}
    for name, trainer in made.items():
        shape, tokens = trainer.model.config, given.rows * given.length
        row = {
            "params": shape.num_params(),
            "active": shape.num_active_params(),
            "step_ms": 1e3 * statistics.median(wall[name]),
            "cpu_ms": 1e3 * statistics.median(cpu[name]),
            "update_ms": 1e3 * statistics.median(update[name]),
            "gflop": tokens * trainer.model.flops_per_token(given.length) / 1e9,
        }
        print(f"{name:10}{row['params']:14,}{row['active']:14,}{row['step_ms']:8.0f}ms", end="")
        print(f"{row['cpu_ms']:8.0f}ms{row['update_ms']:8.0f}ms{row['gflop']:9.0f}")
        found[name] = row
    ratios = {key: found["mixture"][key] / found["dense"][key] for key in ("step_ms", "cpu_ms")}
    loads = made["mixture"].model.stack.loads()
    print(f"the mixture's step takes {ratios['step_ms']:.2f} x the dense one's, {ratios['cpu_ms']:.2f} x the CPU time")
    idle = int((loads == 0).sum())
    print(f"largest load {loads.max() / loads.mean():.1f} x the mean, {idle} experts without a token")
    print(json.dumps(header("mixture", None) | vars(given) | {"rows_of_table": found, "ratios": ratios}))


if __name__ == "__main__":
    main()
