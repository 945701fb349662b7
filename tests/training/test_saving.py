"""Saving while training: where nothing can be saved, and what must not be."""


import pytest

from abi_py.errors import CheckpointError, ConfigError
from abi_py.training.stop import GracefulStop
from abi_py.training.trainer import LlamaTrainer


def test_saving_needs_a_path(make_model, make_config):
    with pytest.raises(ConfigError, match="checkpoint_path"):
        LlamaTrainer(make_model(), make_config()).save_checkpoint()


def test_full_disk_does_not_end_the_run(make_model, make_config, data, record, tmp_path, monkeypatch):
    """An interval's save may fail: the run warns and goes on; the final save must not fail in silence."""
    import shutil

    usage = shutil.disk_usage(tmp_path)
    full = iter([True, False, False, True])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10 if next(full) else usage.free))
    sink = record()
    config = make_config(checkpoint_interval=2, checkpoint_path=str(tmp_path), max_steps=6)
    report = LlamaTrainer(make_model(), config, [sink]).fit(data)
    assert [event.step for event in sink.of("checkpoint")] == [4, 6]
    assert report.checkpoints_saved == 2
    assert "step 2" in report.warnings[0]
    assert "MB are free" in report.warnings[0]
    with pytest.raises(CheckpointError, match="are free"):
        LlamaTrainer(make_model(), make_config(checkpoint_path=str(tmp_path / "new"), max_steps=1)).fit(data)


def test_stopped_at_once_names_the_checkpoint_that_was_resumed(make_model, make_config, data, tmp_path, record):
    config = make_config(checkpoint_path=str(tmp_path), max_steps=2)
    saved = LlamaTrainer(make_model(), config).fit(data).checkpoint
    sink, stop = record(), GracefulStop()
    trainer = LlamaTrainer(make_model(), config.replace(max_steps=None), [sink])
    trainer.load_checkpoint(tmp_path)
    stop.request()
    report = trainer.fit(data, stop=stop)
    assert (report.interrupted, report.checkpoint) == (True, saved)
    assert sink.of("stop")[0].message == f"stopped at step 2 by request; saved {saved}"
    assert not sink.of("checkpoint")


def test_the_state_of_a_trainer_is_filled_and_not_exchanged(make_model, make_config, data, tmp_path):
    """The parts of a trainer, and who holds its state, see what was loaded."""
    LlamaTrainer(make_model(), make_config(checkpoint_path=str(tmp_path), max_steps=2)).fit(data)
    trainer = LlamaTrainer(make_model(), make_config())
    state, losses = trainer.state, trainer.loss_history
    trainer.load_checkpoint(tmp_path)
    assert trainer.state is state is trainer.clock.state
    assert (state.global_step, len(losses), trainer.loss_history is losses) == (2, 2, True)
