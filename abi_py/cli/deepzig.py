"""`abi-train deepzig`: from conversations to a small conversational model in a folder, in one command."""

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import ConfigError, counted, on_one_line
from ..locks import DirectoryLock, check_unlocked
from ..pipelines.deepzig_config import SHOWN, DeepZigConfig
from ..runs.resolve import prepare
from .console import make_console, printable, say, show_table
from .describe import describe_machine, describe_model, report_rows
from .options import Verb, config_options, given_values
from .training import fit_and_show

if TYPE_CHECKING:
    from rich.console import Console

    from ..model import TrainableModel
    from ..pipelines.deepzig_run import DeepZigRun
    from ..training.report import EvalResult

QUESTIONS = ("What is Zig?", "What's the weather like in Tokyo?", "Write the Fibonacci sequence in Python.")
SAMPLES, SAMPLE_TOKENS = 3, 200


@click.command(
    cls=Verb,
    example="abi-train deepzig",
    short_help="Train a small conversational model; needs no arguments.",
)
@click.option("--resume", is_flag=True, help="go on with the interrupted run in --output-dir, as it was begun")
@click.pass_context
def command(ctx: click.Context, resume: bool, **_: Any) -> None:
    """Train a conversational model on questions and answers, and write it as a folder for chat.

    Without arguments: the test preset on the conversations that come with the package, a minute or two. Then:
    abi-train chat deepzig-test-model
    """
    from ..pipelines.deepzig import check_free, is_finished, load_run_config
    from ..pipelines.deepzig_run import DeepZigRun

    given = given_values(ctx).get("deepzig", {})
    if resume:
        if set(given) != {"output_dir"}:
            raise ConfigError("resume takes --output-dir and nothing else: the settings are those of the run")
        check_unlocked(given["output_dir"], "output_dir")
        config = load_run_config(Path(given["output_dir"]))
        if is_finished(Path(given["output_dir"])):
            folder = shlex.quote(given["output_dir"])
            chat, further = f"abi-train chat {folder}", f"abi-train deepzig --base {folder} --output-dir NEW"
            text = f"{folder} holds its model; nothing is left to do; talk with it: {chat}; train it further: {further}"
            say(make_console(), "finished", text)
            return
    else:
        config = DeepZigConfig.from_dict(given, given)
    run = DeepZigRun.prepare(config)
    with DirectoryLock(run.directory, "output_dir"):
        check_free(run.directory, resume)
        prepare(run.training)
        ctx.exit(start(run, make_console(), resume))


config_options({"deepzig": DeepZigConfig}, {"deepzig": SHOWN})(command)


def start(run: "DeepZigRun", console: "Console", resume: bool) -> int:
    """Train, write the folder, show three answers; return the exit code."""
    from ..model import LoraModel
    from ..pipelines.deepzig import CHECKPOINTS, finish
    from ..training.checkpoint import list_checkpoints

    say(console, "machine", describe_machine(run.config.precision))
    say(console, "model", describe_model(run.shape))
    for label, text in describe_data(run):
        say(console, label, text)
    config, steps = run.training, run.steps_per_epoch * run.training.epochs
    length = f"{counted(config.epochs, 'epoch')}, {counted(steps, 'step')} of {per_step(run)}"
    say(console, "plan", f"{length}; model in {run.directory}")
    trainer = run.make_trainer()
    if isinstance(trainer.model, LoraModel):
        say(console, "lora", trainer.model.report())
        if run.config.base is None:
            say(console, "note", "the frozen weights are random, so adapters can do little; --base names trained ones")
    if resume and list_checkpoints(run.directory / CHECKPOINTS):
        trainer.load_checkpoint(run.directory)
    elif resume:
        say(console, "note", f"{run.directory} ended before its first checkpoint; it begins again")
    report, code = fit_and_show(trainer, run.directory, run.train, run.valid, console)
    folder = shlex.quote(str(run.directory))
    if report.interrupted:
        show_table(console, "Report", report_rows(trainer, report))
        go_on = f"abi-train deepzig --resume --output-dir {folder}"
        say(console, "stopped", f"{counted(report.total_steps, 'step')} done; go on with: {go_on}")
        return code
    model, results = finish(run, trainer, report)
    show_table(console, "Report", [*report_rows(trainer, report), *evaluation_rows(run, results)])
    if trainer.state.best_step not in (-1, trainer.state.global_step):
        say(console, "best", f"the weights of step {trainer.state.best_step} are taken")
    show_answers(run, model, console)
    say(console, "saved", f"{run.directory}")
    say(console, "go on", f"abi-train chat {folder}")
    return code


def per_step(run: "DeepZigRun") -> str:
    """Return how many conversations a step has."""
    return f"{run.training.batch_size * run.training.grad_accum_steps} conversations"


def describe_data(run: "DeepZigRun") -> list[tuple[str, str]]:
    """Return the lines about conversations and tokens."""
    sources = ", ".join(f"{Path(name).name} ({rows:,})" for name, rows in run.selection.sources.items())
    tokens = f"{len(run.train):,} conversations, {run.train.num_tokens:,} tokens, {run.train.num_targets:,} trained"
    kept = " and ".join(f"{len(part):,} of {PARTS[name]}" for name, part in run.parts.items())
    kept = f"for evaluation {kept}" if kept else "none for evaluation"
    lines = [("data", f"{sources}: {tokens}; {kept}")]
    notes = run.train.stats.notes()
    if run.selection.cut:
        notes.append(f"{run.selection.cut:,} beyond max_samples")
    if notes:
        lines.append(("note", "; ".join(notes)))
    return lines


# What an evaluation part shows, in the words of the table.
PARTS = {"told": "answers told, asked anew", "new": "answers never told"}


def evaluation_rows(run: "DeepZigRun", results: "Mapping[str, EvalResult]") -> Iterator[tuple[str, str]]:
    """Yield the lines about each evaluation part, on the weights that are exported."""
    for name, result in results.items():
        yield PARTS[name], f"{len(run.parts[name]):,} conversations"
        yield "  loss, perplexity", f"{result.loss:.4f}, {result.perplexity:.2f}"
        yield "  accuracy", f"{100 * result.accuracy:.1f}%"


def show_answers(run: "DeepZigRun", model: "TrainableModel", console: "Console") -> None:
    """Print what the model answers to three questions, with the settings of its folder."""
    from ..generation import GenerationConfig, Generator

    encoder = run.template.encoder(run.tokenizer)
    settings = GenerationConfig.load(run.directory).replace(max_new_tokens=SAMPLE_TOKENS)
    generator = Generator(model, run.tokenizer)
    for messages in questions(run):
        (result,) = generator.run([encoder.encode_prompt(messages)], settings)
        say(console, "asked", on_one_line(printable(messages[-1]["content"]), 100))
        for line in printable(result.text or "").splitlines() or [""]:
            console.print(f"    {line}", soft_wrap=True)


def questions(run: "DeepZigRun") -> list[list[dict[str, Any]]]:
    """Return three beginnings of conversations: fixed ones for the package's own data, else from those kept back."""
    if run.config.on_shipped_data:
        return [[{"role": "user", "content": question}] for question in QUESTIONS]
    found: list[list[dict[str, Any]]] = []
    for row in [*run.held_out.kept, *run.selection.conversations]:
        turns = row.to_dicts()
        asked = next((i for i, turn in enumerate(turns) if turn["role"] == "user"), None)
        if asked is not None and len(found) < SAMPLES:
            found.append(turns[: asked + 1])
    return found
