"""info, tokenize, trace, verify, warmup."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from waiting import PATIENCE

from abi_py import verification
from abi_py.cli import trace
from abi_py.cli.describe import BF16_METHODS
from abi_py.config import TrainableModelConfig
from abi_py.kernels import attention, rms_norm
from abi_py.kernels.engine.number_formats import BFLOAT16
from abi_py.model import TrainableModel
from abi_py.model.layers.run import Run
from abi_py.runs import compiling
from abi_py.shape import ModelFamily

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
    bf16 = facts["machine"]["bf16"]
    assert bf16.startswith(BF16_METHODS[BFLOAT16.method])
    measured = BFLOAT16.rates if "ABI_BF16" not in os.environ else {}
    assert all(f"{BF16_METHODS[name]} {rate / 1e9:.0f}" in bf16 for name, rate in measured.items())


def test_an_unknown_method_of_bfloat16_is_a_wrong_call(process):
    child = process("run", "--mixed-precision", "bf16", "--out", "x", env={"ABI_BF16": "tf32"})
    _, err = child.communicate(timeout=PATIENCE)
    assert child.returncode == 2
    assert "ABI_BF16 (tf32) must be one of fp32" in err
    assert len(err.splitlines()) == 1


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
        "a.bin: 4 tokens from 1 document of 3 bytes",
        "next: abi-train run --data a.bin",
    ]
    assert np.fromfile("a.bin", "<u4").tolist() == [104, 195, 169, 256]
    code, out, _ = abi_train("tokenize", "a.txt", "-o", "a.bin")
    assert (code, out.splitlines()[0]) == (0, "a.bin: 4 tokens from 1 document of 3 bytes, there already")
    assert abi_train("tokenize", "a.txt", "-o", "a.bin", "--force")[0] == 0


def test_tokenize_reads_standard_input(process, tmp_path):
    child = process("tokenize", "-", "-o", "x.bin", stdin=subprocess.PIPE)
    _, err = child.communicate("ab", timeout=PATIENCE)
    assert (child.returncode, err) == (0, "")
    assert np.fromfile(tmp_path / "x.bin", "<u4").tolist() == [97, 98, 256]


def test_trace_is_the_flow_of_the_docs(abi_train):
    code, out, _ = abi_train("trace", "--no-times")
    assert code == 0
    assert out == (ROOT / "docs/flow.txt").read_text(encoding="utf-8"), (
        "run: abi-train trace --no-times > docs/flow.txt"
    )


def test_trace_puts_the_kernels_back_and_counts_what_the_arena_saves():
    from abi_py.families import layers
    from abi_py.model.arena import parts_of, saved_bytes
    from abi_py.model.layers import linear

    before = linear.product
    calls = trace.trace_step()
    assert linear.product is before
    for call in calls:
        assert (ROOT / call.file).exists()
    config, rows = TrainableModelConfig(**trace.SHAPE, max_seq_len=trace.TIME), trace.BATCH * trace.TIME
    saved = {(call.stage, call.function): 0 for call in calls}
    for call in calls:
        saved[call.stage, call.function] += call.saved
    _, branches, _ = parts_of(layers(config))
    assert sum(saved.values()) == saved_bytes(config, branches, rows) == 18_816
    assert saved["Attention.fill", "product"] == 4 * rows * (config.q_dim + 2 * config.kv_dim)
    assert saved["Attention.fill", "rope_forward"] == 0  # in place, in what the product wrote
    assert "saved for backward: 18816 bytes, 1176 for each token" in trace.flow(calls, times=False)


def test_trace_has_every_operation_of_every_family():
    """What a call writes is said by the operation's signature: there is no list of operations to forget one in."""
    sizes = {**trace.SHAPE, "max_seq_len": trace.TIME, "family": "qwen2"}
    model, ids = TrainableModel(TrainableModelConfig.from_dict(sizes)), np.arange(trace.TIME)
    calls = []
    with trace.recorded(calls, {}):
        model.compute_loss(ids, ids, backward=True, precision="bf16")
    written = {call.function: call.outputs for call in calls}
    assert written["bias_forward"] == ["y(8,64)"]
    assert written["rope_forward_rounded"] == ["y(8,64)", "x(8,64)"]
    assert written["swiglu_forward_rounded"] == ["h(8,64)", "saved(8,128)"]


def test_trace_of_another_family(abi_train):
    code, out, _ = abi_train("trace", "--no-times", "--family", "qwen2")
    assert code == 0
    assert "family qwen2." in out
    assert "bias_backward" in out
    assert "bias_backward" not in abi_train("trace", "--no-times")[1]


def test_trace_with_times(abi_train):
    code, out, _ = abi_train("trace")
    assert code == 0
    assert " ms" in out
    assert "kernels together" in out


def test_verify_passes_and_names_every_tensor(abi_train):
    code, out, _ = abi_train("verify")
    assert code == 0
    assert "FAIL" not in out
    for name in ("layers.1.w_down", "token_embedding", "output_proj", "rms_norm of heads", "bias", "adamw"):
        assert name in out


@pytest.mark.parametrize("family", [family for family in ModelFamily if "sliding_window" in family.fields])
def test_verify_sees_the_window_of_each_family(family, monkeypatch):
    monkeypatch.setattr(Run, "starts_within", lambda run, window: run.starts)
    checks = verification._model(np.random.default_rng(0), family)
    assert not next(check for check in checks if check.name == "loss").passed


def test_verify_sees_the_window_and_the_scale_of_attention(monkeypatch):
    right = attention.attention_forward
    plain = lambda *arguments: right(*arguments[:9], None)  # noqa: E731
    monkeypatch.setattr(attention, "attention_forward", plain)
    failed = {check.name for check in verification._attention(np.random.default_rng(0)) if not check.passed}
    assert failed == {"attention, window and scale"}


def test_verify_catches_a_wrong_gradient(abi_train, monkeypatch):
    right = rms_norm.rms_norm_backward

    def wrong(dx, dw, dy, x, w, r, accumulate):
        right(dx, dw, dy, x, w, r, accumulate)
        if not accumulate:  # of the final norm alone
            dw *= np.float32(1.001)

    monkeypatch.setattr("abi_py.model.layers.norm.rms_norm_backward", wrong)  # the final norm's gradient is 0.1% off
    code, out, _ = abi_train("verify")
    assert code == 1
    failed = [line for line in out.splitlines() if "FAIL" in line]
    assert sum("final_norm" in line for line in failed) == len(ModelFamily) - 1  # GPT-2 has LayerNorm
    assert all("norm" in line for line in failed)


def test_the_line_of_progress_fits_a_narrow_terminal():
    from abi_py.training.console import _fit

    parts = {"loss": "loss 1.0", "learning rate": "lr 1e-3", "gradient norm": "grad 0.1", "tokens": "99 tok/s"}
    parts |= {"speed": "9 GFLOP/s", "memory": "9 MB", "time left": "ETA 0:01", "loss scale": ""}
    assert _fit(parts, None) == "  ".join(list(parts.values())[:-1])
    assert _fit(parts | {"loss scale": "scale 4"}, None).endswith("ETA 0:01  scale 4")
    assert _fit(parts, 52) == "loss 1.0  lr 1e-3  99 tok/s  9 GFLOP/s  ETA 0:01"
    assert _fit(parts | {"penalties": "z_loss 0.1", "experts": "load 1.2x"}, 76) == _fit(parts, None) + "  load 1.2x"
    assert _fit(parts, 10) == "loss 1.0  99 tok/s  ETA 0:01"
