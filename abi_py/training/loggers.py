"""TensorBoard and Weights & Biases: the same scalars, and what belongs to them: settings, samples, the report.

A trainer of one's own logs the fields of its training configuration.  That of a run has a label (`RunLabel`): then it
is all sections of its config.yaml, and W&B's run has the name of the run's directory, which keeps its id, so that a
resumed run goes on in the same one.
"""

import secrets
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..config import LlmTrainingConfig
from ..errors import ConfigError
from ..files import atomic_json
from ..untrusted import read_json
from .events import EndEvent, Event, RunLabel, SampleEvent, Sink, StartEvent
from .metrics import METRICS, MetricsStreamSink, records_until, scalars, summary
from .report import TrainingReport, plain

__all__ = ["WANDB", "TensorBoardSink", "WandbSink", "configured_sinks"]

WANDB = "wandb.json"  # in a run's directory: which of W&B's runs it is


def settings_of(label: RunLabel | None, config: LlmTrainingConfig) -> Mapping[str, Any]:
    """Return the sections of a run, or the fields of the training configuration where it is none."""
    return config.to_dict() if label is None else label.settings


def hyperparameters(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, bool | float | str]]:
    """Yield section.field with its value, as a number, a yes or no, or a text; what is not set is left out."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from hyperparameters(value, f"{prefix}{name}.")
        elif isinstance(value, bool | int | float | str):
            yield prefix + name, value
        elif value:
            yield prefix + name, ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def report_table(report: TrainingReport) -> str:
    """Return a report as a table in Markdown."""
    rows = [f"| {name} | {value} |" for name, value in report.to_dict().items() if value not in (None, [])]
    return "\n".join(["| | |", "|---|---|", *rows])


class TensorBoardSink:
    """TensorBoard event files in `log_dir`, written by tensorboardX: scalars, hyperparameters, samples, the report."""

    def __init__(self, config: LlmTrainingConfig, log_dir: str | Path) -> None:
        """Check that the package is there; files appear at the first event."""
        try:
            from tensorboardX import SummaryWriter  # type: ignore[import-untyped,unused-ignore]
        except ImportError:
            raise ConfigError("enable_tensorboard needs tensorboardX; run pip install 'abi_py[tensorboard]'") from None
        self._open, self._config, self._directory = SummaryWriter, config, str(log_dir)
        self._writer: Any = None
        self._session_end: Any = None

    def handle(self, event: Event) -> None:
        """Write what the event has for TensorBoard."""
        if self._writer is None:
            # purge_step hides what a killed run wrote after the step at which this one goes on
            first = event.step + 1 if isinstance(event, StartEvent) and event.step else None
            self._writer = self._open(self._directory, purge_step=first)
        if isinstance(event, StartEvent):
            self._write_hyperparameters(event)
        found = list(summary(event.report)) if isinstance(event, EndEvent) else list(scalars(event))
        for tag, value in found:
            self._writer.add_scalar(tag, value, event.step)
        if isinstance(event, SampleEvent):  # indented: Markdown shows it as it is
            text = "\n".join("    " + line for line in event.text.splitlines())
            self._writer.add_text(f"samples/{event.prompt}", text, event.step)
        if isinstance(event, EndEvent):
            self._writer.add_text("report", report_table(event.report), event.step)
            if self._session_end is not None:
                self._writer.file_writer.add_summary(self._session_end)
        if found or isinstance(event, StartEvent | SampleEvent):
            self._writer.flush()

    def _write_hyperparameters(self, event: StartEvent) -> None:
        """Write those of this session into the same event file; `add_hparams` would make a second run beside it."""
        from tensorboardX.summary import hparams  # type: ignore[import-untyped,unused-ignore]

        metrics = dict.fromkeys(("val/best_loss", "train/final_loss", "val/best_accuracy"))  # written at the end
        values = dict(hyperparameters(settings_of(event.label, self._config)))
        experiment, start, self._session_end = hparams(values, metrics)
        for content in (experiment, start):
            self._writer.file_writer.add_summary(content)

    def close(self) -> None:
        """Close the files."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()


class WandbSink:
    """Weights & Biases; WANDB_MODE=offline keeps everything in `log_dir/wandb`."""

    def __init__(self, config: LlmTrainingConfig, log_dir: str | Path) -> None:
        """Check that the package is there; the run is opened at the first event."""
        try:
            import wandb  # type: ignore[import-not-found,unused-ignore]
        except ImportError:
            raise ConfigError("enable_wandb needs wandb; run pip install 'abi_py[wandb]'") from None
        self._wandb: Any = wandb
        self._config, self._directory = config, Path(log_dir)
        self._run: Any = None
        self._label: RunLabel | None = None
        self._samples: list[list[Any]] = []
        self._ended = False  # as planned, or by request

    def handle(self, event: Event) -> None:
        """Log at the event's step what it has for W&B."""
        if isinstance(event, StartEvent):
            self._label, self._samples, self._ended = event.label, samples_until(event), False
        if self._run is None:
            self._run = self._begin()
        values: dict[str, Any] = dict(scalars(event))
        if isinstance(event, SampleEvent):
            self._samples.append([event.step, event.prompt, event.text])
            values["samples"] = self._wandb.Table(columns=["step", "prompt", "text"], data=list(self._samples))
        if values:
            self._run.log(values, step=event.step)
        if isinstance(event, EndEvent):
            self._ended = True
            for tag, value in summary(event.report):
                self._run.summary[tag] = value

    def _begin(self) -> Any:
        """Open W&B's run; that of a run which goes on is the one in which it was begun."""
        config, label, more = self._config, self._label, dict[str, Any]()
        if label is not None:
            more = {"id": kept_id(label.directory), "resume": "allow"}
        self._directory.mkdir(parents=True, exist_ok=True)
        return self._wandb.init(
            project=config.wandb_project or "abi",
            name=config.wandb_run_name or (None if label is None else label.name),
            entity=config.wandb_entity,
            dir=str(self._directory),
            config=plain(dict(settings_of(label, config))),
            **more,
        )

    def close(self) -> None:
        """Finish the run: as failed, if an exception has ended it."""
        run, self._run = self._run, None
        if run is not None:
            run.finish(exit_code=int(not self._ended and sys.exc_info()[0] is not None))


def samples_until(start: StartEvent) -> list[list[Any]]:
    """Return step, prompt and text of the samples that a run which goes on has in its metrics.jsonl."""
    path = start.label.directory / METRICS if start.label is not None else None
    if path is None or not start.step or not path.exists():
        return []
    records = (record for _, record in records_until(path, start.step, start.time) if record.get("type") == "sample")
    return [[record.get(name) for name in ("step", "prompt", "text")] for record in records]


def kept_id(directory: Path) -> str:
    """Return the id of W&B's run for the run in a directory, where it is kept; ConfigError if that file is damaged."""
    remedy = "delete it, and W&B begins another run"
    try:
        found: str = read_json(directory / WANDB, {"id": str}, error=ConfigError, remedy=remedy)["id"]
    except FileNotFoundError:
        found = secrets.token_hex(8)
        atomic_json(directory / WANDB, {"id": found})
    return found


def configured_sinks(config: LlmTrainingConfig) -> list[Sink]:
    """Return the sinks that `log_dir` and the `enable_` fields ask for; ConfigError if a package is missing."""
    sinks: list[Sink] = []
    if config.log_dir is None:
        return sinks
    if config.enable_metrics_stream:
        sinks.append(MetricsStreamSink(config.log_dir))
    if config.enable_tensorboard:
        sinks.append(TensorBoardSink(config, config.log_dir))
    if config.enable_wandb:
        sinks.append(WandbSink(config, config.log_dir))
    return sinks
