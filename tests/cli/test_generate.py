"""abi-train generate: prompts from everywhere, text and JSON out, and what is said about wrong calls."""

import io
import json
import signal
import subprocess
import sys

import numba
import numpy as np
import pytest
import tokenizers
from waiting import PATIENCE

from abi_py.config import TrainableModelConfig
from abi_py.families import write_config
from abi_py.formats.safetensors import write_safetensors
from abi_py.generation import generate
from abi_py.model import TrainableModel

SHAPE = {"hidden_dim": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "intermediate_dim": 16}


def save_folder(directory, vocab_size=257, **more):
    """Write a folder of Hugging Face's kind and return its model."""
    model = TrainableModel(TrainableModelConfig(vocab_size=vocab_size, max_seq_len=64, seed=3, **SHAPE))
    model.parameters.weights_flat[...] *= 8
    directory.mkdir()
    tensors = {entry.hf_name: model.weights[entry.name] for entry in model.parameters.table}
    write_safetensors(directory / "model.safetensors", tensors)
    (directory / "config.json").write_text(json.dumps(write_config(model.config) | more))
    return model


@pytest.fixture
def model(tmp_path):
    return save_folder(tmp_path / "m")


def test_one_prompt_is_text_on_stdout(abi_train, model):
    code, out, err = abi_train("generate", "m", "-p", "The ", "--max-new-tokens", "12", "--temperature", "0")
    assert code == 0
    assert out == generate(model, "The ", 12, temperature=0) + "\n"
    assert "4 tokens of prompt" in err
    assert "12 new" in err


def test_a_prompt_from_stdin(abi_train, model, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("Thé \n".encode())))
    code, out, _ = abi_train("generate", "m", "--max-new-tokens", "5", "--seed", "4")
    assert code == 0
    assert out == generate(model, "Thé ", 5, seed=4) + "\n"


def test_several_prompts_as_json(abi_train, model):
    flags = [
        "--max-new-tokens", "6", "--logprobs", "2", "--stop-strings", "q", "--stop-strings", "z", "--stop-ids", "5",
    ]
    code, out, _ = abi_train("generate", "m", "-p", "a", "-p", "bc", "--ids", "7 9", "--json", *flags)
    assert code == 0
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["prompt"] for row in rows] == ["a", "bc", [7, 9]]
    expected = generate(model, ["a", "bc"], 6, stop=["q", "z", 5])
    assert [row["text"] for row in rows[:2]] == expected
    for row in rows:
        assert len(row["ids"]) == len(row["logprobs"]) == len(row["top_logprobs"]) == row["new_tokens"]
        assert all(len(top) == 2 for top in row["top_logprobs"])


def test_several_prompts_as_text(abi_train, model):
    code, out, _ = abi_train("generate", "m", "-p", "a", "-p", "b", "--max-new-tokens", "3")
    assert code == 0
    first, second = generate(model, ["a", "b"], 3)
    assert out == f"== a\n{first}\n== b\n{second}\n"


def test_the_models_own_settings_and_the_flags_that_beat_them(abi_train, model, tmp_path):
    settings = {"do_sample": True, "temperature": 1.5, "top_k": 3, "max_new_tokens": 7, "eos_token_id": 300}
    (tmp_path / "m/generation_config.json").write_text(json.dumps(settings))
    asked = {"temperature": 1.5, "top_k": 3, "top_p": 1, "stop_ids": (300,)}
    assert abi_train("generate", "m", "-p", "a")[1] == generate(model, "a", 7, **asked) + "\n"
    out = abi_train("generate", "m", "-p", "a", "--top-k", "0", "--seed", "1")[1]
    assert out == generate(model, "a", 7, **{**asked, "top_k": 0, "seed": 1}) + "\n"
    (tmp_path / "g.json").write_text(json.dumps({"max_new_tokens": 2}))
    out = abi_train("generate", "m", "-p", "a", "--config", "g.json")[1]
    assert out == generate(model, "a", 2, temperature=0) + "\n"


def test_a_text_ends_where_the_folder_says(abi_train, tmp_path):
    model = save_folder(tmp_path / "m")
    drawn = {"temperature": 40.0, "top_k": 0, "top_p": 1.0, "seed": 4}
    free = generate(model, [97], 9, stop_ids=(), **drawn).tolist()
    first = {token: free.index(token) for token in reversed(free)}
    early, late = sorted(first.items(), key=lambda item: item[1])[1:3]

    def ids(*flags):
        for name, value in drawn.items():
            flags = (f"--{name.replace('_', '-')}", str(value), *flags)
        return json.loads(abi_train("generate", "m", "-p", "a", "--max-new-tokens", "9", "--json", *flags)[1])["ids"]

    def config(**more):
        return json.dumps(write_config(model.config) | more)

    assert ids() == free
    (tmp_path / "m/config.json").write_text(config(eos_token_id=[late[0], 300, early[0]]))
    assert ids() == free[: early[1]]
    assert ids("--stop-ids", str(late[0])) == free[: late[1]]
    (tmp_path / "m/generation_config.json").write_text(json.dumps({"eos_token_id": late[0]}))
    assert ids() == free[: late[1]]
    (tmp_path / "m/generation_config.json").write_text(json.dumps({"eos_token_id": []}))
    assert ids() == free  # says that nothing does
    (tmp_path / "m/generation_config.json").write_text(json.dumps({"eos_token_id": "x"}))
    code, _, err = abi_train("generate", "m", "-p", "a")
    assert (code, len(err.splitlines())) == (1, 1)
    assert "generation_config.json: eos_token_id is 'x'" in err


def test_a_tokenizer_beside_the_model(abi_train, tmp_path):
    vocabulary = {word: i for i, word in enumerate(["<unk>", "a", "b", "c", "</s>"])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.add_special_tokens(["</s>"])
    model = save_folder(tmp_path / "w", vocab_size=5)
    flags = ["--max-new-tokens", "9", "--temperature", "0", "--json"]
    code, _, err = abi_train("generate", "w", "-p", "a b", *flags)
    assert code == 2
    assert "--tokenizer" in err
    backend.save(str(tmp_path / "w/tokenizer.json"))
    code, out, _ = abi_train("generate", "w", "-p", "a b", *flags)
    assert code == 0
    row = json.loads(out)
    assert row["prompt_tokens"] == 2
    assert row["ids"] == generate(model, [1, 2], 9, temperature=0, stop=4).tolist()
    assert row["text"] == backend.decode([1, 2, *row["ids"]], skip_special_tokens=False).removeprefix("a b")


def test_a_run_directory(abi_train, tiny):
    assert abi_train("run", "--out", "r", *tiny, "--max-steps", "2")[0] == 0
    for path in ("r", "r/checkpoints"):
        code, out, _ = abi_train("generate", path, "-p", "x", "--max-new-tokens", "4")
        assert code == 0
        assert len(out) > 1


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["nothing", "-p", "x"], "nothing"),
        (["m", "-p", ""], "prompt"),
        (["m", "--ids", "1 x"], "ids"),
        (["m", "-p", "x", "--top-p", "0"], "top_p"),
        (["m", "-p", "x", "--num-threads", "-1"], "num_threads"),
        (["m", "-p", "x", "--max-new-tokens", "many"], "max_new_tokens"),
        (["m", "-p", "x", "--config", "nothing.json"], "nothing.json"),
    ],
)
def test_wrong_calls(abi_train, model, uncompiled, words, part):
    code, out, err = abi_train("generate", *words)
    assert (code, out) == (2, "")
    assert part in err
    assert len(err.splitlines()) == 1


def test_no_threads_are_all_of_them(abi_train, model):
    before = numba.get_num_threads()
    try:
        numba.set_num_threads(1)
        assert abi_train("generate", "m", "-p", "x", "--num-threads", "0", "--max-new-tokens", "1")[0] == 0
        assert numba.get_num_threads() == numba.config.NUMBA_NUM_THREADS
    finally:
        numba.set_num_threads(before)


def test_ids_outside_the_vocabulary_are_told_before_compiling(abi_train, model, uncompiled):
    code, out, err = abi_train("generate", "m", "--ids", "1 999")
    assert (code, out, len(err.splitlines())) == (1, "", 1)
    assert "id 999 at place 1 must be 0 ... 256" in err
    code, out, err = abi_train("generate", "m", "--ids", "1", "--stop-ids", "999")
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert "stop_ids holds 999, but the model's ids are 0 ... 256" in err


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"model_type": "bert"}, "model_type"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling"),
        ({"hidden_size": 20}, "config.json"),
        ({"num_hidden_layers": 2}, "layers.1"),
        ({"intermediate_size": 20}, "mlp.gate_proj"),
    ],
)
def test_folders_that_cannot_be_read(abi_train, tmp_path, change, part):
    save_folder(tmp_path / "m", **change)
    code, _, err = abi_train("generate", "m", "-p", "x")
    assert code == 1
    assert part in err


def test_a_folder_in_shards(abi_train, model, tmp_path):
    tensors = {entry.hf_name: model.weights[entry.name] for entry in model.parameters.table}
    wanted = abi_train("generate", "m", "-p", "x")[1]
    (tmp_path / "m/model.safetensors").unlink()
    assert "model.safetensors" in abi_train("generate", "m", "-p", "x")[2]
    names = sorted(tensors)
    places = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(names)}
    for file in set(places.values()):
        part = {name: tensors[name].astype(np.float64) for name in names if places[name] == file}
        write_safetensors(tmp_path / "m" / file, part)
    (tmp_path / "m/model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert abi_train("generate", "m", "-p", "x")[1] == wanted


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_ctrl_c_keeps_what_is_there(process, model):
    child = process("generate", "m", "-p", "x", "--max-new-tokens", "100000000", stdin=subprocess.DEVNULL)
    assert child.stdout.read(20)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=PATIENCE)
    assert child.returncode == 130
    assert out.endswith("\n")
    assert "stopped by Ctrl-C" in err
    assert "Traceback" not in err


def test_a_reader_who_goes_away(process, model):
    child = process("generate", "m", "-p", "x", "--max-new-tokens", "100000000", stdin=subprocess.DEVNULL)
    assert child.stdout.read(20)
    child.stdout.close()
    assert child.wait(timeout=PATIENCE) == 0
    assert "Traceback" not in child.stderr.read()
