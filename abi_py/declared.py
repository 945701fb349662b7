"""The declared fields of config classes: what is stated of each, and when it acts beside the others.

    momentum: float = opt(0.9, "momentum of sgd (0 = off)", acts={"optimizer": OptimizerType.SGD})

`fields_of(cls)` lists name, type, default, help and choices for the command line, YAML and documentation.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from .errors import brief

__all__ = ["OFF", "ON", "REQUIRED", "Accepts", "Option", "Other", "Switch", "acts_beside", "conditions_of", "either"]
__all__ += ["fields_of", "in_words", "needs", "opt", "plain"]

REQUIRED: Any = dataclasses.MISSING


if TYPE_CHECKING:
    Has = TypeVar("Has")
    Takes = TypeVar("Takes")

    class Accepts(Generic[Has, Takes]):
        """For type checkers: a field that has the first type, and may be given as the second, which `convert` reads."""

        def __get__(self, instance: object | None, owner: type) -> Has: ...
        def __set__(self, instance: object, value: Has | Takes) -> None: ...
else:

    class Accepts:
        """When the program runs, the type that the field has."""

        def __class_getitem__(cls, types):
            return types[0]


def opt(default: Any, help: str, **meta: Any) -> Any:
    """Declare a field of a config class: default (`REQUIRED` for none), help text, and more metadata for readers.

    acts    {field: value, tuple of values, `Other(value)`, `ON` or `OFF`}: what the others must be for this one to
            have an effect; a tuple of such mappings if one of them is enough
    derive  with the default None: a function that works the value out from the fields above
    read    a function that brings other spellings to the usual one, for many values or a config class of their own
    flag    the name on the command line, if it is another one
    common  people use it: the first screen of the help has it
    path    it names a file or a directory
    names   a function that returns known values, beside which there are others (names of files): a shell offers them
    refused any value but the default is refused: no help lists it
    example of a required field: a value that is right, beside those of the others
    """
    return field(default=default, metadata={"help": help, **meta})


@dataclass(frozen=True, kw_only=True)
class Option:
    """What a reader (command line, YAML, documentation) has to know about one field."""

    name: str
    type: type  # bool, int, float, str, an Enum or a `Config`, without the `| None` and the tuple around it
    optional: bool  # None is allowed
    required: bool  # there is no default
    default: Any  # None when required
    help: str
    many: bool  # the field is a tuple of values of that type
    choices: tuple[str, ...]  # () when any value of the type is allowed
    metadata: Mapping[str, Any]


_found: dict[type, tuple[Option, ...]] = {}  # every command is made from them, dozens of times each


def fields_of(cls: type) -> tuple[Option, ...]:
    """Return the options of a config class in the order in which they are declared."""
    if cls not in _found:
        _found[cls] = _declared(cls)
    return _found[cls]


def _declared(cls: type) -> tuple[Option, ...]:
    hints, switch = typing.get_type_hints(cls), getattr(cls, "switch", None)
    options = []
    for each in dataclasses.fields(cls):
        hint, optional = hints[each.name], False
        if typing.get_origin(hint) in (typing.Union, types.UnionType):
            inner = [part for part in typing.get_args(hint) if part is not type(None)]
            hint, optional = inner[0], True
        many = typing.get_origin(hint) is tuple
        if many:
            hint = typing.get_args(hint)[0]
        choices = tuple(str(member.value) for member in hint) if issubclass(hint, Enum) else ()
        required = each.default is dataclasses.MISSING
        options.append(
            Option(
                name=each.name,
                type=hint,
                optional=optional,
                required=required,
                default=None if required else each.default,
                help=each.metadata.get("help", ""),
                many=many,
                choices=choices,
                metadata=each.metadata if switch in (None, each.name) else {"acts": {switch: ON}, **each.metadata},
            )
        )
    return tuple(options)


# -- when a field acts --------------------------------------------------------------------------


class Switch(Enum):
    """What another field must be: anything but None, 0, false and empty, or one of these."""

    ON = "on"
    OFF = "off"


ON, OFF = Switch.ON, Switch.OFF


@dataclass(frozen=True)
class Other:
    """Another field must have any value but this one."""

    value: Any


def conditions_of(option: Option) -> tuple[Mapping[str, Any], ...]:
    """Return what must hold for a field to act: one of several groups of conditions, all of a group; () = always."""
    acts = option.metadata.get("acts", ())
    return (acts,) if isinstance(acts, Mapping) else tuple(acts)


def _fits(wanted: Any, value: Any) -> bool:
    if isinstance(wanted, Switch):
        return bool(value) is (wanted is ON)
    if isinstance(wanted, Other):
        return bool(value != wanted.value)
    return value in (wanted if isinstance(wanted, tuple) else (wanted,))


def acts_beside(option: Option, values: Mapping[str, Any]) -> bool:
    """Say whether a setting acts beside the values of the others."""
    groups = conditions_of(option)
    return not groups or any(all(_fits(wanted, values[name]) for name, wanted in group.items()) for group in groups)


def needs(cls: type, option: Option, flags: Mapping[str, str] | None = None) -> str:
    """Return what a field needs in order to act, as in `with lr_schedule warmup_cosine or wsd`; '' if it always acts.

    flags  name -> flag: what a command line calls the fields, for `with --lr-schedule warmup_cosine or wsd`
    """
    kinds = {each.name: each for each in fields_of(cls)}

    def phrase(name: str, wanted: Any) -> str:
        kind = kinds[name]
        flag = f" (--{kind.metadata['flag']})" if "flag" in kind.metadata else ""
        if flags is not None:
            name, flag = flags[name], ""
            if wanted is ON and kind.type is bool:
                return f"with {name}"
        if wanted is OFF:
            return f"without {name}{flag}"
        if wanted is ON:
            number = kind.type in (int, float) and not kind.many
            value = " above 0" if number else " true" if kind.type is bool else ""
        elif isinstance(wanted, Other):
            value = f" other than {in_words(wanted.value)}"
        else:
            value = " " + either([in_words(each) for each in (wanted if isinstance(wanted, tuple) else (wanted,))])
        return f"with {name}{value}{flag}"

    groups = conditions_of(option)
    text = either([" and ".join(phrase(name, wanted) for name, wanted in group.items()) for group in groups])
    for word in (" and", " or", ","):
        text = text.replace(f"{word} with ", f"{word} ")
    return text


def plain(value: Any) -> Any:
    """Return a field's value as YAML and JSON have it."""
    if isinstance(value, tuple):
        return tuple(map(plain, value))
    return value.said() if hasattr(value, "said") else value.value if isinstance(value, Enum) else value


def in_words(value: Any) -> str:
    """Return a field's value as messages have it."""
    return ", ".join(map(in_words, value)) if isinstance(value, tuple) else brief(plain(value))


def either(values: list[str]) -> str:
    """Return 'a, b or c'."""
    return " or ".join([", ".join(values[:-1]), values[-1]]) if len(values) > 1 else "".join(values)
