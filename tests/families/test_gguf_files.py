"""GGUF files of llama.cpp's own converter beside transformers' logits of the same models (golden/make_converted.py)."""

from pathlib import Path

import numpy as np
import pytest

from abi_py.formats.gguf import open_gguf
from abi_py.gradcheck import check_close
from abi_py.model import TrainableModel
from abi_py.model.frozen import FrozenModel

GOLDEN = np.load(Path(__file__).resolve().parents[1] / "golden" / "gguf_files.npz")
NAMES = sorted({name.partition("/")[0] for name in GOLDEN.files} - {"meta"})
WITHOUT = ("general.", "tokenizer.")


@pytest.fixture(params=NAMES)
def stored(request, tmp_path):
    """Return a file, ids and logits."""
    path = tmp_path / "model.gguf"
    path.write_bytes(GOLDEN[f"{request.param}/file"].tobytes())
    return path, GOLDEN[f"{request.param}/ids"], GOLDEN[f"{request.param}/logits"]


def test_logits_are_those_of_transformers(stored):
    path, ids, wanted = stored
    for kind in (TrainableModel, FrozenModel):
        found = kind.from_gguf(path).forward(ids)[:, 3::4]
        check_close(found, wanted[..., : found.shape[-1]], 1e-4)  # of Gemma, rows without a token are left out


def test_what_is_written_again_says_the_same(stored):
    """Key for key, with its type, but for keys that llama.cpp does not read; and tensor for tensor."""
    path, ids, _ = stored
    again = path.with_name("again.gguf")
    model = TrainableModel.from_gguf(path)
    model.export_to_gguf(again)
    theirs, ours = open_gguf(path), open_gguf(again)
    assert {*ours.tensors} == {*theirs.tensors}
    for name, tensor in theirs.tensors.items():
        check_close(ours.tensors[name].raw, tensor.raw, 1e-6)
    same = [key for key in theirs.metadata if not key.startswith(WITHOUT) and key in ours.metadata]
    missing = [key for key in theirs.metadata if not key.startswith(WITHOUT) and key not in ours.metadata]
    unread = ("attention.key_length", "attention.value_length", "attention.layer_norm_epsilon", "rope.freq_base_swa")
    assert not [key for key in missing if not key.endswith(unread)]
    for key in same:
        assert ours.entries[key].type_name == theirs.entries[key].type_name, key
        assert np.array_equal(ours.metadata[key], theirs.metadata[key]), key
    assert ours.metadata["general.architecture"] == theirs.metadata["general.architecture"]
    back = TrainableModel.from_gguf(again)
    assert back.forward(ids).tobytes() == model.forward(ids).tobytes()
