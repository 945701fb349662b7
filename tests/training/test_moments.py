"""Moments in 8 bits: of which tensors, what an update is, how many bytes, and that a training is as good as in 32."""

import json

import numpy as np
import pytest

from abi_py.config import LlmTrainingConfig, LoraConfig, TrainableModelConfig
from abi_py.data.corpus import standard_library_corpus
from abi_py.data.tokens import TokenizedDataset
from abi_py.errors import CheckpointError, NonFiniteError
from abi_py.formats.safetensors import read_safetensors, write_safetensors
from abi_py.kernels.adamw_8bit import SHARING, blocks_of, decode_blocks_ref, encode_blocks_ref
from abi_py.kernels.optimizers import adamw_ref
from abi_py.model import LoraModel, TrainableModel
from abi_py.training import checkpoint
from abi_py.training.moments import coded_of, moments_of
from abi_py.training.optimizer import Optimizer
from abi_py.training.trainer import LlamaTrainer

WIDE = {"hidden_dim": 64, "vocab_size": 80, "intermediate_dim": 72}  # w_q, w_o, the feed-forward and the head: coded
NAMES = ["m", "m_codes", "m_scales", "v", "v_codes", "v_scales"]


@pytest.fixture
def wide(make_model):
    """Return a function that makes a model of which some tensors have 4096 numbers or more, and some have not."""
    return lambda **changes: make_model(**{**WIDE, **changes})


@pytest.fixture
def tokens():
    """Return tokens for 8 batches."""
    return TokenizedDataset.from_slice(np.random.default_rng(7).integers(0, 80, 124))


def names(tensors):
    return {entry.name for entry in tensors}


def test_large_tensors_are_coded_and_embeddings_are_not(wide, make_config):
    config = make_config(optimizer="adamw_8bit")
    for tied in (True, False):
        table = wide(tie_embeddings=tied).parameters.table
        coded = {f"layers.{i}.{name}" for i in range(2) for name in ("w_q", "w_o", "w_gate", "w_up", "w_down")}
        assert names(coded_of(table, config)) == coded | (set() if tied else {"output_proj"})
        assert {entry.size for entry in table if entry.name in ("layers.0.w_q", "layers.0.w_k")} == {4096, 2048}
        assert not coded_of(table, config.replace(optimizer="adamw"))
    gpt2 = wide(family="gpt2", num_kv_heads=2, max_seq_len=96).parameters.table
    assert {entry.size for entry in gpt2 if entry.embedding} == {80 * 64, 96 * 64}
    assert not {"token_embedding", "position_embedding"} & names(coded_of(gpt2, config))


def test_two_bytes_for_a_weight(make_config):
    sizes = {"hidden_dim": 256, "num_layers": 4, "num_heads": 4, "num_kv_heads": 4, "intermediate_dim": 768}
    table = TrainableModel(TrainableModelConfig(**sizes, vocab_size=300, max_seq_len=64)).parameters.table
    config = make_config(optimizer="adamw_8bit")
    coded, kept = coded_of(table, config), moments_of(table, config)
    size = sum(entry.size for entry in coded)
    assert sum(kept[name].nbytes for name in NAMES if "_" in name) / size == 2.03125
    rest = sum(entry.size for entry in table) - size
    assert kept["m"].nbytes + kept["v"].nbytes == 8 * rest
    whole = sum(each.nbytes for each in moments_of(table, config.replace(optimizer="adamw")).values())
    assert whole == 8 * (size + rest)


def test_an_update_is_that_of_the_formulas(wide, make_config, rng):
    """Three updates against the formulas in float64, one tensor at a time; moments between them as they were kept."""
    parameters = wide(tie_embeddings=False).parameters
    own = {"beta1": 0.6, "beta2": 0.8, "epsilon": 0.01, "weight_decay": 0.3}
    optimizer = Optimizer(parameters, make_config(optimizer="adamw_8bit", **own))
    coded = names(optimizer.coded)
    state = {
        name: (w.astype(float), 0 * w.astype(float), 0 * w.astype(float)) for name, w in parameters.weights.items()
    }
    for step in (1, 2, 3):
        for name, (w, m, v) in state.items():
            parameters.gradients[name] = g = rng.standard_normal(w.shape)
            state[name] = adamw_ref(w, m, v, g, float(w.ndim > 1), 0.05, 0.6, 0.8, 0.01, 0.3, step, 0.5)
        optimizer.update(0.5, 0.05)
        kept = {name: optimizer.flat(name) for name in ("m", "v")}
        for entry in parameters.table:
            w, m, v = state[entry.name]
            np.testing.assert_allclose(parameters.weights[entry.name], w, rtol=1e-4, atol=1e-5)
            found = [kept[name][entry.slice].reshape(entry.shape) for name in ("m", "v")]
            near = 0.0071 if entry.name in coded else 1e-5  # half of the widest distance of two codes
            for exact, mine in zip((m, v), found, strict=True):
                assert np.abs(mine - exact).max() <= near * np.abs(exact).max()
            state[entry.name] = w, *(each.astype(float) for each in found)
    assert "adamw_8bit, 3 updates, moments m and v" in repr(optimizer)


def test_decay_of_norms_and_biases_acts(wide, make_config):
    parameters = wide().parameters
    results = []
    for everything in (False, True):
        parameters.weights_flat[:] = 1
        config = make_config(optimizer="adamw_8bit", weight_decay=0.5, decay_norms_and_biases=everything)
        Optimizer(parameters, config).update(1.0, 0.1)
        results.append({name: float(w.ravel()[0]) for name, w in parameters.weights.items()})
    assert results[0]["layers.0.w_q"] == results[1]["layers.0.w_q"] == np.float32(0.95)
    assert (results[0]["final_norm"], results[1]["final_norm"]) == (1, np.float32(0.95))


def test_moments_of_all_weights_are_taken_over_and_given(wide, make_config, rng):
    """As from and to a file of the Zig trainer."""
    parameters = wide().parameters
    optimizer = Optimizer(parameters, make_config(optimizer="adamw_8bit"))
    m = rng.standard_normal(parameters.size).astype(np.float32)
    optimizer.load_flat({"m": m, "v": np.square(m)}, 7)
    assert optimizer.step == 7
    assert sorted(optimizer.moments) == NAMES
    for entry in parameters.table:
        for name, exact in (("m", m[entry.slice]), ("v", np.square(m[entry.slice]))):
            found = optimizer.flat(name)[entry.slice]
            if entry in optimizer.coded:
                codes = encode_blocks_ref(exact, name == "m")
                assert np.array_equal(found, decode_blocks_ref(*codes, entry.size, name == "m"))
            else:
                assert np.array_equal(found, exact)
    kept = optimizer.copy_moments()
    optimizer.reset()
    assert not any(moment.any() for moment in optimizer.moments.values())
    optimizer.load(kept, 7)
    assert all(np.array_equal(kept[name], optimizer.moments[name]) for name in NAMES)


def test_another_optimizer_is_refused_by_name(wide, make_config, tokens, tmp_path):
    config = make_config(optimizer="adamw_8bit", checkpoint_path=str(tmp_path / "8"), max_steps=1)
    LlamaTrainer(wide(), config).fit(tokens)
    with pytest.raises(CheckpointError, match=r"m_codes, m_scales, v, .* but adamw .* needs m, v; resume with the opt"):
        LlamaTrainer(wide(), config.replace(optimizer="adamw")).load_checkpoint(tmp_path / "8")
    config = config.replace(optimizer="adamw", checkpoint_path=str(tmp_path / "32"))
    LlamaTrainer(wide(), config).fit(tokens)
    with pytest.raises(CheckpointError, match=r"holds the moments m, v, but adamw_8bit .* needs m, m_codes"):
        LlamaTrainer(wide(), config.replace(optimizer="adamw_8bit")).load_checkpoint(tmp_path / "32")


def test_a_checkpoint_keeps_codes_and_scales_as_they_are(wide, make_config, tokens, tmp_path):
    config = make_config(optimizer="adamw_8bit", checkpoint_path=str(tmp_path))
    trainer = LlamaTrainer(wide(), config)
    trainer.fit(tokens)
    stored = read_safetensors(trainer.save_checkpoint() / "optimizer.safetensors")
    assert sorted(stored) == sorted([*NAMES, "loss_history"])
    blocks = sum(blocks_of(entry.size) for entry in trainer.optimizer.coded)
    assert (stored["m_codes"].shape, stored["m_codes"].dtype) == ((blocks, SHARING), np.uint8)
    assert all(np.array_equal(stored[name], trainer.optimizer.moments[name]) for name in NAMES)


@pytest.mark.parametrize(
    ("name", "array", "wanted"),
    [
        ("m_codes", np.zeros((3, SHARING), np.float32), r"\(any number, 256\) uint8"),
        ("v_codes", np.zeros((3, 255), np.uint8), r"\(any number, 256\) uint8"),
        ("v_scales", np.zeros((3, 2), np.float32), r"\(any number,\) float32"),
        ("m", np.zeros(10**6, np.float32), r"\(at most \d+,\) float32"),
        ("m_scales", np.zeros(3, np.float32), "m_scales has 3 numbers, but adamw_8bit needs"),
        ("m_scales", None, "m_scales"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(wide, make_config, tokens, tmp_path, monkeypatch, name, array, wanted):
    """Whole files, whose checksums hold, of another program."""
    config = make_config(optimizer="adamw_8bit", checkpoint_path=str(tmp_path), max_steps=1)
    trainer = LlamaTrainer(wide(), config)
    trainer.fit(tokens)
    path = trainer.save_checkpoint()
    stored = {key: value.copy() for key, value in read_safetensors(path / "optimizer.safetensors").items()}
    if array is None:
        stored[name][2] = np.nan
    else:
        stored[name] = array
    monkeypatch.setattr(checkpoint, "verify", lambda path: json.loads((path / "state.json").read_text()))
    write_safetensors(path / "optimizer.safetensors", stored)
    with pytest.raises(CheckpointError, match=wanted):
        LlamaTrainer(wide(), config).load_checkpoint(path)


def test_moments_that_are_not_finite_are_not_saved(wide, make_config, tokens, tmp_path):
    config = make_config(optimizer="adamw_8bit", checkpoint_path=str(tmp_path), max_steps=1)
    trainer = LlamaTrainer(wide(), config)
    trainer.fit(tokens)
    trainer.optimizer.moments["v_scales"][1] = np.inf
    with pytest.raises(NonFiniteError, match="v_scales"):
        trainer.save_checkpoint()


def test_parts_of_a_window_give_the_update_of_the_whole(wide, make_config, one_batch):
    """Accumulation, clipping and scale stand before the optimizer, so moments and weights are those of one batch."""
    ids, labels = one_batch(6)
    together = LlamaTrainer(wide(), make_config(optimizer="adamw_8bit", grad_accum_steps=1, max_grad_norm=0.01))
    apart = LlamaTrainer(wide(), make_config(optimizer="adamw_8bit", grad_accum_steps=3, max_grad_norm=0.01))
    for _ in range(2):
        norm = together.train_step_with_metrics(ids, labels).grad_norm
        for part in range(0, 6, 2):
            metrics = apart.train_step_with_metrics(ids[part : part + 2], labels[part : part + 2])
    assert metrics.updated
    assert metrics.grad_norm == pytest.approx(norm, rel=1e-4)
    assert norm > 0.01
    moments = [trainer.optimizer.flat("m") for trainer in (together, apart)]
    largest = np.abs(moments[0]).max()
    assert np.abs(moments[0] - moments[1]).max() < 0.015 * largest  # one code apart where a number is between two
    assert 0.0009 < np.linalg.norm(moments[0]) < 0.0025  # of gradients whose norm is 0.01
    weights = [trainer.model.collect_weights() for trainer in (together, apart)]
    assert np.abs(weights[0] - weights[1]).max() < 1e-4


def test_adapters(make_model, make_config, tokens, tmp_path):
    """Halves of 4096 numbers are coded; a run that goes on has the bits of one that was never stopped."""
    base = make_model(hidden_dim=256, vocab_size=80, intermediate_dim=300)
    config = make_config(optimizer="adamw_8bit", checkpoint_path=str(tmp_path / "a"), checkpoint_interval=2)
    lora = LoraConfig(rank=16, target_modules=["q_proj", "v_proj", "up_proj"])
    whole = LlamaTrainer(LoraModel(base, lora), config)
    coded = names(whole.optimizer.coded)
    assert {name.rpartition("layers.0.")[2] for name in coded if "layers.0." in name} >= {"w_q.a", "w_q.b", "w_up.b"}
    assert "layers.0.w_v.b" not in coded  # 128 rows of rank 16
    whole.fit(tokens)
    resumed = LlamaTrainer(LoraModel(base, lora), config)
    resumed.load_checkpoint(tmp_path / "a" / "llm_step_2")
    resumed.fit(tokens)
    assert resumed.model.collect_weights().tobytes() == whole.model.collect_weights().tobytes()
    for name, moment in whole.optimizer.moments.items():
        assert resumed.optimizer.moments[name].tobytes() == moment.tobytes()


def test_what_is_chosen_by_ids_of_adapters_is_not_coded(make_model, make_config):
    lora = LoraConfig(rank=64, target_modules=["embed_tokens", "lm_head", "q_proj"])
    table = LoraModel(make_model(**WIDE), lora).parameters.table
    assert {entry.name for entry in table if entry.embedding} == {"token_embedding.a"}
    coded = names(coded_of(table, make_config(optimizer="adamw_8bit")))
    assert {"token_embedding.b", "output_proj.a", "output_proj.b", "layers.0.w_q.a"} <= coded
    assert "token_embedding.a" not in coded  # (V, R): a row for each id, as the table itself


def test_same_bits_for_any_thread_count(wide, make_config, tokens, same_bits):
    def run():
        trainer = LlamaTrainer(wide(), make_config(optimizer="adamw_8bit"))
        trainer.fit(tokens)
        return trainer.model.collect_weights(), *trainer.optimizer.moments.values()

    same_bits(run)


def test_the_loss_is_that_of_adamw():
    """300 steps on the text of the standard library: within 2 % of AdamW, in training and on text that is held out."""
    corpus = standard_library_corpus(1 << 18)
    train, valid = corpus.tokens[:-8000], corpus.tokens[-8000:]
    shape = TrainableModelConfig(
        hidden_dim=64, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_dim=128, vocab_size=257, max_seq_len=64
    )
    losses = {}
    for optimizer in ("adamw", "adamw_8bit"):
        config = LlmTrainingConfig(
            **{"optimizer": optimizer, "epochs": 9, "max_steps": 300, "batch_size": 8, "max_seq_len": 64},
            **{"learning_rate": 1e-3, "warmup_steps": 20, "decay_steps": 300, "grad_accum_steps": 1},
            **{"eval_interval": 0, "log_interval": 0, "checkpoint_interval": 0},
        )
        trainer = LlamaTrainer(TrainableModel(shape), config)
        report = trainer.fit(train, valid)
        losses[optimizer] = np.mean(trainer.loss_history[-30:]), trainer.evaluate(valid).loss
        assert report.total_steps == 300
    for mine, exact in zip(losses["adamw_8bit"], losses["adamw"], strict=True):
        assert exact < 2.9  # something has been learned: chance is 5.5
        assert abs(mine / exact - 1) < 0.02
    assert losses["adamw_8bit"] != losses["adamw"]


@pytest.mark.parametrize("name", ["adamw_bnb_8bit", "adamw8bit", "adamw_8bit"])
def test_names_of_others_are_read(name):
    assert LlmTrainingConfig(optimizer=name).optimizer.value == "adamw_8bit"
    assert LlmTrainingConfig.from_dict({"optimizer": name}).to_dict()["optimizer"] == "adamw_8bit"
    assert LlmTrainingConfig(optimizer="adamw_torch").optimizer.value == "adamw"
