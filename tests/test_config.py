"""Configuration: types, rules, messages, YAML."""

import dataclasses
import importlib
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abi_py import config as module
from abi_py.config import (
    SECTIONS,
    CheckpointingStrategy,
    Config,
    EarlyStoppingConfig,
    LlmTrainingConfig,
    OptimizerType,
    TrainableModelConfig,
    fields_of,
    load_yaml,
    to_yaml,
)
from abi_py.errors import AbiError, ConfigError

SHAPE = {"hidden_dim": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "intermediate_dim": 128}
SHAPE["vocab_size"] = 256

ABI_DEFAULTS = {
    "epochs": 10, "batch_size": 4, "max_seq_len": 512, "learning_rate": 1e-5, "lr_schedule": "warmup_cosine",
    "warmup_steps": 100, "decay_steps": 10000, "min_learning_rate": 1e-7, "grad_accum_steps": 8, "max_grad_norm": 1.0,
    "weight_decay": 0.01, "optimizer": "adamw", "label_smoothing": 0.0, "checkpoint_interval": 1000,
    "checkpoint_path": None, "max_checkpoints": 3, "log_interval": 10, "eval_interval": 500, "log_dir": None,
    "mixed_precision": "fp32", "enable_tensorboard": False, "enable_wandb": False, "enable_metrics_stream": False,
    "wandb_project": None, "wandb_run_name": None, "wandb_entity": None, "export_gguf_path": None,
    "export_name": "abi-llama", "use_gpu": False, "gpu_backend": None, "gpu_batch_threshold": 8,
    "gpu_device_buffer_mb": 256,
}  # fmt: skip


def model(**changes):
    return TrainableModelConfig(**{**SHAPE, **changes})


def test_abi_defaults():
    values = LlmTrainingConfig().to_dict()
    assert {name: values[name] for name in ABI_DEFAULTS} == ABI_DEFAULTS
    assert EarlyStoppingConfig().to_dict() == {"patience": 3, "min_delta": 0.001, "monitor_loss": True, "enabled": True}
    defaults = model().to_dict()
    assert (defaults["max_seq_len"], defaults["rope_theta"], defaults["norm_eps"]) == (2048, 1e4, 1e-5)
    assert (defaults["tie_embeddings"], defaults["checkpointing"], defaults["checkpoint_interval"]) == (True, "none", 4)


def test_every_field_has_a_help_text():
    for cls in SECTIONS.values():
        for option in fields_of(cls):
            assert option.help, option.name
            assert option.type in (bool, int, float, str) or option.choices or issubclass(option.type, Config)


def test_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        LlmTrainingConfig().epochs = 3
    with pytest.raises(TypeError):
        LlmTrainingConfig(3)
    assert LlmTrainingConfig().replace(epochs=3).epochs == 3
    assert hash(model()) == hash(model())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_dim": 100, "num_heads": 8}, r"hidden_dim \(100\) must be a multiple of num_heads \(8\); try 96 or"),
        ({"num_kv_heads": 3}, r"num_kv_heads \(3\) must divide num_heads \(4\); try 1, 2 or 4"),
        ({"hidden_dim": 12}, r"head_dim \(3\) must be even"),
        ({"head_dim": 7}, r"head_dim \(7\) must be even"),
        ({"vocab_size": 0}, r"vocab_size \(0\) must be at least 1"),
        ({"vocab_size": 2**31}, "at most"),
        ({"norm_eps": 0}, "norm_eps"),
        ({"rope_theta": float("nan")}, "rope_theta"),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 1e5}},
            r"factor \(100000\) must be at most max_seq_len \(\d+\), .*; lower it, or raise max_seq_len",
        ),
        (
            {"family": "gemma3", "rope_scaling": {"rope_type": "yarn", "factor": 2, "truncate": False}},
            r"truncate \(False\) has no effect in transformers' gemma3",
        ),
        ({"checkpointing": "all"}, "checkpointing"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_models(values, message):
    with pytest.raises(ConfigError, match=message):
        model(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rate": "fast"}, r"learning_rate \('fast'\) must be a number"),
        ({"learning_rate": 0}, r"learning_rate \(0\.0\) must be a positive number"),
        ({"learning_rate": float("inf")}, "learning_rate"),
        ({"learning_rate": float("nan")}, r"learning_rate \(nan\) must be a positive number; try 0\.001"),
        ({"epochs": 0}, r"epochs \(0\) must be at least 1"),
        ({"epochs": 1.5}, r"epochs \(1\.5\) must be a whole number"),
        ({"epochs": True}, "epochs"),
        ({"epochs": 2**63}, r"epochs \(9223372036854775808\) must be between -2\^63 and 2\^63"),
        ({"epochs": "1e300"}, r"epochs \('1e300'\) must be between -2\^63 and 2\^63"),
        ({"epochs": None}, "epochs"),
        ({"batch_size": "many"}, "batch_size"),
        ({"grad_accum_steps": 0}, "grad_accum_steps"),
        ({"max_grad_norm": -1}, "max_grad_norm"),
        ({"label_smoothing": 1}, "label_smoothing"),
        ({"beta2": 1.0}, "beta2"),
        ({"epsilon": 0}, "epsilon"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"lr_schedule": "cosin"}, "did you mean cosine"),
        ({"warmup_steps": 200, "decay_steps": 100}, r"warmup_steps \(200\) must not exceed decay_steps \(100\)"),
        ({"min_learning_rate": 1e-3}, "min_learning_rate"),
        ({"decay_steps": 0, "warmup_steps": 0}, "decay_steps"),
        ({"nesterov": True}, "nesterov"),
        ({"nesterov": True, "optimizer": "sgd", "momentum": 0}, "nesterov"),
        ({"enable_tensorboard": True}, "log_dir"),
        ({"enable_wandb": True}, "log_dir"),
        ({"enable_metrics_stream": True}, "log_dir"),
        ({"use_gpu": True}, "use_gpu.*CPU"),
        ({"gpu_backend": "cuda"}, "gpu_backend"),
        ({"gpu_batch_threshold": 9}, "gpu_batch_threshold"),
        ({"gpu_device_buffer_mb": 1}, "gpu_device_buffer_mb"),
        ({"mixed_precision": "fp8"}, r"mixed_precision \('fp8'\) must be one of fp32, bf16, fp16"),
        ({"mixed_precision": "fp16", "nan_guard": False}, r"nan_guard \(False\) must be true for fp16"),
        ({"initial_loss_scale": 4096}, r"initial_loss_scale \(4096\.0\) acts only with mixed_precision fp16"),
        ({"export_gguf_path": ""}, r"export_gguf_path \(\) must not be empty"),
        ({"shuffle": "yes"}, "shuffle"),
        ({"checkpoint_path": 3}, "checkpoint_path"),
        ({"num_threads": -1}, "num_threads"),
        ({"max_steps": -1}, "max_steps"),
    ],
)
def test_bad_training(values, message):
    with pytest.raises(ConfigError, match=message) as caught:
        LlmTrainingConfig(**values)
    assert isinstance(caught.value, ValueError | AbiError)
    assert "\n" not in str(caught.value)


def test_what_is_converted(tmp_path):
    config = LlmTrainingConfig(
        learning_rate="1e-4",
        decay_steps="1e4",
        epochs=np.int64(3),
        optimizer=OptimizerType.SGD,
        mixed_precision=False,
        checkpoint_path=tmp_path,
    )
    assert config.learning_rate == 1e-4
    assert (config.decay_steps, type(config.decay_steps)) == (10000, int)
    assert (config.epochs, type(config.epochs)) == (3, int)
    assert config.mixed_precision is module.Precision.FP32
    assert config.checkpoint_path == str(tmp_path)
    assert model(checkpointing="full").checkpointing is CheckpointingStrategy.FULL


def test_constant_rate_may_be_below_the_default_minimum():
    assert LlmTrainingConfig(lr_schedule="constant", learning_rate=1e-9).learning_rate == 1e-9


def test_sizes():
    config = model()
    assert (config.resolved_head_dim, config.q_dim, config.kv_dim) == (16, 64, 32)
    wide = model(head_dim=32, hidden_dim=50)
    assert (wide.resolved_head_dim, wide.q_dim, wide.kv_dim) == (32, 128, 64)
    block = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128 + 2 * 64
    assert config.num_params() == 256 * 64 + 2 * block + 64
    assert model(tie_embeddings=False).num_params() == config.num_params() + 256 * 64


def test_unknown_and_missing_keys():
    with pytest.raises(ConfigError, match="'learnin_rate'; did you mean learning_rate"):
        LlmTrainingConfig.from_dict({"learnin_rate": 1})
    with pytest.raises(ConfigError, match="lacks num_layers, vocab_size"):
        TrainableModelConfig.from_dict({k: v for k, v in SHAPE.items() if k not in ("num_layers", "vocab_size")})


texts = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=30)


@given(st.floats(1e-6, 1, exclude_min=True), st.integers(1, 10**9), texts, st.sampled_from(list(OptimizerType)))
@settings(max_examples=60)
def test_yaml_round_trip(tmp_path_factory, rate, epochs, path, optimizer):
    path_of_file = tmp_path_factory.getbasetemp() / "config.yaml"
    training = LlmTrainingConfig(learning_rate=rate, epochs=epochs, checkpoint_path=path, optimizer=optimizer)
    sections = {"model": model(), "training": training, "early_stopping": EarlyStoppingConfig(patience=epochs)}
    path_of_file.write_text(to_yaml(**sections), encoding="utf-8")
    loaded = load_yaml(path_of_file)
    assert {name: SECTIONS[name].from_dict(values) for name, values in loaded.items()} == sections


def test_partial_files_and_exponents(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("training:\n  learning_rate: 1e-4\n  mixed_precision: no\nmodel:\n")
    training = {"learning_rate": 1e-4, "mixed_precision": module.Precision.FP32}
    assert load_yaml(file) == {"training": training, "model": {}}
    file.write_text("")
    assert load_yaml(file) == {}
    assert to_yaml(model=None) == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trainin:\n  epochs: 1\n", "unknown section 'trainin'; did you mean training"),
        ("epochs: 1\n", "unknown section 'epochs'; put it under `training:`"),
        ("training:\n  epoch: 1\n", "section training: unknown key 'epoch'; did you mean epochs"),
        ("training:\n  epochs: 1\n  epochs: 2\n", "line 3: 'epochs' is given twice"),
        ("training:\n  learning_rate: fast\n", r"section training: learning_rate \('fast'\)"),
        ("training: 3\n", "section training must hold"),
        ("- 1\n", "must consist of sections"),
        ("training: [1\n", "is not YAML"),
    ],
)
def test_bad_files(tmp_path, text, message):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_yaml(file)
    assert str(file) in str(caught.value)


def test_a_file_that_is_not_text_is_named(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_bytes(b"training:\n  log_dir: \xff\n")
    with pytest.raises(ConfigError, match=r"c\.yaml is not a text file: byte 21 is not UTF-8"):
        load_yaml(file)


def _refusal(cls, values):
    """Return what a class says against the values, "" if it takes them; all but a ConfigError passes through."""
    try:
        cls.from_dict(values)
    except ConfigError as error:
        return str(error)
    return ""


def _all_configs(cls=Config):
    for each in cls.__subclasses__():
        if each.__module__.startswith("abi_py."):
            yield each
        yield from _all_configs(each)


@pytest.mark.parametrize(
    "wrong",
    [
        *(-1, 0, 1.5, 10**400, 1e308, 1j, True, None, math.nan, math.inf, "", "nan", "1e999", "\0", b"x", int),
        *([], {}, set(), object(), [None], [[]], [math.inf], ["a", 1], {"a": 1}, {1: 2}, {None: 1}),
        *("x" * 100_000, "9" * 5_000),
    ],
    ids=lambda wrong: repr(wrong)[:20],
)
def test_a_wrong_value_of_any_field_is_a_config_error_of_one_short_line(wrong):
    for name in (
        "generation.settings",
        "training.precision",
        "data.tokenizing",
        "data.tokenizer_training",
        "runs.settings",
    ):
        importlib.import_module(f"abi_py.{name}")  # that all classes are there
    classes = set(_all_configs())
    assert len(classes) >= 12
    for cls in classes:
        required = {
            option.name: option.metadata["example"]
            for option in fields_of(cls)
            if option.required and "example" in option.metadata
        }
        required |= {
            option.name: SHAPE[option.name] for option in fields_of(cls) if option.required and option.name in SHAPE
        }
        for option in fields_of(cls):
            message = _refusal(cls, {**required, option.name: wrong})
            assert "\n" not in message, (cls, option.name)
            assert len(message) < 1000, (cls, option.name)
