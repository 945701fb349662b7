"""Rows of a Parquet file, by pyarrow (the extra `parquet`): one block of rows in memory at a time."""

from collections.abc import Iterator
from pathlib import Path

from ..errors import ConfigError, DataError
from .json_rows import Row

__all__ = ["parquet_rows"]

ROWS = 256  # read at once


def parquet_rows(path: Path) -> Iterator[Row]:
    """Yield (row number from 1, {column: value}) of a table.

    ConfigError without pyarrow; DataError naming the file if it is damaged or no Parquet; OSError passes through.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ConfigError(f"{path} needs pyarrow; run pip install 'abi_py[parquet]', or write it as .jsonl") from None
    number = 0
    with open(path, "rb") as file:
        try:
            for block in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=ROWS):
                for row in block.to_pylist():
                    number += 1
                    yield number, row
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            why = " ".join(str(error).split())
            raise DataError(f"{path} is damaged after row {number}, or no Parquet file: {why}; get it again") from None
