"""info, tokenize, trace, verify, warmup."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from abi_py import verification
from abi_py.cli import compiling, trace
from abi_py.config import TrainableModelConfig
from abi_py.errors import AbiError
from abi_py.kernels import rms_norm

ROOT = Path(__file__).resolve().parents[2]


def test_info_as_json(abi_train):
    code, out, _ = abi_train("info", "--json")
    assert code == 0
    facts = json.loads(out)
    assert facts["defaults"]["training"]["learning_rate"] == 1e-5
    assert facts["defaults"]["model"]["hidden_dim"] == "required"
    assert facts["machine"]["threads"] >= 1
    if compiling.kernel_names():
        assert facts["machine"]["measured_peak_gflops"] > 0


def test_info_as_text(abi_train):
    code, out, _ = abi_train("info")
    assert code == 0
    for text in ("This machine", "grad_accum_steps", "warmup_cosine", "tile"):
        assert text in out


def test_tokenize(abi_train, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("hé")
    code, out, _ = abi_train("tokenize", "a.txt", "-o", "a.bin")
    assert code == 0
    assert out.splitlines() == [
        "a.bin: 4 tokens from 1 documents of 3 bytes",
        "next: abi-train run --data a.bin",
    ]
    assert np.fromfile("a.bin", "<u4").tolist() == [104, 195, 169, 256]
    code, out, _ = abi_train("tokenize", "a.txt", "-o", "a.bin")
    assert (code, out.splitlines()[0]) == (0, "a.bin: 4 tokens from 1 documents of 3 bytes, there already")
    assert abi_train("tokenize", "a.txt", "-o", "a.bin", "--force")[0] == 0


def test_tokenize_reads_standard_input(process, tmp_path):
    child = process("tokenize", "-", "-o", "x.bin", stdin=subprocess.PIPE)
    _, err = child.communicate("ab", timeout=60)
    assert (child.returncode, err) == (0, "")
    assert np.fromfile(tmp_path / "x.bin", "<u4").tolist() == [97, 98, 256]


def test_trace_is_the_flow_of_the_docs(abi_train):
    code, out, _ = abi_train("trace", "--no-times")
    assert code == 0
    assert out == (ROOT / "docs/flow.txt").read_text(encoding="utf-8"), (
        "run: abi-train trace --no-times > docs/flow.txt"
    )


def test_trace_puts_the_kernels_back_and_counts_what_is_saved():
    from abi_py.model import linear
    from abi_py.model.activations import saved_bytes

    before = linear.product
    calls = trace.trace_step()
    assert linear.product is before
    saved = sum(call.saved for call in calls)
    rows = trace.BATCH * trace.TIME
    assert saved == saved_bytes(TrainableModelConfig(**trace.SHAPE, max_seq_len=trace.TIME), rows) + _rope_twice(rows)
    for call in calls:
        assert (ROOT / call.file).exists()


def _rope_twice(rows):
    # w_qkv's product and RoPE write the same array (RoPE works in place), so it is counted at both.
    config = TrainableModelConfig(**trace.SHAPE, max_seq_len=trace.TIME)
    return 4 * rows * (config.q_dim + 2 * config.kv_dim)


def test_trace_with_times(abi_train):
    code, out, _ = abi_train("trace")
    assert code == 0
    assert " ms" in out
    assert "kernels together" in out


def test_verify_passes_and_names_every_tensor(abi_train):
    code, out, _ = abi_train("verify")
    assert code == 0
    assert "FAIL" not in out
    for name in ("layers.1.w_down", "token_embedding", "output_proj", "attention", "adamw"):
        assert name in out


def test_verify_catches_a_wrong_gradient(abi_train, monkeypatch):
    right = rms_norm.rms_norm_backward

    def wrong(dx, dw, dy, x, w, r, accumulate):
        right(dx, dw, dy, x, w, r, accumulate)
        dw *= np.float32(1.001)

    monkeypatch.setattr("abi_py.model.transformer.rms_norm_backward", wrong)  # the final norm's gradient is 0.1% off
    code, out, _ = abi_train("verify")
    assert code == 1
    failed = [line for line in out.splitlines() if "FAIL" in line]
    assert len(failed) == 1
    assert "final_norm" in failed[0]


def test_reference_model_is_the_model_in_both_forms_of_the_head():
    from abi_py.model import TrainableModel

    for tied in (True, False):
        config = TrainableModelConfig(
            hidden_dim=8,
            num_layers=1,
            num_heads=2,
            num_kv_heads=1,
            intermediate_dim=12,
            vocab_size=17,
            tie_embeddings=tied,
        )
        model = TrainableModel(config)
        ids = np.arange(10).reshape(2, 5) % 17
        loss = model.compute_loss(ids, ids).loss
        wide = {name: view.astype(np.float64) for name, view in model.weights.items()}
        assert abs(verification.reference_loss(config, wide, ids, ids) - loss) < 1e-5


@pytest.mark.skipif(not compiling.kernel_names(), reason="nothing is compiled without JIT")
def test_warmup_compiles_into_an_empty_cache_once(tmp_path):
    environment = {**os.environ, "ABI_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    code = (
        "import os\n"
        "from abi_py.cli.compiling import *\n"
        "names = ['swiglu_forward', 'swiglu_forward:bf16']\n"
        "print([is_cached(name) for name in names])\n"
        "compile_kernels(names, lambda name, seconds: print('compiled', name))\n"
        "print([is_cached(name) for name in names])\n"
        "from abi_py.cli import compiling\n"
        "place = compiling._folder\n"
        "compiling._folder = lambda dispatcher: place(dispatcher).with_name('of_another_copy')\n"
        "print([is_cached(name) for name in names])\n"
        "compiling._folder = place\n"
        "for file in place(compiling._dispatchers()['swiglu_forward'][1]).iterdir(): os.utime(file, (1, 1))\n"
        "print([is_cached(name) for name in names])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    out = done.stdout.splitlines()
    assert out[0] == "[False, False]"
    assert sorted(out[1:3]) == ["compiled swiglu_forward", "compiled swiglu_forward:bf16"]
    assert out[3] == "[True, True]"
    assert out[4] == "[False, False]"  # what another installation has compiled
    assert out[5] == "[False, False]"  # older than the source


def test_work_is_shared_out_by_its_length():
    groups = compiling._share_out(["_attention_backward", "_attention_forward", "_product", "a", "b"], 2)
    assert sorted(name for group in groups for name in group) == sorted(
        ["_attention_backward", "_attention_forward", "_product", "a", "b"]
    )
    assert groups[0][0] == "_attention_backward"
    assert groups[1][:2] == ["_attention_forward", "_product"]
    groups = compiling._share_out(["_attention_backward", "routines", "routines:bf16"], 2)
    assert [group[0] for group in groups] == ["routines", "routines:bf16"]
    assert compiling._share_out([], 2) == []


def test_kernels_of_training_leave_other_optimizers_out():
    names = compiling.kernels_of_training("sgd")
    assert "adam_" not in names
    assert "dropout_forward" not in names
    if compiling.kernel_names():
        assert "sgd_" in names
        assert "_attention_forward" in names
        assert not any(":" in name for name in names)
        narrow = compiling.kernels_of_training("sgd", "bf16")
        assert {"swiglu_forward:bf16", "routines:bf16", "_product", "_attention_forward"} <= set(narrow)
        assert "swiglu_forward" not in narrow
        assert "routines" in narrow  # whatever else compiles runs in a step of float32


def test_compiling_says_what_failed(monkeypatch):
    monkeypatch.setattr(compiling.sys, "executable", "/bin/false")
    with pytest.raises(AbiError, match="exit code 1"):
        compiling.compile_kernels(["swiglu_forward"], lambda name, seconds: None)


def test_a_run_compiles_alone_where_no_process_can_be_started(monkeypatch):
    said = []
    monkeypatch.setattr(compiling.sys, "executable", "/no/such/python")
    monkeypatch.setattr(compiling, "is_cached", lambda name: False)
    compiling.compile_for_training("adamw", "bf16", said.append)
    if compiling.kernel_names():
        assert "one by one instead" in said[-1]


def test_the_line_of_progress_fits_a_narrow_terminal():
    from abi_py.training.console import _fit

    parts = ["loss 1.0", "lr 1e-3", "grad 0.1", "99 tok/s", "9 GFLOP/s", "9 MB", "ETA 0:01", ""]
    assert _fit(parts, None) == "  ".join(parts[:-1])
    assert _fit([*parts[:-1], "scale 4"], None).endswith("ETA 0:01  scale 4")
    assert _fit(parts, 52) == "loss 1.0  lr 1e-3  99 tok/s  9 GFLOP/s  ETA 0:01"
    assert _fit(parts, 10) == "loss 1.0  99 tok/s  ETA 0:01"
