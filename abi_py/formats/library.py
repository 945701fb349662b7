"""What the `tokenizers` library raises, as errors of ours."""

import contextlib
from collections.abc import Iterator

from ..errors import DataError

__all__ = ["library_errors"]


@contextlib.contextmanager
def library_errors(problem: str, remedy: str) -> Iterator[None]:
    """Make a DataError of what the `tokenizers` library raises: bare Exception, and where its Rust panics, worse."""
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise DataError(f"{problem} ({error}); {remedy}") from None
