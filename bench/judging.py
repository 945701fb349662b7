"""Goals for speed: what is asked, what was measured, what is possible, and the verdict; goals.py measures them."""

from collections.abc import Callable
from typing import NamedTuple

DISTURBED = "better than possible: other programs ran while the peak was measured, so neither figure counts"


class Goal(NamedTuple):
    """What is asked for: at least, or at most, `limit`; and the command that measures it alone."""

    what: str
    limit: float
    unit: str  # "x" a ratio, "%" a share, "s" seconds
    at_least: bool
    command: str


class Figure(NamedTuple):
    """What was measured, None if nothing was; what no program could beat, None if that is not known; a remark."""

    measured: float | None
    possible: float | None = None
    note: str = ""


class Measurement(NamedTuple):
    """Goals that are measured together: `measure(options)` returns the `Figure` of each."""

    goals: tuple[Goal, ...]
    measure: Callable


def judged(goal, measured, possible=None, note=""):
    """Return the row of a goal; `measured` is None if there is no figure, and `note` then says why."""
    met = measured is not None and (measured >= goal.limit if goal.at_least else measured <= goal.limit)
    beyond = possible is not None and (possible < goal.limit if goal.at_least else possible > goal.limit)
    if None not in (measured, possible) and (measured > possible if goal.at_least else measured < possible):
        note, beyond = DISTURBED, False
    return {
        "what": goal.what,
        "asked": goal.limit,
        "rule": "at least" if goal.at_least else "at most",
        "unit": goal.unit,
        "measured": measured if measured is None else round(measured, 4),
        "met": "yes" if met else "not measured" if measured is None else "no",
        "possible": possible if possible is None else round(possible, 4),
        "bounded_by_machine": "yes" if beyond else "",
        "command": goal.command,
        "note": note,
    }


def figure(value, unit):
    """Return a figure with its unit; "-" if there is none."""
    if value is None:
        return "-"
    return f"{value:.0%}" if unit == "%" else f"{value:.2f} {unit}"


def verdict(row):
    """Say whether a row is met, missed, or not measured."""
    return {"yes": "met", "no": "missed"}.get(row["met"], row["met"])


def table(rows):
    """Return the rows as text."""
    lines = [f"{'what':50}{'asked':>16}{'measured':>10}{'':14}{'possible':>10}   command"]
    for row in rows:
        asked = f"{row['rule']} {figure(row['asked'], row['unit'])}"
        measured, possible = (figure(row[key], row["unit"]) for key in ("measured", "possible"))
        mark = " * " if row["bounded_by_machine"] else "   "
        figures = f"{asked:>16}{measured:>10}  {verdict(row):12}{possible:>10}"
        lines.append(f"{row['what']:50}{figures}{mark}{row['command']}")
        if row["note"]:
            lines.append(f"    {row['note'].splitlines()[0]}")
    if any(row["bounded_by_machine"] for row in rows):
        lines.append("* more is asked than this machine has: possible is what no program could beat on it")
    return "\n".join(lines)
