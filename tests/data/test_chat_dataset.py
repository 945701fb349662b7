"""Rows from conversations: cut as their text is, never without something to learn, batched without waste or loss."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from abi_py.config import LlmTrainingConfig, TrainableModelConfig
from abi_py.data import (
    IGNORE_LABEL,
    ChatDataset,
    Conversation,
    Message,
    load_template,
    read_conversation,
)
from abi_py.data.batch import labels_of
from abi_py.data.chat_dataset import truncate
from abi_py.errors import ConfigError, DataError
from abi_py.training.feed import describe, open_feed

MODEL = TrainableModelConfig(
    hidden_dim=16, num_layers=1, num_heads=2, num_kv_heads=1, intermediate_dim=32, vocab_size=400, max_seq_len=64
)


def training(**changes):
    return LlmTrainingConfig(**{"batch_size": 4, "max_seq_len": 64, "seed": 7, **changes})


def dataset(lengths, **settings):
    """Return rows whose ids are 100 * row + position, with the last token learned, and every third."""
    rows = []
    for i, n in enumerate(lengths):
        trained = np.arange(n) % 3 == 2
        trained[0], trained[-1] = False, True
        rows.append(((100 * i + np.arange(n)).astype(np.uint32), trained))
    return ChatDataset(rows, vocab_size=1 << 20, **{"max_seq_len": 32, **settings})


# -- cutting -----------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_on", ["assistant", "all"])
def test_a_cut_answer_has_no_end(tokenizer, show, loss_on):
    row = read_conversation({"instruction": "abc", "output": "0123456789"})
    data = ChatDataset.encode([row], load_template("deepzig"), tokenizer, max_seq_len=12, loss_on=loss_on)
    ids, trained = data.row(0)
    question = "@<user>abc@</user>@<assistant>"
    shown = f"@<s>{question}[01234]" if loss_on == "assistant" else f"@<s>[{question}01234]"
    assert show(tokenizer, ids, labels_of(ids, trained)) == shown
    assert (data.stats.truncated, data.stats.cut, data.stats.lengths) == (1, 7, [19])


def test_a_cut_between_answers_ends_with_the_answer_before(tokenizer, show):
    talk = Conversation(
        (Message("user", "a"), Message("assistant", "b"), Message("user", "long" * 20), Message("assistant", "c"))
    )
    for name, shown in (
        ("deepzig", "@<s>@<user>a@</user>@<assistant>[b@</assistant>]"),
        ("chatml", "@<|im_start|>user\na@<|im_end|>\n@<|im_start|>assistant\n[b@<|im_end|>]"),
    ):
        data = ChatDataset.encode([talk], load_template(name), tokenizer, max_seq_len=40)
        ids, trained = data.row(0)
        assert show(tokenizer, ids, labels_of(ids, trained)) == shown


@given(st.lists(st.booleans(), min_size=2, max_size=30), st.integers(2, 30))
def test_truncation(flags, limit):
    trained = np.array([False, *flags[1:]])
    trained[-1] = True
    ids = np.arange(len(flags), dtype=np.uint32)
    cut = truncate(ids, trained, limit)
    if cut is None:
        assert len(ids) > limit
        assert not trained[:limit].any()
        return
    made, learned = cut
    assert len(made) == len(learned) <= limit
    assert learned[-1] or len(ids) <= limit
    assert made.tolist() == ids[: len(made)].tolist()
    assert learned.sum() == trained[:limit].sum()


def test_rows_without_an_answer_are_left_out_and_counted(tokenizer):
    rows = [
        read_conversation({"messages": [{"role": "user", "content": "a"}]}),
        read_conversation({"instruction": "x" * 100, "output": "y"}),
        read_conversation({"instruction": "a", "output": "b"}),
        Conversation((Message("judge", "a"),), place="f.jsonl:4"),
    ]
    with pytest.raises(DataError, match=r"f\.jsonl:4: deepzig: the template deepzig has no turn for the role judge"):
        ChatDataset.encode(rows, load_template("deepzig"), tokenizer, max_seq_len=32)
    data = ChatDataset.encode(rows, load_template("deepzig"), tokenizer, max_seq_len=32, skip_bad_rows=True)
    assert len(data) == data.stats.rows == 1
    assert (data.stats.empty, data.stats.dropped, len(data.stats.bad)) == (1, 1, 1)
    with pytest.raises(DataError, match=r"1 without an answer; 1 whose answers begin after max_seq_len \(32\)"):
        ChatDataset.encode(rows[:2], load_template("deepzig"), tokenizer, max_seq_len=32)


# -- batches -----------------------------------------------------------------------------------


def learned_ids(batches):
    labels = np.concatenate([batch.labels.ravel() for batch in batches])
    return sorted(labels[labels != IGNORE_LABEL].tolist())


@given(
    lengths=st.lists(st.integers(2, 32), min_size=1, max_size=40),
    batch_size=st.integers(1, 5),
    packing=st.booleans(),
    shuffle=st.booleans(),
)
def test_every_target_comes_once_an_epoch(lengths, batch_size, packing, shuffle):
    data = dataset(lengths, packing=packing)
    model = MODEL.replace(vocab_size=1 << 20)
    feed = open_feed(data, training(batch_size=batch_size, shuffle=shuffle), model, training=True)
    batches = list(feed)
    assert len(batches) == feed.num_batches == data.num_batches(batch_size)
    assert learned_ids(batches) == sorted(data.ids[data.trained].tolist())
    for batch in batches:
        assert batch.attention_mask is not None
        assert (batch.labels[batch.attention_mask == 0] == IGNORE_LABEL).all()
        assert batch.num_tokens > 0
        assert batch.seq_len <= 32
        if not packing:
            counts = batch.attention_mask.sum(1)
            assert batch.seq_len == min(-(-int(counts.max()) // 8) * 8, 32)
            learned = batch.labels != IGNORE_LABEL
            assert (batch.labels[learned] == batch.input_ids[learned] + 1).all()


@pytest.mark.parametrize("packing", [False, True])
def test_order_is_a_function_of_seed_and_epoch_and_resumes_anywhere(packing):
    data = dataset([2 + i % 30 for i in range(97)], packing=packing)
    model = MODEL.replace(vocab_size=1 << 20)
    whole = open_feed(data, training(), model, training=True)
    whole.set_epoch(3)
    batches = [batch.input_ids.tolist() for batch in whole]
    for position in (0, 1, len(batches) // 2, len(batches) - 1):
        again = open_feed(data, training(), model, training=True)
        again.set_epoch(3)
        again.seek(position)
        assert [batch.input_ids.tolist() for batch in again] == batches[position:]
    whole.set_epoch(4)
    assert [batch.input_ids.tolist() for batch in whole] != batches
    other = open_feed(data, training(seed=8), model, training=True)
    other.set_epoch(3)
    assert [batch.input_ids.tolist() for batch in other] != batches
    assert describe(again)["batches"] == len(batches)
    assert describe(again)["identity"]["length"] == 97


def test_identity_sees_the_mask_and_not_the_batch_size():
    data, other = dataset([5, 9, 30]), dataset([5, 9, 30])
    model = MODEL.replace(vocab_size=1 << 20)
    other.trained[3] = ~other.trained[3]
    facts = [
        describe(open_feed(d, training(batch_size=b), model, training=True))["identity"]
        for d, b in ((data, 4), (data, 2), (other, 4))
    ]
    assert facts[0] == facts[1] != facts[2]


def test_evaluation_takes_every_row_in_its_own_order():
    data = dataset([20, 3, 10, 3, 20])
    feed = open_feed(data, training(batch_size=2), MODEL.replace(vocab_size=1 << 20), training=False)
    batches = list(feed)
    assert [batch.input_ids[:, 0].tolist() for batch in batches] == [[100, 300], [200, 0], [400]]


def test_buckets_waste_less_than_chance_and_packing_least(rng):
    data = dataset(rng.integers(2, 256, 500).tolist(), max_seq_len=256)
    waste = data.padding(8)
    assert waste["packed"] < 0.05
    assert waste["padded"] < 0.1
    assert 0.45 < waste["full"] < 0.55
    by_chance = np.mean([1 - lengths.mean() / lengths.max() for lengths in data.lengths[:496].reshape(-1, 8)])
    assert waste["padded"] < by_chance / 2


def test_split_has_exact_sizes_and_shares_nothing():
    data = dataset([5] * 41)
    train, valid = data.split(0.05)
    assert (len(train), len(valid)) == (38, 3)  # ceil(0.05 * 41)
    assert len(dataset([5] * 40).split(0.05)[1]) == 2  # 0.05 * 40 is exactly 2, whatever floating point says
    assert [*train.ids, *valid.ids] == data.ids.tolist()
    with pytest.raises(ConfigError, match="valid_fraction \\(1\\) must be between 0 and 1"):
        data.split(1)
    with pytest.raises(DataError, match="has one row"):
        dataset([5]).split(0.5)


def test_a_model_with_too_small_a_vocabulary_is_refused():
    with pytest.raises(ConfigError, match=r"vocab_size \(400\) of the model must be at least .* \(1048576\)"):
        open_feed(dataset([5]), training(), MODEL, training=True)
    with pytest.raises(ConfigError, match=r"max_seq_len \(128\) of the training must not exceed the model's \(64\)"):
        open_feed(dataset([5], max_seq_len=128), training(), MODEL.replace(vocab_size=1 << 20), training=True)
    with pytest.raises(DataError, match="holds no row to train on; give at least one conversation"):
        dataset([])


@pytest.mark.parametrize(("packing", "longest"), [(False, 20), (True, 25)])
def test_what_a_data_set_of_conversations_says_of_itself(packing, longest):
    data = dataset([5, 20], packing=packing)
    assert (data.conversations, data.longest_row, data.info, data.notes) == (True, longest, None, ())
    assert data.summary() == "conversations: 2 conversations, 25 tokens, 36% of them trained"
    question, answer = data.example()
    assert (question.tolist(), answer.tolist()) == ([0, 1], [2, 3, 4])
