"""GenerationConfig: rules, limits, and Hugging Face's generation_config.json."""

import json

import pytest

from abi_py.errors import ConfigError, DataError
from abi_py.generation import GenerationConfig


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"max_length": 0}, "max_length"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0}, "top_p"),
        ({"min_p": 1.1}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"no_repeat_ngram_size": -2}, "no_repeat_ngram_size"),
        ({"seed": -1}, "seed"),
        ({"logprobs": -1}, "logprobs"),
        ({"stop_ids": (3, -1)}, "stop_ids"),
        ({"stop_ids": ("x",)}, "stop_ids"),
        ({"stop_strings": ("a", "")}, "stop_strings"),
    ],
)
def test_values_out_of_range_are_named(settings, name):
    with pytest.raises(ConfigError, match=name):
        GenerationConfig(**settings)


def test_single_values_and_lists_become_tuples():
    config = GenerationConfig(stop_ids=7, stop_strings=["a", "b"])
    assert config.stop_ids == (7,)
    assert config.stop_strings == ("a", "b")


def test_limit():
    assert GenerationConfig(max_new_tokens=5, max_length=9).limit(8, 100) == 5  # as in Hugging Face
    assert GenerationConfig(max_new_tokens=None, max_length=9).limit(7, 100) == 2
    assert GenerationConfig(max_new_tokens=None, max_length=9).limit(12, 100) == 0
    assert GenerationConfig(max_new_tokens=None).limit(12, 100) == 88


DEEPZIG = {
    "max_length": 2048,
    "temperature": 0.8,
    "top_p": 0.9,
    "top_k": 40,
    "repetition_penalty": 1.1,
    "do_sample": True,
    "pad_token_id": 3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def test_a_file_read_and_written_keeps_everything(tmp_path):
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps(DEEPZIG))
    config = GenerationConfig.load(tmp_path)
    assert (config.temperature, config.top_k, config.max_length, config.max_new_tokens) == (0.8, 40, 2048, None)
    assert config.stop_ids == (2,)
    assert config.other == {"pad_token_id": 3, "bos_token_id": 1}
    config.save(tmp_path)
    assert json.loads(file.read_text()) == DEEPZIG
    changed = config.replace(temperature=0.5)
    changed.save(tmp_path / "other.json")
    assert json.loads((tmp_path / "other.json").read_text()) == DEEPZIG | {"temperature": 0.5}


def test_what_a_file_leaves_out_is_as_in_transformers(tmp_path):
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": [1, 2], "transformers_version": "4.57"}))
    config = GenerationConfig.load(file)
    assert config.greedy
    assert (config.top_k, config.top_p, config.stop_ids) == (50, 1.0, (1, 2))
    file.write_text(json.dumps({"do_sample": True}))
    assert GenerationConfig.load(file).temperature == 1.0


def test_a_greedy_file_says_nothing_about_drawing(tmp_path):
    GenerationConfig(temperature=0, stop_strings=("x",), no_repeat_ngram_size=2).save(tmp_path)
    content = json.loads((tmp_path / "generation_config.json").read_text())
    assert content["do_sample"] is False
    assert content["stop_strings"] == ["x"]
    assert not {"temperature", "top_k", "top_p", "min_p"} & set(content)
    assert GenerationConfig.load(tmp_path).greedy


@pytest.mark.parametrize("text", ["", "[1]", '{"top_p": 3, "do_sample": true}'])
def test_damaged_files_are_named(tmp_path, text):
    file = tmp_path / "generation_config.json"
    file.write_text(text)
    with pytest.raises((DataError, ConfigError), match=r"generation_config\.json"):
        GenerationConfig.load(tmp_path)
