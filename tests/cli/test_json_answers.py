"""Answers that are checked as JSON: what counts as JSON, the flag of run and of eval, what both refuse."""

import json

import numpy as np
import pytest
from world import make_folder, write_talks

from abi_py.data.chat_dataset import ChatDataset
from abi_py.data.tokenizer import Tokenizer
from abi_py.runs.json_answers import check_answers, judge

OWN = {"op": "add", "terms": [1, 2]}


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ('{"op": "add", "terms": [1, 2]}', (True, True, True)),
        (' {"terms": [1, 2],\n "op": "add"}\n', (True, True, True)),
        ('{"op": "add", "terms": []}', (True, True, False)),
        ('{"op": "add"}', (True, False, False)),
        ('{"op": "add", "terms": [], "more": 1}', (True, False, False)),
        *((text, (False, False, False)) for text in ("", "[1, 2]", "2", '{"op": "add"', 'Sure: {"op": "add"}')),
        *((text, (False, False, False)) for text in ('{"op": NaN}', '{"op": 1, "op": 2}', '{"op": 1} {"op": 1}')),
    ],
)
def test_what_an_answer_is(answer, verdict):
    assert judge(answer, OWN) == verdict


@pytest.mark.parametrize(
    ("answer", "own", "equal"),
    [
        ('{"a": true}', {"a": 1}, False),
        ('{"a": [{"b": 0}]}', {"a": [{"b": False}]}, False),
        ('{"a": [true, {"b": null}]}', {"a": [True, {"b": None}]}, True),
        ('{"a": 1.0}', {"a": 1}, True),  # JSON has one kind of numbers
        ('{"a": [1]}', {"a": [1, 2]}, False),
        ('{"a": {}}', {"a": []}, False),
    ],
)
def test_true_is_not_one(answer, own, equal):
    assert judge(answer, own) == (True, True, equal)


def test_white_space_is_that_of_json():
    assert judge(' \t\r\n{"a": 1}\n', {"a": 1}) == (True, True, True)
    assert judge('\N{NO-BREAK SPACE}{"a": 1}', {"a": 1}) == (False, False, False)


class Echo:
    """A tokenizer of bytes."""

    def decode(self, ids, skip_special_tokens=False):
        """Return the text of ids."""
        return bytes(int(i) for i in ids if i < 256).decode()


def rows(*pairs):
    """Return conversations of bytes: a question, and an answer that is trained."""
    made = []
    for question, answer in pairs:
        ids = np.frombuffer((question + answer).encode(), np.uint8).astype(np.uint32)
        made.append((ids, np.arange(len(ids)) >= len(question)))
    return ChatDataset(made, vocab_size=257, max_seq_len=96, name="talks")


def test_rows_without_an_object_are_not_asked(monkeypatch):
    asked = []

    class Made:
        def __init__(self, text):
            self.text = text

    def run(self, prompts, **settings):
        asked.append(([bytes(prompt.astype(np.uint8)).decode() for prompt in prompts], settings))
        return [Made('{"a": 1}'), Made('{"a": 2}'), Made("no")][: len(prompts)]

    monkeypatch.setattr("abi_py.generation.Generator.run", run)
    monkeypatch.setattr("abi_py.generation.Generator.__init__", lambda self, model, codec: None)
    model = type("Model", (), {"config": type("Shape", (), {"max_seq_len": 96})})
    data = rows(("one", '{"a": 1}'), ("two", "words"), ("three", '{"a":1}'), ("four", '{"b": 1}'), ("five", "[]"))
    found = check_answers(model, Echo(), (7,), data, 10)
    assert (found.asked, found.parsed, found.keyed, found.equal) == (3, 2, 2, 1)
    assert found.shares() == {"parsed": 2 / 3, "keyed": 2 / 3, "equal": 1 / 3}
    assert asked == [(["one", "three", "four"], {"temperature": 0.0, "max_new_tokens": 16, "stop_ids": (7,)})]
    assert check_answers(model, Echo(), (7,), data, 2).asked == 2
    none = check_answers(model, Echo(), (), rows(("a", "b")), 5)
    assert (none.asked, none.shares()) == (0, {})
    assert none.rows() == [("answers checked as JSON", "0")]


def write_json_talks(path):
    """Write conversations whose answers are objects."""
    sums = [(a, b) for a in range(6) for b in range(6)]
    answers = [(f"What is {a} plus {b}?", json.dumps({"op": "add", "sum": a + b})) for a, b in sums]
    turns = [[{"role": "user", "content": asked}, {"role": "assistant", "content": told}] for asked, told in answers]
    path.write_text("".join(json.dumps({"messages": each}) + "\n" for each in turns))


TRAIN = (
    "--base base --data talks.jsonl --out r --learning-rate 0.03 --batch-size 4 --epochs 12 --grad-accum-steps 1 "
    "--valid-fraction 0.2 --max-seq-len 96 --sample-tokens 0 --weight-decay 0"
)


def test_a_run_and_eval_count_the_same(abi_train, tmp_path):
    make_folder(tmp_path / "base", hidden_dim=32)
    write_json_talks(tmp_path / "talks.jsonl")
    code, out, err = abi_train("run", *TRAIN.split(), "--check-json", "5")
    assert code == 0, err
    found = json.loads((tmp_path / "r/evaluation.json").read_text())["json"]
    assert found["asked"] == 5
    assert found["asked"] >= found["parsed"] >= found["keyed"] >= found["equal"]
    assert found["keyed"] > 0  # the form of the answers is learned
    assert f"{found['keyed']} ({20 * found['keyed']:.1f}%)" in out
    records = [json.loads(line) for line in (tmp_path / "r/metrics.jsonl").read_text().splitlines()]
    (record,) = [record for record in records if record["type"] == "json_answers"]
    assert {name: record[name] for name in found} == found
    assert record["step"] == json.loads((tmp_path / "r/model/origin.json").read_text())["step"]  # whose weights answer
    assert "answers checked as JSON" in (tmp_path / "r/model/README.md").read_text()
    kept = Tokenizer.load(tmp_path / "r/model")
    assert kept.chat_template is not None
    code, out, err = abi_train("eval", "r", "talks.jsonl", "--check-json", "36", "--json")
    assert code == 0, err
    whole = json.loads(out)["json"]
    assert whole["asked"] == 36
    assert whole["parsed"] >= whole["keyed"] >= found["keyed"]
    code, out, _ = abi_train("eval", "r", "talks.jsonl", "--check-json", "36")
    assert "with the right keys" in out


def test_what_is_refused(abi_train, tmp_path):
    make_folder(tmp_path / "base")
    write_json_talks(tmp_path / "talks.jsonl")
    code, _, err = abi_train("run", *TRAIN.split(), "--check-json", "5", "--valid-fraction", "0")
    assert code == 2
    assert "check_json (5) has no effect without conversations that are kept" in err
    code, _, err = abi_train("run", *TRAIN.split(), "--check-json", "5", "--loss-on", "all")
    assert code == 2
    assert "check_json (5) has no effect: none of the 8 conversations kept for validation has an answer" in err
    assert not (tmp_path / "r").exists()  # before anything is trained
    (tmp_path / "t.txt").write_text("words " * 200)
    code, _, err = abi_train("eval", "base", "t.txt", "--check-json", "5")
    assert code == 2
    assert "check_json (5) is for conversations, and t.txt has none" in err


def test_eval_refuses_data_without_an_object_before_it_measures(abi_train, tmp_path, monkeypatch):
    make_folder(tmp_path / "base")
    write_talks(tmp_path / "plain.jsonl")
    monkeypatch.setattr("abi_py.training.perplexity.evaluate_conversations", lambda *a, **b: pytest.fail("measured"))
    code, out, err = abi_train("eval", "base", "plain.jsonl", "--check-json", "5")
    assert (code, out) == (2, "")
    assert "check_json (5) has no effect: none of the " in err
    assert "of plain.jsonl has an answer that is a JSON object" in err


def test_eval_of_conversations_with_a_model_of_bytes(abi_train, tmp_path):
    write_talks(tmp_path / "plain.jsonl")
    for name, size, said in (
        ("bytes", 257, "bytes reads text as bytes and has no chat template, without which there are no conversations; "
         "give texts instead of plain.jsonl"),
        ("ids", 300, "ids has no tokenizer, and so no chat template, without which there are no conversations; give "
         "--tokenizer, the one that it was trained with"),
    ):  # fmt: skip
        make_folder(tmp_path / name, tokenizer=False, vocab_size=size)
        code, _, err = abi_train("eval", name, "plain.jsonl")
        assert code == 2
        assert said in err
