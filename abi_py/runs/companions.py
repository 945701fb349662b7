"""What makes the folder of a run's model whole: tokenizer, chat template, ids of special tokens, how it writes.

Every checkpoint has it, so every checkpoint is a folder that others open.
"""

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.byte_tokenizer import byte_tokenizer_files
from ..data.corpus import END_OF_DOCUMENT
from ..data.tokenizer import TOKENIZER_FILE, Tokenizer
from ..files import json_text
from ..formats.companions import END, GENERATION, Companions
from .conversations import ends_of_answers
from .settings import RunConfig

if TYPE_CHECKING:
    from ..data.sidecar import TokensInfo

__all__ = ["companions_of_run", "with_bytes", "with_tokenizer_from"]

ROLES = ("bos", "eos", "pad")


def companions_of_run(own: Companions, config: RunConfig, directory: Path, info: "TokensInfo | None") -> Companions:
    """Return what the checkpoints of a run carry along: what its model has, completed from the run's directory.

    `info` is what the sidecar of its data says.  Ids whose tokenizer nobody knows have none.
    """
    if TOKENIZER_FILE in own.files:  # those of a base, or of the checkpoint that the run goes on from
        return own
    context = config.model.max_seq_len
    if (directory / TOKENIZER_FILE).is_file():
        ends = (info.end_of_document,) if info is not None and info.tokenizer is not None else ()
        return with_tokenizer_from(own, directory, context, ends)
    return with_bytes(own, context) if config.is_byte_level else own


def with_bytes(own: Companions, context: int) -> Companions:
    """Return the companions of a model that reads bytes."""
    ids = {"bos": None, "eos": END_OF_DOCUMENT, "pad": END_OF_DOCUMENT}
    return _completed(own.with_tokenizer(byte_tokenizer_files()), ids, (END_OF_DOCUMENT,), context)


def with_tokenizer_from(own: Companions, place: Path, context: int, ends: Collection[int] = ()) -> Companions:
    """Return the same with the tokenizer in a directory, and the ids that it has for special tokens.

    `ends` are what ends a document, if that is known, else its end token is; what ends an answer of its chat template
    ends a text too.
    """
    codec = Tokenizer.load(place)
    ids = {role: getattr(codec, f"{role}_id") for role in ROLES}
    if not ends and ids["eos"] is not None:
        ends = (ids["eos"],)
    if ends and ids["eos"] not in ends:
        ids["eos"] = next(iter(ends))
    answers = () if codec.chat_template is None else ends_of_answers(place)
    return _completed(own.with_tokenizer_of(place), ids, (*ends, *answers), context)


def _completed(own: Companions, ids: dict[str, Any], ends: Collection[int], context: int) -> Companions:
    stated: dict[str, Any] = {f"{role}_token_id": value for role, value in ids.items() if value is not None}
    theirs = own.config.get(END)
    files = own.files
    if GENERATION not in files and theirs is None:  # a model of nobody else's
        files = {**files, GENERATION: json_text(_settings(ids, tuple(dict.fromkeys(ends)), context)).encode()}
    if isinstance(theirs, list) and ids["eos"] in theirs:
        stated[END] = theirs
    nothing = {f"{role}_token_id": None for role in ids}
    return Companions(files, {**nothing, **own.config, **stated}).with_ends(ends)


def _settings(ids: dict[str, Any], ends: tuple[int, ...], context: int) -> dict[str, Any]:
    """Return the content of generation_config.json: how `generate` writes of itself, within the context.

    The usual number of new tokens, where half of the context is as long; else up to the end of the context, because a
    program that goes on beyond it has positions that were never trained.
    """
    from ..generation import GenerationConfig

    usual = GenerationConfig()
    fits = usual.max_new_tokens is not None and usual.max_new_tokens <= context // 2
    limit = usual if fits else usual.replace(max_new_tokens=None, max_length=context)
    content = limit.replace(stop_ids=ends or None).to_json()
    pad = ids["pad"] if ids["pad"] is not None else next(iter(ends), None)  # or transformers takes it, and says so
    return {**content, **{f"{role}_token_id": i for role, i in (("bos", ids["bos"]), ("pad", pad)) if i is not None}}
