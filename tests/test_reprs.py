"""What objects say at a prompt: what matters, on a line or a few, whatever state they are in."""

import inspect
from pathlib import Path

import numpy as np
import pytest

import abi_py as abi
from abi_py.choices import LearningRateSchedule
from abi_py.fields import fields_of
from abi_py.formats.companions import Companions
from abi_py.model.frozen import FrozenModel
from abi_py.reprs import Shown, short
from abi_py.training.loading import LoadedModel

SHAPE = {"hidden_dim": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "intermediate_dim": 64}
CLASSES = [value for name in abi.__all__ if inspect.isclass(value := getattr(abi, name))]


@pytest.fixture(scope="module")
def model():
    return abi.TrainableModel(abi.TrainableModelConfig(**SHAPE, vocab_size=20, max_seq_len=32))


@pytest.fixture(scope="module")
def trainer(model):
    config = abi.LlmTrainingConfig(batch_size=2, max_seq_len=16, grad_accum_steps=1, lr_schedule="constant")
    return abi.LlamaTrainer(model, config)


@pytest.mark.parametrize("cls", [*CLASSES, Companions, FrozenModel, LoadedModel], ids=lambda cls: cls.__name__)
def test_every_public_class_says_something_even_half_made(cls):
    if issubclass(cls, str):  # the names that fields choose from
        return
    assert issubclass(cls, Shown), cls
    text = repr(cls.__new__(cls))
    assert cls.__name__ in text
    assert len(text) < 300
    assert " at 0x" not in text


def test_models_and_their_weights(model):
    shape = "2 layers of width 32, 4 heads (2 for keys), vocabulary 20, rows to 32"
    assert repr(model) == f"TrainableModel(llama, 19,232 parameters: {shape})"
    assert repr(model.weights).startswith("Views(20 tensors of 19,232 numbers: token_embedding (20, 32), layers.0.w_q")
    assert repr(model.weights).endswith("..., layers.1.ffn_norm (32,), final_norm (32,))")
    adapted = repr(abi.LoraModel(model, abi.LoraConfig(rank=2, target_modules=("q",))))
    assert adapted.startswith("LoraModel(256 trained parameters, 1.33 % of 19,232 (rank 2: q_proj), on TrainableModel(")
    assert repr(LoadedModel(model, Path("x"))).startswith(f"LoadedModel(model={model!r}, directory=")


def test_a_frozen_model_names_its_storages(model, tmp_path):
    model.save_pretrained(tmp_path / "m", dtype="bfloat16")
    text = repr(FrozenModel.from_pretrained(tmp_path / "m"))
    assert text.startswith("FrozenModel(llama, 0 of 19,232 parameters trained: ")
    assert text.endswith("kept in bf16)")


def test_trainer_data_and_results(model, trainer):
    tokens = abi.TokenizedDataset.from_slice([i % 20 for i in range(100)], 20)
    batches = tokens.batches(2, 16, seed=3)
    batch = batches.next()
    assert repr(batch) == "Batch(2 x 16 ids, 32 trained)"
    order = "shuffled by seed 3; epoch 0, next 1"
    assert repr(batches).startswith(f"BatchIterator(4 batches of 2 x 16, {order}; of TokenizedDataset(")
    trainer.train_step(batch.input_ids, batch.labels)
    done = f"step 1, 0 of 10 epochs done, loss {trainer.state.loss:.4g}"
    assert repr(trainer).startswith(f"LlamaTrainer({done}; Optimizer(")
    assert repr(trainer.optimizer) == "Optimizer(adamw, 1 update, moments m and v, 0.2 MB)"
    out = repr(model.compute_loss(batch.input_ids, batch.labels))
    assert "num_tokens=32" in out
    assert "token_losses=float32 (2, 16)" in out
    assert repr(trainer.get_report()).startswith("TrainingReport(final_loss=")
    assert repr(abi.Generator(model)) == f"Generator({model!r}, without a tokenizer)"


def test_configurations_name_what_is_not_a_default_and_can_be_read_again():
    config = abi.LlmTrainingConfig(epochs=3, lr_schedule=LearningRateSchedule.WSD, warmup_steps=5)
    assert repr(config) == "LlmTrainingConfig(epochs=3, lr_schedule='wsd', warmup_steps=5)"
    assert eval(repr(config), {"LlmTrainingConfig": abi.LlmTrainingConfig}) == config
    shape = abi.TrainableModelConfig(**SHAPE, vocab_size=20, rope_scaling="yarn:2")
    assert eval(repr(shape), {"TrainableModelConfig": abi.TrainableModelConfig}) == shape
    assert len(fields_of(abi.GenerationConfig)) > 15
    assert repr(abi.GenerationConfig()) == "GenerationConfig()"


def test_values_are_short():
    assert short(np.zeros((1000, 1000), np.float32)) == "float32 (1000, 1000)"
    assert short(list(range(100_000))) == "list of 100,000"
    assert short([np.zeros(9)]) == "list of 1"
    assert short([1, 2]) == "[1, 2]"
    assert len(short("x" * 10_000)) <= 120
    assert short(1 / 3) == "0.333333"
