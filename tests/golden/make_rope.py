"""Make the golden files of scaled RoPE: what transformers computes, in float32.

    python tests/golden/make_rope.py

    rope_scalings.json    frequencies and factors
    rope_dynamic.npz      config, weight/NAME, ids; logits of the last token of ids[:prompt], then of each further one,
                          over transformers' cache: beyond the row of training, frequencies change from token to token

This script needs PyTorch and transformers; the tests read only the files.
"""

import json
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 512}
FACTORS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
CASES = {  # name: scaling, max_position_embeddings, length of the row, head_dim, theta
    "linear": ({"rope_type": "linear", "factor": 2.5}, 1024, 100, 64, 1e4),
    "dynamic, no longer than in training": ({"rope_type": "dynamic", "factor": 4.0}, 128, 128, 64, 1e4),
    "dynamic, longer": ({"rope_type": "dynamic", "factor": 4.0}, 128, 129 + 71, 64, 1e4),
    "dynamic, longest": ({"rope_type": "dynamic", "factor": 2.0}, 128, 256, 6, 500.0),
    "yarn": (YARN, 1024, 100, 64, 1e4),
    "yarn, narrow": (YARN, 1024, 100, 6, 100.0),
    "yarn, betas": ({**YARN, "beta_fast": 8.0, "beta_slow": 2.0}, 1024, 100, 64, 1e6),
    "yarn, not truncated": ({**YARN, "truncate": False}, 1024, 100, 64, 1e4),
    "yarn, attention factor": ({**YARN, "attention_factor": 0.75}, 1024, 100, 64, 1e4),
    "yarn, mscales": ({**YARN, "mscale": 0.707, "mscale_all_dim": 1.5}, 1024, 100, 64, 1e4),
    "yarn, the longest row of training is that of the model": ({"rope_type": "yarn", "factor": 2.0}, 512, 9, 32, 1e4),
    "llama3": ({**LLAMA3, **FACTORS}, 4096, 100, 64, 5e5),
    "llama3, other factors": ({**LLAMA3, "low_freq_factor": 0.5, "high_freq_factor": 16.0}, 4096, 100, 64, 1e4),
    "llama3, of the model's own length": ({"rope_type": "llama3", "factor": 8.0, **FACTORS}, 300, 9, 32, 1e4),
}


def case(name):
    """Return a case and what transformers says of it."""
    scaling, longest, length, head_dim, theta = CASES[name]
    config = transformers.LlamaConfig(
        hidden_size=head_dim, num_attention_heads=1, head_dim=head_dim, max_position_embeddings=longest,
        rope_parameters={**scaling, "rope_theta": theta},
    )  # fmt: skip
    frequencies, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, torch.device("cpu"), seq_len=length)
    dynamic = scaling["rope_type"] == "dynamic"
    return {
        "name": name,
        "scaling": scaling,
        "max_seq_len": int(longest * scaling["factor"]) if dynamic else longest,
        "length": length,
        "head_dim": head_dim,
        "theta": theta,
        "frequencies": [float(f) for f in frequencies],
        "factor": factor,
        "changes": not (dynamic and length <= longest),
    }


def dynamic():
    """Return the arrays of rope_dynamic.npz."""
    rng, prompt = np.random.default_rng(5), 9
    config = transformers.LlamaConfig(
        vocab_size=29, hidden_size=12, intermediate_size=10, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=12, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=None, rope_parameters={"rope_type": "dynamic", "rope_theta": 100.0, "factor": 3.0},
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    for weight in model.parameters():
        value = rng.standard_normal(weight.shape) * (0.4 if weight.ndim == 2 else 0.2) + (weight.ndim == 1)
        weight.data = torch.tensor(value.astype(np.float16).astype(np.float32))
    ids = rng.integers(0, 29, 30)
    out = model(torch.tensor(ids[None, :prompt]), use_cache=True)
    logits = [out.logits[0, -1]]
    for token in ids[prompt:]:
        out = model(torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
        logits.append(out.logits[0, -1])
    weights = {
        f"weight/{name}": weight.detach().numpy().astype(np.float16) for name, weight in model.named_parameters()
    }
    config_text = json.dumps(config.to_dict())
    return {"config": config_text, "ids": ids.astype(np.int32), "prompt": prompt, **weights,
            "logits": torch.stack(logits).detach().numpy()}  # fmt: skip


if __name__ == "__main__":
    content = {"transformers": transformers.__version__, "cases": [case(name) for name in CASES]}
    path = Path(__file__).with_name("rope_scalings.json")
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    np.savez_compressed(path.with_name("rope_dynamic.npz"), **dynamic())
