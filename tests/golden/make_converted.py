"""Make gguf_files.npz: GGUF files of llama.cpp's own converter, and what transformers says of the same models.

    python tests/golden/make_converted.py LLAMA_CPP      make them; LLAMA_CPP is its source, with convert_hf_to_gguf.py

This script needs PyTorch, transformers and the sources of llama.cpp; the tests read only the .npz file.  For each case

    NAME/file      the bytes of the file, F32
    NAME/ids       (B, T)
    NAME/logits    (B, T / 4, V) float32, of transformers: of every fourth token

Weights are small multiples of 1/64, so that the file is small.  The tokenizer is that of bytes with a few merges, of
which the converter has no fingerprint: it is told that words are divided as GPT-2 does.
"""

import logging
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from stored import meta
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

HERE = Path(__file__).resolve().parent
V, TOKENS, SEED = 272, 264, 20261129  # some rows of the embedding have no token
SIZES = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"max_position_embeddings": 64}
GROUPED = SIZES | {"num_key_value_heads": 2}
LLAMA_3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
EVERY = slice(3, None, 4)
CASES = {
    "llama": lambda: transformers.LlamaConfig(**GROUPED, tie_word_embeddings=False),
    "llama_scaled": lambda: transformers.LlamaConfig(
        **GROUPED, tie_word_embeddings=True, rope_parameters=LLAMA_3 | {"original_max_position_embeddings": 32}
    ),
    "llama_yarn": lambda: transformers.LlamaConfig(**GROUPED, attention_bias=True, rope_parameters=YARN),
    "mistral": lambda: transformers.MistralConfig(**GROUPED, sliding_window=None),
    "mixtral": lambda: transformers.MixtralConfig(**GROUPED, num_local_experts=4),
    "qwen2": lambda: transformers.Qwen2Config(**GROUPED),
    "qwen3": lambda: transformers.Qwen3Config(**GROUPED, head_dim=16, tie_word_embeddings=True),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **GROUPED, head_dim=16, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=24, norm_topk_prob=True
    ),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=V, n_positions=64, n_ctx=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
    ),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **GROUPED | {"num_hidden_layers": 7}, head_dim=16, query_pre_attn_scalar=16, sliding_window=8
    ),
}


def tokenizer():
    """Return a byte-level BPE tokenizer."""
    codec = Tokenizer(models.BPE())
    codec.pre_tokenizer, codec.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=TOKENS, initial_alphabet=alphabet, special_tokens=["<|end|>"])
    codec.train_from_iterator(["the cat and the dog sat there"] * 9, trainer)
    if codec.get_vocab_size() != TOKENS:
        raise RuntimeError(f"the tokenizer has {codec.get_vocab_size()} tokens")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=codec, eos_token="<|end|>")


def filled(config, rng):
    """Return a model whose weights are multiples of 1/64, of norms near 1 and of biases away from 0."""
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            numbers = rng.integers(-8, 9, weight.shape) / 64
            norm = weight.ndim == 1 and name.endswith("weight") and config.model_type != "gemma3_text"
            weight.copy_(torch.from_numpy(numbers + norm))
    return model.eval()


def converted(folder, classes):
    """Return the bytes of the file that the converter makes of a folder."""
    base, gguf = classes
    out = folder / "model.gguf"
    hparams = base.ModelBase.load_hparams(folder, False)
    kind = base.ModelBase.from_model_architecture(hparams["architectures"][0])
    with torch.inference_mode():
        kind(folder, gguf.LlamaFileType.ALL_F32, out).write()
    return np.frombuffer(out.read_bytes(), np.uint8)


def main(source):
    """Make the file."""
    sys.path[:0] = [str(source), str(source / "gguf-py")]
    logging.disable(logging.WARNING)
    import conversion
    import gguf
    from conversion import base

    base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
    base.TextModel._set_vocab_sentencepiece = base.TextModel._set_vocab_gpt2  # it would look for another library
    arrays = meta(SEED, "python tests/golden/make_converted.py LLAMA_CPP", torch, transformers, np)
    for name, config in CASES.items():
        rng = np.random.default_rng([SEED, *name.encode()])
        model = filled(config(), rng)
        architecture = type(model).__name__
        conversion.get_model_class(architecture)  # registers it
        ids = rng.integers(0, TOKENS, (2, 21))
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            model.save_pretrained(folder)
            tokenizer().save_pretrained(folder)
            arrays[f"{name}/file"] = converted(folder, (base, gguf))
        with torch.no_grad():
            logits = model(torch.from_numpy(ids), use_cache=False).logits
        arrays[f"{name}/ids"] = ids.astype(np.int32)
        arrays[f"{name}/logits"] = logits[:, EVERY].numpy().astype(np.float32)
        print(name, architecture, f"{arrays[f'{name}/file'].size:,} bytes")
    np.savez_compressed(HERE / "gguf_files.npz", **arrays)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
