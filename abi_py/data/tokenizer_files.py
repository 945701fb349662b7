"""The files of a tokenizer, read: tokenizer.json, and beside it what names its special tokens and its chat template.

`tokenizer_config.json` holds the chat template, unless there is a `chat_template.jinja`, and with the files of
`formats/special_tokens.py` the names of the special tokens.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers

from ..errors import DataError, shown
from ..formats.gguf.container import is_gguf, open_gguf
from ..formats.library import library_errors
from ..formats.special_tokens import special_token_names
from ..untrusted import check, json_in, read_bytes, read_json, read_text

__all__ = ["CONFIG_FILE", "FILES", "TEMPLATE_FILE", "TOKENIZER_FILE", "default_template", "read_tokenizer"]

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
FILES = (TOKENIZER_FILE, CONFIG_FILE)  # what `save` writes
DAMAGED = "the file is cut short or damaged: copy it again"
NOT_ONE = f"a tokenizer is a {TOKENIZER_FILE}: give the path of one, or copy it again if it is cut short"
# What is read of tokenizer.json before the library reads it.
DESCRIPTION = {"model": dict[str, Any], "added_tokens": list[Any] | None}
FREE_IDS, IDS_A_TOKEN = 1 << 16, 8  # ids may have gaps, but not such that a table of them is a burden
TEMPLATE_FILE = "chat_template.jinja"  # where newer versions of transformers keep the template


class TokenizerFiles(NamedTuple):
    """What was read: the tokenizer, what tokenizer_config.json says, and the file that the chat template is from."""

    backend: tokenizers.Tokenizer
    settings: dict[str, Any]
    path: Path
    template: Path


def read_tokenizer(path: Path) -> TokenizerFiles:
    """Read a tokenizer.json, or that of a directory or GGUF file, and what is beside it; errors of `Tokenizer.load`."""
    if is_gguf(path):
        return _in_gguf(path)
    file = path / TOKENIZER_FILE if path.is_dir() else path
    if not file.is_file():
        where = f"{path} has no {TOKENIZER_FILE}" if path.is_dir() else f"{path} is not there"
        raise DataError(
            f"{where}; a tokenizer is a {TOKENIZER_FILE} or a directory that holds one: give its path, or make one "
            "with `abi-train tokenizer train`"
        )
    backend = _opened(read_bytes(file, error=DataError), file)
    config, template = file.with_name(CONFIG_FILE), file.with_name(TEMPLATE_FILE)
    settings = read_json(config, error=DataError, remedy=DAMAGED) if config.is_file() else {}
    if template.is_file():
        settings = {**settings, "chat_template": read_text(template, error=DataError, remedy="copy the file again")}
    settings |= special_token_names(file.parent, settings, backend.token_to_id, backend.id_to_token)
    return TokenizerFiles(backend, settings, file, template if template.is_file() else config)


def _opened(content: bytes, file: Path) -> tokenizers.Tokenizer:
    _check_ids(json_in(content, DESCRIPTION, file, error=DataError, remedy=NOT_ONE), file)
    with library_errors(
        f"{file} is JSON but no tokenizer that the `tokenizers` library {tokenizers.__version__} can read",
        "give the tokenizer.json of a model, or make one with `abi-train tokenizer train`",
    ):
        return tokenizers.Tokenizer.from_str(content.decode("utf-8"))


def _in_gguf(path: Path) -> TokenizerFiles:
    """Return the tokenizer of a GGUF file."""
    from ..formats.gguf.companion_files import companions_of

    files = companions_of(open_gguf(path).metadata, str(path))[0].files
    if TOKENIZER_FILE not in files:
        raise DataError(f"{path} has no tokenizer; give the {TOKENIZER_FILE} of its model")
    backend = _opened(files[TOKENIZER_FILE], path)
    settings = json_in(files[CONFIG_FILE], dict[str, Any], path, error=DataError, remedy=DAMAGED)
    settings |= special_token_names(files, settings, backend.token_to_id, backend.id_to_token)
    return TokenizerFiles(backend, settings, path, path)


def _check_ids(content: Mapping[str, Any], path: Path) -> None:
    """Raise DataError for an added token without text, and for ids that are not integers from 0, given twice, or far
    above the number of tokens: the library counts to the largest."""
    vocabulary = content["model"].get("vocab")  # of Unigram a list, whose ids are the places in it
    tokens = list(vocabulary.items()) if isinstance(vocabulary, dict) else []
    count = len(vocabulary) if isinstance(vocabulary, dict | list) else 0
    added, form = content.get("added_tokens") or [], [{"id": int, "content": str}]
    check(added, form, f"{path}: added_tokens", error=DataError, remedy=DAMAGED)
    tokens += [(token["content"], token["id"]) for token in added]
    limit = FREE_IDS + IDS_A_TOKEN * count
    names: dict[int, str] = {}
    for name, number in tokens:
        if type(number) is not int or not 0 <= number < limit:
            rule = f"no id of a vocabulary of {count:,} tokens, in which ids are below {limit:,}"
            raise DataError(f"{path}: {shown(number)} is {rule}; {DAMAGED}")
        if names.setdefault(number, name) != name:
            both = f"{shown(names[number])} and {shown(name)}"
            raise DataError(f"{path}: {both} have the same id {number}; give each token an id of its own")
    if any(not token["content"] for token in added):
        raise DataError(f'{path}: added_tokens holds "", which is found between any two characters; take it out')


def default_template(template: Any, name: str) -> str | None:
    """Return the chat template; of several named ones that called "default"."""
    if isinstance(template, list) and all(isinstance(entry, dict) and "template" in entry for entry in template):
        template = next((entry["template"] for entry in template if entry.get("name") == "default"), None)
    if template is not None and not isinstance(template, str):
        raise DataError(
            f"{name}: chat_template in {CONFIG_FILE} is a {type(template).__name__}; it must be Jinja text, or a list "
            "of objects with name and template"
        )
    return template
