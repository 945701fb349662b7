"""What is found on the conversations that are kept for validation, with the weights that a run leaves."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..training.report import EvalResult

__all__ = ["Findings", "JsonAnswers"]


@dataclass(frozen=True, kw_only=True)
class JsonAnswers:
    """How many answers there were, and what they are; `json_answers.py` says what the names mean."""

    asked: int
    parsed: int
    keyed: int
    equal: int

    def shares(self) -> dict[str, float]:
        """Return the three shares by name, 0 to 1; none of nothing."""
        if not self.asked:
            return {}
        return {name: getattr(self, name) / self.asked for name in ("parsed", "keyed", "equal")}

    def rows(self) -> list[tuple[str, str]]:
        """Return the lines of a table."""
        words = {"parsed": "  are JSON", "keyed": "  with the right keys", "equal": "  the data's own answer"}
        shares = self.shares()
        found = [(words[name], f"{getattr(self, name)} ({100 * share:.1f}%)") for name, share in shares.items()]
        return [("answers checked as JSON", f"{self.asked}"), *found]


@dataclass(frozen=True)
class Findings:
    """The figures of each part of what is kept, by its name, and those of the answers that were checked."""

    parts: "dict[str, EvalResult]" = field(default_factory=dict)
    answers: JsonAnswers | None = None
