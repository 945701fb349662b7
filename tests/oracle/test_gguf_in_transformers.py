"""Our GGUF files in transformers, `from_pretrained(folder, gguf_file=NAME)`: logits, and ids of odd texts.

It decodes a file to float32 or half precision, and reads less of the metadata than llama.cpp does (docs/7-gguf.md):
a config.json that is given beside the file says the rest.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from test_llama_cpp import made

from abi_py.data import Tokenizer
from abi_py.formats.companions import Companions
from abi_py.model import TrainableModel
from abi_py.model.frozen import FrozenModel

IDS = np.random.default_rng(1).integers(0, 300, (2, 48))
BY_ITSELF = ("llama", "untied", "mistral", "qwen2", "qwen3")
WITH_CONFIG = ("llama_3", "llama_biases", "linear", "yarn", "yarn_factor", "qwen3_moe", "gpt2", "gemma3")
GOLDEN = Path(__file__).parents[1] / "golden/gguf_tokenizers.npz"
# Of the thousand odd texts, how many get other ids.  transformers has one tokenizer for each kind: `llama`'s marks
# a space neither where a text begins with one nor after a special token, as llama.cpp does.
APART = {"bytes": 0, "trained": 0, "deepzig": 0, "llama3": 0, "qwen2": 0, "gpt2": 0, "sentencepiece": 100}
ITS_OWN = "<|endoftext|>"  # a token of every byte-level tokenizer that transformers makes, one more where there is none


@pytest.fixture
def opened(transformers, torch):
    """Return a function that opens a GGUF file and returns one from ids to logits."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    def open_file(path, **more):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, **more
        ).eval()

        def logits(ids):
            with torch.no_grad():
                return model(input_ids=torch.tensor(ids)).logits.numpy()

        return logits

    return open_file


@pytest.mark.parametrize("type", ["F32", "F16", "Q8_0", "Q4_K_M"])
@pytest.mark.parametrize("name", [*BY_ITSELF, *WITH_CONFIG])
def test_logits(name, type, opened, transformers, tmp_path):
    model, more = made(name), {}
    if name in WITH_CONFIG:
        model.save_pretrained(tmp_path / "folder")
        more["config"] = transformers.AutoConfig.from_pretrained(tmp_path / "folder")
    model.export_to_gguf(tmp_path / "m.gguf", type)
    ours = FrozenModel.from_gguf(tmp_path / "m.gguf").forward(IDS)
    assert np.ptp(ours) > 3
    assert np.abs(opened(tmp_path / "m.gguf", **more)(IDS) - ours).max() < 2e-5


@pytest.mark.parametrize("name", APART)
def test_ids(name, transformers, tmp_path):
    with np.load(GOLDEN) as stored:
        described, settings, _ = json.loads(stored[f"{name}.files"].tobytes())
        texts = json.loads(stored["texts"].tobytes())
    files = {"tokenizer.json": described, "tokenizer_config.json": settings}
    model = TrainableModel(made("llama").config.replace(vocab_size=1300, num_layers=1))
    model.companions = Companions({file: json.dumps(content).encode() for file, content in files.items()}, {})
    model.export_to_gguf(tmp_path / "m.gguf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    ours = Tokenizer.load(tmp_path / "m.gguf")
    if ITS_OWN not in described["model"]["vocab"]:
        texts = [text for text in texts if ITS_OWN not in text]
    apart = [text for text in texts if theirs.encode(text, add_special_tokens=False) != ours.encode(text)]
    assert len(apart) == APART[name], apart[:10]
