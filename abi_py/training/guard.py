"""Saying where NaN and infinity were met."""

from typing import Any

import numpy as np

__all__ = ["bad_rows", "bad_tensors"]

MAX_NAMED = 8  # rows or tensors named in one message


def bad_rows(token_losses: np.ndarray) -> str:
    """Name the rows of a batch whose losses (B, T) are not all finite."""
    losses = np.asarray(token_losses)
    rows = np.flatnonzero(~np.isfinite(losses).reshape(losses.shape[0], -1).all(axis=1))
    if not rows.size:  # the losses are finite, their sum is not
        return "the sum over the batch"
    return f"row{'s' if rows.size > 1 else ''} {_list([str(row) for row in rows])} of the batch"


def bad_tensors(model: Any) -> str:
    """Name the tensors of a model whose gradients are not all finite."""
    return _list([name for name, gradient in model.gradients.items() if not np.isfinite(gradient).all()])


def _list(names: list[str]) -> str:
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more
