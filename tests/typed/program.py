"""A program over the documented names, for a type checker alone: each type is what it is said to be."""

import numpy as np
import numpy.typing as npt
from typing_extensions import assert_type

import abi_py as abi
from abi_py.kernels.rms_norm import rms_norm_forward, rms_norm_forward_ref

tokens = abi.TokenizedDataset.from_slice([i % 20 for i in range(500)], 20)
train, valid = tokens.split(0.8)
shape = abi.TrainableModelConfig(
    hidden_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_dim=64, vocab_size=20, family="qwen2"
)
model = abi.TrainableModel(shape)
config = abi.LlmTrainingConfig(batch_size=2, learning_rate=1e-2, optimizer="adamw", lr_schedule="constant")
assert_type(config.optimizer, abi.OptimizerType)
assert_type(config.replace(epochs=1), abi.LlmTrainingConfig)
assert_type(config.checkpoint_path, str | None)
assert_type(model.num_params(), int)
assert_type(abi.LoraModel(model, abi.LoraConfig(rank=4, target_modules=["q", "v"])), abi.LoraModel)

trainer = abi.LlamaTrainer(model, config)
assert_type(trainer.fit(train, valid, abi.EarlyStoppingConfig(patience=2)), abi.TrainingReport)
assert_type(trainer.evaluate(valid), abi.EvalResult)
assert_type(trainer.loss_history, list[float])
for batch in train.batches(4, 16, shuffle=True, seed=0):
    assert_type(batch.input_ids, npt.NDArray[np.uint32])
    assert_type(trainer.train_step_with_metrics(batch.input_ids, batch.labels), abi.StepMetrics)
    assert_type(model.compute_loss(batch.input_ids, batch.labels), abi.LossOutput)

tokenizer = abi.Tokenizer.load("tokenizer.json")
assert_type(tokenizer.encode("text"), list[int])
assert_type(abi.generate(model, "text", 5, tokenizer=tokenizer), str)
assert_type(abi.generate(model, [1, 2], 5), npt.NDArray[np.int32])
assert_type(abi.Generator(model).run([[1, 2]], max_new_tokens=3), list[abi.Generation])

x, w = np.ones((2, 3), np.float32), np.ones(3, np.float32)
y, r = rms_norm_forward_ref(x, w, 1e-5)
assert_type(y, np.ndarray)
rms_norm_forward(np.empty_like(x), np.empty(2, np.float32), x, w, eps=1e-5)

# What is wrong is found: an ignore that finds nothing is an error under --strict.
rms_norm_forward(x, w)  # type: ignore[call-arg]
abi.LlamaTrainr()  # type: ignore[attr-defined]
abi.LlmTrainingConfig(batch_size="four")  # type: ignore[arg-type]
abi.LlmTrainingConfig(batchsize=4)  # type: ignore[call-arg]
config.epochs = 3  # type: ignore[misc]
config.optimizer = "sgd"  # type: ignore[misc]
