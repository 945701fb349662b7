"""What belongs to a model beside its weights, from the metadata of a GGUF file and into it.

tokenizer.json, tokenizer_config.json               tokenizer.ggml.*, tokenizer.chat_template
chat_template.jinja, additional_chat_templates/     tokenizer.chat_template, tokenizer.chat_template.NAME
special_tokens_map.json, config.json                the roles that tokenizer_config.json does not name
generation_config.json                              eos_token_id, eot_token_id, eom_token_id
"""

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

import tokenizers

from ...errors import DataError
from ...files import json_text
from ...untrusted import check, json_in
from ..companions import Companions
from ..huggingface import CONFIG
from ..library import library_errors
from ..special_tokens import special_token_ids, special_token_names
from .vocabulary import tokenizer_of
from .vocabulary_keys import GGML
from .vocabulary_writing import WrittenTokenizer, metadata_of

__all__ = ["companions_of", "metadata_of_companions"]

TOKENIZER, SETTINGS, TEMPLATE, MORE = (
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    "additional_chat_templates",
)
WITHOUT = (None, "none", "no_vocab")  # tokenizer.ggml.model of a file that has none
REMEDY = "it is damaged: copy it again"


def companions_of(metadata: Mapping[str, Any], place: str = "the GGUF file") -> tuple[Companions, tuple[str, ...]]:
    """Return the files that a GGUF file's metadata stands for, none if it has no tokenizer, and notes.

    Notes are sentences on where llama.cpp reads the file differently.  Errors of `tokenizer_of`.
    """
    if metadata.get(f"{GGML}model") in WITHOUT:
        return Companions(), ()
    read = tokenizer_of(metadata, place)
    return Companions(read.files()).with_ends(read.ends), read.notes


def metadata_of_companions(companions: Companions, rows: int) -> WrittenTokenizer | None:
    """Return what a GGUF file says of the tokenizer in these files; None if there is no tokenizer.json.

    rows is the number of rows of the model's embedding.  DataError for a damaged file, and for what llama.cpp cannot
    tokenize alike.
    """
    if TOKENIZER not in companions.files:
        return None
    files = {**companions.files, CONFIG: json_text(dict(companions.config)).encode()}
    backend = _opened(files[TOKENIZER])
    described = json_in(backend.to_str().encode(), dict[str, Any], TOKENIZER, error=DataError, remedy=REMEDY)
    settings: dict[str, Any] = {}
    if SETTINGS in files:
        settings = json_in(files[SETTINGS], dict[str, Any], SETTINGS, error=DataError, remedy=REMEDY)
    settings = {**settings, **special_token_names(files, settings, backend.token_to_id, backend.id_to_token)}
    settings["chat_template"] = _templates(files, settings.get("chat_template"))
    return metadata_of(described, settings, rows=rows, ends=special_token_ids(files, "eos") or ())


def _opened(content: bytes) -> tokenizers.Tokenizer:
    json_in(content, {"model": dict[str, Any]}, TOKENIZER, error=DataError, remedy=REMEDY)
    with library_errors(f"{TOKENIZER} is no tokenizer that the `tokenizers` library reads", REMEDY):
        return tokenizers.Tokenizer.from_str(content.decode("utf-8"))


def _templates(files: Mapping[str, bytes], template: Any) -> Any:
    """Return the chat template, or a list of several: files beside tokenizer_config.json go first."""
    entries = [{"name": "default", "template": template}] if isinstance(template, str) else template or []
    form = [{"name": str, "template": str}]
    check(entries, form, f"{SETTINGS}: chat_template", error=DataError, remedy="give Jinja text, or names and texts")
    named = {entry["name"]: entry["template"] for entry in entries}
    for path, content in files.items():
        if path == TEMPLATE or (path.startswith(f"{MORE}/") and path.endswith(".jinja")):
            try:
                named["default" if path == TEMPLATE else PurePosixPath(path).stem] = content.decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(f"{path} must be UTF-8, but byte {error.start} is not; {REMEDY}") from None
    if set(named) <= {"default"}:
        return named.get("default")
    return [{"name": name, "template": text} for name, text in named.items()]
