"""The ABI's training demo: a tiny Llama on four kinds of made-up sequences, written as a program of yours would be.

    python examples/train_demo.py

The model and the steps are the ABI's.  Its 16 sequences and 21 steps at a rate of 1e-4 leave the loss where chance is,
ln 256 = 5.5; here are more sequences and a larger rate, so that the model learns the rules, and shows it on beginnings
that it has not seen.  Takes a few seconds once the kernels are compiled.  Nothing is written.
"""

import time

import numpy as np

import abi_py as abi

VOCAB_SIZE = 256
SEQ_LEN = 32
SAMPLES = 1024
EPOCHS = 5
BATCH_SIZE = 16
SEED = 42
PRINT_EVERY = 16  # batches
KINDS = ("counting", "a period", "two in turn", "Fibonacci")


def make_sequence(kind: int, rng: np.random.Generator) -> np.ndarray:
    """Return SEQ_LEN tokens of one of the KINDS."""
    start, places = int(rng.integers(VOCAB_SIZE)), np.arange(SEQ_LEN)
    if kind == 0:
        return (start + places) % VOCAB_SIZE
    if kind == 1:
        return (start + places % rng.integers(3, 6)) % VOCAB_SIZE
    if kind == 2:
        return np.where(places % 2 == 0, start, rng.integers(VOCAB_SIZE))
    tokens = [1, 1 + start % 7]
    while len(tokens) < SEQ_LEN:
        tokens.append(sum(tokens[-2:]) % VOCAB_SIZE)
    return np.array(tokens)


def make_tokens(samples: int, seed: int) -> np.ndarray:
    """Return so many sequences, one after the other, of each kind in turn."""
    rng = np.random.default_rng(seed)
    return np.concatenate([make_sequence(i % len(KINDS), rng) for i in range(samples)]).astype(np.uint32)


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

    dataset = abi.TokenizedDataset.from_slice(make_tokens(SAMPLES, SEED), VOCAB_SIZE)
    print(f"data: {len(dataset)} tokens, {dataset.num_batches(BATCH_SIZE, SEQ_LEN)} batches an epoch")

    config = abi.LlmTrainingConfig(
        epochs=EPOCHS,
        batch_size=BATCH_SIZE,
        max_seq_len=SEQ_LEN,
        learning_rate=1e-2,
        lr_schedule=abi.LearningRateSchedule.WARMUP_COSINE,
        warmup_steps=20,
        decay_steps=EPOCHS * dataset.num_batches(BATCH_SIZE, SEQ_LEN),
        min_learning_rate=1e-4,
        grad_accum_steps=1,
        max_grad_norm=1.0,
        weight_decay=0.01,
        optimizer=abi.OptimizerType.ADAMW,
        num_threads=1,  # a model so small is as fast on one
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
            if len(losses) % PRINT_EVERY == 0:
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
    print(f"\nchance is {np.log(VOCAB_SIZE):.4f}; half of each of four new sequences, and how the model goes on:")
    unseen = make_tokens(len(KINDS), SEED + 1).reshape(len(KINDS), SEQ_LEN)
    for kind, tokens in zip(KINDS, unseen):
        half = SEQ_LEN // 2
        made = abi.generate(model, tokens[:half].tolist(), half, temperature=0)
        right = int((made == tokens[half:]).sum())
        print(f"{kind:<12} {' '.join(map(str, tokens[half - 4 : half]))} -> {' '.join(map(str, made[:8]))}", end=" ")
        print(f"... {right} of {half} right")
    print("\nnext: abi-train run trains a model of some use; abi-train run --data YOUR_TEXT trains on yours")


if __name__ == "__main__":
    main()
