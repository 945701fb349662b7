"""Make the golden files of whole families: what transformers says of a small model of each, from random weights.

    python tests/golden/make_families.py            make all
    python tests/golden/make_families.py qwen2      make one
    python tests/golden/make_families.py --check    make all in memory and compare; exit 1 if one differs

This script needs PyTorch and transformers; the tests read only the .npz files.  Each holds

    config             the text of config.json, as transformers saves it
    ids, labels        (B, T): rows of samples side by side without padding; labels are those of the same place
                       (already shifted), some of them ignored
    segments           (B, T): the number of the sample in its row
    logits, loss       each sample by itself; the mean over all labels that are not ignored
    penalty            what a model with experts adds to the loss, so that they are used alike: once for all samples
    weight/NAME        by the names of transformers' own files, exact in float16
    gradient/NAME      of the loss and the penalty
    options            of the optimizer steps, by our names
    step_ids, step_labels, losses, penalties, grad_norms, learning_rates, final/NAME
    prompt, greedy     (1, T) and the ids that `generate` writes after it, with its cache
    greedy_logits      from which each of these was chosen, without a cache

Everything is computed in float64 on one thread; gradients and final weights are stored in float32.  A family's biases
are far from zero and its norms far from one, so that nothing can be left out without being seen.
"""

import json
import math
import sys
import tempfile
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
import transformers
from safetensors.torch import load_file
from stored import main, meta
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

IGNORE, STEPS, NEW = -100, 10, 20
ROWS = ((13,), (5, 8), (1, 4, 8))  # lengths of the samples of each row
LONG = ((27,), (10, 17))
# A rate and a decay that tell after ten steps, beyond the tolerance of 1e-3, whether a tensor decays.
OPTIONS = {
    "optimizer": "adamw", "beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8, "weight_decay": 0.1, "max_grad_norm": 1.0,
    "learning_rate": 1e-2, "min_learning_rate": 1e-4, "warmup_steps": 5, "decay_steps": 20,
}  # fmt: skip
NO_MARKS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def rope(kind="default", **more):
    """Return RoPE's parameters: a fast rotation.

    Where it is slow, a bias of the keys has next to no gradient, and Adam makes steps of what rounding left.
    """
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 100.0, **more}}


EVEN = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-6, **rope(), **NO_MARKS,
}  # fmt: skip
ODD = EVEN | {"hidden_size": 30, "intermediate_size": 22, "num_attention_heads": 3, "num_key_value_heads": 1}
SMALL = ODD | {"num_hidden_layers": 1}
GPT2 = {
    "vocab_size": 61, "n_embd": 30, "n_layer": 2, "n_head": 3, "n_positions": 64, "n_inner": 46, **NO_MARKS,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip
GEMMA3 = ODD | {  # a width with a whole root: transformers rounds the scale of embeddings to the type it computes in
    "hidden_size": 36, "head_dim": 6, "query_pre_attn_scalar": 9, "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
        "full_attention": {"rope_type": "linear", "factor": 2.5, "rope_theta": 100.0},
    },
}  # fmt: skip
EXPERTS = ODD | {"hidden_size": 22, "intermediate_size": 10, "head_dim": 6, "num_experts_per_tok": 2}
QWEN3_MOE = EXPERTS | {"num_experts": 5, "moe_intermediate_size": 10, "num_key_value_heads": 3}


class Case(NamedTuple):
    """A file: a class of transformers' configurations, its fields, and what is computed with it."""

    config: str
    fields: dict
    seed: int
    rows: tuple = ROWS
    spread: float = 0.25  # of the matrices
    epsilon: float = OPTIONS["epsilon"]


class Unsuitable(Exception):
    """From this seed something is decided by rounding, or shows nothing; take another."""


# Without rotation the bias of the keys has no gradient at all; a larger epsilon keeps Adam from what rounding left.
QUIET = 1e-4
TABLE = {
    "qwen2": Case("Qwen2Config", EVEN | {"tie_word_embeddings": True}, 20240314),
    "qwen2_untied": Case("Qwen2Config", ODD | {"tie_word_embeddings": False}, 20240302),
    "llama": Case("LlamaConfig", ODD | {"head_dim": 10, "tie_word_embeddings": False}, 1),
    "llama_linear": Case("LlamaConfig", SMALL | rope("linear", factor=2.5) | {"attention_bias": True}, 2, LONG),
    "llama_dynamic": Case(
        "LlamaConfig",
        SMALL | {"max_position_embeddings": 28} | rope("dynamic", factor=3.0),
        1,
        ((40,), (40,)),
    ),
    "llama_yarn": Case(
        "LlamaConfig",
        SMALL | rope("yarn", factor=4.0, beta_fast=3.0, beta_slow=0.25, original_max_position_embeddings=24),
        1,
        LONG,
    ),
    "llama_llama3": Case(
        "LlamaConfig",
        SMALL
        | rope("llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=3.0, original_max_position_embeddings=24),
        1,
        LONG,
    ),
    "mistral": Case(
        "MistralConfig",
        ODD | {"num_attention_heads": 5, "head_dim": 6, "sliding_window": 5, "tie_word_embeddings": False},
        1,
    ),
    "qwen3": Case("Qwen3Config", ODD | {"num_key_value_heads": 3, "head_dim": 6, "tie_word_embeddings": True}, 2),
    "qwen3_window": Case(
        "Qwen3Config",
        ODD
        | {"head_dim": 14, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
        | {"tie_word_embeddings": False, "attention_bias": True},
        4,
    ),
    "gpt2": Case("GPT2Config", GPT2, 1, spread=0.5, epsilon=QUIET),
    "gpt2_untied": Case(
        "GPT2Config",
        GPT2 | {"n_layer": 1, "n_head": 5, "n_inner": None, "tie_word_embeddings": False},
        15,
        epsilon=QUIET,
    ),
    "gemma3": Case("Gemma3TextConfig", GEMMA3, 13, epsilon=QUIET),
    "gemma3_global": Case(
        "Gemma3TextConfig",
        GEMMA3
        | {"head_dim": 10, "layer_types": ["full_attention"] * 2, "attention_bias": True, "tie_word_embeddings": False},
        1,
        epsilon=QUIET,
    ),
    "mixtral": Case(
        "MixtralConfig",
        EXPERTS | {"num_local_experts": 4, "sliding_window": 5, "router_aux_loss_coef": 0.05},
        2,
    ),
    "qwen3_moe": Case(
        "Qwen3MoeConfig",
        QWEN3_MOE | {"norm_topk_prob": True, "router_aux_loss_coef": 0.05, "tie_word_embeddings": True},
        16,
    ),
    "qwen3_moe_plain": Case(
        "Qwen3MoeConfig",
        QWEN3_MOE
        | {"norm_topk_prob": False, "router_aux_loss_coef": 0.05, "mlp_only_layers": [0], "tie_word_embeddings": False}
        | {"use_sliding_window": True, "sliding_window": 4, "attention_bias": True},
        1,
    ),
}


# -- float64 ---------------------------------------------------------------------------------------


class NothingElse(TorchDispatchMode):
    """Raise TypeError where a float tensor of another type than float64 comes out of an operation."""

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        """Run the operation."""
        made = operation(*arguments, **(options or {}))
        for each in made if isinstance(made, tuple | list) else (made,):
            if isinstance(each, torch.Tensor) and each.is_floating_point() and each.dtype != torch.float64:
                raise TypeError(f"{operation} made {each.dtype}")
        return made


@contextmanager
def float64():
    """Compute in float64: what transformers rounds to float32 on the way, it then rounds to float64."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(torch, float32=torch.float64, float=torch.float64))
        stack.enter_context(mock.patch.object(torch.Tensor, "float", torch.Tensor.double))
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float64)
        stack.enter_context(NothingElse())
        yield


def build(case):
    """Return the model of a case in float64, with weights that say something."""
    config = getattr(transformers, case.config)(
        **case.fields, attn_implementation="eager", experts_implementation="eager"
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    fill(model, case.seed, case.spread)
    return model


def fill(model, seed, spread):
    """Give a model weights that say something, each exact in float16, so that every dtype has the same."""
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            normal = rng.standard_normal(weight.shape)
            if weight.ndim >= 2:
                value = spread * normal
            else:
                value = 0.5 * normal if name.endswith("bias") else 1 + 0.2 * normal
            weight.copy_(torch.tensor(value.astype(np.float16).astype(np.float64)))


def copies(model, tensors, dtype):
    """Return tensors that are named as the model's parameters, by the names of the files that transformers writes."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, state_dict={name: tensor.detach().clone() for name, tensor in tensors.items()})
        return {name: tensor.numpy().astype(dtype) for name, tensor in load_file(f"{folder}/model.safetensors").items()}


def config_text(model):
    """Return config.json as transformers saves it."""
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        return Path(folder, "config.json").read_text(encoding="utf-8")


# -- the figures -----------------------------------------------------------------------------------


def forward(model, ids):
    """Return what the model says of ids (B, T)."""
    options = {"output_router_logits": True} if has_experts(model) else {}
    return model(input_ids=torch.as_tensor(ids), use_cache=False, **options)


def cross_entropy(logits, labels):
    """Return the mean over the labels that are not ignored; nothing is shifted."""
    return functional.cross_entropy(logits.flatten(0, 1), torch.as_tensor(labels).flatten(), ignore_index=IGNORE)


def has_experts(model):
    """Say whether the feed-forward layers are mixtures of experts."""
    return hasattr(model.config, "router_aux_loss_coef")


def load_balancing(model, told):
    """Return the penalty of routers, by the function of the model's own module, over what several calls told."""
    config = model.config
    if not has_experts(model):
        return torch.zeros(())
    function = vars(sys.modules[type(model).__module__])["load_balancing_loss_func"]
    layers = tuple(torch.cat(layer) for layer in zip(*(each.router_logits for each in told), strict=True))
    return config.router_aux_loss_coef * function(layers, config.num_local_experts, config.num_experts_per_tok)


def check_rounding(model):
    """Raise AssertionError unless float64 changes no more than the roundings of what transformers computes."""
    ids = torch.arange(1, model.config.vocab_size, 7)[None]
    rounded = forward(model, ids).logits
    with float64():
        gap = (forward(model, ids).logits - rounded).abs().max().item()
    assert gap < 1e-4, gap


def once(model, rows, rng):
    """Return logits, loss and every gradient of rows of samples, each sample computed by itself."""
    V, T = model.config.vocab_size, sum(rows[0])
    ids, labels = rng.integers(0, V, (2, len(rows), T))
    labels[0, 3] = labels[1, :4] = labels[-1, 12] = IGNORE
    samples = [np.split(row, np.cumsum(lengths)[:-1]) for row, lengths in zip(ids, rows, strict=True)]
    told = [[forward(model, sample[None]) for sample in row] for row in samples]
    logits = torch.stack([torch.cat([each.logits[0] for each in row]) for row in told])
    loss, penalty = cross_entropy(logits, labels), load_balancing(model, [each for row in told for each in row])
    model.zero_grad()
    (loss + penalty).backward()
    segments = [np.repeat(np.arange(len(lengths)), lengths) for lengths in rows]
    arrays = {"ids": ids.astype(np.int32), "labels": labels.astype(np.int32), "segments": np.array(segments, np.int32)}
    return arrays | {"logits": logits.detach().numpy(), "loss": loss.item(), "penalty": penalty.item()}


def learning_rate(step):
    """Warm-up from a part of the rate, then half a cosine to the smallest rate; `step` counts from 0."""
    base, least, warmup = OPTIONS["learning_rate"], OPTIONS["min_learning_rate"], OPTIONS["warmup_steps"]
    if step < warmup:
        return base * (step + 1) / warmup
    p = min(1.0, (step - warmup) / (OPTIONS["decay_steps"] - warmup))
    return least + (base - least) * 0.5 * (1 + math.cos(math.pi * p))


def steps(model, options, rng):
    """Take ten steps of AdamW with decay on matrices alone, and clipping; the data count up in strides."""
    V = model.config.vocab_size
    first, stride = rng.integers(0, V, (STEPS, 3, 1)), rng.integers(1, 4, (STEPS, 3, 1))
    tokens = (first + stride * np.arange(12)) % V  # (steps, 3, 12), of which 11 are read
    ids, labels = tokens[:, :, :-1], tokens[:, :, 1:].copy()
    labels[:, 1, :2] = IGNORE
    weights = list(model.parameters())
    groups = [
        {"params": [w for w in weights if w.ndim >= 2], "weight_decay": options["weight_decay"]},
        {"params": [w for w in weights if w.ndim == 1], "weight_decay": 0.0},
    ]
    betas = (options["beta1"], options["beta2"])
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=betas, eps=options["epsilon"], foreach=False)
    figures, rates = [], [learning_rate(step) for step in range(STEPS)]
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = rates[step]
        optimizer.zero_grad()
        told = forward(model, ids[step])
        loss, penalty = cross_entropy(told.logits, labels[step]), load_balancing(model, [told])
        (loss + penalty).backward()
        norm = torch.nn.utils.clip_grad_norm_(weights, options["max_grad_norm"])
        optimizer.step()
        figures.append((loss.item(), penalty.item(), norm.item()))
    losses, penalties, norms = np.array(figures).T
    arrays = {"losses": losses, "penalties": penalties, "grad_norms": norms, "learning_rates": rates}
    return arrays | {"step_ids": ids.astype(np.int32), "step_labels": labels.astype(np.int32)}


def greedy(model, rng):
    """Return a prompt and its continuation, every id of which is the most likely one by far more than rounding."""
    prompt = torch.tensor(rng.integers(0, model.config.vocab_size, (1, 7)))
    with torch.no_grad():
        whole = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=NEW)
        logits = forward(model, whole[:, :-1]).logits[0, prompt.shape[1] - 1 :]
    written = whole[0, prompt.shape[1] :]
    best = logits.topk(2).values
    assert torch.equal(logits.argmax(-1), written)
    if len(set(written.tolist())) <= NEW // 3:
        raise Unsuitable(f"one id again and again shows nothing: {written.tolist()}")
    if (best[:, 0] - best[:, 1]).min() < 1e-2:
        raise Unsuitable("two ids are nearly equally likely")
    arrays = {"prompt": prompt.numpy().astype(np.int32), "greedy": written.numpy().astype(np.int32)}
    return arrays | {"greedy_logits": logits.numpy().astype(np.float32)}


@contextmanager
def clear_choices(model):
    """Raise `Unsuitable` where rounding could send a token to another expert."""

    def check(module, _, told):
        best = told[0].topk(module.top_k + 1).values
        if (best[:, -2] - best[:, -1]).min() < 1e-4:
            raise Unsuitable("two experts are nearly equally likely")

    routers = [module for module in model.modules() if type(module).__name__.endswith("TopKRouter")]
    hooks = [module.register_forward_hook(check) for module in routers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def figures(case):
    """Return the arrays of a file."""
    torch.set_num_threads(1)
    rngs = [np.random.default_rng((case.seed, part)) for part in range(3)]
    options = OPTIONS | {"epsilon": case.epsilon}
    with float64():
        model = build(case)
    check_rounding(model)
    arrays = {"config": config_text(model), "options": json.dumps(options)}

    def keep(name, dtype, part):
        tensors = {key: part(weight) for key, weight in model.named_parameters()}
        return {f"{name}/{key}": value for key, value in copies(model, tensors, dtype).items()}

    with clear_choices(model):
        arrays |= keep("weight", np.float16, lambda weight: weight)
        with float64():
            arrays |= once(model, case.rows, rngs[0])
        arrays |= keep("gradient", np.float32, lambda weight: weight.grad)
        with float64():
            arrays |= greedy(model, rngs[1]) | steps(model, options, rngs[2])
        return arrays | keep("final", np.float32, lambda weight: weight)


def maker(name):
    """Return the function that makes the file `name`.npz."""
    case, command = TABLE[name], f"python tests/golden/make_families.py {name}"
    return lambda: figures(case) | meta(case.seed, command, torch, transformers, np)


def tolerance(name, array):
    """Return (rtol, atol) of what another processor or version may give."""
    return (1e-4, 1e-6) if array.dtype == np.float32 else (1e-8, 1e-10)


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    main(__doc__, {name: maker(name) for name in TABLE}, tolerance)
