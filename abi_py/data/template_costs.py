"""What the operators, methods, filters and tests of a template cost: steps by what each may make, before it is made."""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

from .template_meter import CHARACTERS, METER, Meter, check_number

__all__ = ["metered_filters", "metered_tests", "pay_method", "pay_percent", "pay_power", "pay_product"]

_PERCENT = re.compile(r"%(?:\([^)]*\))?[#0\- +]*(\*|\d+)?(?:\.(\*|\d+))?")


# -- operators and methods ---------------------------------------------------------------------


def pay_product(meter: Meter, left: Any, right: Any) -> None:
    for value, times in ((left, right), (right, left)):
        if isinstance(value, str | bytes) and isinstance(times, int):
            meter.text(len(value) * max(times, 0))
        elif isinstance(value, list | tuple) and isinstance(times, int):
            meter.spend(len(value) * max(times, 0))


def pay_power(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        check_number(left.bit_length() * max(right, 0))


def pay_percent(meter: Meter, pattern: str, values: Any) -> None:
    meter.weigh(pattern)
    meter.weigh(values)
    found = [number for pair in _PERCENT.findall(pattern) for number in pair if number]
    lengths = [int(number) for number in found if number != "*"]
    if "*" in found:
        lengths += [abs(value) for value in values if isinstance(value, int)]
    meter.text(sum(lengths))


def pay_method(meter: Meter, name: str, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
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


def _pay_replace(meter: Meter, value: Any, old: Any, new: Any) -> None:
    if isinstance(value, str | bytes) and isinstance(old, type(value)) and isinstance(new, type(value)):
        meter.text(len(value) + value.count(old) * len(new))  # type: ignore[arg-type]


# -- filters and tests -------------------------------------------------------------------------


def _pay_all(meter: Meter, *values: Any, **named: Any) -> None:
    for value in (*values, *named.values()):
        meter.weigh(value)


def _pay_length(meter: Meter, value: Any = None, *_: Any, **__: Any) -> None:
    meter.length(value)


def _pay_width(meter: Meter, value: Any = "", width: Any = 80, *_: Any, **__: Any) -> None:
    meter.weigh(value)
    meter.text(max(int(width), 0))


def _pay_indent(meter: Meter, value: Any = "", width: Any = 4, *_: Any, **__: Any) -> None:
    meter.weigh(value)
    meter.text((1 + str(value).count("\n")) * (len(width) if isinstance(width, str) else max(int(width), 0)))


def _pay_join(meter: Meter, value: Any = (), d: Any = "", *_: Any, **__: Any) -> None:
    meter.weigh(value)
    meter.text(len(value) * len(str(d)))


def _pay_filter_replace(meter: Meter, value: Any, old: Any, new: Any, *_: Any, **__: Any) -> None:
    meter.weigh([value, old, new])
    _pay_replace(meter, str(value), str(old), str(new))


def _pay_filter_format(meter: Meter, value: Any, *args: Any, **kwargs: Any) -> None:
    meter.weigh(value)
    pay_percent(meter, str(value), [*args, *kwargs.values()])


def _pay_wrap(meter: Meter, value: Any = "", *args: Any, **named: Any) -> None:
    meter.weigh([value, *args, *named.values()])
    longest = max((len(arg) for arg in (*args, *named.values()) if isinstance(arg, str)), default=1)
    meter.spend(len(str(value)) * (1 + longest // CHARACTERS))


def _pay_fill(meter: Meter, value: Any = (), count: Any = 1, fill_with: Any = None) -> None:
    meter.length(value)
    meter.spend(int(count) if fill_with is not None else 1)


def _pay_json(
    meter: Meter,
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


def _pay_sum(meter: Meter, value: Any = (), attribute: Any = None, start: Any = 0) -> None:
    meter.weigh([value, start])
    if not isinstance(start, int | float):  # lists added to lists, each time all of it
        before = meter.left
        meter.weigh(value)
        meter.spend((before - meter.left) * len(value))


def _pay_sorted(meter: Meter, value: Any = (), *more: Any, **named: Any) -> None:
    meter.weigh(more)
    for _ in range(16):  # comparisons of each element
        meter.weigh(value)


def _pay_tags(meter: Meter, value: Any = "", *_: Any, **__: Any) -> None:
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


def metered_filters(filters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the filters of an environment such that each pays before it works."""
    return {name: _metered(work, _FILTERS.get(name, _pay_all), name in _ITERATED) for name, work in filters.items()}


def metered_tests(tests: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tests of an environment such that those that look inside of a value pay for it."""
    return {**tests, **{name: _metered(tests[name], _pay_all, False) for name in _DEEP_TESTS}}


def _metered(function: Callable[..., Any], pay: Callable[..., None], listed: bool) -> Callable[..., Any]:
    """Return a filter or test that pays before it works, and for what it makes."""
    skipped = 1 if hasattr(function, "jinja_pass_arg") else 0  # the environment or context, which Jinja puts first

    @functools.wraps(function)
    def paid(*args: Any, **kwargs: Any) -> Any:
        meter = METER.get()
        if listed and len(args) > skipped and hasattr(args[skipped], "__next__"):
            args = (*args[:skipped], list(meter.made(args[skipped])), *args[skipped + 1 :])
        meter.spend(1)
        pay(meter, *args[skipped:], **kwargs)
        return meter.made(function(*args, **kwargs))

    return paid
