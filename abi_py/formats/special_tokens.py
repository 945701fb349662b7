"""Which tokens begin, end and pad a text, and mean the unknown: what the files of a folder say.

    special_tokens_map.json    names; after the next where that one lists its tokens itself (`added_tokens_decoder`)
    tokenizer_config.json      names
    generation_config.json     ids, one or several
    config.json                ids

Names are the tokenizer's word, ids the model's.  Among names and among ids the first file that says something decides,
which is transformers' order (measured with 5.24).  There a tokenizer reads names alone and `generate` ids alone; here
each asks the others before it guesses: `Tokenizer` names, then ids; generation ids, then its tokenizer.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import DataError, shown
from ..untrusted import json_in, read_json

__all__ = ["MOST_IDS", "ROLES", "check_name", "special_token_ids", "special_token_names", "token_ids", "token_name"]

MOST_IDS = 1 << 19  # ids of a vocabulary; the largest ones have half as many
ROLES = ("bos", "eos", "pad", "unk")
MAP, TOKENIZER_CONFIG = "special_tokens_map.json", "tokenizer_config.json"
WITH_IDS = ("generation_config.json", "config.json")
REMEDY = "correct or remove it"


def token_ids(value: Any, key: str, place: str | Path) -> tuple[int, ...]:
    """Return one id or a list of them as a tuple; DataError for anything else."""
    ids = value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise DataError(f"{place}: {key} is {shown(value)}, but must be an id or a list of ids; set it to null if none")
    return tuple(ids)


Files = Path | Mapping[str, bytes]  # a folder, or its files by name


def _read(files: Files, name: str) -> dict[str, Any] | None:
    """Return the content of a JSON file, None where there is none."""
    if isinstance(files, Path):
        path = files / name
        return read_json(path, error=DataError, remedy=REMEDY) if path.is_file() else None
    return json_in(files[name], dict[str, Any], name, error=DataError, remedy=REMEDY) if name in files else None


def _path(files: Files, name: str) -> str:
    return str(files / name) if isinstance(files, Path) else name


def special_token_ids(files: Files, role: str) -> tuple[int, ...] | None:
    """Return the ids that a model's folder states for a role; None if no file says anything.

    DataError for a damaged file, or a value that is not an id.
    """
    key = f"{role}_token_id"
    for name in WITH_IDS:
        value = (_read(files, name) or {}).get(key)
        if value == -1 and role == "pad":
            value = None  # what the first Llama said for "none"
        if value is not None:
            return token_ids(value, key, _path(files, name))
    return None


def special_token_names(
    files: Files, settings: Mapping[str, Any], id_of: Callable[[str], int | None], name_of: Callable[[int], str | None]
) -> dict[str, Any]:
    """Return {"bos_token": "<s>" ...} for the roles that a tokenizer's folder speaks of; None: there is none.

    `settings` is the content of tokenizer_config.json; id_of and name_of look into the vocabulary.  A name may be an
    object, as there: see `token_name`.  DataError for a damaged file, or a name that the vocabulary lacks.
    """
    names = {TOKENIZER_CONFIG: settings}
    if (content := _read(files, MAP)) is not None:
        of_map = {MAP: content}
        names = names | of_map if "added_tokens_decoder" in settings else of_map | names
    found: dict[str, Any] = {}
    for role in ROLES:
        key = f"{role}_token"
        said = {file: content[key] for file, content in names.items() if key in content}
        file = next((file for file, name in said.items() if name is not None), None)
        if file is not None:
            check_name(said[file], key, _path(files, file), id_of)
            found[key] = said[file]
        elif said:
            found[key] = None
        elif ids := special_token_ids(files, role):
            name = name_of(ids[0])
            if name is not None:
                found[key] = name
    return found


def token_name(value: Any) -> Any:
    """Return the name in {"content": "<s>", "lstrip": false, ...}; anything else as it is."""
    return value.get("content") if isinstance(value, Mapping) else value


def check_name(value: Any, key: str, place: str | Path, id_of: Callable[[str], int | None]) -> None:
    """Raise DataError if what `place` says about a role is not a token of the vocabulary."""
    name = token_name(value)
    if not isinstance(name, str) or id_of(name) is None:
        raise DataError(
            f"{place}: {key} is {shown(name)}, which is not in the vocabulary; correct {key} there, or set it to null"
        )
