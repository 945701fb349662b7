"""Checkpoints of a run while it is trained: who may write where, when one is due, and going on from one.

What a checkpoint holds is in `checkpoint.py`, how it is put back in `resume.py`.
"""

import contextlib
from pathlib import Path

import numpy as np

from ..config import Precision
from ..errors import CheckpointError, ConfigError, told
from ..files import atomic_directory, write_inside
from ..formats.companions import Companions
from ..kernels.engine.choice import Choice
from ..kernels.engine.number_formats import PRECISIONS
from ..locks import DirectoryLock
from .checkpoint import check_unused, locate, prune, recover, save_checkpoint
from .events import CheckpointEvent
from .precision import LossScalerStats
from .resume import restore, restore_zig
from .session import Session
from .state import Position

__all__ = ["Saver"]


def _method(precision: Precision) -> str:
    """Return how products of a precision are made here, where there are several ways; its name before, but of bf16."""
    choice = PRECISIONS[precision]
    if not isinstance(choice, Choice):
        return ""
    return choice.method if precision is Precision.BF16 else f"{choice} {choice.method}"


class Saver:
    """Saves a session under `checkpoint_path`, and restores it.

    saved         the last checkpoint that was saved here            resumed_from  the one that was loaded
    failed        whether the last save that was tried failed
    """

    def __init__(self, session: Session) -> None:
        """Begin without a checkpoint."""
        self.session = session
        self.saved: Path | None = None
        self.resumed_from: Path | None = None
        self.failed = False
        self._position: Position | None = None  # of the run in its newest checkpoint
        self._lock: DirectoryLock | None = None  # on checkpoint_path, while the trainer's loop runs

    @property
    def last(self) -> Path | None:
        """The newest checkpoint of the run."""
        return self.saved or self.resumed_from

    @property
    def best(self) -> Path | None:
        """The checkpoint of the best evaluation, also where the run saved before it was given another place; None:
        there is none, or it is not there any more.
        """
        step, root = self.session.state.best_step, self.session.config.checkpoint_path
        before = self.resumed_from.parent if self.resumed_from is not None else None
        places = [Path(place) / f"llm_step_{step}" for place in (root, before) if place is not None and step >= 0]
        return next((place for place in places if place.is_dir()), None)

    @property
    def is_current(self) -> bool:
        """Whether the newest checkpoint holds all there is."""
        return self._position == self.session.state.position

    # -- who may write ---------------------------------------------------------------------------

    def hold(self) -> None:
        """Take `checkpoint_path` for this trainer alone; ConfigError if another one, or another run, is there."""
        root = self.session.config.checkpoint_path
        if root is not None:
            self._lock = DirectoryLock(root, "checkpoint_path")
            recover(Path(root))
            self._check_own(root)

    def release(self) -> None:
        """Give `checkpoint_path` back."""
        lock, self._lock = self._lock, None
        if lock is not None:
            lock.release()

    def _check_own(self, root: str) -> None:
        """Raise ConfigError if `root` holds checkpoints, and this run neither saved there nor was loaded from there."""
        if self.last is None or self.last.parent.resolve() != Path(root).resolve():
            check_unused(root)

    # -- saving ----------------------------------------------------------------------------------

    def save(self) -> Path:
        """Save and return the checkpoint; ConfigError without checkpoint_path, errors of `save_checkpoint`."""
        session, state, root = self.session, self.session.state, self.session.config.checkpoint_path
        if root is None:
            raise ConfigError("checkpoint_path (None) must be a directory for checkpoints to be saved; set it")
        model, precision = session.model, session.config.mixed_precision
        state.checkpoints_saved += 1
        state.draws, state.base_digest = model.draws, model.base_digest()
        state.bf16_method = _method(precision)
        arrays: dict[str, np.ndarray] = {**session.optimizer.moments}
        arrays["loss_history"] = np.array(session.loss_history, np.float64)
        if state.micro_step:
            arrays["gradients"] = model.parameters.gradients_flat
        sections = {**model.sections(), "training": session.config, "early_stopping": session.early_stopping}
        moment, self.failed = session.now()["time"], True
        held = self._lock is not None  # a loop of the user's own around train_step holds it for each save alone
        try:
            with contextlib.nullcontext() if held else DirectoryLock(root, "checkpoint_path"):
                if not held:
                    self._check_own(root)
                path = save_checkpoint(root, model=model, state=state, optimizer=arrays, sections=sections)
                self._bring_best(Path(root))
                self._prune(path)
        except BaseException:
            state.checkpoints_saved -= 1
            raise
        self._position, self.saved, self.failed = state.position, path, False
        session.events.emit(self._event(path, moment))
        return path

    def try_to_save(self) -> bool:
        """Save during training, where a full disk must not end the run: warn, and try again at the next interval."""
        if self.is_current:
            return True
        try:
            self.save()
        except (OSError, CheckpointError) as error:
            step = self.session.state.global_step
            self.session.warn(f"no checkpoint at step {step}: {told(error)}; training goes on")
            return False
        return True

    def save_on_time(self) -> None:
        """After an optimizer step: save if `checkpoint_interval` says so."""
        config = self.session.config
        interval = config.checkpoint_interval
        if config.checkpoint_path and interval and self.session.state.global_step % interval == 0:
            self.try_to_save()

    def save_final(self) -> None:
        """At the end of a run: save, unless the checkpoint of this step is there and whole."""
        state, saved = self.session.state, self._position
        is_there = saved is not None and saved.step == state.global_step and not self.failed
        if self.session.config.checkpoint_path and (state.early_stopped or not is_there):
            self.save()

    def _bring_best(self, root: Path) -> None:
        """Copy the best checkpoint to where the run is saved from now on; that it cannot be makes no other worse."""
        best = self.best
        if best is None or best.parent.resolve() == root.resolve():
            return
        try:
            with atomic_directory(root / best.name) as folder:
                for path in sorted(path for path in best.rglob("*") if path.is_file()):
                    with open(path, "rb") as file:
                        write_inside(folder, path.relative_to(best).as_posix(), iter(lambda: file.read(1 << 20), b""))
        except OSError as error:
            self.session.warn(f"the best checkpoint stays in {best.parent}: {told(error)}")

    def _prune(self, saved: Path) -> None:
        """Remove older checkpoints; that they cannot be removed does not make the new one worse."""
        keep, best = self.session.config.max_checkpoints, f"llm_step_{self.session.state.best_step}"
        try:
            prune(saved.parent, keep, {saved.name, best})
        except OSError as error:
            self.session.warn(f"older checkpoints cannot be removed: {told(error)}")

    def _event(self, path: Path, moment: float) -> CheckpointEvent:
        """Return the event of the checkpoint that holds the state, saved at `moment` of the run."""
        size = sum(file.stat().st_size for file in path.iterdir())
        step, best = self.session.state.global_step, self.session.state.best_step == self.session.state.global_step
        return CheckpointEvent(step=step, time=moment, path=str(path), size=size, best=best)

    # -- going on --------------------------------------------------------------------------------

    def load(self, path: str | Path, *, new_data: bool) -> Path:
        """Restore the session from what `path` means and return it; see `LlamaTrainer.load_checkpoint`."""
        session, state, found = self.session, self.session.state, locate(path)
        losses: list[float] = []  # the Zig trainer keeps none
        for problem in found.skipped:
            session.warn(f"passed over: {problem}")
        if found.path.is_file():
            restored = restore_zig(session.model, session.optimizer, found.path)
        else:
            restored, losses = restore(session.model, session.optimizer, found.path)
            own = Companions.of(found.path)
            is_whole = bool(own.config)  # else they are adapters, and config.json is that of the model under them
            session.model.companions = own if is_whole else session.model.companions.under(own)
        state.become(restored)
        session.loss_history[:] = losses
        session.model.draws = state.draws
        before, here = state.bf16_method.split(), _method(session.config.mixed_precision).split()
        if before and here and before[:-1] == here[:-1] and before != here:
            choice = PRECISIONS[session.config.mixed_precision]
            session.warn(
                f"{found.path} multiplied {choice} by the method {before[-1]}, here it is {here[-1]}: the last bits "
                f"will differ; {getattr(choice, 'variable', '')}={before[-1]} keeps them where the processor has it"
            )
        session.scaler.load(
            LossScalerStats(
                current_scale=state.loss_scale or session.config.initial_loss_scale,  # 0: the run never scaled
                overflow_count=state.overflow_count,
                steps_since_overflow=state.steps_since_overflow,
            )
        )
        if new_data:
            session.drop_window()
            state.open_epoch(0)
            state.data = {}
        self.resumed_from, self._position = found.path, None if found.path.is_file() else state.position
        if state.best_step >= 0 and self.best is None:
            session.warn(
                f"llm_step_{state.best_step}, the best checkpoint, is not beside {found.path.name} any more: unless an "
                "evaluation is better, the last weights take its place"
            )
        return found.path

    def resumed_event(self) -> CheckpointEvent | None:
        """Return the event of the checkpoint that was loaded, as long as the state is where it was; None without one.

        A killed run may not have come to tell about its last checkpoint.
        """
        path = self.resumed_from
        if path is None or not path.is_dir() or self.saved is not None or not self.is_current:
            return None
        return self._event(path, self.session.now()["time"])
