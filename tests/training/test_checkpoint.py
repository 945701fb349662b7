"""Checkpoints on the disk: whole or not there, whatever fails; damage is found; the right ones are kept."""

import errno
import json
import os
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from abi_py.config import TrainableModelConfig, load_yaml
from abi_py.errors import CheckpointError, ConfigError, NonFiniteError
from abi_py.formats.safetensors import write_safetensors
from abi_py.training import checkpoint
from abi_py.training.checkpoint import (
    FILES,
    STATE,
    find_latest,
    list_checkpoints,
    locate,
    read_checkpoint,
    recover,
    removable,
    verify,
)
from abi_py.training.loading import load_model
from abi_py.training.state import TrainingState
from abi_py.training.trainer import LlamaTrainer


@pytest.fixture
def trainer(make_model, make_config, data, tmp_path):
    """Return a trainer that has saved step 1 and 2 under tmp_path / "c"."""
    trainer = LlamaTrainer(make_model(), make_config(checkpoint_path=str(tmp_path / "c"), max_checkpoints=0))
    for _ in range(2):
        step(trainer, data)
        trainer.save_checkpoint()
    return trainer


def step(trainer, data):
    for batch in data.batches(2, 8):
        if trainer.train_step_with_metrics(batch.input_ids, batch.labels).updated:
            return


def names(path):
    return sorted(entry.name for entry in path.iterdir())


def test_layout_and_hugging_face_names(trainer, tmp_path):
    path = tmp_path / "c" / "llm_step_2"
    assert names(path) == ["config.json", "config.yaml", "model.safetensors", "optimizer.safetensors", "state.json"]
    assert (tmp_path / "c" / "latest").read_text() == "llm_step_2\n"
    tensors, model = load_file(path / "model.safetensors"), trainer.model
    assert set(tensors) == {entry.hf_name for entry in model.parameters.table}
    np.testing.assert_array_equal(tensors["model.layers.1.self_attn.k_proj.weight"], model.weights["layers.1.w_k"])
    assert "lm_head.weight" not in tensors  # tied
    config = json.loads((path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["hidden_size"], config["num_key_value_heads"], config["tie_word_embeddings"]) == (16, 1, True)
    sections = load_yaml(path / "config.yaml")
    assert TrainableModelConfig.from_dict(sections["model"]) == model.config


def test_state_round_trip(trainer, tmp_path):
    loaded = read_checkpoint(tmp_path / "c" / "llm_step_2")
    assert loaded.state == trainer.state
    odd = TrainingState(best_metric=float("nan"), loss=float("-inf"), window_loss=0.1 + 0.2)
    back = TrainingState.from_dict(json.loads(json.dumps(odd.to_dict(), allow_nan=False)))
    assert back.best_metric != back.best_metric
    assert (back.loss, back.window_loss, back.best_val_loss) == (float("-inf"), 0.1 + 0.2, float("inf"))
    with pytest.raises(CheckpointError, match="unknown_field"):
        TrainingState.from_dict({**odd.to_dict(), "unknown_field": 1})
    data = {"identity": {"length": 9, "sha256": "3f"}, "order": {}, "batches": 7}
    assert TrainingState.from_dict({**odd.to_dict(), "data": data}).data == data
    for wrong in ({"batches": "7"}, {"identity": {}}, {"order": None}):
        with pytest.raises(CheckpointError, match=f"the training state: data.*{next(iter(wrong))}"):
            TrainingState.from_dict({**odd.to_dict(), "data": data | wrong})


class Killed(BaseException):
    """The end of the process: nothing may clean up after it."""


@pytest.mark.parametrize("same_step", [False, True])
@pytest.mark.parametrize("failure", ["error", "kill"])
@pytest.mark.parametrize("call", range(12))
def test_failure_at_each_fsync_and_rename(trainer, data, tmp_path, monkeypatch, call, failure, same_step):
    """Fail (or die) at the n-th fsync or rename of a save: a whole checkpoint is there, of this save or the last."""
    root, counter = tmp_path / "c", iter(range(10**6))
    if not same_step:
        step(trainer, data)
    before = trainer.state.checkpoints_saved

    def failing(original):
        def function(*args):
            if next(counter) == call:
                raise OSError(errno.ENOSPC, "No space left on device") if failure == "error" else Killed
            return original(*args)

        return function

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing(os.fsync))
        patch.setattr(os, "replace", failing(os.replace))
        if failure == "kill":  # a dead process removes nothing and puts nothing back
            patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
            patch.setattr(type(tmp_path), "unlink", lambda *args, **kwargs: None)
        try:
            trainer.save_checkpoint()
            finished = True
        except (OSError, Killed):
            finished = False
    found = find_latest(root)
    assert found.skipped == ()
    assert verify(found.path)["state"]["global_step"] in (2, trainer.state.global_step)
    if failure == "error":
        assert not [name for name in names(root) if name.startswith((".abi", ".old"))] or same_step
        assert trainer.state.checkpoints_saved == before + finished
    recover(root)
    assert not [name for name in names(root) if name.startswith((".abi", ".old"))]
    assert [verify(path)["state"]["global_step"] for _, path in list_checkpoints(root)][:2] == [1, 2]
    trainer.save_checkpoint()
    assert find_latest(root).path.name == f"llm_step_{trainer.state.global_step}"


@pytest.mark.parametrize("file", [*FILES, STATE])
@pytest.mark.parametrize("damage", ["flip", "cut", "missing"])
def test_damage_is_found_and_passed_over(trainer, make_model, make_config, tmp_path, file, damage):
    root = tmp_path / "c"
    victim = root / "llm_step_2" / file
    content = bytearray(victim.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
    elif damage == "cut":
        victim.write_bytes(content[:-5])
    else:
        victim.unlink()
    with pytest.raises(CheckpointError, match=file):
        read_checkpoint(root / "llm_step_2")
    for place in (root, tmp_path):
        if place is tmp_path:
            root.rename(tmp_path / "checkpoints")
        found = locate(place)
        assert found.path.name == "llm_step_1"
        assert len(found.skipped) == 1
        assert file in found.skipped[0]
    again = LlamaTrainer(make_model(), make_config())
    again.load_checkpoint(tmp_path)
    assert again.state.global_step == 1
    assert file in again.get_report().warnings[0]


def test_all_damaged(trainer, tmp_path):
    for path in (tmp_path / "c").glob("llm_step_*"):
        (path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no whole checkpoint.*config\.json is missing") as error:
        find_latest(tmp_path / "c")
    assert "resume from the directory above" not in str(error.value)  # the search has looked there
    with pytest.raises(FileNotFoundError):
        locate(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        locate(tmp_path / "empty")


def test_keeps_the_newest_and_the_best(make_model, make_config, data, tmp_path):
    trainer = LlamaTrainer(make_model(), make_config(epochs=9, checkpoint_path=str(tmp_path), max_checkpoints=2))
    for number in range(1, 7):
        step(trainer, data)
        if number == 2:
            trainer.state.best_step = 2
        trainer.save_checkpoint()
    assert names(tmp_path) == ["latest", "llm_step_2", "llm_step_5", "llm_step_6"]


def test_what_cannot_be_pruned_does_not_make_the_save_fail(make_model, make_config, data, tmp_path, monkeypatch):
    trainer = LlamaTrainer(make_model(), make_config(epochs=9, checkpoint_path=str(tmp_path), max_checkpoints=1))
    step(trainer, data)
    trainer.save_checkpoint()

    def refused(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(checkpoint, "remove_directory", refused)
    step(trainer, data)
    assert trainer.save_checkpoint() == tmp_path / "llm_step_2"
    report = trainer.get_report()
    assert (report.checkpoints_saved, report.checkpoint) == (2, str(tmp_path / "llm_step_2"))
    assert "older checkpoints cannot be removed" in report.warnings[0]


def test_an_older_branch_is_pruned_before_the_newer_one(make_model, make_config, data, tmp_path):
    """Going back to step 2 and on: what is newest is what was saved last, not what has the highest step."""
    config = make_config(checkpoint_path=str(tmp_path), max_checkpoints=0, checkpoint_interval=1)
    LlamaTrainer(make_model(), config).fit(data)
    back = LlamaTrainer(make_model(), config.replace(max_steps=3, learning_rate=1e-3, max_checkpoints=2))
    back.load_checkpoint(tmp_path / "llm_step_2")
    back.fit(data)
    assert names(tmp_path) == ["latest", "llm_step_3", "llm_step_6"]
    assert find_latest(tmp_path).path.name == "llm_step_3"


def test_full_disk_is_seen_before_writing(trainer, data, tmp_path, monkeypatch):
    step(trainer, data)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match=r"needs \d+\.\d\d MB, 0\.00 MB are free; the earlier .* untouched"):
        trainer.save_checkpoint()
    assert names(tmp_path / "c") == ["latest", "llm_step_1", "llm_step_2"]


def test_non_finite_weights_are_never_saved(trainer, tmp_path):
    trainer.model.weights["layers.0.w_down"][3, 4] = np.nan
    with pytest.raises(NonFiniteError, match=r"layers\.0\.mlp\.down_proj\.weight"):
        trainer.save_checkpoint()
    assert find_latest(tmp_path / "c").path.name == "llm_step_2"


def test_two_trainers_have_no_checkpoint_path_in_common(make_model, make_config, data, tmp_path):
    """Neither a second `fit` nor a save from a loop of one's own comes between the saves of a running one."""
    config, refused = make_config(checkpoint_path=str(tmp_path / "c"), max_checkpoints=0), []

    class Second:
        def handle(self, event):
            if event.type == "step":
                other = LlamaTrainer(make_model(), config)
                for begin in (lambda: other.fit(data), lambda: other.train_epoch(data), other.save_checkpoint):
                    with pytest.raises(ConfigError, match=f"checkpoint_path .* process {os.getpid()} on .* is writing"):
                        begin()
                refused.append(event.step)

        def close(self):
            pass

    first = LlamaTrainer(make_model(), config, [Second()])
    report = first.fit(data)
    assert (refused, report.warnings) == ([1, 2, 3, 4, 5, 6], ())
    assert names(tmp_path / "c") == ["latest", "llm_step_6"]
    again = LlamaTrainer(make_model(), config.replace(epochs=3))
    again.load_checkpoint(tmp_path / "c")
    assert again.fit(data).total_steps == 9  # it ended, so the directory is free


@pytest.mark.parametrize("name", ["m", "v"])
def test_non_finite_moments_are_neither_saved_nor_read(trainer, tmp_path, monkeypatch, name):
    trainer.optimizer.moments[name][3] = np.inf
    with pytest.raises(NonFiniteError, match=f"the optimizer's {name} holds NaN or infinity"):
        trainer.save_checkpoint()
    assert names(tmp_path / "c") == ["latest", "llm_step_1", "llm_step_2"]
    monkeypatch.setattr(checkpoint, "check_written", lambda *_: None)
    path = trainer.save_checkpoint()
    with pytest.raises(CheckpointError, match=rf"llm_step_2: the optimizer's {name} holds NaN or infinity"):
        read_checkpoint(path)


def test_weights_of_nan_are_not_read(trainer, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "check_written", lambda *_: None)
    trainer.model.weights["final_norm"][3] = np.nan
    path = trainer.save_checkpoint()
    for read in (read_checkpoint, load_model):
        with pytest.raises(CheckpointError, match=r"model\.norm\.weight holds NaN or infinity at \[3\]"):
            read(path)
    assert np.isnan(load_model(path, allow_nonfinite=True).model.weights["final_norm"][3])


def test_clearing_up_removes_only_names_that_are_made_here(trainer, data, tmp_path):
    root, left = tmp_path / "c", ".abi-99999-0123456789abcdef.tmp"
    others = [".tmp-llm_step_9-4711", ".tmp-notes", ".abi-notes.tmp", ".abi-1-0123456789ABCDEF.tmp", ".abi-old-notes"]
    for name in [left, *others]:
        (root / name).mkdir()
        (root / name / "file").write_text("mine")
    trainer.save_checkpoint()
    assert names(root) == sorted([*others, "latest", "llm_step_1", "llm_step_2"])


def test_a_new_run_leaves_the_checkpoints_of_another_alone(trainer, make_model, make_config, data, tmp_path):
    root, rule = str(tmp_path / "c"), "must not hold checkpoints of another run, and there is llm_step_2; choose"
    other = LlamaTrainer(make_model(), make_config(checkpoint_path=root, epochs=1))
    for begin in (lambda: other.fit(data), lambda: other.train_epoch(data), other.save_checkpoint):
        with pytest.raises(ConfigError, match=rule):
            begin()
    copy = shutil.copytree(tmp_path / "c/llm_step_1", tmp_path / "copy/llm_step_1")
    other.load_checkpoint(copy)  # another run's still
    with pytest.raises(ConfigError, match=rule):
        other.fit(data)
    assert names(tmp_path / "c") == ["latest", "llm_step_1", "llm_step_2"]


def test_a_directory_that_only_has_the_name_of_a_checkpoint_stays(trainer, data, tmp_path):
    for number in (0, 3):
        (tmp_path / f"c/llm_step_{number}").mkdir()
        (tmp_path / f"c/llm_step_{number}/notes").write_text("mine")
    assert [path.name for path in removable(tmp_path / "c", 0)] == ["llm_step_1", "llm_step_2"]
    step(trainer, data)
    with pytest.raises(CheckpointError, match="llm_step_3 holds files that are not of a checkpoint, so it is not repl"):
        trainer.save_checkpoint()
    assert (tmp_path / "c/llm_step_3/notes").read_text() == "mine"


def test_the_free_space_that_is_asked_for_is_little_more_than_what_is_written(trainer, data, tmp_path, monkeypatch):
    size = sum(file.stat().st_size for file in (tmp_path / "c/llm_step_2").iterdir())
    usage = shutil.disk_usage(tmp_path)
    step(trainer, data)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=int(1.05 * size) + (1 << 16)))
    assert trainer.save_checkpoint().is_dir()


def test_links_are_kept_and_never_followed(make_model, make_config, data, tmp_path):
    """Pruning leaves a linked checkpoint; saving in its place removes the link; what it points to stays."""
    root, elsewhere = tmp_path / "c", tmp_path / "archive"
    trainer = LlamaTrainer(make_model(), make_config(epochs=9, checkpoint_path=str(root), max_checkpoints=1))
    step(trainer, data)
    trainer.save_checkpoint()
    shutil.move(root / "llm_step_1", elsewhere)
    (root / "llm_step_1").symlink_to(elsewhere)
    (root / ".abi-old-llm_step_2").symlink_to(elsewhere)
    (root / ".abi-99999-0123456789abcdef.tmp").symlink_to(elsewhere)
    content = {name: (elsewhere / name).read_bytes() for name in names(elsewhere)}
    for _ in range(2):
        step(trainer, data)
        trainer.save_checkpoint()
    assert names(root) == [".abi-99999-0123456789abcdef.tmp", "latest", "llm_step_1", "llm_step_3"]
    assert (root / "llm_step_1").is_symlink()
    assert verify(root / "llm_step_1")["state"]["global_step"] == 1
    trainer.state.global_step = 1
    trainer.save_checkpoint()
    assert not (root / "llm_step_1").is_symlink()
    assert {name: (elsewhere / name).read_bytes() for name in names(elsewhere)} == content


def test_another_name_or_no_state_is_not_taken(trainer, make_model, make_config, tmp_path):
    root = tmp_path / "c"
    shutil.copytree(root / "llm_step_1", root / "llm_step_10")
    with pytest.raises(CheckpointError, match="llm_step_10 is named after step 10, but its state is that of step 1"):
        LlamaTrainer(make_model(), make_config()).load_checkpoint(root / "llm_step_10")
    shutil.rmtree(root / "llm_step_10")
    shutil.copytree(root / "llm_step_1", root / "best")  # a name that says nothing
    assert LlamaTrainer(make_model(), make_config()).load_checkpoint(root / "best").name == "best"
    (root / "llm_step_2" / STATE).unlink()
    for load in (load_model, LlamaTrainer(make_model(), make_config()).load_checkpoint):
        with pytest.raises(CheckpointError, match=r"state\.json is missing"):
            load(root / "llm_step_2")
    assert find_latest(root).path.name == "llm_step_1"


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("m", lambda m: m[:-1]),
        ("v", lambda v: v.astype(np.float64)),
        ("m", lambda m: m[None]),
        ("loss_history", lambda losses: losses[None]),
        ("loss_history", lambda losses: losses.astype(np.int64)),
    ],
)
def test_arrays_that_are_not_those_of_a_checkpoint(trainer, tmp_path, monkeypatch, name, change):
    """Whole files, whose checksums hold, of another program."""
    monkeypatch.setattr(checkpoint, "verify", lambda path: json.loads((path / STATE).read_text()))
    path = tmp_path / "c" / "llm_step_2"
    arrays = {key: np.array(array) for key, array in read_checkpoint(path).optimizer.items()}
    write_safetensors(path / "optimizer.safetensors", {**arrays, name: np.ascontiguousarray(change(arrays[name]))})
    with pytest.raises(CheckpointError, match=rf"optimizer.safetensors: '{name}' is .*, but must be "):
        read_checkpoint(path)
