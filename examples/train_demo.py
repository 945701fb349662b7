"""The ABI's training demo: a tiny Llama on four kinds of made-up sequences, written as a program of yours would be.

    python examples/train_demo.py

Takes a few seconds once the kernels are compiled.  Nothing is written.
"""

import time

import numpy as np

import abi_py as abi

VOCAB_SIZE = 256
SEQ_LEN = 32
SAMPLES = 16
EPOCHS = 3
BATCH_SIZE = 2
SEED = 42


def make_tokens() -> np.ndarray:
    """Return SAMPLES sequences of SEQ_LEN tokens, one after the other: counting, a period, two in turn, Fibonacci."""
    rng = np.random.default_rng(SEED)
    tokens = np.empty((SAMPLES, SEQ_LEN), np.uint32)
    for i in range(SAMPLES):
        start = int(rng.integers(VOCAB_SIZE))
        if i % 4 == 0:
            tokens[i] = (start + np.arange(SEQ_LEN)) % VOCAB_SIZE
        elif i % 4 == 1:
            tokens[i] = (start + np.arange(SEQ_LEN) % rng.integers(3, 6)) % VOCAB_SIZE
        elif i % 4 == 2:
            tokens[i] = np.where(np.arange(SEQ_LEN) % 2 == 0, start, rng.integers(VOCAB_SIZE))
        else:
            a, b = 1, 1 + start % 7
            for t in range(SEQ_LEN):
                tokens[i, t] = a
                a, b = b, (a + b) % VOCAB_SIZE
    return tokens.reshape(-1)


def main() -> None:
    """Make the model, train it batch by batch, report."""
    model = abi.TrainableModel(
        abi.TrainableModelConfig(
            hidden_dim=64,
            num_layers=2,
            num_heads=4,
            num_kv_heads=4,
            intermediate_dim=128,
            vocab_size=VOCAB_SIZE,
            max_seq_len=SEQ_LEN,
        )
    )
    print(f"model: {model.num_params():,} parameters")

    dataset = abi.TokenizedDataset.from_slice(make_tokens(), VOCAB_SIZE)
    print(f"data: {len(dataset)} tokens, {dataset.num_batches(BATCH_SIZE, SEQ_LEN)} batches an epoch")

    config = abi.LlmTrainingConfig(
        epochs=EPOCHS,
        batch_size=BATCH_SIZE,
        max_seq_len=SEQ_LEN,
        learning_rate=1e-4,
        lr_schedule=abi.LearningRateSchedule.WARMUP_COSINE,
        warmup_steps=2,
        decay_steps=20,
        min_learning_rate=1e-6,
        grad_accum_steps=1,
        max_grad_norm=1.0,
        weight_decay=0.01,
        optimizer=abi.OptimizerType.ADAMW,
        log_interval=1,
    )
    trainer = abi.LlamaTrainer(model, config)

    began = time.perf_counter()
    epoch_losses = []
    batches = dataset.batches(config.batch_size, config.max_seq_len, shuffle=True, seed=SEED)
    for epoch in range(config.epochs):
        batches.set_epoch(epoch)
        losses, accuracies = [], []
        while (batch := batches.next()) is not None:
            metrics = trainer.train_step_with_metrics(batch.input_ids, batch.labels)
            losses.append(metrics.loss)
            accuracies.append(metrics.accuracy)
            print(f"  batch {len(losses)}: loss={metrics.loss:.4f} acc={100 * metrics.accuracy:.2f}%")
        loss, accuracy = float(np.mean(losses)), float(np.mean(accuracies))
        epoch_losses.append(loss)
        print(f"epoch {epoch + 1}/{config.epochs}: loss={loss:.4f} ppl={np.exp(loss):.2f} acc={100 * accuracy:.2f}%")
    seconds = time.perf_counter() - began

    report = trainer.get_report()
    print(
        f"\nfinal: steps={report.total_steps} tokens={report.total_tokens} loss={report.final_loss:.4f} "
        f"ppl={report.final_perplexity:.2f} acc={100 * report.final_accuracy:.2f}% "
        f"time={1000 * seconds:.0f} ms toks/s={report.total_tokens / seconds:.0f}\n"
    )
    for epoch, loss in enumerate(epoch_losses):
        print(f"epoch {epoch + 1} {'#' * round(40 * loss / max(epoch_losses)):<40} {loss:.4f}")
    print("\nnext: abi-train run trains a model of some use; abi-train run --data YOUR_TEXT trains on yours")


if __name__ == "__main__":
    main()
