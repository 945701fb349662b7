"""Flags, made from the fields of the config classes: there is no other list of them.

    flag beats file beats default        --config FILE.yaml, a file with the sections of a run's config.yaml

A field `learning_rate` is the flag `--learning-rate`; a name that two sections share belongs to the first, and the
other carries its section's name (`--model-max-seq-len`).  `SHORT` has the other spellings of flags, for all verbs.
What a flag says of itself comes from its field too: help, default, whether it is `common` and stands on the first
screen, whether any value is refused, so that no help lists it, and what else must be given for it to act.
"""

import dataclasses
import difflib
import os
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from ..config import Config, Option, convert, fields_of
from ..errors import ConfigError
from ..fields import needs, plain
from ..files import check_place
from ..runs.shipped import place_of
from .help import ALL, HelpContext, Row, help_all_option, lines_of, write_columns

__all__ = [
    "OutputPath",
    "PathType",
    "RareOption",
    "Verb",
    "VerbGroup",
    "Verbs",
    "config_options",
    "data_argument",
    "from_flags",
    "given_values",
    "type_of",
]

Chosen = TypeVar("Chosen", bound=Config)

# Other spellings of a flag, by its name, in every verb that has it; shown beside it.
SHORT = {
    "epochs": ("-e",),
    "batch-size": ("-b",),
    "learning-rate": ("--lr",),
    "grad-accum-steps": ("--grad-accum",),
    "max-grad-norm": ("--gradient-clip",),
    "prompt": ("-p",),
    "format": ("--to",),
}


class FieldType(click.ParamType):
    """The type of one field; conversion and message are those of the config class."""

    def __init__(self, option: Option) -> None:
        """Take the type from the field."""
        self.option, self.choices = option, option.choices
        self.name = option.type.__name__.lower()

    @property
    def value_name(self) -> str:
        """What stands for a value in the help."""
        return "PATH" if self.option.metadata.get("path") else {int: "N", float: "X"}.get(self.option.type, "TEXT")

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the value in the field's type."""
        if value == "" and self.option.metadata.get("path"):
            self.fail("'' is no path; give the name of a file or directory", param, ctx)
        try:
            return convert(self.option, value)
        except ConfigError as error:
            self.fail(str(error), param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Return the values that a shell offers: choices, or the names of files, which it finds itself."""
        if self.option.metadata.get("path"):
            return [CompletionItem(incomplete, type="file")]
        names = self.option.metadata.get("names")
        offered = [
            CompletionItem(word) for word in (names() if names else self.choices) if word.startswith(incomplete)
        ]
        return [*offered, CompletionItem(incomplete, type="file")] if names else offered


class PathType(click.Path):
    """A path that is not empty: an empty one would be the current directory."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path."""
        if value == "":
            self.fail("'' is no path; give the name of a file or directory", param, ctx)
        return super().convert(value, param, ctx)


class OutputPath(PathType):
    """A path that is written to: where nothing can be made is said before anything is done."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path; ConfigError if it is not there, and cannot be made."""
        path = super().convert(value, param, ctx)
        name = "out" if param is None or param.name in (None, "output") else str(param.name)
        if not os.path.isdir(path):  # whose own parent need not be written to
            check_place(name, path)
        return path


class DataPath(PathType):
    """A path of data that must exist; the name of data that come with the package, builtin:deepzig, is their path."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path; ConfigError for an unknown name."""
        return super().convert(place_of(value), param, ctx)


def type_of(cls: type[Config], field: str) -> FieldType:
    """Return the type of a field, for a flag of a verb that has not the whole section."""
    return FieldType(next(option for option in fields_of(cls) if option.name == field))


class FieldOption(click.Option):
    """A flag that knows its section and field."""

    section = field = heading = ""
    common = False  # on the first screen of the help
    text = default_text = ""  # what it says, and the default of its verb
    aliases: Collection[str] = ()  # spellings that the first screen does not show


class RareOption(click.Option):
    """A flag that is no field, and not on the first screen of the help."""


class FieldArgument(click.Argument):
    """Words without a flag in front of them that set a field, as its flag does."""

    section = field = ""


class _Example(click.Command):
    """A command whose help has a call that works."""

    context_class = HelpContext

    def __init__(self, *arguments: Any, example: str = "", **settings: Any) -> None:
        """Take click's settings and the example."""
        super().__init__(*arguments, **settings)
        self.example = example

    def get_help_option_names(self, ctx: click.Context) -> list[str]:
        """Return -h and --help whoever asks first: click keeps what comes of the first context."""
        return ["-h", "--help"]

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the usage, then the example."""
        super().format_usage(ctx, formatter)
        formatter.write_usage(self.example, prefix="Example: ")


class Verb(_Example):
    """A verb: its help lists the flags of each config section under a heading."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        """Take click's settings and the example."""
        super().__init__(*arguments, **settings)
        self.params.append(
            click.Option(
                ["--debug"],
                is_flag=True,
                expose_value=False,
                callback=_remember_debug,
                help="show the traceback of an error",
            )
        )

    @property
    def has_sections(self) -> bool:
        """Whether there is more to show than fits a screen."""
        return any(isinstance(param, FieldOption) for param in self.params)

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Return the parameters: of a verb with sections also the flag for all of its help."""
        params = super().get_params(ctx)
        return [*params[:-1], help_all_option(), params[-1]] if self.has_sections else params

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the flags by heading: those that people use, or all of them."""
        everything = not self.has_sections or bool(ctx.meta.get(ALL))
        fallen = set() if everything else {"--debug", "--help"}
        sections: dict[str, list[Row]] = {}
        last: list[Row] = []
        for param in self.get_params(ctx):
            if not isinstance(param, click.Option) or param.hidden:
                continue
            if isinstance(param, FieldOption):
                if everything or param.common:
                    row = lines_of(param, everything, param.text, param.default_text)
                    sections.setdefault(param.heading, []).append(row)
                continue
            if fallen & set(param.opts) or (isinstance(param, RareOption) and not everything):
                continue
            text, _, default = (param.help or "").partition("  [")
            row = lines_of(param, everything, text, default.removesuffix("]"))
            (last if {"--debug", "--help", "--help-all"} & set(param.opts) else sections.setdefault("", [])).append(row)
        own = sections.pop("", [])
        write_columns(formatter, [("Options", [*own, *last]), *sections.items()])


class Verbs(click.Group):
    """Several verbs: without one there is the help, for an unknown one a suggestion."""

    context_class = HelpContext

    def headings(self, ctx: click.Context) -> Mapping[str, Collection[str]]:
        """Return the verbs under their headings."""
        return {"Verbs": self.list_commands(ctx)}

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the verbs by heading, and the flags."""
        groups: list[tuple[str, list[Row]]] = []
        for heading, names in self.headings(ctx).items():
            verbs = [(name, self.get_command(ctx, name)) for name in names]
            groups.append((heading, [(name, verb.get_short_help_str(100)) for name, verb in verbs if verb is not None]))
        flags = [param for param in self.get_params(ctx) if isinstance(param, click.Option)]
        groups.append(("Options", [lines_of(param, True, param.help or "") for param in flags]))
        write_columns(formatter, groups)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Show the help where nothing is asked for."""
        return super().parse_args(ctx, args or ["--help"])

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """Find the verb."""
        name, known = args[0], self.list_commands(ctx)
        if name not in known and not name.startswith("-"):
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
            hint = f"did you mean {close[0]}?" if close else f"the verbs are {', '.join(known)}"
            raise click.UsageError(f"unknown verb {name!r}; {self.verb_for(name) or hint}", ctx)
        return super().resolve_command(ctx, args)

    def verb_for(self, word: str) -> str:
        """Return what to say where a verb was left out before this word; '' if none was."""
        return ""


class VerbGroup(_Example, Verbs):
    """A verb of several verbs."""


def _remember_debug(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        ctx.meta["debug"] = True


def config_options(
    sections: Mapping[str, type[Config]],
    defaults: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    rare: Collection[str] = (),
    refused: Collection[str] = (),
    aliases: Mapping[tuple[str, str], str] | None = None,
    arguments: Mapping[tuple[str, str], str] | None = None,
) -> Callable[[click.Command], click.Command]:
    """Return a decorator that adds the flags of all fields of `sections` to a verb.

    defaults  [section][field] is what the help shows instead of the class's default, which the flags never have; None
              shows none: what is not given stays as it is
    rare      sections, or fields, which this verb does not show on the first screen
    refused   those of which this verb refuses any value: they answer, and no help lists them
    aliases   (section, field) -> another spelling, which this verb alone has
    arguments (section, field) -> the word without a flag that sets it in this verb (`field_argument`): it has no flag
    """

    def decorate(command: click.Command) -> click.Command:
        taken = {name for param in command.params for name in param.opts}
        for section, cls in sections.items():
            made = {option.name: _flag(section, option, taken, aliases or {}) for option in fields_of(cls)}
            words = {name: word for (own, name), word in (arguments or {}).items() if own == section}
            spelled = {name: each.opts[-1] for name, each in made.items()} | words
            for option in sorted(fields_of(cls), key=lambda option: option.name != cls.switch):
                flag, names = made[option.name], {section, option.name}
                default = "" if defaults is None else _default(option, defaults.get(section, {}))
                needed = needs(cls, option, spelled)
                flag.text = in_flags(option.help, spelled) + (f"; acts only {needed}" if needed else "")
                flag.default_text = in_flags(default, spelled)
                flag.help = flag.text + (f"  [{flag.default_text}]" if default else "")
                flag.heading = cls.heading or f"{section.replace('_', ' ').capitalize()}"
                flag.hidden = bool(option.metadata.get("refused") or names & set(refused))
                flag.common = bool(option.metadata.get("common")) and not flag.hidden and not names & set(rare)
                if option.name not in words:
                    command.params.append(flag)
        return command

    return decorate


def in_flags(text: str, spelled: Mapping[str, str]) -> str:
    """Return a text about fields in the words of a command line: `--hidden-dim / --num-heads`."""
    return re.sub(r"\b[a-z]+(_[a-z]+)+\b", lambda match: spelled.get(match[0], match[0]), text)


def _flag(section: str, option: Option, taken: set[str], aliases: Mapping[tuple[str, str], str]) -> FieldOption:
    name = option.metadata.get("flag", option.name.replace("_", "-"))
    if f"--{name}" in taken:
        name = f"{section.replace('_', '-')}-{name}"
    taken.add(f"--{name}")
    own = [aliases[section, option.name]] if (section, option.name) in aliases else []
    short = [alias for alias in (*SHORT.get(name, ()), *own) if alias not in taken]
    taken.update(short)
    flag, settings = f"--{name}", dict[str, Any]()
    if option.type is bool:
        flag = f"--{name}/--no-{name}"
    else:
        settings["type"] = FieldType(dataclasses.replace(option, many=False))
        settings["multiple"] = option.many
    made = FieldOption([*short, flag, f"{section}__{option.name}"], default=None, **settings)
    made.section, made.field, made.aliases = section, option.name, own
    return made


def _default(option: Option, defaults: Mapping[str, Any]) -> str:
    """Return what the help shows for a flag that is not given."""
    value = plain(defaults.get(option.name, option.default))
    if option.type is bool and isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return "" if value is None else str(value).removesuffix(".0")


def data_argument(section: str, field: str) -> Callable[[click.Command], click.Command]:
    """Return a decorator that lets words without a flag set a field of many values: `run a.txt b.txt`."""

    def decorate(command: click.Command) -> click.Command:
        made = FieldArgument([f"{section}__{field}__words"], nargs=-1, metavar="[DATA]...", type=PathType())
        made.section, made.field = section, field
        command.params.insert(0, made)
        return command

    return decorate


def field_argument(section: str, field: str, metavar: str) -> Callable[[click.Command], click.Command]:
    """Return a decorator that lets the first word without a flag set a field that has no flag (`config_options`)."""

    def decorate(command: click.Command) -> click.Command:
        made = FieldArgument([f"{section}__{field}"], metavar=metavar, type=PathType(exists=True))
        made.section, made.field = section, field
        command.params.insert(0, made)
        return command

    return decorate


def from_flags(ctx: click.Context, section: str, cls: type[Chosen]) -> Chosen:
    """Return the configuration of a verb whose flags are all it has; ConfigError also for a flag without effect."""
    given = given_values(ctx).get(section, {})
    return cls.from_dict(given, given)


def given_values(ctx: click.Context) -> dict[str, dict[str, Any]]:
    """Return section -> field -> value of what is on the command line; ConfigError for what is there in two ways."""
    values: dict[str, dict[str, Any]] = {}
    for param in ctx.command.params:
        name = param.name or ""
        given = ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
        if given and isinstance(param, FieldOption):
            values.setdefault(param.section, {})[param.field] = ctx.params[name]
    for param in ctx.command.params:
        words = ctx.params.get(param.name or "")
        if words and isinstance(param, FieldArgument):
            section = values.setdefault(param.section, {})
            if param.field in section:
                flag = next(each.opts[-1] for each in ctx.command.params
                            if isinstance(each, FieldOption) and each.field == param.field)  # fmt: skip
                raise ConfigError(
                    f"data must be given in one way: {' '.join(words)} is there as words, "
                    f"{' '.join(section[param.field])} by {flag}; leave {flag} out, and name all of them"
                )
            section[param.field] = words
    return values
