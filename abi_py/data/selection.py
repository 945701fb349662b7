"""Which conversations of several sources are taken, and in which order.

    read      all rows of every source; bad ones are errors, or counted
    filter    by category ("memory_*") and by a pattern in any of the texts
    shuffle   each source on its own, by seed
    cut       to max_samples: every source keeps its share, at least one row; rows with tools are kept
    mix       item i of k of a source is at (i + 1/2) / k of the whole, so that any part holds the same mixture

The order is a function of the rows and the seed.  Cutting comes after the shuffle, so that no source is lost because it
is read last; the few rows that show how tools are called are kept whole if they are at most half of what is wanted,
and leave room for every source.
"""

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from ..errors import ConfigError, DataError, counted
from .batch import check_integer
from .conversation import Conversation
from .conversation_rows import RowReader, has_turns
from .documents import expand
from .order import permute
from .rows import Source, first_row
from .sources import PROBE, ROWS, Kind, kind_of, open_source

__all__ = ["Selection", "conversation_files", "percentages", "select_conversations"]

NO_CATEGORY = "(none)"


@dataclass(frozen=True)
class Selection:
    """The conversations that were taken, and what became of the others.

    sources   rows taken of each source, by name      read      rows in the sources, bad ones included
    skipped   a message for each bad row              filtered  rows that the filters left out
    cut       rows beyond max_samples
    """

    conversations: list[Conversation]
    sources: dict[str, int]
    read: int
    filtered: int
    cut: int
    skipped: list[str] = field(default_factory=list)

    def categories(self) -> dict[str, int]:
        """Return how many of the conversations have which category, most frequent first."""
        return dict(Counter(c.category or NO_CATEGORY for c in self.conversations).most_common())


def conversation_files(path: str | os.PathLike[str]) -> list[Path]:
    """Return the files of conversations that `path` means: itself, or those of a directory that holds no others.

    Empty if it is something else.  A file of conversations is one of rows (sources.py), and its first row has the keys
    of a format with turns, or of none; rows of {"text": ...} are documents, which need no template.
    """
    files = [file.path for file in expand([path]) if not file.problem]
    return files if files and all(map(_holds_conversations, files)) else []


def _holds_conversations(path: Path) -> bool:
    if kind_of(path) not in ROWS or not path.is_file():
        return False
    try:
        row = first_row(path)
    except (DataError, OSError):  # not what its name says; its reader will say so
        return False
    if has_turns(row) or not isinstance(row, dict):
        return has_turns(row)
    if kind_of(path) is Kind.JSON:  # an array of objects is rows; one object is a text like any other
        with open(path, "rb") as file:
            return open_source(file, str(path)).read(PROBE).lstrip()[:1] == b"["
    return "text" not in row and "content" not in row  # unknown keys: the reader of conversations names them best


def percentages(counts: Sequence[int]) -> list[float]:
    """Return the shares in per cent with one decimal, rounded so that they sum to 100.0 (largest remainders)."""
    total = sum(counts)
    if not total:
        return [0.0 for _ in counts]
    tenths = [1000 * count // total for count in counts]
    rest = sorted(range(len(counts)), key=lambda i: (-(1000 * counts[i] % total), i))
    for i in rest[: 1000 - sum(tenths)]:
        tenths[i] += 1
    return [tenth / 10 for tenth in tenths]


def select_conversations(
    sources: Sequence[Source],
    *,
    skip_bad_rows: bool = False,
    categories: Sequence[str] = (),
    each_category: bool = True,
    match: str | None = None,
    max_samples: int | None = None,
    seed: int = 0,
) -> Selection:
    """Return the conversations of the sources, chosen and mixed as the module says; a directory is all its files.

    categories   patterns with * and ?; a row is taken if its category matches one of them (none given: all rows)
    each_category  whether each pattern must match the category of some row, or at least one of them
    match        a regular expression, looked for in every text of a row
    max_samples  take at most this many conversations; None or 0: all

    DataError for a bad row (file:line) unless skip_bad_rows, if nothing is left, and for a category without rows;
    ConfigError for a bad pattern, and for a directory of anything else.
    """
    seed = check_integer("seed", seed, 0, 1 << 64)
    limit = check_integer("max_samples", max_samples or 0, 0)
    pattern = _compile(match)
    groups: list[list[Conversation]] = []
    files = [file for source in sources for file in _files_of(source)]
    readers = [RowReader(file, skip_bad_rows=skip_bad_rows) for file in files]
    seen: Counter[str | None] = Counter()
    for reader in readers:
        rows = list(reader)
        seen.update(row.category or None for row in rows)
        groups.append([row for row in rows if _wanted(row, categories, pattern)])
    skipped = [message for reader in readers for message in reader.skipped]
    names = ", ".join(dict.fromkeys(reader.name for reader in readers))
    if not any(groups):
        raise DataError(_nothing(names, skipped, seen, categories, match))
    for each in categories if each_category else ():  # a misspelt one beside good ones is not passed over
        if not any(_fits(name, each) for name in seen):
            raise DataError(_nothing(names, skipped, seen, [each], None))
    taken = sum(map(len, groups))
    parts = _cut(_strata(groups, seed), limit or taken)
    sizes = Counter[str]()
    for part, index in parts:
        sizes[readers[index].name] += len(part)
    chosen = _mix([part for part, _ in parts])
    return Selection(
        conversations=chosen,
        sources=dict(sizes),
        read=sum(reader.count for reader in readers),
        filtered=sum(seen.values()) - taken,
        cut=taken - len(chosen),
        skipped=skipped,
    )


def _files_of(source: Source) -> Sequence[Source]:
    """Return the source itself, or the files of a directory."""
    if not isinstance(source, str | os.PathLike) or not os.path.isdir(source):
        return [source]
    files = conversation_files(source)
    if not files:
        raise ConfigError(f"data ({os.fspath(source)}) must be a file of conversations, or a directory of nothing else")
    return files


def _compile(match: str | None) -> re.Pattern[str] | None:
    if match is None:
        return None
    try:
        return re.compile(match)
    except re.error as error:
        raise ConfigError(f"match ({match!r}) must be a regular expression: {error}") from None


def _fits(category: str | None, wanted: str) -> bool:
    return fnmatchcase(category or "", wanted)


def _wanted(row: Conversation, categories: Sequence[str], pattern: re.Pattern[str] | None) -> bool:
    if categories and not any(_fits(row.category, wanted) for wanted in categories):
        return False
    return pattern is None or any(pattern.search(text) for text in row.strings())


def _nothing(
    names: str, skipped: list[str], seen: Counter[str | None], categories: Sequence[str], match: str | None
) -> str:
    if seen:
        asked = [f"category {' or '.join(map(repr, categories))}"] if categories else []
        asked += [f"match {match!r}"] if match is not None else []
        there = ", ".join(f"{name or NO_CATEGORY} ({count})" for name, count in seen.most_common(10))
        rows = counted(sum(seen.values()), "row")
        return f"{names}: none of {rows} fits {' and '.join(asked)}; the categories are {there}"
    why = f"no row is good, the first of {len(skipped)}: {skipped[0]}" if skipped else "there are no rows"
    return f"{names}: no conversations: {why}; give JSON lines or a JSON array"


Stratum = tuple[list[Conversation], int]  # rows, number of their source


def _strata(groups: list[list[Conversation]], seed: int) -> list[Stratum]:
    """Return each source, shuffled, in two parts: rows with tools first, then the others; empty parts are left out."""
    strata: list[Stratum] = []
    for index, group in enumerate(groups):
        shuffled = [group[int(i)] for i in permute(np.arange(len(group)), max(1, len(group)), seed, index)]
        for tools in (True, False):
            part = [row for row in shuffled if row.calls_tools is tools]
            if part:
                strata.append((part, index))
    return strata


def _cut(strata: list[Stratum], limit: int) -> list[Stratum]:
    """Cut the strata to `limit` rows together."""
    sizes = [len(part) for part, _ in strata]
    if sum(sizes) <= limit:
        return strata
    tools = [part[0].calls_tools for part, _ in strata]
    kept = sum(size for size, is_tool in zip(sizes, tools, strict=True) if is_tool)
    room = limit - kept >= tools.count(False)  # for a row of each other source
    whole = tools if kept <= limit // 2 and room else [False] * len(strata)
    shares = [size if keep else 0 for size, keep in zip(sizes, whole, strict=True)]
    _share_out([i for i, keep in enumerate(whole) if not keep], sizes, limit - sum(shares), shares)
    return [(part[:share], index) for (part, index), share in zip(strata, shares, strict=True) if share]


def _share_out(which: list[int], sizes: list[int], limit: int, shares: list[int]) -> None:
    """Give each of `which` its part of `limit` in proportion to its size, and at least one row while there are any."""
    total = sum(sizes[i] for i in which)
    exact = {i: sizes[i] * limit / total for i in which}
    for i in which:
        shares[i] = max(1, int(exact[i]))
    while sum(shares[i] for i in which) > limit:  # the single rows of small sources, at the cost of the largest share
        largest = max(which, key=lambda i: (shares[i], i))
        shares[largest] -= 1
    by_remainder = sorted(which, key=lambda i: (int(exact[i]) - exact[i], i))
    spare = limit - sum(shares[i] for i in which)
    while spare:
        for i in by_remainder:
            if spare and shares[i] < sizes[i]:
                shares[i] += 1
                spare -= 1


def _mix(parts: list[list[Conversation]]) -> list[Conversation]:
    """Return all rows so that each part is spread evenly over the whole."""
    placed = [((2 * i + 1) / (2 * len(part)), n, i) for n, part in enumerate(parts) for i in range(len(part))]
    return [parts[n][i] for _, n, i in sorted(placed)]
