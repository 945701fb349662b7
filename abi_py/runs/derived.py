"""Settings that follow from others, or from the data, where they are not given.

Each is a line of a table: name, the rule as the help shows it, and the rule as a function of the facts.  The help and
the run read the same line, so they can't say two things.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from ..fields import Config, acting

__all__ = ["Derived", "derive", "rules"]

Facts = TypeVar("Facts")


@dataclass(frozen=True)
class Derived(Generic[Facts]):
    """How one field gets its value when it is not given."""

    name: str
    rule: str  # as the help shows it
    value: Callable[[Facts], Any]
    meanwhile: Any = None  # takes its place until the facts are known: a value that breaks no rule; None: the default


def rules(table: Iterable[Derived[Facts]]) -> dict[str, str]:
    """Return name -> rule, for the help."""
    return {each.name: each.rule for each in table}


def derive(
    cls: type[Config], table: Iterable[Derived[Facts]], given: Mapping[str, Any], facts: Facts | None
) -> dict[str, Any]:
    """Return the given values of `cls`, and those that follow; None counts as not given.

    What would have no effect beside the others is left out.  Without facts, what can be told before they are known.
    """
    values = {name: value for name, value in given.items() if value is not None}
    missing = [each for each in table if each.name not in values]
    meanwhile = {each.name: each.meanwhile for each in missing if each.meanwhile is not None}
    act = acting(cls, {**meanwhile, **values})
    if facts is not None:
        meanwhile = {each.name: each.value(facts) for each in missing if each.name in act}
    return {**{name: value for name, value in meanwhile.items() if name in act}, **values}
