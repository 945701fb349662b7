"""What a config class is made of: declared fields (`declared.py`), conversion, rules.

Every class is frozen and keyword-only, checks its values when it is made, and states each field once:

    momentum: float = opt(0.9, "momentum of sgd (0 = off)", acts={"optimizer": OptimizerType.SGD})

`fields_of(cls)` lists name, type, default, help and choices for the command line, YAML and documentation.  `acts` says
what other fields must be for this one to have an effect; where they are not, a value is refused, not ignored: in a
constructor any value other than the default (and than None, 0, false, which switch a thing off), on the command line
every flag that is given.  A class with a `switch`, a field that turns all of it on, need not say so of each other one.
A bad value is a `ConfigError` that names field, value, rule and remedy.
"""

import contextlib
import dataclasses
import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from .declared import (
    OFF,
    ON,
    REQUIRED,
    Accepts,
    Option,
    Other,
    acts_beside,
    either,
    fields_of,
    in_words,
    needs,
    opt,
    plain,
)
from .errors import ConfigError, shown
from .field_help import FieldsDoc, ShortSignature
from .reprs import Shown
from .untrusted import MAX_INT

__all__ = [
    "OFF",
    "ON",
    "REQUIRED",
    "Accepts",
    "Config",
    "Option",
    "Other",
    "acting",
    "convert",
    "either",
    "fields_of",
    "in_words",
    "joined",
    "needs",
    "opt",
    "plain",
    "without_fields",
]

ConfigType = TypeVar("ConfigType", bound="Config")


def suggested(word: str, possible: list[str]) -> str:
    """Return 'did you mean X?' when something similar exists, else ''."""
    match = difflib.get_close_matches(word[:80].lower(), possible, n=1, cutoff=0.5)
    return f"did you mean {match[0]}?" if match else ""


def closest(word: str, possible: list[str]) -> str:
    """Return 'did you mean X?' when something similar exists, else the list of what is allowed."""
    return suggested(word, possible) or f"known: {', '.join(possible)}"


def convert(option: Option, value: Any) -> Any:
    """Return `value` in the type of its field, or raise `ConfigError`.

    Numbers may be strings, because YAML reads `1e-4` as a string; integers may be whole floats (`1e4`).
    """
    aliases = option.metadata.get("aliases", {})
    if isinstance(value, bool) and value in aliases:
        value = aliases[value]
    if value is None and option.optional:
        return None
    if option.many:
        value = option.metadata.get("read", lambda value: value)(value)
        single = dataclasses.replace(option, many=False, optional=False)
        return tuple(convert(single, each) for each in (value if isinstance(value, list | tuple) else (value,)))
    name, kind = option.name, option.type
    if issubclass(kind, Config):
        return _convert_config(name, kind, option.metadata.get("read", lambda value: value)(value))
    if issubclass(kind, Enum):
        text = value.value if isinstance(value, Enum) else value
        with contextlib.suppress(ValueError):  # a choice may have other names besides
            return kind(text)
        hint = suggested(str(text), list(option.choices)) or "choose one"
        raise ConfigError(f"{name} ({shown(text)}) must be one of {', '.join(option.choices)}; {hint}")
    if kind is bool:
        if isinstance(value, bool):
            return value
        raise ConfigError(f"{name} ({shown(value)}) must be true or false; write one of the two without quotes")
    if kind is str:
        if isinstance(value, str | Path):
            return str(value)
        raise ConfigError(f"{name} ({shown(value)}) must be text; put it in quotes")
    return _convert_number(name, kind, value)


def _convert_config(name: str, kind: "type[Config]", value: Any) -> "Config":
    if isinstance(value, kind):
        return value
    if not isinstance(value, Mapping):
        known = ", ".join(option.name for option in fields_of(kind))
        raise ConfigError(f"{name} ({shown(value)}) must consist of names and values; its names are {known}")
    try:
        return kind.from_dict(value)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None


def _convert_number(name: str, kind: type, value: Any) -> Any:
    try:
        if isinstance(value, bool) or value is None:
            raise TypeError
        number = _whole(value) if kind is int else float(value)
    except (TypeError, ValueError, OverflowError):
        wanted = "a whole number" if kind is int else "a number"
        example = "write digits, for example 8" if kind is int else "write digits, for example 0.001 or 1e-3"
        raise ConfigError(f"{name} ({shown(value)}) must be {wanted}; {example}") from None
    if kind is int and abs(number) >= MAX_INT:
        raise ConfigError(f"{name} ({shown(value)}) must be between -2^63 and 2^63; write a smaller number")
    return number


def _whole(value: Any) -> int:
    """Return a whole number, given as such, as text or as a float; ValueError or OverflowError for any other."""
    if isinstance(value, str):
        value = int(value) if value.strip().lstrip("+-").isdigit() else float(value)
    number = int(value)
    if number != value:
        raise ValueError
    return number


def acting(cls: type["Config"], values: Mapping[str, Any]) -> set[str]:
    """Return the names of the fields that act beside these plain values; what is not among them has its default."""
    options = {option.name: option for option in fields_of(cls)}
    given = {name: convert(options[name], value) for name, value in values.items() if name in options}
    complete = {**{name: option.default for name, option in options.items()}, **given}
    return {name for name, option in options.items() if acts_beside(option, complete)}


def joined(cls: type["Config"], recorded: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recorded values with `changes`, without those that acted before and do not act any more.

    Who switches early stopping off means its recorded patience too.  Both are plain values of fields of `cls`.
    """
    values = {**recorded, **changes}
    fallen = (acting(cls, recorded) - acting(cls, values)) & (set(recorded) - set(changes))
    return {name: value for name, value in values.items() if name not in fallen}


# -- classes ------------------------------------------------------------------------------------


class Config(Shown):
    """What all config classes share; a subclass is a frozen keyword-only dataclass with a `validate` method."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    heading: ClassVar[str] = ""  # of its flags in the help; without one, the section's name
    __signature__ = ShortSignature()
    idle_is_error: ClassVar[bool] = True  # a value that does not act is refused, wherever it comes from
    switch: ClassVar[str | None] = None  # the field beside which alone the others act

    def __init_subclass__(cls, **more: Any) -> None:
        """Let `help()` show the fields."""
        super().__init_subclass__(**more)
        cls.__doc__ = FieldsDoc(cls.__doc__)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        """Bring every value to its declared type, then check the rules."""
        for option in fields_of(type(self)):
            value = getattr(self, option.name)
            if value is None and "derive" in option.metadata:
                value = option.metadata["derive"](self)
            object.__setattr__(self, option.name, convert(option, value))
        self.validate()
        if self.idle_is_error:
            self.require_acting()

    def _says(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.said().items())

    def validate(self) -> None:
        """Raise `ConfigError` at the first broken rule."""
        raise NotImplementedError

    def require_acting(self, given: Collection[str] | None = None) -> None:
        """Raise `ConfigError` for a field without effect: one of `given`, or of all that differ from what they'd be.

        None, 0, false and empty switch a thing off; that much may always be said, unless it is in `given`.
        """
        values = {option.name: getattr(self, option.name) for option in fields_of(type(self))}
        for option in fields_of(type(self)):
            value, derive = values[option.name], option.metadata.get("derive")
            usual = option.default if derive is None else derive(self)
            said = bool(value) and value != usual if given is None else option.name in given
            if said and not acts_beside(option, values):
                raise ConfigError(
                    f"{option.name} ({in_words(value)}) acts only {needs(type(self), option)}; change that, or leave "
                    f"{option.name} out"
                )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values (enums as their names), ready for YAML or JSON."""
        return {option.name: plain(getattr(self, option.name)) for option in fields_of(type(self))}

    def said(self) -> dict[str, Any]:
        """Return the same without the fields that have their defaults."""
        options = fields_of(type(self))
        return {
            name: value
            for (name, value), option in zip(self.to_dict().items(), options, strict=True)
            if option.required or getattr(self, name) != option.default
        }

    @classmethod
    def from_dict(cls: type[ConfigType], values: Mapping[str, Any], given: Collection[str] = ()) -> ConfigType:
        """Build from plain values; an unknown or a missing key is a `ConfigError` with a suggestion.

        given  names of fields that the user has set: these must act, whatever their value
        """
        check_keys(cls, values, cls.__name__)
        missing = [option.name for option in fields_of(cls) if option.required and option.name not in values]
        if missing:
            raise ConfigError(f"{cls.__name__} lacks {', '.join(missing)}; they have no default, so give each a value")
        made = cls(**values)
        made.require_acting(given)
        return made

    def replace(self: ConfigType, **changes: Any) -> ConfigType:
        """Return a copy with some fields changed, and without the values that do not act any more.

        It is checked, and what follows from other fields derived, anew.
        """
        values = self.to_dict()
        for option in fields_of(type(self)):
            derive = option.metadata.get("derive")
            if derive is not None and values[option.name] == derive(self):
                del values[option.name]
        return type(self).from_dict(joined(type(self), values, changes))

    def _require(self, name: str, holds: bool, rule: str, remedy: str) -> None:
        if not holds:
            raise ConfigError(f"{name} ({in_words(getattr(self, name))}) must {rule}; {remedy}")

    def _require_at_least(self, least: int, *names: str) -> None:
        for name in names:
            self._require(name, getattr(self, name) >= least, f"be at least {least}", f"use {least} or more")


def without_fields(cls: type[ConfigType]) -> type[ConfigType]:
    """Make a config class of one that adds only methods to another.

    It is `dataclass`; mypy, which would forget in a frozen subclass what `Accepts` says, sees that nothing is added.
    """
    return dataclass(frozen=True, kw_only=True)(cls)


def check_keys(cls: type, values: Mapping[str, Any], where: str) -> None:
    """Raise `ConfigError` for a key that is no field."""
    known = [option.name for option in fields_of(cls)]
    for key in values:
        if key not in known:
            raise ConfigError(f"{where}: unknown key {shown(key)}; {closest(str(key), known)}")
