"""The trainer's face: reports, statistics, evaluation by hand."""

import math

import numpy as np
import pytest

from abi_py.data.tokens import DataLoader
from abi_py.errors import ConfigError
from abi_py.training.trainer import LlamaTrainer, train_llm


def test_training_lowers_the_loss_and_reports(make_model, make_config, data):
    model = make_model()
    report = train_llm(model, make_config(epochs=12, decay_steps=36), data)
    assert report.final_loss < 2.6 < math.log(19)
    assert report.total_steps == 12 * 3
    assert report.total_tokens == 12 * 123
    assert report.epochs == 12
    assert report.best_val_loss == math.inf
    assert report.final_perplexity == math.exp(report.final_loss)
    assert report.checkpoints_saved == 0
    assert not report.early_stopped
    assert not report.interrupted


def test_evaluation_covers_every_token_and_changes_nothing(make_model, make_config, data, one_batch):
    model = make_model()
    trainer = LlamaTrainer(model, make_config(label_smoothing=0.2))
    trainer.train_step(*one_batch())  # an open window must survive the evaluation
    before, gradients = model.collect_weights(), model.parameters.gradients_flat.copy()
    result = trainer.evaluate(data)
    assert result.total_tokens == 123
    assert result.num_batches == 8
    whole = trainer.evaluate(DataLoader(data, batch_size=16, seq_len=8))
    assert result.loss == pytest.approx(whole.loss, rel=1e-6)
    assert result.perplexity == math.exp(result.loss)
    rows = [model.compute_loss(b.input_ids, b.labels) for b in data.batches(1, 8, False, 0, False)]
    assert result.loss == pytest.approx(sum(row.loss_sum for row in rows) / 123, rel=1e-6)
    np.testing.assert_array_equal(model.collect_weights(), before)
    np.testing.assert_array_equal(model.parameters.gradients_flat, gradients)


def test_stats(make_model, make_config, data):
    trainer = LlamaTrainer(make_model(), make_config())
    line = "epoch=0 step=0 loss=0.0000 acc=0.00% ppl=0.00 lr=0.00e+00 grad_norm=0.00 toks/s=0"
    assert str(trainer.get_stats()) == line
    trainer.fit(data)
    stats = trainer.get_stats()
    assert (stats.epoch, stats.global_step, stats.tokens_processed) == (2, 6, 246)
    assert stats.loss == trainer.loss_history[-1]
    assert len(trainer.loss_history) == 6
    assert stats.throughput > 0
    assert stats.time_ns > 0


def test_too_many_threads(make_model, make_config):
    with pytest.raises(ConfigError, match=r"num_threads \(4000\)"):
        LlamaTrainer(make_model(), make_config(num_threads=4000))


def test_a_place_where_no_gguf_file_can_be_made_is_told_before_the_first_step(make_model, make_config, data, tmp_path):
    (tmp_path / "a").write_text("")
    trainer = LlamaTrainer(make_model(), make_config(export_gguf_path=str(tmp_path / "a/x.gguf")))
    with pytest.raises(ConfigError, match=r"export_gguf_path \(.*x.gguf\) must be in a directory, and .*a is a file"):
        trainer.fit(data)
    assert trainer.state.global_step == 0
