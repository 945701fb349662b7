"""Saying where NaN and infinity were met: which rows of the data, which tensors, and which row of a tensor began it.

A row of the embedding that is not finite makes the loss of each row NaN that reads its id; where the embedding is also
the head (tied), or where it is a row of the head, the logits and so the losses of all rows.  Then the rows of the batch
say nothing: the message names the row of the tensor, and the rows that read its id, if there are any.
"""

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from ..errors import listed
from ..model.transformer import Transformer

__all__ = ["Origin", "bad_rows", "bad_tensors"]

MAX_NAMED = 8  # rows or tensors named in one message

Origin = Callable[[int, int], str]  # (row of the batch, position in it) -> where in the data that is from


def bad_rows(
    token_losses: np.ndarray, input_ids: npt.ArrayLike, model: Transformer, origin: Origin | None = None
) -> str:
    """Name the rows of a batch whose losses (B, T) are not all finite, by `origin` in the data too.

    input_ids (B, T), or as many ids; if weights of `model` are not finite, they are named, and of the rows those that
    read them.
    """
    losses = np.asarray(token_losses)
    losses = losses.reshape(losses.shape[0], -1)
    bad = ~np.isfinite(losses)
    rows = np.flatnonzero(bad.any(axis=1))
    weights = _bad_weights(model)
    began = f"; weights are not finite: {_named(weights)}" if weights else ""
    if not rows.size:  # the losses are finite, their sum is not
        return f"the sum over the batch{began}"
    if "token_embedding" in weights:
        reading = np.isin(np.asarray(input_ids).reshape(losses.shape[0], -1), weights["token_embedding"])
        if reading[rows].any():
            rows, bad = rows[reading[rows].any(axis=1)], reading
    text = f"row{'s' if rows.size > 1 else ''} {listed(list(map(str, rows)), MAX_NAMED)} of the batch"
    if origin is not None:
        text += f" ({', '.join(origin(int(row), int(np.argmax(bad[row]))) for row in rows[:MAX_NAMED])})"
    return text + began


def bad_tensors(model: Transformer) -> str:
    """Name the tensors of a model whose gradients are not all finite, and their rows where that is not all of them."""
    text = _named(_not_finite(model.gradients))
    weights = _bad_weights(model)
    return text + (f"; weights are not finite: {_named(weights)}" if weights else "")


def _bad_weights(model: Transformer) -> dict[str, np.ndarray]:
    """Return tensor -> its rows with weights that are not finite, of adapters and of the model below them."""
    return {**_not_finite(model.base.weights), **_not_finite(model.weights)}


def _not_finite(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return name -> the rows (first axis) that are not finite; all of them as an empty array."""
    found = {}
    for name, tensor in tensors.items():
        good = np.isfinite(tensor.reshape(tensor.shape[0], -1)).all(axis=1)
        if not good.all():
            found[name] = np.flatnonzero(~good) if good.any() else np.empty(0, np.int64)
    return found


def _named(tensors: dict[str, np.ndarray]) -> str:
    names = []
    for name, rows in tensors.items():
        what = "id" if name == "token_embedding" else "row"
        plural = "s" if rows.size > 1 else ""
        names.append(f"{name} ({what}{plural} {listed(list(map(str, rows)), MAX_NAMED)})" if rows.size else name)
    return listed(names, MAX_NAMED)
