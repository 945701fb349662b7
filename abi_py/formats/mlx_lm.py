"""mlx-lm's folder of a LoRA adapter: adapter_config.json and adapters.safetensors.

    model.layers.0.self_attn.q_proj.lora_a    (in, R)
    model.layers.0.self_attn.q_proj.lora_b    (R, out)
    model.layers.0.self_attn.q_proj.m         (out,)      the lengths of the rows of W + s B A, with DoRA
    model.embed_tokens.lora_a                 (V, R)      rows are looked up; lora_b (R, C)
    model.layers.0.mlp.switch_mlp.up_proj.lora_a    (E, R, in)    of experts; lora_b (E, out, R)

All adapters have one rank and one factor, `scale`.  Linear layers get one if their name within a block is among `keys`
and their block among the last `num_layers`; where a file has no tensor for one of them, mlx-lm begins it with B = 0,
which adds nothing, and m as the lengths of W.  What a file has besides, mlx-lm 0.32 refuses, and older ones pass over.
As `tuner/utils.py`, `lora.py` and `dora.py` of mlx-lm 0.32 read it.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CheckpointError, shown
from ..files import atomic_files, json_text, write_pieces
from ..untrusted import read_json
from .checkpoint_names import ADAPTER_CONFIG
from .finite import check_written
from .safetensors import safetensors_pieces

__all__ = ["DORA", "MLX_WEIGHTS", "is_mlx_adapter", "read_mlx_config", "write_mlx_adapter"]

MLX_WEIGHTS = "adapters.safetensors"
LORA, DORA = "lora", "dora"  # of `fine_tune_type`
BLOCK = re.compile(r"^model\.\w+\.\d+\.")  # model.layers.0., GPT-2's model.h.0.


def is_mlx_adapter(folder: Path) -> bool:
    """Say whether a folder holds adapters of mlx-lm's kind."""
    return (folder / MLX_WEIGHTS).is_file() and (folder / ADAPTER_CONFIG).is_file()


def read_mlx_config(folder: Path) -> dict[str, Any]:
    """Return the content of adapter_config.json, with `lora_parameters` as it must be.

    CheckpointError if it is damaged, or says what is not computed here.
    """
    place = folder / ADAPTER_CONFIG
    content: dict[str, Any] = read_json(place, {"lora_parameters": dict[str, Any]})
    kind = content.get("fine_tune_type", LORA)
    if kind not in (LORA, DORA):
        raise CheckpointError(
            f"{place}: fine_tune_type is {shown(kind)}; this version computes only {LORA!r} and {DORA!r}; fuse it in "
            "mlx-lm (mlx_lm.fuse), and take the whole model"
        )
    return content


def write_mlx_adapter(
    folder: Path,
    tensors: Mapping[str, np.ndarray],
    *,
    blocks: int,
    rank: int,
    scale: float,
    dropout: float = 0.0,
    dora: bool = False,
    base_model: str | None = None,
    base: Mapping[str, str] | None = None,
) -> None:
    """Write both files, or leave those that are there as they are.

    tensors   by mlx-lm's names, all of one rank; there is at least one
    blocks    how many the model has
    dora      rows have lengths among the tensors
    base      what the weights that they were trained on are known by, for a reader of ours
    NonFiniteError, and nothing written, for NaN or infinity.
    """
    check_written(folder / MLX_WEIGHTS, tensors)
    modules = dict.fromkeys(name.rpartition(".")[0] for name in tensors)
    parameters = {
        "rank": rank,
        "scale": scale,
        "dropout": dropout,
        "keys": list(dict.fromkeys(BLOCK.sub("", module) for module in modules)),
    }
    content = {
        "fine_tune_type": DORA if dora else LORA,
        "lora_parameters": parameters,
        "model": base_model,
        "num_layers": blocks,
    }
    metadata = {"format": "mlx", **(base or {})}
    with atomic_files(folder / ADAPTER_CONFIG) as open_new:
        write_pieces(open_new(folder / MLX_WEIGHTS), safetensors_pieces(tensors, metadata))
        open_new(folder / ADAPTER_CONFIG).write(json_text(content).encode())
