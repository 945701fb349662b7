"""NaN and infinity: no writer writes them, no reader takes them unasked."""

import json
import re
import struct

import numpy as np
import pytest

from abi_py.config import LoraConfig, TrainableModelConfig
from abi_py.errors import CheckpointError, NonFiniteError
from abi_py.families import write_config
from abi_py.formats.deepzig import write_model
from abi_py.formats.finite import PIECE, check_read, find_nonfinite
from abi_py.formats.peft import ADAPTER_CONFIG, ADAPTER_WEIGHTS, adapter_config
from abi_py.formats.safetensors import Stored, write_safetensors
from abi_py.formats.zig import load_abic, load_ablc, load_zig, save_abic, save_ablc
from abi_py.model import LoraModel, TrainableModel
from abi_py.training.loading import load_model

CONFIG = TrainableModelConfig(
    hidden_dim=8, num_layers=1, num_heads=2, num_kv_heads=1, intermediate_dim=8, vocab_size=11, max_seq_len=8
)
BAD = [np.nan, np.inf, -np.inf]
bad = pytest.mark.parametrize("value", BAD, ids=str)


def broken(value):
    model = TrainableModel(CONFIG)
    model.weights["layers.0.w_up"][2, 5] = value
    return model


def broken_adapters(value):
    model = LoraModel(TrainableModel(CONFIG), LoraConfig(rank=2, target_modules=("q_proj",)))
    model.weights["layers.0.w_q.b"][3, 1] = value
    return model


@bad
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("place", [0, PIECE - 1, PIECE, PIECE + 6])
def test_the_first_is_found(value, dtype, place):
    array = np.full(PIECE + 7, np.finfo(dtype).max, dtype)  # whose sum is infinite
    assert find_nonfinite(array) is None
    array[[place, -1]] = value
    assert find_nonfinite(array) == place
    assert find_nonfinite(array[:0]) is None


@bad
@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("turned", [True, False])
def test_the_first_of_two_bytes_each_is_found(value, bf16, turned):
    """Where all is finite, nothing is widened."""
    raw = np.full((PIECE // 64 + 3, 70), np.float16(65504) if not bf16 else 0x7F7F, np.uint16 if bf16 else np.float16)
    whole = Stored(raw.T, bf16).turned() if turned else Stored(raw, bf16)
    check_read("x", {"w": whole})
    for place in [(0, 0), (len(raw) - 1, 69)]:
        spoilt = raw.copy()
        spoilt[place] = np.array(value, np.float32).view(np.uint32) >> 16 if bf16 else value
        with pytest.raises(CheckpointError, match=re.escape(f"w holds NaN or infinity at [{place[0]}, {place[1]}]")):
            check_read("x", {"w": Stored(spoilt.T, bf16).turned() if turned else Stored(spoilt, bf16)})


def by_hf_name(model):
    return {entry.hf_name: model.weights[entry.name] for entry in model.parameters.table}


WRITERS = {
    "ABIC": lambda value, path: broken(value).save_checkpoint(path / "a"),
    "ABIC of adapters": lambda value, path: broken_adapters(value).save_checkpoint(path / "a"),
    "DeepZig": lambda value, path: write_model(path, by_hf_name(broken(value)), {}, {}),
    "PEFT": lambda value, path: broken_adapters(value).save(path),
}


@bad
@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_nothing_is_written(tmp_path, value, writer):
    with pytest.raises(NonFiniteError, match=r"holds NaN or infinity at \[\d+(, \d+)?\], so nothing was saved"):
        writer(value, tmp_path)
    assert list(tmp_path.iterdir()) == []


@bad
@pytest.mark.parametrize("part", [0, 1, 2])
def test_nothing_is_written_with_moments(tmp_path, value, part):
    arrays = [np.zeros(4, np.float32) for _ in range(3)]
    arrays[part][2] = value
    with pytest.raises(NonFiniteError, match=rf"{('weights', 'm', 'v')[part]} holds NaN or infinity at \[2\]"):
        save_ablc(tmp_path / "a", *arrays, step=1, epoch=0, tokens_processed=1)
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_file_stays(tmp_path):
    save_abic(tmp_path / "a", np.ones(3, np.float32), 1)
    before = (tmp_path / "a").read_bytes()
    with pytest.raises(NonFiniteError):
        save_abic(tmp_path / "a", np.array([1, np.nan, 1], np.float32), 2)
    assert (tmp_path / "a").read_bytes() == before


@bad
def test_readers_of_folders(tmp_path, value):
    model = broken(value)
    tensors = {entry.hf_name: model.weights[entry.name] for entry in model.parameters.table}
    (tmp_path / "config.json").write_text(json.dumps(write_config(CONFIG)))
    write_safetensors(tmp_path / "model.safetensors", tensors)
    with pytest.raises(
        CheckpointError, match=r"model\.layers\.0\.mlp\.up_proj\.weight holds NaN or infinity at \[2, 5\].*allow_non"
    ):
        load_model(tmp_path)
    read = load_model(tmp_path, allow_nonfinite=True).model
    assert read.collect_weights().tobytes() == model.collect_weights().tobytes()


@bad
def test_readers_of_adapters(tmp_path, value):
    model = broken_adapters(value)
    tensors = {entry.hf_name: model.weights[entry.name] for entry in model.parameters.table}
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(adapter_config(model.lora)))
    write_safetensors(tmp_path / ADAPTER_WEIGHTS, tensors)
    with pytest.raises(CheckpointError, match=r"q_proj\.lora_B\.weight holds NaN or infinity at \[3, 1\]"):
        LoraModel.load(TrainableModel(CONFIG), tmp_path)
    read = LoraModel.load(TrainableModel(CONFIG), tmp_path, allow_nonfinite=True)
    assert read.weights["layers.0.w_q.b"].tobytes() == model.weights["layers.0.w_q.b"].tobytes()


@bad
def test_readers_of_zig_files(tmp_path, value):
    weights = TrainableModel(CONFIG).collect_weights()
    weights[7] = value
    count = weights.size
    (tmp_path / "abic").write_bytes(b"ABIC" + struct.pack("<HQQI", 1, 7, 9, count) + weights.tobytes())
    moments = struct.pack("<HQIQQIII", 1, 7, 2, 99, 9, 1, 1, count)
    (tmp_path / "ablc").write_bytes(b"ABLC" + moments + bytes(8) + weights.tobytes())
    for read, name, part in ((load_abic, "abic", "weights"), (load_zig, "abic", "weights"), (load_ablc, "ablc", "v")):
        with pytest.raises(CheckpointError, match=rf"{part} holds NaN or infinity at \[7\]"):
            read(tmp_path / name)
        assert getattr(read(tmp_path / name, allow_nonfinite=True), part).tobytes() == weights.tobytes()
    model = TrainableModel(CONFIG)
    before = model.collect_weights().tobytes()
    with pytest.raises(CheckpointError, match="weights holds"):
        model.load_checkpoint_file(tmp_path / "abic")
    assert model.collect_weights().tobytes() == before
    assert model.load_checkpoint_file(tmp_path / "abic", allow_nonfinite=True) == 7
