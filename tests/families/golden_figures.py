"""The figures of a family's golden file (tests/golden/make_families.py), and the folder that they are of."""

import json
from pathlib import Path

import numpy as np

from abi_py.formats.safetensors import write_safetensors
from abi_py.training.loading import load_model

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


class Figures:
    """The figures of a file, and the model that they are of."""

    def __init__(self, name, folder):
        with np.load(GOLDEN / f"{name}.npz") as stored:
            self.stored = {key: stored[key] for key in stored.files}
        self.folder = folder
        self.options = json.loads(str(self.stored["options"]))
        self.marks = {"segment_ids": self.stored["segments"]}

    def __getitem__(self, name):
        return self.stored[name]

    def group(self, part):
        """Return the tensors of a part by the names of transformers' files."""
        return {key.partition("/")[2]: value for key, value in self.stored.items() if key.startswith(f"{part}/")}

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
