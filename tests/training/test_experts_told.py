"""What a run tells of its experts: figures of a window, in events, in metrics.jsonl, on the console, after a resume."""

import io
import json

import numpy as np
from rich.console import Console

from abi_py.config import LlmTrainingConfig, TrainableModelConfig
from abi_py.data.tokens import TokenizedDataset
from abi_py.model import TrainableModel
from abi_py.training.console import ConsoleSink
from abi_py.training.metrics import JsonlSink
from abi_py.training.report import expert_figures
from abi_py.training.trainer import LlamaTrainer


def make():
    shape = {"hidden_dim": 8, "num_layers": 2, "num_heads": 2, "intermediate_dim": 6, "vocab_size": 31}
    model = TrainableModel(TrainableModelConfig(**shape, max_seq_len=8, family="mixtral", num_experts=4))
    for block in range(2):  # every token has one sign here, so expert 2 is never chosen
        model.weights[f"layers.{block}.w_router"][...] = 0
        model.weights[f"layers.{block}.w_router"][:, 0] = [0.1, 0.2, -9, 0.3]
    model.weights["token_embedding"][:, 0] = 3
    return model


def test_figures():
    assert expert_figures([]) == {}
    assert expert_figures([[4, 4], [0, 8]]) == {"experts": 4, "idle_experts": 1, "expert_load": 2.0}


def test_a_window_is_told_as_a_whole(tmp_path):
    config = LlmTrainingConfig(
        max_seq_len=8, batch_size=1, grad_accum_steps=3, max_steps=2, log_interval=1, warmup_steps=0, epochs=9,
        checkpoint_path=str(tmp_path / "run"), checkpoint_interval=0, eval_interval=0, learning_rate=1e-6,
    )  # fmt: skip
    written = io.StringIO()
    trainer = LlamaTrainer(make(), config, [JsonlSink(tmp_path / "metrics.jsonl"), ConsoleSink(Console(file=written))])
    trainer.fit(TokenizedDataset.from_slice(np.random.default_rng(0).integers(0, 31, 200)))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if line["type"] == "step"]
    assert len(steps) == 2
    for step in steps:  # two layers of four experts, two of which every token chooses
        assert (step["experts"], step["idle_experts"], step["expert_load"]) == (8, 4, 2.0)
        assert step["load_balancing"] > 0
    assert "4 of 8 experts idle, load 2.0x" in written.getvalue()
    assert trainer.model.stack.loads().sum() == 2 * 2 * 8
    assert not trainer.model.gradients["layers.0.experts_up"][2].any()


def test_a_dense_model_tells_nothing(tmp_path):
    shape = {"hidden_dim": 8, "num_layers": 1, "num_heads": 2, "intermediate_dim": 6, "vocab_size": 31}
    trainer = LlamaTrainer(TrainableModel(TrainableModelConfig(**shape)), LlmTrainingConfig(grad_accum_steps=1))
    out = trainer.model.compute_loss(np.arange(8)[None], np.arange(8)[None], backward=True)
    assert out.expert_loads is None
