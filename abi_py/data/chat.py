"""Chat templates: conversations as the text that a model reads, rendered by Jinja in a sandbox.

    template = load_template("deepzig")                     built in: chat_templates.py
    template = load_template("my.jinja")                    a file of your own, or a directory with a chat template
    text = template.render(messages, tools, add_generation_prompt=True)

A template is a program by the maker of the model, so it runs in a sandbox (`template_sandbox.py`): no attribute that
leads out of it, no change of what it is given, no endless text or time.  It sees what Hugging Face's templates see:
`messages`, `tools`, `add_generation_prompt`, the tokenizer's `bos_token`, `eos_token` ..., `raise_exception`,
`strftime_now`, `tojson` without HTML escapes, `break` and `continue`, and blocks of {% generation %}, which mark what
the model writes.
How text becomes ids and a mask is in `chat_encoding.py`.
"""

import itertools
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError, DataError, on_one_line
from ..untrusted import read_json, read_text
from .chat_encoding import ChatEncoder
from .chat_templates import BUILT_IN, BuiltIn
from .conversation import Conversation
from .tokenizer import CONFIG_FILE, Tokenizer

if TYPE_CHECKING:
    import jinja2

__all__ = ["ChatTemplate", "load_template", "template_for", "template_names"]

_GENERATION_TAG = re.compile(r"\{%([-+]?)\s*(?:end)?generation\s*([-+]?)%\}")


# What a template does wrong inside surfaces as Python's own errors.
_OWN_ERRORS = (
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    MemoryError,
    AssertionError,
)
_REMEDY = "correct it, or give another template with --template"


def template_names() -> tuple[str, ...]:
    """Return the names of the built-in templates."""
    return tuple(BUILT_IN)


class ChatTemplate:
    """A template, ready to render.

    name       what error messages call it
    source     its text
    built_in   the facts of a built-in template: tokens it needs, form of its tool calls; of others, empty ones
    variables  what the template sees beside the conversation, such as `eos_token`
    """

    def __init__(
        self,
        source: str,
        name: str = "the chat template",
        built_in: BuiltIn | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        """Compile the template; ConfigError names the line of a mistake in it."""
        import jinja2

        from .template_sandbox import environment

        self.source, self.name = source, name
        self.built_in = built_in or BuiltIn(source)
        self.variables = dict(variables or {})
        self.marks_answers = any("endgeneration" in tag.group() for tag in _GENERATION_TAG.finditer(source))
        try:
            self._compiled = environment(False).from_string(source)
            self._marking = environment(True).from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"{name}:{error.lineno}: not a Jinja template: {error.message}; correct it") from None
        except (SyntaxError, RecursionError, MemoryError, ValueError, OverflowError) as error:
            raise ConfigError(
                f"{name}: not a template that can be compiled: {error}; nest its blocks and expressions less deeply"
            ) from None
        self._encoder: ChatEncoder | None = None

    def __repr__(self) -> str:
        return f"ChatTemplate({self.name!r})"

    @property
    def portable_source(self) -> str:
        """The text without {% generation %}, which some readers of Jinja (llama.cpp, older transformers) lack."""

        # The minus signs of the tags strip spaces around them; a comment keeps them doing so.
        def blank(tag: re.Match[str]) -> str:
            return f"{{#{tag[1]} {tag[2]}#}}"

        return _GENERATION_TAG.sub(blank, self.source)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]] | Conversation,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the text of a conversation; with add_generation_prompt it ends where the model should go on.

        messages  dictionaries {"role": ..., "content": ...}, or a Conversation, whose own tools are then used.
        DataError says what the template has to complain about.
        """
        return self._render(self._compiled, messages, tools, add_generation_prompt, variables)

    def render_marked(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the text with ANSWER_BEGINS and ANSWER_ENDS around each {% generation %} block."""
        return self._render(self._marking, messages, tools, False, variables)

    def source_at(
        self,
        position: int,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Return "name:line: 'source'" of what writes the character at `position` of the rendered text."""
        from .template_sandbox import written

        pieces = written(self._compiled, self._values(messages, tools, False, variables))
        ends = itertools.accumulate(len(text) for text, _ in pieces)
        line = next((line for (_, line), end in zip(pieces, ends, strict=True) if end > position), 1)
        source = self.source.splitlines()[line - 1].strip()
        return f"{self.name}:{line}: {source[:80]!r}"

    def _values(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        variables: Mapping[str, Any] | None,
    ) -> dict[str, Any]:
        """Return what the template sees."""
        return {
            "messages": list(messages),
            "tools": list(tools) if tools else None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **self.variables,
            **(variables or {}),
        }

    def _render(
        self,
        compiled: "jinja2.Template",
        messages: Sequence[Mapping[str, Any]] | Conversation,
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        variables: Mapping[str, Any] | None,
    ) -> str:
        import jinja2

        from .template_sandbox import StepsExceeded, line_of, render

        if isinstance(messages, Conversation):
            tools = tools or messages.tools
            messages = messages.to_dicts()
        try:
            return render(compiled, self._values(messages, tools, add_generation_prompt, variables))
        except StepsExceeded as error:
            raise DataError(
                f"{self.name}:{line_of(compiled, error)}: takes more steps than a conversation of this size explains "
                "(a loop, or text that is repeated); correct the template"
            ) from None
        except jinja2.TemplateError as error:
            # What the template itself has to say needs no line; what Jinja says of it does.
            message = on_one_line(error.message or type(error).__name__)
            if type(error) is jinja2.TemplateError:
                raise DataError(f"{self.name}: {message}") from None
            where = f"{self.name}:{line_of(compiled, error)}"
            raise DataError(f"{where}: {message.removesuffix('.')}; {_REMEDY}") from None
        except _OWN_ERRORS as error:
            raise DataError(
                f"{self.name}:{line_of(compiled, error)}: fails on this conversation: {type(error).__name__}: "
                f"{on_one_line(str(error))}; {_REMEDY}"
            ) from None

    def encoder(self, tokenizer: Tokenizer) -> "ChatEncoder":
        """Return what turns conversations into ids with this tokenizer; ConfigError if it lacks a token."""
        if self._encoder is None or self._encoder.tokenizer is not tokenizer:
            self._encoder = ChatEncoder(self, tokenizer)
        return self._encoder

    def encode(
        self, tokenizer: Tokenizer, conversation: Conversation, loss_on: str = "assistant"
    ) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint32]]:
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
        from_directory = [path / "chat_template.jinja", path / CONFIG_FILE]
        path = next((file for file in from_directory if file.is_file()), path / CONFIG_FILE)
    if not path.is_file():
        raise ConfigError(
            f"template ({text}) must be {', '.join(BUILT_IN)}, or a file with a Jinja template; check the name"
        )
    if path.suffix == ".json":
        return ChatTemplate(_from_config(path), str(path))
    return ChatTemplate(read_text(path, error=ConfigError, remedy="give a Jinja template"), str(path))


def _from_config(path: Path) -> str:
    source = read_json(path, error=ConfigError, remedy="give a tokenizer_config.json").get("chat_template")
    if isinstance(source, list):
        named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
        source = named.get("default")
    if not isinstance(source, str):
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
    return source in (built_in.source, ChatTemplate(built_in.source).portable_source)
