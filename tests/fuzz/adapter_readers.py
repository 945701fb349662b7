"""Adapters in the files of PEFT, mlx-lm and llama.cpp, on models that are there."""

import functools
from pathlib import Path
from typing import Any

from reader import Reader, small_model

import abi_py as abi
from abi_py.model.stored_adapter import base_digest_of, base_fingerprint_of, base_named_by, base_storage_of

BASE = small_model()
WITH_BIASES = small_model(family="qwen2")
WITH_EXPERTS = small_model(family="qwen3_moe")
PEFT = ("adapter_config.json", "adapter_model.safetensors")

LINEAR = abi.LoraConfig(rank=2, alpha=4, target_modules=("q_proj", "down_proj"))
WITH_COPIES = abi.LoraConfig(
    rank=2,
    target_modules=("q_proj", "down_proj"),
    exclude_modules=("layers.0.self_attn.q_proj",),
    rank_pattern={"down_proj": 3},
    alpha_pattern={"down_proj": 5.0},
    modules_to_save=("norm", "embed_tokens"),
    bias="lora_only",
    use_dora=True,
)
EXPERTS = abi.LoraConfig(rank=2, target_modules=("o_proj",), target_parameters=("experts.gate_up_proj",))


def make_adapter(folder: Path) -> None:
    """Write PEFT's folder of adapters on `BASE`."""
    _peft(BASE, LINEAR, folder)


def _peft(base: abi.TrainableModel, config: abi.LoraConfig, folder: Path) -> None:
    abi.LoraModel(base, config).save(folder)


def _gguf(folder: Path) -> None:
    abi.LoraModel(BASE, LINEAR).save_gguf(folder / "x.gguf", "F16")


def _mlx(folder: Path) -> None:
    abi.LoraModel(BASE, LINEAR).save_mlx(folder)


def _read(base: abi.TrainableModel, name: str, folder: Path) -> None:
    place = folder / name
    for said in (base_digest_of, base_storage_of, base_named_by):
        said(place)
    lora, there = abi.LoraModel.load(base, place), base_fingerprint_of(place)
    if there is not None:
        there.apart(lora.identity.fingerprint)


def _on(base: abi.TrainableModel, name: str = "") -> Any:
    return functools.partial(_read, base, name)


ADAPTERS = (
    Reader("adapter", make_adapter, PEFT, _on(BASE), share=16),
    Reader("adapter with copies", functools.partial(_peft, WITH_BIASES, WITH_COPIES), PEFT, _on(WITH_BIASES), share=2),
    Reader("adapter of experts", functools.partial(_peft, WITH_EXPERTS, EXPERTS), PEFT, _on(WITH_EXPERTS), share=2),
    Reader("adapter in gguf", _gguf, ("x.gguf",), _on(BASE, "x.gguf"), share=4),
    Reader("adapter of mlx-lm", _mlx, ("adapter_config.json", "adapters.safetensors"), _on(BASE), share=4),
)
