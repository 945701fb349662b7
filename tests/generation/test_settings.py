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
        ({"typical_p": 0}, "typical_p"),
        ({"epsilon_cutoff": 1}, "epsilon_cutoff"),
        ({"eta_cutoff": -0.1}, "eta_cutoff"),
        ({"suppress_tokens": (3, -1)}, "suppress_tokens"),
        ({"forced_eos_token_id": ("x",)}, "forced_eos_token_id"),
        ({"bad_words_ids": ("5 x",)}, "bad_words_ids"),
        ({"bad_words_ids": [[5, -1]]}, "bad_words_ids"),
        ({"bad_words_ids": [[]]}, "bad_words_ids"),
        ({"min_new_tokens": -1}, "min_new_tokens"),
        ({"min_length": -1}, "min_length"),
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


# -- everything else that a file may say ----------------------------------------------------------

COMPUTED = {
    "typical_p": 0.9,
    "epsilon_cutoff": 0.001,
    "eta_cutoff": 0.002,
    "bad_words_ids": [[5, 17], [3]],
    "suppress_tokens": [1, 2],
    "begin_suppress_tokens": [4],
    "min_new_tokens": 3,
    "min_length": 9,
    "forced_eos_token_id": [6, 7],
    "stop_strings": ["x"],
}


def load(tmp_path, **content):
    (tmp_path / "generation_config.json").write_text(json.dumps(content))
    return GenerationConfig.load(tmp_path)


def test_what_is_computed_is_read_and_written(tmp_path):
    config = load(tmp_path, do_sample=True, **COMPUTED)
    assert config.bad_words == ((5, 17), (3,))
    assert (config.suppress_tokens, config.forced_eos_token_id, config.min_new_tokens) == ((1, 2), (6, 7), 3)
    assert config.filters()["typical_p"] == 0.9
    assert config.other == {}
    content = config.to_json()
    assert {name: content[name] for name in COMPUTED} == COMPUTED
    assert load(tmp_path, forced_eos_token_id=6).forced_eos_token_id == (6,)


def test_words_may_be_text_or_ids():
    assert GenerationConfig(bad_words_ids=[[5, 17], (3,)]) == GenerationConfig(bad_words_ids=("5 17", "3"))
    assert GenerationConfig(bad_words_ids=[[5, 17]]).replace(seed=3).bad_words == ((5, 17),)


@pytest.mark.parametrize(
    ("name", "value", "neutral"),
    [
        ("num_beams", 4, 1),
        ("num_return_sequences", 2, 1),
        ("guidance_scale", 1.5, 1.0),
        ("penalty_alpha", 0.6, 0.0),
        ("encoder_repetition_penalty", 1.2, 1.0),
        ("encoder_no_repeat_ngram_size", 3, 0),
        ("sequence_bias", [[[1], 2.0]], None),
        ("exponential_decay_length_penalty", [3, 1.1], None),
        ("forced_bos_token_id", 1, None),
        ("remove_invalid_values", True, False),
        ("watermarking_config", {"bias": 2.0}, None),
        ("top_h", 0.4, None),
        ("max_time", 3.0, None),
        ("token_healing", True, False),
        ("dola_layers", "high", None),
        ("force_words_ids", [[1]], []),
    ],
)
def test_what_is_not_computed_is_refused_by_name(tmp_path, name, value, neutral):
    assert load(tmp_path, **{name: neutral}).other == {name: neutral}
    with pytest.raises(ConfigError, match=rf"generation_config\.json: {name} is .*not compute.*--config"):
        load(tmp_path, **{name: value})


def test_unknown_keys_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"'supress_tokens' is not a setting.*did you mean suppress_tokens\?"):
        load(tmp_path, supress_tokens=[1])
    assert load(tmp_path, something=None, use_cache=True, transformers_version="5.24").other == {
        "something": None,
        "use_cache": True,
        "transformers_version": "5.24",
    }


@pytest.mark.parametrize("value", ["2", [1, "x"], -1, True, 1.5])
def test_end_tokens_that_are_no_ids(tmp_path, value):
    with pytest.raises(DataError, match=r"generation_config\.json: eos_token_id is"):
        load(tmp_path, eos_token_id=value)
