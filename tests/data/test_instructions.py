"""Instruction rows: what is in the row is in the sample, and a bad row is named, never dropped in silence."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abi_py.data import InstructionList, InstructionSample, parse_instruction_dataset
from abi_py.errors import DataError

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)
GOOD = '{"instruction": "Add.", "input": "1 2", "output": "3"}'
CHAT = {
    "id": "x1",
    "conversations": [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "Hello"},
        {"from": "gpt", "value": "Hi"},
        {"from": "user", "value": "Bye"},
        {"from": "assistant", "value": "So long"},
    ],
}


@given(st.lists(st.tuples(TEXT, st.none() | st.text(st.characters(exclude_categories=["Cs"])), TEXT), min_size=1))
def test_alpaca_round_trip(rows: list[tuple[str, str | None, str]]) -> None:
    objects = [dict(zip(("instruction", "input", "output"), row, strict=True)) for row in rows]
    expected = [InstructionSample(*row) for row in rows]
    # Not escaped, so that U+2028 and its like stand in the text: they end no line.
    lines = [json.dumps(o, ensure_ascii=False) for o in objects]
    assert parse_instruction_dataset("\n".join(lines) + "\n") == expected
    assert parse_instruction_dataset("\r\n\r\n".join(lines).encode()) == expected
    assert parse_instruction_dataset(lines) == expected
    assert parse_instruction_dataset(json.dumps(objects, ensure_ascii=False, indent=1)) == expected


def test_missing_and_null_input_are_none_and_never_text() -> None:
    samples = parse_instruction_dataset(
        '{"instruction": "a", "output": "b"}\n'
        '{"instruction": "a", "input": null, "output": "b", "system": null, "history": null}\n'
        '{"instruction": "a", "input": "", "output": "b"}'
    )
    assert [sample.input for sample in samples] == [None, None, ""]
    assert samples[0] == samples[1] == InstructionSample("a", None, "b", None, ())
    assert "None" not in "".join(s.instruction + s.output for s in samples)


def test_alpaca_with_system_and_history_and_other_keys() -> None:
    row = {"instruction": "c", "output": "d", "system": "s", "history": [["a", "b"]], "id": 4, "text": "..."}
    assert parse_instruction_dataset([json.dumps(row)]) == [InstructionSample("c", None, "d", "s", (("a", "b"),))]


def test_sharegpt_keeps_every_turn() -> None:
    assert parse_instruction_dataset(json.dumps(CHAT)) == [
        InstructionSample("Hello", None, "Hi", "Be brief."),
        InstructionSample("Bye", None, "So long", "Be brief.", (("Hello", "Hi"),)),
    ]


def test_files(tmp_path: Path) -> None:
    lines, array = tmp_path / "rows.jsonl", tmp_path / "rows.json"
    lines.write_text(f"\ufeff{GOOD}\n\n{json.dumps(CHAT)}", encoding="utf-8")
    array.write_text(f"[{GOOD}, {json.dumps(CHAT, indent=2)}]\n", encoding="utf-8")
    samples = parse_instruction_dataset(lines)
    assert len(samples) == 3
    assert isinstance(samples, InstructionList)
    assert samples.skipped == []
    assert parse_instruction_dataset(str(array)) == samples
    with pytest.raises(FileNotFoundError):
        parse_instruction_dataset(tmp_path / "absent.jsonl")
    with pytest.raises(FileNotFoundError):
        parse_instruction_dataset("absent.jsonl")


BAD_ROWS = [
    ("{'instruction'}", "not a JSON object: .* at column 2"),
    ("[1, 2]", "a row must be a JSON object, found a list"),
    ("null", "found null"),
    ('{"prompt": "a", "answer": "b"}', "found the keys 'prompt', 'answer'; expected 'instruction' and 'output'"),
    ("{}", "found the keys none"),
    ('{"instruction": "a"}', "expected 'instruction' and 'output'"),
    ('{"instruction": 4, "output": "b"}', "'instruction' must be a string, found a number"),
    ('{"instruction": "a", "output": null}', "'output' must be a string, found null"),
    ('{"instruction": "a", "output": true}', "found true or false"),
    ('{"instruction": " ", "output": "b"}', "'instruction' is empty"),
    ('{"instruction": "a", "output": ""}', "'output' is empty"),
    ('{"instruction": "a", "input": [], "output": "b"}', "'input' must be a string, found a list"),
    ('{"instruction": "a", "output": "b \\ud800"}', r"'output' holds \\ud800, half of a character, at character 2"),
    ('{"instruction": "a", "output": "b", "history": [["x"]]}', "'history' must be a list of"),
    ('{"conversations": []}', "found an empty list"),
    ('{"conversations": {}}', "found an object"),
    ('{"conversations": [{"role": "user", "content": "a"}]}', "ends without an answer"),
    ('{"conversations": [{"from": "robot", "value": "a"}]}', "turn 0: 'from' is 'robot'"),
    ('{"conversations": [{"from": "gpt", "value": "a"}]}', "turn 0 is from gpt, expected human"),
    ('{"conversations": [{"from": "human", "value": "a"}]}', "ends without an answer"),
    ('{"conversations": [{"from": "system", "value": "a"}]}', "ends without an answer"),
    ('{"conversations": [{"from": "human", "value": null}]}', "'turn 0 value' must be a string"),
    (
        '{"conversations": [{"from": "system", "value": "a"}, {"from": "human", "value": "b"}, '
        '{"from": "human", "value": "c"}]}',
        "turn 2 is from human, expected gpt",
    ),
    ("[" * 100_000, "row must be a JSON object|nested too deeply|not a JSON object"),
]


@pytest.mark.parametrize(("row", "message"), BAD_ROWS, ids=range(len(BAD_ROWS)))
def test_bad_row_is_an_error_with_its_place_or_is_counted(tmp_path: Path, row: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{GOOD}\n\n{row}\n{GOOD}\n")
    with pytest.raises(DataError, match=rf"rows\.jsonl:3: .*({message}).*skip_bad_rows=True"):
        parse_instruction_dataset(path)
    samples = parse_instruction_dataset(path, skip_bad_rows=True)
    assert len(samples) == 2
    assert len(samples.skipped) == 1
    assert "rows.jsonl:3: " in samples.skipped[0]


def test_bad_element_of_an_array_has_its_line() -> None:
    text = f'[\n{GOOD},\n\n  {{"instruction":\n "a"}},\n{GOOD}\n]'
    with pytest.raises(DataError, match="text:4: found the keys 'instruction'"):
        parse_instruction_dataset(text)
    samples = parse_instruction_dataset(text, skip_bad_rows=True)
    assert (len(samples), len(samples.skipped)) == (2, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"[\n{GOOD},\n{{]", r"text:3: the JSON breaks off here: \] closes what is not open"),
        (f"[{GOOD}\n{GOOD}]", r'text:2: expected "," or "\]"'),
        (f"[{GOOD}", r'text:1: expected "," or "\]"'),
        (f"[{GOOD},]", "breaks off here"),
        (f"[{GOOD}]\n\nmore", "text:3: there is text after the end"),
        ("[", "breaks off here"),
        (f"[\n{GOOD},\n{{", "text:3: the JSON breaks off here: the file ends"),
        ("[]", "text holds no samples: it has no rows"),
        ("", "no rows"),
        (b"", "no rows"),
        ("\n \n", "no rows"),
    ],
)
def test_broken_array_and_empty_text(text: str | bytes, message: str) -> None:
    for skip in (False, True):
        with pytest.raises(DataError, match=message):
            parse_instruction_dataset(text, skip_bad_rows=skip)


def test_line_that_is_not_utf8_is_one_bad_row() -> None:
    data = GOOD.encode() + b'\n{"instruction": "\xe9", "output": "b"}\n' + GOOD.encode()
    with pytest.raises(DataError, match="text:2: not a JSON object: byte 17 is not UTF-8"):
        parse_instruction_dataset(data)
    assert len(parse_instruction_dataset(data, skip_bad_rows=True)) == 2


def test_nothing_but_bad_rows_is_an_error() -> None:
    with pytest.raises(DataError, match="no row is good, the first of 2: lines:1: "):
        parse_instruction_dataset(["{}", "{}"], skip_bad_rows=True)
