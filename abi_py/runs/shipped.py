"""The conversations that come with the package, under a name that is the same on every machine.

    builtin:deepzig     916 short conversations in English: questions and answers, code, calls of tools
    builtin:csdl        624 instructions in English, answered in JSON, each with its pattern as category

A file that is really called so is reached as ./builtin:deepzig.
"""

from pathlib import Path

from ..errors import ConfigError

__all__ = ["SHIPPED", "is_builtin", "name_of", "place_of"]

SHIPPED = "builtin:deepzig"
_PLACES = {
    name: Path(__file__).parents[1] / f"data/{name.removeprefix('builtin:')}_conversations.jsonl"
    for name in (SHIPPED, "builtin:csdl")
}


def is_builtin(path: str) -> bool:
    """Say whether a path is the name of data of the package."""
    return path.startswith("builtin:")


def place_of(path: str) -> str:
    """Return where the data are that `path` names; ConfigError for an unknown name."""
    if not is_builtin(path):
        return path
    if path not in _PLACES:
        raise ConfigError(f"data ({path}) must be {' or '.join(_PLACES)}; or write ./{path} for a file of that name")
    return str(_PLACES[path])


def name_of(place: str) -> str:
    """Return the name of the data in a file, or its path where it is none of the package's."""
    return next((name for name, own in _PLACES.items() if str(own) == place), place)
