"""`abi-train phases`: a chain of runs by a recipe: base, fine-tuning, adapters, GGUF files."""

import contextlib
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import counted
from .console import make_console, say, show_table
from .options import OutputPath, Verb
from .plan import duration, megabytes
from .stopping import stopping_cleanly
from .training import show_head, start, train

if TYPE_CHECKING:
    from rich.console import Console

    from ..pipelines.chain import Chain
    from ..pipelines.phase_plan import Planned
    from ..pipelines.phase_record import Record
    from ..pipelines.recipe import Phase
    from ..runs.run import Run

OUT = "models"


@click.command(
    cls=Verb,
    example="abi-train phases",
    short_help="Do a chain of runs by a recipe; needs no arguments.",
)
@click.argument("recipe", required=False)
@click.option(
    "-o", "--out", type=OutputPath(path_type=Path, file_okay=False), help=f"where to write; a directory  [{OUT}]"
)
@click.option("--only", metavar="PHASE", help="do this phase alone; what it starts from must be done")
@click.option("--dry-run", is_flag=True, help="show the plan (memory, steps, time) and stop; nothing is written")
@click.pass_context
def command(ctx: click.Context, recipe: str | None, out: Path | None, only: str | None, dry_run: bool) -> None:
    """Do the phases of RECIPE, a YAML file: each is a run, and starts from what another one leaves.

    Without RECIPE: tiny, the CSDL chain of the package (a base, a fine-tuned model, three adapters on it, a table of
    GGUF files), in a few minutes. The plan comes first. What was stopped or killed goes on by the same command: phases
    that are done are left as they are.
    """
    from ..pipelines.chain import Chain
    from ..pipelines.phase_plan import check_disk, disk, plan_phases
    from ..pipelines.recipe import Recipe, place_of_recipe

    console = make_console()
    chain = Chain(Recipe.read(place_of_recipe(recipe)), out or Path(OUT))
    phases = chain.recipe.phases if only is None else (chain.recipe.phase(only),)
    plans = plan_phases(chain, phases)
    say(console, "recipe", f"{recipe or 'tiny'}: {counted(len(phases), 'phase')} in {chain.out}")
    _show_plan(plans, disk(chain, plans), console)
    if dry_run:
        say(console, "dry run", "nothing was written")
        return
    check_disk(chain, plans)
    words = [*([recipe] if recipe else []), *(["-o", str(out)] if out else []), *(["--only", only] if only else [])]
    again = " ".join(["abi-train phases", *map(shlex.quote, words)])
    for number, phase in enumerate(phases, 1):
        say(console, "phase", f"{number}/{len(phases)}: {phase.name}")
        try:
            code = _do(chain, phase, again, console)
        except KeyboardInterrupt:  # what else there is than training, which ends after its step; or a second one
            say(console, "stopped", f"go on with: {again}")
            code = 130
        if code:
            ctx.exit(code)
    say(console, "done", f"all is in {chain.out}" if only is None else f"it is in {chain.folder(phases[0])}")


def _do(chain: "Chain", phase: "Phase", again: str, console: "Console") -> int:
    """Do a phase, as `run` does it; return the exit code."""
    was_done = chain.done(phase) is not None

    def train_run(run: "Run", checkpoint: Path | None) -> int:
        if checkpoint is None:
            return start(run, console, again)
        show_head(run, console)
        trainer = run.make_trainer(checkpoint)
        run.write_config()
        return train(trainer, run, console, again)

    def tell(label: str, text: str) -> None:
        say(console, label, text)

    with contextlib.nullcontext() if phase.trains else stopping_cleanly():
        record, code = chain.do(phase, train_run, tell)
    if record is None:
        return code
    if was_done:
        say(console, "there", ", ".join(f"{chain.folder(phase) / name}" for name in record.outputs))
    if not phase.trains:
        figures = record.figures
        if "perplexity" in figures:
            text = f"on {figures['on']}, where the model itself has perplexity {figures['perplexity']:.4f}"
            say(console, "measured", text)
        show_table(console, "GGUF files", *_table(record))
    return 0


def _show_plan(plans: "Sequence[Planned]", disk: tuple[int, int], console: "Console") -> None:
    """Print what the phases will need, and the rows of each category."""
    from ..data.selection import percentages
    from ..runs.plan import available_memory

    for plan in plans:
        for line in _lines(plan):
            console.print(line, soft_wrap=True)
    for plan in plans:
        if len(plan.categories) > 1:
            shares = percentages(list(plan.categories.values()))
            rows = [(name, f"{count:,}", f"{share}%") for (name, count), share in zip(plan.categories.items(), shares)]
            rows.append(("together", f"{sum(plan.categories.values()):,}", "100.0%"))
            show_table(console, f"Rows of {plan.phase.name}", rows, ("category", "rows", "share"))
    seconds, most = sum(plan.seconds for plan in plans), max(plan.memory for plan in plans)
    measured = any(plan.measured for plan in plans)
    rate = "at the rate of a phase that is done" if measured else "at half of the peak that was measured here"
    if seconds:
        say(console, "time", f"about {duration(seconds)}, {rate}; compiling and answers come on top")
    free = available_memory()
    if most:
        say(console, "memory", f"{megabytes(most)} at the most" + (f", {megabytes(free)} are free" if free else ""))
    if free is not None and most > free:
        say(console, "warning", "it does not fit; a smaller batch_size or max_seq_len, or checkpointing: full, helps")
    needed, room = disk
    say(console, "disk", f"{megabytes(needed)} at the most, {megabytes(room)} are free")
    if needed > room:
        say(console, "warning", "the disk will not do, and no phase is begun before it does; --out takes another one")


def _lines(plan: "Planned") -> Iterator[str]:
    """Yield the lines about a phase: what it is, what it needs."""
    phase = plan.phase
    begin = phase.config.after or ("its base" if phase.settings.get("base", {}).get("path") else "random weights")
    state = "; it is done" if plan.record is not None else "; it is begun, and goes on" if plan.begun else ""
    leaves = [name for name in (phase.config.leaves_model, phase.config.leaves_adapter) if name is not None]
    what = ", ".join(phase.config.quantize or leaves)
    yield f"{phase.name}: from {begin} to {what}{state}"
    if phase.trains:
        said = "" if plan.counted else ", as the recipe says"
        yield f"    {counted(plan.rows, 'row')} and {plan.kept:,} for validation{said}; {counted(plan.steps, 'step')}"
    if plan.record is None:
        trained = f"{plan.trained:,} weights trained, about {duration(plan.seconds)}, " if phase.trains else ""
        yield f"    {trained}{megabytes(plan.memory)} of memory, {megabytes(plan.disk)} on the disk"


def _table(record: "Record") -> tuple[list[tuple[str, ...]], tuple[str, ...]]:
    """Return rows and columns of a phase's GGUF files."""
    figures: dict[str, Any] = dict(record.figures)
    columns, rows = ["type", "size", "bits a weight"], []
    for kind, row in figures["types"].items():
        cells = [kind, megabytes(row["bytes"]), f"{row['bits_per_weight']:.2f}"]
        cells += [f"{row['perplexity']:.4f}", f"{100 * row['change']:+.2f}%"] if "perplexity" in row else []
        rows.append(tuple(cells))
    columns += ["perplexity", "change"] if "perplexity" in figures else []
    return rows, tuple(columns)
