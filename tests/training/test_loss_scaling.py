"""fp16's loss scale: the scaler alone, in the trainer, and through a checkpoint; conversions to and from halves."""

import dataclasses
import json
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import abi_py as abi
from abi_py.config import Precision
from abi_py.errors import CheckpointError, ConfigError, NonFiniteError
from abi_py.training.metrics import JsonlSink
from abi_py.training.precision import gradient_factor, scaler_for
from abi_py.training.state import ADDED, TrainingState
from abi_py.training.trainer import LlamaTrainer

HALVES = np.arange(65536, dtype=np.uint16).view(np.float16)


# -- conversions -------------------------------------------------------------------------------


def value_of(pattern):
    """Return the number that 16 bits of a finite half mean, from the definition in IEEE 754."""
    sign, exponent, fraction = pattern >> 15, pattern >> 10 & 31, pattern & 1023
    size = Fraction(1024 + fraction if exponent else fraction) * Fraction(2) ** (max(exponent, 1) - 25)
    return -size if sign else size


def test_every_half_as_float32():
    wide = abi.fp16_to_fp32(HALVES)
    assert wide.dtype == np.float32
    for pattern in range(65536):
        if pattern >> 10 & 31 < 31:
            assert Fraction(float(wide[pattern])) == value_of(pattern)
        elif pattern & 1023:
            assert np.isnan(wide[pattern])
        else:
            assert wide[pattern] == (-np.inf if pattern >> 15 else np.inf)
    known = ~np.isnan(wide)
    assert abi.fp32_to_fp16(wide)[known].tobytes() == HALVES[known].tobytes()
    assert np.isnan(abi.fp32_to_fp16(wide)[~known]).all()


@given(st.integers(0, 31 * 1024 - 2), st.sampled_from([-1, 0, 1]), st.booleans())
def test_ties_go_to_the_even_half(pattern, beside, negative):
    """Half-way between two neighbours, and one float32 to either side of it."""
    low, high = value_of(pattern), value_of(pattern + 1)
    middle = np.float32(float((low + high) / 2))  # exact: 12 bits
    x = middle if beside == 0 else np.nextafter(middle, np.float32(np.inf * beside))
    even = pattern + (pattern & 1) if beside == 0 else pattern + (beside > 0)
    rounded = abi.fp32_to_fp16(np.array([-x if negative else x], np.float32))
    assert rounded.view(np.uint16)[0] == even + (0x8000 if negative else 0)


@pytest.mark.parametrize(
    ("x", "wanted"),
    [(65519.996, 65504.0), (65520.0, np.inf), (-1e30, -np.inf), (2.0**-25, 0.0), (2.0**-25 * 1.001, 2.0**-24)],
)
def test_ends_of_the_range(x, wanted):
    assert abi.fp32_to_fp16(np.array([x], np.float32))[0] == wanted


def test_conversions_take_one_dtype_each():
    with pytest.raises(TypeError, match=r"x \(float64\) must be a float32 array"):
        abi.fp32_to_fp16(np.zeros(2))
    with pytest.raises(TypeError, match=r"x \(float32\) must be a float16 array"):
        abi.fp16_to_fp32(np.zeros(2, np.float32))
    with pytest.raises(TypeError, match=r"x \(list\)"):
        abi.fp32_to_fp16([1.0])


# -- the scaler --------------------------------------------------------------------------------


def make_scaler(**changes):
    return abi.LossScaler(abi.MixedPrecisionConfig(**{"enabled": True, "initial_scale": 1024.0, **changes}))


def test_defaults_are_the_abis():
    wanted = {"enabled": False, "initial_scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5}
    wanted |= {"min_scale": 1.0, "max_scale": 2.0**31, "growth_interval": 2000}
    assert abi.MixedPrecisionConfig().to_dict() == wanted


def test_halves_are_divided_by_a_scale_whose_inverse_is_no_half():
    scaler = make_scaler(initial_scale=2.0**30)
    gradients = np.array([1024, -2048], np.float16)
    assert scaler.unscale_gradients(gradients)
    assert gradients.tolist() == [2.0**-20, -(2.0**-19)]


def test_scale_and_unscale():
    scaler = make_scaler()
    assert scaler.scale_loss(1.0) == 1024.0
    gradients = np.array([[1024.0, 2048.0], [-512.0, 0.0]], np.float32)
    assert scaler.unscale_gradients(gradients)
    np.testing.assert_array_equal(gradients, [[1.0, 2.0], [-0.5, 0.0]])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_overflow_halves_the_scale_and_clears_the_gradients(bad):
    scaler, gradients = make_scaler(), np.array([1.0, bad, 2.0], np.float32)
    valid = scaler.unscale_gradients(gradients)
    assert not valid
    np.testing.assert_array_equal(gradients, 0)
    scaler.update(valid)
    assert scaler.get_scale() == 512.0
    assert scaler.get_stats() == abi.LossScalerStats(current_scale=512.0, overflow_count=1, steps_since_overflow=0)


def test_growth_and_limits():
    scaler = make_scaler(growth_interval=3, min_scale=512.0, max_scale=2048.0)
    scales = []
    for valid in (True, True, False, True, True, True, True, True, True, True, True, True, False, False, False):
        scaler.update(valid)
        scales.append(scaler.get_scale())
    assert scales == [1024] * 2 + [512] * 3 + [1024] * 3 + [2048] * 4 + [1024] + [512] * 2
    assert scaler.get_stats().overflow_count == 4


def test_disabled_it_changes_nothing():
    scaler, gradients = abi.LossScaler(abi.MixedPrecisionConfig()), np.array([1.0, np.inf])
    assert scaler.scale_loss(3.0) == 3.0
    assert scaler.unscale_gradients(gradients)
    scaler.update(False)
    np.testing.assert_array_equal(gradients, [1.0, np.inf])
    assert scaler.get_stats() == abi.LossScalerStats(current_scale=1.0, overflow_count=0, steps_since_overflow=0)


def test_gradients_must_be_an_array_of_floats():
    for wrong in ([1.0], np.arange(3)):
        with pytest.raises(TypeError, match="must be an array of floats"):
            make_scaler().unscale_gradients(wrong)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"initial_scale": 1000}, r"initial_scale \(1000\.0\) must be a power of two.*try 1024"),
        ({"initial_scale": float("inf")}, "initial_scale"),
        ({"growth_factor": 1}, r"growth_factor \(1\.0\) must be above 1"),
        ({"backoff_factor": 2}, r"backoff_factor \(2\.0\) must be below 1"),
        ({"backoff_factor": 0}, "backoff_factor"),
        ({"growth_interval": 0}, "growth_interval"),
        ({"min_scale": 2.0**17}, r"initial_scale \(65536\.0\) must be between min_scale \(131072\)"),
        ({"max_scale": 2.0**32}, "max_scale"),
    ],
)
def test_bad_settings(values, message):
    with pytest.raises(ConfigError, match=message):
        abi.MixedPrecisionConfig(**values)


# -- in the model and the trainer --------------------------------------------------------------


def in_float32(model, overflow=lambda call, scale: False):
    """Compute fp16's batches in float32; a batch for which overflow(its number, loss_scale) holds has an infinity."""
    original, calls = model.compute_loss, iter(range(10**6))

    def compute_loss(*args, **kwargs):
        out = original(*args, **{**kwargs, "precision": Precision.FP32})
        if kwargs.get("backward") and overflow(next(calls), kwargs["loss_scale"]):
            model.gradients["layers.1.w_up"][0, 0] = np.inf
        return out

    model.compute_loss = compute_loss
    return model


def test_loss_scale_multiplies_gradients_and_not_losses(make_model, rng):
    model = make_model()
    ids, labels = rng.integers(0, 19, (2, 2, 7))
    for reduction in ("mean", "sum"):
        model.zero_gradients()
        plain = model.compute_loss(ids, labels, backward=True, reduction=reduction)
        gradients = model.parameters.gradients_flat.copy()
        model.zero_gradients()
        scaled = model.compute_loss(ids, labels, backward=True, reduction=reduction, loss_scale=2.0**10)
        assert (scaled.loss, scaled.loss_sum) == (plain.loss, plain.loss_sum)
        np.testing.assert_array_equal(model.parameters.gradients_flat, gradients * np.float32(2**10))
    for wrong in (0.0, -1.0, np.inf, np.nan):
        with pytest.raises(ValueError, match="loss_scale"):
            model.compute_loss(ids, labels, loss_scale=wrong)


def test_scaling_by_powers_of_two_changes_no_bit(make_model, make_config, data):
    """With float32 products, a run with a loss scale, growing on the way, is the run without."""
    plain = LlamaTrainer(make_model(), make_config(max_grad_norm=0.05))
    plain.fit(data)
    config = make_config(max_grad_norm=0.05, mixed_precision="fp16", loss_scale_growth_interval=2)
    scaled = LlamaTrainer(in_float32(make_model()), config.replace(initial_loss_scale=256))
    report = scaled.fit(data)
    assert scaled.scaler.get_scale() == 2048  # six updates
    assert scaled.loss_history == plain.loss_history
    assert scaled.state.grad_norm == plain.state.grad_norm
    assert scaled.model.collect_weights().tobytes() == plain.model.collect_weights().tobytes()
    assert report.overflows == report.skipped_updates == 0


def test_an_overflow_drops_the_window_and_halves_the_scale(make_model, make_config, data, record):
    sink, model = record(), make_model()
    scales = []

    def overflow(call, scale):
        scales.append(scale)
        return call == 1

    config = make_config(mixed_precision="fp16", epochs=1, max_bad_steps=1, max_steps=2)
    trainer = LlamaTrainer(in_float32(model, overflow), config, [sink])
    before = model.collect_weights()
    for batch in data.batches(2, 8, False, 0, False):
        metrics = trainer.train_step_with_metrics(batch.input_ids, batch.labels)
        if metrics.skipped:
            np.testing.assert_array_equal(model.collect_weights(), before)
            assert not metrics.updated
        assert metrics.loss_scale == trainer.scaler.get_scale()
    # Windows of three, between which alone it changes; a full micro-batch has 16 labels.
    assert scales == [65536 / 16] * 3 + [32768 / 16] * 5
    (event,) = sink.of("loss_scale")
    assert (event.previous, event.loss_scale, event.overflow, event.step) == (65536.0, 32768.0, True, 0)
    assert "layers.1.w_up" in event.message
    assert sink.of("bad_step") == []
    assert [event.loss_scale for event in sink.of("step")] == [32768.0]
    assert (trainer.state.overflow_count, trainer.state.bad_steps, trainer.state.global_step) == (1, 0, 1)
    assert trainer.get_report().overflows == 1


def test_a_scale_that_is_too_large_comes_down_by_itself(make_model, make_config, data):
    model = in_float32(make_model(), lambda call, scale: scale > 64)
    config = make_config(mixed_precision="fp16", grad_accum_steps=1, max_bad_steps=2, initial_loss_scale=2.0**20)
    trainer = LlamaTrainer(model, config)
    report = trainer.fit(data)
    assert (report.overflows, report.skipped_updates, report.total_steps) == (10, 0, 6)
    assert trainer.scaler.get_scale() == 64 * 16
    assert np.isfinite(model.collect_weights()).all()


def test_overflows_at_the_smallest_scale_are_bad_steps(make_model, make_config, data, record):
    sink, model = record(), in_float32(make_model(), lambda call, scale: True)
    config = make_config(mixed_precision="fp16", grad_accum_steps=1, max_bad_steps=3, initial_loss_scale=4)
    with pytest.raises(NonFiniteError, match=r"3 updates in a row.*or with mixed_precision bf16"):
        LlamaTrainer(model, config, [sink]).fit(data)
    assert [event.loss_scale for event in sink.of("loss_scale")] == [2.0, 1.0]
    assert [event.in_row for event in sink.of("bad_step")] == [1, 2, 3]


def test_growth_is_an_event_and_the_log_shows_the_scale(make_model, make_config, data, record, tmp_path):
    sink = record()
    config = make_config(mixed_precision="fp16", loss_scale_growth_interval=4)
    file = tmp_path / "metrics.jsonl"
    LlamaTrainer(in_float32(make_model()), config, [sink, JsonlSink(file)]).fit(data)
    (event,) = sink.of("loss_scale")
    assert (event.previous, event.loss_scale, event.overflow, event.step) == (65536.0, 131072.0, False, 4)
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert [r["loss_scale"] for r in records if r["type"] == "step"] == [65536.0] * 3 + [131072.0] * 3
    LlamaTrainer(make_model(), make_config(), [JsonlSink(tmp_path / "plain.jsonl")]).fit(data)
    assert "loss_scale" not in (tmp_path / "plain.jsonl").read_text()


# -- through a checkpoint ----------------------------------------------------------------------


def test_the_state_of_the_scaler_is_saved(make_model, make_config, tmp_path):
    """Fourteen micro-batches in windows of two, the second window overflows; once with a resume before each."""
    rows = np.random.default_rng(4).integers(0, 19, (14, 2, 9))
    scaling = {"mixed_precision": "fp16", "loss_scale_growth_interval": 2}
    config = make_config(grad_accum_steps=2, checkpoint_path=str(tmp_path), **scaling)
    trainers = []
    for restarted in (False, True):
        number = [0]

        def make(number=number):
            return LlamaTrainer(in_float32(make_model(), lambda call, scale: number[0] == 3), config)

        trainer = make()
        for index, row in enumerate(rows):
            number[0] = index
            if restarted and index:
                trainer.save_checkpoint()
                trainer = make()
                trainer.load_checkpoint(tmp_path)
            trainer.train_step(row[:, :-1], row[:, 1:])
        trainers.append(trainer)
    whole, parts = trainers
    assert parts.model.collect_weights().tobytes() == whole.model.collect_weights().tobytes()
    assert parts.scaler.get_stats() == whole.scaler.get_stats()
    assert whole.scaler.get_stats() == abi.LossScalerStats(
        current_scale=131072.0, overflow_count=1, steps_since_overflow=1
    )
    assert parts.loss_history == whole.loss_history


@pytest.mark.parametrize(("first", "second"), [("fp16", "fp32"), ("fp32", "fp16")])
def test_an_open_window_keeps_its_factor_in_another_format(make_model, make_config, tmp_path, first, second):
    rows = np.random.default_rng(4).integers(0, 19, (6, 2, 9))
    config = make_config(checkpoint_path=str(tmp_path))
    plain = LlamaTrainer(make_model(), config)
    mixed = LlamaTrainer(in_float32(make_model()), config.replace(mixed_precision=first))
    for index, row in enumerate(rows):
        plain.train_step(row[:, :-1], row[:, 1:])
        if index == 1:  # inside the window of three
            mixed.save_checkpoint()
            mixed = LlamaTrainer(in_float32(make_model()), config.replace(mixed_precision=second))
            mixed.load_checkpoint(tmp_path)
        mixed.train_step(row[:, :-1], row[:, 1:])
    assert mixed.state.global_step == 2
    assert mixed.model.collect_weights().tobytes() == plain.model.collect_weights().tobytes()


def test_a_stored_scale_is_brought_within_new_limits(make_model, make_config, tmp_path):
    config = make_config(mixed_precision="fp16", checkpoint_path=str(tmp_path), grad_accum_steps=1)
    row = np.random.default_rng(4).integers(0, 19, (2, 9))
    first = LlamaTrainer(in_float32(make_model()), config)
    first.train_step(row[:, :-1], row[:, 1:])
    first.save_checkpoint()
    second = LlamaTrainer(make_model(), config.replace(max_loss_scale=1024, initial_loss_scale=16))
    second.load_checkpoint(tmp_path)
    assert second.scaler.get_scale() == 1024


def test_checkpoints_from_before_loss_scaling_load():
    values = TrainingState(global_step=3).to_dict()
    old = {name: value for name, value in values.items() if name not in ADDED}
    assert len(old) == len(values) - len(ADDED)  # every one of them is a field
    assert TrainingState.from_dict(old) == TrainingState(global_step=3)
    with pytest.raises(CheckpointError, match="epoch"):
        TrainingState.from_dict({name: value for name, value in old.items() if name != "epoch"})
    scaled = dataclasses.replace(TrainingState(), loss_scale=512.0, overflow_count=3, window_scale=1024.0)
    assert TrainingState.from_dict(json.loads(json.dumps(scaled.to_dict()))) == scaled


# -- the configuration -------------------------------------------------------------------------


def test_a_training_begins_as_the_scaler_of_the_abi(make_config):
    config = make_config(mixed_precision="fp16")
    assert scaler_for(config).config == abi.MixedPrecisionConfig(enabled=True)
    assert not scaler_for(config.replace(mixed_precision="bf16")).config.enabled


@pytest.mark.parametrize(("rows", "length", "n"), [(2, 8, 16), (3, 8, 16), (4, 512, 2048), (1, 1, 1)])
def test_factor_of_summed_losses_is_a_power_of_two(make_config, rows, length, n):
    config = make_config(mixed_precision="fp16", batch_size=rows, max_seq_len=length)
    assert gradient_factor(scaler_for(config), config) == 65536 / n
    config = config.replace(mixed_precision="fp32")
    assert gradient_factor(scaler_for(config), config) == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"initial_loss_scale": 1024}, r"initial_loss_scale \(1024\.0\) acts only with mixed_precision fp16"),
        ({"mixed_precision": "bf16", "loss_scale_growth_interval": 5}, "acts only with mixed_precision fp16"),
        ({"mixed_precision": "fp16", "initial_loss_scale": 1000}, "power of two"),
        ({"mixed_precision": "fp16", "max_loss_scale": 1024}, r"initial_loss_scale \(65536\.0\) must be between"),
        ({"mixed_precision": "fp16", "loss_scale_backoff_factor": 1}, "loss_scale_backoff_factor"),
        ({"mixed_precision": "fp16", "nan_guard": False}, r"nan_guard \(False\) must be true for fp16"),
    ],
)
def test_settings_of_a_training(make_config, values, message):
    with pytest.raises(ConfigError, match=message):
        make_config(**values)
