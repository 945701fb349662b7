"""The small names of the ABI: each beside its formula, and the table of all names."""

import json
import re
from functools import reduce
from pathlib import Path

import numpy as np
import pytest

import abi_py as abi
from abi_py.errors import CheckpointError, ConfigError, DataError
from abi_py.kernels.cross_entropy import cross_entropy_ref

PAGE = (Path(__file__).resolve().parents[1] / "docs/zig-differences.md").read_text(encoding="utf-8")
EXPORTS = """
Checkpoint CheckpointError CheckpointStore CheckpointView LoadCheckpointError SaveCheckpointError
SaveLatestCheckpointError loadCheckpoint saveCheckpoint LlmCheckpoint LlmCheckpointView LoadLlmCheckpointError
SaveLlmCheckpointError loadLlmCheckpoint saveLlmCheckpoint GradientAccumulator GradientError CrossEntropyLoss MSELoss
FocalLoss perplexity klDivergence TrainableModel TrainableModelConfig TrainableWeights TrainableLayerWeights
ActivationCache ModelLoadError LlamaTrainer LlmTrainingConfig trainLlm DataLoader TokenizedDataset Batch BatchIterator
SequencePacker InstructionSample parseInstructionDataset WdbxTokenDataset TokenBlock encodeTokenBlock decodeTokenBlock
readTokenBinFile writeTokenBinFile LoraAdapter LoraConfig LoraLayerAdapters LoraModel MixedPrecisionConfig
MixedPrecisionContext LossScaler MasterWeights fp32ToFp16 fp16ToFp32 TrainingLogger TrainingLogConfig TrainingLogMetric
TrainingError TrainError Error OptimizerType LearningRateSchedule TrainingConfig TrainingReport ModelState Optimizer
SgdOptimizer AdamOptimizer AdamWOptimizer TrainingResult Context isEnabled calculateLearningRate clipGradients
saveModelToWdbx train trainAndReport trainWithResult loss trainable_model llm_trainer data_loader wdbx_dataset lora
mixed_precision logging self_learning
"""


def table():
    """Return rows of the page's table of names: names of the ABI, names here, the reason."""
    lines = PAGE[PAGE.index("## Names") : PAGE.index("## Not in this version")].splitlines()
    rows = [line.strip("|").split("|") for line in lines if line.startswith("| `")]
    return [(re.findall("`([^`]+)`", zig), re.findall("`([^`]+)`", here), note.strip()) for zig, here, note in rows]


def test_the_table_has_every_name_once_and_each_resolves():
    assert sorted(name for zig, _, _ in table() for name in zig) == sorted(EXPORTS.split())
    for zig, here, note in table():
        assert here or note, zig
        for name in here:
            assert reduce(getattr, name.split("."), abi) is not None
        if len(here) == len(zig) > 1:  # the same name in snake_case
            for theirs, ours in zip(zig, here, strict=True):
                assert ours == theirs or ours == re.sub("(?<=[a-z0-9])([A-Z])", r"_\1", theirs).lower()


def test_cross_entropy(rng):
    loss = abi.CrossEntropyLoss(3)
    loss.forward([[1.0, 2.0, 3.0]], [2])
    np.testing.assert_allclose(loss.backward(), [[0.0900, 0.2447, -0.3348]], atol=1e-4)
    logits, labels = rng.normal(size=(7, 5)), np.array([0, 4, -1, 2, 3, 3, 1])
    for reduction in ("mean", "sum", "none"):
        loss = abi.CrossEntropyLoss(5, label_smoothing=0.2, reduction=reduction)
        loss.set_ignore_index(3)
        value = loss.forward(logits, labels)
        kept = np.where(labels == 3, -1, labels)
        losses, _, _, dz = cross_entropy_ref(logits, kept, 0.2)
        divisor = 4 if reduction == "mean" else 1
        assert loss.valid_count == 4
        assert value == loss.get_loss() == pytest.approx(losses.sum() / divisor, rel=1e-5)
        assert loss.get_perplexity() == pytest.approx(np.exp(value))
        np.testing.assert_allclose(loss.backward(), dz / divisor, atol=1e-6)
        np.testing.assert_allclose(loss.losses, losses, atol=1e-5)
    assert abi.CrossEntropyLoss(3).forward([[1.0, 2.0, 3.0]], [-1]) == 0.0
    with pytest.raises(DataError, match="must be"):
        loss.forward(logits, labels[:3])
    with pytest.raises(ConfigError, match="label_smoothing"):
        loss.set_label_smoothing(1.0)


def test_other_losses():
    assert abi.MSELoss().forward([1.0, 2.0], [0.0, 4.0]) == 2.5
    assert abi.MSELoss().backward([1.0, 2.0], [0.0, 4.0]).tolist() == [1.0, -2.0]
    p = np.array([[0.5, 0.5], [0.1, 0.9]])
    wanted = -(0.25 * 0.5**2 * np.log(0.5) + 0.25 * 0.9**2 * np.log(0.1)) / 2
    assert abi.FocalLoss().forward(p, [1, 0]) == pytest.approx(wanted)
    assert abi.kl_divergence([0.5, 0.5, 0], [0.25, 0.25, 0.5]) == pytest.approx(np.log(2))
    assert abi.kl_divergence([1.0, 0], [0, 1.0]) == np.inf
    assert abi.perplexity(np.log(7)) == pytest.approx(7)


def test_gradients():
    accumulator = abi.GradientAccumulator(3)
    with pytest.raises(DataError, match="no gradients"):
        accumulator.average()
    accumulator.add([1, 2, 3])
    accumulator.add([3, 4, 5])
    assert accumulator.average().tolist() == [2, 3, 4]
    weights = np.array([10, 20, 30], np.float32)
    accumulator.apply(weights, 0.1)
    np.testing.assert_allclose(weights, [9.8, 19.7, 29.6], rtol=1e-6)
    with pytest.raises(DataError, match="shape"):
        accumulator.add([1, 2])
    gradient = np.array([3, 4], np.float32)
    assert abi.clip_gradients(gradient, 10) == abi.clip_gradients(gradient, 0) == abi.clip_gradients(gradient, 1) == 5
    np.testing.assert_allclose(gradient, [0.6, 0.8], rtol=1e-6)
    config = abi.LlmTrainingConfig(learning_rate=1.0, lr_schedule="linear", min_learning_rate=0.0, decay_steps=4)
    assert abi.calculate_learning_rate(config, 1) == 0.75
    assert abi.calculate_learning_rate(config, 1, base_lr=0.4) == pytest.approx(0.3)


def test_mixed_precision_context():
    context = abi.MixedPrecisionContext(abi.MixedPrecisionConfig(enabled=True, initial_scale=1024))
    assert context.prepare_loss(2.0) == 2048
    gradients = np.array([1024, 2048], np.float32)
    assert context.process_gradients(gradients)
    assert (gradients.tolist(), context.should_skip_step()) == ([1, 2], False)
    assert not context.process_gradients(np.array([np.inf], np.float32))
    assert (context.should_skip_step(), context.get_stats().current_scale) == (True, 512)


def test_lora_adapter(rng):
    adapter = abi.LoraAdapter(6, 5, abi.LoraConfig(rank=4, alpha=8))
    assert adapter.scaling == 2.0
    x, dy = rng.normal(size=(3, 6)).astype(np.float32), rng.normal(size=(3, 5)).astype(np.float32)
    assert not adapter.forward(x).any()  # b begins at zero
    adapter.b[:] = rng.normal(size=(5, 4))
    delta = 2 * adapter.b @ adapter.a
    np.testing.assert_allclose(adapter.forward(x), x @ delta.T, atol=1e-5)
    np.testing.assert_allclose(adapter.backward(dy, x), dy @ delta, atol=1e-5)
    np.testing.assert_allclose(adapter.d_b, 2 * dy.T @ (x @ adapter.a.T), atol=1e-5)
    np.testing.assert_allclose(adapter.d_a, 2 * (dy @ adapter.b).T @ x, atol=1e-5)
    weights = np.zeros((5, 6), np.float32)
    adapter.merge_into(weights)
    np.testing.assert_allclose(weights, delta, atol=1e-6)
    assert adapter.num_params() == 4 * 11
    adapter.zero_grad()
    adapter.set_active(False)
    assert not adapter.d_a.any()
    assert not adapter.forward(x).any()


def test_store_and_files(tmp_path):
    store = abi.CheckpointStore(2)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        store.save_latest_to_file(tmp_path / "w.ckpt")
    for step in (1, 2, 3):
        store.add(step, np.full(4, step, np.float32))
    assert (store.count(), store.latest().step) == (2, 3)
    store.save_latest_to_file(tmp_path / "w.ckpt")
    loaded = abi.load_checkpoint(tmp_path / "w.ckpt")
    assert (loaded.step, loaded.weights.tolist()) == (3, [3, 3, 3, 3])
    abi.write_token_bin_file(tmp_path / "t.bin", [5, 6, 7])
    assert abi.read_token_bin_file(tmp_path / "t.bin").tolist() == [5, 6, 7]
    assert (tmp_path / "t.bin").read_bytes() == b"\5\0\0\0\6\0\0\0\7\0\0\0"


def test_logger(tmp_path):
    logger = abi.TrainingLogger(abi.LlmTrainingConfig(log_dir=tmp_path, enable_metrics_stream=True))
    logger.log_scalar("train/loss", 2.5, 7)
    logger.log_checkpoint("x.ckpt", 12, 7)
    logger.write_summary([abi.TrainingLogMetric("train/final_loss", 2.0)])
    logger.close()
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["type"] for record in records] == ["scalar", "checkpoint", "scalar"]
    assert (records[0]["tag"], records[0]["value"], records[0]["step"]) == ("train/loss", 2.5, 7)
    assert (records[1]["path"], records[1]["size"]) == ("x.ckpt", 12)
    assert (records[2]["tag"], records[2]["step"]) == ("train/final_loss", 0)
