"""What is trained beside frozen weights and gets no gradient is an error that names it; nothing else is."""

import numpy as np
import pytest

from abi_py.config import LlmTrainingConfig, LoraConfig, TrainableModelConfig
from abi_py.errors import ConfigError
from abi_py.model import LoraModel, TrainableModel
from abi_py.training.trainer import LlamaTrainer

SHAPE = {"hidden_dim": 16, "num_layers": 3, "num_heads": 2, "num_kv_heads": 1, "intermediate_dim": 24}
SHAPE |= {"vocab_size": 31, "max_seq_len": 16}
IDS = np.random.default_rng(0).integers(0, 31, (2, 8))


def trainer(zeros=(), family="llama", training=(), **lora):
    """Return one of adapters on a model, some of whose matrices are 0."""
    base = TrainableModel(TrainableModelConfig(**SHAPE).replace(family=family))
    for name in zeros:
        base.weights[name][...] = 0
    config = {"grad_accum_steps": 1, "max_seq_len": 16, "learning_rate": 0.01, "warmup_steps": 0, **dict(training)}
    return LlamaTrainer(LoraModel(base, LoraConfig(rank=2, **lora)), LlmTrainingConfig(**config))


def steps(made, count, ids=IDS):
    for _ in range(count):
        made.train_step(ids, ids)


@pytest.mark.parametrize("use_dora", [False, True])
def test_an_adapter_before_nothing_is_named(use_dora):
    """w_o of the second block is 0 and has no adapter, so what its attention computes is lost."""
    made = trainer(["layers.1.w_o"], target_modules=("q_proj", "v_proj", "up_proj"), use_dora=use_dora)
    steps(made, 1)
    with pytest.raises(ConfigError, match=r"layers\.1\.w_q, layers\.1\.w_v: no gradient in 2 steps, so these have"):
        steps(made, 1)


def test_so_is_what_is_trained_whole():
    """The norm of a branch that adds nothing."""
    made = trainer(["layers.0.w_down"], target_modules=("q_proj",), modules_to_save=("post_attention_layernorm",))
    steps(made, 1)
    with pytest.raises(ConfigError, match=r"layers\.0\.ffn_norm: no gradient in 2 steps, so this has no effect"):
        steps(made, 1)


CASES = {
    "all of a model": {},
    "lengths": {"use_dora": True},
    "dropout": {"dropout": 0.5},
    "GPT-2": {"family": "gpt2"},
    "experts, of which some are not chosen": {"family": "mixtral"},
    "everything whole": {"modules_to_save": ("embed_tokens", "lm_head", "norm")},
    "a block that begins with 0, as its own adapters move": {"zeros": ("layers.1.w_o", "layers.1.w_down")},
    "a warm-up from 0": {"zeros": ("layers.1.w_o",), "training": {"warmup_steps": 6}},
    "bf16": {"training": {"mixed_precision": "bf16"}},
    "fp16": {"training": {"mixed_precision": "fp16"}},
}


@pytest.mark.parametrize("case", CASES)
def test_nothing_else_is(case):
    steps(trainer(**CASES[case]), 4)


def test_windows_that_say_nothing_do_not_count():
    """Rows of one token leave queries and keys without a gradient; a window without labels leaves all."""
    made = trainer(target_modules=("q_proj", "k_proj"))
    steps(made, 3, IDS[:, :1])
    made.train_step(IDS, np.full_like(IDS, -100))
    steps(made, 2)


def test_a_whole_model_is_not_looked_at():
    base = TrainableModel(TrainableModelConfig(**SHAPE))
    base.weights["layers.1.w_o"][...] = 0
    base.weights["layers.1.w_down"][...] = 0
    steps(LlamaTrainer(base, LlmTrainingConfig(grad_accum_steps=1, max_seq_len=16, learning_rate=0.01)), 3)
