"""What the tests share that open our results in Hugging Face's libraries; without these, the tests are skipped.

`pip install -e .[oracle]` brings torch, transformers and peft.  Nothing is fetched: all models are made here.
"""

import ctypes
import importlib
import os

import numpy as np
import pytest

from abi_py.config import LlmTrainingConfig, TrainableModelConfig
from abi_py.generation import generate
from abi_py.model import TrainableModel
from abi_py.training.trainer import LlamaTrainer

os.environ.setdefault("HF_HUB_OFFLINE", "1")

VOCABULARY = 61
NEW = 24  # ids that are written


def pytest_collection_modifyitems(items):
    """Let the libraries warn; about what they do to each other there is nothing that we could do."""
    for item in items:
        if "oracle" in item.path.parts:
            item.add_marker(pytest.mark.filterwarnings("default"))


def library(name):
    """Return a library, or skip the test."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        return pytest.skip(f"{error}; pip install -e .[oracle] brings it")


@pytest.fixture
def transformers():
    """Return the library."""
    return library("transformers")


@pytest.fixture
def peft():
    """Return the library."""
    return library("peft")


@pytest.fixture
def mlx_lm():
    """Return the library, which computes on the CPU where there is no Metal (`pip install mlx[cpu] mlx-lm`)."""
    return library("mlx_lm")


@pytest.fixture
def torch():
    """Return the library, on one thread."""
    torch = library("torch")
    torch.set_num_threads(1)
    return torch


@pytest.fixture
def make_model():
    """Return a function that makes a small model: two layers, grouped heads."""

    def make(family="llama", **changes):
        shape = {
            **{"hidden_dim": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "intermediate_dim": 48},
            **{"vocab_size": VOCABULARY, "max_seq_len": 64, "seed": 3},
        }
        return TrainableModel(TrainableModelConfig(**{**shape, **changes}).replace(family=family))

    return make


@pytest.fixture
def train():
    """Return a function that trains on sequences that count up in steps, different for each row, and returns losses."""

    def run(model, root, strides, rate=1e-2):
        config = LlmTrainingConfig(
            epochs=40, batch_size=8, max_seq_len=32, learning_rate=rate, grad_accum_steps=1,
            lr_schedule="constant", checkpoint_path=str(root),
        )  # fmt: skip
        rows = [(start + stride * np.arange(33)) % VOCABULARY for stride in strides for start in range(0, 60, 8)]
        trainer = LlamaTrainer(model, config)
        trainer.fit(np.concatenate(rows))
        return trainer.loss_history

    return run


@pytest.fixture
def agree(torch):
    """Return a function that compares logits and greedy ids of our model and of a PyTorch one."""

    def compare(ours, theirs, prompts):
        written = set()
        theirs.eval()
        theirs.generation_config.eos_token_id = None  # as long as was asked for, whatever is written
        for prompt in prompts:
            with torch.no_grad():
                wanted = theirs(input_ids=torch.tensor([prompt])).logits[0].float().numpy()
            found = ours.forward(np.array([prompt]))[0]
            assert np.ptp(wanted) > 2  # those of a new model lie within 1
            assert np.abs(found - wanted).max() < 1e-4
            with torch.no_grad():
                whole = theirs.generate(
                    input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                    do_sample=False, max_new_tokens=NEW, pad_token_id=0,
                )  # fmt: skip
            ids = whole[0, len(prompt) :].tolist()
            assert generate(ours, prompt, NEW, temperature=0).tolist() == ids
            written.update(ids)
        assert len(written) > 3  # one id again and again would show nothing

    return compare


@pytest.fixture(scope="module")
def llama_cpp():
    """Return the library, which says nothing."""
    found = library("llama_cpp")
    quiet = found.llama_log_callback(lambda level, text, data: None)
    found.llama_log_set(quiet, ctypes.c_void_p(0))
    yield found
    assert quiet
