"""A chain of runs: what a recipe says (`recipe.py`), done in a directory, from wherever it is.

    OUT/PHASE/phase.json    what the phase was begun with, and once it is done what it has left (`phase_record.py`)
    OUT/PHASE/run/          its run, as `abi-train run` has them; a half-done phase goes on from its checkpoints
    OUT/PHASE/NAME/         what it leaves: the whole model, its adapters, or GGUF files and their table

A phase is a run like any other: resolved, trained and ended by `runs/`.  It is done if its record says so, and its
settings, its inputs and what it has left are what the record says, by SHA-256.  So a chain that was stopped or killed
at any moment ends, when it is called again, with the same bytes; and phases that start from the same model may be done
in any order.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from ..config import fields_of
from ..errors import CheckpointError, ConfigError, DataError, listed
from ..fields import plain
from ..files import atomic_text, sha256_of
from ..formats.checkpoint_names import CARD, ORIGIN, TRAINING_ARGS
from ..locks import DirectoryLock
from ..runs.base import Base
from ..runs.directory import CONFIG, EVALUATION, Leaves, has_checkpoint, hold, is_run
from ..runs.resolve import Given, prepare
from ..runs.resuming import Resumed, has_saved
from ..runs.run import Run
from ..runs.settings import BaseConfig, ChatConfig, DataConfig, absolute, read_run_config
from ..runs.shipped import place_of
from ..training.trainer_state import TRAINER_STATE
from ..untrusted import read_json
from .phase_record import Record
from .recipe import Phase, PhaseConfig, Recipe

if TYPE_CHECKING:
    from ..runs.quantizing import ModelSource, Quantized, Yardstick

__all__ = ["RUN", "Chain", "Tell", "TrainRun", "data_of", "table_text"]

# Trains a run to its end, from a checkpoint if there is one; 0, or the exit code with which it was stopped.
TrainRun: TypeAlias = Callable[[Run, Path | None], int]
Tell: TypeAlias = Callable[[str, str], None]  # is told a label and a line
RUN = "run"
TABLE = "table.md"
# What changes no bit of what is left, by section: it may change while a chain is under way.
NO_BITS: Mapping[str, tuple[str, ...]] = {
    "training": ("num_threads", "log_interval"),
    "data": ("check_json", "prompt", "sample_tokens", "sample_answers", "sample_prompts", "sample_length"),
}
PLACES: Mapping[str, tuple[str, ...]] = {"data": ("path", "valid_path", "tokenizer"), "chat": ("mix", "template")}
TOLD = (CARD, ORIGIN, TRAINING_ARGS, TRAINER_STATE)  # of a folder that is left: what tells of the run, with its times


class Chain:
    """A recipe in a directory."""

    def __init__(self, recipe: Recipe, out: Path) -> None:
        """Take them; nothing is read yet."""
        self.recipe, self.out = recipe, out
        self._verified: dict[str, Record] = {}

    def folder(self, phase: Phase) -> Path:
        """Return the folder of a phase."""
        return self.out / phase.name

    def model_of(self, phase: Phase) -> Path:
        """Return the folder of the whole model that a phase leaves."""
        return self.folder(phase) / (phase.config.leaves_model or "")

    def names(self, phase: Phase) -> list[str]:
        """Return the names of what a phase leaves in its folder."""
        if phase.trains:
            return [each for each in (phase.config.leaves_model, phase.config.leaves_adapter) if each is not None]
        return [*(self._gguf_name(kind) for kind in phase.config.quantize), TABLE]

    def _gguf_name(self, kind: str) -> str:
        from ..formats.gguf.quantising import file_type

        return f"{self.recipe.name}-{file_type(kind).name}.gguf"

    def before(self, phase: Phase) -> Phase | None:
        """Return the phase from whose model one starts, or None."""
        return None if phase.config.after is None else self.recipe.phase(phase.config.after)

    # -- what is there -------------------------------------------------------------------------

    def done(self, phase: Phase) -> Record | None:
        """Return the record of a phase that is done, None if something is left to do.

        ConfigError if it was begun with other settings or data, or its folder holds something else; CheckpointError if
        what it has left is not there, or is something else.
        """
        if phase.name in self._verified:
            return self._verified[phase.name]
        record, before = Record.read(self.folder(phase)), self.before(phase)
        if record is None:
            _check_empty(self.folder(phase))
            return None
        record.check_settings(self.folder(phase), self.settings(phase))  # before what it starts from is done anew
        if before is not None and self.done(before) is None:
            return None
        record.check_inputs(self.folder(phase), self.inputs(phase))
        if not record.done:
            return None
        record.check_done(self.folder(phase), self.names(phase), "total_steps" if phase.trains else "types")
        for name, digest in record.outputs.items():
            place = self.folder(phase) / name
            if not place.exists() or digest_of_output(place) != digest:
                raise CheckpointError(
                    f"{place} is not what phase {phase.name} has left there; put that back, or remove "
                    f"{self.folder(phase)} to do the phase again"
                )
        self._verified[phase.name] = record
        return record

    def is_begun(self, phase: Phase) -> bool:
        """Say whether something of a phase is there."""
        return Record.read(self.folder(phase)) is not None

    def settings(self, phase: Phase) -> dict[str, Any]:
        """Return what decides the result of a phase, as JSON would have it."""
        own = {each.name: plain(getattr(phase.config, each.name)) for each in fields_of(PhaseConfig)}
        found: dict[str, Any] = {"phase": {name: value for name, value in own.items() if name != "rows"}}
        if not phase.trains:
            found["recipe"] = {"name": self.recipe.name}  # what its files are called
        for section, values in phase.settings.items():
            free = NO_BITS.get(section, ())
            found[section] = {name: plain(value) for name, value in values.items() if name not in free}
        result: dict[str, Any] = json.loads(json.dumps(found))
        return result

    def inputs(self, phase: Phase) -> dict[str, str]:
        """Return the SHA-256 of all that a phase reads; OSError if it is not there."""
        before = self.before(phase)
        found = {}
        if before is not None:
            record = self.done(before)
            found["what it starts from"] = "" if record is None else record.outputs[before.config.leaves_model or ""]
        elif phase.settings.get("base", {}).get("path"):
            base = Base.open(BaseConfig.from_dict(phase.settings["base"]))
            found["its base"] = base.given.digest or ""
            found["the tokenizer and chat template of its base"] = _digest_of_companions(base)
        return found | {f"data ({path})": _digest_of_data(path) for path in data_of(phase)}

    # -- one phase -----------------------------------------------------------------------------

    def given(self, phase: Phase, base: Base | None = None) -> Given:
        """Return the settings of a phase's run, checked; `base` is what is still to come."""
        settings, before = dict(phase.settings), self.before(phase)
        if before is not None:
            settings["base"] = {"path": str(self.model_of(before))}
        with self.naming(phase):
            return Given({}, settings, base=base)

    @contextlib.contextmanager
    def naming(self, phase: Phase) -> Iterator[None]:
        """Let an error about settings or data name the recipe and the phase."""
        place = f"{self.recipe.path}: phase {phase.name}: "
        try:
            yield
        except ConfigError as error:
            raise ConfigError(place + str(error).removeprefix(place)) from None
        except DataError as error:
            raise DataError(place + str(error).removeprefix(place)) from None

    def do(self, phase: Phase, train: TrainRun, tell: Tell) -> tuple[Record | None, int]:
        """Bring a phase to its end; return its record, or None and the exit code if it was stopped.

        ConfigError if the phase that it starts from is not done, or another process works on this one.
        """
        before, folder = self.before(phase), self.folder(phase)
        if before is not None and self.done(before) is None:
            raise ConfigError(
                f"phase {phase.name} starts from what {before.name} leaves, and that is not done; first: "
                f"--only {before.name}"
            )
        with DirectoryLock(folder, "out"):
            record = self.done(phase)
            if record is not None:
                return record, 0
            record = Record.read(folder)
            if record is None:
                record = Record(self.settings(phase), self.inputs(phase))
                record.write(folder)
            if not phase.trains:
                return self._quantize(phase, record, tell), 0
            run, checkpoint = self._open(phase, tell)
            with hold(run.directory, run.config.training, "out"):
                code = train(run, checkpoint)
            if code:
                return None, code
            outputs = {name: digest_of_output(folder / name) for name in self.names(phase)}
            record = dataclasses.replace(record, outputs=outputs, figures=_figures(run), done=True)
            record.write(folder)
        self._verified[phase.name] = record
        return record, 0

    def _open(self, phase: Phase, tell: Tell) -> tuple[Run, Path | None]:
        """Return the run of a phase, begun or gone on with, and its checkpoint."""
        place, folder, config = self.folder(phase) / RUN, self.folder(phase), phase.config
        checkpoint = None
        with self.naming(phase):
            if is_run(place) and (has_checkpoint(place) or has_saved(place)):
                resumed = Resumed.find(place, self._changes(phase, place), functools.partial(tell, "note"))
                run, checkpoint = resumed.open(resumed.reschedule(None)), resumed.checkpoint
            else:  # one that ended before its first checkpoint begins anew
                given = self.given(phase)
                run = given.resolve(given.open_data(), place)
            rows = len(run.train) + run.num_kept
            if config.rows and rows != config.rows:
                raise ConfigError(f"rows ({config.rows}) must be {rows}, which the data give; correct data or rows")
            prepare(run.config.training)
        leaves = Leaves(
            None if config.leaves_model is None else folder / config.leaves_model,
            None if config.leaves_adapter is None else folder / config.leaves_adapter,
        )
        return dataclasses.replace(run, asked=leaves), checkpoint

    def _changes(self, phase: Phase, place: Path) -> dict[str, dict[str, Any]]:
        """Return what the half-done run in `place` is told anew: where files lie now, for the chain may have moved, and
        what changes no bits, where the recipe has something else.
        """
        recorded, before = read_run_config(place / CONFIG), self.before(phase)
        found: dict[str, dict[str, Any]] = {}
        for section in ("data", "chat", "training"):
            names = (*NO_BITS.get(section, ()), *PLACES.get(section, ()))
            then, values = recorded.get(section) or {}, phase.settings.get(section, {})
            now = {name: plain(value) for name, value in absolute(values).items() if name in names}
            changed = {name: value for name, value in now.items() if value != plain(then.get(name))}
            if changed:
                found[section] = changed
        base = str(self.model_of(before)) if before is not None else phase.settings.get("base", {}).get("path")
        if recorded.get("lora") and base is not None:  # other runs have all their weights in the checkpoint
            found["base"] = {"path": os.path.abspath(base)}
        return found

    # -- GGUF files ----------------------------------------------------------------------------

    def _quantize(self, phase: Phase, record: Record, tell: Tell) -> Record:
        """Write the GGUF files of a phase, those that are not there yet, and their table."""
        from ..formats.gguf.quantising import file_type
        from ..runs.quantizing import ModelSource, quantize

        folder, before = self.folder(phase), self.recipe.phase(phase.config.after or "")
        source = ModelSource(self.model_of(before))
        measure = self._yardstick(phase, before, source)
        rows, names = dict(record.figures.get("types") or {}), self.names(phase)
        outputs = {name: digest for name, digest in record.outputs.items() if name in names}
        figures: dict[str, Any] = {"types": rows}
        if measure is not None:
            figures |= {"on": measure.name, "perplexity": measure.before}
        for kind in map(file_type, phase.config.quantize):
            path = folder / self._gguf_name(kind.name)
            if kind.name in rows and path.is_file() and outputs.get(path.name) == digest_of_output(path):
                continue
            made = quantize(source, path, kind, force=True)
            rows[kind.name] = _row(source, path, made, measure)
            outputs[path.name] = digest_of_output(path)
            record = dataclasses.replace(record, outputs=outputs, figures=figures)
            record.write(folder)
            tell("wrote", f"{path}: {path.stat().st_size:,} bytes")
        ordered = {file_type(kind).name: rows[file_type(kind).name] for kind in phase.config.quantize}
        atomic_text(folder / TABLE, table_text({**figures, "types": ordered}))
        outputs[TABLE] = digest_of_output(folder / TABLE)
        record = dataclasses.replace(record, outputs=outputs, figures={**figures, "types": ordered}, done=True)
        record.write(folder)
        self._verified[phase.name] = record
        return record

    def _yardstick(self, phase: Phase, before: Phase, source: "ModelSource") -> "Yardstick | None":
        """Return what the files are measured on; None if there is nothing."""
        from ..data.chat_dataset import ChatDataset
        from ..runs.quantizing import OnKept, OnText

        if phase.config.perplexity is not None:
            return OnText(source, Path(phase.config.perplexity))
        kept = self.given(before).open_data().valid
        return OnKept(source.loaded, kept, before.name) if isinstance(kept, ChatDataset) else None


def _row(source: "ModelSource", path: Path, made: "Quantized", measure: "Yardstick | None") -> dict[str, Any]:
    from ..formats.gguf.quantising import file_type

    found = source.predict(file_type(path.stem.rpartition("-")[2]))
    row: dict[str, Any] = {"bytes": made.size, "bits_per_weight": found.bits_per_weight}
    if measure is not None:
        perplexity = measure.perplexity(path)
        row |= {"perplexity": perplexity, "change": perplexity / measure.before - 1}
    return row


def table_text(figures: Mapping[str, Any]) -> str:
    """Return the table of a phase's GGUF files as Markdown."""
    lines = ["| type | bytes | bits a weight | perplexity | change |", "|---|---:|---:|---:|---:|"]
    for kind, row in figures["types"].items():
        measured = f"{row['perplexity']:.4f} | {100 * row['change']:+.2f}%" if "perplexity" in row else "- | -"
        lines.append(f"| {kind} | {row['bytes']:,} | {row['bits_per_weight']:.2f} | {measured} |")
    text = "\n".join(lines) + "\n"
    if "perplexity" in figures:
        text += f"\nPerplexity on {figures['on']}, where the model itself has {figures['perplexity']:.4f}.\n"
    return text


def _check_empty(folder: Path) -> None:
    """Raise ConfigError if the folder of a phase that was never begun holds something, which it would replace; hidden
    files may be those of a process that was killed before it wrote the record."""
    names = sorted(path.name for path in folder.glob("*") if not path.name.startswith("."))
    if names:
        raise ConfigError(
            f"{folder} must be empty before its phase begins, and holds {listed(names, 3)}; move that away, or take "
            "another --out"
        )


# -- what decides a result -------------------------------------------------------------------------


def data_of(phase: Phase) -> list[str]:
    """Return the files and folders that the run of a phase reads, by the names of the recipe."""
    if not phase.trains:
        return [] if phase.config.perplexity is None else [phase.config.perplexity]
    data = DataConfig.from_dict(phase.settings.get("data", {}))
    chat = ChatConfig.from_dict(phase.settings.get("chat", {}))
    paths = [*data.path, *data.valid_path, *chat.mix]
    paths += [] if data.tokenizer is None else [data.tokenizer]
    return paths + ([chat.template] if chat.template is not None and os.path.isfile(chat.template) else [])


def _digest_of_data(path: str) -> str:
    from ..data.documents import expand

    place = Path(place_of(path))
    if not place.exists():
        raise ConfigError(f"data ({path}) must be a file or a directory that exists; check the path")
    if place.is_file():
        return sha256_of(place)[1]
    return _digest_of_files(place, [file.path for file in expand([place])])


def _digest_of_files(folder: Path, files: Iterable[Path]) -> str:
    """Return the SHA-256 of the names and hashes of files in a folder."""
    lines = [f"{path.relative_to(folder).as_posix()} {sha256_of(path)[1]}\n" for path in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _digest_of_companions(base: Base) -> str:
    """Return the SHA-256 of what a run takes from its base beside the weights: the files of tokenizer, chat template
    and generation, wherever they are."""
    from ..data.tokenizer import Tokenizer
    from ..model.stored import companions_at

    files = companions_at(base.place).files
    lines = [f"{name} {hashlib.sha256(files[name]).hexdigest()}\n" for name in sorted(files)]
    if base.tokenizer is not None:
        tokenizer = Tokenizer.load(base.tokenizer)
        lines.append(f"{tokenizer.hash} {tokenizer.chat_template}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def digest_of_output(place: Path) -> str:
    """Return the SHA-256 of what a phase has left: of a file, or of all files of a folder but those that tell of the
    run, and hidden ones, which are somebody else's."""
    if not place.is_dir():
        return sha256_of(place)[1]
    own = (path for path in sorted(place.rglob("*")) if path.is_file())
    return _digest_of_files(place, [path for path in own if path.name not in TOLD and not path.name.startswith(".")])


def _figures(run: Run) -> dict[str, Any]:
    """Return what is told of the end of a run: from its report.json and evaluation.json."""
    from ..runs.plan import flops_of_token
    from ..training.report import REPORT

    report = read_json(run.directory / REPORT)
    names = ("final_loss", "initial_val_loss", "best_val_loss", "total_steps", "total_tokens", "avg_throughput")
    found = {name: report.get(name) for name in names}
    found["flops"] = (report.get("avg_throughput") or 0) * flops_of_token(run.config)
    if (run.directory / EVALUATION).is_file():
        found |= {"json": read_json(run.directory / EVALUATION).get("json")}
    return {**found, "rows": len(run.train), "kept": run.num_kept}
