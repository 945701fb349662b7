"""Jinja for templates that strangers wrote: no way out of the sandbox, and no endless memory or time.

A template is a program by the maker of the model.  Jinja's immutable sandbox keeps it from Python's insides; but
`'a' * 2000000000`, `'%1000000000d' % 1` or three nested loops are all it takes to stop a machine.  So a rendering has
a number of *steps*, which grows with the conversation, and everything that can be long is paid for before it is done:

    one step       a pass through a loop or macro (more if its body is long), an element of a sequence
    four steps     a call
    one step       16 characters of text that are made, compared, searched or written
    all of it      where a value is written, compared or hashed: every element inside of it, as often as it is there

A count, and not a clock: the same template fails or passes on every machine, in any thread.  What a step takes is
about a microsecond at most.

    template_meter.py   the steps that are left
    template_tree.py    the syntax tree gets a step in each loop, and a weighing before comparisons and slices
    template_costs.py   what operators, calls, filters and tests make; they go through the environment, here
"""

import contextlib
import functools
import json
import re
import string
import types
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes as nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox

from ..errors import ConfigError
from .marks import ANSWER_BEGINS, ANSWER_ENDS
from .template_costs import metered_filters, metered_tests, pay_method, pay_percent, pay_power, pay_product
from .template_meter import METER, Meter, StepsExceeded, check_number
from .template_tree import HIDDEN_FILTERS, Steps

__all__ = ["StepsExceeded", "environment", "line_of", "render", "written"]

OLDEST_JINJA = (3, 1, 6)  # before it, `|attr` leads out of the sandbox (CVE-2025-27516)

_VALUES = (str, bytes, list, tuple, dict, int, float, type)
_DIGITS = re.compile(r"\d+")


# -- rendering ---------------------------------------------------------------------------------


def render(template: jinja2.Template, values: Mapping[str, Any]) -> str:
    """Return what a template of `environment` writes.

    StepsExceeded; Jinja's errors; Python's own, of what the template does.
    """
    with _metered(values):
        return "".join(template.root_render_func(template.new_context(dict(values))))


def written(template: jinja2.Template, values: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Return the pieces of text that a template writes, each with its line in the template; errors of `render`."""
    with _metered(values):
        stream: Any = template.root_render_func(template.new_context(dict(values)))
        return [(text, template.get_corresponding_lineno(stream.gi_frame.f_lineno)) for text in stream]


@contextlib.contextmanager
def _metered(values: Mapping[str, Any]) -> Iterator[None]:
    token = METER.set(Meter(values))
    try:
        yield
    finally:
        METER.reset(token)


def line_of(template: jinja2.Template, error: BaseException) -> int:
    """Return the line of the template at which an error came up."""
    line, trace = 1, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == template.root_render_func.__code__.co_filename:
            line = template.get_corresponding_lineno(trace.tb_lineno)
        trace = trace.tb_next
    return line


# -- operators and calls -----------------------------------------------------------------------


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox with a meter at every operator, call, filter and test."""

    intercepted_binops = frozenset(jinja2.sandbox.SandboxedEnvironment.default_binop_table)

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        """Pay for the result, then compute it."""
        meter = METER.get()
        if operator == "*":
            pay_product(meter, left, right)
        elif operator == "%" and isinstance(left, str):
            pay_percent(meter, left, right if isinstance(right, tuple) else (right,))
        elif operator == "**":
            pay_power(left, right)
        made = self.binop_table[operator](left, right)
        if isinstance(made, int):
            check_number(made.bit_length())
        elif operator == "%":
            return meter.made(made)
        return made

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Pay for the call of a method of a value; what a macro does, its body pays."""
        meter = METER.get()
        meter.spend(4)
        if isinstance(__obj, types.BuiltinMethodType) and isinstance(__obj.__self__, _VALUES):
            args = tuple(list(meter.made(arg)) if hasattr(arg, "__next__") else arg for arg in args)
            pay_method(meter, __obj.__name__, __obj.__self__, args, kwargs)
            return meter.made(super().call(__context, __obj, *args, **kwargs))
        if __obj is dict or getattr(__obj, "__name__", "") in ("changed", _raise_exception.__name__):
            meter.weigh([*args, *kwargs.values()])
        return super().call(__context, __obj, *args, **kwargs)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """Pay for a key that is hashed or, if it is wrong, written into a message."""
        if isinstance(argument, list | tuple | dict):
            METER.get().weigh(argument)
        return super().getitem(obj, argument)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Return str.format of the sandbox, paid for."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        pattern: str = value.__self__

        def paid(*args: Any, **kwargs: Any) -> str:
            meter = METER.get()
            meter.weigh([pattern, *args, *kwargs.values()])
            widths = [spec for _, _, spec, _ in string.Formatter().parse(pattern) if spec]
            numbers = [int(digits) for spec in widths for digits in _DIGITS.findall(spec)]
            if any("{" in spec for spec in widths):
                numbers += [arg for arg in (*args, *kwargs.values()) if isinstance(arg, int)]
            meter.text(sum(map(abs, numbers)))
            return str(meter.made(wrapped(*args, **kwargs)))

        return paid

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        return Steps(self).visit(tree)  # type: ignore[no-any-return]


# -- what templates see ------------------------------------------------------------------------


@functools.cache
def environment(marking: bool) -> jinja2.Environment:
    """Return the sandbox; if `marking`, generation blocks put marks around what they render.

    ConfigError if Jinja is too old to be one.
    """
    if tuple(map(int, re.findall(r"\d+", jinja2.__version__)[:3])) < OLDEST_JINJA:
        oldest = ".".join(map(str, OLDEST_JINJA))
        raise ConfigError(f"jinja2 ({jinja2.__version__}) must be {oldest} or newer: earlier ones let templates out")

    class Generation(jinja2.ext.Extension):
        tags = {"generation"}  # noqa: RUF012 (Jinja wants it so)

        def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

        def _mark(self, caller: Any) -> str:
            text = str(caller())
            return f"{ANSWER_BEGINS}{text}{ANSWER_ENDS}" if marking else text

    made = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, jinja2.ext.loopcontrols],
        optimized=False,  # nothing is computed while compiling, where nobody pays
    )
    made.filters["tojson"] = _tojson
    made.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    del made.globals["lipsum"]
    made.filters = {**metered_filters(made.filters), **HIDDEN_FILTERS}
    made.tests = metered_tests(made.tests)
    return made


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
