"""Rows of every format become the same conversations; nothing in a row is lost, nothing is made up."""

import json

import pytest

from abi_py.data import Conversation, Message, RowReader, ToolCall, read_conversation
from abi_py.data.rows import BadRow
from abi_py.errors import DataError

QUESTION, ANSWER = Message("user", "Add."), Message("assistant", "3")


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"instruction": "Add.", "output": "3"}, [QUESTION, ANSWER]),
        ({"instruction": "Add.", "input": "1 2", "output": "3"}, [Message("user", "Add.", "1 2"), ANSWER]),
        ({"instruction": "Add.", "context": "1 2", "response": "3"}, [Message("user", "Add.", "1 2"), ANSWER]),
        ({"instruction": "Add.", "input": "1 2", "response": "3"}, [Message("user", "Add.", "1 2"), ANSWER]),
        ({"prompt": "Add.", "completion": "3"}, [QUESTION, ANSWER]),
        ({"conversations": [{"from": "human", "value": "Add."}, {"from": "gpt", "value": "3"}]}, [QUESTION, ANSWER]),
        (
            {"messages": [{"role": "user", "content": "Add."}, {"role": "assistant", "content": "3"}]},
            [QUESTION, ANSWER],
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "Ad"}, {"type": "text", "text": "d."}]}
                ]
            },
            [QUESTION],
        ),
        (
            {"messages": [{"role": "developer", "content": "s"}, {"role": "assistant", "content": "3", "weight": 0}]},
            [Message("system", "s"), Message("assistant", "3", trained=False)],
        ),
        (
            {"instruction": "Add.", "output": "3", "system": "s", "history": [["a", "b"]]},
            [
                Message("system", "s"),
                Message("user", "a"),
                Message("assistant", "b", trained=False),
                QUESTION,
                ANSWER,
            ],
        ),
        # One table made of several sets, as `datasets` joins them: columns of the others are null.
        (
            {"instruction": "Add.", "input": None, "output": None, "context": "1 2", "response": "3", "text": None},
            [Message("user", "Add.", "1 2"), ANSWER],
        ),
    ],
)
def test_formats(row, messages):
    assert read_conversation(row) == Conversation(tuple(messages))


@pytest.mark.parametrize("key", ["text", "content"])
def test_plain_text(key):
    assert read_conversation({key: "Once."}) == Conversation((), text="Once.")


def test_category_and_pattern():
    assert read_conversation({"text": "a", "category": "open_qa"}).category == "open_qa"
    assert read_conversation({"text": "a", "pattern": "memory_1"}).category == "memory_1"


TOOL = {"type": "function", "function": {"name": "weather", "parameters": {}}}
CALLS = {"role": "assistant", "content": None, "tool_calls": [
    {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
]}  # fmt: skip


def test_openai_tools():
    result = {"role": "tool", "tool_call_id": "c1", "content": "clear"}
    conversation = read_conversation({"messages": [{"role": "user", "content": "?"}, CALLS, result], "tools": [TOOL]})
    call = ToolCall("weather", {"city": "Rome"}, "c1")
    assert conversation.messages[1] == Message("assistant", "", tool_calls=(call,))
    assert conversation.messages[2] == Message("tool", "clear", tool_call_id="c1")
    assert conversation.tools == (TOOL,)
    assert conversation.calls_tools
    assert conversation.to_dicts()[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Rome"}
    assert list(conversation.strings()) == ["?", "", "weather", '{"city": "Rome"}', "clear"]


def test_sharegpt_tools_and_tools_as_text():
    turns = [
        {"from": "human", "value": "?"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Rome"}}'},
        {"from": "observation", "value": "clear"},
        {"from": "gpt", "value": "Clear."},
    ]
    conversation = read_conversation({"conversations": turns, "tools": json.dumps([TOOL]), "system": "s"})
    assert [message.role for message in conversation.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert conversation.messages[2].tool_calls == (ToolCall("weather", {"city": "Rome"}),)
    assert conversation.tools == (TOOL,)


def test_calls_in_the_text_of_an_answer_count_as_tools():
    assert read_conversation({"instruction": "a", "output": "<tool>x</tool>\n{}"}).calls_tools
    assert not read_conversation({"instruction": "What is <tool>?", "output": "A tag."}).calls_tools


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "a"}, "found the keys 'question'; expected 'instruction' and 'output' \\(Alpaca\\); .*'content'"),
        ({"instruction": "a", "output": "b", "response": "c"}, "both 'output' and 'response'"),
        ({"instruction": "a", "input": "b", "context": "c", "output": "d"}, "both 'input' and 'context'"),
        ({"instruction": "a", "output": None}, "'output' must be a string, found null"),
        ({"prompt": "a", "completion": 3}, "'completion' must be a string, found a number"),
        ({"text": " "}, "'text' is empty"),
        ({"messages": []}, "'messages' must be a list of turns, found an empty list"),
        ({"messages": [{"role": "user"}]}, "turn 0: found 'role'; expected the keys 'role' and 'content'"),
        ({"messages": [{"role": "bot", "content": "a"}]}, "turn 0: 'role' is 'bot'; expected system"),
        ({"messages": [{"role": "user", "content": None}]}, "'turn 0 content' must be a string, found null"),
        ({"messages": [{"role": "assistant", "content": ""}]}, "'turn 0 content' is empty"),
        ({"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]}, "'weight' is 0.5; it must be 0 or 1"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "part of type 'image_url'"),
        ({"messages": [{**CALLS, "role": "user"}]}, "only an assistant can call tools"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]}, "must have a 'name'"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
            "turn 0: the 'arguments' of 'f' are no JSON: Expecting property name.*column 2",
        ),
        ({"messages": [{"role": "user", "content": "a"}], "functions": [{}]}, "'functions' is the old form"),
        ({"text": "a", "tools": "[{"}, "'tools' is a string, but not of JSON"),
        ({"text": "a", "tools": [1]}, "'tools' must be a list of objects"),
        ({"conversations": [{"from": "function_call", "value": "x"}]}, "turn 0: the call is no JSON"),
    ],
)
def test_bad_rows(row, message):
    with pytest.raises(BadRow, match=message):
        read_conversation(row)


def test_reader_counts_rows_and_names_places(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": 1}\n{"text": "b"}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl:3: 'text' must be a string.*--skip-bad-rows"):
        list(RowReader(path))
    reader = RowReader(path, skip_bad_rows=True)
    assert [conversation.place for conversation in reader] == [f"{path}:1", f"{path}:4"]
    assert reader.count == 3
    assert len(reader.skipped) == 1


def test_a_file_of_lines_is_read_line_by_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n' * 3 + "[broken")
    rows = iter(RowReader(path))
    assert [next(rows).text for _ in range(3)] == ["a"] * 3  # what comes after has not been looked at
    with pytest.raises(DataError, match=r"rows\.jsonl:4: not a JSON object"):
        next(rows)


def test_lines_of_a_broken_array_are_those_of_the_file(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('\n\n[{"text": "a"},\n\n{"text"}]')
    with pytest.raises(DataError, match=r"rows\.json:5: not a JSON object: Expecting ':' delimiter"):
        list(RowReader(path))


def test_what_a_turn_says_beside_its_text_reaches_the_template():
    turns = [
        {"role": "user", "content": "2+2", "name": "Ann", "mood": ["calm"]},
        {"role": "assistant", "content": "4", "reasoning_content": "two and two", "weight": 1},
        {"role": "tool", "content": "5", "name": "sum", "tool_call_id": "c1", "ok": False},
    ]
    conversation = read_conversation({"messages": turns})
    assert conversation.to_dicts() == [turns[0], {k: v for k, v in turns[1].items() if k != "weight"}, turns[2]]
    assert "two and two" in list(conversation.strings())
    sharegpt = read_conversation({"conversations": [{"from": "gpt", "value": "4", "reasoning_content": "hm"}]})
    assert sharegpt.to_dicts() == [{"role": "assistant", "content": "4", "reasoning_content": "hm"}]
