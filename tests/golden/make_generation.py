"""Make generation.npz: what Hugging Face's `transformers` generates with a tiny model, and what its filters keep.

    python tests/golden/make_generation.py            make it
    python tests/golden/make_generation.py --check    make it in memory and compare; exit 1 if it differs

This script needs PyTorch and transformers; the tests read only the .npz file, which holds the weights by their Hugging
Face names, prompts and greedy ids, logits, scores before and after each processor, and `meta`.
"""

import json

import numpy as np
import torch
import transformers
from stored import main, meta
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

SEED = 20240229
SHAPE = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}
NEW = 24  # tokens of each greedy continuation
# Settings by name; `transformers` builds its own list of processors from them, in its own order.
BAD = [-2, -1, 17]  # negative: the id at that place from the end of the ids
CASES = [
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.7},
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 2},
    {"no_repeat_ngram_size": 3},
    {"temperature": 0.6},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 500},
    {"top_p": 0.05},
    {"top_p": 0.8},
    {"min_p": 0.2},
    {"temperature": 0.5, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
    {"temperature": 1.7, "top_p": 0.6, "min_p": 0.3},
    {"repetition_penalty": 1.2, "no_repeat_ngram_size": 2, "temperature": 0.8, "top_k": 12, "top_p": 0.95},
    {"typical_p": 0.3},
    {"typical_p": 0.9, "temperature": 0.7, "top_k": 60},
    {"epsilon_cutoff": 0.01},
    {"epsilon_cutoff": 0.9},
    {"eta_cutoff": 0.02},
    {"eta_cutoff": 0.3, "temperature": 1.5, "top_p": 0.9},
    {"typical_p": 0.8, "epsilon_cutoff": 0.003, "eta_cutoff": 0.01, "top_k": 200},
    {"bad_words_ids": [[7], [3], BAD, [8, 2], [5, 5, 5]]},
    {"min_new_tokens": 1},
    {"min_length": 41},
    {"min_length": 40},
    {"min_new_tokens": 0, "min_length": 41},
    {"suppress_tokens": [1, 500, 999]},
    {"begin_suppress_tokens": [2, 7], "suppress_tokens": [8]},
    {"forced_eos_token_id": [6, 9]},
    {"forced_eos_token_id": 6, "suppress_tokens": [9], "min_new_tokens": 3, "repetition_penalty": 1.1},
]
ENDS = [3, 6]  # ids that end a text


def build():
    """Return the model, with weights large enough that its greedy text does not repeat one token."""
    torch.manual_seed(SEED)
    config = LlamaConfig(**SHAPE, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None, pad_token_id=0)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(0, 0.3) if weight.ndim > 1 else weight.uniform_(0.5, 1.5)
            if name == "lm_head.weight":
                weight.normal_(0, 0.6)
    return model


def greedy(model, arrays):
    """Generate greedily, with cache, and store prompts, continuations and the logits of the whole."""
    rng = np.random.default_rng(SEED)
    settings = (({}, ""), ({"repetition_penalty": 1.3, "no_repeat_ngram_size": 2}, "_penalised"))
    for number, length in enumerate((1, 5, 11, 30)):
        prompt = rng.integers(0, SHAPE["vocab_size"], length)
        arrays[f"prompt_{number}"] = prompt.astype(np.int32)
        for extra, suffix in settings:
            ids = torch.tensor(prompt)[None]
            all_seen = torch.ones_like(ids)  # a prompt may hold the padding's id
            ids = model.generate(ids, attention_mask=all_seen, do_sample=False, max_new_tokens=NEW, **extra)
            arrays[f"greedy_{number}{suffix}"] = ids[0, length:].numpy().astype(np.int32)
            if not suffix:
                arrays[f"logits_{number}"] = model(ids).logits[0].numpy()


def processors(model, arrays):
    """Run the processors that `transformers` makes of each case on random scores behind random ids."""
    rng = np.random.default_rng(SEED + 1)
    vocab = 1000
    ids = rng.integers(0, 9, 40)  # few ids: many n-grams come twice
    scores = 2.5 * rng.standard_normal(vocab).astype(np.float32)
    arrays |= {"ids": ids.astype(np.int32), "scores": scores, "ends": np.array(ENDS)}
    for number, case in enumerate(CASES):
        if "bad_words_ids" in case:
            case["bad_words_ids"] = [[int(ids[i]) if i < 0 else i for i in word] for word in case["bad_words_ids"]]
        case = dict(case)
        if "min_new_tokens" in case:  # as `generate` does: the one beats the other
            case["min_length"] = case["min_new_tokens"] + len(ids)
        config = GenerationConfig(do_sample=True, **({"top_k": 0, "top_p": 1.0, "temperature": 1.0} | case))
        config.max_length = len(ids) + 1  # the next token is the last
        config._eos_token_tensor = torch.tensor(ENDS)
        chain = model._get_logits_processor(generation_config=config, input_ids_seq_length=len(ids))
        kept = chain(torch.tensor(ids)[None], torch.tensor(scores)[None])[0]
        arrays[f"kept_{number}"] = kept.numpy()
    arrays["cases"] = np.array(json.dumps(CASES))
    return arrays


def make():
    """Return all arrays."""
    torch.set_num_threads(1)
    model = build()
    arrays = {f"weights.{name}": weight.detach().numpy() for name, weight in model.named_parameters()}
    with torch.no_grad():
        greedy(model, arrays)
        processors(model, arrays)
    return arrays | meta(SEED, "python tests/golden/make_generation.py", torch, transformers, shape=SHAPE)


if __name__ == "__main__":
    main(__doc__, {"generation": make}, lambda name, array: (1e-5, 1e-5))
