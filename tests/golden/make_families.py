"""Make the golden files of whole families: what transformers says of a small model of each, from random weights.

    python tests/golden/make_families.py            make all
    python tests/golden/make_families.py qwen2      make one
    python tests/golden/make_families.py --check    make all in memory and compare; exit 1 if one differs

This script needs PyTorch and transformers; the tests read only the .npz files.  Each holds

    config             the text of config.json, as transformers saves it
    ids, labels        (B, T); labels are those of the same place (already shifted), some of them ignored
    logits, loss       of the weights; mean over the labels that are not ignored
    weight/NAME        by Hugging Face's names, exact in float16
    gradient/NAME      of the loss
    options            of the optimizer steps, by our names
    step_ids, step_labels, losses, grad_norms, learning_rates, final/NAME
    prompt, greedy     (1, T) and the ids that `generate` writes after it, with its cache
    greedy_logits      from which each of these was chosen, without a cache

Everything is computed in float64 on one thread; gradients and final weights are stored in float32.  A family's biases
are far from zero and its norms far from one, so that nothing can be left out without being seen.
"""

import json
import math
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from stored import main, meta
from torch.nn import functional
from transformers.models.qwen2 import modeling_qwen2

IGNORE, STEPS, NEW = -100, 10, 20
QWEN2 = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    # A fast rotation: where it is slow, k's bias has next to no gradient, and Adam makes steps of what rounding left.
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
# A rate and a decay that tell after ten steps, beyond the tolerance of 1e-3, whether a tensor decays.
OPTIONS = {
    "optimizer": "adamw", "beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8, "weight_decay": 0.1, "max_grad_norm": 1.0,
    "learning_rate": 1e-2, "min_learning_rate": 1e-4, "warmup_steps": 5, "decay_steps": 20,
}  # fmt: skip


class Norm(modeling_qwen2.Qwen2RMSNorm):
    """Qwen2's norm by its definition: transformers' rounds to float32 on the way, whatever the weights are."""

    def forward(self, x):
        """Return x brought to unit root-mean-square, times the weight."""
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon) * self.weight


class Rotation(modeling_qwen2.Qwen2RotaryEmbedding):
    """Qwen2's angles by their definition, for the same reason."""

    def forward(self, x, position_ids):
        """Return cosines and sines (B, T, D), the same in both halves of D."""
        D = 2 * len(self.inv_freq)
        theta = self.config.rope_parameters["rope_theta"]
        frequencies = theta ** (-torch.arange(0, D, 2, dtype=x.dtype) / D)
        angles = (position_ids[..., None] * frequencies).repeat(1, 1, 2)
        return angles.cos(), angles.sin()


def qwen2(seed, tied):
    """Return a Qwen2 in float64."""
    config = transformers.Qwen2Config(**QWEN2, tie_word_embeddings=tied, attn_implementation="sdpa")
    model = transformers.Qwen2ForCausalLM(config).double().eval()
    fill(model, seed)
    ids = torch.arange(1, 60, 7)[None]
    rounded = model(ids).logits
    for module in list(model.modules()):
        if isinstance(module, modeling_qwen2.Qwen2RMSNorm):
            module.__class__ = Norm
    model.model.rotary_emb.__class__ = Rotation
    gap = (model(ids).logits - rounded).abs().max().item()
    assert 0 < gap < 1e-4, gap  # what was replaced is the same, and was rounded
    return model


def fill(model, seed):
    """Give a model weights that say something, each exact in float16, so that every dtype has the same."""
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            normal = rng.standard_normal(weight.shape)
            if weight.ndim == 2:
                value = 0.25 * normal
            else:
                value = 0.5 * normal if name.endswith("bias") else 1 + 0.2 * normal
            weight.copy_(torch.tensor(value.astype(np.float16).astype(np.float64)))


def config_text(model):
    """Return config.json as transformers saves it."""
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        return Path(folder, "config.json").read_text(encoding="utf-8")


def copies(model, dtype):
    """Return the weights by name."""
    return {name: weight.detach().numpy().astype(dtype) for name, weight in model.named_parameters()}


def loss_of(model, ids, labels):
    """Return logits (B, T, V), and the mean over the labels that are not ignored; nothing is shifted."""
    logits = model(input_ids=torch.tensor(ids)).logits
    return logits, functional.cross_entropy(logits.flatten(0, 1), torch.tensor(labels).flatten(), ignore_index=IGNORE)


def once(model, rng):
    """Return logits, loss and every gradient of one batch."""
    ids, labels = rng.integers(0, model.config.vocab_size, (2, 3, 13))
    labels[0, 3] = labels[1, :4] = labels[2, 12] = IGNORE
    logits, loss = loss_of(model, ids, labels)
    loss.backward()
    arrays = {"ids": ids.astype(np.int32), "labels": labels.astype(np.int32)}
    arrays |= {"logits": logits.detach().numpy(), "loss": loss.item()}
    named = model.named_parameters()
    return arrays | {f"gradient/{name}": weight.grad.numpy().astype(np.float32) for name, weight in named}


def learning_rate(step):
    """Warm-up from a part of the rate, then half a cosine to the smallest rate; `step` counts from 0."""
    base, least, warmup = OPTIONS["learning_rate"], OPTIONS["min_learning_rate"], OPTIONS["warmup_steps"]
    if step < warmup:
        return base * (step + 1) / warmup
    p = min(1.0, (step - warmup) / (OPTIONS["decay_steps"] - warmup))
    return least + (base - least) * 0.5 * (1 + math.cos(math.pi * p))


def steps(model, rng):
    """Return ten steps of AdamW with decay on matrices alone, and clipping; the data count up in strides."""
    V = model.config.vocab_size
    first, stride = rng.integers(0, V, (STEPS, 3, 1)), rng.integers(1, 4, (STEPS, 3, 1))
    tokens = (first + stride * np.arange(12)) % V  # (steps, 3, 12), of which 11 are read
    ids, labels = tokens[:, :, :-1], tokens[:, :, 1:].copy()
    labels[:, 1, :2] = IGNORE
    weights = list(model.parameters())
    groups = [
        {"params": [w for w in weights if w.ndim == 2], "weight_decay": OPTIONS["weight_decay"]},
        {"params": [w for w in weights if w.ndim == 1], "weight_decay": 0.0},
    ]
    betas = (OPTIONS["beta1"], OPTIONS["beta2"])
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=betas, eps=OPTIONS["epsilon"], foreach=False)
    losses, norms, rates = [], [], [learning_rate(step) for step in range(STEPS)]
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = rates[step]
        optimizer.zero_grad()
        _, loss = loss_of(model, ids[step], labels[step])
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(weights, OPTIONS["max_grad_norm"]).item())
        optimizer.step()
        losses.append(loss.item())
    arrays = {"options": json.dumps(OPTIONS), "losses": losses, "grad_norms": norms, "learning_rates": rates}
    arrays |= {"step_ids": ids.astype(np.int32), "step_labels": labels.astype(np.int32)}
    return arrays | {f"final/{name}": weight for name, weight in copies(model, np.float32).items()}


def greedy(model, rng):
    """Return a prompt and its continuation, every id of which is the most likely one by far more than rounding."""
    prompt = torch.tensor(rng.integers(0, model.config.vocab_size, (1, 7)))
    with torch.no_grad():
        whole = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=NEW)
        logits = model(whole[:, :-1]).logits[0, prompt.shape[1] - 1 :]
    written = whole[0, prompt.shape[1] :]
    best = logits.topk(2).values
    assert torch.equal(logits.argmax(-1), written)
    assert len(set(written.tolist())) > NEW // 3, written  # one id again and again would show nothing
    assert (best[:, 0] - best[:, 1]).min() > 1e-2
    arrays = {"prompt": prompt.numpy().astype(np.int32), "greedy": written.numpy().astype(np.int32)}
    return arrays | {"greedy_logits": logits.numpy().astype(np.float32)}


def maker(name, build, seed, **options):
    """Return the function that makes the file `name`.npz."""

    def make():
        torch.set_num_threads(1)
        model = build(seed, **options)
        first, second, third = (np.random.default_rng((seed, part)) for part in range(3))
        arrays = {"config": config_text(model)}
        arrays |= {f"weight/{key}": value for key, value in copies(model, np.float16).items()}
        arrays |= once(model, first) | greedy(model, second) | steps(model, third)
        return arrays | meta(seed, f"python tests/golden/make_families.py {name}", torch, transformers, np)

    return make


TABLE = {
    name: maker(name, *arguments, **options)
    for name, arguments, options in (
        ("qwen2", (qwen2, 20240314), {"tied": True}),
        ("qwen2_untied", (qwen2, 20240302), {"tied": False}),
    )
}


def tolerance(name, array):
    """Return (rtol, atol) of what another processor or version may give."""
    return (1e-4, 1e-6) if array.dtype == np.float32 else (1e-8, 1e-10)


if __name__ == "__main__":
    main(__doc__, TABLE, tolerance)
