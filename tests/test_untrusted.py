"""JSON and YAML of strangers: what is read, what is refused, and that neither takes much memory or time."""

import time
import tracemalloc

import pytest

from abi_py.errors import CheckpointError, ConfigError, DataError
from abi_py.untrusted import check, parse_json, read_json, read_yaml


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"a": 1', "Expecting ',' delimiter at line 1, column 8"),
        ('{"a": NaN}', "NaN is no number of JSON"),
        ('{"a": 1, "b": 2, "a": 3}', "the key 'a' is given twice"),
        ("[" * 3000, "nested too deeply|Expecting value"),  # Python 3.14 reads on, to the end that is missing
        ("[" + "[]," * 20000 + "[]]", "20002 lists and objects in 60004 characters"),
        ("9" * 5000, "4300"),
        (b'{"a": "\xff"}', "byte 7 is not UTF-8"),
    ],
)
def test_texts_that_are_refused(text, problem):
    with pytest.raises(ValueError, match="^(?s:.)*" + problem.replace("(", r"\(")):
        parse_json(text)


def test_a_small_text_may_have_many_lists():
    assert parse_json("[" + "[]," * 2000 + "[]]") == [[]] * 2001


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        (int, 2**63 - 1),
        (float, 1),
        (int | None, None),
        (list[int] | int, [1, 2]),
        (dict[str, list[str]], {"a": ["b"], "c": []}),
        ({"a": int, "b": str | None}, {"a": 1, "other": object}),
        ({"a": {"b": list[int]}}, {"a": {"b": [3]}}),
        (dict[str, object] | None, None),
        ([{"a": int}], [{"a": 1}, {"a": 2, "b": 3}]),
    ],
)
def test_what_fits_a_schema(schema, value):
    check(value, schema, "x.json")


@pytest.mark.parametrize(
    ("schema", "value", "problem"),
    [
        (int, True, "it is True, but must be a whole number"),
        (int, 2**63, "it is 9223372036854775808, but must be a whole number"),
        (int, 1.0, "it is 1.0, but must be a whole number"),
        (float, float("inf"), "it is inf, but must be a finite number"),
        (float, 10**400, "must be a finite number"),
        (dict[str, int], [], "it is [], but must be an object"),
        (dict[str, int], {"a": "b"}, "a is 'b', but must be a whole number"),
        (dict[str, int], {"a b": None}, "['a b'] is None, but must be a whole number"),
        ({"a": {"b": list[int]}}, {"a": {"b": [1, "x"]}}, "a.b[1] is 'x', but must be a whole number"),
        ({"a": int}, {}, "lacks 'a'"),
        ({"a": {"b": int}}, {"a": {}}, "a lacks 'b'"),
        ([{"a": int}], [{"a": 1}, {}], "[1] lacks 'a'"),
        (int | str, [], "it is [], but must be a whole number or text"),
        ({"a": list[int] | None}, {"a": [None]}, "a[0] is None, but must be a whole number"),
    ],
)
def test_what_does_not_fit_is_named(schema, value, problem):
    with pytest.raises(DataError) as error:
        check(value, schema, "x.json", error=DataError, remedy="mend it")
    assert problem in str(error.value)
    assert str(error.value).startswith("x.json: ")
    assert str(error.value).endswith("; mend it")


def test_what_no_schema_describes_may_not_be_nested_deeply():
    from typing import Any

    value: list = []
    for _ in range(60):
        value = [value]
    check({"free": value}, {"free": Any}, "x.json")
    for _ in range(10):
        value = [value]
    with pytest.raises(CheckpointError, match="free is nested more than 64 deep"):
        check({"free": value}, {"free": Any}, "x.json")


def test_files(tmp_path):
    file = tmp_path / "a.json"
    file.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(file, {"a": int}) == {"a": 1}
    with pytest.raises(CheckpointError, match=r"a.json: a is 1, but must be text; it is damaged"):
        read_json(file, {"a": str})
    file.write_text('{"a": "\\ud83d\\ude00"}')
    assert read_json(file) == {"a": "\U0001f600"}
    file.write_text('{"a": ["\\ud83d"]}')
    with pytest.raises(CheckpointError, match="half of a surrogate pair"):
        read_json(file)
    file.write_text('{"a": 1')
    with pytest.raises(CheckpointError, match=r"a.json is not JSON \(Expecting .* column 8\); it is damaged"):
        read_json(file)
    file.write_text("1" * 101)
    with pytest.raises(DataError, match=r"a.json has at least 101 bytes, and at most .* MB are read"):
        read_json(file, error=DataError, limit=100)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none.json")


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi")
)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (BOMB, "values with all aliases written out, at most 10000 are read"),
        ("a: &a [*a]", "line 1: an alias names what contains it"),
        ("a: 1\na: 2", "line 2: 'a' is given twice"),
        ("a: " + "[" * 5000, "more than 500 brackets"),
        ("- " * 5000 + "a", "nested too deeply"),
        ("a: 2026-99-99", "is not YAML"),
        ("? [1, 2]\n: 3", "is not YAML"),
        ("a: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("a: [1", "is not YAML"),
        ("a: " + "9" * 5000, "is not YAML"),
    ],
)
def test_yaml_that_is_refused(tmp_path, text, problem):
    file = tmp_path / "a.yaml"
    file.write_text(text)
    tracemalloc.start()
    began = time.process_time()
    try:
        with pytest.raises(ConfigError) as error:
            read_yaml(file)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert problem in str(error.value)
    assert len(str(error.value)) < 1000
    assert peak < 32e6
    assert time.process_time() - began < 10


def test_yaml_aliases_may_be_used(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("a: &x {b: 1}\nc: *x\n")
    assert read_yaml(file) == {"a": {"b": 1}, "c": {"b": 1}}
