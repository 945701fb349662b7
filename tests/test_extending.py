"""docs/extending.md is true: its toy operation, layer, family, storage and number format are put in, and work.

Once in a copy of the tree, in plain Python, where a model is trained with them; once compiled, in this process.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from waiting import PATIENCE

from abi_py.gradcheck import check_close, check_gradient
from abi_py.kernels.engine import number_format, number_formats, panels
from abi_py.kernels.matmul import product, product_ref
from abi_py.kernels.stored_matmul import (
    FEW,
    stored_product,
    stored_product_backward,
    stored_product_backward_ref,
    stored_product_ref,
    stored_rows,
)

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^```(python|diff) (\S+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
BLOCKS = [match.groups() for match in BLOCK.finditer((ROOT / "docs/extending.md").read_text(encoding="utf-8"))]
FILES = {path: text for kind, path, text in BLOCKS if kind == "python"}
CHANGES = [(path, text) for kind, path, text in BLOCKS if kind == "diff"]


def changed(text, change):
    """Return a file's text with a change, whose lines without + are there once."""
    lines = change.splitlines(keepends=True)
    before = "".join(line[1:] for line in lines if line[0] != "+")
    assert text.count(before) == 1, f"the page changes what is not there once:\n{before}"
    return text.replace(before, "".join(line[1:] for line in lines if line[0] != "-"))


def test_changes_are_lines_of_a_table():
    """What has to be changed outside of the new files is a line here and there; more would be a fault of the seams."""
    for path, text in CHANGES:
        assert (ROOT / path).exists()
        added = [line for line in text.splitlines() if line[0] == "+"]
        assert len(added) == 1 or "class _TF32" in text, text


# -- in plain Python, in a copy of the tree ------------------------------------------------------

PROGRAM = """
import json, sys
import numpy as np
import abi_py as abi
from abi_py.config import LlmTrainingConfig, LoraConfig, TrainableModelConfig
from abi_py.families import read_config, write_config
from abi_py.shape import ModelFamily
from abi_py.verification import _model

shape = TrainableModelConfig(
    hidden_dim=16, num_layers=2, num_heads=2, num_kv_heads=1, intermediate_dim=24, vocab_size=13, max_seq_len=16,
    family="primer", checkpointing="full",
)
tokens = (np.arange(4)[:, None] + np.arange(9) * 2) % 13
ids, labels = tokens[:, :-1], tokens[:, 1:]

def train(model, precision="fp32", steps=30):
    config = LlmTrainingConfig(
        learning_rate=2e-2, lr_schedule="constant", grad_accum_steps=1, mixed_precision=precision, weight_decay=0.0
    )
    trainer = abi.LlamaTrainer(model, config)
    losses = [trainer.train_step(ids, labels) for _ in range(steps)]
    return losses[0], losses[-1]

checks = _model(np.random.default_rng(1), ModelFamily.PRIMER)
found = {"checks": [(check.name, check.what, check.passed) for check in checks]}
model = abi.TrainableModel(shape)
found["names"] = list(model.weights)
found["trained"] = train(model)
windows = []
for _ in range(2):
    model.zero_gradients()
    model.train_step(ids, labels)
    windows.append(model.parameters.gradients_flat.tobytes())
found["windows"] = windows[0] == windows[1]
found["tf32"] = train(abi.TrainableModel(shape), "tf32", 4)
found["fp32"] = train(abi.TrainableModel(shape), "fp32", 4)
prompt = ids[1, :3]
whole = list(prompt)
for _ in range(5):
    whole.append(int(model.forward(np.array([whole]))[0, -1].argmax()))
found["uncached"] = whole[3:]
found["generated"] = abi.generate(model, prompt, 5, temperature=0).tolist()
lora = abi.LoraModel(abi.TrainableModel(shape), LoraConfig(rank=4, target_modules=("v_proj", "up_proj", "down_proj")))
found["lora"] = train(lora)
found["merged"] = float(np.abs(lora.merged().forward(ids) - lora.forward(ids)).max())
trainer = abi.LlamaTrainer(model, LlmTrainingConfig(checkpoint_path=sys.argv[1]))
folder = trainer.save_checkpoint()
from abi_py.training.loading import load_model
loaded = load_model(folder).model
found["family"] = loaded.config.family.value
found["bits"] = loaded.collect_weights().tobytes() == model.collect_weights().tobytes()
model.export_to_gguf(sys.argv[1] + ".gguf")
from abi_py.model.frozen import FrozenModel
again = FrozenModel.from_gguf(sys.argv[1] + ".gguf")
found["gguf"] = again.config.family.value, float(np.abs(again.forward(ids) - model.forward(ids)).max())
found["refused"] = ""
try:
    read_config({**write_config(shape), "hidden_act": "silu"})
except abi.errors.CheckpointError as error:
    found["refused"] = str(error)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """Return a copy of the tree with everything that the page adds."""
    root = tmp_path_factory.mktemp("extended")
    for folder in ("abi_py", "kernels"):
        shutil.copytree(ROOT / folder, root / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for path, text in FILES.items():
        assert not (root / path).exists()
        (root / path).write_text(text, encoding="utf-8")
    for path, change in CHANGES:
        (root / path).write_text(changed((root / path).read_text(encoding="utf-8"), change), encoding="utf-8")
    return root


def run_in(root, *words):
    """Run Python on a copy of the tree, its kernels as plain Python; return what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(root), "NUMBA_DISABLE_JIT": "1"}
    done = subprocess.run(
        [sys.executable, *words], cwd=root, env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def test_a_toy_family_is_trained(extended, tmp_path):
    found = json.loads(run_in(extended, "-c", PROGRAM, str(tmp_path / "run")))
    assert [check for check in found["checks"] if not check[-1]] == []
    assert "layers.1.w_up" in {check[0] for check in found["checks"]}
    assert not [name for name in found["names"] if "gate" in name]
    first, last = found["trained"]
    assert last < 0.3 < 2 < first
    assert found["windows"]  # nothing of the window before is left in a gradient
    assert found["generated"] == found["uncached"]
    assert len(set(found["generated"])) > 3
    assert found["lora"][1] < found["lora"][0] - 0.2  # its embedding stays as it was drawn
    assert found["merged"] < 1e-4
    assert (found["family"], found["bits"]) == ("primer", True)
    assert found["gguf"] == ["primer", 0.0]
    assert re.search(r"hidden_act is 'silu'", found["refused"])
    (start, rounded), (same, plain) = found["tf32"], found["fp32"]
    assert 0 < abs(start - same) < 1e-2  # rounded, but not by much
    assert 0 < abs(rounded - plain) < 1e-1


def test_the_command_line_has_them(extended):
    text = run_in(extended, "-m", "abi_py", "run", "--help")
    assert re.search(r"primer", text)
    assert re.search(r"tf32", text)


# -- compiled, in this process -------------------------------------------------------------------


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Return a function that loads a file of the page under the name that it would have."""

    def loaded(path):
        file = tmp_path / Path(path).name
        file.write_text(FILES[path], encoding="utf-8")
        name = "abi_py." + path.removesuffix(".py").replace("/", ".")
        spec = importlib.util.spec_from_file_location(name, file)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return loaded


def test_the_operation(load, rng, same_bits):
    toy = load("kernels/squared_relu.py")
    u, dh = rng.standard_normal((2, 7, 13))
    du = toy.squared_relu_backward_ref(dh, u)
    check_gradient(lambda u: (toy.squared_relu_forward_ref(u) * dh).sum(), u, du, rng)
    u, dh = u.astype(np.float32), dh.astype(np.float32)
    found, h = dh.copy(), np.empty_like(u)
    toy.squared_relu_forward(h, u)
    toy.squared_relu_backward(found, found, u)
    check_close(h, toy.squared_relu_forward_ref(u.astype(np.float64)), 1e-5)
    check_close(found, du, 1e-4)
    with pytest.raises(ValueError, match="h "):
        toy.squared_relu_forward(np.empty((7, 12), np.float32), u)

    def again():
        toy.squared_relu_backward(found, dh, u)
        return found

    same_bits(again)


def test_the_storage(load, rng):
    storage = load("kernels/storage/int8_blocks.py").STORAGE
    w = (rng.standard_normal((21, 40)) * 2.0 ** rng.integers(-20, 20, (21, 1))).astype(np.float32)
    w[3] = 0
    raw = storage.encode_ref(w)
    assert raw.shape == (21, 45)
    kept = storage.decode_ref(raw)
    largest = np.abs(w.reshape(21, 5, 8)).max(-1, keepdims=True)
    assert (np.abs(kept - w).reshape(21, 5, 8) <= largest / 64).all()
    np.testing.assert_array_equal(storage.encode_ref(kept), raw)
    rows, ids = np.empty((3, 40), np.float32), np.array([20, 3, 3], np.int32)
    stored_rows(rows, ids, raw, storage)
    np.testing.assert_array_equal(rows, kept[ids])
    for count in (1, FEW + 3):
        x, dy = rng.standard_normal((count, 40)).astype(np.float32), rng.standard_normal((count, 21)).astype(np.float32)
        y, dx = np.empty_like(dy), np.empty_like(x)
        stored_product(y, x, raw, storage)
        stored_product_backward(dx, dy, raw, storage)
        check_close(y, stored_product_ref(x.astype(np.float64), raw, storage), 1e-5)
        check_close(dx, stored_product_backward_ref(dy.astype(np.float64), raw, storage), 1e-5)


def test_the_number_format(rng, monkeypatch):
    monkeypatch.setattr(panels, "FORMATS", list(panels.FORMATS))
    monkeypatch.setattr(number_format, "FORMATS", panels.FORMATS)
    (change,) = (text for path, text in CHANGES if "class _TF32" in text)
    names = dict(vars(number_formats))
    exec("\n".join(line[1:] for line in change.splitlines() if line[0] == "+"), names)
    tf32 = names["_TF32"]()
    x, w = rng.standard_normal((19, 70)).astype(np.float32), rng.standard_normal((33, 70)).astype(np.float32)
    y, plain = np.empty((2, 19, 33), np.float32)
    product(y, x, w, transpose_b=True, number_format=tf32)
    product(plain, x, w, transpose_b=True)
    rounded = [tf32.round_ref(each).astype(np.float64) for each in (x, w)]
    assert 0 < np.abs(rounded[0] - x).max() <= np.abs(x).max() * 2.0**-11
    check_close(y, product_ref(*rounded, transpose_b=True), 1e-6)
    assert 1e-5 < np.abs(y - plain).max() < 1e-1
    x[2, 5] = np.nan
    product(y, x, w, transpose_b=True, number_format=tf32)
    assert np.isnan(y).any(1).nonzero()[0].tolist() == [2]
