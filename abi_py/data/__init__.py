"""Data: from files to batches of token ids."""

from .tokens import IGNORE_INDEX, IGNORE_LABEL, Batch, BatchIterator, DataLoader, TokenizedDataset

__all__ = ["IGNORE_INDEX", "IGNORE_LABEL", "Batch", "BatchIterator", "DataLoader", "TokenizedDataset"]
