"""The folder of a finished DeepZig model, as Hugging Face's tools and the Zig loader read it.

    model.safetensors        weights under Hugging Face's names, and `lm_head.weight` even where it is tied
    config.json              model_type deepzig_conversational; of a model that is no plain Llama, its own
    generation_config.json   how it writes

The Zig loader fills a missing lm_head with noise, so a tied model's embedding is written a second time; readers that
tie leave it aside.  It takes `rms_norm_eps` and `qk_rope_base` only as JSON floats (10000.0, never 10000), and integers
only as integers.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..files import atomic_files, json_text, write_pieces
from .finite import check_written
from .huggingface import CONFIG, WEIGHTS
from .safetensors import Joined, safetensors_pieces

__all__ = ["CALM_BELOW", "deepzig_config", "generation_config", "write_model"]

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
CALM_BELOW = 2_000_000  # weights; a smaller model's generation_config.json draws close to the likeliest token
LONGEST = 2048  # max_length of the original's generation_config.json


def deepzig_config(theirs: Mapping[str, Any], special: Mapping[str, int | None]) -> dict[str, Any]:
    """Return the content of config.json from that of Llama; `special` has the ids of "bos", "eos" and "pad"."""
    return {
        **theirs,
        "model_type": "deepzig_conversational",
        "architectures": ["DeepZigConversationalModel"],
        "rope_base": theirs["rope_theta"],
        "qk_rope_base": theirs["rope_theta"],
        "rope_scaling": None,
        **_ids(special),
    }


def _ids(special: Mapping[str, int | None]) -> dict[str, int | None]:
    return {f"{role}_token_id": special.get(role) for role in ("pad", "bos", "eos")}


def generation_config(
    context: int, special: Mapping[str, int | None], stop_ids: tuple[int, ...], calm: bool = False
) -> dict[str, Any]:
    """Return the content of generation_config.json: the original's settings, within the model's context.

    eos_token_id lists all ids that end an answer, `</assistant>` among them.  `calm` is for a model of few weights,
    whose less likely tokens are noise: it draws close to the likeliest and does not punish what comes twice.
    """
    return {
        "max_length": min(LONGEST, context),
        "do_sample": True,
        "temperature": 0.2 if calm else 0.8,
        "top_p": 0.9,
        "top_k": 40,
        "repetition_penalty": 1.0 if calm else 1.1,
        "pad_token_id": special.get("pad"),
        "bos_token_id": special.get("bos"),
        "eos_token_id": stop_ids[0] if len(stop_ids) == 1 else sorted(stop_ids),
    }


def write_model(
    folder: Path,
    weights: Mapping[str, np.ndarray | Joined],
    theirs: Mapping[str, Any],
    special: Mapping[str, int | None],
    more: Mapping[str, str] | None = None,
    *,
    plain: bool = True,
) -> None:
    """Write model.safetensors, `more` texts by file name, and config.json, which appears last.

    `weights` are by Hugging Face's names, a tied model's embedding once; `theirs` is the content of the config.json
    that the Transformers library has for the model.  What the Zig code does not compute (not `plain`) is written as
    the folder of its own family, with the ids and `more` alone.  No reader takes a folder without config.json for a
    model, so the model is there whole or not at all.
    NonFiniteError, and nothing written, if a weight is NaN or infinite.
    """
    check_written(folder / WEIGHTS, weights)
    tensors, content = dict(weights), {**theirs, **_ids(special)}
    if plain:
        tensors[HEAD] = weights.get(HEAD, weights[EMBEDDING])
        content = deepzig_config(theirs, special)
    texts = {**(more or {}), CONFIG: json_text(content)}
    with atomic_files(folder / CONFIG) as open_new:
        write_pieces(open_new(folder / WEIGHTS), safetensors_pieces(tensors, {"format": "pt"}))
        for name, text in texts.items():
            open_new(folder / name).write(text.encode())
