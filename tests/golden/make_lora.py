"""Make lora.npz: what PEFT on a Hugging Face Llama says of LoRA, and ten steps of AdamW in PyTorch on its adapters.

    python tests/golden/make_lora.py            make it
    python tests/golden/make_lora.py --check    make it in memory and compare; exit 1 if it differs

This script needs PyTorch, transformers and peft; the tests read only the .npz file.  It holds the frozen weights by
their Hugging Face names; adapters before and after the steps, and the gradients of the first step, by the names under
which PEFT saves them; the logits of the adapters; ids, labels, losses and norms of each step; the adapter_config.json
that PEFT has written (`saved_config`), and `meta`.  Everything is float64.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from stored import main, meta
from transformers import LlamaConfig, LlamaForCausalLM

SEED = 20240301
SHAPE = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
RANK, ALPHA = 4, 12
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STEPS, RATE, DECAY, MAX_NORM = 10, 1e-2, 0.1, 1.0


def build():
    """Return the model, with weights large enough to say something, and PEFT's adapters on it."""
    torch.manual_seed(SEED)
    config = LlamaConfig(**SHAPE, bos_token_id=None, eos_token_id=None, pad_token_id=0, attn_implementation="eager")
    model = LlamaForCausalLM(config).double()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(6.0) if weight.ndim > 1 else weight.add_(0.2 * torch.randn_like(weight))
    base = {name: weight.detach().numpy().copy() for name, weight in model.named_parameters()}
    lora = LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=TARGETS, bias="none", task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, lora).double()
    model.config.pretraining_tp = 1
    return base, model


def adapters(model):
    """Return copies of the adapters by the names under which PEFT saves them."""
    return {name: w.detach().numpy().copy() for name, w in get_peft_model_state_dict(model).items()}


def gradients(model):
    """Return the adapters' gradients by the same names."""
    named = model.named_parameters()
    return {name.replace(".default", ""): w.grad.numpy().copy() for name, w in named if w.requires_grad}


def saved(model):
    """Return names and shapes of the tensors in PEFT's file, and its config."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        names = {name: list(w.shape) for name, w in load_file(Path(folder) / "adapter_model.safetensors").items()}
        config = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
        config["target_modules"].sort()  # a set in PEFT, so in another order each time
        return names, config


def make():
    """Return the arrays of the file."""
    base, model = build()
    initial = adapters(model)
    rng = np.random.default_rng(SEED)
    ids = rng.integers(0, SHAPE["vocab_size"], (STEPS, 2, 12))
    labels = np.concatenate([ids[:, :, 1:], np.full((STEPS, 2, 1), -100)], axis=2)  # next token, none after the last
    labels[:, 1, :3] = -100
    trained = [w for w in model.parameters() if w.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=DECAY)
    losses, norms, first = [], [], {}
    for step in range(STEPS):
        optimizer.zero_grad()
        logits = model(input_ids=torch.tensor(ids[step])).logits
        targets = torch.tensor(labels[step]).flatten()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets, ignore_index=-100)
        loss.backward()
        if step == 1:
            first = gradients(model)  # of the second step: in the first, B is zero and so is the gradient of A
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, MAX_NORM)))
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(ids[0])).logits.numpy()
    names, config = saved(model)
    options = {"rate": RATE, "decay": DECAY, "max_norm": MAX_NORM, "shape": SHAPE, "rank": RANK, "alpha": ALPHA}
    arrays = {"ids": ids.astype(np.int32), "labels": labels.astype(np.int32), "losses": losses, "norms": norms}
    arrays |= {"logits": logits, "options": json.dumps(options)}
    arrays |= {"saved_names": json.dumps(names), "saved_config": json.dumps(config)}
    groups = (("base", base), ("initial", initial), ("second_gradient", first), ("final", adapters(model)))
    for group, tensors in groups:
        arrays |= {f"{group}/{name}": tensor for name, tensor in tensors.items()}
    return arrays | meta(SEED, "python tests/golden/make_lora.py", torch, transformers, peft)


if __name__ == "__main__":
    main(__doc__, {"lora": make}, lambda name, array: (1e-7, 1e-9))
