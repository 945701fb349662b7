"""Says when something that is trained beside frozen weights gets no gradient: it would be carried along for nothing.

    looked at    before an update: the gradients of all that is trained, an adapter's tensors (A, B, m) together
    reached      one number of them that is not 0, once
    error        ConfigError, with names, for what no window has reached when an update has moved the weights

One window would not do.  A begins without a gradient, because B is 0; and where a frozen matrix after an adapter is 0,
as in blocks that were put in to be trained, nothing comes through until that matrix's own adapter has moved.  After an
update at a rate above 0 it does, or never will.

No other window counts: one without any gradient, one of rows of a single token, whose queries have nothing to choose
from, and one in half precision, in which a small gradient may be 0.  Of a model that is trained as a whole nothing is
looked at: nobody has named its tensors.
"""

from ..config import Precision
from ..errors import ConfigError, counted, listed
from .session import Session

__all__ = ["ReachWatch"]

MAX_NAMED = 6
ADAPTERS = (".a", ".b", ".m")  # what names of an adapter's tensors end in


class ReachWatch:
    """Looks at the gradients of a session's first windows."""

    def __init__(self, session: Session) -> None:
        """Begin with all that is trained, if that is not all of the model."""
        self.session = session
        self._missed: dict[str, list[str]] = {}  # tensors by what they belong to
        self._moved, self._windows = False, 0
        if session.model.base is not session.model.weights:
            for name in session.model.weights:
                self._missed.setdefault(name[:-2] if name.endswith(ADAPTERS) else name, []).append(name)

    def before_update(self, norm: float, seq_len: int) -> None:
        """Look at a window's gradients, of the length `norm`, and its rows of seq_len tokens; ConfigError as above."""
        halved = self.session.config.mixed_precision is Precision.FP16
        if not self._missed or not norm > 0 or seq_len < 2 or halved:
            return
        self._windows += 1
        gradients = self.session.model.gradients
        self._missed = {
            owner: names for owner, names in self._missed.items() if not any(gradients[name].any() for name in names)
        }
        if self._missed and self._moved:
            those = "this has" if len(self._missed) == 1 else "these have"
            raise ConfigError(
                f"{listed(list(self._missed), MAX_NAMED)}: no gradient in {counted(self._windows, 'step')}, so {those} "
                "no effect on the loss; leave out of target_modules or modules_to_save what nothing after it reads, or "
                "look for weights after it that are 0"
            )

    def after_update(self, rate: float) -> None:
        """Hear of an update."""
        self._moved = self._moved or rate > 0
