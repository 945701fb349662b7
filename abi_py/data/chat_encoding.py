"""From a conversation to token ids, and which of them are learnt.

    text     <s><user>Hi</user><assistant>Hello</assistant></s>
    ids      <s> <user> H i </user> <assistant> H e l l o </assistant> </s>
    learnt                                      * * * * *     *        *      loss_on="assistant"
    labels   each position has the id that follows it if that is learnt, else IGNORE_LABEL

Three things are made sure of:

* *What a user writes is text.*  "</user>" in a question is five or so ordinary tokens, never the token that ends a
  turn.  Before rendering, a mark is put before every name of a special token in the values of the conversation; what
  is marked is not recognised afterwards, and the marks are taken out.  Only the tokens that a template's answers are
  made of (`<tool>` of deepzig) are recognised, in answers.
* *Answers begin and end exactly.*  At {% generation %} blocks if the template has them; else where the rendering of
  the turns before, with the generation prompt, ends.  Text is cut there before it is tokenized, as it is when a model
  answers: its own first token begins behind the prompt.
* *The end is learnt.*  The special token that ends an answer is part of it; where the template writes none, the
  tokenizer's EOS is put there.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError, DataError
from .conversation import Conversation
from .tokenizer import Tokenizer
from .tokens import IGNORE_LABEL, TokenArray

if TYPE_CHECKING:
    from .chat import ChatTemplate

__all__ = ["LOSS_ON", "ChatEncoder", "labels_of", "trained_of"]

LOSS_ON = ("assistant", "all")

# Code points that Unicode sets aside for the inside of programs: no text for exchange holds them.
AS_TEXT = "\ufdd0"  # what follows is no special token
ANSWER_BEGINS, ANSWER_ENDS = "\ufdd1", "\ufdd2"
_MARKS = re.compile(f"[{AS_TEXT}{ANSWER_BEGINS}{ANSWER_ENDS}]")

Piece = tuple[str, bool, int]  # text, is it a special token, number of the answer it belongs to (-1: none)


def labels_of(ids: TokenArray, trained: npt.NDArray[np.bool_]) -> TokenArray:
    """Return labels (n,): the id that follows each position if it is trained, else IGNORE_LABEL; the last has none."""
    labels = np.full(len(ids), IGNORE_LABEL, np.uint32)
    labels[:-1] = np.where(trained[1:], ids[1:], IGNORE_LABEL)
    return labels


def trained_of(labels: TokenArray) -> npt.NDArray[np.bool_]:
    """Return which tokens (n,) are learnt: the inverse of `labels_of`."""
    trained = np.zeros(len(labels), np.bool_)
    trained[1:] = labels[:-1] != IGNORE_LABEL
    return trained


class ChatEncoder:
    """A chat template and a tokenizer together."""

    def __init__(self, template: "ChatTemplate", tokenizer: Tokenizer) -> None:
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
        longest_first = sorted(map(re.escape, specials), key=len, reverse=True)
        names = "|".join(longest_first) or r"(?!)"
        guarded = "|".join(name for name in longest_first if not self._in_answers(name)) or r"(?!)"
        self._starts = re.compile(f"(?={names})")
        self._starts_in_answers = re.compile(f"(?={guarded})")
        self._scan = re.compile(f"([{ANSWER_BEGINS}{ANSWER_ENDS}])|(?<!{AS_TEXT})({names})")
        roles = {role: getattr(tokenizer, f"{role}_id") for role in ("bos", "eos", "pad", "unk")}
        self.variables = {f"{role}_token": tokenizer.token_of(i) for role, i in roles.items() if i is not None}

    def _in_answers(self, escaped: str) -> bool:
        return escaped in map(re.escape, self.template.built_in.answer_tokens)

    # -- the two questions ---------------------------------------------------------------------

    def encode(self, conversation: Conversation, loss_on: str = "assistant") -> tuple[TokenArray, TokenArray]:
        """Return ids and labels, both (n,) uint32; labels are those of a `Batch`: the id that follows, or IGNORE_LABEL.

        loss_on "assistant" trains the answers, "all" every token but the first; plain text is trained whole.
        DataError if the template refuses the conversation, or its answers cannot be found.
        """
        if loss_on not in LOSS_ON:
            raise ConfigError(f"loss_on ({loss_on!r}) must be {' or '.join(LOSS_ON)}")
        if conversation.text is not None:
            ids = self._text_ids(conversation.text)
            trained = np.ones(len(ids), np.bool_)
        else:
            pieces = self._close(self._pieces(self._marked(conversation)), conversation)
            ids, answers = self._ids(pieces)
            trained = answers >= 0
            if loss_on == "all":
                trained[:] = True
            elif not all(message.trained for message in conversation.messages):
                trained &= ~np.isin(answers, self._not_learnt(conversation, answers))
        return ids, labels_of(ids, trained)

    def encode_prompt(
        self, messages: Sequence[Mapping[str, Any]] | Conversation, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> TokenArray:
        """Return the ids (n,) uint32 of the turns so far and the beginning of the answer: what a model goes on from."""
        if isinstance(messages, Conversation):
            tools = tools or messages.tools
            messages = messages.to_dicts()
        return self._ids(self._pieces(self._render(messages, tools, True)))[0]

    @functools.cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids that end an answer: the token that the template writes after one, and the tokenizer's EOS."""
        probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        pieces = self._pieces(self.template.render(probe, variables=self.variables))
        last = max(i for i, (text, special, _) in enumerate(pieces) if not special and "b" in text)
        ends = [self.tokenizer.id_of(text) for text, special, _ in pieces[last + 1 :] if special][:1]
        return tuple(dict.fromkeys(i for i in (*ends, self.tokenizer.eos_id) if i is not None))

    # -- text ----------------------------------------------------------------------------------

    def _text_ids(self, text: str) -> TokenArray:
        tokenizer = self.tokenizer
        if tokenizer.eos_id is None:
            raise ConfigError(
                f"{tokenizer.name} has no EOS token to end a text with; name one as eos_token in tokenizer_config.json"
            )
        before, after = tokenizer.around_document(tokenizer.eos_id)
        return np.array([*before, *tokenizer.encode_plain(text), *after], np.uint32)

    def _render(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None, prompt: bool
    ) -> str:
        """Return the rendered text, with AS_TEXT before every name of a special token that stands in the values."""
        guarded_messages, guarded_tools, changed = self._guard(messages, tools)
        text = self.template.render(guarded_messages, guarded_tools, prompt, self.variables)
        if changed:
            self._check_same(text, self.template.render(messages, tools, prompt, self.variables))
        return text

    def _check_same(self, guarded: str, plain: str) -> None:
        if _MARKS.sub("", guarded) != plain:
            raise DataError(
                f"{self.template.name} looks at special tokens inside of the texts, so that they cannot be told from "
                "its own; write them otherwise in the texts"
            )

    def _guard(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
    ) -> tuple[list[dict[str, Any]], list[Any] | None, bool]:
        """Return messages and tools with AS_TEXT before the names of special tokens in all their strings.

        The last value says whether there are any.  DataError for a text that holds one of the marks itself.
        """
        changed = False

        def guard(value: Any, starts: re.Pattern[str]) -> Any:
            nonlocal changed
            if isinstance(value, str):
                if (found := _MARKS.search(value)) is not None:
                    raise DataError(f"the text holds U+{ord(found[0]):04X}, which is no character; remove it")
                made, count = starts.subn(AS_TEXT, value)
                changed = changed or count > 0
                return made
            if isinstance(value, Mapping):
                return {guard(key, starts): guard(inner, starts) for key, inner in value.items()}
            return [guard(inner, starts) for inner in value] if isinstance(value, list | tuple) else value

        made_messages = []
        for message in messages:
            texts = {key: guard(value, self._starts) for key, value in message.items() if key != "role"}
            if message.get("role") == "assistant" and isinstance(message.get("content"), str):
                texts["content"] = guard(message["content"], self._starts_in_answers)
            made_messages.append({"role": message.get("role"), **texts})
        made_tools = None if tools is None else guard(list(tools), self._starts)
        return made_messages, made_tools, changed

    # -- where answers are ---------------------------------------------------------------------

    def _marked(self, conversation: Conversation) -> str:
        """Return the rendered text with marks around each answer."""
        messages, tools = conversation.to_dicts(), conversation.tools
        if not self.template.marks_answers:
            return self._marked_by_prefixes(messages, tools)
        guarded_messages, guarded_tools, changed = self._guard(messages, tools)
        marked = self.template.render_marked(guarded_messages, guarded_tools, self.variables)
        if changed:
            self._check_same(marked, self.template.render(messages, tools, False, self.variables))
        return marked

    def _marked_by_prefixes(self, messages: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]] | None) -> str:
        """Find the answers of a template that does not mark them: answer i stands between the rendering of the turns
        before it, with the generation prompt, and the rendering of the turns up to it."""
        whole = self._render(messages, tools, False)
        at, parts = 0, []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            begin = len(before) if whole.startswith(before := self._render(messages[:i], tools, True)) else -1
            upto = whole if i == len(messages) - 1 else self._render(messages[: i + 1], tools, False)
            end = self._common(whole, upto)
            if not at <= begin <= end:
                raise DataError(
                    f"{self.template.name} writes the turns before answer {i} in another way when it writes those "
                    "after it, so the answers cannot be found; put {% generation %} and {% endgeneration %} around "
                    "what the model writes in the template, or train on all tokens (loss_on='all')"
                )
            parts += [whole[at:begin], ANSWER_BEGINS, whole[begin:end], ANSWER_ENDS]
            at = end
        return "".join([*parts, whole[at:]])

    def _common(self, whole: str, other: str) -> int:
        """Return the length of the common beginning, not counting a special token that is cut through."""
        length = next((i for i, (a, b) in enumerate(zip(whole, other, strict=False)) if a != b), None)
        if length is None:
            return min(len(whole), len(other))
        for found in self._scan.finditer(whole):
            if found.start() < length < found.end():
                return found.start()
        return length

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

    def _close(self, pieces: list[Piece], conversation: Conversation) -> list[Piece]:
        """Let each answer end with its end token: take in the one behind it, leave out blanks after it, or add EOS."""
        last_role = conversation.messages[-1].role
        numbers = {number for _, _, number in pieces if number >= 0}
        ends = {self.variables.get("eos_token")}
        closed = list(pieces)
        for number in sorted(numbers, reverse=True):
            last = max(i for i, piece in enumerate(closed) if piece[2] == number)
            text, special, _ = closed[last]
            if not special and not text.strip() and last and closed[last - 1][1:] == (True, number):
                closed[last] = (text, False, -1)  # the line break behind <|im_end|>, which nobody has to write
                continue
            if special:
                continue
            follower = closed[last + 1] if last + 1 < len(closed) else None
            final = number == max(numbers) and last_role == "assistant"
            if follower is not None and follower[1] and (final or follower[0] in ends):
                ends.add(follower[0])
                closed[last + 1] = (follower[0], True, number)
            elif final:
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

    def _ids(self, pieces: list[Piece]) -> tuple[TokenArray, npt.NDArray[np.int64]]:
        """Return ids (n,) and the number of the answer that each belongs to (n,), -1 for none."""
        ids: list[int] = []
        answers: list[int] = []
        made = self.tokenizer.encode_pieces([(text, special) for text, special, _ in pieces])
        for each, (_, _, answer) in zip(made, pieces, strict=True):
            ids += each
            answers += [answer] * len(each)
        return np.array(ids, np.uint32), np.array(answers, np.int64)

    def _not_learnt(self, conversation: Conversation, answers: npt.NDArray[np.int64]) -> list[int]:
        """Return the numbers of the answers that the data mark as not to be learnt."""
        flags = [message.trained for message in conversation.messages if message.role == "assistant"]
        count = int(answers.max(initial=-1)) + 1
        if count != len(flags):
            raise DataError(
                f"{self.template.name} marks {count} answers where the conversation has {len(flags)}, so those that "
                "are not to be learnt cannot be found; write one {% generation %} block for each answer"
            )
        return [number for number, learnt in enumerate(flags) if not learnt]
