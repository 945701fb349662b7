"""Chat templates, found by name or file, and what they make of a conversation.

    template = load_template("deepzig")                     built in: chat_templates.py
    template = load_template("my.jinja")                    a file of your own, or a directory with a chat template
    text = template.render(messages, tools, add_generation_prompt=True)
    ids, labels = template.encode(tokenizer, conversation)  chat_encoding.py

A template is a program by the maker of the model, so it runs in a sandbox (`template_sandbox.py`): no attribute that
leads out of it, no change of what it is given, no endless text or time.
"""

import hashlib
import os
from pathlib import Path

from ..errors import ConfigError
from ..untrusted import read_json, read_text
from .batch import TokenArray
from .chat_encoding import ChatEncoder
from .chat_templates import BUILT_IN, BuiltIn
from .conversation import Conversation
from .template import Template
from .tokenizer import Tokenizer
from .tokenizer_files import CONFIG_FILE, TEMPLATE_FILE, default_template

__all__ = ["ChatTemplate", "load_template", "template_for", "template_names"]


def template_names() -> tuple[str, ...]:
    """Return the names of the built-in templates."""
    return tuple(BUILT_IN)


class ChatTemplate(Template):
    """A template that also encodes."""

    _encoder: ChatEncoder | None = None

    def encoder(self, tokenizer: Tokenizer) -> ChatEncoder:
        """Return what turns conversations into ids with this tokenizer; ConfigError if it lacks a token."""
        if self._encoder is None or self._encoder.tokenizer is not tokenizer:
            self._encoder = ChatEncoder(self, tokenizer)
        return self._encoder

    def encode(
        self, tokenizer: Tokenizer, conversation: Conversation, loss_on: str = "assistant"
    ) -> tuple[TokenArray, TokenArray]:
        """Return ids and labels (n,) uint32 of a conversation: see `ChatEncoder.encode`."""
        return self.encoder(tokenizer).encode(conversation, loss_on)


# -- finding one -------------------------------------------------------------------------------


def load_template(name: str | os.PathLike[str]) -> ChatTemplate:
    """Return a built-in template by its name, or the one in a file of Jinja, a tokenizer_config.json, or a directory.

    ConfigError if there is none.
    """
    text = os.fspath(name)
    if text in BUILT_IN:
        return ChatTemplate(BUILT_IN[text].source, text, BUILT_IN[text])
    path = Path(text)
    if path.is_dir():
        from_directory = [path / TEMPLATE_FILE, path / CONFIG_FILE]
        path = next((file for file in from_directory if file.is_file()), path / CONFIG_FILE)
    if not path.is_file():
        raise ConfigError(
            f"template ({text}) must be {', '.join(BUILT_IN)}, or a file with a Jinja template; check the name"
        )
    if path.suffix == ".json":
        return ChatTemplate(_from_config(path), str(path))
    return ChatTemplate(read_text(path, error=ConfigError, remedy="give a Jinja template"), str(path))


def _from_config(path: Path) -> str:
    settings = read_json(path, error=ConfigError, remedy=f"give a {CONFIG_FILE}")
    source = default_template(settings.get("chat_template"), str(path))
    if source is None:
        raise ConfigError(f"{path} has no chat_template; name a built-in one: {', '.join(BUILT_IN)}")
    return source


def template_for(tokenizer: Tokenizer, name: str | os.PathLike[str] | None = None) -> ChatTemplate:
    """Return the template `name`; None takes the tokenizer's own, or the built-in one whose tokens it has.

    ConfigError if none fits.
    """
    if name is not None:
        return load_template(name)
    if tokenizer.chat_template is not None:
        known = next((n for n, t in BUILT_IN.items() if _same(tokenizer.chat_template, t)), None)
        if known is not None:
            return load_template(known)
        return ChatTemplate(tokenizer.chat_template, f"the chat template of {tokenizer.template_name}")
    for known in ("deepzig", "chatml", "llama3"):
        if all(tokenizer.id_of(token) is not None for token in BUILT_IN[known].tokens):
            return load_template(known)
    if tokenizer.eos_id is not None:
        return load_template("alpaca")
    raise ConfigError(
        f"{tokenizer.name} has no chat template, no special tokens of a built-in one, and no EOS; name a template, "
        "and train the tokenizer with its special tokens"
    )


def _same(source: str, built_in: BuiltIn) -> bool:
    if source in (built_in.source, ChatTemplate(built_in.source).portable_source):
        return True
    return bool(built_in.earlier) and hashlib.sha256(source.encode()).hexdigest() in built_in.earlier
