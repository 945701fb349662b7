"""One chat template, compiled in the sandbox: a conversation in, the text that a model reads out.

It sees what Hugging Face's templates see: `messages`, `tools`, `add_generation_prompt`, the tokenizer's `bos_token`,
`eos_token` ..., `raise_exception`, `strftime_now`, `tojson` without HTML escapes, `break` and `continue`, and blocks of
{% generation %}, which mark what the model writes.
"""

import itertools
import re
from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError, DataError, on_one_line
from ..reprs import Shown
from .chat_templates import BuiltIn
from .conversation import Conversation, Tools, Turns, turns_and_tools

__all__ = ["Template"]

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


class Template(Shown):
    """A template, ready to render.

    name       what error messages call it
    source     its text
    built_in   the facts of a built-in template: tokens it needs, form of its tool calls; empty for other templates
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

    def _says(self) -> str:
        return repr(self.name)

    @property
    def portable_source(self) -> str:
        """The text without {% generation %}, which some readers of Jinja (llama.cpp, older transformers) lack."""
        # The minus signs of the tags strip spaces around them; a comment keeps them doing so.
        return _GENERATION_TAG.sub(r"{#\1 \2#}", self.source)

    def render(
        self,
        messages: Turns | Conversation,
        tools: Tools = None,
        add_generation_prompt: bool = False,
        variables: Mapping[str, Any] | None = None,
        *,
        marked: bool = False,
    ) -> str:
        """Return the text of a conversation; with add_generation_prompt it ends where the model should go on.

        messages  dictionaries {"role": ..., "content": ...}, or a Conversation, whose own tools are then used
        marked    put ANSWER_BEGINS and ANSWER_ENDS around each {% generation %} block

        DataError says what the template has to complain about.
        """
        import jinja2

        from .template_sandbox import StepsExceeded, line_of, render

        compiled = self._marking if marked else self._compiled
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

    def source_at(
        self, position: int, messages: Turns, tools: Tools = None, variables: Mapping[str, Any] | None = None
    ) -> str:
        """Return "name:line: 'source'" of what writes the character at `position` of the rendered text."""
        from .template_sandbox import written

        pieces = written(self._compiled, self._values(messages, tools, False, variables))
        ends = itertools.accumulate(len(text) for text, _ in pieces)
        line = next((line for (_, line), end in zip(pieces, ends, strict=True) if end > position), 1)
        source = self.source.splitlines()[line - 1].strip()
        return f"{self.name}:{line}: {source[:80]!r}"

    def _values(
        self, messages: Turns | Conversation, tools: Tools, prompt: bool, variables: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        """Return what the template sees."""
        messages, tools = turns_and_tools(messages, tools)
        return {
            "messages": list(messages),
            "tools": list(tools) if tools else None,
            "documents": None,
            "add_generation_prompt": prompt,
            **self.variables,
            **(variables or {}),
        }
