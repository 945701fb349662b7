"""Several runs side by side: which settings differ, whether their losses mean the same, and their curves."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..config import TrainableModelConfig
from ..errors import AbiError, ConfigError, listed
from ..fields import fields_of, plain
from .curves import Curve, Panel
from .recorded import RecordedRun, read_run
from .settings import RUN_SECTIONS

__all__ = ["AXES", "Comparison"]

AXES = {"step": "step", "tokens": "tokens", "seconds": "time"}  # what curves are drawn over -> its key in a record
AXIS_LABELS = {"step": "optimizer step", "tokens": "tokens of training", "seconds": "seconds, with evaluations"}
PLACES = (("training", "checkpoint_path"), ("training", "log_dir"), ("training", "wandb_run_name"))
# How validation data become rows, and, where they are cut from those that are trained on, what these are.
VALIDATION = {"data": ("valid_path",), "chat": ("template", "loss_on", "category", "match", "held_out")}
CUT = {
    "data": ("path", "valid_fraction", "corpus_bytes"),
    "chat": ("mix", "max_samples"),
    "training": ("seed",),  # of conversations: the last ones of a mixture
}
SMOOTHED = 50  # the training loss is a mean that forgets over this share of its points


class Comparison:
    """Runs that are compared, each under a name of its own, in the order in which they were given."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Read the runs; ConfigError for a path that is none, or is given twice."""
        seen: dict[Path, Path] = {}
        for path in paths:
            real = path.resolve()
            if real in seen:
                raise ConfigError(f"RUN ({path}) must be given once; {seen[real]} is the same run")
            seen[real] = path
        self.runs = [read_run(path) for path in paths]
        names = [run.name for run in self.runs]
        self.names = names if len(set(names)) == len(names) else [str(path) for path in paths]

    # -- settings --------------------------------------------------------------------------------

    def differing(self) -> dict[tuple[str, str], list[Any]]:
        """Return (section, field) -> the value of each run, of the settings in which they differ; places left out.

        A setting that a run's file does not have counts as its default: the file may be older than the setting.
        """
        known = {
            (section, option.name): plain(option.default) for section, cls in RUN_SECTIONS.items()
            for option in fields_of(cls)
        }  # fmt: skip
        read = [run for run in self.runs if run.settings]
        found = {}
        for key in known:
            values = [_effective(run, *key, known[key]) for run in read]
            if key not in PLACES and any(value != values[0] for value in values[1:]):
                of_run = dict(zip(map(id, read), values))
                found[key] = [of_run.get(id(run)) for run in self.runs]
        if ("base", "path") in found:
            found.pop(("base", "digest"), None)  # another base has another one
        if all(_follows(run) for run in read):
            found.pop(("training", "min_learning_rate"), None)
        return found

    # -- what may be compared --------------------------------------------------------------------

    def obstacles(self) -> list[str]:
        """Return what makes losses of these runs differ in meaning: "vocabulary", "validation data"; [] if nothing."""
        evaluated = [run for run in self.runs if run.last is not None and run.settings]
        vocabularies = {(run.setting("model", "vocab_size"), run.tokenizer_digest()) for run in evaluated}
        data = set(map(_validation, evaluated))
        counts = {run.last.tokens for run in evaluated if run.last is not None}
        found = ["vocabulary"] if len(vocabularies) > 1 else []
        if len(data) > 1 or (len(counts) > 1 and not found):
            found.append("validation data")
        return found

    def notes(self) -> list[str]:
        """Return what must be known to read the figures, a sentence each."""
        found = [f"{name}: {run.problem}" for name, run in zip(self.names, self.runs) if run.problem]
        obstacles = self.obstacles()
        if "validation data" in obstacles:
            what = " and ".join(obstacles)
            found.append(f"the runs differ in {what}: neither losses nor bits per byte say which predicts better; "
                         "measure each on one text: abi-train eval RUN --data FILE")  # fmt: skip
        elif obstacles:
            found.append("the runs differ in vocabulary: losses and perplexities are not comparable, bits per byte are")
        lacking = [name for name, run in zip(self.names, self.runs) if run.last is not None and not _has_bits(run)]
        if obstacles == ["vocabulary"] and lacking:
            found.append(f"bits per byte are not known of {listed(lacking, 4)}; abi-train eval measures them")
        return found

    def winner(self) -> tuple[str, str, float, int] | None:
        """Return name, measure, value and step of the run that predicts best; None where that cannot be said."""
        obstacles = self.obstacles()
        if "validation data" in obstacles or len(self.runs) < 2:
            return None
        measure = "bits_per_byte" if obstacles else "loss"
        ranked = []
        for name, run in zip(self.names, self.runs):
            value = None if run.best is None else getattr(run.best, measure)
            if value is not None and run.best is not None:
                ranked.append((value, name, run.best.step))
        if len(ranked) < 2 or (measure == "bits_per_byte" and len(ranked) < len(self.runs)):
            return None
        value, name, step = min(ranked)
        return name, "validation loss" if measure == "loss" else "bits per byte", value, step

    # -- curves ----------------------------------------------------------------------------------

    def panels(self, by: str) -> tuple[list[Panel], str]:
        """Return training loss, validation and learning rate of all runs, and the name of what they are drawn over.

        The training loss is smoothed, with its points faint behind it. Where losses mean different things, validation
        is in bits per byte, if all runs have them. ConfigError if no run has a step.
        """
        if not any(run.steps for run in self.runs):
            raise ConfigError("there is nothing to draw: no step of these runs has been logged; see --log-interval")
        key = AXES[by]
        training, rates, validation = list[Curve](), list[Curve](), list[Curve]()
        measure = "bits_per_byte" if self.obstacles() and all(map(_has_bits, self.runs)) else "loss"
        for number, (name, run) in enumerate(zip(self.names, self.runs)):
            x = [_number(record.get(key)) for record in run.steps]
            losses = [_number(record.get("loss")) for record in run.steps]
            training.append(Curve(name, x, losses, number, faint=True))
            training.append(Curve(name, x, list(smoothed(losses, len(losses) / SMOOTHED)), number))
            rates.append(Curve(name, x, [_number(record.get("learning_rate")) for record in run.steps], number))
            places = [_place(run, each.step, each.time, by) for each in run.evaluations]
            values = [_number(getattr(each, measure)) for each in run.evaluations]
            validation.append(Curve(name, places, values, number, points=True))
        found = [Panel("training loss", training)]
        if any(curve.x for curve in validation):
            found.append(Panel("validation loss" if measure == "loss" else "validation, bits per byte", validation))
        return [*found, Panel("learning rate", rates, height=0.6)], AXIS_LABELS[by]


def _validation(run: RecordedRun) -> tuple[str, ...]:
    """Return what a run's validation data follow from."""
    tables = [VALIDATION] if run.setting("data", "valid_path") else [VALIDATION, CUT]
    read = {name for name in ("data", "chat", "training") if run.settings.get(name)}
    if not run.settings.get("chat"):
        read.discard("training")  # of texts it is their end, whatever the seed
    return tuple(
        f"{field} {run.setting(section, field)}"
        for table in tables
        for section, fields in table.items()
        for field in fields
        if section in read
    )


def _effective(run: RecordedRun, section: str, field: str, usual: Any) -> Any:
    """Return what a setting comes to."""
    value = run.settings.get(section, {}).get(field, usual)
    if (section, field) == ("model", "head_dim") and value is None:
        width, heads = run.setting("model", "hidden_dim"), run.setting("model", "num_heads")
        return width // heads if width and heads else None
    if (section, field) == ("base", "digest") and value:
        return value[:12]
    return value


def _follows(run: RecordedRun) -> bool:
    """Say whether the rate at the end is what follows from the peak rate where it is not given."""
    rate, end = run.setting("training", "learning_rate"), run.setting("training", "min_learning_rate")
    return end is None or (bool(rate) and math.isclose(end, rate / 10))


def count_parameters(run: RecordedRun) -> int | None:
    """Return the weights of a run's model: as recorded, or worked out from its shape; None where that is not known."""
    if run.num_params is not None or "model" not in run.settings:
        return run.num_params
    try:
        return TrainableModelConfig.from_dict(dict(run.settings["model"])).num_params()
    except AbiError:
        return None


def smoothed(values: Sequence[float], length: float) -> Iterator[float]:
    """Yield the exponential mean of the values so far, which forgets over `length` of them; NaN are left out.

    Divided by the sum of its weights, so that the first value does not count more than others (as Adam's means).
    """
    keep = math.exp(-1 / length) if length > 0 else 0.0
    total = weight = 0.0
    for value in values:
        if math.isfinite(value):
            total, weight = keep * total + value, keep * weight + 1
        yield total / weight if weight else math.nan


def _has_bits(run: RecordedRun) -> bool:
    return run.last is None or run.last.bits_per_byte is not None


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _place(run: RecordedRun, step: int, time: float, by: str) -> float:
    """Return where an evaluation is on an axis; its tokens are those of the logged steps around it."""
    if by != "tokens":
        return step if by == "step" else time
    before = (0, 0)
    for record in run.steps:
        here = (record["step"], int(record.get("tokens") or 0))
        if here[0] >= step:
            share = (step - before[0]) / (here[0] - before[0]) if here[0] > before[0] else 0.0
            return before[1] + share * (here[1] - before[1])
        before = here
    return float(run.tokens if step == run.step else before[1])
