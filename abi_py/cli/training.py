"""Training in the terminal: what `run`, `resume` and `deepzig` show before, during and after it."""

import dataclasses
import math
import shlex
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import EarlyStoppingConfig
from ..errors import counted
from ..runs.conversations import encoder_of_run
from ..runs.findings import Findings
from ..runs.finishing import leave_model
from ..runs.models import codec_of_run
from ..runs.parts import UNTRAINED, evaluate_kept, put_best_back
from ..runs.plan import trained_tensors
from ..runs.resuming import finished
from ..runs.run import Run
from ..runs.samples import sample_sinks
from ..runs.schedule import note_on_schedule
from ..runs.settings import DataConfig
from ..runs.trainer_files import trainer_sinks
from .compiling import prepare_training
from .console import printable, say, show_table, silence
from .describe import (
    describe_base,
    describe_data,
    describe_lora,
    describe_machine,
    describe_model,
    note_on_length,
    parameter_rows,
    report_rows,
)
from .inspect import size_text

if TYPE_CHECKING:
    from rich.console import Console

    from ..data.batch import TokenArray
    from ..data.chat_encoding import ChatEncoder
    from ..model.transformer import Transformer
    from ..training.events import Event, Sink
    from ..training.feed import Data
    from ..training.report import TrainingReport
    from ..training.trainer import LlamaTrainer

__all__ = ["fit_and_show", "show_head", "show_trained", "start", "train"]


def start(run: Run, console: "Console", again: str | None = None) -> int:
    """Begin a run in a directory that is held, and train to its end; return the exit code.  `again`: as `train`."""
    training, (epoch, total) = run.config.training, run.steps
    show_head(run, console)
    most = "at most " if run.train.conversations else ""
    tokens = training.batch_size * training.max_seq_len * training.grad_accum_steps
    steps = f"{counted(total, 'step')} of {most}{counted(tokens, 'token')} ({epoch:,} an epoch)"
    whole = not training.max_steps or total < training.max_steps
    what = counted(training.epochs, "epoch") if whole else f"to step {training.max_steps:,}"
    say(console, "plan", f"{what}, {steps}; run in {run.directory}")
    tokenizer, problem = run.begin()
    if tokenizer is not None and run.config.data.train_tokenizer:
        size = f"{tokenizer.vocab_size:,} tokens"
        say(console, "ids of", f"a tokenizer of {size}, trained on the data, in {run.directory}")
    elif tokenizer is not None:
        say(console, "ids of", f"{tokenizer.name}, kept in {run.directory}")
    for text in (problem, note_on_length(run.train, training.max_seq_len), note_on_schedule(training, total)):
        if text:
            say(console, "note", text)
    if run.config.lora is not None:
        show_trained(run, console)
    return train(run.make_trainer(), run, console, again)


def show_trained(run: Run, console: "Console") -> None:
    """Print the tensors that are trained."""
    rows = parameter_rows(trained_tensors(run.config))
    show_table(console, "Trained parameters", rows, ("tensor", "shape", "weights"))


def show_head(run: Run, console: "Console") -> None:
    """Print what trains, and on what."""
    say(console, "machine", describe_machine(run.config.training.mixed_precision))
    say(console, "model", describe_model(run.config.model))
    if run.config.base is not None:
        say(console, "base", describe_base(run.config))
    for label, text in describe_lora(run.config):
        say(console, label, text)
    if run.base is not None and run.base.said:
        say(console, "from", run.base.said)
        if run.config.lora is not None and run.base.replaced:
            text = f"the adapters need {run.base.place} as it is; before that run is trained further, copy it"
            say(console, "note", f"{text}: resume takes --base COPY")
    if run.base is not None:
        for text in (*(f"passed over: {reason}" for reason in run.base.skipped), *run.base.notes):
            say(console, "note", text)
    say(console, "data", describe_data(run.train, run.num_kept))


LINE_SECONDS = 2.0  # where there is no terminal, lines of steps come at most this often


class _Thinned:
    """Hands events on to the console, but not every step where nobody is looking; metrics.jsonl has them all."""

    def __init__(self, sink: "Sink", seconds: float) -> None:
        self.sink, self.seconds, self.shown = sink, seconds, -math.inf

    def handle(self, event: "Event") -> None:
        """Hand an event on."""
        from ..training.events import StepEvent

        if isinstance(event, StepEvent) and event.logged and self.seconds:
            now = time.monotonic()
            if now - self.shown < self.seconds:
                event = dataclasses.replace(event, logged=False)
            else:
                self.shown = now
        self.sink.handle(event)

    def close(self) -> None:
        """Close the console's live line."""
        self.sink.close()


def train(trainer: "LlamaTrainer", run: Run, console: "Console", again: str | None = None) -> int:
    """Train to the end, show what came of it, and return the exit code.

    `again` is the command that goes on with what the run is a part of; None: it is a run by itself.
    """
    sinks: list[Sink] = [*trainer_sinks(run), *sample_sinks(trainer, run)]
    data = run.config.data
    report, code = fit_and_show(
        trainer,
        run.directory,
        run.train,
        run.valid,
        console,
        early_stopping=run.early_stopping,
        sinks=sinks,
        decodes=any((data.sample_prompts, data.sample_tokens, data.check_json)),
    )
    show_end(trainer, report, run, console, again)
    return code


def fit_and_show(
    trainer: "LlamaTrainer",
    directory: Path,
    train_data: "Data",
    valid: "Data | None",
    console: "Console",
    *,
    early_stopping: EarlyStoppingConfig | None = None,
    sinks: "Sequence[Sink]" = (),
    decodes: bool = True,
) -> tuple["TrainingReport", int]:
    """Compile, then train to the end with the terminal, metrics.jsonl and Ctrl-C attached, and `sinks` after them.

    `decodes`: texts are written after evaluations or at the end, so what that needs is compiled too.

    What can be wrong with flags and files has been told by then: compiling takes a minute.  Writes report.json; returns
    the report and the exit code.
    """
    from ..kernels.engine.number_formats import PRECISIONS
    from ..kernels.engine.peak import measured_peak
    from ..training.console import ConsoleSink
    from ..training.metrics import METRICS, JsonlSink
    from ..training.report import REPORT, write_report
    from ..training.stop import HANG_UP, GracefulStop

    config = trainer.config
    prepare_training(trainer.model, config, console, lambda text: say(console, "compile", text), decodes)
    trainer.add_sink(JsonlSink(directory / METRICS))
    peak = measured_peak(number_format=PRECISIONS[config.mixed_precision]) / 1e9
    in_terminal = console.is_terminal  # asked later, one that has gone says no
    trainer.add_sink(_Thinned(ConsoleSink(console, peak), 0.0 if in_terminal else LINE_SECONDS))
    with GracefulStop(tell=lambda text: console.print(text, soft_wrap=True)) as stop:

        class StopWhenNobodyReads:
            """The reader of our output has gone: stop like Ctrl-C, and save."""

            def handle(self, event: "Event") -> None:
                """Look at the console."""
                if getattr(console, "broken", False):
                    stop.request()

            def close(self) -> None:
                """Nothing to close."""

        trainer.add_sink(StopWhenNobodyReads())
        for sink in sinks:
            trainer.add_sink(sink)
        report = trainer.fit(train_data, valid, early_stopping, stop)
        if in_terminal and stop.signal is not None and stop.signal == HANG_UP:
            silence(console)  # it has gone, and would answer with an error
        write_report(report, directory / REPORT)
    if report.interrupted:
        return report, stop.exit_code or 141  # 128 + SIGPIPE: what a program says that nobody reads any more
    return report, 0


def show_end(
    trainer: "LlamaTrainer", report: "TrainingReport", run: Run, console: "Console", whole: str | None
) -> None:
    """Print the report, the loss that fell, a sample, and how to go on; write the model that the run leaves."""
    found = Findings()
    if not report.interrupted:
        step, report = put_best_back(run, trainer, report)
        found = evaluate_kept(run, trainer, step)
    show_table(console, "Report", report_rows(trainer, report) + part_rows(run, found))
    again = whole or f"abi-train resume {shlex.quote(str(run.directory))}"
    if report.interrupted:
        say(console, "stopped", f"{counted(report.total_steps, 'step')} done; go on with: {again}")
        return
    if report.checkpoint is not None:
        say(console, "saved", f"{report.checkpoint}")
    left = leave_model(run, trainer, report, found)
    if UNTRAINED in report.warnings:
        say(console, "warning", UNTRAINED)
    say(console, left.kind, f"{left.folder}: {left.said}")
    if left.note:
        say(console, "note", left.note)
    if left.gguf is not None:
        files = ", ".join(f"{size_text(size)} in {left.gguf.dtype}" for size in left.gguf.files.values())
        compared = ", logits compared" if left.gguf.agreement is not None else ""
        opened_by = "; ".join(left.gguf.opens)
        say(console, "gguf", f"{run.config.training.export_gguf_path}: {files}{compared}; opens in {opened_by}")
    if not left.has_tokenizer:
        say(console, "note", "it has no tokenizer: the text of these ids is not known; --tokenizer names one")
    if run.config.data.sample_tokens and run.train.conversations:
        show_answers(trainer.model, run, left.folder, console)
    elif run.config.data.sample_tokens:
        show_sample(trainer.model, run, console)
    end = None if whole is not None else finished(trainer.state, run.config)
    if end is not None:
        say(console, "go on", f"{end.until}: {again} {end.flags}")


def part_rows(run: Run, found: Findings) -> list[tuple[str, str]]:
    """Return the lines about each part of what was kept for validation, and the answers that were checked."""
    from ..data.holdout import PARTS  # with all of data/

    rows = []
    for name, result in found.parts.items():
        rows.append((PARTS[name], f"{counted(len(run.parts[name]), 'conversation')}"))
        rows.append(("  loss, perplexity", f"{result.loss:.4f}, {result.perplexity:.2f}"))
        rows.append(("  accuracy", f"{100 * result.accuracy:.1f}%"))
    return rows + (found.answers.rows() if found.answers is not None else [])


def show_sample(model: "Transformer", run: Run, console: "Console") -> None:
    """Print what the model makes of each prompt."""
    from ..generation import generate

    data, codec = run.config.data, codec_of_run(run.directory, model.config.vocab_size)
    if codec is None or not all(map(codec.encode, data.prompt)):
        say(console, "sample", f"none: {', '.join(data.path) or 'the data'} has ids without a text of their own")
        return
    for prompt in data.prompt:
        made = generate(model, prompt, data.sample_tokens, tokenizer=codec, seed=run.config.training.seed)
        say(console, "sample", f"from the prompt {prompt!r}, temperature 0.7")
        text = (prompt + made).rstrip("\N{REPLACEMENT CHARACTER}")  # the last character may have been cut
        for line in printable(text).splitlines():
            console.print("    " + line, soft_wrap=True)


def show_answers(model: "Transformer", run: Run, folder: Path, console: "Console") -> None:
    """Print what the model answers to each prompt; without one to questions of the data, beside their answers.

    `folder` has its settings of generation.
    """
    from ..generation import GenerationConfig, Generator
    from ..generation.settings import CONFIG_FILE

    encoder, data = encoder_of_run(run.directory), run.config.data
    settings = GenerationConfig.load(folder / CONFIG_FILE).replace(seed=run.config.training.seed)
    generator = Generator(model, encoder.tokenizer)
    for asked, known in _questions(run, encoder):
        room = model.config.max_seq_len - len(asked)
        if room < 1:
            say(console, "sample", f"none: the question fills the model's {counted(model.config.max_seq_len, 'token')}")
            continue
        (result,) = generator.run([asked], settings.replace(max_new_tokens=min(data.sample_tokens, room)))
        say(console, "asked", on_lines(printable(encoder.tokenizer.decode(asked.tolist()))))
        say(console, "answer", on_lines(printable(result.text or "") or "(empty)"))
        for name, part in known.items():
            say(console, name, on_lines(printable(encoder.tokenizer.decode(part.tolist()))))


def on_lines(text: str) -> str:
    """Return a text whose lines stand under each other, after a label."""
    return text.replace("\n", "\n" + " " * 9)


def _questions(
    run: Run, encoder: "ChatEncoder"
) -> "Iterator[tuple[TokenArray, dict[str, TokenArray]]]":
    """Yield what is asked, and what the data answer, where the question is theirs."""
    data = run.config.data
    if data.prompt != DataConfig().prompt:
        for prompt in data.prompt:
            yield encoder.encode_prompt([{"role": "user", "content": prompt}]), {}
        return
    rows = run.train if run.valid is None else run.valid
    for index in range(min(data.sample_answers, len(rows))):
        example = rows.example(index)
        if example is not None:
            yield example[0], {"data": example[1]}
