"""From what a caller calls data to the batches of a run: opened, identified, and held against those of a checkpoint.

Data are a data set (`data/feed.py`: TokenizedDataset, ChatDataset, DataLoader, packed sequences, or one of your own),
or an array or list of token ids.
"""

from typing import Any, TypeAlias, cast

import numpy.typing as npt

from ..config import LlmTrainingConfig, TrainableModelConfig
from ..data.feed import Batching, Dataset, Feed
from ..data.tokens import TokenizedDataset
from ..errors import ConfigError, DataError

__all__ = ["Data", "check_same_data", "describe", "open_feed"]

Data: TypeAlias = Dataset | npt.ArrayLike


def open_feed(data: Data, config: LlmTrainingConfig, model: TrainableModelConfig, training: bool) -> Feed:
    """Return a feed over `data`; for evaluation (`training` false) in the data's own order and with nothing left out.

    ConfigError if its sequences are longer than the model can read.
    """
    dataset = cast(Dataset, data) if hasattr(data, "feed") else TokenizedDataset.from_slice(cast(npt.ArrayLike, data))
    feed = dataset.feed(
        Batching(
            batch_size=config.batch_size,
            seq_len=config.max_seq_len,
            shuffle=config.shuffle and training,
            seed=config.seed,
            vocab_size=model.vocab_size,
            training=training,
        )
    )
    if feed.seq_len > model.max_seq_len:
        raise ConfigError(
            f"max_seq_len ({feed.seq_len}) of the training must not exceed the model's ({model.max_seq_len}); "
            f"set it to {model.max_seq_len} or less"
        )
    return feed


def describe(feed: Feed) -> dict[str, Any]:
    """Return what identifies the data (`identity`) and the order of its batches (`order`), as plain values for JSON.

    `batches` is how many of them an epoch has.
    """
    return {"identity": feed.dataset.identity(), "order": feed.order, "batches": feed.num_batches}


def check_same_data(saved: dict[str, Any], now: dict[str, Any], inside_epoch: bool) -> None:
    """Raise if a resumed run would go on with other data (DataError), or in the middle of an epoch of another order."""
    if saved["identity"] != now["identity"]:
        raise DataError(
            f"these are not the data of the checkpoint: length {now['identity']['length']} instead of "
            f"{saved['identity']['length']}, or other content; give the same data; in Python, "
            "load_checkpoint(path, new_data=True) keeps weights and moments and begins other data at their first batch"
        )
    for name, value in now["order"].items():
        if inside_epoch and saved["order"].get(name) != value:
            raise ConfigError(
                f"{name} ({value}) must stay {saved['order'].get(name)} in the middle of an epoch: the place in "
                "the data would mean other batches; keep it; in Python, load_checkpoint(path, new_data=True) begins "
                "the data anew"
            )
