"""`abi-train compare`: what runs differ in, what came of them, and their curves in one picture."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import ConfigError
from ..training.report import plain
from .columns import clock, count, figure, show_columns
from .console import make_console, printable, say, utf8_output
from .options import FieldOption, OutputPath, PathType, Verb
from .run import command as run_verb

if TYPE_CHECKING:
    from ..runs.comparing import Comparison
    from ..runs.recorded import Evaluation, RecordedRun

AXES = ("step", "tokens", "seconds")


@click.command(
    cls=Verb,
    example="abi-train compare runs/* --plot curves.svg",
    short_help="Compare runs: settings, results, curves.",
)
@click.argument("paths", metavar="RUN...", nargs=-1, required=True, type=PathType(path_type=Path, exists=True))
@click.option("--plot", type=OutputPath(path_type=Path, dir_okay=False), help="draw the curves: a .svg or .png file")
@click.option("--by", type=click.Choice(AXES), help="what the curves are drawn over, with --plot  [step]")
@click.option("--json", "as_json", is_flag=True, help="machine-readable")
def command(paths: tuple[Path, ...], plot: Path | None, by: str | None, as_json: bool) -> None:
    """Compare runs, finished or not: the settings that differ, size, loss, speed and time, a row for each run.

    Losses are of a token, so they compare only where vocabulary and validation data are the same; what else there is
    to know is said below the table. The picture has the training loss, smoothed, the validation loss, and the
    learning rate.
    """
    from ..runs.comparing import Comparison
    from ..runs.curves import check_plot, draw

    if by is not None and plot is None:
        raise ConfigError(f"by ({by}) has an effect only with --plot FILE; add it, or leave --by out")
    if plot is not None:
        check_plot(plot)
    compared = Comparison(paths)
    utf8_output()
    if as_json:
        click.echo(json.dumps(plain(to_dict(compared)), indent=2, ensure_ascii=False))
    else:
        show(compared)
    if plot is not None:
        panels, axis = compared.panels(by or "step")
        draw(plot, panels, axis)
        if not as_json:
            say(make_console(), "plot", str(plot))


def show(compared: "Comparison") -> None:
    """Print the tables, and what there is to know."""
    from ..runs.comparing import count_parameters

    console, runs = make_console(), compared.runs
    names = [printable(name) for name in compared.names]

    def of(name: str, digits: int, which: str = "best") -> list[str]:
        return [figure(getattr(getattr(run, which), name, None), digits) for run in runs]

    columns = {
        "run": names,
        "state": [run.state for run in runs],
        "parameters": [count(count_parameters(run)) for run in runs],
        "steps": [f"{run.step:,}" for run in runs],
        "tokens": [count(run.tokens) for run in runs],
        "best loss": of("loss", 4),
        "at step": of("step", 0),
        "last loss": of("loss", 4, "last"),
        "perplexity": of("perplexity", 2),
        "bits/byte": of("bits_per_byte", 4),
        "tokens/s": [figure(run.tokens_per_second, 0) for run in runs],
        "time": [clock(run.seconds) for run in runs],
    }
    show_columns(console, "", {name: cells for name, cells in columns.items() if any(cells)})
    differing = compared.differing()
    if differing:
        flags = {
            (param.section, param.field): param.opts[-1] for param in run_verb.params if isinstance(param, FieldOption)
        }
        shown = {flags[key]: setting_texts(values) for key, values in differing.items()}
        show_columns(console, "Settings that differ", {"run": names, **shown})
    console.print()
    if len(runs) > 1 and not differing and not any(run.problem for run in runs):
        say(console, "note", "the runs have the same settings")
    winner = compared.winner()
    if winner is not None:
        name, measure, value, step = winner
        say(console, "best", f"{printable(name)}: {measure} {value:.4f} at step {step:,}")
    for text in compared.notes():
        say(console, "note", printable(text))


def setting_texts(values: list[Any]) -> list[str]:
    """Return the values of a setting as they are shown; of paths only what differs in them."""
    texts = [_text(value) for value in values]
    if all(os.path.isabs(text) for text in texts if text != "-"):
        short = [os.path.basename(text) for text in texts]
        if len(set(short)) == len(set(texts)):
            return short
    return texts


def _text(value: Any) -> str:
    if value is None or value == () or value == []:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    return printable(" ".join(str(value).split()))


def to_dict(compared: "Comparison") -> dict[str, Any]:
    """Return the comparison for programs: null is what is not known, or was not finite."""
    differing = compared.differing()
    winner = compared.winner()
    return {
        "runs": [
            {
                "name": name,
                **facts_of(run),
                "settings": {f"{section}.{field}": values[index] for (section, field), values in differing.items()},
            }
            for index, (name, run) in enumerate(zip(compared.names, compared.runs))
        ],
        "comparable_by_loss": not compared.obstacles(),
        "best": None if winner is None else winner[0],
        "notes": compared.notes(),
    }


def facts_of(run: "RecordedRun") -> dict[str, Any]:
    """Return the figures of one run for programs."""
    from ..runs.comparing import count_parameters

    return {
        "path": str(run.path),
        "state": run.state,
        "parameters": count_parameters(run),
        "steps": run.step,
        "total_steps": run.start.get("total_steps"),
        "tokens": run.tokens,
        "seconds": run.seconds,
        "tokens_per_second": run.tokens_per_second,
        "training_loss": run.steps[-1].get("loss") if run.steps else None,
        "best": evaluation_dict(run.best),
        "last": evaluation_dict(run.last),
    }


def evaluation_dict(found: "Evaluation | None") -> dict[str, Any] | None:
    """Return an evaluation for programs."""
    if found is None:
        return None
    names = ("step", "loss", "perplexity", "bits_per_byte")
    return {name: getattr(found, name) for name in names}
