"""Tool calls: what is rendered is read back, and what a model breaks is reported in its place."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abi_py.data import BadToolCall, ToolCall, load_template, parse_tool_calls, render_tool_calls
from abi_py.errors import ConfigError, DataError

FORMS = ["deepzig", "qwen"]
CALL = ToolCall("weather", {"city": "Rome & <b>", "days": [1, 2.5, None, True], "über": {"a": '"x"'}})
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"), max_size=20)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
NAMES = st.from_regex(r"[A-Za-z_][A-Za-z0-9_.-]{0,20}", fullmatch=True)
CALLS = st.builds(ToolCall, NAMES, st.dictionaries(TEXT, VALUES, max_size=3))


def test_rendering():
    call = ToolCall("weather", {"city": "Rome"})
    assert render_tool_calls(["I look.", call, "Clear."], "deepzig") == (
        'I look.\n\n<tool>weather</tool>\n{"city": "Rome"}\n\nClear.'
    )
    assert render_tool_calls(["I look.", call, call], "qwen") == (
        'I look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
        '\n<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
    )


@pytest.mark.parametrize("form", FORMS)
@given(parts=st.lists(CALLS, min_size=1, max_size=3), prose=TEXT)
def test_round_trip(form, parts, prose):
    parsed = parse_tool_calls(render_tool_calls([prose, *parts], form), form)
    assert parsed.calls == parts
    assert parsed.problems == []
    assert parsed.prose == prose.strip()


@pytest.mark.parametrize(("form", "template"), [("deepzig", "deepzig"), ("qwen", "chatml")])
def test_templates_write_the_same_calls(form, template):
    message = {"role": "assistant", "content": "I look.", "tool_calls": [
        {"type": "function", "function": {"name": CALL.name, "arguments": CALL.arguments}}
    ] * 2}  # fmt: skip
    assert render_tool_calls(["I look.", CALL, CALL], form) in load_template(template).render([message])


@pytest.mark.parametrize("form", FORMS)
@given(text=st.text(max_size=60) | st.lists(st.sampled_from(
    ["<tool>", "</tool>", "<tool_call>", "</tool_call>", "{", "}", '{"name": "a"', ', "arguments": {}}', "x", "\n", '"']
)).map("".join))  # fmt: skip
def test_nothing_that_a_model_writes_raises_or_is_lost(form, text):
    parsed = parse_tool_calls(text, form)
    kept = "".join(part if isinstance(part, str) else getattr(part, "text", "") for part in parsed.parts)
    if not parsed.calls:
        assert "".join(kept.split()) == "".join(text.split())


@pytest.mark.parametrize(
    ("form", "text", "reason", "line", "column"),
    [
        ("deepzig", "a\n\n<tool>f</tool>\n{'x': 1}\n\nb", "the JSON is broken: Expecting property name", 4, 2),
        ("deepzig", '<tool>f</tool>\n{"x": NaN}', "NaN is no number of JSON", 2, 1),
        ("deepzig", '<tool>f</tool>\n{"x": 1, "x": 2}', "the key 'x' is given twice", 2, 1),
        ("qwen", '<tool_call>{"name": "f", "arguments": "{\\"x\\": 1, \\"x\\": 2}"}</tool_call>', "given twice", 1, 12),
        ("deepzig", "<tool>f</tool>\nno", "expected a JSON object of arguments after </tool>", 2, 1),
        ("deepzig", "<tool>f</tool>", "expected a JSON object of arguments after </tool>", 1, 15),
        ("deepzig", "say <tool>f", "<tool> is not closed by </tool>", 1, 11),
        ("deepzig", "<tool> </tool>\n{}", "the name of the tool must be one word", 1, 7),
        ("qwen", 'a\n<tool_call>\n{"name": "f", "arguments": {"x": }}\n</tool_call>', "Expecting value", 3, 34),
        ("qwen", '<tool_call>\n{"name": "f"}', "expected </tool_call> after the JSON object", 2, 14),
        ("qwen", "<tool_call>\nf\n</tool_call>", "expected a JSON object", 2, 1),
        ("qwen", "<tool_call>\n{}\n</tool_call>", "must have a 'name'", 2, 1),
        ("qwen", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>', "must be a JSON object", 1, 12),
    ],
)
def test_problems_have_a_place_and_a_reason(form, text, reason, line, column):
    parsed = parse_tool_calls(text, form)
    (problem,) = parsed.problems
    assert parsed.calls == []
    assert reason in problem.reason
    assert (problem.line, problem.column) == (line, column)
    assert problem.text in text
    assert f"line {line}, column {column}: " in str(problem)


def test_a_broken_call_does_not_hide_the_next():
    text = 'One.\n<tool_call>\n{broken\n</tool_call>\n<tool_call>\n{"name": "f"}\n</tool_call>\nTwo.'
    parsed = parse_tool_calls(text, "qwen")
    assert [type(part) for part in parsed.parts] == [str, BadToolCall, ToolCall, str]
    assert parsed.prose == "One.\n\nTwo."


def test_tags_inside_of_arguments_are_text():
    call = ToolCall("f", {"x": "</tool_call><tool_call>"})
    assert parse_tool_calls(render_tool_calls(call, "qwen"), "qwen").calls == [call]


def test_arguments_as_a_string_of_json():
    text = '<tool_call>{"name": "f", "arguments": "{\\"x\\": 1}"}</tool_call>'
    assert parse_tool_calls(text, "qwen").calls == [ToolCall("f", {"x": 1})]


def test_what_cannot_be_rendered():
    with pytest.raises(DataError, match="a tool's name must be a word"):
        render_tool_calls(ToolCall("a<b", {}), "deepzig")
    with pytest.raises(DataError, match="the arguments of f must be values of JSON"):
        render_tool_calls(ToolCall("f", {"x": float("nan")}), "qwen")
    with pytest.raises(ConfigError, match="form \\('json'\\) must be deepzig or qwen"):
        parse_tool_calls("", "json")
