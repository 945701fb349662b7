"""config.json files as they are published: each is read, as what it is, or refused with the reason.

The values are facts of the models' own files, of transformers 4 (`torch_dtype`, `rope_theta`) unless said otherwise.
"""

import pytest

from abi_py.errors import CheckpointError
from abi_py.families import FAMILIES
from abi_py.families.gpt2 import OTHER_NAMES
from abi_py.model.folder import config_from_huggingface
from abi_py.model.folder_writing import config_content

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "initializer_range": 0.02,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05, "tie_word_embeddings": False, "use_cache": True,
    "transformers_version": "4.42.3", "torch_dtype": "bfloat16", "rope_scaling": None,
}  # fmt: skip
LLAMA3 = {
    **LLAMA, "attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False, "bos_token_id": 128000,
    "rope_theta": 500000.0, "vocab_size": 128256,
}  # fmt: skip
YARN = {"rope_type": "yarn", "original_max_position_embeddings": 1024}
SCALED = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LLAMA_32_1B = {
    **LLAMA3, "eos_token_id": [128001, 128008, 128009], "head_dim": 64, "hidden_size": 2048,
    "intermediate_size": 8192, "max_position_embeddings": 131072, "num_attention_heads": 32, "num_hidden_layers": 16,
    "num_key_value_heads": 8, "tie_word_embeddings": True,
    "rope_scaling": {"factor": 32.0, "rope_type": "llama3", **SCALED},
}  # fmt: skip
QWEN = {
    "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645, "hidden_act": "silu",
    "initializer_range": 0.02, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "transformers_version": "4.43.1", "use_cache": True, "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip
MISTRAL = {
    "architectures": ["MistralForCausalLM"], "model_type": "mistral", "bos_token_id": 1, "eos_token_id": 2,
    "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
    "max_position_embeddings": 32768, "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
}  # fmt: skip
GPT2 = {
    "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1, "bos_token_id": 50256,
    "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024,
    "resid_pdrop": 0.1, "summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True,
    "summary_type": "cls_index", "summary_use_proj": True, "vocab_size": 50257,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
}  # fmt: skip
GEMMA3 = {
    "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "attention_bias": False,
    "attention_dropout": 0.0, "attn_logit_softcapping": None, "bos_token_id": 2, "final_logit_softcapping": None,
    "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "initializer_range": 0.02,
    "max_position_embeddings": 32768, "num_attention_heads": 4, "num_key_value_heads": 1, "pad_token_id": 0,
    "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000, "rope_scaling": None,
    "rope_theta": 1000000, "sliding_window": 512, "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 262144,
}  # fmt: skip
GEMMA3_1B = GEMMA3 | {
    "cache_implementation": "hybrid", "eos_token_id": [1, 106], "hidden_size": 1152, "intermediate_size": 6912,
    "num_hidden_layers": 26, "sliding_window_pattern": 6,
}  # fmt: skip
PUBLISHED = {
    "Llama-2-7b": LLAMA | {
        "_name_or_path": "meta-llama/Llama-2-7b-hf", "bos_token_id": 1, "eos_token_id": 2, "hidden_size": 4096,
        "intermediate_size": 11008, "max_position_embeddings": 4096, "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 32, "torch_dtype": "float16", "vocab_size": 32000,
    },
    "Meta-Llama-3-8B": LLAMA3 | {
        "eos_token_id": 128001, "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 8192,
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    },
    "Llama-3.1-8B-Instruct": LLAMA3 | {
        "eos_token_id": [128001, 128008, 128009], "hidden_size": 4096, "intermediate_size": 14336,
        "max_position_embeddings": 131072, "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 8, "rope_scaling": {"factor": 8.0, "rope_type": "llama3", **SCALED},
    },
    "Llama-3.2-1B-Instruct": LLAMA_32_1B,
    "Llama-3.2-1B, version 5": {
        **{name: value for name, value in LLAMA_32_1B.items() if name not in ("rope_scaling", "rope_theta")},
        "rope_parameters": {"factor": 32.0, "rope_type": "llama3", "rope_theta": 500000.0, **SCALED},
        "dtype": "bfloat16", "transformers_version": "5.0.0", "pad_token_id": None,
    },
    "a Llama, all that version 5 writes": {
        **{name: value for name, value in LLAMA3.items() if name not in ("rope_scaling", "rope_theta", "torch_dtype")},
        **dict.fromkeys(("_name_or_path", "problem_type", "pad_token_id"), None), "output_attentions": False,
        "id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1}, "return_dict": True,
        "output_hidden_states": False, "is_encoder_decoder": False, "chunk_size_feed_forward": 0, "dtype": "float32",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "hidden_size": 64,
        "intermediate_size": 96, "max_position_embeddings": 128, "num_attention_heads": 4, "num_hidden_layers": 2,
        "num_key_value_heads": 2, "head_dim": 16,
    },
    "TinyLlama-1.1B-Chat": LLAMA | {
        "attention_bias": False, "bos_token_id": 1, "eos_token_id": 2, "hidden_size": 2048,
        "intermediate_size": 5632, "max_position_embeddings": 2048, "num_attention_heads": 32,
        "num_hidden_layers": 22, "num_key_value_heads": 4, "rope_theta": 10000.0, "vocab_size": 32000,
    },
    "SmolLM2-135M-Instruct": LLAMA | {
        "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "hidden_size": 576,
        "initializer_range": 0.041666666666666664, "intermediate_size": 1536, "is_llama_config": True,
        "max_position_embeddings": 8192, "mlp_bias": False, "num_attention_heads": 9, "num_hidden_layers": 30,
        "num_key_value_heads": 3, "pad_token_id": 2, "rope_interleaved": False, "rope_theta": 100000,
        "tie_word_embeddings": True, "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
        "vocab_size": 49152,
    },
    "Mistral-7B-v0.1": MISTRAL | {"rope_theta": 10000.0, "sliding_window": 4096, "vocab_size": 32000},
    "Mistral-7B-Instruct-v0.3": MISTRAL | {
        "attention_dropout": 0.0, "rope_theta": 1000000.0, "sliding_window": None, "vocab_size": 32768,
    },
    "Mixtral-8x7B-v0.1": MISTRAL | {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "attention_dropout": 0.0,
        "num_experts_per_tok": 2, "num_local_experts": 8, "output_router_logits": False, "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.02, "sliding_window": None, "vocab_size": 32000,
    },
    "Qwen2-0.5B-Instruct": QWEN | {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864,
        "max_position_embeddings": 32768, "max_window_layers": 24, "num_attention_heads": 14,
        "num_hidden_layers": 24, "num_key_value_heads": 2, "sliding_window": 32768,
    },
    "Qwen2.5-0.5B": QWEN | {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864,
        "max_position_embeddings": 32768, "max_window_layers": 24, "num_attention_heads": 14,
        "num_hidden_layers": 24, "num_key_value_heads": 2, "sliding_window": 32768, "use_mrope": False,
    },
    "Qwen3-0.6B": QWEN | {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False, "head_dim": 128,
        "hidden_size": 1024, "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28,
        "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rope_scaling": None,
        "sliding_window": None,
    },
    "Qwen3-30B-A3B": QWEN | {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "attention_bias": False,
        "decoder_sparse_step": 1, "head_dim": 128, "hidden_size": 2048, "intermediate_size": 6144,
        "max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [], "num_attention_heads": 32,
        "moe_intermediate_size": 768, "norm_topk_prob": True, "num_experts": 128, "num_experts_per_tok": 8,
        "num_hidden_layers": 48, "num_key_value_heads": 4, "output_router_logits": False, "rope_scaling": None,
        "router_aux_loss_coef": 0.001, "sliding_window": None, "tie_word_embeddings": False,
    },
    "gemma-3-1b-it": GEMMA3_1B,
    "gemma-3-270m": GEMMA3 | {
        "_sliding_window_pattern": 6, "eos_token_id": 1, "hidden_size": 640, "intermediate_size": 2048,
        "layer_types": [*["sliding_attention"] * 5, "full_attention"] * 3, "num_hidden_layers": 18,
        "use_bidirectional_attention": False,
    },
    "gpt2": GPT2,
    "distilgpt2": GPT2 | {
        "_num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "n_layer": 6,
    },
}  # fmt: skip
WEIGHTS = {  # as their pages count them; the head of a tied model once
    "Llama-2-7b": 6_738_415_616,
    "Meta-Llama-3-8B": 8_030_261_248,
    "Llama-3.1-8B-Instruct": 8_030_261_248,
    "Llama-3.2-1B-Instruct": 1_235_814_400,
    "TinyLlama-1.1B-Chat": 1_100_048_384,
    "SmolLM2-135M-Instruct": 134_515_008,
    "Mistral-7B-v0.1": 7_241_732_096,
    "Mixtral-8x7B-v0.1": 46_702_792_704,
    "Qwen2-0.5B-Instruct": 494_032_768,
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-30B-A3B": 30_532_122_624,
    "gemma-3-1b-it": 999_885_952,
    "gemma-3-270m": 268_098_176,
    "gpt2": 124_439_808,
    "distilgpt2": 81_912_576,
}
REFUSED = {
    "a window that begins nowhere": (
        PUBLISHED["Qwen2.5-0.5B"] | {"use_sliding_window": True, "max_window_layers": None},
        "max_window_layers is None, but must be the number of the first block with the sliding_window",
    ),
    "a damaged GPT-2": (GPT2 | {"activation_function": []}, r"activation_function is \[\]"),
    "a damaged Mixtral": (
        PUBLISHED["Mixtral-8x7B-v0.1"] | {"num_experts": {"a": 1}},
        r"num_local_experts \(8\) and num_experts \({'a': 1}\) must be equal",
    ),
    "a damaged Qwen3-MoE": (PUBLISHED["Qwen3-30B-A3B"] | {"mlp_only_layers": 5}, "mlp_only_layers is 5, but must be a"),
    "Gemma": (LLAMA_32_1B | {"model_type": "gemma"}, "model_type is 'gemma'"),
    "Phi-3": (LLAMA_32_1B | {"model_type": "phi3"}, "model_type is 'phi3'"),
    "a quantized Llama": (
        PUBLISHED["Llama-2-7b"] | {"quantization_config": {"bits": 4, "quant_method": "gptq", "group_size": 128}},
        "quantization_config is",
    ),
    "one of MLX": (
        PUBLISHED["Llama-2-7b"] | {"quantization": {"group_size": 64, "bits": 4}},
        r"'quantization' is .*; this version does not know the entry, which may change what the model computes",
    ),
    "Qwen2-VL's text": (PUBLISHED["Qwen2.5-0.5B"] | {"use_mrope": True}, "'use_mrope' is True"),
    "biases in the feed-forward layers": (PUBLISHED["Llama-2-7b"] | {"mlp_bias": True}, "mlp_bias is True"),
    "a multiplier of Granite": (PUBLISHED["Llama-2-7b"] | {"residual_multiplier": 0.22}, "residual_multiplier is 0.22"),
    "an invention": (
        PUBLISHED["Llama-2-7b"] | {"key_value_lag": 3},
        "'key_value_lag' is 3; .*remove it if it does not",
    ),
    "Gemma 3 of images and text": ({"model_type": "gemma3", "text_config": GEMMA3_1B}, "model_type is 'gemma3'"),
    "capped scores": (GEMMA3_1B | {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
    "capped logits": (GEMMA3_1B | {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
    "both directions": (GEMMA3_1B | {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
    "another GeGLU": (GEMMA3_1B | {"hidden_activation": "silu"}, "hidden_activation is 'silu'"),
    "no pattern": (GEMMA3_1B | {"sliding_window_pattern": 0}, "sliding_window_pattern is 0"),
    "one RoPE for both kinds": (
        GEMMA3_1B | {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}},
        r"rope_parameters\.rope_type is 'default'",
    ),
    "a scaled window": (
        GEMMA3_1B | {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
        r"rope_parameters\.sliding_attention\.rope_type is 'linear'",
    ),
    "two scalings": (
        GEMMA3_1B | {"rope_parameters": {"full_attention": {}}, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        "rope_scaling and rope_parameters are one thing",
    ),
    "a scaling that version 5 does not see": (
        GEMMA3_1B | {"rope_scaling": {"type": "linear", "factor": 8.0}},
        r"rope_parameters\.full_attention\.factor is 8.0",
    ),
    "YaRN without whole pairs, which transformers computes with them": (
        GEMMA3_1B | {"rope_scaling": YARN | {"factor": 4.0, "truncate": False}},
        r"rope_scaling's truncate \(False\) has no effect in transformers' gemma3",
    ),
    "YaRN without a factor": (PUBLISHED["Llama-2-7b"] | {"rope_scaling": YARN}, "rope_scaling lacks factor"),
    "YaRN from a length in quotes": (
        PUBLISHED["Llama-2-7b"] | {"rope_scaling": YARN | {"factor": None, "original_max_position_embeddings": "8"}},
        "original_max_position_embeddings is '8', but must be a whole number",
    ),
    "YaRN to a length in quotes": (
        PUBLISHED["Llama-2-7b"] | {"rope_scaling": YARN | {"factor": None}, "max_position_embeddings": "4096"},
        "max_position_embeddings is '4096', but must be a whole number",
    ),
    "YaRN to no length": (
        PUBLISHED["Llama-2-7b"] | {"rope_scaling": YARN | {"factor": None}, "max_position_embeddings": None},
        "max_position_embeddings is None, but must be a whole number",
    ),
    "a dynamic RoPE without end": (
        PUBLISHED["Llama-2-7b"] | {"rope_scaling": {"rope_type": "dynamic", "factor": 1e308}},
        r"rope_scaling\.factor is 1e\+308, which makes rows too long",
    ),
    **{
        f"a GPT-2 of two minds, {other}": (
            GPT2 | {other: 7},
            rf"{name} \(\d+\) and {other} \(7\) must be equal, because they are one thing",
        )
        for name, other in OTHER_NAMES.items()
    },
    "a GPT-2 with other scales": (GPT2 | {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_it_is_read(name):
    content = PUBLISHED[name]
    config = config_from_huggingface(content)
    assert content["model_type"] in FAMILIES[config.family].model_types
    if name in WEIGHTS:
        assert config.num_params() == WEIGHTS[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_it_is_written_again_as_it_was(name):
    """With or without `head_dim` and in either version's spelling; a made-up value shows that none is a default."""
    content = PUBLISHED[name] | {"initializer_range": 0.006}
    written = config_content(config_from_huggingface(content), content, "float32")
    dtype = {key: "float32" for key in ("dtype", "torch_dtype") if key in content}
    assert written == {**content, **dtype}


def test_a_window_of_no_size_is_that_of_qwen2config():
    content = PUBLISHED["Qwen2.5-0.5B"] | {"use_sliding_window": True, "max_window_layers": 3}
    del content["sliding_window"]
    assert config_from_huggingface(content).sliding_window == 4096


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_with_the_reason(name):
    content, reason = REFUSED[name]
    with pytest.raises(CheckpointError, match=rf"^config\.json: {reason}"):
        config_from_huggingface(content)


@pytest.mark.parametrize("value", [None, False, 0, "", [], {}])
def test_what_says_nothing_passes(value):
    config_from_huggingface(PUBLISHED["Llama-2-7b"] | {"key_value_lag": value})
