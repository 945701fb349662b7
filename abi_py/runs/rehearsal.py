"""A rehearsal: a tiny run like the one to come, so that whatever that calls is compiled, or loaded, before it begins.

`compiling.py` compiles in parallel what the layers say they need.  Which types a kernel is called with follows from
more than that: the storages of a frozen base, dropout, masks, the optimizer, how the model writes at the end.  So the
real calls are made once, with a model that has the same settings and almost no weights, and what the cache lacks is
compiled here and not in the first step, where it would look like a slow one.
"""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..errors import counted
from ..shape import ModelShape
from .compiling import counting_compilations
from .tiny_models import decode_once, stored_as

if TYPE_CHECKING:
    from ..config import LlmTrainingConfig, TrainableModelConfig
    from ..model import LoraModel, TrainableModel
    from ..training.session import Model

__all__ = ["rehearse", "rehearse_counting", "shrunk"]

WIDTH = 16  # of everything
TOKENS = 8  # of a row


def shrunk(shape: ModelShape) -> "TrainableModelConfig":
    """Return the settings of a model with the same layers, and almost no weights."""
    from ..config import TrainableModelConfig

    kinds = {"head_dim": None if shape.head_dim is None else WIDTH // 2, "rope_scaling": None}
    if shape.expert_dim is not None:
        kinds["expert_dim"] = WIDTH
    heads = {"num_heads": 2, "num_kv_heads": 2 if shape.num_heads == shape.num_kv_heads else 1}
    sizes = {"hidden_dim": WIDTH, "intermediate_dim": WIDTH, "vocab_size": 2 * WIDTH, "max_seq_len": 4 * TOKENS}
    return TrainableModelConfig.from_dict({**shape.to_dict(), **heads, **sizes, **kinds})


def _models(model: "Model") -> "list[TrainableModel | LoraModel]":
    """Return a tiny model like this one; of a frozen base, one for each storage that its matrices are kept in."""
    from ..model import LoraModel, TrainableModel
    from ..model.frozen import FrozenModel

    plain = TrainableModel(shrunk(model.config))
    if not isinstance(model, LoraModel):
        return [plain]
    base = model.model
    bases = [stored_as(plain, storage) for storage in base.storages()] if isinstance(base, FrozenModel) else [plain]
    return [LoraModel(each, model.lora) for each in bases]


def rehearse(model: "Model", config: "LlmTrainingConfig", decodes: bool = True) -> None:
    """Make the calls of a training of `model`, which stays as it is: steps, an evaluation and, if it `decodes`, a text.

    float32 or reduced precision, any optimizer and way of gradient checkpointing, adapters on any base; a window of
    several micro-batches, with padding and without.
    """
    import numpy as np

    from ..training.trainer import LlamaTrainer

    small = {"batch_size": 2, "max_seq_len": TOKENS, "grad_accum_steps": 2, "max_bad_steps": 10**6}
    silent = {"checkpoint_path": None, "log_dir": None, "enable_tensorboard": False, "enable_wandb": False}
    silent["enable_metrics_stream"] = False
    ids = np.arange(2 * TOKENS, dtype=np.uint32).reshape(2, TOKENS)
    mask = np.ones_like(ids, dtype=np.uint8)
    mask[:, -2:] = 0
    labels = np.where(mask, ids.astype(np.int64), -100)
    for each in _models(model):
        trainer = LlamaTrainer(each, config.replace(**small, **silent))
        trainer.train_step(ids, ids)
        trainer.train_step(ids, labels, attention_mask=mask)
        each.compute_loss(ids, ids, precision=config.mixed_precision)
        if decodes:
            decode_once([each.for_decoding()])


def rehearse_counting(
    model: "Model",
    config: "LlmTrainingConfig",
    decodes: bool,
    report: Callable[[str], None],
    count: Callable[[int, int], object],
) -> None:
    """Rehearse; `count` the kernels that are compiled on the way, and `report` in one line how many there were."""
    began = time.perf_counter()
    with counting_compilations(count) as counter:
        rehearse(model, config, decodes)
    if counter.done:
        report(f"{counted(counter.done, 'kernel')} more, in {time.perf_counter() - began:.0f} s")
