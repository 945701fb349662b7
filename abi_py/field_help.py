"""What `help()` shows of a config class: its fields, from their declarations, and a signature that fits on a line.

Both are made when they are asked for, because a rule is found by asking the class: a field is given values that are
usually wrong, and what `validate` answers is the rule.  So no rule is written a second time for people.
"""

import inspect
import re
import textwrap
from collections.abc import Mapping
from typing import Any

from .declared import Option, Other, Switch, conditions_of, fields_of, needs, plain
from .errors import ConfigError

__all__ = ["FieldsDoc", "ShortSignature", "describe_fields"]

WIDTH = 100
SHOWN = 3  # parameters of a signature that are shown; the text of the class names them all
WRONG = {int: (-1, 0, 10**15), float: (-1.0, 0.0, float("nan")), str: ("",)}  # by type: against most rules


class FieldsDoc:
    """The text of a class: what is written in it, and its fields; it costs nothing until it is read."""

    def __init__(self, written: str | None) -> None:
        """Keep what the class says of itself."""
        self.written = inspect.cleandoc(written or "")

    def __get__(self, instance: Any, owner: type) -> str:
        if "__dataclass_fields__" not in vars(owner):  # `dataclass` itself asks whether there is a text
            return self.written
        return "\n".join([self.written, "", *describe_fields(owner)])


class ShortSignature:
    """The signature of a config class: every parameter is in it, and its text names the first few.

    So `help()` and a notebook's `?` show one line, while completion and whoever reads the parameters of
    `inspect.signature(cls)` find all of them, with types and defaults.
    """

    def __get__(self, instance: Any, owner: type) -> inspect.Signature:
        init: Any = owner.__init__  # type: ignore[misc]
        whole = _Short(list(inspect.signature(init).parameters.values()))
        init.__signature__ = whole  # help() shows it below the class, and would fill a screen
        return _Short([each for each in whole.parameters.values() if each.name != "self"])


class _Short(inspect.Signature):
    def __str__(self) -> str:
        fields = [each for each in self.parameters.values() if each.name != "self"]
        words = ["self"] if "self" in self.parameters else []
        shown = [str(each.replace(annotation=each.empty)) for each in fields[:SHOWN]]
        return f"({', '.join([*words, '*', *shown])}{', ...' if len(fields) > SHOWN else ''})"

    def format(self, **_: Any) -> str:  # what pydoc calls from Python 3.13 on
        return str(self)


def describe_fields(cls: type) -> list[str]:
    """Return the lines of all fields: type, default, what it is, its rule, and when it acts."""
    options = fields_of(cls)
    example = {option.name: option.metadata["example"] for option in options if option.required}
    lines = ["Fields, by name alone:", ""]
    for option in options:
        kind = " | ".join(option.choices) or option.type.__name__
        kind = f"tuple of {kind}" if option.many else kind
        derived, acts = "derive" in option.metadata, needs(cls, option)
        default = "" if option.required or derived else f" = {plain(option.default)!r}"
        none = " or None" if option.optional and not derived else ""
        sentences = [option.help, rule_of(cls, option, example), f"acts {acts}" if acts else ""]
        said = "; ".join(filter(None, ["must be given" if option.required else "", *sentences]))
        lines.append(f"{option.name}: {kind}{none}{default}")
        lines += textwrap.wrap(said, WIDTH, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False)
    return lines


def rule_of(cls: type, option: Option, example: Mapping[str, Any]) -> str:
    """Return the rule of a field as `cls(**example)` says it when the field is given a wrong value; '' for none.

    A rule that names what another field has at that moment is none of the field's own.
    """
    group = next(iter(conditions_of(option)), {}).items()
    around = {name: wanted[0] if isinstance(wanted, tuple) else wanted for name, wanted in group}
    values = {**example, **{name: it for name, it in around.items() if not isinstance(it, Switch | Other)}}
    for value in WRONG.get(option.type, ()):
        try:
            cls(**{**values, option.name: value})
        except ConfigError as error:
            found = re.match(rf"{option.name} \([^()]*\) (must [^;(]+);", str(error))
            if found:
                return found[1]
    return ""
