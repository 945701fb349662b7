"""Windows and their figures: both rules written out, token by token, on the logits of the model."""

import math

import numpy as np
import pytest

from abi_py.config import LlmTrainingConfig, TrainableModelConfig
from abi_py.data import TokenizedDataset
from abi_py.errors import ConfigError, DataError
from abi_py.model import TrainableModel
from abi_py.training.perplexity import Window, evaluate_tokens, windows
from abi_py.training.trainer import LlamaTrainer

VOCAB = 23


@pytest.fixture(scope="module")
def model():
    made = TrainableModel(
        TrainableModelConfig(
            hidden_dim=16,
            num_layers=2,
            num_heads=2,
            num_kv_heads=1,
            intermediate_dim=16,
            vocab_size=VOCAB,
            max_seq_len=40,
            seed=3,
        )
    )
    made.parameters.weights_flat[...] *= 8
    return made


def negative_log_probability(model, seen, target):
    logits = model.forward(np.asarray(seen)[None])[0, -1].astype(np.float64)
    return math.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[target], int(logits.argmax()) == target


@pytest.mark.parametrize("bos", [None, 5])
def test_the_rule_of_llama_cpp(model, rng, bos):
    """For each chunk of n_ctx tokens: positions n_ctx/2 ... n_ctx - 2, each predicting the next token."""
    ids, n_ctx = rng.integers(0, VOCAB, 35), 10
    losses, hits = [], 0
    for chunk in range(len(ids) // n_ctx):
        tokens = ids[chunk * n_ctx : (chunk + 1) * n_ctx].copy()
        seen = tokens.copy()
        if bos is not None:
            seen[0] = bos
        for j in range(n_ctx // 2, n_ctx - 1):
            loss, hit = negative_log_probability(model, seen[: j + 1], tokens[j + 1])
            losses.append(loss)
            hits += hit
    result = evaluate_tokens(model, ids, max_seq_len=n_ctx, bos_id=bos)
    assert (result.tokens, result.windows) == (len(losses), 3) == (12, 3)
    assert result.loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    assert result.loss_error == pytest.approx(np.std(losses) / math.sqrt(len(losses) - 1), rel=1e-4)
    assert result.accuracy == hits / len(losses)
    assert result.bits_per_byte is None


@pytest.mark.parametrize("stride", [1, 3, 9])
@pytest.mark.parametrize("length", [2, 9, 10, 11, 37])
def test_with_a_stride_every_token_counts_once(model, rng, stride, length):
    ids, context = rng.integers(0, VOCAB, length), 10
    counted = [t for window in windows(length, context, stride) for t in range(window.first, window.end)]
    assert counted == list(range(1, length))
    losses = []
    for window in windows(length, context, stride):
        assert window.first > window.start
        assert window.end - window.start <= context
        if window.start:
            assert window.first - window.start >= context - stride
        for t in range(window.first, window.end):
            losses.append(negative_log_probability(model, ids[window.start : t], ids[t])[0])
    result = evaluate_tokens(model, ids, max_seq_len=context, stride=stride)
    assert result.tokens == length - 1
    assert result.loss == pytest.approx(np.mean(losses), rel=1e-5)


def test_three_sequences_by_hand(model, rng):
    """The mean over three windows is the mean of their token losses, as compute_loss gives them one by one."""
    ids = rng.integers(0, VOCAB, 60)
    parts = [ids[start : start + 20] for start in (0, 20, 40)]
    outs = [model.compute_loss(part[None, :-1], part[None, 1:]) for part in parts]
    losses = np.concatenate([out.token_losses[0, 10:] for out in outs])
    assert evaluate_tokens(model, ids, max_seq_len=20).loss == pytest.approx(losses.mean(), rel=1e-6)


def test_bits_per_byte(model, rng):
    ids, counts = rng.integers(0, VOCAB, 30), rng.integers(1, 5, 30).astype(np.int32)
    result = evaluate_tokens(model, ids, max_seq_len=10, byte_counts=counts)
    counted = np.concatenate([counts[s + 6 : s + 10] for s in (0, 10, 20)])
    assert result.bytes == counted.sum()
    assert result.bits_per_byte == pytest.approx(result.loss * result.tokens / math.log(2) / counted.sum())


def test_an_evaluation_in_training_counts_the_bytes_of_its_labels(model, rng):
    sizes = rng.integers(0, 5, VOCAB)
    ids = rng.integers(0, VOCAB, 100).astype(np.uint32)
    trainer = LlamaTrainer(model, LlmTrainingConfig(batch_size=2, max_seq_len=8, eval_interval=0))
    data = TokenizedDataset.from_slice(ids)
    assert trainer.evaluate(data).bits_per_byte is None
    trainer.count_bytes = lambda labels, before: sizes[labels] + (before == ids[0])
    result = trainer.evaluate(data)
    assert result.total_tokens == 99
    total = sizes[ids[1:]].sum() + (ids[:-1] == ids[0]).sum()
    assert result.bits_per_byte == pytest.approx(result.loss * 99 / math.log(2) / total)
    trainer.count_bytes = lambda labels, before: np.zeros(labels.shape, np.int64)
    assert trainer.evaluate(data).bits_per_byte is None  # no text


def test_progress_tells_the_result_so_far(model, rng):
    ids, seen = rng.integers(0, VOCAB, 2300), []

    def note(done, total, so_far):
        seen.append((done, total, so_far.tokens))

    result = evaluate_tokens(model, ids, max_seq_len=4, stride=1, progress=note)
    assert seen == [(512 * i, 2297, 512 * i + 2) for i in range(1, 5)] + [(2297, 2297, 2299)]
    assert result.tokens == 2299


def test_wrong_calls(model):
    ids = np.zeros(30, np.int64)
    assert list(windows(25, 10)) == [Window(0, 10, 6), Window(10, 20, 16)]
    with pytest.raises(ConfigError, match="max_seq_len"):
        evaluate_tokens(model, ids, max_seq_len=41)
    with pytest.raises(ConfigError, match="max_seq_len"):
        evaluate_tokens(model, ids, max_seq_len=3)
    for stride in (0, 10):
        with pytest.raises(ConfigError, match="stride"):
            evaluate_tokens(model, ids, max_seq_len=10, stride=stride)
    with pytest.raises(DataError, match="fewer than one window"):
        evaluate_tokens(model, ids[:9], max_seq_len=10)
    with pytest.raises(DataError, match="at least two"):
        evaluate_tokens(model, ids[:1], max_seq_len=10, stride=2)
    with pytest.raises(DataError, match="vocab_size"):
        evaluate_tokens(model, ids + VOCAB, max_seq_len=10)
