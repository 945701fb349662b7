"""From a conversation to token ids, and which of them are trained.

    text     <s><user>Hi</user><assistant>Hello</assistant></s>
    ids      <s> <user> H i </user> <assistant> H e l l o </assistant> </s>
    trained                                     * * * * *     *        *      loss_on="assistant"
    labels   each position has the id that follows it if that is trained, else IGNORE_LABEL

Three things are made sure of:

* *What a user writes is text.*  "</user>" in a question is five or so ordinary tokens, never the token that ends a
  turn.  Before rendering, a mark is put before every name of a special token in the values of the conversation; what
  is marked is not recognised afterwards, and the marks are taken out.  Only the tokens that a template's answers are
  made of (`<tool>` of deepzig), or that the template itself looks for in them (`</think>`), are recognised, in answers.
* *Answers begin and end exactly.*  At {% generation %} blocks if the template has them; else where `answers.py` finds
  them.  Text is cut there before it is tokenized, as it is when a model answers: its own first token begins after the
  prompt.
* *The end is trained.*  The special token that ends an answer is part of it; where the template writes none, the
  tokenizer's EOS is put there.
"""

import contextlib
import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..config import LossOn
from ..errors import ConfigError, DataError, counted
from .answers import AnswerFinder, Lost
from .batch import TokenArray, labels_of
from .conversation import Conversation, Tools, Turns, turns_and_tools
from .marks import ANSWER_BEGINS, ANSWER_ENDS, AS_TEXT
from .template import Template
from .tokenizer import Tokenizer

__all__ = ["ChatEncoder"]

_MARKS = re.compile(f"[{AS_TEXT}{ANSWER_BEGINS}{ANSWER_ENDS}]")

Piece = tuple[str, bool, int]  # text, is it a special token, number of the answer it belongs to (-1: none)


class ChatEncoder:
    """A chat template and a tokenizer together."""

    def __init__(self, template: Template, tokenizer: Tokenizer) -> None:
        """Bind them; ConfigError if the tokenizer lacks a special token of the template."""
        self.template, self.tokenizer = template, tokenizer
        specials = {name for i in tokenizer.special_ids if (name := tokenizer.token_of(i))}
        missing = [token for token in template.built_in.tokens if token not in specials]
        if missing:
            raise ConfigError(
                f"template {template.name} needs the special tokens {' '.join(missing)}, which {tokenizer.name} lacks; "
                f"choose another template, or train a tokenizer with them: "
                f"abi-train tokenizer train ... {' '.join(f'--special {token!r}' for token in missing)}"
            )
        names = "|".join(sorted(map(re.escape, specials), key=len, reverse=True)) or r"(?!)"
        self._names = re.compile(f"(?=({names}))")
        self._written = re.compile(f"(?<!{AS_TEXT})(?:{names})")
        self._scan = re.compile(f"([{ANSWER_BEGINS}{ANSWER_ENDS}])|(?<!{AS_TEXT})({names})")
        roles = {role: getattr(tokenizer, f"{role}_id") for role in ("bos", "eos", "pad", "unk")}
        self.variables = {f"{role}_token": tokenizer.token_of(i) for role, i in roles.items() if i is not None}

    # -- the two questions ---------------------------------------------------------------------

    def encode(self, conversation: Conversation, loss_on: str = "assistant") -> tuple[TokenArray, TokenArray]:
        """Return ids and labels, both (n,) uint32; labels are those of a `Batch`: the id that follows, or IGNORE_LABEL.

        loss_on "assistant" trains the answers, "all" every token but the first; plain text is trained whole.
        DataError if the template refuses the conversation, or its answers cannot be found.
        """
        if loss_on not in list(LossOn):
            raise ConfigError(f"loss_on ({loss_on!r}) must be {' or '.join(LossOn)}")
        if conversation.text is not None:
            ids = self._text_ids(conversation.text)
            trained = np.ones(len(ids), np.bool_)
        else:
            messages = conversation.to_dicts()
            pieces = self._close(self._pieces(self._marked(messages, conversation.tools, loss_on)), messages)
            ids, answers = self._ids(pieces)
            trained = answers >= 0
            if loss_on == LossOn.ALL:
                trained[:] = True
            elif not all(message.trained for message in conversation.messages):
                trained &= ~np.isin(answers, self._untrained(conversation, answers))
        return ids, labels_of(ids, trained)

    def encode_prompt(self, messages: Turns | Conversation, tools: Tools = None) -> TokenArray:
        """Return the ids (n,) uint32 of the turns so far and the beginning of the answer: what a model goes on from."""
        messages, tools = turns_and_tools(messages, tools)
        return self._ids(self._pieces(self._render(messages, tools, True)))[0]

    def stop_ids(self, messages: Turns | Conversation, tools: Tools = None) -> tuple[int, ...]:
        """Return the ids that end the answer to these turns: those that the template writes after it, and EOS.

        An answer may end otherwise when more turns follow it, and a model that was trained on both ends writes both;
        but what also comes inside of an answer (after a thought) does not end it.  DataError if the answer cannot be
        found and there is no EOS.
        """
        messages, tools = turns_and_tools(messages, tools)
        answer = {"role": "assistant", "content": "b", "reasoning_content": "a", "thinking": "a"}
        asked = [*messages, answer]
        found: list[str] = []
        try:
            first = self._answers(asked, tools)
            inside, end = _specials(first[-1])
            found += end
            with contextlib.suppress(DataError):  # a template for one question and one answer
                again = self._answers([*asked, {"role": "user", "content": "a"}, answer], tools)
                found += [text for text in _specials(again[len(first) - 1])[1] if text not in inside]
        except DataError:
            if self.tokenizer.eos_id is None:
                raise
        ends = [*map(self.tokenizer.id_of, found), self.tokenizer.eos_id]
        return tuple(dict.fromkeys(i for i in ends if i is not None))

    def _answers(self, messages: Turns, tools: Tools) -> list[list[Piece]]:
        """Return the pieces of each answer."""
        pieces = self._close(self._pieces(self._marked(messages, tools)), messages)
        return [list(group) for number, group in itertools.groupby(pieces, lambda piece: piece[2]) if number >= 0]

    # -- text ----------------------------------------------------------------------------------

    def _text_ids(self, text: str) -> TokenArray:
        tokenizer = self.tokenizer
        if tokenizer.eos_id is None:
            raise ConfigError(
                f"{tokenizer.name} has no EOS token to end a text with; name one as eos_token in tokenizer_config.json"
            )
        before, after = tokenizer.around_document(tokenizer.eos_id)
        return np.array([*before, *tokenizer.encode_plain(text), *after], np.uint32)

    def _render(self, messages: Turns, tools: Tools, prompt: bool) -> str:
        """Return the rendered text, with AS_TEXT before every name of a special token that is in the values."""
        guarded_messages, guarded_tools = self._guarded(messages, tools)
        return self.template.render(guarded_messages, guarded_tools, prompt, self.variables)

    def _guarded(self, messages: Turns, tools: Tools) -> tuple[Turns, Tools]:
        """Return messages and tools with AS_TEXT before the names of special tokens in their strings.

        A name that the template itself looks for in an answer (</think>) is not text, and has none.  DataError for a
        template that looks at names in other texts, and for a text that holds one of the marks itself.
        """
        guarded, names = self._guard(messages, tools)
        if not names:
            return guarded
        plain = self.template.render(messages, tools, False, self.variables)

        def same(guarded: tuple[Turns, Tools]) -> bool:
            return _MARKS.sub("", self.template.render(*guarded, False, self.variables)) == plain

        if not same(guarded):
            read = {name for name in names if not same(self._guard(messages, tools, names - {name})[0])}
            guarded, _ = self._guard(messages, tools, read)
            if not read or not same(guarded):
                raise DataError(
                    f"{self.template.name} looks at special tokens inside of the texts, so that they cannot be told "
                    "from its own; write them otherwise in the texts"
                )
        return guarded

    def _guard(
        self, messages: Turns, tools: Tools, read: Collection[str] = ()
    ) -> tuple[tuple[list[dict[str, Any]], list[Any] | None], set[str]]:
        """Return guarded messages and tools, those names in answers left as they are that are `read`; and all names."""
        names: set[str] = set()

        def guard(value: Any, left: Collection[str]) -> Any:
            if isinstance(value, str):
                if (found := _MARKS.search(value)) is not None:
                    raise DataError(f"the text holds U+{ord(found[0]):04X}, which is no character; remove it")
                return self._names.sub(lambda found: mark(found[1], left), value)
            if isinstance(value, Mapping):
                return {guard(key, left): guard(inner, left) for key, inner in value.items()}
            return [guard(inner, left) for inner in value] if isinstance(value, list | tuple) else value

        def mark(name: str, left: Collection[str]) -> str:
            if name in left:
                return ""
            names.add(name)
            return AS_TEXT

        made = []
        for message in messages:
            left = tuple(read) if message.get("role") == "assistant" else ()
            texts = {key: guard(value, left) for key, value in message.items() if key != "role"}
            if message.get("role") == "assistant" and isinstance(message.get("content"), str):
                texts["content"] = guard(message["content"], (*left, *self.template.built_in.answer_tokens))
            made.append({"role": message.get("role"), **texts})
        return (made, None if tools is None else guard(list(tools), ())), names

    # -- where answers are ---------------------------------------------------------------------

    def _marked(self, messages: Turns, tools: Tools, loss_on: str = "assistant") -> str:
        """Return the rendered text with marks around each answer; around all of it where everything is trained and the
        answers cannot be found."""
        messages, tools = self._guarded(messages, tools)
        if self.template.marks_answers:
            return self.template.render(messages, tools, False, self.variables, marked=True)

        def render(turns: Turns, prompt: bool) -> str:
            return self.template.render(turns, tools, prompt, self.variables)

        finder = AnswerFinder(render, messages, self._written)
        try:
            spans = finder.spans()
        except Lost as lost:
            if loss_on == LossOn.ALL:
                return f"{ANSWER_BEGINS}{finder.whole}{ANSWER_ENDS}"
            where = self.template.source_at(lost.position, messages, tools, self.variables)
            raise DataError(
                f"{where}: answer {lost.answer} cannot be found: {lost.reason}; put {{% generation %}} and "
                "{% endgeneration %} around what the model writes in the template, or train on all tokens "
                "(loss_on='all')"
            ) from None
        at, parts = 0, []
        for begin, end in spans:
            parts += [finder.whole[at:begin], ANSWER_BEGINS, finder.whole[begin:end], ANSWER_ENDS]
            at = end
        return "".join([*parts, finder.whole[at:]])

    def _pieces(self, marked: str) -> list[Piece]:
        """Cut a rendered text at special tokens and at the borders of answers."""
        pieces: list[Piece] = []
        at, answer, count = 0, -1, 0

        def add(text: str, special: bool) -> None:
            text = text.replace(AS_TEXT, "")
            if text:
                pieces.append((text, special, answer))

        for found in self._scan.finditer(marked):
            add(marked[at : found.start()], False)
            at = found.end()
            if found[2]:
                add(found[2], True)
            elif found[1] == ANSWER_BEGINS:
                answer, count = count, count + 1
            else:
                answer = -1
        add(marked[at:], False)
        return pieces

    def _close(self, pieces: list[Piece], messages: Turns) -> list[Piece]:
        """Let each answer end with its end token: the special token that follows it, or EOS after the last one.

        That token may differ from answer to answer (<|end|>, but <|return|> for the last one), and may be the one that
        opens the next turn, where nothing else ends this one.  A line break after it is not trained, as nobody has to
        write it, unless the template marks it.
        """
        ends = {number: i for i, (_, _, number) in enumerate(pieces) if number >= 0}
        closed = list(pieces)
        for number, last in ends.items():
            text, special, _ = closed[last]
            if not special and not text.strip() and last and closed[last - 1][1:] == (True, number):
                if not self.template.marks_answers:
                    closed[last] = (text, False, -1)
                continue
            if special:
                continue
            follower = closed[last + 1] if last + 1 < len(closed) else ("", False, -1)
            if follower[1] and follower[0] != self._text_begins:
                closed[last + 1] = (follower[0], True, number)
            elif number == max(ends) and messages[-1]["role"] == "assistant":
                if not all(text.isspace() for text, _, _ in closed[last + 1 :]):
                    continue
                eos = self.variables.get("eos_token")
                if eos is None:
                    raise ConfigError(
                        f"nothing ends an answer: neither does {self.template.name}, nor has {self.tokenizer.name} an "
                        "EOS token; name one as eos_token in tokenizer_config.json"
                    )
                closed[last + 1 :] = [(eos, True, number)]
        return closed

    @property
    def _text_begins(self) -> str | None:
        """The token that begins a text and does not end one: no answer ends with it."""
        bos, eos = (self.variables.get(f"{role}_token") for role in ("bos", "eos"))
        return None if bos == eos else bos

    def _ids(self, pieces: list[Piece]) -> tuple[TokenArray, npt.NDArray[np.int64]]:
        """Return ids (n,) and the number of the answer that each belongs to (n,), -1 for none."""
        ids: list[int] = []
        answers: list[int] = []
        made = self.tokenizer.encode_pieces([(text, special) for text, special, _ in pieces])
        for each, (_, _, answer) in zip(made, pieces, strict=True):
            ids += each
            answers += [answer] * len(each)
        return np.array(ids, np.uint32), np.array(answers, np.int64)

    def _untrained(self, conversation: Conversation, answers: npt.NDArray[np.int64]) -> list[int]:
        """Return the numbers of the answers that the data mark as not to be trained."""
        flags = [message.trained for message in conversation.messages if message.role == "assistant"]
        count = int(answers.max(initial=-1)) + 1
        if count != len(flags):
            raise DataError(
                f"{self.template.name} marks {counted(count, 'answer')} where the conversation has {len(flags)}, so "
                "those that are not to be trained cannot be found; write one {% generation %} block for each answer"
            )
        return [number for number, trained in enumerate(flags) if not trained]


def _specials(answer: Sequence[Piece]) -> tuple[set[str], list[str]]:
    """Return the special tokens before the end of an answer's text, and the first one after it, if there is one."""
    end = max((i for i, (text, special, _) in enumerate(answer) if not special and text.strip()), default=-1) + 1
    inside = {text for text, special, _ in answer[:end] if special}
    return inside, [text for text, special, _ in answer[end:] if special][:1]
