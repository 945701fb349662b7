"""Which conversations are kept, and whether a part says what its name says."""

import pytest

from abi_py.data import read_conversation
from abi_py.data.holdout import hold_out
from abi_py.errors import DataError


def row(question, answer, category=None, **more):
    return read_conversation({"instruction": question, "response": answer, "category": category, **more})


def names(rows, numbers):
    return [rows[i].messages[0].content for i in numbers]


def test_rows_at_the_end_are_told_or_new_by_their_answers():
    rows = [row("a", "1"), row("b", "2"), row("c", "1"), row("d", "3")]
    split = hold_out(rows, 0.5, again=False, name="x")
    assert (split.train, split.told, split.new) == ((0, 1), (2,), (3,))


def test_a_row_is_told_only_if_all_of_its_answers_are():
    talk = [{"role": role, "content": text} for role, text in (("user", "b"), ("assistant", "1"), ("user", "c"))]
    half = read_conversation({"messages": [*talk, {"role": "assistant", "content": "2"}]})
    split = hold_out([row("a", "1"), half], 0.5, again=False, name="x")
    assert (split.told, split.new) == ((), (1,))


def test_calls_of_tools_are_answers_too():
    def call(question, city):
        function = {"name": "weather", "arguments": {"city": city}}
        turns = [{"role": "user", "content": question}, {"role": "assistant", "tool_calls": [{"function": function}]}]
        return read_conversation({"messages": turns})

    split = hold_out([call("a", "Rome"), call("b", "Rome"), call("c", "Oslo")], 0.6, again=False, name="x")
    assert (split.told, split.new) == ((1,), (2,))


def test_both_parts_of_data_that_ask_again():
    """A row that is new in content takes along those that ask it again: its answer is nowhere in the training part."""
    rows = [row(f"q{i}", f"a{i}", "facts") for i in range(10)]
    rows += [row(f"again q{i}", f"a{i}", "again") for i in (0, 1, 2, 9)]
    split = hold_out(rows, 0.3, again=True, name="x")
    assert names(rows, split.new) == ["q8", "q9", "again q9"]
    assert names(rows, split.told) == ["again q1", "again q2"]
    assert len(split.train) == 9


@pytest.mark.parametrize("again", [False, True])
def test_none_one_and_few(again):
    rows = [row("a", "1"), row("b", "2")]
    assert hold_out(rows, 0.0, again=again, name="x").train == (0, 1)
    assert len(hold_out(rows, 0.1, again=False, name="x").kept) == 1
    with pytest.raises(DataError, match=r"talks: one conversation cannot be split"):
        hold_out(rows[:1], 0.1, again=again, name="talks")
