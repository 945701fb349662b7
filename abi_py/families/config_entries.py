"""The entries of a config.json that change nothing here, whatever they say; one that nobody knows is an error.

An entry is known if the family writes it or names it, if `config_json.py` names it, or if it is in this list: of how
transformers loads, trains and generates, of tasks that are no language models, and of tools.  Those of training
(dropouts, losses of routers) are a run's own business.  What begins with an underscore is transformers' own.
"""

from collections.abc import Collection, Mapping
from typing import Any

from .config_json import FIELDS, NEUTRAL

__all__ = ["unknown_entry"]

WITHOUT_EFFECT = {
    # what the file is, and how the weights are stored and loaded
    *("model_type", "architectures", "transformers_version", "torch_dtype", "dtype", "auto_map", "attn_implementation"),
    *("tokenizer_class", "use_cache", "initializer_range", "gradient_checkpointing", "pretraining_tp", "torchscript"),
    *("use_bfloat16", "chunk_size_feed_forward", "tf_legacy_loss", "base_model_tp_plan", "base_model_pp_plan"),
    # what forward returns besides logits
    *("output_attentions", "output_hidden_states", "output_router_logits", "return_dict"),
    # other tasks
    *("id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "task_specific_params", "is_decoder"),
    *("cross_attention_hidden_size", "tie_encoder_decoder", "prefix", "classifier_dropout"),
    *("summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj"),
    # generation, as version 4 kept it here
    *("max_length", "min_length", "max_new_tokens", "do_sample", "early_stopping", "num_beams", "num_beam_groups"),
    *("diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty"),
    *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "output_scores"),
    *("return_dict_in_generate", "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens"),
    *("begin_suppress_tokens", "cache_implementation"),
    # training
    *("router_aux_loss_coef", "router_z_loss_coef", "attention_dropout", "hidden_dropout", "hidden_dropout_prob"),
    *("attn_pdrop", "embd_pdrop", "resid_pdrop"),
    # the same arithmetic in another order, and names for what other entries say
    *("reorder_and_upcast_attn", "n_ctx", "is_llama_config", "model_max_length"),
    # marks of tools
    *("transformers.js_config", "unsloth_fixed", "unsloth_version", "torch_compile", "model_name"),
}
# What only some folders of a family have, so that it need not be among what is written.
READ = {
    *("num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings", "rope_theta", "rope_scaling"),
    *("rope_parameters", "sliding_window", "use_sliding_window", "max_window_layers", "layer_types"),
    "original_max_position_embeddings",
    *("rope_base", "qk_rope_base"),  # of DeepZig's folders
}


def unknown_entry(content: Mapping[str, Any], own: Collection[str]) -> str | None:
    """Return an entry of a config.json that may change what is computed, and that nobody knows; None if there is none.

    `own` are the family's.  null, false, 0 and what is empty say nothing.
    """
    known = {*FIELDS.values(), *NEUTRAL, *READ, *WITHOUT_EFFECT, *own}
    for name, value in content.items():
        neutral = name.startswith("_") or name.endswith("_token_id")
        if not neutral and name not in known and value not in (None, False, "", [], {}):
            return name
    return None
