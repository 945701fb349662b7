"""The files of a tokenizer: what each of them says is taken, what is wrong with one is an error with its name."""

import json
from pathlib import Path

import pytest

from abi_py.data import Tokenizer
from abi_py.data.chat import template_for
from abi_py.errors import DataError


def test_the_config_names_the_roles(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    config = {"bos_token": None, "eos_token": {"content": "</user>"}, "chat_template": "{{ messages }}", "other": 3}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id) == (None, 5, 3)
    assert loaded.chat_template == "{{ messages }}"
    loaded.chat_template = "new"
    loaded.save(tmp_path / "copy")
    copy = Tokenizer.load(tmp_path / "copy")
    assert (copy.chat_template, copy.bos_id, copy.eos_id, copy.config["other"]) == ("new", None, 5, 3)
    assert copy.hash == loaded.hash == tokenizer.hash
    assert copy.encode("<s>fox") == tokenizer.encode("<s>fox")


def test_chat_templates_of_other_forms(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert Tokenizer.load(tmp_path).chat_template == "D"
    assert template_for(Tokenizer.load(tmp_path)).name == f"the chat template of {tmp_path / 'tokenizer_config.json'}"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert Tokenizer.load(tmp_path).chat_template == "file"
    assert template_for(Tokenizer.load(tmp_path)).name == f"the chat template of {tmp_path / 'chat_template.jinja'}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no tokenizer.json"),
        (b'{"version": \n', r"tokenizer.json is not JSON \(Expecting value at line 2, column 1\)"),
        (b"[]", r"it is \[\], but must be an object"),
        (b"{}", "lacks 'model'"),
        (b'{"model": {}}', "no tokenizer that the `tokenizers` library"),
        (b'{"model": {"vocab": {"a": 2147483648}}}', r"2147483648 is no id of a vocabulary of 1 tokens"),
        (b'{"model": {"vocab": {"a": "b"}}}', r"'b' is no id of a vocabulary"),
        (b'{"model": {}, "added_tokens": [{"id": -1, "content": "a"}]}', r"-1 is no id of a vocabulary of 0 tokens"),
        (b'{"model": {}, "added_tokens": [{}]}', r"added_tokens: \[0\] lacks 'id'"),
        (b'{"model": {"vocab": {"a": 0, "b": 0}}}', "'a' and 'b' have the same id 0"),
        (
            b'{"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 0, "content": "<s>"}]}',
            "'a' and '<s>' have the same id 0",
        ),
        (b'{"model": {}, "added_tokens": [{"id": 0, "content": ""}]}', 'added_tokens holds ""'),
        (b"\xff\xfe", "byte 0 is not UTF-8"),
        (b"\x93NUMPY", "a tokenizer is a tokenizer.json"),
    ],
)
def test_files_that_are_no_tokenizer(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        Tokenizer.load(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_what_is_checked_is_what_the_library_reads(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer.save(tmp_path)
    checked = json.dumps({**json.loads(tokenizer.backend.to_str()), "added_tokens": []}).encode()
    monkeypatch.setattr("abi_py.data.tokenizer_files.read_bytes", lambda path, error: checked)
    assert tokenizer.special_ids
    assert not Tokenizer.load(tmp_path).special_ids


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is not there; .*abi-train tokenizer train"):
        Tokenizer.load(tmp_path / "no.json")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"eos_token": "<none>"}, "eos_token is '<none>', which is not in the vocabulary"),
        ({"eos_token": 4}, "eos_token is 4"),
        ({"chat_template": 5}, "chat_template .* is a int"),
        ({"chat_template": [{"name": "x"}]}, "with name and template"),
    ],
)
def test_bad_config(tokenizer: Tokenizer, tmp_path: Path, config: dict, message: str) -> None:
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=message):
        Tokenizer.load(tmp_path)
