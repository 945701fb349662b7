"""The shipped conversations: enough, of all kinds, none twice, and right where that can be checked."""

import ast
import configparser
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from abi_py.data import RowReader, load_template, parse_tool_calls, train_tokenizer
from abi_py.data.toolcalls import ToolCall

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "abi_py" / "data" / "deepzig_conversations.jsonl"
LINES = FILE.read_text(encoding="utf-8").splitlines()
ROWS = list(RowReader(FILE))
ANSWERS = [message.content for row in ROWS for message in row.messages if message.role == "assistant"]


def of_kind(category):
    return [row for row in ROWS if row.category == category]


def test_enough_of_every_kind():
    counts = Counter(row.category for row in ROWS)
    assert len(ROWS) == len(LINES) >= 200
    assert set(counts) == {"talk", "facts", "ideas", "zig", "python", "tools", "system", "turns", "context", "again"}
    assert min(counts.values()) >= 15
    assert all("<tool>" in row.messages[-1].content for row in of_kind("tools"))
    assert all(row.messages[0].role == "system" for row in of_kind("system"))
    assert all(len(row.messages) >= 4 for row in of_kind("turns"))
    assert all(row.messages[0].context for row in of_kind("context"))


def test_none_twice():
    asked = [
        json.dumps([m.to_dict() for m in row.messages if m.role != "assistant"], sort_keys=True) for row in ROWS
    ]
    assert [text for text, count in Counter(asked).items() if count > 1] == []
    told = Counter(row.messages[-1].content for row in ROWS if row.category != "again")
    assert [text for text, count in told.items() if count > 1] == []


def test_what_is_asked_again_has_been_answered():
    answers = {row.messages[-1].content for row in ROWS if row.category != "again"}
    for row in of_kind("again"):
        assert row.messages[-1].content in answers, row.place
    assert len(of_kind("again")) >= 0.1 * len(ROWS)  # all that the usual eval_split keeps back


def test_every_turn_is_text_and_answered():
    for row in ROWS:
        assert row.messages[-1].role == "assistant", row.place
        for message in row.messages:
            assert message.content == message.content.strip() != "", row.place
            assert "None" not in message.content or "`None`" in message.content or "=None" in message.content


def test_calls_of_tools_can_be_read():
    calls = Counter()
    for answer in ANSWERS:
        parsed = parse_tool_calls(answer, "deepzig")
        assert parsed.problems == [], answer
        calls.update(part.name for part in parsed.parts if isinstance(part, ToolCall))
    assert sum(calls.values()) >= 25
    assert len(calls) >= 15


def test_code_in_python_compiles():
    found = [code for answer in ANSWERS for code in re.findall(r"```python\n(.*?)```", answer, re.DOTALL)]
    assert len(found) >= 20
    for code in found:
        ast.parse(code)


def test_fences_are_closed():
    assert [answer for answer in ANSWERS if answer.count("```") % 2] == []


@pytest.mark.parametrize(
    ("name", "call", "value"),
    [
        ("is_prime", "[n for n in range(14) if is_prime(n)]", [2, 3, 5, 7, 11, 13]),
        ("fibonacci", "fibonacci(10)", 55),
        ("binary_search", "[binary_search([1, 3, 5], n) for n in (1, 3, 5, 4)]", [0, 1, 2, -1]),
        ("is_palindrome", "is_palindrome('A man, a plan, a canal: Panama')", True),
        ("gcd", "gcd(12, 18)", 6),
        ("mean", "mean([1, 2, 6])", 3),
        ("countdown", "list(countdown(3))", [3, 2, 1]),
        ("softmax", "float(softmax(np.array([1000.0, 1000.0]))[0])", 0.5),
        ("rms_norm", "rms_norm(np.array([3.0, 3.0]), 1.0).round(3).tolist()", [1.0, 1.0]),
    ],
)
def test_python_functions_do_what_they_say(name, call, value):
    codes = [code for answer in ANSWERS for code in re.findall(r"```python\n(.*?)```", answer, re.DOTALL)]
    code = next(code for code in codes if f"def {name}(" in code)
    names = {}
    exec(code, names)
    assert eval(call, names) == value


def test_every_row_has_a_text_and_a_tokenizer_of_2000_fits():
    tokenizer = train_tokenizer((text for row in ROWS for text in row.strings()), 2000)
    template = load_template("deepzig")
    assert tokenizer.vocab_size == 2000
    lengths = [len(template.encode(tokenizer, row)[0]) for row in ROWS]
    assert max(lengths) <= 256


def test_it_is_in_the_wheel():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert FILE.name in setup["options.package_data"]["abi_py.data"].split()


def test_the_weather_of_a_place_is_asked_about_that_place():
    """Of hundreds of places, so that none of them is the answer to all questions."""
    places = Counter()
    for row in ROWS:
        answer = row.messages[-1].content
        asked = " ".join(message.content for message in row.messages if message.role == "user")
        for part in parse_tool_calls(answer, "deepzig").parts:
            if isinstance(part, ToolCall) and part.name == "get_weather":
                place = part.arguments["location"].partition(",")[0]
                assert place in asked, row.place
                places[place] += 1
    assert len(places) >= 300
    assert max(places.values()) <= 4
