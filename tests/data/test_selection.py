"""Which rows are taken: shuffled by seed, every source in every cut, tools kept, filters counted."""

import json
from collections import Counter

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from abi_py.data import select_conversations
from abi_py.data.selection import conversation_files, percentages
from abi_py.errors import ConfigError, DataError


def source(tmp_path, name, count, **more):
    path = tmp_path / name
    path.write_text("".join(json.dumps({"text": f"{name} {i}", **more}) + "\n" for i in range(count)))
    return path


def tools(tmp_path, count):
    path = tmp_path / "tools.jsonl"
    rows = [{"instruction": f"q{i}", "output": "<tool>f</tool>\n{}"} for i in range(count)]
    path.write_text(json.dumps(rows))
    return path


def texts(selection):
    return [next(row.strings()) for row in selection.conversations]


def test_same_seed_same_order_and_nothing_lost(tmp_path):
    paths = [source(tmp_path, "a.jsonl", 50), source(tmp_path, "b.jsonl", 20)]
    first, again, other = (select_conversations(paths, seed=seed) for seed in (1, 1, 2))
    assert texts(first) == texts(again)
    assert texts(first) != texts(other)
    assert sorted(texts(first)) == sorted(texts(other))
    assert (first.read, first.cut, first.filtered, len(first.conversations)) == (70, 0, 0, 70)
    assert texts(first)[:3] != ["a.jsonl 0", "a.jsonl 1", "a.jsonl 2"]


def test_a_directory_is_all_its_files(tmp_path):
    """So for --data of every verb, --mix, and the DeepZig run, which all select here."""
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
    (tmp_path / "talks/more").mkdir(parents=True)
    paths = [tmp_path / "talks/a.jsonl", tmp_path / "talks/more/b.jsonl"]
    for path in paths:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = select_conversations([str(tmp_path / "talks")], seed=1)
    assert found == select_conversations(paths, seed=1)
    assert (found.read, list(found.sources)) == (4, list(map(str, paths)))
    (tmp_path / "talks/notes.txt").write_text("no conversation")
    with pytest.raises(ConfigError, match=r"talks\) must be a file of conversations, or a directory of nothing else"):
        select_conversations([tmp_path / "talks"])


def test_sources_are_mixed_evenly(tmp_path):
    paths = [source(tmp_path, "a.jsonl", 60), source(tmp_path, "b.jsonl", 20), source(tmp_path, "c.jsonl", 3)]
    order = [text[0] for text in texts(select_conversations(paths))]
    for start in range(0, 80, 20):
        share = Counter(order[start : start + 20])
        assert 13 <= share["a"] <= 16
        assert 4 <= share["b"] <= 6
    assert order.count("c") == 3


@example(sizes=[1, 1, 1, 1, 1], tool_rows=2, limit=6)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5), tool_rows=st.integers(0, 5), limit=st.integers(1, 60)
)
def test_every_source_has_its_share_of_a_cut(sizes, tool_rows, limit, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    paths = [source(folder, f"{chr(97 + i)}.jsonl", size) for i, size in enumerate(sizes)]
    paths += [tools(folder, tool_rows)] if tool_rows else []
    selection = select_conversations(paths, max_samples=limit, seed=3)
    total = sum(sizes) + tool_rows
    assert len(selection.conversations) == min(limit, total)
    assert selection.cut == total - len(selection.conversations)
    assert len(set(texts(selection))) == len(selection.conversations)
    counts = Counter(text[0] for text in texts(selection))
    if limit >= len(paths):
        assert all(counts[chr(97 + i)] >= 1 for i in range(len(sizes)))
    if tool_rows and tool_rows <= limit // 2 and limit - tool_rows >= len(sizes):
        assert counts["q"] == tool_rows
    if limit >= 10 * len(paths) and not tool_rows:
        for i, size in enumerate(sizes):
            assert abs(counts[chr(97 + i)] - size * min(limit, total) / total) <= len(sizes)


def test_fifty_of_many_hold_all_sources_and_the_tools(tmp_path):
    paths = [source(tmp_path, "a.jsonl", 1500), source(tmp_path, "b.jsonl", 5200), tools(tmp_path, 3)]
    selection = select_conversations(paths, max_samples=50)
    assert selection.sources == {str(paths[0]): 11, str(paths[1]): 36, str(paths[2]): 3}


def test_category_and_match(tmp_path):
    paths = [source(tmp_path, "a.jsonl", 5, category="memory_1"), source(tmp_path, "b.jsonl", 7, pattern="class_2")]
    paths.append(source(tmp_path, "c.jsonl", 2))
    memory = select_conversations(paths, categories=["memory_*"])
    assert (len(memory.conversations), memory.filtered) == (5, 9)
    assert memory.categories() == {"memory_1": 5}
    everything = select_conversations(paths)
    assert everything.categories() == {"class_2": 7, "memory_1": 5, "(none)": 2}
    assert sum(percentages(list(everything.categories().values()))) == pytest.approx(100.0, abs=1e-9)
    third = select_conversations(paths, categories=["memory_*", "class_?"], match=r"\b3$")
    assert sorted(texts(third)) == ["a.jsonl 3", "b.jsonl 3"]
    with pytest.raises(DataError, match=r"none of 14 rows fits category 'memoy_\*'; the categories are class_2 \(7\)"):
        select_conversations(paths, categories=["memoy_*"])
    with pytest.raises(DataError, match=r"none of 14 rows fits category 'memry_\*'; the categories are class_2 \(7\)"):
        select_conversations(paths, categories=["class_*", "memry_*"])
    some = select_conversations(paths, categories=["class_*", "memry_*"], each_category=False)
    assert some.categories() == {"class_2": 7}
    with pytest.raises(ConfigError, match=r"match \('\('\) must be a regular expression: missing \)"):
        select_conversations(paths, match="(")


@given(st.lists(st.integers(0, 10**6), min_size=1).filter(any))
def test_percentages_sum_to_a_hundred(counts):
    shares = percentages(counts)
    assert round(10 * sum(shares)) == 1000
    for share, count in zip(shares, counts, strict=True):
        assert abs(share - 100 * count / sum(counts)) <= 0.1 + 1e-9
    assert percentages([0, 0]) == [0.0, 0.0]


def test_bad_rows_and_nothing(tmp_path):
    good = source(tmp_path, "a.jsonl", 2)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"txt": "a"}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl:1: found the keys 'txt'"):
        select_conversations([good, bad])
    selection = select_conversations([good, bad], skip_bad_rows=True)
    assert (len(selection.conversations), selection.read, len(selection.skipped)) == (2, 3, 1)
    with pytest.raises(DataError, match=r"no conversations: no row is good, the first of 1: .*bad\.jsonl:1"):
        select_conversations([bad], skip_bad_rows=True)
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(DataError, match="there are no rows"):
        select_conversations([empty])


@pytest.mark.parametrize(
    ("name", "text", "good"),
    [
        ("a.jsonl", '{"instruction": "a", "output": "b"}\n', True),
        ("a.ndjson", '\n{"messages": []}\n', True),
        ("a.jsonl", '{"instrction": "a", "output": "b"}\n', True),  # its reader says which keys it should have
        ("a.jsonl", '{"text": "a"}\n', False),
        ("a.jsonl", "not JSON\n", False),
        ("a.jsonl", "", False),
        ("a.json", '\ufeff\n[{"instrction": "a"}]', True),
        ("a.json", '[{"text": "a"}]', True),
        ("a.json", '{"version": 1}', False),
        ("a.json", '{"prompt": "a", "completion": "b"}\n', True),
        ("a.json", "[1, 2]", False),
        ("a.txt", '{"instruction": "a", "output": "b"}\n', False),
    ],
)
def test_which_files_are_conversations(tmp_path, name, text, good):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / name).write_text(text, encoding="utf-8")
    assert conversation_files(folder / name) == ([folder / name] if good else [])
    assert conversation_files(folder) == ([folder / name] if good else [])
    (folder / "notes.txt").write_text("text")
    assert conversation_files(folder) == []
