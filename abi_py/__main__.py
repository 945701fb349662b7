"""`python -m abi_py` is `abi-train`."""

from .cli import main

if __name__ == "__main__":
    main()
