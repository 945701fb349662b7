"""Training adapters: PyTorch's ten steps, resumed runs, checkpoints of another base, evaluation, generation."""

import json

import numpy as np
import pytest

import abi_py
from abi_py.config import EarlyStoppingConfig, LlmTrainingConfig, LoraConfig, TrainableModelConfig
from abi_py.errors import CheckpointError
from abi_py.formats.peft import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from abi_py.formats.safetensors import read_safetensors
from abi_py.kernels.engine.jit import JIT
from abi_py.model import LoraModel, TrainableModel
from abi_py.model.folder import config_from_huggingface
from abi_py.training.loading import load_model
from abi_py.training.trainer import LlamaTrainer

LORA = {"rank": 4, "alpha": 6, "dropout": 0.25, "target_modules": ("q_proj", "v_proj", "o_proj", "up_proj")}

QUICK = {"epochs": 8, "grad_accum_steps": 1, "learning_rate": 0.03, "lr_schedule": "constant"}


@pytest.fixture
def make_lora(make_model):
    """Return a function that puts adapters on the tiny model."""

    def make(base_model=None, shape=(), **options):
        model = make_model(**dict(shape))
        for w in model.weights.values():
            w *= np.float32(4 if w.ndim > 1 else 1)
        return LoraModel(model, LoraConfig(**{**LORA, **options}), base_model)

    return make


# -- PyTorch -------------------------------------------------------------------------------------


def test_ten_steps_equal_pytorch(golden):
    """Losses, norms and adapters of AdamW with clipping, by the trainer itself, from PEFT's own beginning."""
    g = golden("lora")
    options = json.loads(str(g["options"]))
    shape = config_from_huggingface({**options["shape"], "model_type": "llama"})
    model = TrainableModel(shape)
    for entry in model.parameters.table:
        model.weights[entry.name] = g[f"base/{entry.hf_name}"]
    lora = LoraModel(model, LoraConfig(rank=options["rank"], alpha=options["alpha"]))
    table = lora.parameters.table
    assert {f"initial/{entry.hf_name}" for entry in table} == {name for name in g if name.startswith("initial/")}
    for entry in table:
        lora.weights[entry.name] = g[f"initial/{entry.hf_name}"]
    config = LlmTrainingConfig(
        learning_rate=options["rate"],
        lr_schedule="constant",
        weight_decay=options["decay"],
        max_grad_norm=options["max_norm"],
        grad_accum_steps=1,
        max_seq_len=12,
    )
    trainer = LlamaTrainer(lora, config)
    losses, norms = [], []
    for step, (ids, labels) in enumerate(zip(g["ids"], g["labels"], strict=True)):
        if step == 1:
            lora.zero_gradients()
            lora.compute_loss(ids, labels, backward=True)
            for entry in table:
                expected, found = g[f"second_gradient/{entry.hf_name}"], lora.gradients[entry.name]
                assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max(), entry.name
            lora.zero_gradients()
        metrics = trainer.train_step_with_metrics(ids, labels)
        losses.append(metrics.loss)
        norms.append(metrics.grad_norm)
    assert np.abs(np.array(losses) - g["losses"]).max() < 1e-4
    assert np.abs(np.array(norms) - g["norms"]).max() < 1e-4 * g["norms"].max()
    for entry in table:
        error = np.abs(lora.weights[entry.name] - g[f"final/{entry.hf_name}"]).max()
        assert error < 1e-3 * np.abs(g[f"final/{entry.hf_name}"]).max(), f"{entry.name} is off by {error:.1e}"
    assert np.abs(lora.forward(g["ids"][0]) - g["logits"]).max() < 1e-3 * np.abs(g["logits"]).max()


# -- checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 3])
def test_resumed_means_never_stopped(make_lora, make_config, data, tmp_path, accumulate):
    """With dropout, whose masks go on where they were: the same losses, adapters, moments and state."""

    def train(name, steps=0, resume=False):
        config = make_config(grad_accum_steps=accumulate, max_steps=steps)
        trainer = LlamaTrainer(make_lora(), config.replace(checkpoint_path=str(tmp_path / name), checkpoint_interval=2))
        if resume:
            trainer.load_checkpoint(tmp_path / name)
        trainer.fit(data)
        return trainer

    straight = train("straight")
    train("stopped", steps=3)
    resumed = train("stopped", resume=True)
    assert len(straight.loss_history) > 4
    assert resumed.loss_history == straight.loss_history
    assert resumed.model.collect_weights().tobytes() == straight.model.collect_weights().tobytes()
    assert resumed.model.draws == straight.model.draws == straight.state.draws > 0
    for name, moment in straight.optimizer.moments.items():
        assert resumed.optimizer.moments[name].tobytes() == moment.tobytes()
    forgetful = train("stopped", resume=True)
    assert forgetful.loss_history == straight.loss_history  # nothing was left to do


def test_the_masks_matter(make_lora, make_config, data, tmp_path):
    """A run that forgot its place in the masks would be noticed by the test above."""
    config = make_config(checkpoint_path=str(tmp_path), checkpoint_interval=2)
    straight = LlamaTrainer(make_lora(), config)
    straight.fit(data)
    other = LlamaTrainer(make_lora(), config)
    other.load_checkpoint(tmp_path / "llm_step_2")
    other.model.draws += 1
    other.fit(data)
    assert other.loss_history[:2] == straight.loss_history[:2]
    assert other.loss_history != straight.loss_history


def test_a_window_cut_in_two_is_resumed(make_lora, make_config, data, tmp_path):
    """The partial gradients of adapters are saved, and so is which mask comes next."""
    config = make_config(grad_accum_steps=4, checkpoint_path=str(tmp_path))
    ids = np.random.default_rng(0).integers(0, 19, (4, 2, 8))
    one, other = LlamaTrainer(make_lora(), config), LlamaTrainer(make_lora(), config)
    for batch in ids[:3]:
        one.train_step(batch, batch)
    one.save_checkpoint()
    other.load_checkpoint(tmp_path)
    for trainer in (one, other):
        assert trainer.train_step_with_metrics(ids[3], ids[3]).updated
    assert one.model.collect_weights().tobytes() == other.model.collect_weights().tobytes()


def test_what_a_checkpoint_holds(make_lora, make_config, data, tmp_path):
    """Adapters alone, as PEFT names them: far less than the model, which is not copied."""
    lora = make_lora(base_model="some/base")
    trainer = LlamaTrainer(lora, make_config(epochs=1, checkpoint_path=str(tmp_path)))
    path = trainer.fit(data).checkpoint
    files = {file.name for file in type(tmp_path)(path).iterdir()}
    assert files == {ADAPTER_WEIGHTS, ADAPTER_CONFIG, "optimizer.safetensors", "config.yaml", "state.json"}
    tensors = read_safetensors(f"{path}/{ADAPTER_WEIGHTS}")
    assert set(tensors) == {entry.hf_name for entry in lora.parameters.table}
    assert sum(tensor.size for tensor in tensors.values()) == lora.num_params()
    content = json.loads((type(tmp_path)(path) / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    assert content["base_model_name_or_path"] == "some/base"
    loaded = LoraModel.load(lora.model, path)  # a checkpoint is a PEFT folder, too
    assert loaded.collect_weights().tobytes() == lora.collect_weights().tobytes()


def test_checkpoints_of_something_else_are_refused(make_lora, make_model, make_config, data, tmp_path):
    config = make_config(epochs=1, checkpoint_path=str(tmp_path / "lora"))
    LlamaTrainer(make_lora(), config).fit(data)
    whole = make_config(epochs=1, checkpoint_path=str(tmp_path / "whole"))
    LlamaTrainer(make_model(), whole).fit(data)

    def refuse(model, name, message):
        before = model.collect_weights()
        with pytest.raises(CheckpointError, match=message):
            LlamaTrainer(model, config).load_checkpoint(tmp_path / name)
        assert model.collect_weights().tobytes() == before.tobytes()

    refuse(make_model(), "lora", "holds adapters of LoRA; trained here: a whole model")
    refuse(make_lora(), "whole", "holds a whole model; trained here: adapters of LoRA")
    refuse(make_lora(rank=5), "lora", "rank is 4 there and 5 here")
    refuse(make_lora(dropout=0), "lora", "dropout is 0.25 there and 0.0 here")
    refuse(make_lora(target_modules=("q_proj",)), "lora", "target_modules is")
    refuse(make_lora(shape={"seed": 8}), "lora", "adapters on other weights than these")


# -- in place of a model -------------------------------------------------------------------------


def test_early_stopping_brings_the_best_adapters_back(make_lora, make_config, data):
    """In memory, without a directory: what comes back are the adapters of the best evaluation."""
    config = make_config(epochs=4, eval_interval=2, learning_rate=0.3, min_learning_rate=0.0)
    trainer = LlamaTrainer(make_lora(), config)
    report = trainer.fit(data, data, EarlyStoppingConfig(patience=1, min_delta=10.0))
    assert report.early_stopped
    assert trainer.evaluate(data).loss == pytest.approx(report.best_val_loss, abs=1e-6)


def test_learning_lowers_the_loss_and_only_the_adapters_change(make_lora, make_config, data):
    lora = make_lora(dropout=0.0)
    before, trainer = lora.model.collect_weights(), LlamaTrainer(lora, make_config(**QUICK))
    first = trainer.evaluate(data).loss
    trainer.fit(data)
    assert trainer.evaluate(data).loss < first - 0.2, first
    assert lora.model.collect_weights().tobytes() == before.tobytes()
    lora.merge()
    assert trainer.evaluate(data).loss < first - 0.2, first


@pytest.mark.skipif(not JIT, reason="slow without compiling; the precisions of a step are in tests/model")
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_training_in_reduced_precision(make_lora, make_config, data, precision):
    trainer = LlamaTrainer(make_lora(), make_config(**QUICK, mixed_precision=precision))
    first = trainer.evaluate(data).loss
    trainer.fit(data)
    assert trainer.evaluate(data).loss < first - 0.2, first


def test_generation_with_adapters_is_that_of_the_merged_model(make_lora):
    lora = make_lora()
    rng = np.random.default_rng(1)
    for name, w in lora.weights.items():
        if name.endswith(".b"):
            w[...] = rng.standard_normal(w.shape)
    prompts = [np.arange(4), np.arange(7) + 3]
    made = abi_py.generate(lora, prompts, 8, temperature=0)
    for one, other in zip(made, abi_py.generate(lora.merged(), prompts, 8, temperature=0), strict=True):
        assert one.tolist() == other.tolist()
    plain = abi_py.generate(lora.model, prompts, 8, temperature=0)
    assert [ids.tolist() for ids in made] != [ids.tolist() for ids in plain]
    for prompt, ids in zip(prompts, made, strict=True):  # and that of the adapters' own forward pass
        read = prompt
        for token in ids:
            assert lora.forward(read[None])[0, -1].argmax() == token
            read = np.append(read, token)


def test_a_run_of_adapters_is_opened_with_its_base(make_lora, make_model, make_config, data, tmp_path):
    """The base is a checkpoint of another run, found by the path that the adapters carry."""
    base = make_model()
    path = LlamaTrainer(base, make_config(epochs=1, checkpoint_path=str(tmp_path / "base"))).fit(data).checkpoint
    lora = LoraModel(base, LoraConfig(**LORA), base_model=path)
    LlamaTrainer(lora, make_config(epochs=1, checkpoint_path=str(tmp_path / "lora"))).fit(data)
    loaded = load_model(tmp_path / "lora").model
    ids = np.arange(9)[None]
    assert loaded.forward(ids).tobytes() == lora.forward(ids).tobytes()


def test_zig_file_holds_the_merged_weights(make_lora, tmp_path):
    lora = make_lora()
    lora.weights["layers.0.w_q.b"][...] = 1
    lora.save_checkpoint(tmp_path / "merged.abic", 5)
    other = TrainableModel(TrainableModelConfig.from_dict({**lora.config.to_dict(), "seed": 1}))
    assert other.load_checkpoint_file(tmp_path / "merged.abic") == 5
    assert other.collect_weights().tobytes() == lora.merged().collect_weights().tobytes()
