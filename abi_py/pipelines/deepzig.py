"""A DeepZig run from Python: `abi-train deepzig` without the terminal."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .presets import deepzig_preset, directory_of, size_of

if TYPE_CHECKING:
    from ..training.events import Sink
    from ..training.report import TrainingReport
    from ..training.stop import GracefulStop

__all__ = ["train_deepzig"]


def train_deepzig(
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    sinks: "Sequence[Sink]" = (),
    stop: "GracefulStop | None" = None,
    *,
    size: str | None = None,
    out: str | Path | None = None,
) -> "tuple[TrainingReport, Path]":
    """Train, and return the report and the directory of the run.

    settings  section -> field -> value, as in a run's config.yaml: {"training": {"epochs": 3}}; what is not given is
              as `abi-train deepzig` takes it, for the test preset on the package's own conversations
    sinks     listeners to the events of the training
    size      test, small, medium, large or seed; None: test, or the one nearest to the base
    out       directory of the run; None: deepzig-SIZE-model

    ConfigError, DataError, CheckpointError or OSError for what is wrong.  Stopped by `stop`, the directory holds no
    model yet; `abi-train resume` goes on.
    """
    from ..runs.directory import check_free, hold
    from ..runs.resolve import Given, prepare
    from ..runs.training import train_run

    given = Given(settings or {}, {}, deepzig_preset(size))
    directory = Path(out or directory_of(size_of(size, given.base_shape)))
    check_free(directory)
    run = given.resolve(given.open_data(), directory)
    prepare(run.config.training)
    with hold(directory, run.config.training, "out"):
        check_free(directory)
        report = train_run(run, None, sinks, stop)
    return report, directory
