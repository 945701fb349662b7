"""Every field of the four configurations has an effect: a run with another value gives something else.

A row is field: (settings beside it, another value, what differs).  `LEFT` are the ABI's fields that are refused.
"""

import sys
import types

import numba
import numpy as np
import pytest

from abi_py.config import (
    SECTIONS,
    EarlyStoppingConfig,
    LlmTrainingConfig,
    LoraConfig,
    TrainableModelConfig,
    fields_of,
)
from abi_py.errors import ConfigError, NonFiniteError
from abi_py.kernels.muon import muon_ref
from abi_py.kernels.optimizers import adam_ref, adamw_ref, sgd_ref
from abi_py.model import TrainableModel
from abi_py.model.arena import memory_plan
from abi_py.model.lora import LoraModel
from abi_py.parameters import Buffers, Tensor
from abi_py.training.optimizer import Optimizer
from abi_py.training.trainer import LlamaTrainer

FP16, SGD, MUON = {"mixed_precision": "fp16"}, {"optimizer": "sgd"}, {"optimizer": "muon"}
HIGH = {**FP16, "initial_loss_scale": 2.0**31}  # overflows
SAVES = {"checkpoint_path": "saved", "checkpoint_interval": 1}
WSD = {"lr_schedule": "wsd", "decay_steps": 6}
GGUF = {"export_gguf_path": "x.gguf"}
WANDB = {"log_dir": "logs", "enable_wandb": True}
TRAINING = {
    "epochs": ({}, 1, "steps"),
    "batch_size": ({}, 3, "losses"),
    "max_seq_len": ({}, 7, "losses"),
    "learning_rate": ({}, 2e-2, "rates"),
    "lr_schedule": ({}, "linear", "rates"),
    "warmup_steps": ({}, 1, "rates"),
    "warmup_ratio": ({"lr_schedule": "warmup_cosine", "decay_steps": 6}, 0.5, "rates"),
    "decay_steps": ({}, 5, "rates"),
    "min_learning_rate": ({}, 1e-3, "rates"),
    "grad_accum_steps": ({}, 2, "steps"),
    "max_grad_norm": ({}, 1e-3, "weights"),
    "weight_decay": ({}, 0.5, "weights"),
    "optimizer": ({}, "adam", "weights"),
    "label_smoothing": ({}, 0.2, "losses"),
    "z_loss": ({}, 0.1, "weights"),
    "checkpoint_interval": (SAVES, 3, "saved"),
    "checkpoint_path": ({}, "saved", "saved"),
    "max_checkpoints": (SAVES, 2, "saved"),
    "log_interval": ({}, 4, "logged"),
    "eval_interval": ({"epochs": 2}, 2, "evaluated"),
    "mixed_precision": ({}, "bf16", "losses"),
    "log_dir": ({"enable_metrics_stream": True, "log_dir": "a"}, "b", "files"),
    "enable_tensorboard": ({"log_dir": "logs", "enable_metrics_stream": True}, True, "tensorboard"),
    "enable_wandb": ({"log_dir": "logs", "enable_metrics_stream": True}, True, "wandb"),
    "enable_metrics_stream": (WANDB, True, "files"),
    "wandb_project": (WANDB, "mine", "wandb"),
    "wandb_run_name": (WANDB, "first", "wandb"),
    "wandb_entity": (WANDB, "me", "wandb"),
    "schedule_start": ({}, 2, "rates"),
    "cooldown_share": (WSD, 0.5, "rates"),
    "cooldown_steps": (WSD, 3, "rates"),
    "cooldown_shape": ({**WSD, "cooldown_steps": 4}, "linear", "rates"),
    "export_gguf_path": ({}, "x.gguf", "gguf"),
    "export_quantize": (GGUF, "F16", "gguf"),
    "export_name": (GGUF, "mine", "gguf"),
    "seed": ({}, 1, "losses"),
    "shuffle": ({}, False, "losses"),
    "beta1": ({}, 0.5, "weights"),
    "beta2": ({}, 0.5, "weights"),
    "epsilon": ({}, 1e-2, "weights"),
    "momentum": (SGD, 0.5, "weights"),
    "nesterov": (SGD, True, "weights"),
    "muon_momentum": (MUON, 0.5, "weights"),
    "muon_nesterov": (MUON, False, "weights"),
    "muon_steps": (MUON, 2, "weights"),
    "muon_scale": (MUON, "original", "weights"),
    "muon_rate": (MUON, 3.0, "weights"),
    "decay_norms_and_biases": ({"weight_decay": 0.5}, True, "weights"),
    "nan_guard": ({"max_steps": 2}, False, "broken"),
    "max_bad_steps": ({}, 2, "broken"),
    "max_steps": ({}, 2, "steps"),
    "num_threads": ({}, 2, "threads"),
    "initial_loss_scale": (FP16, 512.0, "scale"),
    "loss_scale_growth_factor": ({**FP16, "loss_scale_growth_interval": 2}, 4.0, "scale"),
    "loss_scale_backoff_factor": (HIGH, 0.25, "scale"),
    "loss_scale_growth_interval": (FP16, 2, "scale"),
    "min_loss_scale": (HIGH, 2.0**31, "broken_scale"),
    "max_loss_scale": ({**FP16, "loss_scale_growth_interval": 1}, 2.0**17, "scale"),
}
LEFT = {
    **{"use_gpu": True, "gpu_backend": "cuda"},
    **{"gpu_batch_threshold": 9, "gpu_device_buffer_mb": 9},
}
EARLY = {
    "patience": (2, "steps"),
    "min_delta": (5.0, "steps"),
    "monitor_loss": (False, "best_metric"),
    "enabled": (False, "steps"),
}
SHAPE = {"hidden_dim": 16, "num_layers": 5, "num_heads": 2, "num_kv_heads": 1, "intermediate_dim": 24, "vocab_size": 19}
MODEL = {
    "family": ({}, "qwen2", "shapes"),
    "hidden_dim": ({}, 8, "shapes"),
    "num_layers": ({}, 3, "shapes"),
    "num_heads": ({}, 4, "logits"),
    "num_kv_heads": ({}, 2, "shapes"),
    "intermediate_dim": ({}, 32, "shapes"),
    "vocab_size": ({}, 23, "shapes"),
    "max_seq_len": ({}, 8, "longest"),
    "rope_theta": ({}, 100.0, "logits"),
    "rope_scaling": ({}, "linear:2", "logits"),
    "sliding_window": ({"family": "mistral"}, 2, "logits"),
    "layer_types": ({"family": "qwen3", "sliding_window": 2}, ("full_attention", "sliding_attention"), "logits"),
    "rope_local_theta": ({"family": "gemma3", "sliding_window": 4}, 100.0, "logits"),
    "query_pre_attn_scalar": ({"family": "gemma3"}, 2, "logits"),
    "attention_bias": ({}, True, "shapes"),
    "norm_eps": ({}, 0.1, "logits"),
    "tie_embeddings": ({}, False, "shapes"),
    "checkpointing": ({}, "full", "memory"),
    "checkpoint_interval": ({"checkpointing": "every_n_layers"}, 2, "memory"),
    "head_dim": ({}, 4, "shapes"),
    "activation": ({"family": "gpt2", "num_kv_heads": None}, "gelu", "logits"),
    "num_experts": ({"family": "mixtral"}, 4, "shapes"),
    "experts_per_token": ({"family": "mixtral"}, 1, "logits"),
    "expert_dim": ({"family": "qwen3_moe"}, 8, "shapes"),
    "norm_topk_prob": ({"family": "qwen3_moe"}, True, "logits"),
    "decoder_sparse_step": ({"family": "qwen3_moe"}, 2, "shapes"),
    "mlp_only_layers": ({"family": "qwen3_moe"}, (0,), "shapes"),
    "router_aux_loss_coef": ({"family": "mixtral"}, 0.5, "gradients"),
    "router_z_loss_coef": ({"family": "mixtral"}, 0.5, "gradients"),
    "seed": ({}, 1, "logits"),
}
LORA = {
    "rank": (4, "shapes"),
    "alpha": (32.0, "logits"),
    "dropout": (0.5, "loss"),
    "target_modules": (("q_proj",), "shapes"),
    "target_parameters": (("experts.down_proj",), ""),
    "exclude_modules": (("q_proj",), "shapes"),
    "layers_to_transform": ((0,), "shapes"),
    "layers_pattern": (("blocks",), ""),
    "rank_pattern": (("q_proj=2",), "shapes"),
    "alpha_pattern": (("q_proj=2",), "logits"),
    "bias": ("all", "shapes"),
    "modules_to_save": (("norm",), "shapes"),
    "ensure_weight_tying": (True, "shapes"),
    "use_rslora": (True, "logits"),
    "use_dora": (True, "shapes"),
    "seed": (1, "logits"),
}


BEFORE = {}  # what runs gave that several fields are held against


def test_the_tables_have_every_field():
    tables = {"training": TRAINING, "early_stopping": EARLY, "model": MODEL, "lora": LORA}
    for section, table in tables.items():
        assert set(table) == {option.name for option in fields_of(SECTIONS[section])} - set(LEFT), section


@pytest.mark.parametrize("name", LEFT)
def test_fields_that_are_refused(name):
    with pytest.raises(ConfigError, match=name):
        LlmTrainingConfig(**{name: LEFT[name]})


@pytest.fixture(autouse=True)
def one_thread():
    """Run with one thread: what is compared does not depend on their number."""
    before = numba.get_num_threads()
    numba.set_num_threads(1)
    yield
    numba.set_num_threads(before)


@pytest.fixture
def trained(make_model, make_config, data, record, tmp_path, monkeypatch):
    """Return a function that trains, and gives what may differ by name."""
    called = []

    class Stub:
        def __init__(self, *arguments, **settings):
            called.append((arguments, settings))
            self.summary = {}

        def __getattr__(self, name):
            return lambda *arguments, **settings: None

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=Stub))
    monkeypatch.setitem(sys.modules, "tensorboardX", types.SimpleNamespace(SummaryWriter=Stub))

    def train(where, beside, aspect="losses"):
        monkeypatch.chdir(where)
        called.clear()
        model, sink = make_model(), record()
        config = make_config().replace(**beside)
        trainer = LlamaTrainer(model, config, [sink])
        if aspect == "broken":
            model.weights["layers.0.w_q"][0, 0] = np.nan
        error = ""
        try:
            trainer.fit(data, data if config.eval_interval else None)
        except NonFiniteError as problem:
            error = str(problem)
        steps = sink.of("step")
        return {
            "steps": trainer.state.global_step,
            "losses": trainer.loss_history,
            "rates": [event.learning_rate for event in steps],
            "weights": model.collect_weights().tobytes(),
            "logged": [event.step for event in steps if event.logged],
            "evaluated": [event.step for event in sink.of("evaluation")],
            "saved": sorted(path.name for path in where.glob("saved/llm_step_*")),
            "files": sorted(str(path.relative_to(where)) for path in where.rglob("metrics.jsonl")),
            "gguf": {path.name: path.read_bytes() for path in where.glob("*.gguf")},
            "wandb": [settings for arguments, settings in called if "project" in settings],
            "tensorboard": len(called),
            "threads": numba.get_num_threads(),
            "scale": trainer.scaler.get_scale(),
            "broken": error,
            "broken_scale": error,
        }

    return train


@pytest.mark.parametrize("name", TRAINING)
def test_training(trained, tmp_path, name):
    beside, value, aspect = TRAINING[name]
    places = tmp_path / "one", tmp_path / "two"
    for place in places:
        place.mkdir()
    key = (str(beside), aspect == "broken")
    one = BEFORE.setdefault(key, None) or trained(places[0], beside, aspect)
    BEFORE[key], one = one, one[aspect]
    two = trained(places[1], {**beside, name: value}, aspect)[aspect]
    assert one != two


@pytest.mark.parametrize("kind", ["adamw", "adam", "sgd"])
def test_each_setting_of_the_optimizer_has_its_place(make_model, make_config, rng, kind):
    """Two updates are those of the formulas in float64, with values of which no two are alike."""
    own = {"momentum": 0.6, "nesterov": True} if kind == "sgd" else {"beta1": 0.7, "beta2": 0.8, "epsilon": 0.01}
    parameters = make_model().parameters
    optimizer = Optimizer(parameters, make_config(optimizer=kind, weight_decay=0.3, **own))
    formula = {"adamw": adamw_ref, "adam": adam_ref, "sgd": sgd_ref}[kind]
    decay = np.concatenate([np.full(entry.size, "norm" not in entry.name) for entry in parameters.table])
    w, *moments = parameters.weights_flat.astype(np.float64), *np.zeros((1 if kind == "sgd" else 2, decay.size))
    for step in (1, 2):
        g = rng.standard_normal(decay.size)
        parameters.gradients_flat[:] = g
        optimizer.update(0.5, 0.05)
        rest = (True, 0.5) if kind == "sgd" else (step, 0.5)
        settings = (0.6, 0.3) if kind == "sgd" else (0.7, 0.8, 0.01, 0.3)
        w, *moments = formula(w, *moments, g, decay, 0.05, *settings, *rest)
    np.testing.assert_allclose(parameters.weights_flat, w, rtol=1e-5, atol=1e-6)


def test_muon_takes_hidden_matrices_and_adamw_the_rest(make_model, make_config, rng):
    """Two updates are those of the two formulas in float64; v is kept for the rest alone."""
    parameters = make_model(tie_embeddings=False).parameters
    own = {"muon_momentum": 0.7, "muon_nesterov": False, "muon_steps": 3, "muon_rate": 2.0, "muon_scale": "original"}
    shared = {"beta1": 0.6, "beta2": 0.8, "epsilon": 0.01, "weight_decay": 0.3}
    optimizer = Optimizer(parameters, make_config(optimizer="muon", **own, **shared))
    before = {name: w.astype(np.float64) for name, w in parameters.weights.items()}
    state = {name: (w, np.zeros_like(w), np.zeros_like(w)) for name, w in before.items()}
    taken = {name for name in before if ".w_" in name}
    assert {entry.name for entry in optimizer.matrices} == taken
    rest = sum(w.size for name, w in before.items() if name not in taken)
    assert {name: each.size for name, each in optimizer.moments.items()} == {"m": parameters.size, "v": rest}
    for step in (1, 2):
        for name, (w, m, v) in state.items():
            g = rng.standard_normal(w.shape)
            parameters.gradients[name] = g
            if name in taken:
                ratio = max(1, w.shape[0] / w.shape[1]) ** 0.5
                state[name] = *muon_ref(w, m, g, 0.1, ratio, 0.7, False, 0.3, 3, 0.5), v
            else:
                state[name] = adamw_ref(w, m, v, g, float(w.ndim > 1), 0.05, 0.6, 0.8, 0.01, 0.3, step, 0.5)
        optimizer.update(0.5, 0.05)
    v = parameters.weights_flat * 0
    for entry in parameters.table:
        w, m, v[entry.slice] = state[entry.name][0], state[entry.name][1], state[entry.name][2].ravel()
        np.testing.assert_allclose(parameters.weights[entry.name], w, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(optimizer.flat("m")[entry.slice], m.ravel(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(optimizer.flat("v"), v, rtol=1e-4, atol=1e-5)
    moments = optimizer.copy_moments()
    optimizer.load_flat({name: optimizer.flat(name) for name in moments}, 2)
    assert all(np.array_equal(moments[name], optimizer.moments[name]) for name in moments)


def test_muon_takes_a_stack_of_matrices_one_by_one(make_config, rng):
    shape = (3, 4, 6)
    table = (
        Tensor("experts", (), "", shape, 0, True, hidden=True),
        Tensor("norm", (), "", (5,), 72, False),
        Tensor("router", (), "", (2, 2), 77, True),
    )
    parameters = Buffers(table)
    parameters.weights_flat[:], parameters.gradients_flat[:] = rng.standard_normal((2, 81))
    w, g = parameters.weights["experts"].copy(), parameters.gradients["experts"].copy()
    optimizer = Optimizer(parameters, make_config(optimizer="muon", weight_decay=0.0))
    optimizer.update(1.0, 0.1)
    assert optimizer.moments["v"].size == 9
    for i in range(3):
        expected, _ = muon_ref(w[i], 0 * w[i], g[i], 0.1, 0.2 * 6**0.5, 0.95, True, 0.0, 5, 1.0)
        np.testing.assert_allclose(parameters.weights["experts"][i], expected, rtol=1e-4, atol=1e-5)


def test_muon_is_refused_where_no_hidden_matrix_is_trained(make_model, make_config):
    lora = LoraModel(make_model(), LoraConfig(rank=2))
    with pytest.raises(ConfigError, match=r"optimizer \(muon\) is for hidden matrices, of which this model"):
        LlamaTrainer(lora, make_config(optimizer="muon"))


@pytest.mark.parametrize("name", EARLY)
def test_early_stopping(make_model, make_config, data, name):
    """The validation data are other than those that are trained on: their loss soon rises. For min_delta it falls."""
    other = data if name == "min_delta" else np.random.default_rng(1).integers(0, 19, 60)

    def run(**changes):
        config = make_config(epochs=12, learning_rate=3e-2, eval_interval=1, grad_accum_steps=2)
        trainer = LlamaTrainer(make_model(), config)
        settings = {"patience": 4, "min_delta": 0.01, **changes}
        trainer.fit(data, other, EarlyStoppingConfig(**(settings if changes.get("enabled", True) else changes)))
        return {"steps": trainer.state.global_step, "best_metric": trainer.state.best_metric}

    value, aspect = EARLY[name]
    assert run()[aspect] != run(**{name: value})[aspect]
    if name == "monitor_loss":
        assert run(monitor_loss=False)["best_metric"] == pytest.approx(np.exp(run()["best_metric"]), rel=0.05)


def facts(config):
    model = TrainableModel(config)
    ids = np.arange(12).reshape(1, 12) % 19
    try:
        logits, longest = model.forward(ids).tobytes(), 12
    except ValueError:
        logits, longest = b"", 8
    model.compute_loss(ids[:, :8], ids[:, :8], backward=True)
    return {
        "shapes": {name: view.shape for name, view in model.weights.items()},
        "logits": logits,
        "gradients": model.parameters.gradients_flat.tobytes(),
        "longest": longest,
        "memory": memory_plan(config, 2, 8),
    }


@pytest.mark.parametrize("name", MODEL)
def test_model(name):
    beside, value, aspect = MODEL[name]
    config = TrainableModelConfig(**{**SHAPE, "max_seq_len": 16, **beside})
    assert facts(config)[aspect] != facts(config.replace(**{name: value}))[aspect]


def adapted(config):
    shape = {**SHAPE, "num_layers": 2, "family": "qwen2", "tie_embeddings": True}
    model = LoraModel(TrainableModel(TrainableModelConfig(**shape, max_seq_len=16)), config)
    for view in model.parameters.weights.values():
        if not view.any():  # B begins at zero
            view.fill(0.05)
    ids = np.arange(12).reshape(1, 12) % 19
    loss = model.compute_loss(ids, ids, backward=True).loss
    shapes = {name: view.shape for name, view in model.parameters.weights.items()}
    return {"shapes": shapes, "logits": model.forward(ids).tolist(), "loss": loss}


@pytest.mark.parametrize("name", LORA)
def test_lora(name):
    value, aspect = LORA[name]
    if name == "layers_pattern":  # that of no model here
        with pytest.raises(ConfigError, match="stands before no block's number"):
            adapted(LoraConfig(layers_to_transform=(0,), layers_pattern=value))
        return
    if name == "target_parameters":  # of models with experts: tests/model/test_expert_adapters.py
        with pytest.raises(ConfigError, match="it has no experts"):
            adapted(LoraConfig(target_parameters=value))
        return
    if name == "ensure_weight_tying":
        saved = {"modules_to_save": ("embed_tokens", "lm_head")}
        assert "output_proj" in adapted(LoraConfig(**saved))["shapes"]
        assert "output_proj" not in adapted(LoraConfig(**saved, ensure_weight_tying=True))["shapes"]
        return
    assert adapted(LoraConfig())[aspect] != adapted(LoraConfig(**{name: value}))[aspect]
    if name == "use_rslora":  # alpha / sqrt(rank) is what a larger alpha gives over rank
        wanted = adapted(LoraConfig(rank=4, alpha=16.0))["logits"]
        assert adapted(LoraConfig(rank=4, alpha=8.0, use_rslora=True))["logits"] == wanted
