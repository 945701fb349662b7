"""`python -m abi_py` is `abi-train`: the entry point of both, which imports what it needs where Ctrl-C is caught."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any


def main(arguments: Sequence[str] | None = None, defaults: Mapping[str, Mapping[str, Any]] | None = None) -> None:
    """Call the command line; Ctrl-C while it is being imported ends it like one that comes later.

    arguments  those of the process if they are not given     defaults  verb -> parameter -> value, unless said
    """
    try:
        from .cli import main as command_line

        command_line(arguments, defaults)
    except KeyboardInterrupt:
        sys.stderr.write("stopped\n")
        sys.exit(130)


if __name__ == "__main__":
    main()
