"""RoPE in the metadata of GGUF files: its base and its scaling, both ways; as `config_rope.py` is for config.json.

    linear, yarn   keys, of which llama.cpp's loader reads the type, the factor, the length of training, and what
                   cosines and sines are multiplied by, but not YaRN's betas
    llama3         no keys: a tensor, rope_freqs.weight (D/2,), by which the frequencies are divided
    dynamic        cannot be said

The tensor does not say by which numbers it was made; they are found again, and held against it.  It depends on two
numbers besides the factor: between two bounds 1/divisor grows linearly with the frequency, and slope and offset of that
are all there is to know of low_freq_factor, high_freq_factor and original_max_position_embeddings.
"""

import math
from typing import Any

import numpy as np

from ..errors import CheckpointError, ConfigError
from ..formats.gguf.values import F32, U32
from ..kernels.rope import rope_frequencies
from ..rope_scaling import RopeScaling, RopeType
from ..shape import ModelShape
from .gguf_keys import Keys

__all__ = ["ROPE_FREQS", "divisors", "rope_fields", "write_rope"]

ROPE_FREQS = "rope_freqs.weight"
BASE = 10000.0
BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}
CLOSE = 1e-5  # of the largest error, in float32, of a tensor that these formulas made


def rope_fields(keys: Keys, head_dim: int, longest: int, *, divided: bool = False) -> dict[str, Any]:
    """Return the fields `rope_theta` and `rope_scaling`.

    divided   llama.cpp divides frequencies by the tensor `rope_freqs.weight`, if there is one, in this architecture
    CheckpointError for a scaling that is not computed here.
    """
    theta = keys.number("rope.freq_base", BASE)
    scaling = _of_keys(keys)
    tensor = keys.tensors.get(ROPE_FREQS) if divided else None
    if tensor is not None:
        if scaling is not None:
            raise CheckpointError(
                f"{keys.file.path}: {ROPE_FREQS} and {keys.architecture}.rope.scaling.factor both scale RoPE; this "
                "version computes one scaling"
            )
        if tensor.shape != (head_dim // 2,) or tensor.kind.name != "F32":
            raise CheckpointError(
                f"{keys.file.path}: {ROPE_FREQS} is {tensor.kind} {tensor.shape}; it must be F32 ({head_dim // 2},)"
            )
        scaling = _of_divisors(np.asarray(tensor.raw, np.float32).reshape(-1), head_dim, theta, longest)
        if scaling is ...:
            raise CheckpointError(
                f"{keys.file.path}: {ROPE_FREQS} divides the frequencies of RoPE otherwise than Llama 3 does; this "
                "version computes no other"
            )
    return {"rope_theta": theta, "rope_scaling": scaling}


def _of_keys(keys: Keys) -> RopeScaling | None:
    kind = keys.text("rope.scaling.type", "linear")  # without a factor this is none
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 0.0))
    length = keys.whole("rope.scaling.original_context_length", 0)
    numbers = {name: keys.number(f"rope.scaling.yarn_{name}", default) for name, default in BETAS.items()}
    by = keys.number("rope.scaling.attn_factor", 1.0) * keys.number("rope.scaling.yarn_attn_factor", 1.0)
    keys.only("rope.scaling.yarn_ext_factor", 1.0, -1.0)
    if kind == "none" or (kind == "linear" and factor in (0, 1)):
        return None
    given: dict[str, Any] = {"rope_type": kind, "factor": factor}
    if kind == RopeType.YARN:
        given |= numbers | ({"original_max_position_embeddings": length} if length else {})
        if by != 1:
            given["attention_factor"] = by * (0.1 * math.log(max(factor, 1)) + 1)
    elif kind != RopeType.LINEAR:
        raise keys.wrong("rope.scaling.type", "this version computes none, linear and yarn")
    try:
        return RopeScaling.from_dict(given)
    except ConfigError as error:
        raise CheckpointError(f"{keys.file.path}: {keys.architecture}.rope.scaling: {error}") from None


def divisors(shape: ModelShape) -> np.ndarray | None:
    """Return the tensor `rope_freqs.weight` (D/2,) float32 of a shape; None where its RoPE is said by keys."""
    scaling = shape.rope_scaling
    if scaling is None or scaling.rope_type is not RopeType.LLAMA3:
        return None
    return _divisors(scaling, shape.resolved_head_dim, shape.rope_theta, shape.max_seq_len)


def _divisors(scaling: RopeScaling, head_dim: int, theta: float, longest: int) -> np.ndarray:
    plain, _ = rope_frequencies(head_dim, theta)
    scaled, _ = rope_frequencies(head_dim, theta, scaling.numbers(longest))
    return (plain / scaled).astype(np.float32)


def _of_divisors(found: np.ndarray, head_dim: int, theta: float, longest: int) -> Any:
    """Return the scaling that makes this tensor; None if it divides nothing, `...` if there is none."""
    if (found == 1).all():
        return None
    if not np.isfinite(found).all() or found.min() < 1 - CLOSE:
        return ...
    factor = float(str(found.max()))
    likely = [(1.0, 4.0, 1 << n) for n in range(21)]  # Llama's own bounds, and a length of training
    best: Any = ...
    least = CLOSE
    for low, high, length in [*likely, *_solved(found, factor, head_dim, theta)]:
        numbers = {"low_freq_factor": low, "high_freq_factor": high, "original_max_position_embeddings": length}
        try:
            scaling = RopeScaling.from_dict({"rope_type": "llama3", "factor": factor, **numbers})
        except ConfigError:
            continue
        error = np.abs(_divisors(scaling, head_dim, theta, longest) / found - 1).max()
        if error < least:
            best, least = scaling, error
    return best


def _solved(found: np.ndarray, factor: float, head_dim: int, theta: float) -> list[tuple[float, float, int]]:
    """Return bounds and length that explain the pairs between the bounds: 1/divisor = (1 - s)/factor + s, and
    s = (length f/(2 pi) - low) / (high - low)."""
    plain, _ = rope_frequencies(head_dim, theta)
    between = (found > 1 + CLOSE) & (found < factor * (1 - CLOSE))
    if between.sum() < 2:
        return []
    share = (1 / found[between].astype(np.float64) - 1 / factor) / (1 - 1 / factor)
    slope, offset = np.polyfit(plain[between] / (2 * math.pi), share, 1)
    if offset >= 0 or slope <= 0:
        return []
    length = round(-slope / offset)  # with low = 1
    return [(1.0, 1 - 1 / offset, length)]


def write_rope(architecture: str, shape: ModelShape, *, divided: bool = False) -> dict[str, Any]:
    """Return the entries of RoPE; ConfigError for a scaling that llama.cpp does not compute in the architecture."""
    written: dict[str, Any] = {"rope.freq_base": F32(shape.rope_theta)}
    scaling = shape.rope_scaling
    if scaling is None:
        return written
    kind = scaling.rope_type
    if kind is RopeType.DYNAMIC or (kind is RopeType.LLAMA3 and not divided):
        raise ConfigError(
            f"rope_scaling ({kind.value}) cannot be written as GGUF: llama.cpp computes "
            f"{'none, linear, yarn and llama3' if divided else 'none, linear and yarn'} in the architecture "
            f"{architecture}; export a Hugging Face folder"
        )
    if kind is RopeType.LLAMA3:
        return written
    written |= {"rope.scaling.type": kind.value, "rope.scaling.factor": F32(scaling.factor)}
    if kind is RopeType.LINEAR:
        return written
    other = next((name for name, value in BETAS.items() if getattr(scaling, name) != value), None)
    if other is not None or not scaling.truncate:
        name = other or "truncate"
        raise ConfigError(
            f"rope_scaling's {name} ({getattr(scaling, name)}) cannot be written as GGUF: llama.cpp computes YaRN "
            f"with {BETAS.get(name, True)} alone; export a Hugging Face folder"
        )
    numbers = scaling.numbers(shape.max_seq_len)
    usual = 0.1 * math.log(scaling.factor) + 1
    _, by = rope_frequencies(shape.resolved_head_dim, shape.rope_theta, numbers)
    if by != usual:
        written["rope.scaling.attn_factor"] = F32(by / usual)
    return written | {"rope.scaling.original_context_length": U32(numbers["original"])}
