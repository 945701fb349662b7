"""`inspect`: every kind of file and folder is told by what it is, and what is wrong with it, without its weights."""

import errno
import json
import os
import struct

import numpy as np
import pytest
from world import TEMPLATE, make_folder, write_talks

from abi_py.config import LoraConfig, TrainableModelConfig
from abi_py.formats.safetensors import write_safetensors
from abi_py.formats.zig import save_abic, save_ablc
from abi_py.model import LoraModel
from abi_py.runs import inspecting
from abi_py.runs.inspecting import models
from abi_py.shape import ModelFamily
from abi_py.training.loading import load_model


@pytest.fixture
def facts(abi_train):
    """Return a function that inspects a path and gives the exit code and what --json says."""

    def call(*words):
        code, out, err = abi_train("inspect", *words, "--json")
        assert err == "", err
        return code, json.loads(out)

    return call


def test_a_folder_of_the_world(abi_train, facts, tmp_path):
    folder = make_folder(tmp_path / "base")
    code, found = facts(folder)
    shape = TrainableModelConfig.from_dict({**found["shape"], "family": found["family"]})
    assert (code, found["problems"], found["kind"]) == (0, [], "folder of Hugging Face's kind")
    assert (found["model_type"], shape.hidden_dim, shape.head_dim) == ("qwen2", 16, 8)
    assert found["parameters"] == shape.num_params() == found["tensors"]["dtypes"]["F32"]["elements"]
    assert "list" not in found["tensors"]
    assert found["ends a text"] == [2, 0]
    assert found["bytes"] == sum(path.stat().st_size for path in folder.iterdir())
    codec = found["tokenizer"]
    assert codec["eos"] == "2 <|im_end|>"
    assert codec["special tokens"] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert codec["chat template"] == f"{len(TEMPLATE)} characters of Jinja"
    assert [use.split()[1] for use in found["uses"][:5]] == ["generate", "chat", "eval", "run", "export"]
    _, listed = facts(folder, "--tensors")
    assert {"name": "model.layers.0.self_attn.k_proj.bias", "dtype": "F32", "shape": [8]} in listed["tensors"]["list"]

    code, out, err = abi_train("inspect", folder)
    assert (code, err) == (0, "")
    assert "\x1b" not in out
    assert "and 6 more: --tensors lists them" in out
    assert len(abi_train("inspect", folder, "--tensors")[1].splitlines()) == len(out.splitlines()) + 6 - 1


def test_of_experts_the_weights_that_one_token_meets_are_counted_too(facts, tmp_path):
    folder = make_folder(tmp_path / "base", family="mixtral", num_experts=4, experts_per_token=1, tokenizer=False)
    code, found = facts(folder)
    assert (code, found["problems"]) == (0, [])
    expert = 3 * 16 * 24
    assert found["parameters"] - found["active parameters"] == 3 * expert


def test_weights_are_not_loaded(facts, tmp_path, monkeypatch):
    folder = make_folder(tmp_path / "base", tie_embeddings=False)

    def refuse(self):
        raise AssertionError("the numbers of a tensor are read")

    monkeypatch.setattr(models.Stored, "widened", refuse)
    assert facts(folder)[0] == 0


@pytest.mark.parametrize("kind", ["BF16", "F16"])
def test_other_types_and_shards(facts, tmp_path, kind):
    folder = make_folder(tmp_path / "base", tokenizer=False)
    stored = {name: t.raw for name, t in models.map_safetensors(folder / "model.safetensors").items()}
    names = sorted(stored)
    weight_map = {}
    for number, part in enumerate((names[:5], names[5:]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        write_safetensors(folder / file, {name: stored[name].astype(np.float16) for name in part})
        weight_map |= dict.fromkeys(part, file)
    if kind == "BF16":  # the same bytes under another name of the type
        for file in set(weight_map.values()):
            raw = (folder / file).read_bytes()
            size = int.from_bytes(raw[:8], "little")
            head = raw[8 : 8 + size].replace(b'"F16"', b'"BF16"').rstrip()
            (folder / file).write_bytes(len(head).to_bytes(8, "little") + head + raw[8 + size :])
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    code, found = facts(folder)
    assert (code, found["shards"]) == (0, 2)
    assert list(found["tensors"]["dtypes"]) == [kind]
    assert found["tensors"]["dtypes"][kind]["bytes"] == 2 * found["parameters"]
    assert facts(folder / "model.safetensors.index.json")[1]["tensors named"] == len(names)
    (folder / "model-00002-of-00002.safetensors").unlink()
    code, found = facts(folder)
    assert code == 1
    assert "model-00002-of-00002.safetensors" in found["problems"][0]


def test_what_is_missing_or_unknown_is_named_and_the_rest_told(facts, tmp_path):
    folder = make_folder(tmp_path / "base")
    shape_alone = tmp_path / "shape"
    shape_alone.mkdir()
    (shape_alone / "config.json").write_bytes((folder / "config.json").read_bytes())
    code, found = facts(shape_alone)
    assert (code, found["weights"]) == (0, "none here, only the shape of a model")
    assert found["parameters"] > 0
    code, found = facts(folder / "model.safetensors")
    assert (code, found["kind"]) == (0, "file of tensors (safetensors)")
    assert facts(folder / "config.json")[1]["family"] == "qwen2"
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, "num_hidden_layers": 2}))
    code, found = facts(folder)
    assert code == 1
    assert "layers.1" in found["problems"][0]
    assert "generate" not in str(found["uses"])
    (folder / "config.json").write_text('{"model_type": "nobody_s"}')
    code, found = facts(folder)
    assert code == 1
    assert "model_type is 'nobody_s'" in found["problems"][0]
    assert found["tensors"]["count"] == 14
    (folder / "config.json").unlink()
    code, found = facts(folder)
    assert code == 1
    assert "no config.json" in found["problems"][0]
    assert found["tokenizer"]["eos"] == "2 <|im_end|>"


def test_runs_and_checkpoints(abi_train, facts, tmp_path):
    base = make_folder(tmp_path / "base")
    write_talks(tmp_path / "talks.jsonl")
    words = ["--data", "talks.jsonl", "--sample-tokens", "0", "--max-steps", "3", "--eval-interval", "2"]
    assert abi_train("run", "--base", base, *words, "--out", "r")[0] == 0
    code, found = facts("r")
    assert (code, found["kind"], found["problems"]) == (0, "run", [])
    assert found["started from"]["path"] == str(base)
    assert found["ended"] == "at its end"
    assert (found["step"], found["tokenizer"]["ids"] > 256) == (3, True)
    newest = tmp_path / "r/checkpoints/llm_step_3"
    code, found = facts(newest)
    assert (code, found["kind"], found["step"]) == (0, "checkpoint of a run", 3)
    assert f"abi-train resume {newest}" in found["uses"]
    assert facts("r/checkpoints")[1]["kind"] == "directory of checkpoints"
    assert facts("r/config.yaml")[1]["sections"]["base"] == "3 settings"
    with open(newest / "model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"!")
    code, found = facts(newest)
    assert code == 1
    assert "is damaged (checksum)" in found["problems"][0]
    code, found = facts("r")
    assert code == 1
    assert "llm_step_3" not in found["whole checkpoints"]


def test_adapters(facts, tmp_path):
    base = load_model(make_folder(tmp_path / "base")).model
    LoraModel(base, LoraConfig(rank=2), str(tmp_path / "base")).save(tmp_path / "adapter")
    code, found = facts(tmp_path / "adapter")
    assert (code, found["kind"], found["rank"]) == (0, "adapters of LoRA (PEFT)", 2)
    assert found["base"] == str(tmp_path / "base")
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    code, found = facts(tmp_path / "adapter")
    assert code == 1
    assert f"the model under them, {tmp_path}/base, is not there; put it back" in found["problems"][0]


def test_the_zig_trainer_s_files(facts, tmp_path):
    weights = np.arange(6, dtype=np.float32)
    save_abic(tmp_path / "a.bin", weights, step=7)
    save_ablc(tmp_path / "b.bin", weights, weights, weights, step=8, epoch=2, tokens_processed=99)
    assert facts("a.bin")[1] | {"uses": 0} == {
        **{"path": "a.bin", "kind": "ABIC file of the Zig trainer: weights", "bytes": 50, "version": 1, "step": 7},
        **{"parameters": 6, "holds": "floats alone: neither the shape of the model nor the names of its tensors"},
        **{"uses": 0, "problems": []},
    }
    code, found = facts("b.bin")
    assert (code, found["step"], found["epoch"], found["tokens"]) == (0, 8, 2, 99)
    (tmp_path / "a.bin").write_bytes((tmp_path / "a.bin").read_bytes()[:-4])
    code, found = facts("a.bin")
    assert code == 1
    assert "its head says 50 bytes, the file has 46" in found["problems"][0]


def test_data(abi_train, facts, tmp_path):
    base = make_folder(tmp_path / "base")
    write_talks(tmp_path / "talks.jsonl")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_text("What is 3 plus 4? " * 9)
    assert abi_train("tokenize", "texts", "--tokenizer", base, "-o", "t.bin")[0] == 0
    code, found = facts("t.bin")
    assert (code, found["kind"], found["documents"], found["problems"]) == (0, "token ids (u32)", 1, [])
    assert found["ids of"].startswith("base/tokenizer.json (hash ")
    assert facts("t.bin.json")[1]["tokens"] == found["tokens"] == (tmp_path / "t.bin").stat().st_size // 4
    with open(tmp_path / "t.bin", "ab") as file:
        file.write(b"12345")
    code, found = facts("t.bin")
    assert (code, len(found["problems"])) == (1, 2)
    assert facts("talks.jsonl")[1]["conversations"] == 36
    assert facts("texts")[1]["kind"] == "directory of texts"
    assert facts("texts/a.txt")[1]["uses"][0] == "abi-train run --data texts/a.txt"
    assert facts(base / "tokenizer.json")[1]["kind"] == "tokenizer"
    (tmp_path / "talks.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n{"messages": 3}\n')
    code, found = facts("talks.jsonl")
    assert code == 1
    assert "talks.jsonl:2: 'messages' must be a list of turns" in found["problems"][0]


ODD = {
    "a.gguf": (b"GGUF" + struct.pack("<IQQ", 3, 12, 5), "GGUF file (llama.cpp)", "damaged or cut short"),
    "pytorch_model.bin": (b"PK\x03\x04xx", "PyTorch's file of a model, a pickle", "never opened"),
    "x.npy": (b"\x93NUMPY\1\0", "a NumPy array (.npy)", "does not read it here"),
    "cut.safetensors": (b"\x10\0\0\0\0\0\0\0", "file of tensors (safetensors)", "it is damaged"),
    "lfs.safetensors": (b"version https://git-lfs.github.com/spec/v1\no", "file of tensors (safetensors)", "lfs pull"),
    "broken.json": (b'{"a":', "unknown", "is not JSON"),
    "noise": (bytes(range(256)), "unknown", "neither text nor a kind of file"),
    "latin.txt": ("hällö".encode("latin1"), "text", "byte 1 is not UTF-8"),
    "wide.txt": ("hello".encode("utf-16"), "text in UTF-16", "convert it"),
    "empty": (b"", "empty file", "nothing in it"),
    "short.bin": (b"12345", "token ids (u32)", "no whole number of 32-bit ids"),
    "other.yaml": (b"foo: 1\n", "settings of a run (config.yaml)", "unknown section 'foo'"),
    "abic": (b"ABIC\1\0", "ABIC file of the Zig trainer: weights", "truncated"),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_files(abi_train, facts, tmp_path, name):
    content, kind, problem = ODD[name]
    (tmp_path / name).write_bytes(content)
    code, found = facts(name)
    assert (code, found["kind"]) == (1, kind)
    assert problem in found["problems"][0]
    out = abi_train("inspect", name)[1]
    assert "problem" in out


@pytest.mark.parametrize("family", ModelFamily)
def test_only_fields_that_the_family_has_are_shown(facts, tmp_path, family):
    _, found = facts(make_folder(tmp_path / "base", family=family.value, tokenizer=False))
    own = {name for each in ModelFamily for name in each.fields}
    assert own & {*found["shape"]} <= {*family.fields}
    if family is ModelFamily.GPT2:
        assert not {"rope_theta", "num_kv_heads", "head_dim"} & {*found["shape"]}


@pytest.mark.skipif(os.name != "posix", reason="pipes and devices")
def test_what_is_no_file_is_not_read(facts, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "/dev/zero"):
        code, found = facts(name)
        assert (code, found["kind"]) == (1, "pipe, socket or device")
        assert found["problems"][0].endswith("is no file; write what comes out of it into one, and give that")


def test_what_may_not_be_read_is_named_with_a_remedy(facts, tmp_path, monkeypatch):
    folder = make_folder(tmp_path / "base")

    def forbidden(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path / "model.safetensors"))

    monkeypatch.setattr(models, "read_tensors", forbidden)
    code, found = facts(folder)
    assert code == 1
    said = "model.safetensors: Permission denied; give another path, or change the permissions"
    assert found["problems"][0].endswith(said)


def test_an_empty_directory_and_no_path(abi_train, facts, tmp_path):
    (tmp_path / "nothing").mkdir()
    assert facts("nothing")[1]["kind"] == "unknown"
    code, _, err = abi_train("inspect", "nowhere")
    assert code == 2
    assert "does not exist" in err


def test_a_program_gets_the_same(tmp_path):
    found = inspecting.inspect(make_folder(tmp_path / "base"))
    assert found.facts["family"] == "qwen2"
    assert len(found.tensors) == 14
