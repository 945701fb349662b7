"""What a rehearsal has called is all that a run calls: nothing is compiled, or even loaded, after it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import PATIENCE

from abi_py.runs import compiling, rehearsal
from abi_py.runs.tiny_models import tiny_shape
from abi_py.shape import CheckpointingStrategy, ModelFamily

ROOT = Path(__file__).resolve().parents[2]
compiled_only = pytest.mark.skipif(not compiling.kernel_names(), reason="nothing is compiled without JIT")

RUN = """
import json, sys, tempfile
from pathlib import Path
import numpy as np
from abi_py.config import LlmTrainingConfig, LoraConfig
from abi_py.generation import generate
from abi_py.model import LoraModel, TrainableModel
from abi_py.model.presets import preset
from abi_py.runs import compiling
from abi_py.runs.rehearsal import rehearse
from abi_py.runs.tiny_models import stored_as, tiny_shape
from abi_py.shape import CheckpointingStrategy, ModelFamily
from abi_py.training.trainer import LlamaTrainer

kernels = {name: kernel for name, (_, kernel) in compiling.dispatchers().items()}
# What the shape of the model changes beside its sizes.
CHANGES = {"plain": {}, "untied": {"tie_embeddings": False}, "full": {"checkpointing": CheckpointingStrategy.FULL},
           "attention": {"checkpointing": CheckpointingStrategy.ATTENTION_ONLY}}

def model_of(family, change, base):
    shape = tiny_shape(ModelFamily(family)).replace(
        hidden_dim=24, intermediate_dim=40, vocab_size=300, num_layers=3, max_seq_len=64, **CHANGES[change])
    model = TrainableModel(shape)
    if base == "":
        return model
    adapters = LoraConfig(rank=3, dropout=0.1 if "dropout" in base else 0.0)
    storage = base.partition(" ")[0]
    return LoraModel(stored_as(model, storage) if storage != "float32" else model, adapters)

def loaded():
    return {(name, types) for name, kernel in kernels.items() for types in kernel.overloads}

for case in json.load(sys.stdin):
    family, precision, optimizer, change, base = case
    for kernel in kernels.values():
        kernel._reset_overloads()
    model = model_of(family, change, base)
    folder = tempfile.mkdtemp()
    config = LlmTrainingConfig(
        mixed_precision=precision, optimizer=optimizer, batch_size=2, max_seq_len=40, grad_accum_steps=3, epochs=1,
        eval_interval=1, checkpoint_path=folder, checkpoint_interval=1, z_loss=1e-4, label_smoothing=0.1)
    rehearse(model, config)
    before = loaded()
    data = np.arange(1000, dtype=np.uint32) * 7 % 300
    LlamaTrainer(model, config.replace(max_steps=2)).fit(data, data[:90])
    again = LlamaTrainer(model, config)
    again.load_checkpoint(folder)
    again.fit(data, data[:90])
    generate(model, list(range(50)), 3)
    new = sorted({name for name, _ in loaded() - before})
    if new or not before:
        print(*case, "->", *new)
"""

CASES = [
    *([family.value, "fp32", "adamw", "plain", ""] for family in ModelFamily),
    *([family, "bf16", "adamw", "plain", ""] for family in ("llama", "gpt2", "mixtral", "gemma3")),
    ["llama", "fp16", "adamw", "untied", ""],
    *(["llama", "fp32", optimizer, "plain", ""] for optimizer in ("sgd", "adam", "muon", "adamw_8bit")),
    *(["llama", "fp32", "adamw", change, ""] for change in ("full", "attention", "untied")),
    *(["llama", precision, "adamw", "plain", "float32 dropout"] for precision in ("fp32", "bf16")),
    ["llama", "fp32", "adamw", "plain", "bf16"],
    ["llama", "bf16", "adamw", "plain", "bf16 dropout"],
    ["qwen2", "fp32", "adamw", "plain", "float16"],
    ["gpt2", "fp32", "adamw", "plain", "float32"],
]


@compiled_only
def test_nothing_is_compiled_or_loaded_after_it():
    """In a process of its own, where each case begins as a new process does: without any kernel."""
    import json

    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", RUN]
    pipes = {"input": json.dumps(CASES), "capture_output": True, "text": True}
    done = subprocess.run(words, env=environment, cwd=ROOT, timeout=PATIENCE, **pipes)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


@pytest.mark.parametrize("family", list(ModelFamily))
def test_what_is_shrunk_keeps_its_layers(family):
    shape = tiny_shape(family).replace(num_layers=7, hidden_dim=48, checkpointing=CheckpointingStrategy.FULL)
    small = rehearsal.shrunk(shape)
    assert (small.num_layers, small.family, small.checkpointing) == (7, family, CheckpointingStrategy.FULL)
    assert small.num_params() < 60_000
    assert compiling.of_layers(small) == compiling.of_layers(shape)
