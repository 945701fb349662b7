"""`export`: a model in the form that another program opens, the same in every number, or a reason why not."""

import errno
import json
import shutil

import numpy as np
import pytest
from world import make_folder, write_state, write_talks

from abi_py.config import LoraConfig, TrainableModelConfig
from abi_py.data import Tokenizer
from abi_py.formats.companions import Companions
from abi_py.formats.gguf import open_gguf
from abi_py.formats.safetensors import map_safetensors, read_safetensors
from abi_py.formats.zig import load_abic
from abi_py.model import LoraModel, TrainableModel
from abi_py.runs import exporting
from abi_py.runs.conversations import ends_of_answers
from abi_py.shape import ModelFamily
from abi_py.training.loading import load_model


@pytest.fixture
def run(abi_train, tmp_path):
    """Train a little from a folder; return the run."""
    write_talks(tmp_path / "talks.jsonl")
    make_folder(tmp_path / "base")
    words = ["--data", "talks.jsonl", "--sample-tokens", "0", "--max-steps", "4", "--eval-interval", "2"]
    code, _, err = abi_train("run", "--base", "base", *words, "--lr", "1e-3", "--out", "r")
    assert code == 0, err
    return tmp_path / "r"


def test_a_run_becomes_a_folder_that_is_whole(abi_train, run, tmp_path):
    code, out, err = abi_train("export", run, "-o", "model")
    assert (code, err) == (0, ""), err
    best = run / "checkpoints/llm_step_4"
    assert "taken    step 4, the last and the best by validation loss" in out
    assert "weights in float32, read again: as they were written" in out
    assert "abi-train chat model" in out
    wanted, found = (read_safetensors(place / "model.safetensors") for place in (best, tmp_path / "model"))
    assert wanted.keys() == found.keys()
    assert all(np.array_equal(wanted[name], found[name]) for name in wanted)
    ours, theirs = Companions.of(tmp_path / "model"), Companions.of(tmp_path / "base")
    assert (ours.files, ours.ids) == (theirs.files, theirs.ids)
    assert json.loads((tmp_path / "model/config.json").read_text())["model_type"] == "qwen2"
    assert abi_train("inspect", "model")[0] == 0
    assert not (tmp_path / "model/state.json").exists()


def test_a_file_for_llama_cpp(abi_train, tmp_path):
    make_folder(tmp_path / "base")
    code, out, err = abi_train("export", "base", "--to", "gguf", "--quantize", "q8_0", "-o", "m.gguf")
    assert (code, err) == (0, "")
    assert open_gguf(tmp_path / "m.gguf").metadata["general.name"] == "base"
    assert "weights in Q8_0, read again: they lost F16 0.0" in out  # rows of 16 are no blocks
    assert "of 16 tokens" in out
    code, out, _ = abi_train("export", "base", "--to", "gguf", "-o", "n.gguf", "--no-check")
    assert code == 0
    assert "read again" not in out
    assert "opens in abi-train chat n.gguf; llama.cpp: llama-cli -m n.gguf" in out
    (tmp_path / "a").write_text("mine")
    for words in (["gguf", "-o", "a/n.gguf"], ["hf", "-o", "a/n"]):
        code, _, err = abi_train("export", "base", "--to", *words)
        assert code == 2
        assert "must be in a directory, and a is a file; give another path" in err


def test_what_a_file_without_template_or_tokenizer_is_said_to_open_in(abi_train, tmp_path):
    make_folder(tmp_path / "mute", tokenizer=False)
    _, out, _ = abi_train("export", "mute", "--to", "gguf", "-o", "mute.gguf", "--no-check")
    assert out.splitlines()[-1] == "opens in abi-train generate mute.gguf"  # llama.cpp needs a tokenizer
    make_folder(tmp_path / "bytes", tokenizer=False, vocab_size=257)
    _, out, _ = abi_train("export", "bytes", "--to", "gguf", "-o", "bytes.gguf", "--no-check")
    assert out.splitlines()[-1] == "opens in abi-train generate bytes.gguf; llama.cpp: llama-cli -m bytes.gguf"
    code, _, err = abi_train("chat", "bytes.gguf", "--once", "Hello")
    assert code == 2
    assert "bytes.gguf reads text as bytes and has no chat template, without which" in err
    uses = {name: json.loads(abi_train("inspect", name, "--json")[1])["uses"] for name in ("mute.gguf", "bytes.gguf")}
    assert "llama.cpp: llama-cli -m bytes.gguf" in uses["bytes.gguf"]
    assert "abi-train llm bytes.gguf --data DATA" in uses["bytes.gguf"]
    assert not any("llama-cli" in use or "llm" in use for use in uses["mute.gguf"])
    assert "abi-train quantize mute.gguf OUT.gguf Q4_K_M" in uses["mute.gguf"]
    found = json.loads(abi_train("inspect", ".", "--json")[1])
    assert found["kind"] == "directory of GGUF files"
    assert found["uses"] == ["one of them: abi-train inspect bytes.gguf"]


def test_the_best_checkpoint_or_the_last(abi_train, run, tmp_path):
    """As if it was still being trained: there is no model/ yet."""
    shutil.rmtree(run / "model")
    write_state(run / "checkpoints/llm_step_4", best_step=2)
    assert "taken    step 2 of 4, the best by validation loss" in abi_train("export", run, "--best", "-o", "a")[1]
    assert "taken    step 4, the last" in abi_train("export", run, "-o", "b")[1]
    with open(run / "checkpoints/llm_step_2/model.safetensors", "ab") as file:
        file.write(b"more")
    code, _, err = abi_train("export", run, "--best", "-o", "c")
    assert code == 1
    assert "is damaged: " in err
    assert err.endswith("; --last takes the newest checkpoint that is whole\n")
    first, last = (read_safetensors(tmp_path / name / "model.safetensors") for name in "ab")
    assert not np.array_equal(first["model.embed_tokens.weight"], last["model.embed_tokens.weight"])


@pytest.mark.parametrize(("dtype", "code"), [("bfloat16", "BF16"), ("float16", "F16"), ("float32", "F32")])
def test_types_and_shards(abi_train, tmp_path, dtype, code):
    make_folder(tmp_path / "base")
    words = ["--dtype", dtype, "--max-shard-size", "4KB"]
    done, _, err = abi_train("export", "base", "-o", "model", *words)
    assert (done, err) == (0, ""), err
    index = json.loads((tmp_path / "model/model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 1
    wanted = read_safetensors(tmp_path / "base/model.safetensors")
    for shard in shards:
        for name, tensor in map_safetensors(tmp_path / "model" / shard).items():
            assert tensor.bf16 == (code == "BF16")
            error = {"BF16": 2**-8, "F16": 2**-11, "F32": 0}[code]
            assert np.allclose(tensor.widened(), wanted[name], rtol=error, atol=2**-24 * bool(error))
    done, out, _ = abi_train("export", "model", "-o", "again")  # in its own type, in one file
    assert f"weights in {dtype}" in out
    assert (tmp_path / "again/model.safetensors").is_file()


def test_a_run_from_scratch_brings_its_tokenizer_and_where_a_text_ends(abi_train, tmp_path):
    write_talks(tmp_path / "talks.jsonl")
    assert abi_train("tokenizer", "train", "talks.jsonl", "-o", "tok", "--vocab-size", "300")[0] == 0
    shape = "--hidden-dim 16 --num-layers 1 --num-heads 2 --num-kv-heads 1 --intermediate-dim 16 --max-seq-len 64"
    words = ["--data", "talks.jsonl", "--tokenizer", "tok", "--max-steps", "2", "--sample-tokens", "0", "--out", "r"]
    assert abi_train("run", *shape.split(), *words)[0] == 0
    code, _, err = abi_train("export", "r", "-o", "model")
    assert (code, err) == (0, ""), err
    codec = Tokenizer.load(tmp_path / "model")
    assert codec.hash == Tokenizer.load(tmp_path / "tok").hash
    assert codec.chat_template == Tokenizer.load(tmp_path / "r").chat_template is not None
    ends = ends_of_answers(tmp_path / "r")
    assert codec.eos_id in ends
    assert len(ends) > 1
    assert json.loads((tmp_path / "model/config.json").read_text())["eos_token_id"] == codec.eos_id
    assert set(json.loads((tmp_path / "model/generation_config.json").read_text())["eos_token_id"]) == set(ends)
    for form in ("zig", "abic"):
        code, _, err = abi_train("export", "r", "--to", form, "-o", form)
        assert (code, err) == (0, ""), err
    weights = load_model(tmp_path / "model").model.collect_weights()
    assert load_model(tmp_path / "zig").model.collect_weights().tobytes() == weights.tobytes()
    written = load_abic(tmp_path / "abic")
    assert (written.step, written.weights.tobytes()) == (2, weights.tobytes())
    assert json.loads((tmp_path / "zig/config.json").read_text())["model_type"] == "deepzig_conversational"
    assert set(json.loads((tmp_path / "zig/generation_config.json").read_text())["eos_token_id"]) == set(ends)


def test_adapters_are_merged(abi_train, tmp_path):
    base = load_model(make_folder(tmp_path / "base")).model
    lora = LoraModel(base, LoraConfig(rank=2), str(tmp_path / "base"))
    lora.parameters.weights_flat[:] = np.random.default_rng(3).normal(0, 0.1, lora.num_params())
    lora.save(tmp_path / "adapter")
    code, out, err = abi_train("export", "adapter", "-o", "model")
    assert (code, err) == (0, ""), err
    assert "adapters are merged" in out
    merged = lora.merged()
    assert load_model(tmp_path / "model").model.collect_weights().tobytes() == merged.collect_weights().tobytes()
    assert Companions.of(tmp_path / "model").files.keys() == Companions.of(tmp_path / "base").files.keys()


def test_adapters_with_a_tokenizer_keep_how_their_base_writes(abi_train, tmp_path):
    """PEFT and TRL save a tokenizer beside adapters; its end is one of those that the base knows."""
    base = make_folder(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "eos_token_id": [2, 0]}))
    settings = {"eos_token_id": [2, 0], "temperature": 0.7, "do_sample": True}
    (base / "generation_config.json").write_text(json.dumps(settings))
    LoraModel(load_model(base).model, LoraConfig(rank=2), str(base)).save(tmp_path / "adapter")
    for path in (base / "added_tokens.json", base / "chat_template.jinja", base / "tokenizer.json"):
        (tmp_path / "adapter" / path.name).write_bytes(path.read_bytes() + b"\n")
    settings_of_tokenizer = (base / "tokenizer_config.json").read_bytes()
    (tmp_path / "adapter/tokenizer_config.json").write_bytes(settings_of_tokenizer)
    code, _, err = abi_train("export", "adapter", "-o", "model")
    assert (code, err) == (0, ""), err
    assert json.loads((tmp_path / "model/generation_config.json").read_text()) == settings
    assert json.loads((tmp_path / "model/config.json").read_text())["eos_token_id"] == [2, 0]
    for name in ("added_tokens.json", "tokenizer.json"):
        assert (tmp_path / "model" / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["base", "--format", "abic", "-o", "x"], "format (abic) holds plain Llama models alone, because the Zig code"),
        (["base", "--format", "zig", "-o", "x"], "and this has family qwen2; use --format hf"),
        (["biased", "--to", "abic", "-o", "x"], "and this has attention_bias True; use --format hf"),
        (["plain", "--format", "abic", "--dtype", "float16", "-o", "x"], "dtype (float16) must be float32 for abic"),
        (["plain", "--format", "zig", "--max-shard-size", "1GB", "-o", "x"], "hf: in zig the weights are one file"),
        (["plain", "--format", "abic", "-o", "base"], "out (base) must be a file for abic"),
        (["base", "-o", "plain"], "out (plain) is there already; --force replaces it"),
        (["base", "-o", "base"], "out (base) must be another place than the model's own"),
        (["base", "--best", "-o", "x"], "best has no effect: base is one model, not a run; leave --best out"),
        (["base", "--max-shard-size", "some", "-o", "x"], "max_shard_size ('some')"),
        (["base", "--to", "onnx", "-o", "x"], "'onnx' is not one of 'hf', 'zig', 'abic', 'gguf', 'peft'"),
        (["nowhere", "-o", "x"], "does not exist"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_written(abi_train, tmp_path, words, said):
    make_folder(tmp_path / "base")
    make_folder(tmp_path / "plain", family="llama", tokenizer=False)
    if "biased" in words:
        make_folder(tmp_path / "biased", family="llama", attention_bias=True)
    before = sorted(path.name for path in tmp_path.iterdir())
    code, _, err = abi_train("export", *words)
    assert code == 2
    assert said in err
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("family", [family.value for family in ModelFamily])
def test_every_family_comes_in_and_goes_out(abi_train, tmp_path, family):
    """Trained further, exported, talked with, measured, inspected: by the calls that a user gives."""
    write_talks(tmp_path / "talks.jsonl")
    make_folder(tmp_path / "base", family=family)
    words = ["--data", "talks.jsonl", "--max-steps", "2", "--sample-tokens", "0", "--out", "r"]
    assert abi_train("run", "--base", "base", *words)[0] == 0
    code, _, err = abi_train("export", "r", "--last", "-o", "model", "--dtype", "bfloat16")
    assert (code, err) == (0, ""), err
    assert abi_train("inspect", "model", "--json")[0] == 0
    for model in ("r", "model"):
        assert abi_train("chat", model, "--once", "What is 2 plus 3?", "--max-new-tokens", "4")[0] == 0
    code, out, _ = abi_train("eval", "model", "talks.jsonl", "--json")
    assert code == 0
    assert np.isfinite(json.loads(out)["loss"])
    before, after = (load_model(tmp_path / place).model for place in ("base", "model"))
    assert before.config == after.config
    assert Companions.of(tmp_path / "model").files == Companions.of(tmp_path / "base").files


def test_a_program_that_needs_a_tokenizer_is_not_said_to_open_a_model_without(abi_train, tmp_path):
    make_folder(tmp_path / "whole")
    make_folder(tmp_path / "bare", tokenizer=False)
    assert "llama.cpp" in abi_train("export", "whole", "-o", "a")[1]
    assert "llama.cpp" not in abi_train("export", "bare", "-o", "b")[1]


def test_force_replaces(abi_train, tmp_path):
    make_folder(tmp_path / "base")
    make_folder(tmp_path / "old", hidden_dim=32)
    assert abi_train("export", "base", "-o", "old", "--force")[0] == 0
    assert load_model(tmp_path / "old").model.config.hidden_dim == 16
    make_folder(tmp_path / "bare", tokenizer=False)
    assert abi_train("export", "bare", "-o", "old", "--force")[0] == 0
    assert not [*(tmp_path / "old").glob("*token*"), *(tmp_path / "old").glob("*template*")]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["adapter", "-o", "base"], "out (base) must be another place than that of the base under the adapters"),
        (["plain", "--to", "abic", "-o", "plain/model.safetensors"], "must not replace what belongs to plain; choose"),
        (["plain", "--to", "zig", "-o", "file"], "out (file) must be a directory for zig, and is a file"),
        (["plain", "-o", "file"], "out (file) must be a directory for hf, and is a file"),
    ],
)
def test_force_does_not_replace_what_the_model_is_made_of(abi_train, tmp_path, words, said):
    base = make_folder(tmp_path / "base")
    make_folder(tmp_path / "plain", family="llama")
    (tmp_path / "file").write_text("kept")
    LoraModel(load_model(base).model, LoraConfig(rank=2), str(base)).save(tmp_path / "adapter")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    code, _, err = abi_train("export", *words, "--force")
    assert code == 2
    assert said in err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_folder_of_deepzig_is_replaced_whole_or_not_at_all(abi_train, tmp_path, monkeypatch):
    """Nothing of the model of before stays in it; what the user put there does; a full disk changes nothing."""
    make_folder(tmp_path / "bare", family="llama", tokenizer=False)
    old = make_folder(tmp_path / "old", family="llama")
    (old / "LICENSE").write_text("free")
    before = {path.name: path.read_bytes() for path in old.iterdir()}

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(exporting, "write_model", full)
        assert abi_train("export", "bare", "--format", "zig", "-o", "old", "--force")[0] == 1
    assert {path.name: path.read_bytes() for path in old.iterdir()} == before
    code, _, err = abi_train("export", "bare", "--format", "deepzig", "-o", "old", "--force")  # the earlier name
    assert (code, err) == (0, ""), err
    names = {path.name for path in old.iterdir()}
    assert names == {"LICENSE", "config.json", "generation_config.json", "model.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == {"bare", "old"}


def test_a_disk_that_writes_something_else_is_found(abi_train, tmp_path, monkeypatch):
    make_folder(tmp_path / "base")
    read = exporting.read_tensors

    def spoilt(folder):
        tensors = read(folder)
        name = next(iter(tensors))
        raw = tensors[name].raw.copy()
        raw.flat[0] += 1
        return {**tensors, name: type(tensors[name])(raw)}

    monkeypatch.setattr(exporting, "read_tensors", spoilt)
    code, _, err = abi_train("export", "base", "-o", "model")
    assert code == 1
    assert "does not read as it was written" in err


def test_weights_that_are_too_large_for_a_type_are_refused(abi_train, tmp_path):
    make_folder(tmp_path / "base", tokenizer=False)
    model = TrainableModel.from_pretrained(tmp_path / "base")
    model.weights["layers.0.w_q"][0, 0] = 1e6
    model.save_pretrained(tmp_path / "large")
    code, _, err = abi_train("export", "large", "--dtype", "float16", "-o", "model")
    assert code == 1
    assert err.count("\n") == 1
    assert not (tmp_path / "model").exists()


def test_a_shape_that_zig_knows_is_one_of_defaults(tmp_path):
    shape = TrainableModelConfig(
        hidden_dim=8, num_layers=1, num_heads=1, num_kv_heads=1, intermediate_dim=8, vocab_size=9
    )
    exporting.check_format("zig", shape, None, None)
