"""SentencePiece's BPE has scores, `tokenizers`' BPE has merges: each from the other.

    SentencePiece    of all neighbours that make a token together, those whose token has the highest score are merged,
                     of equal scores the leftmost
    tokenizers       of all neighbours that are a merge, those whose merge comes first, of equal ones the leftmost

So the merges of scores are all ways of dividing a token into two, those of the highest score first.  The other way
there are scores only if no merge is missing and the merges of a token follow each other.
"""

from collections.abc import Iterable, Mapping, Sequence, Set
from itertools import groupby

import numpy as np
import numpy.typing as npt

from ...errors import CheckpointError, DataError, counted, shown

__all__ = ["LONGEST_PIECE", "merges_of_scores", "scores_of_merges"]

LONGEST_PIECE = 1024  # characters; a token is divided at each of them
MOST_PLACES = 1 << 24  # of all tokens together; the largest vocabularies have 2 million


def merges_of_scores(
    vocab: Mapping[str, int], scores: npt.NDArray[np.float64], skipped: Set[str], place: str
) -> tuple[list[list[str]], list[str]]:
    """Return all merges, most important first, and sentences on what llama.cpp does differently with these scores.

    vocab (token to id), scores (V,); `skipped` are tokens that no text is merged into, special ones and bytes.
    CheckpointError for tokens so long that there is no bound on the time.
    """
    pieces = [token for token in vocab if token not in skipped]
    longest = max(pieces, key=len, default="")
    if len(longest) > LONGEST_PIECE or sum(map(len, pieces)) > MOST_PLACES:
        rule = f"at most {LONGEST_PIECE:,} characters, and all together at most {MOST_PLACES:,}"
        raise CheckpointError(
            f"{place}: tokenizer.ggml.tokens has {shown(longest)} of {len(longest):,} characters; the tokens of a "
            f"llama vocabulary have {rule}: the file is damaged: copy or convert it again"
        )
    known, values = set(pieces), scores.tolist()
    found: list[tuple[float, int, str, str]] = []
    unknown = 0
    for token in pieces:
        splits = list(_splits(token, known))
        found += [(-values[vocab[token]], vocab[token], left, right) for left, right in splits]
        unknown += len(token) > 1 and any(character not in known for character in token)
    found.sort(key=lambda merge: merge[:2])
    notes = []
    shared = _shared(found)
    if shared:
        notes.append(
            f"{counted(shared, 'token')} that texts are merged into have the score of another: where both could be "
            "merged, llama.cpp takes the one further left, and here it is the one with the smaller id"
        )
    if unknown:
        notes.append(
            f"{counted(unknown, 'token')} have characters that are no tokens themselves: llama.cpp may merge them, and "
            "here such characters are written in bytes"
        )
    return [[left, right] for _, _, left, right in found], notes


def _splits(token: str, known: Set[str]) -> Iterable[tuple[str, str]]:
    """Return the ways of dividing a token into two tokens."""
    pairs = ((token[:at], token[at:]) for at in range(1, len(token)))
    return [(left, right) for left, right in pairs if left in known and right in known]


def _shared(found: Sequence[tuple[float, int, str, str]]) -> int:
    """Return how many tokens have a score that another has."""
    made = {(score, token) for score, token, _, _ in found}
    sizes = [len(list(group)) for _, group in groupby(sorted(made), key=lambda entry: entry[0])]
    return sum(size for size in sizes if size > 1)


def scores_of_merges(
    merges: Sequence[tuple[str, str]], vocab: Mapping[str, int], skipped: Set[str], place: str
) -> npt.NDArray[np.float32]:
    """Return scores (V,) by which llama.cpp merges as these merges say: minus the rank of a token, others 0.

    DataError where there are none: a merge is missing, or those of a token do not follow each other.
    """
    remedy = "keep the model as a folder, or train it with a byte-level tokenizer (`abi-train tokenizer train`)"
    scores = np.zeros(len(vocab), np.float32)
    order = [token for token, _ in groupby(left + right for left, right in merges)]
    ranks = {token: rank for rank, token in enumerate(order)}
    if len(ranks) < len(order):
        twice = next(token for rank, token in enumerate(order) if ranks[token] != rank)
        raise DataError(
            f"{place}: other merges come between those of {shown(twice)}, and a GGUF file has one score for a token, "
            f"not one for a merge; {remedy}"
        )
    listed = set(merges)
    known = vocab.keys() - skipped
    for token in known:
        for pair in _splits(token, known) if len(token) <= LONGEST_PIECE else ():
            if pair not in listed:
                raise DataError(
                    f"{place}: {shown(pair[0])} and {shown(pair[1])} make the token {shown(token)} but are no merge, "
                    f"and llama.cpp merges whatever makes a token; {remedy}"
                )
    for token, rank in ranks.items():
        scores[vocab[token]] = -1.0 - rank
    return scores
