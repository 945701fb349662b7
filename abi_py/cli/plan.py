"""`abi-train run --dry-run`: what a run will need, before it is begun.  Nothing is written."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import LearningRateSchedule, LlmTrainingConfig, OptimizerType
from ..errors import counted
from ..runs.plan import (
    available_memory,
    memory_by_part,
    seconds_of_micro_batch,
    seconds_of_run,
    share_in_8_bits,
    share_of_muon,
    trained_tensors,
)
from ..runs.run import Run
from ..runs.settings import RunConfig
from ..training.schedule import cooldown_start
from .compiling import compile_for_training
from .console import say, show_table
from .describe import note_on_length
from .training import show_head, show_trained

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["show_plan"]


def show_plan(run: Run, console: "Console") -> None:
    """Print trained tensors, memory by part, steps, disk, and the time estimated from two measured steps."""
    from rich.table import Table

    config, (epoch, total) = run.config.training, run.steps
    trained = trained_tensors(run.config)
    show_head(run, console)
    show_trained(run, console)
    table = Table(title="Memory", title_justify="left", title_style="bold", show_header=False)
    parts = memory_by_part(run)
    for name, size in parts.items():
        table.add_row(name, megabytes(size))
    needed = sum(parts.values())
    table.add_row("together", megabytes(needed), style="bold")
    free = available_memory()
    if free is not None:
        table.add_row("free here", megabytes(free))
    console.print(table)
    tokens = config.batch_size * config.max_seq_len * config.grad_accum_steps
    most = "at most " if run.train.conversations else ""
    seen = run.train.num_tokens * config.epochs
    disk = 4 * sum(tensor.size for tensor in trained) + parts["moments"]
    kept = f"the last {config.max_checkpoints} and the best are kept" if config.max_checkpoints else "all are kept"
    free_disk = shutil.disk_usage(Path.cwd()).free
    rows = [
        ("epochs", f"{config.epochs}"),
        ("steps", f"{total:,} ({epoch:,} an epoch), {most}{counted(tokens, 'token')} each"),
        ("tokens", f"{seen:,}" if not config.max_steps else f"at most {total * tokens:,}"),
        ("schedule", _schedule(config)),
        *_optimizer(run.config),
        ("a checkpoint", f"{megabytes(disk)} on the disk; {kept}; {megabytes(free_disk)} are free"),
    ]
    if free is not None and needed > free:
        rows.append(("time", "not measured: the run does not fit into the free memory"))
    else:
        model = run.make_model()
        compile_for_training(model, config, console, lambda text: say(console, "compile", text))
        each = seconds_of_micro_batch(run, model)
        speed = config.batch_size * config.max_seq_len / each
        measured = f"{1000 * each:,.0f} ms for a micro-batch, {speed:,.0f} tokens/s; two were measured"
        rows.append(("time", f"about {duration(seconds_of_run(run, each))} ({measured})"))
    show_table(console, "Plan", rows)
    if free is not None and needed > free:
        say(console, "advice", advice(run.config))
    if text := note_on_length(run.train, config.max_seq_len):
        say(console, "note", text)
    say(console, "dry run", "nothing was written")


def _schedule(config: LlmTrainingConfig) -> str:
    """Return the learning rate and the steps at which it changes its course."""
    falls = f"cooldown from {cooldown_start(config)}, " if config.lr_schedule is LearningRateSchedule.WSD else ""
    course = f"warm-up {config.warmup_steps}, {falls}end {config.decay_steps}"
    return f"{config.lr_schedule.value}: {config.learning_rate:g}, {course}"


def _optimizer(config: RunConfig) -> list[tuple[str, str]]:
    """Return a row about an optimizer that takes some tensors in a way of its own."""
    if config.training.optimizer is OptimizerType.ADAMW_8BIT:
        tensors, parameters = share_in_8_bits(config)
        text = f"adamw_8bit: moments in 8 bits of {counted(tensors, 'tensor')}"
        return [("optimizer", f"{text}, {100 * parameters:.0f}% of the parameters; the rest in 32")]
    if config.training.optimizer is not OptimizerType.MUON:
        return []
    matrices, parameters, operations = share_of_muon(config)
    text = f"muon for {matrices} matrices, {100 * parameters:.0f}% of the parameters, adamw for the rest"
    return [("optimizer", f"{text}; {100 * operations:.1f}% of a step's operations")]


def megabytes(size: float) -> str:
    """Return a size for people."""
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def advice(config: RunConfig) -> str:
    """Return what would make a run smaller."""
    ways = []
    if config.training.batch_size > 1:
        ways.append("a smaller --batch-size with more --grad-accum-steps")
    if config.model.checkpointing.value == "none":
        ways.append("--checkpointing full")
    ways.append("a smaller --max-seq-len or model")
    return "it does not fit; try " + ", ".join(ways)


def duration(seconds: float) -> str:
    """Return a time for people."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.1f} days"
