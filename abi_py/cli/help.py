"""What `--help` shows: the call, an example of it that works, what it does, and the flags under their headings.

`--help` is one screen, with the flags that people use and the first clause of what each says, without what is in
brackets; `--help-all` has all of them, whole.  Lines are as wide as the terminal, up to `WIDEST`, and broken between
words alone: whoever copies `warmup_cosine` or `abi-llama` finds it in one piece.
"""

import re
import textwrap
from collections.abc import Iterable, Sequence

import click

from ..fields import either

__all__ = ["ALL", "HelpContext", "Row", "choices_of", "help_all_option", "label_of", "lines_of", "write_columns"]

WIDEST = 100  # columns; longer lines are hard to read
LABEL = 25  # columns of a flag and its value; a longer one has a line of its own
ALL = "help_all"  # in a context's meta: everything is asked for

Row = tuple[str, str]


def _wrap(text: str, width: int, indent: str = "") -> str:
    wide = max(width, len(indent) + 20)
    return textwrap.fill(
        " ".join(text.split()),
        wide,
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


class HelpFormatter(click.HelpFormatter):
    """Click's formatter, which breaks lines between words alone."""

    def write_usage(self, prog: str, args: str = "", prefix: str | None = None) -> None:
        """Write the call."""
        self.write(_wrap(f"{prefix or 'Usage: '}{prog} {args}", self.width) + "\n")

    def write_text(self, text: str) -> None:
        """Write paragraphs."""
        indent = " " * self.current_indent
        paragraphs = [part for part in text.split("\n\n") if part.strip()]
        self.write("\n\n".join(_wrap(part, self.width, indent) for part in paragraphs) + "\n")


def write_columns(formatter: click.HelpFormatter, groups: Iterable[tuple[str, Sequence[Row]]]) -> None:
    """Write several lists of names and what they say under their headings, all with the same columns."""
    found = [(heading, rows) for heading, rows in groups if rows]
    labels = [len(label) for _, rows in found for label, _ in rows]
    column = max((size for size in labels if size <= LABEL), default=0)
    for heading, rows in found:
        formatter.write(f"\n{heading}:\n")
        for label, text in rows:
            said = _wrap(text, formatter.width, " " * (column + 4))
            if len(label) > column:
                formatter.write(f"  {label}\n{said}\n")
            else:
                formatter.write(f"  {label:<{column}}  {said.lstrip()}\n")


class HelpContext(click.Context):
    """A context whose help is written in this way."""

    formatter_class = HelpFormatter

    def make_formatter(self) -> click.HelpFormatter:
        """Return a formatter as wide as the terminal, within bounds."""
        return HelpFormatter(max_width=WIDEST)


# -- a flag --------------------------------------------------------------------------------------

_OURS = {"Show this message and exit.": "show this message"}  # what click says of its own flags
_VALUES: dict[type[click.ParamType], str] = {
    click.types.IntParamType: "N",
    click.types.FloatParamType: "X",
    click.Path: "PATH",
    click.File: "PATH",
}


def choices_of(kind: click.ParamType) -> tuple[str, ...]:
    """Return the values that a parameter may have; () if there is no list of them."""
    return tuple(map(str, getattr(kind, "choices", ())))


def _value_of(param: click.Option) -> str:
    """Return what stands for the value."""
    if param.metavar:
        return param.metavar
    own = getattr(param.type, "value_name", None)
    return own or next((name for kind, name in _VALUES.items() if isinstance(param.type, kind)), "TEXT")


def label_of(param: click.Option, names: Sequence[str]) -> tuple[str, bool]:
    """Return how a flag is written, of which `names` are shown, and whether its choices are in that already."""
    if param.secondary_opts:
        return ", ".join([*names[:-1], f"--[no-]{names[-1].removeprefix('--')}"]), True
    spelled = ", ".join(names)
    if param.is_flag or param.count:
        return spelled, True
    choices = choices_of(param.type)
    inside = f"{spelled} {'|'.join(choices)}"
    if choices and len(inside) <= LABEL:
        return inside, True
    return f"{spelled} {'NAME' if choices else _value_of(param)}", not choices


def lines_of(param: click.Option, whole: bool, text: str, default: str = "") -> Row:
    """Return a flag and what is said of it: the first clause, or the whole; then choices and default."""
    spelled = [name for name in param.opts if whole or name not in getattr(param, "aliases", ())]
    words = [name for name in spelled if not name.startswith("--")]
    words += [name for name in spelled if name.startswith("--")][: None if whole else 1]
    label, told = label_of(param, words)
    text = _OURS.get(text, text)
    head, semicolon, rest = text.partition(";")
    names = either(list(choices_of(param.type)))
    listed = "" if told else f" ({names})" if ":" in head else f": {names}"
    said = head + listed + semicolon + rest if whole else re.sub(r" \([^)]*\)", "", head) + listed
    return label, said + (f"  [{default}]" if default else "")


def help_all_option() -> click.Option:
    """Return the flag that shows the whole help."""

    def show(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        if value and not ctx.resilient_parsing:
            ctx.meta[ALL] = True
            click.echo(ctx.get_help(), color=ctx.color)
            ctx.exit()

    return click.Option(
        ["--help-all"],
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=show,
        help="show every flag, and all there is to say about it",
    )
