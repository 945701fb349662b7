"""Jinja for templates of others: no way out of the sandbox, and no end of memory or time.

A template is a program by the maker of the model.  Jinja's immutable sandbox keeps it from Python's insides; but
`'a' * 2000000000`, `'%1000000000d' % 1` or three nested loops are all it takes to stop a machine.  So a rendering has
a number of *steps*, which grows with the conversation, and everything that can be long is paid for before it is done:

    one step       a pass through a loop or macro (more if its body is long), an element of a sequence
    four steps     a call
    one step       16 characters of text that are made, compared, searched or written
    all of it      where a value is written, compared or hashed: every element inside of it, as often as it is there

A count, and not a clock: the same template fails or passes on every machine, in any thread.  What a step takes is
about a microsecond at most.  The parts: the syntax tree gets a step in each loop, and a weighing before comparisons
and slices; operators, calls, filters and tests go through the environment, which knows what each of them makes.
"""

import functools
import json
import re
import string
import types
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from datetime import datetime
from typing import Any, TypeVar

import jinja2
import jinja2.ext
import jinja2.nodes as nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils
import jinja2.visitor

from ..errors import ConfigError
from .chat_encoding import ANSWER_BEGINS, ANSWER_ENDS

__all__ = ["StepsExceeded", "environment", "line_of", "render", "written"]

STEPS = 500_000  # of a rendering without a conversation
STEPS_EACH = 4_000  # more for each element, and each 16 characters, of the conversation: loops in loops over it
CHARACTERS = 16  # in a step
LONGEST_NUMBER = 1 << 16  # bits
OLDEST_JINJA = (3, 1, 6)  # before it, `|attr` leads out of the sandbox (CVE-2025-27516)

_VIEWS: Any = (list, tuple, set, frozenset, type({}.keys()), type({}.values()), type({}.items()))
_TEXT = (str, bytes)
_ONLY_TEXT = {str}
_VALUES = (str, bytes, list, tuple, dict, int, float, type)
_PERCENT = re.compile(r"%(?:\([^)]*\))?[#0\- +]*(\*|\d+)?(?:\.(\*|\d+))?")
_DIGITS = re.compile(r"\d+")


class StepsExceeded(Exception):
    """A template takes more steps than its conversation explains."""


class _Meter:
    """The steps that a rendering has left."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        """Give as many steps as the values explain."""
        self._known: dict[int, int] = {}  # what containers of the conversation weigh: they live as long as this
        self.left = STEPS + STEPS_EACH * sum(self._measure(value) for value in values.values())

    def _measure(self, value: Any) -> int:
        if isinstance(value, str):
            return 1 + len(value) // CHARACTERS
        if not isinstance(value, dict | list | tuple):
            return 1
        weight = 1
        for part in (*value, *value.values()) if isinstance(value, dict) else value:
            weight += 1 + len(part) // CHARACTERS if type(part) is str else self._measure(part)
        self._known[id(value)] = weight
        return weight

    def spend(self, steps: int) -> None:
        """Take steps away; StepsExceeded if there are not so many."""
        self.left -= steps
        if self.left < 0:
            raise StepsExceeded

    def text(self, length: int) -> None:
        """Pay for a text of so many characters."""
        self.spend(1 + length // CHARACTERS)

    def weigh(self, value: Any) -> Any:
        """Pay for every element inside of a value, and return it."""
        if type(value) is str:
            self.left -= 1 + len(value) // CHARACTERS
            if self.left < 0:
                raise StepsExceeded
            return value
        waiting: list[Any] = [value]
        while waiting:
            part: Any = waiting.pop()
            if type(part) is int:
                self.spend(1 + part.bit_length() // 128)
            elif isinstance(part, _TEXT):
                self.spend(1 + len(part) // CHARACTERS)
            elif (known := self._known.get(id(part))) is not None:
                self.spend(known)
            elif isinstance(part, dict):
                self.spend(1 + len(part))
                waiting += [*part, *part.values()]
            elif isinstance(part, _VIEWS):
                self.spend(1 + len(part))
                waiting += part
            elif isinstance(part, jinja2.utils.Namespace):
                self.spend(1)
                waiting.append(part._Namespace__attrs)  # type: ignore[attr-defined]
            else:
                self.spend(1)
        return value

    def length(self, value: Any) -> None:
        """Pay for the elements of a sequence, not for what is inside of them."""
        if isinstance(value, str | bytes):
            self.text(len(value))
        elif hasattr(value, "__len__"):
            self.spend(1 + len(value))

    def made(self, value: Any) -> Any:
        """Pay for what an operation has made, and return it; an iterator pays as it goes."""
        if isinstance(value, str | bytes | list | tuple | dict):
            self.length(value)
        elif hasattr(value, "__next__"):
            return self._counted(value)
        return value

    def _counted(self, values: Iterator[Any]) -> Iterator[Any]:
        for value in values:
            self.spend(1)
            yield value


_Made = TypeVar("_Made")
_METER: ContextVar[_Meter] = ContextVar("steps of the rendering")


# -- rendering ---------------------------------------------------------------------------------


def render(template: jinja2.Template, values: Mapping[str, Any]) -> str:
    """Return what a template of `environment` writes.

    StepsExceeded; Jinja's errors; Python's own, of what the template does.
    """
    return _with_meter(values, lambda: "".join(template.root_render_func(template.new_context(dict(values)))))


def written(template: jinja2.Template, values: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Return the pieces of text that a template writes, each with its line in the template; errors of `render`."""

    def pieces() -> list[tuple[str, int]]:
        stream: Any = template.root_render_func(template.new_context(dict(values)))
        return [(text, template.get_corresponding_lineno(stream.gi_frame.f_lineno)) for text in stream]

    return _with_meter(values, pieces)


def _with_meter(values: Mapping[str, Any], work: Callable[[], _Made]) -> _Made:
    token = _METER.set(_Meter(values))
    try:
        return work()
    finally:
        _METER.reset(token)


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
        meter = _METER.get()
        if operator == "*":
            _pay_product(meter, left, right)
        elif operator == "%" and isinstance(left, str):
            _pay_percent(meter, left, right if isinstance(right, tuple) else (right,))
        elif operator == "**":
            _pay_power(left, right)
        made = self.binop_table[operator](left, right)
        if isinstance(made, int):
            _check_number(made.bit_length())
        elif operator == "%":
            return meter.made(made)
        return made

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Pay for the call of a method of a value; what a macro does, its body pays."""
        meter = _METER.get()
        meter.spend(4)
        if isinstance(__obj, types.BuiltinMethodType) and isinstance(__obj.__self__, _VALUES):
            args = tuple(list(meter.made(arg)) if hasattr(arg, "__next__") else arg for arg in args)
            _pay_method(meter, __obj.__name__, __obj.__self__, args, kwargs)
            return meter.made(super().call(__context, __obj, *args, **kwargs))
        if __obj is dict or getattr(__obj, "__name__", "") in ("changed", _raise_exception.__name__):
            meter.weigh([*args, *kwargs.values()])
        return super().call(__context, __obj, *args, **kwargs)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """Pay for a key that is hashed or, if it is wrong, written into a message."""
        if isinstance(argument, list | tuple | dict):
            _METER.get().weigh(argument)
        return super().getitem(obj, argument)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Return str.format of the sandbox, paid for."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        pattern: str = value.__self__

        def paid(*args: Any, **kwargs: Any) -> str:
            meter = _METER.get()
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
        return _Steps(self).visit(tree)  # type: ignore[no-any-return]


def _check_number(bits: int) -> None:
    if bits > LONGEST_NUMBER:
        raise StepsExceeded


def _pay_product(meter: _Meter, left: Any, right: Any) -> None:
    for value, times in ((left, right), (right, left)):
        if isinstance(value, str | bytes) and isinstance(times, int):
            meter.text(len(value) * max(times, 0))
        elif isinstance(value, list | tuple) and isinstance(times, int):
            meter.spend(len(value) * max(times, 0))


def _pay_power(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        _check_number(left.bit_length() * max(right, 0))


def _pay_percent(meter: _Meter, pattern: str, values: Any) -> None:
    meter.weigh(pattern)
    meter.weigh(values)
    found = [number for pair in _PERCENT.findall(pattern) for number in pair if number]
    lengths = [int(number) for number in found if number != "*"]
    if "*" in found:
        lengths += [abs(value) for value in values if isinstance(value, int)]
    meter.text(sum(lengths))


def _pay_method(meter: _Meter, name: str, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Pay for a method of a str, a list, a dict or a number, by what it may make of them."""
    if args or kwargs:
        meter.weigh([*args, *kwargs.values()])
    if isinstance(value, str | bytes):
        meter.text(len(value))
        if name in ("center", "ljust", "rjust", "zfill"):
            meter.text(sum(arg for arg in (*args, *kwargs.values()) if isinstance(arg, int)))
        elif name == "expandtabs":
            widths = [abs(arg) for arg in (*args, *kwargs.values()) if isinstance(arg, int)]
            meter.text(len(value) * max(widths, default=8))
        elif name == "replace" and len(args) >= 2:
            _pay_replace(meter, value, *args[:2])
        elif name == "join" and args and hasattr(args[0], "__len__"):
            meter.text(len(value) * len(args[0]))
        elif name == "translate" and args and isinstance(args[0], dict):
            meter.text(len(value) * max((len(to) for to in args[0].values() if isinstance(to, str)), default=1))
    elif isinstance(value, list | tuple):
        meter.weigh(value)  # count and index compare
    elif isinstance(value, dict):
        meter.length(value)
    elif name == "to_bytes":
        meter.text(sum(abs(arg) for arg in (*args, *kwargs.values()) if isinstance(arg, int)))


def _pay_replace(meter: _Meter, value: Any, old: Any, new: Any) -> None:
    if isinstance(value, str | bytes) and isinstance(old, type(value)) and isinstance(new, type(value)):
        meter.text(len(value) + value.count(old) * len(new))  # type: ignore[arg-type]


# -- filters and tests -------------------------------------------------------------------------


def _pay_all(meter: _Meter, *values: Any, **named: Any) -> None:
    for value in (*values, *named.values()):
        meter.weigh(value)


def _pay_length(meter: _Meter, value: Any = None, *_: Any, **__: Any) -> None:
    meter.length(value)


def _pay_width(meter: _Meter, value: Any = "", width: Any = 80, *_: Any, **__: Any) -> None:
    meter.weigh(value)
    meter.text(max(int(width), 0))


def _pay_indent(meter: _Meter, value: Any = "", width: Any = 4, *_: Any, **__: Any) -> None:
    meter.weigh(value)
    meter.text((1 + str(value).count("\n")) * (len(width) if isinstance(width, str) else max(int(width), 0)))


def _pay_join(meter: _Meter, value: Any = (), d: Any = "", *_: Any, **__: Any) -> None:
    meter.weigh(value)
    meter.text(len(value) * len(str(d)))


def _pay_filter_replace(meter: _Meter, value: Any, old: Any, new: Any, *_: Any, **__: Any) -> None:
    meter.weigh([value, old, new])
    _pay_replace(meter, str(value), str(old), str(new))


def _pay_filter_format(meter: _Meter, value: Any, *args: Any, **kwargs: Any) -> None:
    meter.weigh(value)
    _pay_percent(meter, str(value), [*args, *kwargs.values()])


def _pay_wrap(meter: _Meter, value: Any = "", *args: Any, **named: Any) -> None:
    meter.weigh([value, *args, *named.values()])
    longest = max((len(arg) for arg in (*args, *named.values()) if isinstance(arg, str)), default=1)
    meter.spend(len(str(value)) * (1 + longest // CHARACTERS))


def _pay_fill(meter: _Meter, value: Any = (), count: Any = 1, fill_with: Any = None) -> None:
    meter.length(value)
    meter.spend(int(count) if fill_with is not None else 1)


def _pay_json(
    meter: _Meter,
    value: Any = None,
    ensure_ascii: Any = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: Any = False,
) -> None:
    before = meter.left
    meter.weigh(value)
    elements = before - meter.left
    width = len(indent) if isinstance(indent, str) else max(int(indent or 0), 0)
    meter.text(elements * width * min(elements, 1000))  # a line for each, indented by its depth
    meter.text(elements * sum(map(len, separators or ())))


def _pay_sum(meter: _Meter, value: Any = (), attribute: Any = None, start: Any = 0) -> None:
    meter.weigh([value, start])
    if not isinstance(start, int | float):  # lists added to lists, each time all of it
        before = meter.left
        meter.weigh(value)
        meter.spend((before - meter.left) * len(value))


def _pay_sorted(meter: _Meter, value: Any = (), *more: Any, **named: Any) -> None:
    meter.weigh(more)
    for _ in range(16):  # comparisons of each element
        meter.weigh(value)


def _pay_tags(meter: _Meter, value: Any = "", *_: Any, **__: Any) -> None:
    meter.weigh(value)
    meter.text(len(str(value)) * str(value).count("<"))


_FILTERS: dict[str, Callable[..., None]] = {
    **dict.fromkeys(("length", "count", "list", "first", "last", "map", "select", "reject"), _pay_length),
    **dict.fromkeys(("selectattr", "rejectattr", "default", "d", "items", "attr", "random", "reverse"), _pay_length),
    **dict.fromkeys(("batch", "slice"), _pay_fill),
    **dict.fromkeys(("sort", "groupby", "unique", "min", "max", "dictsort", "pprint"), _pay_sorted),
    "center": _pay_width,
    "indent": _pay_indent,
    "join": _pay_join,
    "replace": _pay_filter_replace,
    "format": _pay_filter_format,
    "wordwrap": _pay_wrap,
    "tojson": _pay_json,
    "sum": _pay_sum,
    "striptags": _pay_tags,
}
_DEEP_TESTS = (
    *("eq", "equalto", "==", "ne", "!=", "lt", "lessthan", "<", "le", "<=", "gt", "greaterthan", ">", "ge", ">=", "in"),
)
_ITERATED = ("join", "sum", "sort", "groupby", "unique", "min", "max", "batch", "slice", "length", "count", "string")


def _metered(function: Callable[..., Any], pay: Callable[..., None], listed: bool) -> Callable[..., Any]:
    """Return a filter or test that pays before it works, and for what it makes."""
    skipped = 1 if hasattr(function, "jinja_pass_arg") else 0  # the environment or context, which Jinja puts first

    @functools.wraps(function)
    def paid(*args: Any, **kwargs: Any) -> Any:
        meter = _METER.get()
        if listed and len(args) > skipped and hasattr(args[skipped], "__next__"):
            args = (*args[:skipped], list(meter.made(args[skipped])), *args[skipped + 1 :])
        meter.spend(1)
        pay(meter, *args[skipped:], **kwargs)
        return meter.made(function(*args, **kwargs))

    return paid


def _weighed(value: Any) -> Any:
    return _METER.get().weigh(value)


def _sliced(value: Any) -> Any:
    _METER.get().length(value)
    return value


@jinja2.pass_context  # so that it is not computed once, when the template is compiled
def _step(context: Any, steps: int) -> None:
    _METER.get().spend(steps)


@jinja2.pass_context
def _written(context: Any, value: Any) -> Any:
    return _METER.get().weigh(value)


@jinja2.pass_context
def _sum(context: Any, *terms: Any) -> Any:
    """Return the terms of a chain of + added up: of texts, in one go."""
    meter = _METER.get()
    if set(map(type, terms)) == _ONLY_TEXT:
        made = "".join(terms)
        meter.spend(1 + len(made) // CHARACTERS)
        return made
    total = terms[0]
    for term in terms[1:]:
        meter.length(total)
        meter.length(term)
        total = total + term
        if isinstance(total, int):
            _check_number(total.bit_length())
    return total


@jinja2.pass_context
def _written_sum(context: Any, *terms: Any) -> Any:
    total = _sum(context, *terms)
    return total if type(total) is str else _METER.get().weigh(total)


# -- the syntax tree ---------------------------------------------------------------------------

# Names of filters that no template can write: Jinja calls a filter with the least ado.
WEIGHED, SLICED, STEP, WRITTEN, SUM, WRITTEN_SUM = " weighed", " sliced", " step", " written", " sum", " written sum"


class _Steps(jinja2.visitor.NodeTransformer):
    """Puts a step into each loop and macro, and a weighing before what Python itself does without asking."""

    def __init__(self, environment: jinja2.Environment) -> None:
        self.environment = environment

    def visit_For(self, node: nodes.For) -> nodes.Node:
        """Let each pass, and each element that the loop's condition leaves out, cost what is written in it."""
        self._step_into(node)
        if node.test is not None:
            step = self._filter(nodes.Const(self._cost([node.test])), STEP, node.lineno)
            stepped = nodes.And(nodes.Not(step), node.test).set_lineno(node.lineno)  # a step is None
            node.test = stepped.set_environment(self.environment)  # type: ignore[assignment]
        return node

    def visit_Macro(self, node: nodes.Macro | nodes.CallBlock) -> nodes.Node:
        """Let each call cost what is written in the body."""
        self._step_into(node)
        return node

    visit_CallBlock = visit_Macro

    def _step_into(self, node: nodes.For | nodes.Macro | nodes.CallBlock) -> None:
        self.generic_visit(node)
        step = self._filter(nodes.Const(self._cost(node.body)), STEP, node.lineno)
        node.body.insert(0, nodes.ExprStmt(step).set_lineno(node.lineno).set_environment(self.environment))

    @staticmethod
    def _cost(inside: list[nodes.Node]) -> int:
        parts = [part for each in inside for part in (each, *each.find_all(nodes.Node))]
        text = sum(len(part.data) for part in parts if isinstance(part, nodes.TemplateData))
        text += sum(len(part.value) for part in parts if isinstance(part, nodes.Const) and isinstance(part.value, str))
        return 1 + len(parts) // 4 + text // CHARACTERS

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        """Weigh what is written; constant text is paid for by the loop around it."""
        self.generic_visit(node)
        for i, child in enumerate(node.nodes):
            if isinstance(child, nodes.Const) and isinstance(child.value, str):
                data = nodes.TemplateData(child.value).set_lineno(child.lineno)
                node.nodes[i] = data.set_environment(self.environment)  # type: ignore[call-overload]
            elif isinstance(child, nodes.Filter) and child.name == SUM:
                child.name = WRITTEN_SUM
            elif not _constant(child):
                node.nodes[i] = self._filter(child, WRITTEN, child.lineno)
        return node

    def visit_Add(self, node: nodes.Add) -> nodes.Node:
        """Take the terms of a chain of + together."""
        terms: list[nodes.Expr] = []
        first: nodes.Expr = node
        while isinstance(first, nodes.Add):
            terms.insert(0, first.right)
            first = first.left
        return self._filter(self.visit(first), SUM, node.lineno, [self.visit(term) for term in terms])

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        """Weigh what is compared with something that is not written in the template."""
        node = self.generic_visit(node)  # type: ignore[assignment]
        sides = [node.expr, *(operand.expr for operand in node.ops)]
        if any(map(_constant, sides[1:])) or (_constant(node.expr) and not any("in" in each.op for each in node.ops)):
            return node
        node.expr = self._weigh(node.expr)
        for operand in node.ops:
            operand.expr = self._weigh(operand.expr)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        """Weigh what `~` makes a text of."""
        node = self.generic_visit(node)  # type: ignore[assignment]
        node.nodes = list(map(self._weigh, node.nodes))
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        """Pay for the copy that a slice makes."""
        node = self.generic_visit(node)  # type: ignore[assignment]
        if isinstance(node.arg, nodes.Slice):
            node.node = self._filter(node.node, SLICED, node.lineno)
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:
        """Weigh a key, which is hashed."""
        node = self.generic_visit(node)  # type: ignore[assignment]
        node.key = self._weigh(node.key)
        return node

    def _weigh(self, node: nodes.Expr) -> nodes.Expr:
        return node if _constant(node) else self._filter(node, WEIGHED, node.lineno)

    def _filter(self, node: nodes.Expr, name: str, line: int, args: list[nodes.Expr] | None = None) -> nodes.Filter:
        made = nodes.Filter(node, name, args or [], [], None, None).set_lineno(line)
        return made.set_environment(self.environment)  # type: ignore[return-value]


def _constant(node: nodes.Node) -> bool:
    if isinstance(node, nodes.List | nodes.Tuple):
        return all(map(_constant, node.items))
    if isinstance(node, nodes.CondExpr):
        return _constant(node.expr1) and (node.expr2 is None or _constant(node.expr2))
    return isinstance(node, nodes.Const | nodes.TemplateData)


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
    made.filters = {
        name: _metered(function, _FILTERS.get(name, _pay_all), name in _ITERATED)
        for name, function in dict[str, Any](made.filters).items()
    }
    tests: Any = made.tests
    deep: Any = {name: _metered(tests[name], _pay_all, False) for name in _DEEP_TESTS}
    made.tests = {**made.tests, **deep}
    made.filters.update(
        {WEIGHED: _weighed, SLICED: _sliced, STEP: _step, WRITTEN: _written, SUM: _sum, WRITTEN_SUM: _written_sum}
    )
    return made


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
