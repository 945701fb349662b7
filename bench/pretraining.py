"""Train one small model on a text with AdamW and Muon, by a cosine and by wsd: the same weights, batches and budget.

    python bench/pretraining.py tinyshakespeare.txt --save

Bytes of the text, its last 10 % for validation; each of the four choices is tried with each of RATES, and the one whose
validation loss is lowest at the end is drawn.  Prints the loss of all at the end; --save keeps every curve as a table,
and those four as docs/pretraining.svg.
"""

import argparse
import itertools
from pathlib import Path

import numba
import numpy as np
from _bench import header, run_script, save_rows

ROOT = Path(__file__).resolve().parents[1]
TRAIN_SHARE, STEPS, INTERVAL = 0.9, 400, 40
RATES = 0.001, 0.003, 0.01, 0.03
CHOICES = tuple(itertools.product(("adamw", "muon"), ("cosine", "wsd")))
SHAPE = {
    "hidden_dim": 96, "num_layers": 3, "num_heads": 4, "num_kv_heads": 4, "intermediate_dim": 256, "vocab_size": 256,
    "max_seq_len": 128, "seed": 0,
}  # fmt: skip
SETTINGS = {
    "batch_size": 8, "max_seq_len": 128, "grad_accum_steps": 1, "warmup_steps": 40, "decay_steps": STEPS,
    "weight_decay": 0.1, "beta2": 0.95, "eval_interval": 0, "log_interval": 0, "checkpoint_interval": 0,
}  # fmt: skip
WSD = {"cooldown_share": 0.2}


def curve(parts, optimizer, schedule, rate):
    """Yield step and validation loss (nats a byte) of a training with these choices."""
    from abi_py.config import LlmTrainingConfig, TrainableModelConfig
    from abi_py.model import TrainableModel
    from abi_py.training.trainer import LlamaTrainer

    own = WSD if schedule == "wsd" else {}
    chosen = {"optimizer": optimizer, "lr_schedule": schedule, "learning_rate": rate, "min_learning_rate": rate / 10}
    config = LlmTrainingConfig(**SETTINGS, **chosen, **own)
    trainer = LlamaTrainer(TrainableModel(TrainableModelConfig(**SHAPE)), config)
    sizes = config.batch_size, config.max_seq_len
    validation = list(parts[1].batches(*sizes, shuffle=False, drop_last=True))
    stream = parts[0].batches(*sizes, seed=0, drop_last=True)
    for step in range(1, STEPS + 1):
        batch = stream.next()
        if batch is None:
            raise SystemExit(f"the text is too short for {STEPS} steps of {sizes[0] * sizes[1]} bytes")
        trainer.train_step(batch.input_ids, batch.labels)
        if step % INTERVAL == 0:
            outs = [trainer.model.compute_loss(each.input_ids, each.labels) for each in validation]
            yield step, sum(out.loss_sum for out in outs) / sum(out.num_tokens for out in outs)


def best(rows):
    """Return for each choice the rows of the rate that ends lowest."""
    found = {}
    for choice in CHOICES:
        mine = [row for row in rows if (row["optimizer"], row["schedule"]) == choice]
        last = min((row for row in mine if row["step"] == STEPS), key=lambda row: row["loss"])
        found[choice] = [row for row in mine if row["rate"] == last["rate"]]
    return found


def plot(rows, path):
    """Draw validation loss over steps."""
    from abi_py.runs.curves import Curve, Panel, draw

    curves = []
    for (optimizer, schedule), mine in best(rows).items():
        colour, style = {"adamw": 0, "muon": 1}[optimizer], {"cosine": "-", "wsd": "--"}[schedule]
        label = f"{optimizer}, {schedule}, rate {mine[0]['rate']:g}"
        curves.append(Curve(label, [row["step"] for row in mine], [row["loss"] for row in mine], colour, style))
    draw(path, [Panel("validation loss, nats a byte", curves, limits=(1.4, 3.0))], "step of 1024 bytes")


def main():
    """Measure what the command line asks for."""
    from abi_py.data.tokens import TokenizedDataset

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="a text file of about a megabyte")
    parser.add_argument("--save", action="store_true", help="keep the curves in bench/results/ and docs/")
    options = parser.parse_args()
    text = np.frombuffer(options.text.read_bytes(), np.uint8)
    cut = int(len(text) * TRAIN_SHARE)
    held_out = text[cut:][: 8 * 8 * 128 + 1]  # eight batches
    parts = [TokenizedDataset.from_slice(part.astype(np.int64)) for part in (text[:cut], held_out)]
    rows = []
    for (optimizer, schedule), rate in itertools.product(CHOICES, RATES):
        name = {"optimizer": optimizer, "schedule": schedule, "rate": rate}
        for step, loss in curve(parts, optimizer, schedule, rate):
            rows.append({**name, "step": step, "loss": round(loss, 4)})
        print(f"{optimizer:6} {schedule:7} rate {rate:<6g} validation loss {loss:.4f} after {STEPS} steps", flush=True)
    if options.save:
        save_rows([header("pretraining", numba.get_num_threads()) | row for row in rows], "-pretraining")
        plot(rows, ROOT / "docs/pretraining.svg")


if __name__ == "__main__":
    run_script(main)
