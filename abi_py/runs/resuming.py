"""A run that goes on: its settings with the changes of flags, and whether there is anything left to do."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..config import EarlyStoppingConfig, LlmTrainingConfig, TrainableModelConfig
from ..errors import CheckpointError, ConfigError, counted
from ..fields import in_words
from ..training.metrics import METRICS
from ..training.schedule import ends
from .base import Base, with_tokenizer
from .directory import CONFIG, has_checkpoint, has_report, is_run, place_of_checkpoints
from .finishing import check_export, has_left_model
from .opening import Progress, open_data, unseen
from .resolve import check_early_stopping, check_samples, check_use, merged
from .run import Run
from .schedule import Reschedule
from .settings import (
    BaseConfig,
    ChatConfig,
    DataConfig,
    ExportConfig,
    RunConfig,
    RunLoraConfig,
    Values,
    absolute,
    read_run_config,
)

if TYPE_CHECKING:
    from ..training.state import TrainingState

__all__ = ["Resumed", "changed", "epochs_done", "finished", "has_saved", "note_on_pruning"]


@dataclass(frozen=True)
class Resumed:
    """A run that goes on from a checkpoint, or begins again if it ended before its first one."""

    where: Path  # as it was given
    config: RunConfig  # with the changes of the flags
    before: LlmTrainingConfig  # without them
    directory: Path
    checkpoint: Path | None
    there: list[tuple[int, Path]]  # all checkpoints beside it
    state: "TrainingState"
    flags: Values

    @classmethod
    def find(cls, where: Path, flags: Values, tell: Callable[[str], None]) -> "Resumed":
        """Find the newest whole checkpoint that `where` means, and the settings; `tell` is told what was passed over.

        ConfigError for wrong settings, or an end that is past already; CheckpointError where nothing can go on.
        """
        from ..training.checkpoint import list_checkpoints, locate, verify
        from ..training.state import TrainingState

        checkpoint, state, there = None, TrainingState(), list[tuple[int, Path]]()
        if is_run(where) and not has_checkpoint(where):
            _check_never_saved(where)
        else:
            found = locate(place_of_checkpoints(where))
            there = list_checkpoints(found.path.parent)
            for problem in found.skipped:
                tell(f"passed over: {problem}")
            checkpoint, state = found.path, TrainingState.from_dict(verify(found.path)["state"])
        config, directory, before = changed(checkpoint, flags, where)
        if checkpoint is not None:
            _check_optimizer(config.training, before)
        _check_targets(config.training, before, state)
        return cls(where, config, before, directory, checkpoint, there, state, flags)

    def finished(self, schedule: str | None) -> "Finished | None":
        """Return why nothing is left to do, and how it goes on all the same; None if something is.

        ConfigError for a flag, or a choice of the schedule, without effect.
        """
        end = finished(self.state, self.config)
        whole = is_run(self.directory)
        if whole and not (has_report(self.directory, self.state) and has_left_model(self.directory)):
            end = None  # the last evaluation, the report, or the model is still to come
        left = self.flags.get("export", {})  # what RUN/model is, which is written anew without training
        changes = [name for given in self.flags.values() if given is not left for name in given]
        changes += ["schedule"] if schedule else []
        if end is not None and changes:
            raise ConfigError(
                f"{', '.join(changes)}: without effect, because {end.reason}; add {end.flags} to go on, or leave out "
                "what changes nothing"
            )
        if whole and left:
            end = None
        if end is None and self.checkpoint is not None:
            self._check_fixed()
        return end

    def _check_fixed(self) -> None:
        """Raise ConfigError for a flag without effect, because the checkpoint has fixed what it says."""
        scale = self.state.loss_scale
        if "seed" in self.flags.get("model", {}):
            raise ConfigError(
                f"seed ({self.config.model.seed}) of the model has no effect: the weights are the checkpoint's; leave "
                "it out"
            )
        if scale and "initial_loss_scale" in self.flags.get("training", {}):
            raise ConfigError(
                f"initial_loss_scale ({self.config.training.initial_loss_scale:g}) has no effect: the checkpoint's "
                f"loss scale ({scale:g}) goes on; leave it out"
            )

    def reschedule(self, choice: str | None) -> Reschedule:
        """Return what becomes of the learning-rate schedule."""
        return Reschedule(choice, self.before, self.flags.get("training", {}))

    def open(self, reschedule: Reschedule, progress: Progress = unseen) -> Run:
        """Open the data; return the run, with its schedule as it goes on.

        The directory must be held: ConfigError if somebody saved there before it was, or for what does not go together.
        """
        from ..training.checkpoint import list_checkpoints

        if self.checkpoint is not None and list_checkpoints(self.checkpoint.parent) != self.there:
            raise ConfigError(f"RUN ({self.where}) was written to while it was opened; try again")
        config, training = self.config, self.config.training
        needed = self.checkpoint is None or config.lora is not None  # what is under adapters is in no checkpoint
        base = None
        if needed and config.base is not None:
            moved = "" if config.lora is None else f"say where it is: abi-train resume {self.where} --base FOLDER"
            base = Base.open(config.base, moved)
            config = dataclasses.replace(config, base=base.given)
        sizes = {"max_seq_len": training.max_seq_len, "seed": training.seed}
        chat = config.chat or ChatConfig()
        opened = with_tokenizer(config.data, self._kept_tokenizer())
        data = open_data(opened, chat, config.model.vocab_size, **sizes, progress=progress)
        run = Run(config, data.train, data.valid, self.directory, data.opened, base, data.parts)
        check_use(run, self.flags)
        check_samples(run)
        check_export(config.export, training, config.model, run.evaluates)
        training = reschedule.apply(training, self.state.global_step, data.train)
        return dataclasses.replace(run, config=dataclasses.replace(config, training=training))

    def _kept_tokenizer(self) -> Path | None:
        """Return where the tokenizer is that a run has from its base, or trained: in its own directory.

        CheckpointError if a trained one has gone.
        """
        from ..data.tokenizer import TOKENIZER_FILE

        trained = bool(self.config.data.train_tokenizer)
        if not trained and self.config.base is None:
            return None
        if (self.directory / TOKENIZER_FILE).is_file():
            return self.directory
        if trained and self.checkpoint is not None:
            raise CheckpointError(
                f"{self.directory / TOKENIZER_FILE} is missing, which the run has trained on its data; put it back"
            )
        return None


def changed(checkpoint: Path | None, flags: Values, where: Path) -> tuple[RunConfig, Path, LlmTrainingConfig]:
    """Return the run's configuration with the flags' changes, the run's directory, and its training without them.

    Without a checkpoint, `where` is the directory of a run.
    """
    directory, source = where, where
    if checkpoint is not None and not is_run(where):
        around = [place for place in (checkpoint.parent.parent, checkpoint.parent) if is_run(place)]
        around = [place for place in around if (place / METRICS).is_file()]  # else it is another config.yaml
        directory, source = (around[0], around[0]) if around else (checkpoint.parent, checkpoint)
    values = read_run_config(source / CONFIG)
    may_move = values.get("lora") and values.get("base") and [*flags.get("base", {})] == ["path"]
    if "base" in flags and not may_move:  # weights that lie elsewhere now are the same by their digest
        name, value = next(iter(flags["base"].items()))
        raise ConfigError(
            f"{'base' if name == 'path' else name} ({value}) has no effect on a run that goes on, which has its "
            "weights; leave it out, or begin another: abi-train run --base"
        )
    if "data" not in values and "data" not in flags:
        raise _without_data(source)
    usual = values.setdefault("training", {}).get("checkpoint_path") or directory / "checkpoints"
    values["training"]["checkpoint_path"] = str(checkpoint.parent if checkpoint else usual)  # the run may have moved
    wanted = merged(flags, values)
    run = RunConfig(
        model=TrainableModelConfig.from_dict(wanted["model"]),
        training=LlmTrainingConfig.from_dict(wanted["training"]),
        early_stopping=EarlyStoppingConfig.from_dict(wanted["early_stopping"]),
        data=DataConfig.from_dict(absolute(wanted["data"])),
        chat=ChatConfig.from_dict(absolute(wanted["chat"])) if values.get("chat") else None,
        base=BaseConfig.from_dict(wanted["base"]) if values.get("base") else None,
        lora=RunLoraConfig.from_dict(wanted["lora"]) if values.get("lora") else None,
        export=ExportConfig.from_dict(wanted["export"]),
    )
    own = merged({}, values)["lora"]
    _check_adapters(RunLoraConfig.from_dict(own) if own else None, flags.get("lora", {}), run.model)
    check_early_stopping(run.early_stopping, run.data, run.training)
    return run, directory, LlmTrainingConfig.from_dict(values["training"])


def _check_adapters(own: RunLoraConfig | None, flags: Mapping[str, Any], shape: TrainableModelConfig) -> None:
    """Raise ConfigError for a flag that says something else of a run's adapters than its config.yaml."""
    anew = "begin another run for that: abi-train run --base RUN"
    if own is None:
        if flags.get("enabled", bool(flags)):
            name, value = next(iter(flags.items()))
            what = "has no effect: this run trains all weights"
            raise ConfigError(f"{name} ({in_words(value)}) of lora {what}; {anew} --lora")
        return
    if not flags.get("enabled", True):
        raise ConfigError(f"enabled (false) of lora has no effect: this run trains adapters; {anew}")
    from ..model.lora_targets import named

    wanted = named(shape, own.replace(**flags)).to_dict()
    for name, value in own.to_dict().items():
        if wanted[name] != value:
            raise ConfigError(
                f"{name} ({in_words(wanted[name])}) of lora must stay {in_words(value)}, with which the run's adapters "
                f"are trained; leave it out, or {anew}"
            )


def _check_optimizer(config: LlmTrainingConfig, before: LlmTrainingConfig) -> None:
    """Raise ConfigError for an optimizer that does not keep the moments which a checkpoint holds."""
    from ..training.moments import setting_that_differs

    name = setting_that_differs(config, before)
    if name is not None:
        wanted, own = (in_words(each.to_dict()[name]) for each in (config, before))
        raise ConfigError(
            f"{name} ({wanted}) must stay {own}, whose moments the checkpoint holds; leave it out, or begin another "
            "run for that: abi-train run --base RUN"
        )


def _without_data(source: Path) -> CheckpointError:
    """Return the error for a run, or a checkpoint, whose config.yaml does not name the data."""
    run = next((place for place in (source.parent.parent, source.parent) if (place / METRICS).is_file()), None)
    if is_run(source):
        what, remedy = f"{source / CONFIG} must name the data", "put its section data back"
    elif run is not None:
        what, remedy = f"{run / CONFIG} is missing, which names the data", "put it back"
    else:
        what = f"{source} is outside of its run, whose config.yaml names the data"
        remedy = "put the checkpoint back into RUN/checkpoints"
    return CheckpointError(
        f"{what}; give --data (or --corpus-bytes for the standard library, and --valid-fraction), or {remedy}"
    )


def epochs_done(state: "TrainingState") -> int:
    """Return how many epochs are over; a checkpoint may be at the very end of one, before its state counts it."""
    return state.epoch + (0 < (state.data.get("batches") or 0) <= state.batch_position)


class Finished(NamedTuple):
    """Why a run has nothing left to do, the flags with which it goes on all the same, and until when it then does."""

    reason: str
    flags: str
    until: str


def finished(state: "TrainingState", run: RunConfig) -> Finished | None:
    """Return why a run has nothing left to do, and how it goes on all the same; None if it has."""
    config, early = run.training, run.early_stopping
    if state.early_stopped and early.enabled and state.patience_counter >= early.patience:
        reason = f"early stopping ended this run at step {state.global_step}"
        return Finished(reason, "--no-early-stopping", "without early stopping")
    if state.evaluation_due or state.micro_step:
        return None
    at_limit = bool(config.max_steps) and state.global_step >= (config.max_steps or 0)
    no_limit = " --max-steps 0" if at_limit else ""
    if epochs_done(state) >= config.epochs:
        done = "its one epoch is" if config.epochs == 1 else f"all {config.epochs} epochs are"
        reason = f"{done} done (step {state.global_step})"
        anew = " --schedule restart" if ends(config) else ""  # or the rate would stay at its minimum
        until = f"for {counted(config.epochs, 'epoch')} more"
        return Finished(reason, f"--epochs {2 * config.epochs}{no_limit}{anew}", until)
    if at_limit:
        epochs = "its one epoch" if config.epochs == 1 else f"its {config.epochs} epochs"
        reason = f"max_steps ({config.max_steps}) is reached (step {state.global_step})"
        return Finished(reason, no_limit.strip(), f"to the end of {epochs}")
    return None


def has_saved(directory: Path) -> bool:
    """Say whether a run has ever saved a checkpoint, by what it has recorded."""
    try:
        with open(directory / METRICS, "rb") as metrics:  # as bytes: a kill, or a disk, may leave anything at its end
            return any(b'"type": "checkpoint"' in line for line in metrics)
    except FileNotFoundError:
        return False


def _check_never_saved(directory: Path) -> None:
    """Raise CheckpointError if a run without checkpoints once had some: to begin again would replace its records."""
    if has_saved(directory):
        raise CheckpointError(
            f"{place_of_checkpoints(directory)} holds no checkpoint, though the run in {directory} has saved some; put "
            f"them back, set checkpoint_path in {directory / CONFIG} to where they are, or begin a new run"
        )


def _check_targets(config: LlmTrainingConfig, before: LlmTrainingConfig, state: "TrainingState") -> None:
    """Raise ConfigError for a new end of the run that is not after the checkpoint: it would become the run's record."""
    done, step = epochs_done(state), state.global_step
    if config.epochs != before.epochs and config.epochs <= done:
        raise ConfigError(
            f"epochs ({config.epochs}) must be above {done}, the epochs that are done (step {step}); give --epochs "
            f"{done + 1} or more"
        )
    if config.max_steps and config.max_steps != before.max_steps and config.max_steps <= step:
        raise ConfigError(
            f"max_steps ({config.max_steps}) must be above {step}, the steps done; give --max-steps {step + 1} "
            "or more, or 0 for no limit"
        )


def note_on_pruning(training: LlmTrainingConfig, directory: Path) -> str | None:
    """Return what to say where saving would remove checkpoints outside of the run's directory, or somebody else's."""
    from ..training.checkpoint import removable

    root, keep = Path(training.checkpoint_path or directory), training.max_checkpoints
    inside = root.resolve().is_relative_to(directory.resolve())
    whose = "" if inside else f", outside of {directory}"
    if root.exists() and os.name == "posix" and root.stat().st_uid != os.getuid():
        whose += f", which is user {root.stat().st_uid}'s"
    doomed = len(removable(root, keep - 1)) if whose and keep else 0
    if not doomed:
        return None
    return (
        f"checkpoints are saved in {root}{whose}, and only the {keep} newest and the best stay there: the next "
        f"save removes up to {doomed} of them; --checkpoint-path saves elsewhere, --max-checkpoints 0 keeps all"
    )
