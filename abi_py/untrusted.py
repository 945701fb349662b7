"""JSON and YAML that somebody else wrote: read within bounds, then held against a schema, before anything trusts them.

A file from a stranger may be cut short, damaged, or made to do harm.  Its reader states what it must hold:

    read_json(path, {"weight_map": dict[str, str]})        # other keys may be there, and are not looked at
    check(rows, [{"step": int, "loss": float | None}], f"{path}: rows")

A schema is a type hint, or a dictionary of them by key, or a list of one of them:

    bool int float str None    an int is below 2^63, a float is finite and may be written as an int; true is no int
    list[X]  [X]  dict[str, X] of any length
    X | Y                      one of them;  a key whose hint allows None may be missing
    Any                        anything, nested at most `DEPTH` deep
    {"key": X, ...}            an object with at least these keys

Bounds, so that no small file needs much memory or time: the size of the file; its number of lists and objects, each of
which takes 50 to 90 bytes of memory and may take 1 in the file; how deep they are nested; and in YAML, whose aliases
let 400 bytes mean gigabytes, the number of values after all aliases are written out.
"""

import json
import math
import re
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from .errors import AbiError, CheckpointError, ConfigError, shown

__all__ = [
    "JSON",
    "LFS_POINTER",
    "check",
    "holds_half",
    "json_in",
    "parse_json",
    "place_in_yaml",
    "read_bytes",
    "read_json",
    "read_text",
    "read_yaml",
    "refuse_lfs_pointer",
]

MEGABYTE = 1 << 20
JSON_BYTES = 128 * MEGABYTE  # the largest tokenizer.json has 35 MB, the largest index of shards 10
YAML_BYTES = MEGABYTE // 4  # PyYAML reads 100 kB in a second
CONTAINERS, BYTES_A_CONTAINER = 4096, 8  # lists and objects allowed, and one more for each 8 bytes
DEPTH = 64
YAML_VALUES = 10_000
YAML_BRACKETS = 500  # PyYAML's time grows with the square of their depth
MAX_INT = 2**63
HALF = re.compile(rb"\\u[dD][89a-fA-F]")  # JSON's way of writing one half of a surrogate pair
LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # how a file begins that git-lfs has not fetched


def refuse_lfs_pointer(path: str | Path, begin: bytes, error: type[AbiError] = CheckpointError) -> None:
    """Raise `error` if a file begins as the pointer that `git clone` leaves where git-lfs is not installed."""
    if begin.startswith(LFS_POINTER):
        raise error(f"{path} is a git-lfs pointer, not the file itself; run `git lfs pull` in its folder")


# -- JSON ----------------------------------------------------------------------------------------


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {shown(twice)} is given twice")
    return result


JSON = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_once)


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text; ValueError, where possible with the place, if it is not JSON or out of bounds.

    NaN and Infinity, keys that are given twice, and bytes that are not UTF-8 are refused.
    """
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"byte {error.start} is not UTF-8") from None
    containers = text.count("[") + text.count("{")
    if containers > CONTAINERS + len(text) // BYTES_A_CONTAINER:
        raise ValueError(f"{containers} lists and objects in {len(text)} characters, too many to be read")
    try:
        return JSON.decode(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg} at line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        raise ValueError("lists and objects are nested too deeply") from None


def read_text(path: Path, *, error: type[AbiError], remedy: str) -> str:
    """Return the text of a file in UTF-8; `error` names file, byte and `remedy`.  OSError passes through."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as problem:
        raise error(f"{path} must be UTF-8, but byte {problem.start} is not; {remedy}") from None


def read_json(
    path: str | Path,
    schema: Any = dict[str, Any],
    *,
    error: type[AbiError] = CheckpointError,
    remedy: str = "it is damaged",
    limit: int = JSON_BYTES,
) -> Any:
    """Return what a JSON file holds, once it fits `schema`; `error` names file, place, rule and `remedy`.

    OSError passes through.
    """
    return json_in(read_bytes(path, error=error, limit=limit), schema, path, error=error, remedy=remedy)


def json_in(content: bytes, schema: Any, path: str | Path, *, error: type[AbiError], remedy: str) -> Any:
    """Return the value of a JSON file whose bytes were read; errors of `read_json`."""
    try:
        value = parse_json(content.removeprefix(b"\xef\xbb\xbf"))
    except ValueError as problem:
        raise error(f"{path} is not JSON ({problem}); {remedy}") from None
    if HALF.search(content) and holds_half(value):
        raise error(f"{path} is not JSON (a text holds half of a surrogate pair, which is no character); {remedy}")
    check(value, schema, str(path), error=error, remedy=remedy)
    return value


def holds_half(value: Any) -> bool:
    """Say whether a text in it holds half of a surrogate pair, which nothing can write as UTF-8."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        return True
    return False


def read_bytes(path: str | Path, *, error: type[AbiError], limit: int = JSON_BYTES) -> bytes:
    """Return the bytes of a file; `error` if there are more than `limit`, or it is a git-lfs pointer."""
    pieces, size = [], 0
    with open(path, "rb") as file:
        while piece := file.read(MEGABYTE):  # not by the size that the system tells: a device has none
            pieces.append(piece)
            size += len(piece)
            if size > limit:
                rule = f"and at most {limit / MEGABYTE:g} MB are read of such files"
                raise error(f"{path} has at least {size:,} bytes, {rule}; is it another file?")
    content = b"".join(pieces)
    refuse_lfs_pointer(path, content, error)
    return content


# -- the schema ----------------------------------------------------------------------------------

NAMES = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text", type(None): "null"}


def check(
    value: Any, schema: Any, place: str, *, error: type[AbiError] = CheckpointError, remedy: str = "it is damaged"
) -> None:
    """Raise `error` if a parsed value does not fit; the message begins with `place` and names the key within it."""
    problem = _misfit(value, schema, "")
    if problem:
        raise error(f"{place}: {problem}; {remedy}")


def _misfit(value: Any, schema: Any, where: str) -> str | None:
    """Say what does not fit, or return None."""
    if schema is Any:
        return f"{where or 'it'} is nested more than {DEPTH} deep" if _deeper(value) else None
    if isinstance(schema, types.UnionType) or typing.get_origin(schema) is typing.Union:
        options = typing.get_args(schema)
        problems = [_misfit(value, option, where) for option in options]
        if None in problems:
            return None
        close = [problem for option, problem in zip(options, problems) if _kind(option) is type(value)]
        return close[0] if close else _wrong(value, where, " or ".join(_name(option) for option in options))
    kind = _kind(schema)
    if kind is float and type(value) is int:
        value = float(value) if abs(value) < MAX_INT else math.inf
    good = type(value) is kind
    if good and kind is int:
        good = -MAX_INT <= value < MAX_INT
    if good and kind is float:
        good = math.isfinite(value)
    if not good:
        return _wrong(value, where, _name(schema))
    if isinstance(schema, dict):
        return _first(_member(value, key, inner, where) for key, inner in schema.items())
    inner = schema[0] if isinstance(schema, list) else (typing.get_args(schema) or (None,))[-1]
    if inner is None or (inner is Any and not _deeper(value)):
        return None
    pairs = value.items() if kind is dict else enumerate(value)
    return _first(_misfit(each, inner, _inside(where, key)) for key, each in pairs)


def _member(value: dict[str, Any], key: str, schema: Any, where: str) -> str | None:
    if key in value:
        return _misfit(value[key], schema, _inside(where, key))
    if schema is Any or type(None) in typing.get_args(schema):
        return None
    return f"{where + ' ' if where else ''}lacks {key!r}"


def _first(problems: Iterable[str | None]) -> str | None:
    return next((problem for problem in problems if problem), None)


def _inside(where: str, key: str | int) -> str:
    step = f"[{key}]" if isinstance(key, int) else key if key.isidentifier() and len(key) < 60 else f"[{shown(key)}]"
    return f"{where}.{step}" if where and not step.startswith("[") else where + step


def _wrong(value: Any, where: str, wanted: str) -> str:
    return f"{where or 'it'} is {shown(value)}, but must be {wanted}"


def _kind(schema: Any) -> Any:
    if schema is None:
        return type(None)
    return type(schema) if isinstance(schema, dict | list) else typing.get_origin(schema) or schema


def _name(schema: Any) -> str:
    kind = _kind(schema)
    return "an object" if kind is dict else "a list" if kind is list else NAMES.get(kind, str(kind))


def _deeper(value: Any) -> bool:
    """Say whether lists and objects are nested more than DEPTH deep."""
    level = [value]
    for _ in range(DEPTH + 1):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True


# -- YAML ----------------------------------------------------------------------------------------


# libyaml reads a run's config.yaml in 2 ms, Python in 25: a list of hundreds of runs reads hundreds of them.
_SafeLoader: type = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_SafeLoader):
    """PyYAML's safe loader, but a key that is given twice in a mapping is an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
            try:
                twice = key in seen
            except TypeError:  # a list as key: the safe loader has words for it
                break
            if twice:
                raise ConfigError(f"line {key_node.start_mark.line + 1}: {key!r} is given twice; keep one of the two")
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def read_yaml(path: str | Path) -> Any:
    """Return what a YAML file holds; ConfigError names the file and the line.  OSError passes through."""
    content = read_bytes(path, error=ConfigError, limit=YAML_BYTES)
    try:
        text = content.decode("utf-8-sig")
        if text.count("[") + text.count("{") > YAML_BRACKETS:
            raise ConfigError(f"more than {YAML_BRACKETS} brackets are not read; write lists and mappings line by line")
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check_aliases(node)
            return loader.construct_document(node)  # type: ignore[no-untyped-call]
        finally:
            loader.dispose()  # type: ignore[no-untyped-call]
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not a text file: byte {error.start} is not UTF-8; convert it to UTF-8") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:  # ValueError: an impossible date
        if isinstance(error, RecursionError) or "nesting depth" in str(error):  # libyaml's words
            raise ConfigError(f"{path}: lists and mappings are nested too deeply; write them flat") from None
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark is not None else f"{path}"
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise ConfigError(f"{place} is not YAML: {problem}; correct that line") from None


def place_in_yaml(path: str | Path, *keys: str) -> str:
    """Return `path:line` of a key of a file that `read_yaml` has read, `path` where it can't be told."""
    with open(path, encoding="utf-8-sig") as file:
        node: Any = yaml.compose(file, Loader=_SafeLoader)  # that of read_yaml: the other one has stricter rules
    line = None
    for key in keys:
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        found = next(((name, value) for name, value in pairs if name.value == key), None)
        if found is None:
            return str(path)
        line, node = found[0].start_mark.line + 1, found[1]
    return f"{path}:{line}" if line is not None else str(path)


def _check_aliases(root: Any) -> None:
    """Raise ConfigError if the document has too many values once its aliases are written out, or contains itself."""
    counted: dict[int, int] = {}

    def count(node: Any) -> int:
        known = counted.get(id(node))
        if known == 0:
            raise ConfigError(f"line {node.start_mark.line + 1}: an alias names what contains it; write the value out")
        if known is None:
            counted[id(node)] = 0
            children: Any = node.value if isinstance(node, yaml.CollectionNode) else ()
            inner = [each for pair in children for each in (pair if isinstance(pair, tuple) else (pair,))]
            counted[id(node)] = known = 1 + sum(map(count, inner))
        return known

    values = count(root)
    if values > YAML_VALUES:
        raise ConfigError(f"{values} values with all aliases written out, at most {YAML_VALUES} are read; use fewer")
