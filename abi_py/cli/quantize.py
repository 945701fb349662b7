"""`abi-train quantize`: a model as a GGUF file of fewer bits."""

import contextlib
import dataclasses
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import ConfigError, counted
from .compiling import compiling_told
from .console import make_console, note, say, show_table, stderr_console
from .export import lost_text, near_text
from .models import ModelPath, set_threads, threads_option, which_options
from .options import DataPath, OutputPath, PathType, Verb
from .progress import bytes_progress
from .stopping import stopping_cleanly

if TYPE_CHECKING:
    from ..formats.gguf.writing import PlannedTensor
    from ..runs.quantizing import Change, FileSource, ModelSource, Prediction, Quantized

COLUMNS = ("type", "size", "bits a weight")
MEASURED = ("perplexity", "change", "KL, nats", "largest logit difference")


@click.command(
    cls=Verb,
    example="abi-train quantize model-F16.gguf model-Q4_K_M.gguf Q4_K_M",
    short_help="Write a model as a GGUF file of fewer bits a weight.",
)
@click.argument("model", type=ModelPath())
@click.argument("output", required=False, type=OutputPath(path_type=Path), metavar="[OUT]")
@click.argument("kind", required=False, metavar="[TYPE]")
@click.option("--table", is_flag=True, help="show size and bits a weight of the usual types; written if OUT is given")
@click.option("--imatrix", type=PathType(path_type=Path, exists=True), help="importance of columns, of llama-imatrix")
@click.option("--perplexity", "text", type=DataPath(path_type=Path, exists=True), help="text to measure its change on")
@click.option("--max-shard-size", help="largest file of weights, as in 500MB; above it several  [one file]")
@click.option("--no-check", is_flag=True, help="do not read again what was written, nor compare logits")
@which_options
@click.option("--force", is_flag=True, help="replace what is there")
@click.option("--json", "as_json", is_flag=True, help="machine-readable")
@threads_option
def command(
    model: Path,
    output: Path | None,
    kind: str | None,
    table: bool,
    imatrix: Path | None,
    text: Path | None,
    max_shard_size: str | None,
    no_check: bool,
    which: str | None,
    force: bool,
    as_json: bool,
    threads: int | None,
) -> None:
    """Write MODEL, a GGUF file, a folder, a run or a checkpoint, as the GGUF file OUT of TYPE: F16, Q8_0, Q6_K, Q5_K_M,
    Q4_K_M, Q4_K_S and others.

    Metadata and tokenizer come along. What was written is read again: every number must be as near as its type keeps
    it, and the logits of some tokens as near as that explains. With --table, OUT is a directory.
    """
    from ..formats.gguf.importance import read_importance
    from ..formats.gguf.quantising import file_type
    from ..runs.quantizing import TABLE, open_source

    if table and kind is not None:
        raise ConfigError(f"TYPE ({kind}) has no effect with --table, which has {', '.join(TABLE)}; leave it out")
    if not table and (output is None or kind is None):
        raise ConfigError("OUT and TYPE must be given, as in small.gguf Q4_K_M; or --table, which compares types")
    set_threads(threads)
    types = [file_type(each) for each in (TABLE if table else [kind or ""])]
    importance = None if imatrix is None else read_importance(imatrix)
    source = open_source(model, which)
    settings = {"importance": importance, "max_shard_size": max_shard_size, "check": not no_check, "force": force}
    verb = _Verb(source, as_json, settings)
    predictions = [source.predict(each, importance) for each in types]
    with stopping_cleanly(), compiling_told(note):
        if table:
            verb.table(predictions, output, text)
        elif output is not None:
            verb.one(predictions[0], output, text)


class _Verb:
    """A call of the verb and its output: lines, and what --json has."""

    def __init__(self, source: "FileSource | ModelSource", as_json: bool, settings: dict[str, Any]) -> None:
        self.source, self.as_json, self.settings = source, as_json, settings
        self.console = make_console()
        self.console.quiet = as_json
        self.facts: dict[str, Any] = {"model": str(source.path), **self._introduce()}

    def _introduce(self) -> dict[str, Any]:
        from .inspect import size_text

        family, numbers, kinds = self.source.described()
        size = sum(path.stat().st_size for path in self.source.files)
        now = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        more = f", {size_text(size)} ({now})" if kinds else ""
        say(self.console, "model", f"{self.source.path}: {family}, {numbers:,} weights{more}")
        facts: dict[str, Any] = {"architecture": family, "weights": numbers}
        facts |= {"model_bytes": size, "tensors": kinds} if kinds else {}
        importance = self.settings["importance"]
        if importance is not None:
            count = len(importance.columns)
            say(self.console, "imatrix", f"{importance.path}: how much each column counts, of {count} tensors")
            facts["imatrix"] = str(importance.path)
        return facts

    def one(self, prediction: "Prediction", output: Path, text: Path | None) -> None:
        """Write one file."""
        from ..runs.quantizing import OnText, check_output
        from .inspect import size_text

        check_output(self.source, output, self.settings["force"])
        size, bits = size_text(prediction.nbytes), prediction.bits_per_weight
        say(self.console, "type", f"{prediction.type.name}: tensors of {size}, {bits:.2f} bits a weight")
        self._warn([prediction])
        on_text = None if text is None else OnText(self.source, text)
        began = time.perf_counter()
        done = self._write(prediction, output)
        seconds = time.perf_counter() - began
        names = ", ".join(map(str, done.written.files))
        say(self.console, "wrote", f"{names}: {size_text(done.size)} in {seconds:.1f} s")
        facts = {**_predicted(prediction), "files": [str(path) for path in done.written.files], "bytes": done.size}
        facts |= {"seconds": round(seconds, 3), **self._checked(done)}
        if on_text is not None:
            change = on_text.change(done.written.files[0])
            told = f"{change.before:.4f} -> {change.perplexity:.4f} ({change.percent:+.2f}%)"
            say(self.console, "text", f"{text}: perplexity {told}, KL {change.agreement.kl:.2g}")
            facts |= _measured(change)
        if self.as_json:
            click.echo(json.dumps({**self.facts, **facts}))

    def table(self, predictions: list["Prediction"], output: Path | None, text: Path | None) -> None:
        """Show all types; write them to a directory, or where a text is to be measured, for a moment."""
        from ..runs.quantizing import OnText, check_output
        from .inspect import size_text

        if output is not None and output.exists() and not output.is_dir():
            raise ConfigError(f"out ({output}) must be a directory with --table, and is a file; choose another name")
        self._warn(predictions)
        with contextlib.ExitStack() as stack:
            place = output
            if place is None and text is not None:
                place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="abi-quantize-")))
            stem = self.source.path.name.removesuffix(".gguf")
            paths = [None if place is None else place / f"{stem}-{each.type.name}.gguf" for each in predictions]
            for path in paths:
                if path is not None:
                    check_output(self.source, path, self.settings["force"])
            on_text = None if text is None else OnText(self.source, text)
            rows, found = [], []
            for prediction, path in zip(predictions, paths, strict=True):
                facts = _predicted(prediction)
                row = [prediction.type.name, size_text(prediction.nbytes), f"{prediction.bits_per_weight:.2f}"]
                if path is not None:
                    done = self._write(prediction, path)
                    facts["bytes"] = done.size
                    facts |= {} if output is None else {"files": [str(each) for each in done.written.files]}
                    if on_text is not None:
                        change = on_text.change(done.written.files[0])
                        row += [f"{change.perplexity:.4f}", f"{change.percent:+.2f}%"]
                        row += [f"{change.agreement.kl:.2g}", f"{change.agreement.largest:.2g}"]
                        facts |= _measured(change)
                    if output is None:
                        for each in done.written.files:
                            each.unlink()
                rows.append(tuple(row))
                found.append(facts)
        if self.as_json:
            before = {} if on_text is None else {"perplexity": on_text.before}
            click.echo(json.dumps({**self.facts, **before, "types": found}))
            return
        columns = COLUMNS if on_text is None else (*COLUMNS, *MEASURED)
        title = "" if on_text is None else f"on {text}, where the model has perplexity {on_text.before:.4f}"
        show_table(self.console, title, rows, columns)
        if output is not None:
            say(self.console, "wrote", f"{output}: {counted(len(rows), 'file')}, {stem}-TYPE.gguf")

    def _warn(self, predictions: list["Prediction"]) -> None:
        """Tell that tensors are quantised for a second time, or that an importance changes nothing."""
        kinds = " and ".join(sorted({kind for each in predictions for kind in each.requantised}))
        if kinds:
            note(
                f"warning: tensors of {kinds} are quantised again and keep the errors that they have; better take the "
                "F16 or BF16 file that they were made from"
            )
        unheeded = [each.type.name for each in predictions if not each.is_weighted]
        if unheeded and self.settings["importance"] is not None:
            note(f"note: nothing in {', '.join(unheeded)} depends on an importance: --imatrix changes nothing there")

    def _write(self, prediction: "Prediction", output: Path) -> "Quantized":
        from ..runs.quantizing import quantize

        with bytes_progress(stderr_console(), prediction.type.name, prediction.nbytes) as show:
            return quantize(self.source, output, prediction.type, progress=_Count(show), **self.settings)

    def _checked(self, done: "Quantized") -> dict[str, Any]:
        """Tell what the check has found."""
        if done.written.losses is None:
            return {"checked": False}
        errors, found = done.written.by_type(), done.agreement
        count = len(done.written.losses)
        say(self.console, "checked", f"{count} tensors, read again; the most that one lost: {lost_text(errors)}")
        if found is None:
            say(self.console, "logits", f"not compared: {done.reason}")
            return {"checked": True, "errors": errors, "logits": None}
        say(self.console, "logits", near_text(found))
        return {"checked": True, "errors": errors, "logits": dataclasses.asdict(found)}


def _predicted(found: "Prediction") -> dict[str, Any]:
    return {"type": found.type.name, "predicted": found.nbytes, "bits_per_weight": found.bits_per_weight}


def _measured(change: "Change") -> dict[str, Any]:
    return {
        "perplexity": change.perplexity,
        "perplexity_of_model": change.before,
        "kl": change.agreement.kl,
        "largest_logit_difference": change.agreement.largest,
    }


class _Count:
    """Shows how many bytes were written."""

    def __init__(self, show: Callable[[int, str], None]) -> None:
        self.show, self.done = show, 0

    def __call__(self, tensor: "PlannedTensor", content: memoryview) -> None:
        self.done += len(content)
        self.show(self.done, tensor.name)
