"""What a run will need: memory by part, and the time, from two micro-batches that are measured."""

import itertools
import time
from pathlib import Path
from typing import TYPE_CHECKING

from .run import Run
from .settings import RunConfig

if TYPE_CHECKING:
    from ..model import LoraModel, TrainableModel
    from ..parameters import Tensor

__all__ = [
    "available_memory",
    "flops_of_token",
    "memory_by_part",
    "seconds_of_micro_batch",
    "seconds_of_run",
    "share_in_8_bits",
    "share_of_muon",
    "trained_tensors",
]

MEASURED = 2  # micro-batches that are timed, after one that is not


def trained_tensors(config: RunConfig) -> "tuple[Tensor, ...]":
    """Return the table of what is trained: the weights, or the adapters beside them."""
    from ..families import tensor_table
    from ..model.lora_layers import planned

    return tensor_table(config.model) if config.lora is None else planned(config.model, config.lora)[1]


def flops_of_token(config: RunConfig) -> float:
    """Return the operations of a token in training: of the whole model, or of adapters on a frozen one."""
    from ..families import layers
    from ..model.lora_layers import planned
    from ..model.stack import flops_per_token

    made = layers(config.model) if config.lora is None else planned(config.model, config.lora)[0]
    return flops_per_token(made, config.training.max_seq_len)


def memory_by_part(run: Run) -> dict[str, int]:
    """Return bytes by part; the model itself is not made for it."""
    from ..model.arena import memory_plan
    from ..model.lora_layers import planned
    from ..training.moments import matrices_of, moments_of
    from ..training.optimizer import stack_of

    config, training, table = run.config, run.config.training, trained_tensors(run.config)
    batch = training.batch_size, training.max_seq_len, training.mixed_precision, training.grad_accum_steps > 1
    sizes = config.model, *batch
    if config.lora is None:
        parts = memory_plan(*sizes)
    else:
        shape, kept_in = config.model, config.lora.kept_in
        frozen = 4 * shape.num_params() if run.base is None else run.base.frozen_bytes(shape, kept_in)
        parts = memory_plan(*sizes, adapted=planned(shape, config.lora), frozen=frozen)
        parts = {"frozen weights": frozen, "adapters": parts.pop("weights") - frozen, **parts}
    parts["moments"] = sum(kept.nbytes for kept in moments_of(table, training).values())
    stacks = map(stack_of, matrices_of(table, training))
    parts["scratch"] += max((8 * (rows * columns + min(rows, columns) ** 2) for _, rows, columns in stacks), default=0)
    return parts


def share_of_muon(config: RunConfig) -> tuple[int, float, float]:
    """Return how many matrices muon takes, their share of the parameters, and its share of a step's operations."""
    from ..families import layers, tensor_table
    from ..model.stack import flops_per_token
    from ..training.moments import matrices_of
    from ..training.optimizer import operations_of, stack_of

    training = config.training
    taken = matrices_of(tensor_table(config.model), training)
    muon = operations_of(taken, training)
    tokens = training.batch_size * training.max_seq_len * training.grad_accum_steps
    passes = tokens * flops_per_token(layers(config.model), training.max_seq_len)
    parameters = sum(entry.size for entry in taken) / config.model.num_params()
    return sum(stack_of(entry)[0] for entry in taken), parameters, muon / (muon + passes)


def share_in_8_bits(config: RunConfig) -> tuple[int, float]:
    """Return of how many tensors adamw_8bit keeps the moments in 8 bits, and their share of what is trained."""
    from ..training.moments import coded_of

    table = trained_tensors(config)
    coded = coded_of(table, config.training)
    return len(coded), sum(entry.size for entry in coded) / sum(entry.size for entry in table)


def available_memory() -> int | None:
    """Return the bytes of memory that programs can still take, or None where the system does not tell."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def seconds_of_micro_batch(run: Run, model: "TrainableModel | LoraModel") -> float:
    """Return the seconds of one training step of the run's model without accumulation; nothing is written."""
    from ..training.feed import open_feed
    from ..training.trainer import LlamaTrainer

    config = run.config.training.quiet().replace(grad_accum_steps=1)
    trainer = LlamaTrainer(model, config)
    feed = open_feed(run.train, config, run.config.model, training=True)
    seconds = []
    for batch in itertools.islice(itertools.cycle(feed), 1 + MEASURED):
        began = time.perf_counter()
        trainer.train_step(batch.input_ids, batch.labels, batch.attention_mask, batch.segment_ids)
        seconds.append(time.perf_counter() - began)
    return sum(seconds[1:]) / MEASURED


def seconds_of_run(run: Run, each: float) -> float:
    """Return the seconds of the whole run, of which a micro-batch takes `each`."""
    training, total = run.config.training, run.steps[1]
    seconds = total * training.grad_accum_steps * each
    if run.valid is not None and training.eval_interval:  # an evaluation is the forward third of a step
        tokens = training.batch_size * training.max_seq_len
        seconds += total // training.eval_interval * run.valid.num_tokens / tokens * each / 3
    return seconds
