"""Make folders.json: how `transformers` reads folders whose files disagree, leave something out, or say it elsewhere.

    python tests/golden/make_folders.py            make it
    python tests/golden/make_folders.py --check    make it in memory and compare; exit 1 if it differs

This script needs PyTorch and transformers; the tests read only the .json file, which holds

    theta   [changes of config.json, the base of RoPE that the model then computes with]
    stops   [generation_config.json or null, changes of config.json, eos_token_id that `generate` uses]
    tokens  [tokenizer_config.json, special_tokens_map.json or null, {"eos_token": ... that the tokenizer has}]
    logits  of a small tied model of `shape` with `weights` (times 64) for `ids`
"""

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path

import numpy as np
import tokenizers
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

PATH = Path(__file__).resolve().with_name("folders.json")
SEED = 20240229
SHAPE = {
    "vocab_size": 13,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 16,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
IDS = [3, 1, 4, 1, 5, 9, 2, 6]
DEFAULT = {"rope_type": "default"}
THETA = [
    {},
    {"rope_theta": 500.0},
    {"rope_theta": 500.0, "rope_parameters": {**DEFAULT, "rope_theta": 700.0}},
    {"rope_theta": 500.0, "rope_parameters": DEFAULT},
    {"rope_theta": 500.0, "rope_parameters": None, "rope_scaling": None},
    {"rope_theta": 500.0, "rope_scaling": {**DEFAULT, "rope_theta": 900.0}, "rope_parameters": {"rope_theta": 700.0}},
    {"rope_theta": 500.0, "rope_scaling": {"type": "default"}, "rope_parameters": {"rope_theta": 700.0}},
    {"rope_theta": 500.0, "rope_scaling": {}, "rope_parameters": {"rope_theta": 700.0}},
    {"rope_theta": 500.0, "rope_base": 900.0, "qk_rope_base": 300.0},
]
STOPS = [
    [None, {}],
    [None, {"eos_token_id": None}],
    [None, {"eos_token_id": 7}],
    [None, {"eos_token_id": [7, 3]}],
    [{"eos_token_id": 9}, {"eos_token_id": 7}],
    [{"eos_token_id": [9, 8]}, {"eos_token_id": None}],
]
NAMES = ["<|endoftext|>", "<|im_end|>", "<s>", "</s>"]
END, TURN = NAMES[:2]
TOKENS = [
    [{"eos_token": TURN, "bos_token": "<s>"}, None],
    [{}, {"eos_token": END}],
    [{"eos_token": TURN}, {"eos_token": END}],
    [{"eos_token": TURN, "bos_token": "<s>"}, {"eos_token": END, "pad_token": "</s>"}],
    [{"eos_token": None}, {"eos_token": END}],
    [{}, {"eos_token": {"content": END, "lstrip": False}}],
    [{"eos_token": {"content": TURN, "__type": "AddedToken", "lstrip": False}}, None],
    [{"eos_token": TURN, "added_tokens_decoder": {}}, {"eos_token": END}],
]


def weights():
    """Return the tensors of the model by Hugging Face's names: integers over 64, so that every format holds them."""
    rng = np.random.default_rng(SEED)
    config = transformers.LlamaConfig(**SHAPE)
    shapes = {
        name: tuple(tensor.shape) for name, tensor in AutoModelForCausalLM.from_config(config).state_dict().items()
    }
    shapes.pop("lm_head.weight")
    return {name: rng.integers(-40, 41, shapes[name]).astype(np.float32) / 64 for name in sorted(shapes)}


def folder(root, **changes):
    """Write config.json and the weights."""
    root = Path(root)
    for file in root.iterdir():
        file.unlink()
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **SHAPE, **changes}
    (root / "config.json").write_text(json.dumps(config))
    save_file(
        {name: torch.tensor(value) for name, value in weights().items()}, root / "model.safetensors", {"format": "pt"}
    )
    return root


def theta(root, changes):
    """Return the base of RoPE, from the frequencies of the loaded model."""
    frequencies = AutoModelForCausalLM.from_pretrained(folder(root, **changes)).model.rotary_emb.inv_freq.double()
    return float(f"{math.exp(-math.log(frequencies[1]) * len(frequencies)):.4g}")


def stops(root, generation, changes):
    """Return the ids that end a text."""
    root = folder(root, **changes)
    if generation is not None:
        (root / "generation_config.json").write_text(json.dumps(generation))
    return AutoModelForCausalLM.from_pretrained(root).generation_config.eos_token_id


def tokens(root, config, names):
    """Return the special tokens of a tokenizer."""
    root = Path(root)
    for file in root.iterdir():
        file.unlink()
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    backend.add_special_tokens(NAMES)
    backend.save(str(root / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    (root / "tokenizer_config.json").write_text(json.dumps(config))
    if names is not None:
        (root / "special_tokens_map.json").write_text(json.dumps(names))
    read = AutoTokenizer.from_pretrained(root)
    return {key: getattr(read, key) for key in ("bos_token", "eos_token", "pad_token")}


def make():
    """Return the content of the file."""
    with tempfile.TemporaryDirectory() as root, torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder(root), dtype=torch.float32)(torch.tensor([IDS])).logits[0]
        content = {
            "theta": [[changes, theta(root, changes)] for changes in THETA],
            "stops": [[*case, stops(root, *case)] for case in STOPS],
            "tokens": [[*case, tokens(root, *case)] for case in TOKENS],
            "names": NAMES,
            "shape": SHAPE,
            "ids": IDS,
            "logits": [[round(float(x), 5) for x in row] for row in logits],
            "weights": {name: (tensor * 64).astype(int).tolist() for name, tensor in weights().items()},
        }
    content["meta"] = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "seed": SEED,
        "command": "python tests/golden/make_folders.py",
    }
    return json.loads(json.dumps(content))


def main():
    """Make or check the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with the stored file instead of writing it")
    content = make()
    if not parser.parse_args().check:
        PATH.write_text(json.dumps(content) + "\n", encoding="utf-8")
        print(f"{PATH.name}: {PATH.stat().st_size / 1000:.0f} KB")
        return
    stored = json.loads(PATH.read_text(encoding="utf-8"))
    differ = [key for key in content if key not in ("meta", "logits") and content[key] != stored[key]]
    if not np.allclose(content["logits"], stored["logits"], atol=1e-4):
        differ.append("logits")
    print(*(f"{key} differs" for key in differ), sep="\n", end="\n" if differ else "")
    sys.exit(1 if differ else 0)


if __name__ == "__main__":
    main()
