"""from_pretrained and save_pretrained: folders of every family, in all types, in shards, whole or not at all."""

import json
import os
import shutil
import stat
import tracemalloc

import numpy as np
import pytest
import tokenizers
from tokenizers.models import WordLevel

from abi_py.config import LlmTrainingConfig, LoraConfig, TrainableModelConfig
from abi_py.data.tokenizer import Tokenizer
from abi_py.errors import CheckpointError, ConfigError, NonFiniteError
from abi_py.formats.companions import Companions
from abi_py.formats.huggingface import bytes_of_size, cut_into_shards
from abi_py.formats.safetensors import map_safetensors
from abi_py.kernels.storage import STORAGES
from abi_py.model import LoraModel, TrainableModel
from abi_py.model import folder_writing as writing
from abi_py.model.folder import read_config
from abi_py.model.frozen import FrozenModel
from abi_py.shape import ModelFamily
from abi_py.training.checkpoint import save_checkpoint, verify
from abi_py.training.optimizer import Optimizer
from abi_py.training.state import TrainingState

SHAPE = {"hidden_dim": 12, "num_layers": 2, "num_heads": 2, "num_kv_heads": 2, "intermediate_dim": 7, "vocab_size": 11}
SHAPE["head_dim"] = 6  # said, as a config.json says it
INDEX = "model.safetensors.index.json"


def make(family="llama", tied=True, **changes):
    """Return a small model of a family, with weights of its own."""
    shape = TrainableModelConfig(**{**SHAPE, "tie_embeddings": tied, **changes}).replace(family=family)
    model = TrainableModel(shape)
    rng = np.random.default_rng(3)
    model.distribute_weights(0.3 * rng.standard_normal(model.num_params()))
    return model


def content_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def rounded(w, dtype):
    name = {"float32": "float32", "bfloat16": "bf16", "float16": "float16"}[dtype]
    flat = w.reshape(1, -1)
    return STORAGES[name].decode_ref(STORAGES[name].encode_ref(flat)).reshape(w.shape) if name != "float32" else w


@pytest.mark.parametrize("dtype", writing.DTYPES)
@pytest.mark.parametrize("size", ["5GB", "1KB"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ModelFamily)
def test_what_is_saved_is_read(tmp_path, family, tied, size, dtype):
    model = make(family, tied)
    model.save_pretrained(tmp_path / "m", dtype, size)
    assert (tmp_path / "m" / INDEX).exists() is (size == "1KB")
    found = TrainableModel.from_pretrained(tmp_path / "m")
    assert found.config == model.config
    for name, w in model.weights.items():
        assert found.weights[name].tobytes() == rounded(w, dtype).astype(np.float32).tobytes(), name
    frozen = FrozenModel.from_pretrained(tmp_path / "m")
    frozen.save_pretrained(tmp_path / "again", dtype, size)
    assert content_of(tmp_path / "again") == content_of(tmp_path / "m")
    assert config_of(tmp_path / "m")["dtype"] == config_of(tmp_path / "m")["torch_dtype"] == dtype
    for file in (tmp_path / "m").glob("*.safetensors"):
        header = file.read_bytes()[8:]
        assert b'"__metadata__":{"format":"pt"}' in header


# -- shards --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "largest", "expected"),
    [
        ([6, 6, 2, 6, 2, 2], 10, [[0], [1, 2], [3, 4, 5]]),  # the example of huggingface_hub's docstring
        ([3, 20, 3, 3], 6, [[1], [0, 2], [3]]),  # one that is larger than a shard comes before what is collected
        ([5, 5], 10, [[0, 1]]),
        ([20], 10, [[0]]),
    ],
)
def test_shards_are_cut_as_those_of_huggingface_hub(sizes, largest, expected):
    named = {f"t{i}": size for i, size in enumerate(sizes)}
    assert [*cut_into_shards(named, largest).values()] == [[f"t{i}" for i in names] for names in expected]


def test_an_index_says_what_transformers_says(tmp_path):
    model = make(tied=False)
    model.save_pretrained(tmp_path / "m", "bfloat16", 700)
    index = json.loads((tmp_path / "m" / INDEX).read_text())
    assert index["metadata"] == {"total_parameters": model.num_params(), "total_size": 2 * model.num_params()}
    assert [*index["weight_map"]] == sorted(index["weight_map"])
    files = sorted(path.name for path in (tmp_path / "m").glob("*.safetensors"))
    assert files == sorted(set(index["weight_map"].values()))
    assert files[-1] == f"model-{len(files):05d}-of-{len(files):05d}.safetensors"
    for file in files:
        tensors = map_safetensors(tmp_path / "m" / file)
        assert {index["weight_map"][name] for name in tensors} == {file}
        assert sum(tensor.raw.nbytes for tensor in tensors.values()) <= 700
    (tmp_path / "m" / files[1]).unlink()
    with pytest.raises(CheckpointError, match=rf"{files[1]}., which model\.safetensors\.index\.json names, is missing"):
        TrainableModel.from_pretrained(tmp_path / "m")


@pytest.mark.parametrize(
    ("size", "value"), [("5GB", 5 * 10**9), ("1.5MB", 1_500_000), ("20 kb", 20_000), (7, 7), ("1T", 10**12)]
)
def test_sizes_of_shards(size, value):
    assert bytes_of_size(size) == value


@pytest.mark.parametrize("size", ["", "5XB", "-1GB", 0, None, "0.0001KB", "5GiB"])
def test_other_sizes_are_refused(tmp_path, size):
    with pytest.raises(ConfigError, match=r"max_shard_size \(.*\) must be a number of bytes, or a size; try .5GB."):
        make().save_pretrained(tmp_path / "m", max_shard_size=size)
    assert not list(tmp_path.iterdir())


def test_shards_of_before_do_not_stay(tmp_path):
    model, folder = make(), tmp_path / "m"
    model.save_pretrained(folder, max_shard_size=700)
    (folder / "LICENSE").write_text("free")
    (folder / "tokenizer.json").write_text("saved before the model")
    model.save_pretrained(folder)
    there = ["LICENSE", "config.json", "model.safetensors", "tokenizer.json"]
    assert sorted(path.name for path in folder.iterdir()) == there
    model.companions = Companions({"vocab.json": b"{}"})
    model.save_pretrained(folder)
    assert sorted(path.name for path in folder.iterdir()) == [*there[:3], "vocab.json"]


# -- whole or not at all ---------------------------------------------------------------------------


def test_a_failure_leaves_what_was_there(tmp_path, monkeypatch):
    folder = tmp_path / "m"
    make().save_pretrained(folder)
    before = content_of(folder)
    real, calls = writing.write_synced, []

    def fails(path, pieces):
        calls.append(path)
        if len(calls) == stop:
            raise error
        return real(path, pieces)

    monkeypatch.setattr(writing, "write_synced", fails)
    for stop, error in ((1, OSError(28, "No space left on device")), (2, KeyboardInterrupt()), (4, OSError(5, "I/O"))):
        calls.clear()
        with pytest.raises(type(error)):
            make(tied=False).save_pretrained(folder, max_shard_size=700)
        assert len(calls) == stop
        assert content_of(folder) == before
        assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("took_its_place", [False, True])
def test_a_kill_while_a_folder_takes_its_place(tmp_path, took_its_place):
    """Between the two renames the old one has another name, by which it is found; after them it is a left-over."""
    folder, old = tmp_path / "m", tmp_path / ".abi-old-m"
    make().save_pretrained(folder)
    if took_its_place:
        shutil.copytree(folder, old)
    else:
        folder.rename(old)
        with pytest.raises(CheckpointError, match=r"m was being replaced .* was killed; rename .*\.abi-old-m to m"):
            TrainableModel.from_pretrained(folder)
    make(tied=False).save_pretrained(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert not read_config(folder).tie_embeddings


def test_a_disk_that_is_too_small_is_told_before(tmp_path, monkeypatch):
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1 << 16}))
    with pytest.raises(CheckpointError, match=r"m: 0\.08 MB are needed, 0\.06 MB are free"):
        make().save_pretrained(tmp_path / "m")


def test_a_file_or_a_directory_of_the_users_is_not_replaced(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match=r"file\) must be a directory, and a file is there"):
        make().save_pretrained(tmp_path / "file")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in (".", "../here"):
        with pytest.raises(ConfigError, match=r"is the working directory, which would be replaced"):
            make().save_pretrained(name)
    (tmp_path / "home/work").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"home\) must be new, .* and there is the directory work"):
        make().save_pretrained(tmp_path / "home")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", ["state.json", "config.yaml"])
def test_a_run_and_a_checkpoint_are_not_replaced(tmp_path, name):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / name).write_text("{}")
    with pytest.raises(ConfigError, match=rf"m\) must not be that of a run or a checkpoint, and there is {name};"):
        make().save_pretrained(tmp_path / "m", replace=True)
    with pytest.raises(ConfigError, match=r"llm_step_6\) must not have the name of a checkpoint; choose another"):
        make().save_pretrained(tmp_path / "llm_step_6")
    assert content_of(tmp_path) == {f"m/{name}": b"{}"}


def test_a_directory_that_only_looks_half_replaced_is_the_users(tmp_path):
    for old in (".old-m", ".old-n"):
        (tmp_path / old / "sub").mkdir(parents=True)
    make().save_pretrained(tmp_path / "m")
    (tmp_path / "n").mkdir()
    make().save_pretrained(tmp_path / "n")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".old-m", ".old-n", "m", "n"]
    (tmp_path / ".abi-old-o/sub").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"o\) must be new, .* and there is the directory sub"):
        make().save_pretrained(tmp_path / "o")
    assert (tmp_path / ".abi-old-o/sub").is_dir()  # nothing is renamed before all has been looked at


def test_what_belongs_to_the_model_of_before_goes_with_it(tmp_path):
    folder = tmp_path / "m"
    make(vocab_size=12).save_pretrained(folder)
    others = ("generation_config.json", "adapter_config.json", "adapter_model.safetensors", "training_args.json")
    for name in (*others, "README.md", "tokenizer.json", "merges.txt"):
        (folder / name).write_text("{}")
    (folder / ".cache/huggingface/download").mkdir(parents=True)
    (folder / ".cache/huggingface/download/config.json.metadata").write_text("of the hub's client")
    make().save_pretrained(folder)
    there = ["README.md", "config.json", "merges.txt", "model.safetensors", "tokenizer.json"]
    assert sorted(path.name for path in folder.iterdir()) == there
    make().save_pretrained(folder, replace=True)
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]


@pytest.mark.skipif(os.name != "posix", reason="modes, links and pipes")
@pytest.mark.parametrize("hard", [True, False])
def test_what_stays_is_as_it_was(tmp_path, monkeypatch, hard):
    folder = tmp_path / "m"
    make().save_pretrained(folder)
    (folder / "convert.sh").write_text("true")
    (folder / "convert.sh").chmod(0o750)
    (folder / "gone").symlink_to("../elsewhere")
    folder.chmod(0o700)
    if not hard:
        monkeypatch.setattr(os, "link", lambda *paths: (_ for _ in ()).throw(PermissionError(1, "not permitted")))
    make(tied=False).save_pretrained(folder)
    assert stat.S_IMODE((folder / "convert.sh").stat().st_mode) == 0o750
    assert (folder / "convert.sh").read_text() == "true"
    assert os.readlink(folder / "gone") == "../elsewhere"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    os.mkfifo(folder / "pipe")
    with pytest.raises(ConfigError, match=r"and there is the pipe or device pipe; choose another"):
        make().save_pretrained(folder)
    assert not read_config(folder).tie_embeddings


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nothing_is_saved_of_weights_that_are_not_finite(tmp_path, bad):
    model = make()
    model.weights["layers.1.w_o"][2, 3] = bad
    with pytest.raises(NonFiniteError, match=r"self_attn\.o_proj\.weight holds NaN or infinity at \[2, 3\]"):
        model.save_pretrained(tmp_path / "m")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("dtype", "value"), [("float16", 65520.0), ("float16", -1e5), ("bfloat16", 3.4e38)])
def test_what_a_type_cannot_hold_is_named(tmp_path, dtype, value):
    model = make()
    model.weights["layers.1.w_o"][2, 3] = value
    with pytest.raises(
        NonFiniteError, match=r"layers\.1\.self_attn\.o_proj\.weight is .* at \[2, 3\], and B?F16 holds"
    ):
        model.save_pretrained(tmp_path / "m", dtype)
    assert not list(tmp_path.iterdir())
    model.weights["layers.1.w_o"][2, 3] = np.float32(65519 if dtype == "float16" else 3.38e38)
    model.save_pretrained(tmp_path / "m", dtype)


def test_other_types_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"dtype \('int8'\) must be float32, bfloat16 or float16"):
        make().save_pretrained(tmp_path / "m", "int8")


def test_no_copy_of_the_model_is_made(tmp_path):
    """A model larger than half of the memory can be saved and read: what is taken besides does not grow with it."""
    extra = []
    for vocabulary in (20_000, 60_000):
        model = make(vocab_size=vocabulary, hidden_dim=64, head_dim=32)
        tracemalloc.start()
        model.save_pretrained(tmp_path / "m", "bfloat16")
        extra.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        size = model.num_params()
    assert extra[1] < extra[0] + 100_000
    tracemalloc.start()
    found = TrainableModel.from_pretrained(tmp_path / "m")
    assert tracemalloc.get_traced_memory()[1] < 8 * size + 2_000_000  # weights and gradients
    tracemalloc.stop()
    assert found.num_params() == size


# -- what is carried along -----------------------------------------------------------------------


FILES = {
    "tokenizer.json": "{}",
    "tokenizer_config.json": '{"chat_template": "x"}',
    "special_tokens_map.json": "{}",
    "added_tokens.json": "{}",
    "generation_config.json": '{"eos_token_id": [2, 7]}',
    "chat_template.jinja": "{{ x }}",
    "additional_chat_templates/tool_use.jinja": "{{ y }}",
    "vocab.json": "{}",
    "merges.txt": "a b",
    "tokenizer.model": "bytes",
}


@pytest.fixture
def folder(tmp_path):
    """Return a folder of a model as others publish them."""
    make().save_pretrained(tmp_path / "source")
    path = tmp_path / "source"
    (path / "additional_chat_templates").mkdir()
    for name, text in FILES.items():
        (path / name).write_text(text)
    (path / "README.md").write_text("of the source alone")
    facts = {"bos_token_id": 1, "eos_token_id": [2, 7], "pad_token_id": 0, "transformers_version": "4.40.0"}
    content = {**config_of(path), **facts, "use_cache": False, "auto_map": {"AutoConfig": "x.py"}}
    del content["dtype"]
    (path / "config.json").write_text(json.dumps(content))
    return path


def test_tokenizer_template_and_ids_go_along(folder, tmp_path):
    for model in (TrainableModel.from_pretrained(folder), FrozenModel.from_pretrained(folder)):
        model.save_pretrained(tmp_path / "out", "bfloat16")
        found = content_of(tmp_path / "out")
        assert {name: found[name].decode() for name in FILES} == FILES
        assert set(found) == {*FILES, "config.json", "model.safetensors"}
        expected = {**config_of(folder), "dtype": "bfloat16", "torch_dtype": "bfloat16"}
        del expected["auto_map"]
        assert config_of(tmp_path / "out") == expected


def test_adapters_and_copies_have_them(folder, tmp_path):
    model = FrozenModel.from_pretrained(folder)
    lora = LoraModel(model, LoraConfig(rank=2))
    for name, w in lora.weights.items():
        w[...] = 0.1 if name.endswith(".b") else 0.2
    lora.save_pretrained(tmp_path / "out")
    assert config_of(tmp_path / "out")["eos_token_id"] == [2, 7]
    merged = lora.merged()
    assert (
        TrainableModel.from_pretrained(tmp_path / "out").collect_weights().tobytes()
        == merged.collect_weights().tobytes()
    )
    assert model.widened().companions is merged.companions is model.companions


def test_another_shape_keeps_the_ids(folder, tmp_path):
    config = read_config(folder).replace(max_seq_len=99)
    TrainableModel.from_pretrained(folder, config).save_pretrained(tmp_path / "out")
    content = config_of(tmp_path / "out")
    assert content["eos_token_id"] == [2, 7]
    assert content["use_cache"] is not None
    assert read_config(tmp_path / "out").max_seq_len == 99


def test_a_folder_may_be_saved_over_itself(folder):
    before = content_of(folder)
    model = FrozenModel.from_pretrained(folder)
    model.save_pretrained(folder)
    assert {name: content_of(folder)[name] for name in (*FILES, "README.md")} == {
        name: before[name] for name in (*FILES, "README.md")
    }
    model.save_pretrained(folder)


def test_the_source_may_be_gone(folder, tmp_path):
    model = TrainableModel.from_pretrained(folder)
    shutil.rmtree(folder)
    model.save_pretrained(tmp_path / "out")
    assert {name: content_of(tmp_path / "out")[name].decode() for name in FILES} == FILES
    model.companions = Companions()
    model.save_pretrained(tmp_path / "alone")
    assert sorted(os.listdir(tmp_path / "alone")) == ["config.json", "model.safetensors"]


def test_checkpoints_carry_them_too(folder, tmp_path):
    model = TrainableModel.from_pretrained(folder)
    moments = Optimizer(model.parameters, LlmTrainingConfig()).moments
    options = {"model": model, "optimizer": moments, "sections": model.sections()}
    path = save_checkpoint(tmp_path / "run", state=TrainingState(global_step=3), **options)
    verify(path)
    assert {name: content_of(path)[name].decode() for name in FILES} == FILES
    expected = {**config_of(folder), "torch_dtype": "float32"}
    del expected["auto_map"]
    assert config_of(path) == expected
    again = save_checkpoint(tmp_path / "run", state=TrainingState(global_step=3), **options)
    TrainableModel.from_pretrained(again).save_pretrained(tmp_path / "out")
    assert config_of(tmp_path / "out") == {**expected, "dtype": "float32"}


def test_a_tokenizer_that_is_given_takes_the_place_of_the_other(folder, tmp_path):
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3}
    tokenizer = Tokenizer(tokenizers.Tokenizer(WordLevel(words, unk_token="<unk>")))
    texts = {"generation_config.json": '{"eos_token_id": 3}\n'}
    TrainableModel.from_pretrained(folder).save_pretrained(tmp_path / "out", tokenizer=tokenizer, files=texts)
    found = content_of(tmp_path / "out")
    assert set(found) == {*texts, "tokenizer.json", "tokenizer_config.json", "config.json", "model.safetensors"}
    assert found["generation_config.json"].decode() == texts["generation_config.json"]
    assert Tokenizer.load(tmp_path / "out").eos_id == tokenizer.eos_id == config_of(tmp_path / "out")["eos_token_id"]


def test_a_path_without_a_model_is_named(tmp_path):
    (tmp_path / "text.txt").write_text("words")
    for name, what in {"nowhere": "does not exist", "text.txt": "is a file", "": "has no config.json"}.items():
        with pytest.raises(CheckpointError, match=f"{what}; give the folder of a model"):
            TrainableModel.from_pretrained(tmp_path / name)


def test_companions_are_shown_by_name():
    shown = repr(Companions({"tokenizer.json": b"{}" * 1000}, {"eos_token_id": 2}))
    assert shown == "Companions(tokenizer.json, config.json)"
