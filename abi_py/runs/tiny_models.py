"""Tiny models of each family, for compiling what larger ones run; decoding with them."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..shape import ModelFamily

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ..config import TrainableModelConfig
    from ..model import TrainableModel
    from ..model.frozen import FrozenModel
    from ..model.transformer import Transformer

__all__ = ["decode_like", "decode_once", "stored_as", "tiny", "tiny_frozen", "tiny_shape"]


def tiny_shape(family: ModelFamily, width: int = 16) -> "TrainableModelConfig":
    """Return a shape with the family's own defaults; its matrices have `width` columns."""
    from ..config import TrainableModelConfig

    heads = {"num_heads": 2, "num_kv_heads": 1}
    sizes = {"hidden_dim": width, "num_layers": 1, "intermediate_dim": width, "vocab_size": 32, "max_seq_len": 64}
    return TrainableModelConfig.from_dict({**heads, **sizes}).replace(family=family)


def tiny(family: ModelFamily, width: int = 16) -> "TrainableModel":
    """Return a model of it."""
    from ..model import TrainableModel

    return TrainableModel(tiny_shape(family, width))


def tiny_frozen(family: ModelFamily, storage: str) -> "FrozenModel":
    """Return one whose matrices are kept in a storage."""
    from ..model.frozen import storage_named

    return stored_as(tiny(family, max(16, storage_named(storage).block)), storage)


def stored_as(model: "TrainableModel", storage: str) -> "FrozenModel":
    """Return the same model, only read, with its matrices in a storage, where their rows are whole blocks of it."""
    from ..formats.encoded import Encoded, kept_as
    from ..formats.safetensors import Stored
    from ..model.frozen import FrozenModel, storage_named

    keep = storage_named(storage)
    kept: dict[str, Stored | Encoded] = {name: Stored(w) for name, w in model.weights.items()}
    for name, w in model.weights.items():
        if w.ndim > 1 and w.shape[-1] % keep.block == 0:
            raw, own = keep.encoded_ref(w.reshape(-1, w.shape[-1]))
            kept[name] = kept_as(own, raw, w.shape)
    return FrozenModel(model.config, kept)


def decode_like(model: "Transformer", *, integer: bool = True) -> None:
    """Decode with tiny models of a model's family, whose matrices are kept as its own are: all it needs is compiled."""
    from ..model import LoraModel
    from ..model.frozen import FrozenModel

    family, base = model.config.family, model.model if isinstance(model, LoraModel) else model
    storages = base.storages() if isinstance(base, FrozenModel) else ()
    decode_once([tiny_frozen(family, storage) for storage in storages] or [tiny(family)], integer=integer)


def decode_once(models: Iterable["Transformer"], *, integer: bool = True) -> None:
    """Read some tokens and write one with each model, with the types of generation: products of some rows and few."""
    import numpy as np

    from ..generation.decoder import Decoder, weights_mark
    from ..kernels.cached_attention import ROWS_OF_A_BLOCK
    from ..kernels.engine.streams import STREAMED

    for model in models:
        weights_mark(model)
        decoder = Decoder(model, integer=integer)
        decoder.prefill(0, np.arange(STREAMED + ROWS_OF_A_BLOCK, dtype=np.int32))
        decoder.step(np.zeros(1, np.int32), np.zeros(1, np.int32))
