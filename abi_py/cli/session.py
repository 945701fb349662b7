"""What `run` and `resume` share: a run's configuration, its data, its directory, and how it begins and ends.

RUN_DIR/config.yaml      the final configuration: model, training, early stopping, data
RUN_DIR/metrics.jsonl    one record for each logged step, evaluation, checkpoint
RUN_DIR/report.json      the report of the end
RUN_DIR/checkpoints/     llm_step_{n}/, and `latest`
"""

import contextlib
import dataclasses
import math
import os
import shlex
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import (
    OFF,
    ON,
    SECTIONS,
    Config,
    EarlyStoppingConfig,
    LlmTrainingConfig,
    Precision,
    TrainableModelConfig,
    joined,
    load_yaml,
    opt,
    to_yaml,
)
from ..errors import CheckpointError, ConfigError, counted
from ..locks import DirectoryLock, check_unlocked
from ..training.schedule import ends
from ..untrusted import read_json
from .chat_data import ChatConfig, describe_chat, no_conversations, show_answer
from .models import printable

if TYPE_CHECKING:
    from rich.console import Console

    from ..generation.text import TextCodec
    from ..model.transformer import Transformer
    from ..training.events import Sink
    from ..training.feed import Data
    from ..training.report import TrainingReport
    from ..training.state import TrainingState
    from ..training.trainer import LlamaTrainer
    from .opening import RunData

__all__ = ["RUN_SECTIONS", "DataConfig", "RunConfig", "make_console", "read_run_config", "train"]


@dataclass(frozen=True, kw_only=True)
class DataConfig(Config):
    """Where a run's tokens come from, and what it shows at its end."""

    path: tuple[str, ...] = opt(
        (),
        "text file, directory of texts, .bin file of u32 ids, or conversations (.jsonl, .json, .parquet); "
        "repeat for more; Python's standard library when not given",
        flag="data",
    )
    valid_path: tuple[str, ...] = opt(
        (),
        "data of the same kind for validation; --data is then used for training alone",
        flag="valid-data",
        acts={"path": ON},
    )
    valid_fraction: float = opt(
        0.05,
        "share of the tokens or conversations, at the end, kept for validation (0 = none)",
        acts={"valid_path": OFF},
    )
    tokenizer: str | None = opt(
        None, "tokenizer.json, or a directory with one, for texts and conversations; a .bin file's .json names it",
        acts={"path": ON},
    )
    corpus_bytes: int = opt(300_000, "bytes of the standard library to train on", acts={"path": OFF})
    prompt: str = opt(
        "The ",
        "beginning of the sample at the end of the run; after conversations, a question",
        acts={"sample_tokens": ON},
    )
    sample_tokens: int = opt(250, "length of that sample (0 = no sample)")
    sample_prompts: tuple[str, ...] = opt(
        (),
        "text that the model goes on from after each evaluation, of conversations a question; may be repeated",
        flag="sample-prompt",
    )
    sample_length: int = opt(40, "tokens of those samples", acts={"sample_prompts": ON})

    def validate(self) -> None:
        """Raise `ConfigError` naming field, value, rule and remedy."""
        good = math.isfinite(self.valid_fraction) and 0 <= self.valid_fraction < 1
        self._require("valid_fraction", good, "be at least 0 and below 1", "the usual value is 0.05")
        self._require_at_least(1, "corpus_bytes")
        self._require_at_least(0, "sample_tokens")
        self._require_at_least(1, "sample_length")
        self._require("sample_prompts", "" not in self.sample_prompts, "hold no empty text", "give a character or more")
        self._require("prompt", self.prompt != "", "not be empty", "give at least one character")


RUN_SECTIONS: dict[str, type[Config]] = {
    "data": DataConfig,
    "training": LlmTrainingConfig,
    "model": TrainableModelConfig,
}
RUN_SECTIONS["early_stopping"] = SECTIONS["early_stopping"]
RUN_SECTIONS["chat"] = ChatConfig


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The sections of a run's config.yaml."""

    model: TrainableModelConfig
    training: LlmTrainingConfig
    early_stopping: EarlyStoppingConfig
    data: DataConfig
    chat: ChatConfig | None  # None: the data are no conversations, and no bad row is left out

    def to_yaml(self, directory: Path) -> str:
        """Return the text of `directory`/config.yaml.

        The usual place of the checkpoints is left out: the run may be moved, and its file may begin another run.
        """
        training = self.training
        if training.checkpoint_path is not None:  # absolute, as the data are: the run is resumed from any directory
            training = training.replace(checkpoint_path=os.path.abspath(training.checkpoint_path))
        usual = training.checkpoint_path == os.path.abspath(directory / "checkpoints")
        rest = {"early_stopping": self.early_stopping, "data": self.data, "chat": self.chat}
        return to_yaml(("checkpoint_path",) if usual else (), model=self.model, training=training, **rest)


def read_run_config(path: Path) -> dict[str, dict[str, Any]]:
    """Return the sections of a run's config.yaml, or of a file that the user wrote, as plain values."""
    return load_yaml(path, RUN_SECTIONS)


def has_checkpoint(directory: Path) -> bool:
    """Say whether there is anything in a run's directory to go on from."""
    return _holds_checkpoints(place_of_checkpoints(directory))


def _holds_checkpoints(place: Path) -> bool:
    from ..training.checkpoint import list_checkpoints

    return bool(list_checkpoints(place / "checkpoints") or list_checkpoints(place))


def run_files() -> tuple[str, ...]:
    """Return the names of all that a run writes into its directory."""
    from ..data.tokenizer import FILES
    from ..training.metrics import METRICS
    from ..training.report import REPORT

    return ("config.yaml", "checkpoints", METRICS, REPORT, *FILES)


def is_run(directory: Path) -> bool:
    """Say whether a directory is that of a run, not that of a checkpoint, which has a config.yaml too."""
    from ..training.checkpoint import STATE, is_checkpoint_name

    is_checkpoint = (directory / STATE).is_file() or is_checkpoint_name(directory.absolute())
    return (directory / "config.yaml").is_file() and not is_checkpoint


def place_of_checkpoints(directory: Path) -> Path:
    """Return the checkpoint_path that the run in a directory was given, or the directory itself.

    A run that was given another place, and was killed before it saved there, has its checkpoints in the old one still.
    """
    if not is_run(directory):
        return directory
    named = read_run_config(directory / "config.yaml").get("training", {}).get("checkpoint_path")
    if not named or (_holds_checkpoints(directory) and not _holds_checkpoints(Path(named))):
        return directory
    return Path(named)


def epochs_done(state: "TrainingState") -> int:
    """Return how many epochs are over; a checkpoint may be at the very end of one, before its state counts it."""
    return state.epoch + (0 < state.data.get("batches", 0) <= state.batch_position)


def finished(state: "TrainingState", run: RunConfig) -> tuple[str, str] | None:
    """Return why a run has nothing left to do, and the flags with which it goes on all the same; None if it has."""
    config, early = run.training, run.early_stopping
    if state.early_stopped and early.enabled and state.patience_counter >= early.patience:
        return f"early stopping ended this run at step {state.global_step}", "--no-early-stopping"
    if state.evaluation_due or state.micro_step:
        return None
    at_limit = bool(config.max_steps) and state.global_step >= (config.max_steps or 0)
    no_limit = " --max-steps 0" if at_limit else ""
    if epochs_done(state) >= config.epochs:
        done = "its one epoch is" if config.epochs == 1 else f"all {config.epochs} epochs are"
        reason = f"{done} done (step {state.global_step})"
        anew = " --schedule restart" if ends(config) else ""  # or the rate would stay at its minimum
        return reason, f"--epochs {2 * config.epochs}{no_limit}{anew}"
    if at_limit:
        return f"max_steps ({config.max_steps}) is reached (step {state.global_step})", no_limit.strip()
    return None


def early_stopping_values(
    flags: Mapping[str, Any], file: Mapping[str, Any], defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the section's values; who sets the patience, say, wants it used, unless it is also switched off."""
    values = joined(EarlyStoppingConfig, {**defaults, **file}, flags)
    for asked in (flags, file):
        if asked:
            values["enabled"] = asked.get("enabled", True)
            break
    return values


def check_early_stopping(early: EarlyStoppingConfig, data: Mapping[str, Any], eval_interval: int | None) -> None:
    """Raise ConfigError if early stopping is on and nothing would ever be evaluated; `data` is the section's values."""
    if early.enabled and data.get("valid_fraction") == 0 and not data.get("valid_path"):
        raise ConfigError("valid_fraction (0) must be above 0 for early stopping; try 0.05, or --no-early-stopping")
    if early.enabled and eval_interval == 0:
        raise ConfigError("eval_interval (0) must be above 0 for early stopping; try 100, or --no-early-stopping")


def check_use(run: RunConfig, flags: Mapping[str, Mapping[str, Any]], valid: "RunData | None") -> None:
    """Raise ConfigError for a flag that has no effect on this run: of conversations, or of evaluations."""
    for section, given in flags.items():
        config = getattr(run, section)
        if config is not None:
            config.require_acting(given)
        elif given:
            raise no_conversations(next(iter(given)), run.data.path)
    if valid is not None:
        return
    if run.training.eval_interval and "eval_interval" in flags.get("training", {}):
        raise ConfigError(
            f"eval_interval ({run.training.eval_interval}) has no effect without data for validation; set "
            "valid_fraction above 0, or leave it out"
        )
    if run.early_stopping.enabled:
        raise ConfigError(
            "enabled (True) of early stopping has no effect: too few data to keep any for validation; give more data, "
            "or --no-early-stopping"
        )


def has_report(directory: Path, state: "TrainingState") -> bool:
    """Say whether a run has come to write report.json after its last step; a kill, or a full disk, may prevent it."""
    from ..training.report import REPORT

    try:
        report = read_json(directory / REPORT, {"total_steps": int, "interrupted": bool})
    except (OSError, CheckpointError):
        return False
    return bool(report["total_steps"] == state.global_step and not report["interrupted"])


def hold(directory: Path, training: LlmTrainingConfig, name: str) -> contextlib.AbstractContextManager[Any]:
    """Hold a run's directory for this process; ConfigError, with process and host, if another one writes there.

    Its checkpoint_path is held by the trainer; where that is the same directory, once is enough.
    """
    if os.path.realpath(directory) == os.path.realpath(training.checkpoint_path or ""):
        check_unlocked(directory, name)
        return contextlib.nullcontext()
    return DirectoryLock(directory, name)


def is_byte_level(model: TrainableModelConfig) -> bool:
    """Say whether the model's ids can be shown as text without a tokenizer."""
    return model.vocab_size == 257


# -- the terminal ------------------------------------------------------------------------------


def make_console() -> "Console":
    """Return a console on stdout that survives a reader who goes away; NO_COLOR is obeyed.

    It prints text as it is: a path or an answer may hold what rich would take for markup.
    """
    from rich.console import Console

    class PipeConsole(Console):
        """Falls silent when the pipe breaks; `broken` tells."""

        broken = False

        def on_broken_pipe(self) -> None:
            """Send what is still to come nowhere."""
            self.broken = True
            silence(self)

    return PipeConsole(highlight=False, markup=False, emoji=False)


def silence(console: "Console") -> None:
    """Print nothing any more: its reader has gone."""
    from . import silence_stdout

    console.quiet = True
    silence_stdout()


def say(console: "Console", label: str, text: str) -> None:
    """Print a line of the run's header."""
    console.print(f"{label:<9}{text}", soft_wrap=True)


def show_table(
    console: "Console", title: str, rows: Iterable[tuple[str, ...]], columns: Sequence[str] = ()
) -> None:
    """Print a table, with a header if its columns have names."""
    from rich.table import Table

    table = Table(*columns, title=title, title_justify="left", title_style="bold", show_header=bool(columns))
    for row in rows:
        table.add_row(*row)
    console.print(table)


def describe_machine(precision: Precision = Precision.FP32) -> str:
    """Return one line about processor, threads, kernels, and how the products of that precision are made."""
    import numba

    from ..kernels import matmul
    from ..kernels.engine import simd
    from ..kernels.engine.number_formats import BFLOAT16
    from .info import BF16_METHODS, cpu_name

    facts = simd.describe()
    product = f", {facts['simd']}, tile {facts['tile']}" if matmul.BACKEND == "numba" else ", products by BLAS"
    rounding = ""
    if precision is not Precision.FP32:
        method = BFLOAT16.method if precision is Precision.BF16 else "fp32"
        rounding = f", {precision.value}: {BF16_METHODS[method]}"
    return f"{cpu_name()}, {numba.get_num_threads()} threads{product}{rounding}"


def describe_model(model: TrainableModelConfig) -> str:
    """Return one line about the model's shape."""
    return (
        f"{model.num_params():,} parameters: {counted(model.num_layers, 'layer')}, width {model.hidden_dim}, "
        f"{counted(model.num_heads, 'head')} ({model.num_kv_heads} for keys), feed-forward {model.intermediate_dim}, "
        f"vocabulary {model.vocab_size}"
    )


def token_count(data: "RunData") -> int:
    """Return the tokens of a data set."""
    return getattr(data, "num_tokens", 0) or len(data)


def describe_data(train: "RunData", valid: "RunData | None") -> str:
    """Return one line about the tokens, or the conversations."""
    from ..data.chat_dataset import ChatDataset

    if isinstance(train, ChatDataset):
        return describe_chat(train, valid)
    parts = f"{train.name}: {len(train):,} tokens"
    parts += f", {len(valid):,} more for validation" if valid is not None else ", none for validation"
    return "; ".join([parts, *train.notes])


def note_on_length(train: "RunData", max_seq_len: int) -> str | None:
    """Return what to say where rows could be far longer than the data ever make them, else None."""
    from ..data.chat_dataset import ChatDataset

    longest = token_count(train)
    if isinstance(train, ChatDataset) and not train.packing:
        longest = int(train.lengths.max())
    if max_seq_len < 2 * longest:
        return None
    return (
        f"max_seq_len ({max_seq_len:,}) is far above the data, of which no row is longer than {longest:,} tokens: "
        f"later positions are never trained; --max-seq-len {max(longest, 2)} has room for all"
    )


# -- training ----------------------------------------------------------------------------------


def prepare(config: LlmTrainingConfig) -> None:
    """Set the number of threads; ConfigError for what this machine lacks, threads or packages, before a run begins."""
    from ..training.metrics import configured_sinks
    from ..training.trainer import set_threads

    set_threads(config.num_threads)
    configured_sinks(config)


LINE_SECONDS = 2.0  # where there is no terminal, lines of steps come at most this often


class _Thinned:
    """Hands events on to the console, but not every step where nobody is looking; metrics.jsonl has them all."""

    def __init__(self, sink: Any, seconds: float) -> None:
        self.sink, self.seconds, self.shown = sink, seconds, -math.inf

    def handle(self, event: Any) -> None:
        """Hand an event on."""
        if event.type == "step" and event.logged and self.seconds:
            now = time.monotonic()
            if now - self.shown < self.seconds:
                event = dataclasses.replace(event, logged=False)
            else:
                self.shown = now
        self.sink.handle(event)

    def close(self) -> None:
        """Close the console's live line."""
        self.sink.close()


def train(
    trainer: "LlamaTrainer",
    run: RunConfig,
    directory: Path,
    train_data: "RunData",
    valid: "RunData | None",
    console: "Console",
) -> int:
    """Train to the end, show what came of it, and return the exit code."""
    early = run.early_stopping if run.early_stopping.enabled and valid is not None else None
    samples = sample_sinks(trainer, run, directory, train_data)
    codec = codec_of_run(directory, trainer.model.config.vocab_size)
    trainer.count_bytes = None if codec is None else codec.count_bytes
    report, code = fit_and_show(trainer, directory, train_data, valid, early, console, samples)
    show_end(trainer, report, run, directory, console, train_data if valid is None else valid)
    return code


def fit_and_show(
    trainer: "LlamaTrainer",
    directory: Path,
    train_data: "Data",
    valid: "Data | None",
    early: EarlyStoppingConfig | None,
    console: "Console",
    sinks: "Sequence[Sink]" = (),
) -> tuple["TrainingReport", int]:
    """Compile, then train to the end with the terminal, metrics.jsonl and Ctrl-C attached, and `sinks` after them.

    What can be wrong with flags and files has been told by then: compiling takes a minute.  Writes report.json; returns
    the report and the exit code.
    """
    from ..kernels.engine.peak import measured_peak
    from ..training.console import ConsoleSink
    from ..training.events import Event
    from ..training.metrics import METRICS, JsonlSink
    from ..training.report import REPORT, write_report
    from ..training.stop import HANG_UP, GracefulStop
    from .compiling import compile_for_training

    config = trainer.config
    compile_for_training(
        config.optimizer.value, config.mixed_precision.value, lambda text: say(console, "compile", text)
    )
    trainer.add_sink(JsonlSink(directory / METRICS))
    peak = measured_peak(bf16=config.mixed_precision is Precision.BF16) / 1e9
    in_terminal = console.is_terminal  # asked later, one that has gone says no
    trainer.add_sink(_Thinned(ConsoleSink(console, peak), 0.0 if in_terminal else LINE_SECONDS))
    with GracefulStop() as stop:

        class StopWhenNobodyReads:
            """The reader of our output has gone: stop like Ctrl-C, and save."""

            def handle(self, event: Event) -> None:
                """Look at the console."""
                if getattr(console, "broken", False):
                    stop.request()

            def close(self) -> None:
                """Nothing to close."""

        trainer.add_sink(StopWhenNobodyReads())
        for sink in sinks:
            trainer.add_sink(sink)
        report = trainer.fit(train_data, valid, early, stop)
        if in_terminal and stop.signal is not None and stop.signal == HANG_UP:
            silence(console)  # it has gone, and would answer with an error
        write_report(report, directory / REPORT)
    if report.interrupted:
        return report, stop.exit_code or 141  # 128 + SIGPIPE: what a program says that nobody reads any more
    return report, 0


def show_end(
    trainer: "LlamaTrainer",
    report: "TrainingReport",
    run: RunConfig,
    directory: Path,
    console: "Console",
    data: "RunData",
) -> None:
    """Print the report, the loss that fell, a sample (from `data`, if they are conversations), and how to go on."""
    from ..data.chat_dataset import ChatDataset

    show_table(console, "Report", report_rows(trainer, report))
    if run.data.sample_tokens and not report.interrupted:
        if isinstance(data, ChatDataset):
            question = run.data.prompt if run.data.prompt != DataConfig().prompt else None
            sizes = {"tokens": run.data.sample_tokens, "seed": run.training.seed}
            show_answer(trainer.model, data, directory, question, console, **sizes)
        else:
            show_sample(trainer.model, run, directory, console)
    if report.interrupted:
        say(
            console,
            "stopped",
            f"{counted(report.total_steps, 'step')} done; go on with: abi-train resume {shlex.quote(str(directory))}",
        )
        return
    if report.checkpoint is not None:
        say(console, "saved", f"{report.checkpoint}")
    end = finished(trainer.state, run)
    if end is not None:
        say(console, "go on", f"abi-train resume {shlex.quote(str(directory))} {end[1]}")


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


def codec_of_run(directory: Path, vocab_size: int) -> "TextCodec | None":
    """Return the tokenizer that a run keeps in its directory, or that of byte-level models, or None."""
    from ..data.tokenizer import TOKENIZER_FILE, Tokenizer
    from ..generation.text import text_codec

    there = (directory / TOKENIZER_FILE).is_file()
    return text_codec(Tokenizer.load(directory) if there else None, vocab_size)


def sample_sinks(
    trainer: "LlamaTrainer", run: RunConfig, directory: Path, train_data: "RunData"
) -> list["Sink"]:
    """Return what lets the model write after each evaluation, if asked for; ConfigError if its tokenizer has gone."""
    if not run.data.sample_prompts:
        return []
    from ..data.chat_dataset import ChatDataset
    from .chat_data import encoder_of_run
    from .samples import SampleSink

    codec = codec_of_run(directory, trainer.model.config.vocab_size)
    if codec is None:
        raise ConfigError(f"sample_prompts must have a tokenizer; put tokenizer.json back into {directory}")
    encoder = encoder_of_run(directory) if isinstance(train_data, ChatDataset) else None
    sizes = run.data.sample_length, run.training.seed
    return [SampleSink(trainer, codec, run.data.sample_prompts, *sizes, encoder)]


def show_sample(model: "Transformer", run: RunConfig, directory: Path, console: "Console") -> None:
    """Print what the model makes of the prompt."""
    from ..generation import generate

    codec = codec_of_run(directory, model.config.vocab_size)
    if codec is None or not codec.encode(run.data.prompt):
        say(console, "sample", f"none: {', '.join(run.data.path) or 'the data'} has ids without a text of their own")
        return
    made = generate(model, run.data.prompt, run.data.sample_tokens, tokenizer=codec, seed=run.training.seed)
    text = run.data.prompt + made
    say(console, "sample", f"from the prompt {run.data.prompt!r}, temperature 0.7")
    text = text.rstrip("\N{REPLACEMENT CHARACTER}")  # the last character may have been cut
    for line in printable(text).splitlines():
        console.print("    " + line, soft_wrap=True)


def absolute(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a data section with absolute paths, so that a run can be resumed from any directory."""
    made = dict(data)
    for name in ("path", "valid_path"):
        given = made.get(name) or ()
        made[name] = tuple(map(os.path.abspath, (given,) if isinstance(given, str) else given))
    if made.get("tokenizer"):
        made["tokenizer"] = os.path.abspath(made["tokenizer"])
    return made
