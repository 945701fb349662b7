"""`export --format gguf`: files for llama.cpp, and the check that they are the model that they were made of."""

import numpy as np
import pytest

from abi_py.config import TrainableModelConfig
from abi_py.errors import CheckpointError, ConfigError
from abi_py.model import TrainableModel
from abi_py.model.frozen import FrozenModel
from abi_py.runs.agreement import expected, logits_of
from abi_py.runs.exporting import Source, export

SHAPE = {"hidden_dim": 64, "num_layers": 2, "num_heads": 4, "intermediate_dim": 96, "vocab_size": 97, "max_seq_len": 32}


@pytest.fixture
def folder(tmp_path):
    TrainableModel(TrainableModelConfig(**SHAPE)).save_pretrained(tmp_path / "folder")
    return tmp_path / "folder"


def test_a_file_is_written_checked_and_written_back(folder, tmp_path):
    done = export(Source.open(folder), tmp_path / "m.gguf", "gguf", quantize="q8_0")
    assert done.dtype == "Q8_0"
    assert 0 < done.agreement.off < done.agreement.explained < 0.2
    assert done.errors == {"Q8_0": pytest.approx(0.0053, abs=0.0005)}
    assert done.files == {"m.gguf": (tmp_path / "m.gguf").stat().st_size}
    back = export(Source.open(tmp_path / "m.gguf"), tmp_path / "back", "hf")
    assert back.parameters == done.parameters
    ids = np.arange(9)[None]
    wanted = FrozenModel.from_gguf(tmp_path / "m.gguf").forward(ids)
    assert TrainableModel.from_pretrained(tmp_path / "back").forward(ids).tobytes() == wanted.tobytes()
    assert export(Source.open(folder), tmp_path / "f.gguf", "gguf").agreement.off == 0
    assert export(Source.open(folder), tmp_path / "n.gguf", "gguf", check=False).agreement is None


def test_what_does_not_go_together(folder, tmp_path):
    source = Source.open(folder)
    for form, settings, message in (
        ("hf", {"quantize": "Q8_0"}, "acts only with --format gguf"),
        ("gguf", {"dtype": "float16"}, "has no effect on gguf"),
        ("gguf", {"quantize": "Q9"}, "must be F32, F16"),
    ):
        with pytest.raises(ConfigError, match=message):
            export(source, tmp_path / "m.gguf", form, **settings)
    (tmp_path / "there").mkdir()
    with pytest.raises(ConfigError, match=r"must be a file for gguf, and is a directory; give a name"):
        export(source, tmp_path / "there", "gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_another_model_is_found(folder, tmp_path):
    other = TrainableModel(TrainableModelConfig(**SHAPE, seed=1))
    written = other.write_gguf(tmp_path / "other.gguf", "Q4_0")
    model = TrainableModel.from_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"its logits are 1.* of their spread away from the source's"):
        expected(lambda ids: logits_of(model, ids), model.config).compare(written)
