"""`abi-train run --dry-run`: what a run will need, before it is begun.  Nothing is written."""

import itertools
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import LlmTrainingConfig, OptimizerType
from ..runs.run import Run
from ..runs.settings import RunConfig
from .console import say, show_table
from .describe import note_on_length
from .training import compile_kernels, show_head

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["memory_by_part", "show_plan"]

MEASURED = 2  # micro-batches that are timed, after one that is not


def show_plan(run: Run, console: "Console") -> None:
    """Print parameters, memory by part, steps, disk, and the time estimated from two measured steps."""
    from rich.table import Table

    config, (epoch, total) = run.config.training, run.steps
    show_head(run, console)
    table = Table(title="Memory", title_justify="left", title_style="bold", show_header=False)
    parts = memory_by_part(run.config)
    for name, size in parts.items():
        table.add_row(name, megabytes(size))
    needed = sum(parts.values())
    table.add_row("together", megabytes(needed), style="bold")
    free = available_memory()
    if free is not None:
        table.add_row("free here", megabytes(free))
    console.print(table)
    tokens = config.batch_size * config.max_seq_len * config.grad_accum_steps
    seen = run.train.num_tokens * config.epochs
    disk = 4 * run.config.model.num_params() + parts["moments"]
    kept = f"the last {config.max_checkpoints} and the best are kept" if config.max_checkpoints else "all are kept"
    free_disk = shutil.disk_usage(Path.cwd()).free
    rows = [
        ("epochs", f"{config.epochs}"),
        ("steps", f"{total:,} ({epoch:,} an epoch), {tokens:,} tokens each"),
        ("tokens", f"{seen:,}" if not config.max_steps else f"at most {total * tokens:,}"),
        (
            "schedule",
            f"{config.lr_schedule.value}: {config.learning_rate:g}, "
            f"warm-up {config.warmup_steps}, end {config.decay_steps}",
        ),
        ("a checkpoint", f"{megabytes(disk)} on the disk; {kept}; {megabytes(free_disk)} are free"),
    ]
    if free is not None and needed > free:
        rows.append(("time", "not measured: the run does not fit into the free memory"))
    else:
        rows.append(("time", estimate(run, console)))
    show_table(console, "Plan", rows)
    if free is not None and needed > free:
        say(console, "advice", advice(run.config))
    if text := note_on_length(run.train, config.max_seq_len):
        say(console, "note", text)
    say(console, "dry run", "nothing was written")


def memory_by_part(config: RunConfig) -> dict[str, int]:
    """Return bytes by part; the model itself is not made for it."""
    from ..model.transformer import memory_plan

    training = config.training
    parts = memory_plan(config.model, training.batch_size, training.max_seq_len, training.mixed_precision)
    if training.optimizer is OptimizerType.SGD:
        parts["moments"] = 4 * config.model.num_params() if training.momentum else 0
    return parts


def megabytes(size: float) -> str:
    """Return a size for people."""
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def available_memory() -> int | None:
    """Return the bytes of memory that programs can still take, or None where the system does not tell."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def advice(config: RunConfig) -> str:
    """Return what would make a run smaller."""
    ways = []
    if config.training.batch_size > 1:
        ways.append("a smaller --batch-size with more --grad-accum-steps")
    if config.model.checkpointing.value == "none":
        ways.append("--checkpointing full")
    ways.append("a smaller --max-seq-len or model")
    return "it does not fit; try " + ", ".join(ways)


def estimate(run: Run, console: "Console") -> str:
    """Return the run's time from measured micro-batches."""
    from ..model import TrainableModel
    from ..training.feed import open_feed
    from ..training.trainer import LlamaTrainer

    training = run.config.training
    compile_kernels(training, console)
    quiet = {"checkpoint_path": None, "log_dir": None, "grad_accum_steps": 1}
    off = {"enable_tensorboard": False, "enable_wandb": False, "enable_metrics_stream": False}
    config: LlmTrainingConfig = training.replace(**quiet, **off)
    trainer = LlamaTrainer(TrainableModel(run.config.model), config)
    feed = open_feed(run.train, config, run.config.model, training=True)
    seconds = []
    for index, batch in enumerate(itertools.islice(itertools.cycle(feed), 1 + MEASURED)):
        began = time.perf_counter()
        trainer.train_step(batch.input_ids, batch.labels, batch.attention_mask, batch.segment_ids)
        if index:
            seconds.append(time.perf_counter() - began)
    each = sum(seconds) / len(seconds)
    total = run.steps[1]
    whole = total * training.grad_accum_steps * each
    tokens = config.batch_size * config.max_seq_len
    if run.valid is not None and training.eval_interval:  # an evaluation is the forward third of a step
        whole += total // training.eval_interval * run.valid.num_tokens / tokens * each / 3
    return (
        f"about {duration(whole)} ({1000 * each:,.0f} ms for a micro-batch, {tokens / each:,.0f} tokens/s; two were "
        "measured)"
    )


def duration(seconds: float) -> str:
    """Return a time for people."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.1f} days"
