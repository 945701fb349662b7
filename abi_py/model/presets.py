"""The shapes of the DeepZig family, by name.

    name    vocabulary  width  inner  layers  heads  context   weights, embedding tied
    test         2 000    128    384       2      4      512         682 624
    small        8 000    256    768       4      4    1 024       5 458 176
    medium      16 000    768  2 304      12     12    2 048     104 319 744
    large       32 000  1 024  4 096      16     16    4 096     301 237 248
    seed        32 000    512  1 536       8      8    4 096      43 655 680   the conversational model

As many heads for keys as for queries, RoPE base 10 000, epsilon 1e-6, no biases.  The vocabulary is what is asked of
the tokenizer; a small corpus gives fewer tokens, and the model then has fewer weights.
"""

from typing import Any

from ..config import TrainableModelConfig
from ..errors import ConfigError

__all__ = ["PRESETS", "PRESET_FIELDS", "preset"]

# What a preset says of a shape, beside the vocabulary.
PRESET_FIELDS = (
    *("hidden_dim", "intermediate_dim", "num_layers", "num_heads", "num_kv_heads", "max_seq_len"),
    *("rope_theta", "norm_eps", "tie_embeddings"),
)


def _shape(vocab: int, width: int, inner: int, layers: int, heads: int, context: int) -> TrainableModelConfig:
    return TrainableModelConfig(
        vocab_size=vocab,
        hidden_dim=width,
        intermediate_dim=inner,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        max_seq_len=context,
        rope_theta=10000.0,
        norm_eps=1e-6,
        tie_embeddings=True,
    )


PRESETS: dict[str, TrainableModelConfig] = {
    "test": _shape(2_000, 128, 384, 2, 4, 512),
    "small": _shape(8_000, 256, 768, 4, 4, 1_024),
    "medium": _shape(16_000, 768, 2_304, 12, 12, 2_048),
    "large": _shape(32_000, 1_024, 4_096, 16, 16, 4_096),
    "seed": _shape(32_000, 512, 1_536, 8, 8, 4_096),
}


def preset(name: str, **changes: Any) -> TrainableModelConfig:
    """Return a shape of the family with some fields changed; ConfigError for an unknown name or a bad value."""
    if name not in PRESETS:
        raise ConfigError(f"preset ({name!r}) must be one of {', '.join(PRESETS)}; choose one")
    return PRESETS[name].replace(**changes)
