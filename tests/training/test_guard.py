"""What the NaN guard names: rows of the data, wherever they are in the order, and the row of a tensor that began it."""

import dataclasses
import re

import numpy as np
import pytest

from abi_py.config import LoraConfig
from abi_py.data import ChatDataset, SequencePacker, TokenizedDataset
from abi_py.model import LoraModel
from abi_py.training.trainer import LlamaTrainer

RARE = 18  # an id that only chosen rows of the data read


def mark(model):
    """Make NaN of the loss at each position that reads RARE, as if the forward pass had gone wrong there."""
    original = model.compute_loss

    def compute_loss(input_ids, *args, **kwargs):
        out = original(input_ids, *args, **kwargs)
        losses = np.where(np.asarray(input_ids) == RARE, np.nan, out.token_losses)
        return dataclasses.replace(out, loss_sum=float(losses.sum()), token_losses=losses)

    model.compute_loss = compute_loss


@pytest.fixture
def messages(make_model, make_config, record):
    """Return a function that trains for an epoch and gives the messages about skipped updates."""

    def run(data, prepare=mark, model=None, **changes):
        sink, model = record(), model or make_model()
        prepare(model)
        trainer = LlamaTrainer(model, make_config(grad_accum_steps=1, max_bad_steps=99, **changes), [sink])
        trainer.train_epoch(data)
        return [event.message for event in sink.of("bad_step")]

    return run


def test_rows_of_a_token_file_by_their_place_in_it(messages, tmp_path):
    ids = np.arange(80) % 18
    ids[[43, 70]] = RARE  # rows 5 and 8 of the file; as the training part begins at token 0, there too
    TokenizedDataset.from_slice(ids).save(tmp_path / "train.bin")
    found = messages(TokenizedDataset.load(tmp_path / "train.bin", 19), batch_size=1)
    assert sorted(message.split("(")[1].split(")")[0].rsplit("/")[-1] for message in found) == [
        "train.bin, row 5: tokens 40 to 48",
        "train.bin, row 8: tokens 64 to 72",
    ]
    part = TokenizedDataset.load(tmp_path / "train.bin", 19).split(0.5)[1]  # begins at token 40 of the file
    (first, _) = sorted(messages(part, batch_size=1, shuffle=False))
    assert "train.bin, row 0: tokens 40 to 48" in first


@pytest.mark.parametrize("packing", [False, True])
def test_rows_of_conversations_by_file_and_line(messages, packing):
    rows = [np.full(3 + i % 4, i % 17, np.uint32) for i in range(20)]
    rows[7][1], rows[12][0] = RARE, RARE
    data = ChatDataset(
        [(ids, np.ones(len(ids), bool)) for ids in rows],
        vocab_size=19,
        max_seq_len=8,
        packing=packing,
        places=[f"talks.jsonl:{i + 1}" for i in range(20)],
    )
    found = re.findall(r"talks\.jsonl:\d+", " ".join(messages(data, batch_size=4)))
    assert sorted(found) == ["talks.jsonl:13", "talks.jsonl:8"]


def test_sequences_that_were_packed_by_their_number(messages):
    packer = SequencePacker(8)
    for i in range(9):
        packer.add_sequence([i, RARE if i == 6 else i, i])
    (message,) = messages(packer.pack(2))
    assert "(sequence 6)" in message


@pytest.mark.parametrize("tied", [True, False])
def test_the_row_of_the_embedding_that_began_it(messages, make_model, tied):
    """With tied embeddings one bad row makes every loss NaN, and every row of the batch would be named."""
    ids = np.arange(65) % 18
    ids[20] = RARE

    def poison(model):
        model.weights["token_embedding"][RARE, 3] = np.nan

    data = TokenizedDataset.from_slice(ids, name="ids")
    found = messages(data, poison, make_model(tie_embeddings=tied), batch_size=8, shuffle=False)
    assert found == [
        "the loss is nan in row 2 of the batch (ids, row 2: tokens 16 to 24); weights are not finite: token_embedding "
        "(id 18) (epoch 1, batch 0)"
    ]


def test_bad_weights_below_an_adapter_are_named(messages, make_model, data):
    model = make_model()
    model.weights["layers.1.w_up"][[2, 5]] = np.inf
    found = messages(data, lambda model: None, LoraModel(model, LoraConfig(rank=2)), batch_size=2)
    assert "weights are not finite: layers.1.w_up (rows 2, 5)" in found[0]


def test_a_gradient_names_the_rows_of_its_tensor(make_model, make_config, record):
    sink, model = record(), make_model()
    trainer = LlamaTrainer(model, make_config(grad_accum_steps=2), [sink])
    ids = np.arange(16, dtype=np.uint32).reshape(2, 8)
    trainer.train_step(ids, ids)
    model.gradients["token_embedding"][7, 1] = np.inf
    model.gradients["layers.0.w_q"][:] = np.nan
    trainer.train_step(ids, ids)
    (bad,) = sink.of("bad_step")
    assert bad.message.startswith("the gradient is not finite in token_embedding (id 7), layers.0.w_q (epoch")
