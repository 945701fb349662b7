"""`abi-train runs`: the runs in a directory, newest first."""

import json
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import ConfigError
from .columns import age, count, figure, show_columns
from .console import make_console, printable, say, utf8_output
from .inspect import size_text
from .options import PathType, Verb

if TYPE_CHECKING:
    from ..runs.recorded import RecordedRun

USUAL = Path("runs")  # where `abi-train run` makes its directories


@click.command(cls=Verb, example="abi-train runs", short_help="List the runs of a directory.")
@click.argument("directory", metavar="[DIRECTORY]", required=False, type=PathType(path_type=Path, file_okay=False))
@click.option("--json", "as_json", is_flag=True, help="machine-readable")
def command(directory: Path | None, as_json: bool) -> None:
    """List the runs in DIRECTORY (runs/ when not given) and in its directories, newest first.

    A run is finished, interrupted (everything is saved), running, or failed (it was killed, or ended with an error);
    abi-train resume RUN goes on with those that are neither finished nor running. The age is that of the last line
    written. Loss is the best on the validation data; abi-train compare says more.
    """
    from ..runs.recorded import find_runs, read_run, size_on_disk

    place = USUAL if directory is None else directory
    if directory is not None and not place.exists():
        raise ConfigError(f"DIRECTORY ({place}) must be there; it is not")
    found = [read_run(path, brief=True) for path in find_runs(place)] if place.exists() else []
    found.sort(key=lambda run: run.written, reverse=True)
    utf8_output()
    if as_json:
        click.echo(json.dumps([{**facts(run, place), "bytes": size_on_disk(run.path)} for run in found], indent=2))
        return
    console = make_console()
    if not found:
        begin = "abi-train run" if directory is None else f"abi-train run --out {shlex.quote(str(place / 'NAME'))}"
        say(console, "none", f"there is no run in {place}/ yet; begin one: {begin}")
        return
    now = time.time()
    rows = [facts(run, place) for run in found]
    total = [run.start.get("total_steps") for run in found]
    columns = {
        "run": [printable(row["name"]) for row in rows],
        "state": [row["state"] for row in rows],
        "age": [age(now - run.written) for run in found],
        "model": [_model(row) for row in rows],
        "data": [printable(row["data"]) for row in rows],
        "steps": [f"{row['steps']:,}" + (f"/{all_:,}" if all_ else "") for row, all_ in zip(rows, total)],
        "loss": [figure(row["best_loss"], 4) for row in rows],
        "size": [size_text(size_on_disk(run.path)) for run in found],
    }
    show_columns(console, "", columns)


def facts(run: "RecordedRun", place: Path) -> dict[str, Any]:
    """Return what is told of a run, as plain values."""
    name = run.name if run.path == place else str(run.path.relative_to(place))
    paths = run.setting("data", "path") or ()
    data = ", ".join(Path(path).name for path in paths) or ("standard library" if run.settings else "")
    return {
        "name": name,
        "path": str(run.path),
        "state": run.state,
        "written": run.written,
        "family": run.setting("model", "family"),
        "parameters": run.num_params,
        "data": data,
        "steps": run.step,
        "best_loss": None if run.best is None else run.best.loss,
    }


def _model(row: dict[str, Any]) -> str:
    return " ".join(filter(None, (row["family"], count(row["parameters"]))))
