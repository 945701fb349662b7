"""The best state of a run, which early stopping puts back: in a checkpoint, or in memory where none can be saved."""

import numpy as np

from ..errors import CheckpointError
from .resume import restore_best
from .saving import Saver
from .session import Session

__all__ = ["BestState"]


class BestState:
    """Weights and moments of the best evaluation."""

    def __init__(self, session: Session, saver: Saver) -> None:
        """Begin without one."""
        self.session, self.saver = session, saver
        self._memory: tuple[np.ndarray, dict[str, np.ndarray], int] | None = None  # weights, moments, optimizer step

    def forget(self) -> None:
        """Forget what is in memory: another run goes on."""
        self._memory = None

    def keep(self) -> None:
        """Keep the state as the best so far: as a checkpoint, or in memory when there is nowhere to save it."""
        session, state, before = self.session, self.session.state, self.session.state.best_step
        state.best_step = state.global_step
        if session.config.checkpoint_path:
            if self.saver.try_to_save():
                self._memory = None
                return
            state.best_step = before
        if session.early_stopping is not None:
            weights, optimizer = session.model.parameters.weights_flat.copy(), session.optimizer
            self._memory = weights, optimizer.copy_moments(), optimizer.step

    def restore(self) -> str:
        """Put weights and moments of the best evaluation back; return a sentence for the log."""
        session, state, best = self.session, self.session.state, self.saver.best
        if self._memory is not None:
            weights, moments, step = self._memory
            session.model.parameters.weights_flat[:] = weights
            session.optimizer.load(moments, step)
        elif best is not None:
            try:
                restore_best(session.model, session.optimizer, best)
            except (CheckpointError, OSError) as error:
                session.warn(f"the best checkpoint cannot be restored, the last weights stay: {error}")
                return "the last weights stay"
        elif state.best_step >= 0 and session.config.checkpoint_path:
            return "the best checkpoint is not there any more, the last weights stay"
        else:
            return "no evaluation was finite, the last weights stay"
        state.optimizer_step = session.optimizer.step
        return f"weights and moments of step {state.best_step} are back"
