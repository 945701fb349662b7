"""Flags, made from the fields of the config classes: there is no other list of them.

    flag beats file beats default        --config FILE.yaml, a file with the sections of a run's config.yaml

A field `learning_rate` is the flag `--learning-rate`; a name that two sections share belongs to the first, and the
other carries its section's name (`--model-max-seq-len`).  Some flags have the ABI's short spelling too.
"""

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

from ..config import Config, Option, convert, fields_of
from ..errors import ConfigError
from ..fields import needs, plain

__all__ = ["Verb", "VerbGroup", "Verbs", "config_options", "from_flags", "given_values"]

Chosen = TypeVar("Chosen", bound=Config)

SHORT = {
    "epochs": ("-e",),
    "batch_size": ("-b",),
    "learning_rate": ("--lr",),
    "grad_accum_steps": ("--grad-accum",),
    "max_grad_norm": ("--gradient-clip",),
}


class FieldType(click.ParamType):
    """The type of one field; conversion and message are those of the config class."""

    def __init__(self, option: Option) -> None:
        """Take the type from the field."""
        self.option = option
        self.name = (
            "|".join(option.choices) if option.choices else {int: "int", float: "float"}.get(option.type, "text")
        )

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the value in the field's type."""
        try:
            return convert(self.option, value)
        except ConfigError as error:
            self.fail(str(error), param, ctx)

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """Return what is shown for a value in the help."""
        return self.name


class FieldOption(click.Option):
    """A flag that knows its section and field."""

    section = ""
    field = ""


class _Example(click.Command):
    """A command whose help opens with a call that works."""

    def __init__(self, *arguments: Any, example: str = "", **settings: Any) -> None:
        """Take click's settings and the example."""
        super().__init__(*arguments, **settings)
        self.example = example

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the example, then the usage."""
        formatter.write_usage(self.example, prefix="Example: ")
        super().format_usage(ctx, formatter)


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
                help="Show the traceback of an error.",
            )
        )

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the flags by section."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                section = param.section if isinstance(param, FieldOption) else ""
                sections.setdefault(section, []).append(record)
        for section in sorted(sections, key=lambda name: name != ""):
            title = f"{section.replace('_', ' ').capitalize()} options" if section else "Options"
            with formatter.section(title):
                formatter.write_dl(sections[section], col_max=34)


class Verbs(click.Group):
    """Several verbs: without one there is the help, for an unknown one a suggestion."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Show the help where nothing is asked for."""
        return super().parse_args(ctx, args or ["--help"])

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """Find the verb."""
        name, known = args[0], self.list_commands(ctx)
        if name not in known and not name.startswith("-"):
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
            hint = f"did you mean {close[0]}?" if close else f"the verbs are {', '.join(known)}"
            raise click.UsageError(f"unknown verb {name!r}; {hint}", ctx)
        return super().resolve_command(ctx, args)


class VerbGroup(_Example, Verbs):
    """A verb of several verbs."""


def _remember_debug(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        ctx.meta["debug"] = True


def config_options(
    sections: Mapping[str, type[Config]], defaults: Mapping[str, Mapping[str, Any]]
) -> Callable[[click.Command], click.Command]:
    """Return a decorator that adds the flags of all fields of `sections` to a verb.

    defaults[section][field] is what the help shows instead of the class's default; the flags themselves have none.
    """

    def decorate(command: click.Command) -> click.Command:
        taken = {name for param in command.params for name in param.opts}
        for section, cls in sections.items():
            for option in fields_of(cls):
                command.params.append(_flag(section, cls, option, defaults.get(section, {}), taken))
        return command

    return decorate


def _flag(section: str, cls: type[Config], option: Option, defaults: Mapping[str, Any], taken: set[str]) -> FieldOption:
    name = option.metadata.get("flag", option.name.replace("_", "-"))
    if f"--{name}" in taken:
        name = f"{section.replace('_', '-')}-{name}"
    taken.add(f"--{name}")
    short = [alias for alias in SHORT.get(option.name, ()) if alias not in taken]
    taken.update(short)
    flag, settings = f"--{name}", dict[str, Any]()
    if option.type is bool:
        flag = f"--{name}/--no-{name}"
    else:
        settings["type"] = FieldType(dataclasses.replace(option, many=False))
        settings["multiple"] = option.many
    default = defaults.get(option.name, option.default)
    shown = plain(default)
    shown = str(shown).lower() if shown in (True, False) else shown
    shown = " ".join(map(str, shown)) or None if isinstance(shown, tuple) else shown
    needed = needs(cls, option)
    help_text = option.help + (f"; acts only {needed}" if needed else "") + ("" if shown is None else f"  [{shown}]")
    made = FieldOption([*short, flag, f"{section}__{option.name}"], default=None, help=help_text, **settings)
    made.section, made.field = section, option.name
    return made


def from_flags(ctx: click.Context, section: str, cls: type[Chosen]) -> Chosen:
    """Return the configuration of a verb whose flags are all it has; ConfigError also for a flag without effect."""
    given = given_values(ctx).get(section, {})
    return cls.from_dict(given, given)


def given_values(ctx: click.Context) -> dict[str, dict[str, Any]]:
    """Return section -> field -> value of the flags that are on the command line."""
    values: dict[str, dict[str, Any]] = {}
    for param in ctx.command.params:
        name = param.name or ""
        given = ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
        if given and isinstance(param, FieldOption):
            values.setdefault(param.section, {})[param.field] = ctx.params[name]
    return values
