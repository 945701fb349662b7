"""The whole model: PyTorch's figures, those of the reference, accumulation, packed rows, borders, files and costs."""

import json
import math

import numpy as np
import pytest
from small_models import TINY, make_batch, make_model

from abi_py.config import LlmTrainingConfig, TrainableModelConfig
from abi_py.errors import CheckpointError, DataError
from abi_py.gradcheck import check_close, relative_error
from abi_py.kernels.engine.jit import JIT
from abi_py.kernels.optimizers import adamw_, parameter_chunks
from abi_py.model import LossOutput, TrainableModel, reference
from abi_py.model.layers.run import Run
from abi_py.training.schedule import learning_rate

SHAPES = {
    "grouped heads": {},
    "one key/value head for all": {"num_kv_heads": 1},
    "one for each": {"num_kv_heads": 4},
    "narrow heads": {"head_dim": 6},
    "wide heads": {"head_dim": 20, "num_kv_heads": 1},
    "odd sizes": {"hidden_dim": 21, "num_heads": 3, "num_kv_heads": 3, "head_dim": 2, "intermediate_dim": 13},
    "one of everything": {"num_layers": 1, "num_heads": 1, "num_kv_heads": 1, "intermediate_dim": 1},
    "untied": {"tie_embeddings": False},
    "other theta and eps": {"rope_theta": 300.0, "norm_eps": 1e-2},
}


def gradients_of(model, *arguments, **options):
    """Return a copy of all gradients of one backward, flat."""
    model.zero_gradients()
    model.compute_loss(*arguments, backward=True, **options)
    return model.parameters.gradients_flat.copy()


def from_golden(g, group):
    model = TrainableModel(TrainableModelConfig(**json.loads(str(g["config"]))))
    names = {key.split("/", 1)[1] for key in g if key.startswith(group)}
    assert names == set(model.weights)
    for name in names:
        model.weights[name] = g[f"{group}/{name}"].astype(np.float32)
    return model


# -- PyTorch's figures ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model_tiny", "model_tiny_untied"])
def test_logits_loss_and_every_gradient_equal_pytorch(golden, name):
    g = golden(name)
    model = from_golden(g, "weight")
    check_close(model.forward(g["ids"]), g["logits"], 1e-5)
    result = model.compute_loss(g["ids"], g["labels"], backward=True)
    assert abs(result.loss - g["loss"]) < 1e-5
    assert result.num_tokens == (g["labels"] >= 0).sum()
    for tensor, gradient in model.gradients.items():
        error = relative_error(gradient, g[f"gradient/{tensor}"])
        assert error < 1e-4, f"{tensor} is off by {error:.1e}"


@pytest.mark.skipif(not JIT, reason="slow without compiling; the test above takes the same lines")
def test_twenty_steps_of_training_equal_pytorch(golden):
    """The same losses, norms and weights as AdamW in PyTorch, with clipping, warm-up and cosine."""
    g = golden("trajectory")
    model, options = from_golden(g, "initial"), json.loads(str(g["options"]))
    table, flat = model.parameters.table, model.parameters.weights_flat
    chunks, decay = parameter_chunks([t.offset for t in table], [t.size for t in table], [t.decay for t in table])
    schedule = {name: options[name] for name in ("learning_rate", "min_learning_rate", "warmup_steps", "decay_steps")}
    config = LlmTrainingConfig(**schedule)
    m, v = np.zeros_like(flat), np.zeros_like(flat)
    losses, norms = [], []
    for step, (ids, labels) in enumerate(zip(g["ids"], g["labels"], strict=True)):
        model.zero_gradients()
        losses.append(model.train_step(ids, labels))
        norms.append(model.compute_gradient_norm())
        clip = min(1.0, options["max_grad_norm"] / norms[-1])
        rate = learning_rate(config, step)
        assert abs(rate - g["learning_rates"][step]) < 1e-12
        gradients, decay_rate = model.parameters.gradients_flat, options["weight_decay"]
        betas, eps = options["betas"], options["eps"]
        adamw_(flat, m, v, gradients, chunks, decay, rate, *betas, eps, decay_rate, step + 1, clip)
    assert np.abs(np.array(losses) - g["losses"]).max() < 1e-4
    check_close(norms, g["grad_norms"], 1e-4)
    for name, w in model.weights.items():
        check_close(w, g[f"final/{name}"], 1e-3)  # Adam divides by sqrt(v): where v is tiny, float32 noise grows
    assert losses[-1] < losses[0] - 0.2  # and it learned something


# -- the model in float64 ------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", SHAPES)
def test_loss_and_every_gradient_equal_the_reference(rng, name, smoothing):
    """Element by element; that the reference is right is `test_reference.py`."""
    model = make_model(6.0, **SHAPES[name])
    ids, labels = make_batch(rng, model, 2, 7)
    marks = {"segment_ids": np.array([[0] * 3 + [1] * 4, [5] * 7])} if smoothing else {}
    options = {"label_smoothing": smoothing, "z_loss": 0.3 * smoothing, **marks}
    result = model.compute_loss(ids, labels, backward=True, **options)
    value, gradients = reference.loss_and_gradients(model.layers, model.weights, ids, labels, **options)
    assert abs(result.loss + sum(result.penalties.values()) - value) < 1e-5
    assert list(gradients) == list(model.gradients)
    for tensor, gradient in model.gradients.items():
        check_close(gradient, gradients[tensor], 1e-4, tensor)


def test_z_loss_is_a_matter_of_training(rng):
    """The loss stays the cross-entropy; without backward there is no penalty; 0 leaves every bit as it is."""
    model = make_model(6.0)
    ids, labels = make_batch(rng, model)
    plain = model.compute_loss(ids, labels, backward=True)
    gradients = model.parameters.gradients_flat.copy()
    for z_loss in (0.0, 0.1):
        model.zero_gradients()
        with_z = model.compute_loss(ids, labels, z_loss=z_loss, backward=True)
        assert (with_z.loss, with_z.token_losses.tobytes()) == (plain.loss, plain.token_losses.tobytes())
        assert np.array_equal(model.parameters.gradients_flat, gradients) is (z_loss == 0)
        assert model.compute_loss(ids, labels, z_loss=z_loss).penalties == {}
    logits = model.forward(ids)[labels >= 0].astype(np.float64)
    squares = np.log(np.exp(logits).sum(-1)) ** 2
    assert with_z.penalties == {"z_loss": pytest.approx(0.1 * squares.mean(), rel=1e-5)}
    assert plain.penalties == {}


def summed_gradients(model, ids, labels, **options):
    """Return the gradients of the sum that a pass adds, all in one, and what it says."""
    model.zero_gradients()
    out = model.compute_loss(ids, labels, backward=True, reduction="sum", **options)
    return model.parameters.gradients_flat.copy(), out


@pytest.mark.parametrize("whole", [False, True])
def test_weights_of_labels_are_those_of_their_gradients(rng, whole):
    """The gradient is linear in the weights, in passes by heart too; the loss is without them."""
    model = make_model(6.0)
    ids, labels = make_batch(rng, model, 2, 7)
    labels = np.where(labels < 0, 1, labels) if whole else labels
    kept = [np.where(np.arange(2)[:, None] == row, labels, -100) for row in range(2)]
    (one, _), (two, _) = (summed_gradients(model, ids, each, z_loss=0.1) for each in kept)
    plain, said = summed_gradients(model, ids, labels, z_loss=0.1)
    for first, second in [(1.5, -0.5), (0.0, 2.0), (1.0, 1.0), (-3.0, 0.25)]:
        weights = np.repeat([[first], [second]], 7, axis=1)
        found, out = summed_gradients(model, ids, labels, z_loss=0.1, label_weights=weights)
        check_close(found, first * one + second * two, 1e-5)
        assert (out.loss, out.token_losses.tobytes()) == (said.loss, said.token_losses.tobytes())
        assert np.array_equal(summed_gradients(model, ids, labels, z_loss=0.1)[0], plain)
    logits = model.forward(ids).astype(np.float64)
    squares = np.where(labels >= 0, weights * np.log(np.exp(logits).sum(-1)) ** 2, 0)
    assert out.penalties["z_loss"] == pytest.approx(0.1 * squares.sum() / out.num_tokens, rel=1e-5)
    for wrong in (np.ones((2, 6)), np.full((2, 7), np.nan)):
        with pytest.raises(DataError, match="label_weights"):
            model.compute_loss(ids, labels, label_weights=wrong)


def test_the_gradient_of_preferences(rng):
    """By weights of labels, and from the logits themselves: DPO's (Rafailov et al. 2023, section 4)."""
    model, beta = make_model(6.0), 0.3
    ids, labels = make_batch(rng, model, 4, 7)  # rows 0, 1 are chosen, 2, 3 rejected
    reference_sums = rng.standard_normal(4)
    sums = -model.compute_loss(ids, labels).token_losses.sum(1, dtype=np.float64) - reference_sums
    up = beta / (1 + np.exp(beta * (sums[:2] - sums[2:])))  # minus the derivative of the loss by a chosen row's sum
    found, _ = summed_gradients(model, ids, labels, label_weights=np.repeat(np.r_[up, -up][:, None], 7, 1))
    logits = model.forward(ids).astype(np.float64)
    dlogits = np.exp(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
    np.put_along_axis(dlogits, np.maximum(labels, 0)[..., None], np.take_along_axis(
        dlogits, np.maximum(labels, 0)[..., None], -1) - 1, -1)  # fmt: skip
    dlogits *= np.r_[up, -up][:, None, None] * (labels >= 0)[..., None]
    model.zero_gradients()
    model.forward(ids)
    model.backward(dlogits.astype(np.float32))
    check_close(found, model.parameters.gradients_flat, 1e-4)


def test_a_wrong_gradient_would_be_noticed(rng):
    """The check above fails on a model with 1 % more of one weight."""
    model = make_model(6.0)
    ids, labels = make_batch(rng, model, 2, 7)
    before = gradients_of(model, ids, labels)
    model.weights["layers.1.w_o"][...] *= np.float32(1.01)
    assert relative_error(gradients_of(model, ids, labels), before) > 1e-3


# -- the first loss ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": False},
        {"hidden_dim": 128, "num_layers": 3, "vocab_size": 1009},
        {"hidden_dim": 64, "num_heads": 1, "num_kv_heads": 1, "vocab_size": 11},
        {"hidden_dim": 256, "num_layers": 1, "vocab_size": 2003, "seed": 5},
    ],
)
def test_a_fresh_model_knows_nothing(rng, changes):
    """Its loss is ln V: every token is as likely as any other."""
    model = TrainableModel(TrainableModelConfig(**(TINY | changes)))
    ids, labels = make_batch(rng, model, 8 if JIT else 2, 32)
    loss = model.compute_loss(ids, labels).loss
    assert abs(loss - math.log(model.config.vocab_size)) < 0.1


def test_the_seed_decides_the_weights():
    config = TrainableModelConfig(**TINY)
    one, same, other = (TrainableModel(c) for c in (config, config, config.replace(seed=1)))
    assert np.array_equal(one.collect_weights(), same.collect_weights())
    assert not np.array_equal(one.collect_weights(), other.collect_weights())
    w = one.weights["layers.0.w_gate"]
    assert abs(w.mean()) < 1e-3
    assert abs(w.std() - 0.02) < 1e-3
    assert (one.weights["final_norm"] == 1).all()


# -- gradients that add up -----------------------------------------------------------------------


def test_accumulating_twice_doubles(rng):
    model = make_model(4.0)
    ids, labels = make_batch(rng, model)
    once = gradients_of(model, ids, labels)
    model.compute_loss(ids, labels, backward=True)
    check_close(model.parameters.gradients_flat, 2 * once, 1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_micro_batches_add_up_to_the_batch(rng, tied):
    """With sums instead of means, however unevenly the counted labels lie."""
    model = make_model(4.0, tie_embeddings=tied)
    ids, labels = make_batch(rng, model, 4, 9)
    labels[1, 2:] = -100
    labels[3] = -100
    whole = gradients_of(model, ids, labels, reduction="sum")
    model.zero_gradients()
    parts = [model.compute_loss(ids[i : i + 1], labels[i : i + 1], backward=True, reduction="sum") for i in range(4)]
    check_close(model.parameters.gradients_flat, whole, 1e-5)
    total = model.compute_loss(ids, labels)
    assert sum(part.num_tokens for part in parts) == total.num_tokens
    assert sum(part.num_correct for part in parts) == total.num_correct
    assert abs(sum(part.loss_sum for part in parts) - total.loss_sum) < 1e-4
    mean = gradients_of(model, ids, labels)
    check_close(mean * total.num_tokens, whole, 1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_zeroed_gradients_are_zero_and_then_overwritten(rng, tied):
    model = make_model(4.0, tie_embeddings=tied)
    ids, labels = make_batch(rng, model)
    fresh = gradients_of(model, ids, labels)
    model.parameters.gradients_flat[...] = np.nan  # whatever was there must not come back
    assert gradients_of(model, ids, labels).tobytes() == fresh.tobytes()
    for look in (
        lambda: model.gradients["layers.0.w_q"],
        lambda: model.parameters.gradients_flat,
        lambda: np.array(model.compute_gradient_norm()),
    ):
        model.zero_gradients()
        assert not look().any()
        model.compute_loss(ids, labels, backward=True)
        check_close(model.parameters.gradients_flat, fresh, 1e-6)
    model.zero_gradients()
    model.compute_loss(ids, np.full_like(labels, -100), backward=True)
    assert not model.parameters.gradients_flat.any()  # a batch that says nothing zeroes them, too


@pytest.mark.parametrize("tied", [True, False])
def test_forward_and_backward_equal_the_loss(rng, tied):
    """dlogits of the mean cross-entropy, by hand, through `backward` gives what `compute_loss` gives."""
    model = make_model(4.0, tie_embeddings=tied)
    ids, labels = make_batch(rng, model)
    expected = gradients_of(model, ids, labels)
    logits = model.forward(ids)
    assert logits.shape == (2, 13, 97)
    assert logits.dtype == np.float32
    z = logits.astype(np.float64)
    p = np.exp(z - z.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    counted = labels >= 0
    p[np.nonzero(counted) + (labels[counted],)] -= 1
    dlogits = (p * counted[..., None] / counted.sum()).astype(np.float32)
    model.zero_gradients()
    model.backward(dlogits)
    check_close(model.parameters.gradients_flat, expected, 1e-5)
    model.forward(ids)
    model.backward(dlogits)  # adds
    check_close(model.parameters.gradients_flat, 2 * expected, 1e-5)


def test_backward_needs_its_forward(rng):
    model = make_model()
    ids, labels = make_batch(rng, model)
    dlogits = np.zeros((2, 13, 97), np.float32)
    with pytest.raises(RuntimeError, match=r"call model\.forward"):
        model.backward(dlogits)
    model.forward(ids)
    with pytest.raises(ValueError, match=r"dlogits has shape \(1, 13, 97\); the logits have \(2, 13, 97\)"):
        model.backward(dlogits[:1])
    for wrong, found in ((dlogits.astype(np.float64), "float64"), (dlogits.tolist(), "list")):
        with pytest.raises(TypeError, match=rf"dlogits is {found}; it must be a float32 array"):
            model.backward(wrong)
    model.compute_loss(ids, labels)  # takes the place of the activations
    with pytest.raises(RuntimeError, match=r"call model\.forward"):
        model.backward(dlogits)
    model.forward(ids)
    model.backward(dlogits)
    with pytest.raises(RuntimeError, match=r"call model\.forward"):
        model.backward(dlogits)  # once for each forward


def test_norm_clipping_and_scaling(rng):
    model = make_model(4.0)
    ids, labels = make_batch(rng, model)
    g = gradients_of(model, ids, labels)
    norm = float(np.linalg.norm(g.astype(np.float64)))
    check_close(model.compute_gradient_norm(), norm, 1e-6)
    check_close(model.clip_gradients(10 * norm), norm, 1e-6)
    assert model.parameters.gradients_flat.tobytes() == g.tobytes()  # short enough: left alone
    check_close(model.clip_gradients(norm / 3), norm, 1e-6)
    check_close(model.compute_gradient_norm(), norm / 3, 1e-5)
    check_close(model.parameters.gradients_flat, g / 3, 1e-5)
    model.scale_gradients(-3)
    check_close(model.parameters.gradients_flat, -g, 1e-5)
    assert not model.has_non_finite_gradients()
    for value in (np.nan, np.inf):
        model.gradients["layers.1.w_up"][2, 3] = value
        assert model.has_non_finite_gradients()
        assert not np.isfinite(model.clip_gradients(1.0))


# -- what the result says ------------------------------------------------------------------------


def test_loss_output(rng):
    model = make_model(4.0)
    ids, labels = make_batch(rng, model)
    result = model.compute_loss(ids, labels)
    assert isinstance(result, LossOutput)
    z = model.forward(ids).astype(np.float64)
    losses = np.log(np.exp(z).sum(-1)) - np.take_along_axis(z, np.maximum(labels, 0)[..., None], -1)[..., 0]
    counted = labels >= 0
    check_close(result.token_losses, np.where(counted, losses, 0), 1e-5)
    assert result.token_losses.dtype == np.float32
    assert result.num_tokens == counted.sum()
    assert result.num_correct == (counted & (z.argmax(-1) == labels)).sum()
    check_close(result.loss_sum, losses[counted].sum(), 1e-5)
    check_close(result.loss, losses[counted].mean(), 1e-5)
    kept = result.token_losses.copy()
    model.compute_loss(ids[:, ::-1], labels)
    assert np.array_equal(result.token_losses, kept)  # a later batch does not write into it
    assert model.train_step(ids, labels) == result.loss


def test_no_label_counts(rng):
    model = make_model()
    ids, labels = make_batch(rng, model)
    result = model.compute_loss(ids, np.full_like(labels, -100), backward=True)
    assert (result.loss, result.loss_sum, result.num_tokens, result.num_correct) == (0, 0, 0, 0)
    assert not result.token_losses.any()
    assert not model.parameters.gradients_flat.any()


# -- who sees whom -------------------------------------------------------------------------------


def check_packed(rng, marks, parts, name):
    """A batch with marks must equal its parts, each a row of its own: list of (row, slice)."""
    model = make_model(4.0)
    ids, labels = make_batch(rng, model, *marks.shape)
    if name == "attention_mask":
        labels[marks == 0] = -100
    packed = model.compute_loss(ids, labels, **{name: marks}, backward=True)
    logits, packed_gradient = model.forward(ids, **{name: marks}), model.parameters.gradients_flat.copy()
    model.zero_gradients()
    total, count = 0.0, 0
    for row, part in parts:
        alone, targets = ids[row : row + 1, part], labels[row : row + 1, part]
        result = model.compute_loss(alone, targets, backward=True, reduction="sum")
        total, count = total + result.loss_sum, count + result.num_tokens
        check_close(logits[row, part], model.forward(alone)[0], 1e-5)
    assert count == packed.num_tokens
    assert abs(total / count - packed.loss) < 1e-5
    check_close(packed_gradient * count, model.parameters.gradients_flat, 1e-5)


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.int64])
def test_a_packed_row_equals_sequences_of_their_own(rng, dtype):
    marks = np.array([[0] * 5 + [1] * 1 + [2] * 9, [4] * 15, [7] * 14 + [8]], dtype)
    cuts = [(0, 0, 5), (0, 5, 6), (0, 6, 15), (1, 0, 15), (2, 0, 14), (2, 14, 15)]
    check_packed(rng, marks, [(row, slice(first, last)) for row, first, last in cuts], "segment_ids")


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_changes_nothing(rng, side):
    marks = np.ones((2, 12), np.uint8)
    padding, rest = (slice(8, 12), slice(0, 8)) if side == "right" else (slice(0, 4), slice(4, 12))
    marks[1, padding] = 0
    check_packed(rng, marks, [(0, slice(0, 12)), (1, rest)], "attention_mask")


def test_mask_and_segments_together(rng):
    model = make_model(4.0)
    ids, _ = make_batch(rng, model, 1, 12)
    segments, mask = np.array([[0] * 6 + [1] * 6]), np.array([[1] * 9 + [0] * 3])
    both = model.forward(ids, attention_mask=mask, segment_ids=segments)
    for part in (slice(0, 6), slice(6, 9)):
        check_close(both[:, part], model.forward(ids[:, part]), 1e-5)


def test_a_sample_does_not_see_another_and_no_token_a_later_one(rng):
    model = make_model(4.0)
    ids, _ = make_batch(rng, model, 3, 13)
    before = model.forward(ids)
    other = ids.copy()
    other[1] = (other[1] + 1) % 97
    after = model.forward(other)
    assert before[[0, 2]].tobytes() == after[[0, 2]].tobytes()
    assert (before[1] != after[1]).any(-1).all()
    other = ids.copy()
    other[:, 8:] = (other[:, 8:] + 1) % 97
    after = model.forward(other)
    assert before[:, :8].tobytes() == after[:, :8].tobytes()
    assert (before[:, 8:] != after[:, 8:]).any(-1).all()


# -- ids in many forms, and the borders ----------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64])
def test_ids_of_any_integer_type(rng, dtype):
    model = make_model(4.0)
    ids, _ = make_batch(rng, model)
    labels = rng.integers(0, 97, ids.shape)
    expected = model.compute_loss(ids, labels).loss
    assert model.compute_loss(ids.astype(dtype), labels.astype(dtype)).loss == expected
    assert model.compute_loss(ids.astype(dtype).tolist(), labels.tolist()).loss == expected
    assert model.compute_loss(np.asfortranarray(ids.astype(dtype)), labels).loss == expected


def test_the_label_that_does_not_count_in_any_signed_type_and_in_uint32(rng):
    model = make_model(4.0)
    ids, labels = make_batch(rng, model)
    expected = model.compute_loss(ids, labels)
    assert expected.num_tokens < labels.size
    for same in (labels.astype(np.int64), labels.astype(np.int16), labels.astype(np.int8), labels.view(np.uint32)):
        result = model.compute_loss(ids, same)
        assert (result.loss, result.num_tokens) == (expected.loss, expected.num_tokens)


def test_flat_ids(rng):
    model = make_model(4.0)
    ids, labels = make_batch(rng, model, 1, 20)
    flat = model.compute_loss(ids.ravel().view(np.uint32), labels.ravel().view(np.uint32))
    assert flat.loss == model.compute_loss(ids, labels).loss
    assert flat.token_losses.shape == (1, 20)
    ids, labels = make_batch(rng, model, 3, 32)  # rows of max_seq_len
    assert model.compute_loss(ids.ravel(), labels.ravel()).loss == model.compute_loss(ids, labels).loss
    with pytest.raises(DataError, match="flat with 70 ids, neither at most nor a multiple of max_seq_len"):
        model.forward(np.zeros(70, int))


def test_the_caller_keeps_the_arrays(rng):
    model = make_model(4.0)
    ids, labels = make_batch(rng, model)
    for array in (ids, labels):
        array.setflags(write=False)
    before = ids.copy(), labels.copy()
    model.train_step(ids, labels)
    assert np.array_equal(ids, before[0])
    assert np.array_equal(labels, before[1])


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 32), (5, 31)])
def test_short_and_long_rows(rng, shape):
    model = make_model(4.0)
    ids, labels = make_batch(rng, model, *shape)
    result = model.compute_loss(ids, labels, backward=True)
    assert abs(result.loss - reference.loss_and_gradients(model.layers, model.weights, ids, labels)[0]) < 1e-5
    assert np.isfinite(model.parameters.gradients_flat).all()


WRONG_IDS = [
    (97, np.int32, "97"),
    (-1, np.int32, "-1"),
    (-100, np.int32, "-100"),
    (2**32 - 1, np.uint32, "4294967295"),
    (2**31, np.uint32, "2147483648"),
    (2**40, np.int64, "1099511627776"),
    (2**40 + 5, np.uint64, "1099511627781"),
    (-(2**40), np.int64, "-1099511627776"),
    (200, np.uint8, "200"),
]


@pytest.mark.parametrize(("value", "dtype", "shown"), WRONG_IDS)
def test_an_id_outside_the_vocabulary_is_refused_with_its_place(rng, value, dtype, shown):
    model = make_model()
    ids, labels = make_batch(rng, model)
    wrong = ids.astype(dtype)
    wrong[1, 4] = value
    rule = rf"input_ids\[1, 4\] is {shown}; ids must be 0 \.\.\. 96"
    with pytest.raises(DataError, match=rule):
        model.compute_loss(wrong, labels)
    with pytest.raises(DataError, match=rule):
        model.forward(wrong)
    if value != -100:
        wrong = np.where(labels < 0, 0, labels).astype(dtype)
        wrong[0, 2] = value
        with pytest.raises(DataError, match=rf"labels\[0, 2\] is {shown}; labels must be 0 \.\.\. 96, or -100"):
            model.compute_loss(ids, wrong)


def test_a_refused_batch_leaves_gradients_and_arena_usable(rng):
    model = make_model(4.0)
    ids, labels = make_batch(rng, model)
    expected = gradients_of(model, ids, labels)
    with pytest.raises(DataError):
        model.compute_loss(ids + 90, labels, backward=True)
    assert model.parameters.gradients_flat.tobytes() == expected.tobytes()


def test_wrong_calls_are_refused(rng):
    model = make_model()
    ids, labels = make_batch(rng, model)
    with pytest.raises(TypeError, match="input_ids has dtype float64"):
        model.forward(ids.astype(float))
    with pytest.raises(TypeError, match="labels has dtype bool"):
        model.compute_loss(ids, labels > 0)
    with pytest.raises(DataError, match=r"labels have shape \(2, 12\), input_ids \(2, 13\)"):
        model.compute_loss(ids, labels[:, 1:])
    with pytest.raises(DataError, match="33 ids in a row, but max_seq_len is 32"):
        model.forward(np.zeros((1, 33), int))
    for shape in ((0, 3), (3, 0), (0,), (), (1, 2, 3)):
        with pytest.raises(DataError, match=r"must be \(batch, time\) with at least one id"):
            model.forward(np.zeros(shape, int))
    for name in ("attention_mask", "segment_ids"):
        with pytest.raises(DataError, match=rf"{name} has shape \(2, 12\)"):
            model.forward(ids, **{name: labels[:, 1:]})
        with pytest.raises(DataError, match=rf"{name} has shape \(13, 2\)"):  # as many, but not in this order
            model.forward(ids, **{name: labels.T})
    with pytest.raises(ValueError, match=r"reduction \(max\) must be mean or sum"):
        model.compute_loss(ids, labels, reduction="max")
    for wrong in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match=r"label_smoothing \(.*\) must be at least 0 and below 1"):
            model.compute_loss(ids, labels, label_smoothing=wrong)
    for wrong in (-0.1, math.inf, math.nan):
        with pytest.raises(ValueError, match=r"z_loss \(.*\) must be zero or more"):
            model.compute_loss(ids, labels, z_loss=wrong)


# -- numbers -------------------------------------------------------------------------------------


def test_same_bits_for_any_thread_count(rng, same_bits):
    model = make_model(4.0, max_seq_len=128)
    ids, labels = make_batch(rng, model, 3, 101 if JIT else 5)

    def step():
        model.zero_gradients()
        result = model.compute_loss(ids, labels, backward=True)
        logits = model.forward(ids)
        norm = model.compute_gradient_norm()
        return result.loss, result.token_losses, model.parameters.gradients_flat.copy(), logits, norm

    same_bits(step)


def test_nan_weights_give_a_nan_loss(rng):
    names = list(make_model(tie_embeddings=False).weights)
    for name in names:
        model = make_model(4.0, tie_embeddings=False)
        ids, labels = make_batch(rng, model)
        model.weights[name][...].flat[:] = np.nan
        with np.errstate(invalid="ignore"):
            result = model.compute_loss(ids, labels, backward=True)
            assert math.isnan(result.loss), name
            assert model.has_non_finite_gradients(), name


def test_one_nan_weight_is_not_hidden(rng):
    model = make_model(4.0)
    ids, labels = make_batch(rng, model, ignored=0)
    model.weights["token_embedding"][96, 0] = np.nan  # tied: one logit of every row
    ids[ids == 96], labels[labels == 96] = 0, 0
    with np.errstate(invalid="ignore"):
        result = model.compute_loss(ids, labels)
    assert np.isnan(result.token_losses).all()


# -- weights and files ---------------------------------------------------------------------------


def test_weights_go_out_and_come_back(rng):
    one, other = make_model(4.0), make_model(seed=3)
    ids, labels = make_batch(rng, one)
    flat = one.collect_weights()
    assert flat.shape == (one.num_params(),)
    assert not np.shares_memory(flat, one.parameters.weights_flat)
    other.distribute_weights(flat)
    assert one.compute_loss(ids, labels).loss == other.compute_loss(ids, labels).loss
    with pytest.raises(ValueError, match=r"flat has shape \(3,\)"):
        other.distribute_weights(flat[:3])


def test_an_abic_file_brings_the_model_back(rng, tmp_path):
    one, other = make_model(4.0), make_model(seed=3)
    ids, labels = make_batch(rng, one)
    one.save_checkpoint(tmp_path / "model.abic", 41)
    assert other.load_checkpoint_file(tmp_path / "model.abic") == 41
    assert other.collect_weights().tobytes() == one.collect_weights().tobytes()
    assert one.compute_loss(ids, labels).loss == other.compute_loss(ids, labels).loss
    one.save_checkpoint(tmp_path / "first.abic")
    assert other.load_checkpoint_file(tmp_path / "first.abic") == 0
    larger = make_model(num_layers=3)
    before = larger.collect_weights()
    rule = f"holds {one.num_params()} weights, this model has {larger.num_params()}"
    with pytest.raises(CheckpointError, match=rule):
        larger.load_checkpoint_file(tmp_path / "model.abic")
    assert np.array_equal(larger.collect_weights(), before)


# -- costs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
def test_num_params(name):
    model = make_model(**SHAPES[name])
    assert model.num_params() == sum(w.size for w in model.weights.values()) == model.config.num_params()


@pytest.mark.parametrize("name", SHAPES)
def test_flops_equal_a_count_by_hand(name):
    """Every product of forward and its two of backward, and every visible pair of query and key, one by one."""
    model, T = make_model(**SHAPES[name]), 11
    c = model.config
    D, total = c.resolved_head_dim, 0
    layer = [(c.hidden_dim, n) for n in (c.num_heads * D, c.num_kv_heads * D, c.num_kv_heads * D)]
    layer += [(c.num_heads * D, c.hidden_dim)]
    layer += [(c.hidden_dim, c.intermediate_dim)] * 2 + [(c.intermediate_dim, c.hidden_dim)]
    for inner, outer in [*layer * c.num_layers, (c.hidden_dim, c.vocab_size)]:
        total += 3 * 2 * T * inner * outer  # y = x Wᵀ, dx = dy W, dW = dyᵀ x
    for _ in range(c.num_layers * c.num_heads):
        for query in range(T):
            for _ in range(query + 1):
                total += 6 * 2 * D  # q k, p v;  dv, dp, dq, dk
    check_close(T * model.flops_per_token(T), total, 1e-12)


def test_the_gradient_of_a_loss_without_an_objective_is_refused():
    """One line: where, what, the rule, the remedy."""
    model = make_model()
    run = Run(1, 1, np.zeros(1, np.int32), np.zeros(1, np.int32))
    message = r"Head\.loss_backward: run\.objective is None.*pass replace\(run, objective="
    with pytest.raises(RuntimeError, match=message):
        model.stack.head.loss_backward(np.zeros(1, np.int32), model.stack.arrays(run).head, run)
