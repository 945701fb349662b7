"""`abi-train chat`: a conversation with a trained model, in the terminal, through a pipe, or one question long."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import AbiError, ConfigError, DataError
from ..generation.settings import GenerationConfig
from ..runs.conversations import no_tokenizer
from ..runs.models import WITHOUT, generation_settings, load_tokenizer
from ..runs.settings import ChatConfig
from .console import note, utf8_output, write
from .models import (
    INTERRUPTED,
    TOKENIZER_HELP,
    ModelPath,
    adapter_option,
    compile_for_decoding,
    open_model,
    put_on_model,
    set_threads,
    threads_option,
    which_options,
)
from .options import PathType, Verb, config_options, given_values, type_of

if TYPE_CHECKING:
    from ..data.chat_encoding import ChatEncoder
    from ..data.tokenizer import Tokenizer
    from ..model import Adapters
    from ..model.transformer import Transformer

HELP = "/reset forgets the conversation, /exit (or the end of input) ends it; Ctrl-C stops an answer"
SWITCHES = f"/adapter NAME switches to other adapters, /adapter {WITHOUT} to the model alone; "


@click.command(
    cls=Verb,
    example="abi-train chat my-model --once Hello",
    short_help="Talk with a trained model.",
)
@click.argument("model", type=ModelPath())
@adapter_option
@which_options
@click.option("--system", help="text of a system turn before the conversation")
@click.option("--once", help="ask this one question, print the answer, and end")
@click.option(
    "--template",
    type=type_of(ChatConfig, "template"),
    help="name or Jinja file of the chat template  [the tokenizer's own]",
)
@click.option("--tokenizer", type=PathType(path_type=Path, exists=True), help=TOKENIZER_HELP)
@click.option(
    "--config",
    type=PathType(path_type=Path, exists=True),
    help="file of settings; generation_config.json; flags beat it",
)
@threads_option
@click.pass_context
def command(
    ctx: click.Context,
    model: Path,
    adapters: tuple[tuple[str | None, Path], ...],
    which: str | None,
    system: str | None,
    once: str | None,
    template: str | None,
    tokenizer: Path | None,
    config: Path | None,
    threads: int | None,
    **_: Any,
) -> None:
    """Talk with MODEL: a run, a checkpoint, or a folder of Hugging Face's kind, with a tokenizer.

    Each line of input is a turn. /reset forgets the conversation, /exit (or the end of input) ends it, and Ctrl-C
    stops an answer. Only answers go to standard output. With adapters, the first answer, and /adapter NAME switches.
    """
    if once == "":
        raise ConfigError("once () must not be empty; give a question")
    flags = given_values(ctx).get("generation", {})
    if "logprobs" in flags:
        raise ConfigError(
            f"logprobs ({flags['logprobs']}) has no effect in a conversation; abi-train generate --json shows them"
        )
    if once is not None and len(adapters) > 1:
        raise ConfigError(f"adapter (of {len(adapters)}) must be one with --once; abi-train generate takes several")
    set_threads(threads)
    loaded = open_model(model, which)
    codec = load_tokenizer(loaded, tokenizer)
    if codec is None:
        raise no_tokenizer(str(loaded.directory), loaded.model.config.vocab_size, "use abi-train generate")
    from ..data.chat import template_for

    encoder = template_for(codec, template).encoder(codec)
    settings = generation_settings(loaded, config, flags)
    ends = loaded.eos_ids or ()
    if template is not None and "stop_ids" not in flags:  # those of the file are of another template
        ends, settings = (*(settings.stop_ids or ()), *ends), settings.replace(stop_ids=None)
    several = put_on_model(loaded, adapters) if adapters else None
    if several is not None:
        several.use(next(iter(several)))
    alone = loaded.model if several is None else several.base
    chat = Chat(alone, codec, encoder, settings, system, ends, several)
    utf8_output()
    if once is not None:
        chat.prompt([*chat.messages, {"role": "user", "content": once}])  # raises for a question that is too long
    for each in {id(it): it for it in (alone, chat.generator.model)}.values():  # what a switch goes to, too
        compile_for_decoding(each, integer=settings.integer_products)
    if once is not None:
        if chat.answer(once):
            ctx.exit(INTERRUPTED)
        return
    ctx.exit(talk(chat))


config_options({"generation": GenerationConfig}, {}, refused=("logprobs",))(command)


class Chat:
    """The turns so far, and how the next answer is made."""

    def __init__(
        self,
        model: "Transformer",
        codec: "Tokenizer",
        encoder: "ChatEncoder",
        settings: GenerationConfig,
        system: str | None,
        eos_ids: tuple[int, ...] = (),
        adapters: "Adapters | None" = None,
    ) -> None:
        """Begin a conversation, with a system turn if there is one; eos_ids end an answer as the template's ends do.

        With `adapters`, of the model, those of them that are active answer.
        """
        self.codec, self.encoder, self.eos_ids, self.adapters = codec, encoder, eos_ids, adapters
        self.settings, self.system = settings, system
        self._answer_by(model if adapters is None else adapters.model)
        self.reset()

    def _answer_by(self, model: "Transformer") -> None:
        """Let a model answer: nothing that another has read is kept."""
        from ..generation import Generator

        self.generator = Generator(model, self.codec)

    @property
    def help(self) -> str:
        """What may be typed besides questions."""
        return HELP if self.adapters is None else SWITCHES + HELP

    def switch(self, name: str) -> str:
        """Let other adapters answer, or for "none" the model alone, from the next question on; say which do.

        The conversation goes on.  Without a name nothing changes; ConfigError for one that is not there.
        """
        if self.adapters is None:
            raise ConfigError("adapter has no effect: there are none; give --adapter NAME=PATH when chat is started")
        if name:
            self._answer_by(self.adapters.use(None if name == WITHOUT else name))
        rest = ", ".join(each for each in (*self.adapters, WITHOUT) if each != (self.adapters.active or WITHOUT))
        return f"adapter {self.adapters.active or WITHOUT}; the others: {rest}"

    def reset(self) -> None:
        """Forget all turns but the system's."""
        self.messages: list[dict[str, Any]] = []
        if self.system:
            self.messages.append({"role": "system", "content": self.system})

    def answer(self, question: str) -> bool:
        """Ask, write the answer as it comes, remember both; return whether Ctrl-C ended the answer.

        DataError, and nothing remembered, if the question is longer than the context has room for.
        """
        asked = [*self.messages, {"role": "user", "content": question}]
        ids, settings = self.prompt(asked), self.settings
        if settings.stop_ids is None:
            settings = settings.replace(stop_ids=(*self.encoder.stop_ids(asked), *self.eos_ids))
        interrupted = False
        stream = self.generator.stream([ids], settings)
        try:
            for token in stream:
                write([token.text])
        except KeyboardInterrupt:
            interrupted = True
        write(["\n"])
        (result,) = self.generator.results()
        self.messages.append({"role": "user", "content": question})
        self.messages.append({"role": "assistant", "content": result.text})
        return interrupted

    def prompt(self, messages: list[dict[str, Any]]) -> Any:
        """Return the ids of the turns; the oldest ones are forgotten where the context has no room for an answer."""
        longest = self.generator.model.config.max_seq_len
        room = longest - min(self.settings.limit(0, longest), longest // 2)
        first = 1 if self.system else 0
        ids = self.encoder.encode_prompt(messages)
        forgotten = 0
        while len(ids) > room and len(messages) > first + 1:
            del messages[first : first + 2]  # a question and its answer
            forgotten += 2
            ids = self.encoder.encode_prompt(messages)
        if len(ids) > room:
            raise DataError(
                f"the question makes {len(ids)} tokens, but the context of {longest} has room for {room} beside the "
                "answer; ask something shorter, or lower --max-new-tokens"
            )
        if forgotten:
            note(f"note: the context is full: the oldest {forgotten} turns are forgotten")
            del self.messages[first : first + forgotten]
        return ids


def questions() -> Iterator[str]:
    """Yield the lines of the user until the input ends; DataError for one that is not UTF-8."""
    if not sys.stdin.isatty():
        for number, line in enumerate(sys.stdin.buffer, 1):  # whatever the locale says
            try:
                yield line.decode("utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"standard input:{number}: byte {error.start} is not UTF-8; convert the text (iconv does that)"
                ) from None
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (gives input() its line editing and history)
    while True:
        try:
            yield input("> ")
        except EOFError:
            return


def talk(chat: Chat) -> int:
    """Answer line by line; return the exit code."""
    on_terminal = sys.stdin.isatty()
    if on_terminal:
        note(chat.help)
    try:
        for line in questions():
            word = line.strip()
            if word in ("/exit", "/quit"):
                break
            if word == "/reset":
                chat.reset()
                note("the conversation begins anew")
            elif word.startswith("/") and word[1:].isalpha() and word != "/adapter":
                note(f"unknown command {word}; {chat.help}")
            elif word:
                interrupted, (command, *rest) = False, word.split(maxsplit=1)
                try:
                    if command == "/adapter":
                        note(chat.switch("".join(rest)))
                    else:
                        interrupted = chat.answer(line)
                except AbiError as error:
                    if not on_terminal:
                        raise
                    note(f"error: {error}")
                    continue
                if interrupted and not on_terminal:
                    return INTERRUPTED
    except KeyboardInterrupt:  # at the prompt
        note("")
        return INTERRUPTED
    return 0
