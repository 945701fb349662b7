"""`python -m abi_py` is `abi-train`: the entry point of both, which imports what it needs where Ctrl-C is caught."""

import sys


def main() -> None:
    """Call the command line; Ctrl-C while it is being imported ends it like one that comes later."""
    try:
        from .cli import main as command_line

        command_line()
    except KeyboardInterrupt:
        sys.stderr.write("stopped\n")
        sys.exit(130)


if __name__ == "__main__":
    main()
