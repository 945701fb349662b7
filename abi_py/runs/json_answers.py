"""Answers that are meant to be JSON: whether a model's are, and whether they have the keys of the data's own.

    asked    questions of conversations whose own answer is a JSON object; others are not asked
    parsed   the whole answer is one JSON object, with nothing before it or after it; NaN, and a key given twice, are
             no JSON (`untrusted.parse_json`)
    keyed    and has the keys of the data's answer, no more and no fewer, at its top
    equal    and is the same value as the data's answer; the order of keys says nothing, and true is not 1

Answers are greedy: the likeliest token each time, so that the figures are those of the weights and of nothing else.
One that has not ended after twice the tokens of the longest answer asked for is cut, and then does not parse.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ConfigError, counted
from ..training.events import JsonAnswersEvent
from ..untrusted import parse_json
from .conversations import ends_of_answers
from .findings import JsonAnswers
from .run import Run

if TYPE_CHECKING:
    from ..data.chat_dataset import ChatDataset
    from ..data.tokenizer import Tokenizer
    from ..model.transformer import Transformer
    from ..training.trainer import LlamaTrainer

__all__ = ["check_answers", "check_answers_of_run", "check_any", "check_askable", "judge"]


def judge(answer: str, own: dict[str, Any]) -> tuple[bool, bool, bool]:
    """Return whether an answer is a JSON object, has the keys of the data's own answer, and is equal to it."""
    found = _object(answer)
    return found is not None, found is not None and found.keys() == own.keys(), _same(found, own)


def _same(one: Any, other: Any) -> bool:
    """Say whether two values are the same in JSON: 1 and 1.0 are, true and 1 are not, though they are in Python."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(value, other[name]) for name, value in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


def _object(text: str) -> dict[str, Any] | None:
    try:
        value = parse_json(text)  # white space around it is JSON's own: a no-break space is none
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def check_answers(
    model: "Transformer", tokenizer: "Tokenizer", stop_ids: Sequence[int], data: "ChatDataset", most: int
) -> JsonAnswers:
    """Let the model answer the first `most` rows of `data` whose own answer is a JSON object, and judge the answers;
    `asked` is 0 where there is none.  Errors of `Generator.run`.
    """
    from ..generation import Generator

    asked, owns, longest = list[np.ndarray](), list[dict[str, Any]](), 0
    for question, own, length in islice(_questions(data, tokenizer, model.config.max_seq_len), most):
        asked.append(question)
        owns.append(own)
        longest = max(longest, length)
    if not asked:
        return JsonAnswers(asked=0, parsed=0, keyed=0, equal=0)
    generator = Generator(model, tokenizer)
    results = generator.run(asked, temperature=0.0, max_new_tokens=2 * longest, stop_ids=tuple(stop_ids))
    verdicts = np.array([judge(result.text or "", own) for result, own in zip(results, owns, strict=True)])
    parsed, keyed, equal = (int(count) for count in verdicts.sum(0))
    return JsonAnswers(asked=len(asked), parsed=parsed, keyed=keyed, equal=equal)


def check_askable(run: Run) -> None:
    """Raise ConfigError if a run is to check answers, and none that is kept for validation is a JSON object: before
    training, for at its end there would be nothing to check.
    """
    from ..data.chat_dataset import ChatDataset

    most = run.config.data.check_json
    if not most or not isinstance(run.valid, ChatDataset):
        return
    tokenizer = run.find_tokenizer()[0]
    if tokenizer is not None:
        check_any(run.valid, tokenizer, run.config.model.max_seq_len, most, "kept for validation")


def check_any(data: "ChatDataset", tokenizer: "Tokenizer", context: int, most: int, which: str) -> None:
    """Raise ConfigError if no answer of the conversations, named by `which`, is a JSON object: so many as `most` are to
    be checked."""
    if next(_questions(data, tokenizer, context), None) is None:
        raise ConfigError(
            f"check_json ({most}) has no effect: none of the {counted(len(data), 'conversation')} {which} has an "
            "answer that is a JSON object and is trained by itself, as loss_on assistant does; leave it out"
        )


def _questions(
    data: "ChatDataset", tokenizer: "Tokenizer", context: int
) -> Iterator[tuple[np.ndarray, dict[str, Any], int]]:
    """Yield what comes before the first answer of each row, that answer, and its length: where the answer is an object
    and the model's context has room for one.
    """
    for index in range(len(data)):
        ids, trained = data.row(index)
        begin = int(np.argmax(trained))
        untrained = np.flatnonzero(~trained[begin:])
        end = begin + int(untrained[0]) if len(untrained) else len(ids)
        own = _object(tokenizer.decode(ids[begin:end].tolist(), skip_special_tokens=True)) if begin else None
        if own is not None and begin < context:
            yield ids[:begin].astype(np.int64), own, end - begin


def check_answers_of_run(run: Run, trainer: "LlamaTrainer", step: int) -> JsonAnswers | None:
    """Check the answers that a run asks for, with the model as it is, and tell the listeners of its training; None if
    it asks for none.

    `step` is that of the model's weights: not the last one where the best have been put back.
    """
    from ..data.chat_dataset import ChatDataset
    from ..data.tokenizer import Tokenizer

    most = run.config.data.check_json
    if not most or not isinstance(run.valid, ChatDataset):
        return None
    ends = ends_of_answers(run.directory)
    found = check_answers(trainer.model, Tokenizer.load(run.directory), ends, run.valid, most)
    figures = {name: getattr(found, name) for name in ("asked", "parsed", "keyed", "equal")}
    trainer.events.emit(JsonAnswersEvent(step=step, time=trainer.now()["time"], **figures))
    trainer.events.close()
    return found
