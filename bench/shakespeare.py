"""Train one small model on a text twice, here and in PyTorch, from the same weights on the same batches.

    python bench/shakespeare.py tinyshakespeare.txt --peer-python venv-with-torch/bin/python --save

Six layers of 256 (shape `small`), a byte-level BPE of 4096 tokens trained on the first 90 % of the text, 400 steps of
2048 tokens; the last 10 % of the text is for validation.  Prints loss and bits per byte of both at each evaluation,
and the time of the training steps; --save keeps them as a table and a curve.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import numba
import numpy as np
from _bench import header, run_script, save_rows
from shapes import SHAPES
from worker import first_weights

ROOT = Path(__file__).resolve().parents[1]
VOCAB_SIZE, TRAIN_SHARE, SEED = 4096, 0.9, 0
SETTINGS = {
    "learning_rate": 1e-3, "min_learning_rate": 1e-4, "warmup_steps": 20, "weight_decay": 0.1,
    "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8, "max_grad_norm": 1.0,
}  # fmt: skip


def prepare(text, steps):
    """Return the batches of all steps, those of the validation, and the bytes that the latter's labels mean."""
    from abi_py.data.tokenizer_training import train_tokenizer
    from abi_py.data.tokens import TokenizedDataset

    shape, cut = SHAPES["small"], int(len(text) * TRAIN_SHARE)
    tokenizer = train_tokenizer([text[:cut]], vocab_size=VOCAB_SIZE)
    parts = [TokenizedDataset.from_slice(tokenizer.encode_plain(part)) for part in (text[:cut], text[cut:])]
    stream = parts[0].batches(shape.batch_size, shape.seq_len, seed=SEED, drop_last=True)
    batches = []
    while len(batches) < steps:
        batch = stream.next()
        if batch is None:
            stream.reset()
        else:
            batches.append((batch.input_ids, batch.labels))
    rest = parts[1].batches(shape.batch_size, shape.seq_len, shuffle=False, drop_last=True)
    validation = [(b.input_ids, b.labels) for b in rest]
    size = sum(len(tokenizer.decode(row.tolist()).encode()) for _, labels in validation for row in labels)
    return np.array(batches, np.int32), np.array(validation, np.int32), size


def train_here(batches, validation, interval, report):
    """Train with LlamaTrainer; call report(step, validation loss, seconds of training so far)."""
    from abi_py.config import LlmTrainingConfig, TrainableModelConfig
    from abi_py.model import TrainableModel
    from abi_py.training.trainer import LlamaTrainer

    shape = SHAPES["small"]._replace(vocab_size=VOCAB_SIZE)
    model = TrainableModel(TrainableModelConfig(**shape.model_fields()))
    for name, weight in first_weights(shape):
        model.weights[name][...] = weight
    config = LlmTrainingConfig(
        **SETTINGS, decay_steps=len(batches), grad_accum_steps=1, batch_size=shape.batch_size, max_seq_len=shape.seq_len
    )
    trainer = LlamaTrainer(model, config)
    for step, (ids, labels) in enumerate(batches, 1):
        trainer.train_step(ids, labels)
        if step % interval == 0 or step == len(batches):
            losses = [model.compute_loss(*pair) for pair in validation]
            mean = sum(out.loss_sum for out in losses) / sum(out.num_tokens for out in losses)
            report(step, mean, trainer.state.train_ns / 1e9)


def train_there(python, batches, validation, interval, report):
    """The same by the PyTorch worker, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        given = Path(folder) / "batches.npz"
        np.savez(given, batches=batches, validation=validation)
        script = ROOT / "bench/peers/torch_shakespeare.py"
        words = [python, str(script), str(given), json.dumps(SETTINGS), str(interval)]
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                if line.startswith("{"):
                    report(**json.loads(line))
    if process.returncode:
        raise SystemExit(f"the PyTorch worker ended with {process.returncode}; see its message above")


def plot(rows, path):
    """Draw validation bits per byte over steps."""
    from abi_py.runs.curves import Curve, Panel, draw

    curves = []
    for number, (name, style) in enumerate((("abi_py", "-"), ("torch", "--"))):
        mine = [row for row in rows if row["trainer"] == name]
        if mine:
            curves.append(Curve(name, [r["step"] for r in mine], [r["bits_per_byte"] for r in mine], number, style))
    draw(path, [Panel("validation, bits per byte", curves)], "step of 2048 tokens")


def main():
    """Run both and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path, help="a text in UTF-8; the figures of the docs are of tinyshakespeare")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--interval", type=int, default=50, help="steps between evaluations")
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has torch")
    parser.add_argument("--save", action="store_true", help="keep table and curve")
    options = parser.parse_args()
    if options.steps < SETTINGS["warmup_steps"]:
        parser.error(f"--steps must be at least {SETTINGS['warmup_steps']}, the steps of warm-up")
    batches, validation, size = prepare(options.text.read_text(encoding="utf-8"), options.steps)
    labels = validation[:, 1].size
    print(f"{batches[:, 0].size:,} tokens of training, {labels:,} of validation = {size:,} bytes")
    rows = []

    def reporter(name):
        def report(step, loss, seconds):
            bits = loss * labels / math.log(2) / size
            rows.append(
                {"trainer": name, "step": step, "loss": round(loss, 5), "bits_per_byte": round(bits, 5),
                 "train_seconds": round(seconds, 1)}
            )  # fmt: skip
            print(f"{name:8} step {step:4}  loss {loss:.4f}  {bits:.4f} bits/byte  {seconds:6.1f} s", flush=True)

        return report

    train_here(batches, validation, options.interval, reporter("abi_py"))
    train_there(options.peer_python, batches, validation, options.interval, reporter("torch"))
    if options.save:
        save_rows([header("shakespeare", numba.get_num_threads()) | row for row in rows], "-shakespeare")
        plot(rows, ROOT / "docs/shakespeare.svg")


if __name__ == "__main__":
    run_script(main)
