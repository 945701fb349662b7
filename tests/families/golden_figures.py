"""The figures of a family's golden file (tests/golden/make_families.py), and how far this package is from them.

python tests/families/golden_figures.py           print the table of its differences
"""

import json
import tempfile
from pathlib import Path

import numpy as np

from abi_py.config import LlmTrainingConfig
from abi_py.formats.safetensors import write_safetensors
from abi_py.generation import generate
from abi_py.generation.decoder import Decoder
from abi_py.gradcheck import relative_error
from abi_py.training.loading import load_model
from abi_py.training.trainer import LlamaTrainer

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
TITLES = ("", "logits", "gradients", "ten AdamW steps", "greedy, cached", "greedy, uncached")


def stored(name):
    """Return the arrays of a golden file."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


def names():
    """Return the golden files of families."""
    found = []
    for path in sorted(GOLDEN.glob("*.npz")):
        with np.load(path) as file:
            if {"config", "segments"} <= set(file.files):
                found.append(path.stem)
    return found


class Figures:
    """The figures of a model, in a dict of arrays as `make_families.py` makes it, and that model from a folder."""

    def __init__(self, arrays, folder):
        self.arrays, self.folder = arrays, folder
        self.options = json.loads(str(arrays["options"]))
        self.marks = {"segment_ids": arrays["segments"]}

    def __getitem__(self, name):
        return self.arrays[name]

    def group(self, part):
        """Return the tensors of a part by the names of transformers' files."""
        return {key.partition("/")[2]: value for key, value in self.arrays.items() if key.startswith(f"{part}/")}

    def load(self, part="weight", **options):
        """Return a model from a folder whose weights are the tensors of a part."""
        folder = self.folder / part
        if not folder.is_dir():
            folder.mkdir()
            (folder / "config.json").write_text(str(self["config"]), encoding="utf-8")
            write_safetensors(folder / "model.safetensors", self.group(part))
        return load_model(folder, **options).model

    def by_our_names(self, part):
        """Return the tensors of a part, float32, as a model keeps them."""
        return dict(self.load(part).weights)

    # -- how far this package is from them -------------------------------------------------------

    def logits_off(self, model=None):
        """Return the largest difference of the logits."""
        found = (model or self.load()).forward(self["ids"], **self.marks)
        return np.abs(found - self["logits"]).max()

    def gradients_off(self):
        """Return the difference of the loss and its penalty, and by tensor the relative difference of its gradient."""
        model = self.load()
        model.zero_gradients()
        result = model.compute_loss(self["ids"], self["labels"], backward=True, **self.marks)
        gradients = self.by_our_names("gradient")
        off = {name: relative_error(model.gradients[name], gradient) for name, gradient in gradients.items()}
        penalty = sum(result.penalties.values())
        return abs(result.loss - float(self["loss"])) + abs(penalty - float(self["penalty"])), off

    def steps_off(self, **changes):
        """Return the relative differences of what ten steps tell, and by tensor those of the lengths of its end."""
        trainer = LlamaTrainer(self.load(), LlmTrainingConfig(**self.options, grad_accum_steps=1, **changes))
        batches = zip(self["step_ids"], self["step_labels"], strict=True)
        metrics = [trainer.train_step_with_metrics(*batch) for batch in batches]
        told = {
            "losses": [each.loss for each in metrics],
            "grad_norms": [each.grad_norm for each in metrics],
            "learning_rates": [each.learning_rate for each in metrics],
            "penalties": [sum(each.penalties.values()) for each in metrics],
        }
        off = {name: relative_error(values, self[name]) for name, values in told.items()}
        for name, expected in self.by_our_names("final").items():
            off[name] = np.linalg.norm(trainer.model.weights[name] - expected) / np.linalg.norm(expected)
        return off

    def greedy_off(self):
        """Return the largest differences of the logits from which text is written, with a cache and without.

        Infinity if it is another text.
        """
        model, prompt, expected = self.load(), self["prompt"][0], self["greedy"]
        written = generate(model, prompt, len(expected), temperature=0)
        uncached = model.forward(np.concatenate([prompt, expected[:-1]])[None])[0, len(prompt) - 1 :]
        decoder = Decoder(model)
        cached = [decoder.prefill(0, prompt).copy()]
        cached += [decoder.step(np.zeros(1, np.int32), expected[i : i + 1])[0].copy() for i in range(len(expected) - 1)]
        return tuple(
            np.abs(found - self["greedy_logits"]).max()
            if np.array_equal(found.argmax(-1), expected) and np.array_equal(written, expected)
            else np.inf
            for found in (np.array(cached), uncached)
        )

    def largest(self):
        """Return the largest difference of each kind, in the order of `TITLES`."""
        return (
            self.logits_off(),
            max(self.gradients_off()[1].values()),
            max(self.steps_off().values()),
            *self.greedy_off(),
        )


def print_table(rows):
    """Print (title, largest differences) as a table of Markdown."""
    print("| " + " | ".join(TITLES) + " |")
    print("|---" * len(TITLES) + "|")
    for title, found in rows:
        print(f"| {title} | " + " | ".join(f"{value:.0e}" for value in found) + " |", flush=True)


def golden_rows():
    """Yield the rows of the table."""
    for name in names():
        with tempfile.TemporaryDirectory() as folder:
            yield f"`{name}`", Figures(stored(name), Path(folder)).largest()


if __name__ == "__main__":
    print_table(golden_rows())
