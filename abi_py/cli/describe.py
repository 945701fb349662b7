"""One line each about the machine, the model, the data; the figures of a report."""

import math
import platform
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import Precision, TrainableModelConfig
from ..errors import counted

if TYPE_CHECKING:
    from ..parameters import Tensor
    from ..runs.opening import RunData
    from ..runs.settings import RunConfig
    from ..training.report import TrainingReport
    from ..training.trainer import LlamaTrainer

__all__ = [
    "BF16_METHODS",
    "cpu_name",
    "describe_base",
    "describe_data",
    "describe_lora",
    "describe_machine",
    "describe_model",
    "note_on_length",
    "parameter_rows",
    "report_rows",
]

BF16_METHODS = {
    "amx": "the processor's matrix registers, AMX",
    "dot": "the processor's dot product",
    "fp32": "float32 arithmetic",
}


def cpu_name() -> str:
    """Return the processor's own name for itself."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        found = re.search(r"model name\s*:\s*(.+)", text)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def describe_machine(precision: Precision = Precision.FP32) -> str:
    """Return one line about processor, threads, kernels, and how the products of that precision are made."""
    import numba

    from ..kernels import matmul
    from ..kernels.engine import simd
    from ..kernels.engine.number_formats import FLOAT32, PRECISIONS

    tile = f"{FLOAT32.rows} x {FLOAT32.columns}"
    product = f", {simd.ISA.name}, tile {tile}" if matmul.BACKEND == "numba" else ", products by BLAS"
    rounding = ""
    if matmul.BACKEND == "blas" and precision is not Precision.FP32:
        rounding = f", operands rounded to {precision.value}"
    elif precision is not Precision.FP32:
        method = getattr(PRECISIONS[precision], "method", "fp32")
        exact = precision is Precision.BF16X6 and method == "fp32"  # nothing is gained by parts on this machine
        rounding = f", {precision.value}: {'float32 arithmetic' if exact else BF16_METHODS[method]}"
    return f"{cpu_name()}, {counted(numba.get_num_threads(), 'thread')}{product}{rounding}"


def describe_model(model: TrainableModelConfig) -> str:
    """Return one line about the model's shape."""
    active, inner = "", f"feed-forward {model.intermediate_dim}"
    if model.num_experts:
        active = f" ({model.num_active_params():,} active for a token)"
        sparse = sum(map(model.has_experts, range(model.num_layers)))
        dense = f", {inner} in the others" if sparse < model.num_layers else ""
        inner = f"{model.experts_per_token} of {model.num_experts} experts of width {model.resolved_expert_dim}"
        inner += f" in {sparse} of them{dense}" if dense else ""
    return (
        f"{model.num_params():,} parameters{active}: {counted(model.num_layers, 'layer')}, width {model.hidden_dim}, "
        f"{counted(model.num_heads, 'head')} ({model.num_kv_heads} for keys), {inner}, "
        f"vocabulary {model.vocab_size}"
    )


def parameter_rows(trained: "Iterable[Tensor]") -> list[tuple[str, str, str]]:
    """Return the trained tensors: name, shape and weights; those that differ only in the block are one row.

    Their blocks are in the name, as in `layers.0-3,6.w_q.a`.
    """
    found: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    for tensor in trained:
        block = re.match(r"layers\.(\d+)(?=\.)", tensor.name)
        name = f"layers.*{tensor.name[block.end() :]}" if block else tensor.name
        found.setdefault((name, tensor.shape), []).append(int(block[1]) if block else 0)
    return [
        (
            name.replace("*", in_ranges(blocks), 1),
            f"{len(blocks)} x {shape}" if len(blocks) > 1 else f"{shape}",
            f"{len(blocks) * math.prod(shape):,}",
        )
        for (name, shape), blocks in found.items()
    ]


def in_ranges(numbers: Sequence[int]) -> str:
    """Return rising numbers as ranges: 0-3,6."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def describe_base(config: "RunConfig") -> str:
    """Return one line about the model that a run started from."""
    base = config.base
    text = f"{base.path}, digest {(base.digest or '')[:12]}" if base is not None else ""
    trained = "all of its weights are trained" if config.lora is None else "its weights stay as they are"
    return f"{text}; {trained}, learning rate {config.training.learning_rate:g}"


def describe_lora(config: "RunConfig") -> list[tuple[str, str]]:
    """Return the lines about a run's adapters, if it trains them."""
    if config.lora is None:
        return []
    from ..model.lora_targets import Kind, chosen_targets, report

    lines = [("lora", report(config.model, config.lora))]
    if config.lora.kept_in is not None:
        lines.append(("base in", f"{config.lora.kept_in}: the matrices of its linear layers, encoded as they are read"))
    if config.model.num_experts:
        adapted = {target.kind for target in chosen_targets(config.model, config.lora)}
        left = [what for what, kind in (("experts", Kind.EXPERTS), ("routers", Kind.ROUTER)) if kind not in adapted]
        if left:
            lines.append(("note", f"{' and '.join(left)} get no adapters: their weights stay as they are"))
    if config.base is None:
        lines.append(
            ("warning", "the frozen weights are random, so adapters can do little; --base names a trained model")
        )
    return lines


def describe_data(train: "RunData", kept: int) -> str:
    """Return one line about the data, and what was cut or left out."""
    more = f"{kept:,} more for validation" if kept else "none for validation"
    return "; ".join([train.summary(), more, *train.notes])


def note_on_length(train: "RunData", max_seq_len: int) -> str | None:
    """Return what to say where rows could be far longer than the data ever make them, else None."""
    longest = train.longest_row
    if max_seq_len < 2 * longest:
        return None
    return (
        f"max_seq_len ({max_seq_len:,}) is far above the data, of which no row is longer than "
        f"{counted(longest, 'token')}: later positions are never trained; --max-seq-len "
        f"{max(longest, 2)} has room for all"
    )


def report_rows(trainer: "LlamaTrainer", report: "TrainingReport") -> list[tuple[str, str]]:
    """Return the lines of the report's table."""
    history = trainer.loss_history
    rows = [("steps", f"{report.total_steps:,}"), ("epochs", str(report.epochs))]
    rows.append(("tokens", f"{report.total_tokens:,}"))
    if history:
        last = history[-min(10, len(history)) :]
        mean = math.fsum(last) / len(last)
        rows.append(("training loss", f"{history[0]:.4f} -> {mean:.4f} (mean of the last {len(last)})"))
    if math.isfinite(report.best_val_loss):
        if report.initial_val_loss is not None:
            rows.append(("validation loss before", f"{report.initial_val_loss:.4f}"))
        rows.append(("best validation loss", f"{report.best_val_loss:.4f}"))
        rows.append(("  its perplexity", f"{math.exp(min(report.best_val_loss, 700)):.2f}"))
        if report.best_val_bits_per_byte is not None:
            rows.append(("  bits per byte", f"{report.best_val_bits_per_byte:.3f}"))
        rows.append(("  its accuracy", f"{100 * report.best_val_accuracy:.1f}%"))
    seconds = report.total_time_ns / 1e9
    rows.append(("time", f"{seconds:.1f} s, {report.avg_throughput:,.0f} tokens/s with evaluation and saving"))
    if report.skipped_updates:
        rows.append(("skipped updates", f"{report.skipped_updates} (not finite)"))
    if report.overflows:
        rows.append(("overflows", f"{report.overflows} (update dropped, loss scale lowered)"))
    if report.early_stopped:
        rows.append(("stopped early", "yes"))
    rows += [("warning", warning) for warning in report.warnings]
    return rows
