"""The tokenizer of a GGUF file, both ways, against llama.cpp and transformers (golden/make_gguf_tokenizers.py)."""

import json
import random
import time
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from abi_py.data.byte_tokenizer import byte_tokenizer_files, is_byte_tokenizer
from abi_py.data.tokenizer import Tokenizer
from abi_py.data.tokenizer_training import TokenizerStyle, train_tokenizer
from abi_py.errors import AbiError, CheckpointError, DataError
from abi_py.formats.companions import Companions
from abi_py.formats.gguf import open_gguf, write_gguf
from abi_py.formats.gguf.companion_files import companions_of, metadata_of_companions
from abi_py.formats.gguf.merges import merges_of_scores, scores_of_merges
from abi_py.formats.gguf.pretokenizers import GPT2, LLAMA3, QWEN2, RULES, pre_tokenizer_of, rule_called, steps_of
from abi_py.formats.gguf.vocabulary import tokenizer_of
from abi_py.formats.gguf.vocabulary_writing import metadata_of

GOLDEN = Path(__file__).parents[2] / "golden/gguf_tokenizers.npz"
NAMES = (
    *("bytes", "trained", "deepzig", "llama3", "qwen2", "gpt2", "sentencepiece", "metaspace", "unigram"),
    "unigram_spaces",
)
GGML = "tokenizer.ggml."
# Of 1,000 texts, how many llama.cpp and transformers make other ids of, and why: docs/7-gguf-tokenizers.md.
APART = {"qwen2": 41, "metaspace": 100, "unigram": 180, "unigram_spaces": 88}
# The same for the texts of a rule, of 300: llama.cpp against the patterns that the name comes from.
RULES_APART = {"tekken": 23, "gpt-4o": 23, "deepseek-llm": 4, "deepseek-coder": 2, "tiny_aya": 13}
RULES_APART |= {"afmoe": 3, "superbpe": 1, "granite-embed-multi-97m": 1, "kimi-k2": 28, "youtu": 6}


@cache
def golden():
    with np.load(GOLDEN) as stored:
        return {key: stored[key] for key in stored.files}


def text_of(key):
    return json.loads(golden()[key].tobytes())


@cache
def texts():
    return text_of("texts")


def rows(key, lengths):
    return [row.tolist() for row in np.split(golden()[key], np.cumsum(golden()[lengths].astype(int))[:-1])]


@cache
def ids(name):
    """Return {"llama" | "llama_plain" | "hf" | "hf_plain": the ids of each text}."""
    base = rows(f"{name}.llama", f"{name}.lengths")
    differ = text_of(f"{name}.differ")
    return {"llama": base} | {
        key: [those.get(str(i), row) for i, row in enumerate(base)] for key, those in differ.items()
    }


def metadata(name):
    kinds = {f"{GGML}scores": np.float32, f"{GGML}token_type": np.int32, f"{GGML}precompiled_charsmap": np.uint8}
    return {
        key: np.array(value, kinds[key]) if key in kinds else value
        for key, value in text_of(f"{name}.metadata").items()
    }


def opened(described, settings, name="a GGUF file"):
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(described)), settings, name)


@cache
def read(name):
    made = tokenizer_of(metadata(name))
    return opened(made.tokenizer, made.settings)


def same(one, other):
    return one.keys() == other.keys() and all(
        np.array_equal(one[key], other[key]) if isinstance(one[key], np.ndarray) else one[key] == other[key]
        for key in one
    )


# -- against llama.cpp and transformers --------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_is_what_llama_cpp_was_given(name):
    described, settings, ends = text_of(f"{name}.files")
    assert same(metadata_of(described, settings, ends=ends).metadata, metadata(name))


@pytest.mark.parametrize("name", NAMES)
def test_a_file_tokenizes_here_as_in_llama_cpp(name):
    tokenizer, wanted = read(name), ids(name)
    assert [tokenizer.encode(text) for text in texts()] == wanted["llama"]
    # Here the unigram model finds the name of its unknown token in plain text.
    known = [i for i, text in enumerate(texts()) if not (name.startswith("unigram") and "<unk>" in text)]
    assert [tokenizer.encode_plain(texts()[i]) for i in known] == [wanted["llama_plain"][i] for i in known]
    assert tokenizer.encode("a", add_special_tokens=True) == text_of(f"{name}.around")


@pytest.mark.parametrize("name", NAMES)
def test_the_folder_tokenizes_here_as_in_transformers_and_how_often_llama_cpp_does_not(name):
    described, settings, _ = text_of(f"{name}.files")
    tokenizer, wanted = opened(described, settings), ids(name)
    assert [tokenizer.encode(text) for text in texts()] == wanted["hf"]
    # The unigram model of transformers finds special tokens in plain text too, which nothing here does.
    special = tokenizer.special_ids if name.startswith("unigram") else frozenset()
    for text, row in zip(texts(), wanted["hf_plain"], strict=True):
        assert not special.isdisjoint(row) or tokenizer.encode_plain(text) == row, text
    assert sum(a != b for a, b in zip(wanted["llama"], wanted["hf"], strict=True)) == APART.get(name, 0)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.names[0])
def test_words_are_divided_as_llama_cpp_does_under_each_name(rule):
    name = rule.names[0]
    made = tokenizer_of({**metadata("rules"), f"{GGML}pre": name})
    tokenizer, wanted = opened(made.tokenizer, made.settings), rows(f"rules.{name}", f"rules.{name}.lengths")
    apart = [text for text, row in zip(texts(), wanted, strict=False) if tokenizer.encode_plain(text) != row]
    assert len(apart) == RULES_APART.get(name, 0), apart[:10]


@pytest.mark.parametrize("name", NAMES)
def test_a_round_trip_tokenizes_the_same(name):
    first = tokenizer_of(metadata(name))
    again = metadata_of(first.tokenizer, first.settings, ends=first.ends)
    second = tokenizer_of(again.metadata)
    assert second.settings == first.settings
    assert second.ends == first.ends
    tokenizer = opened(second.tokenizer, second.settings)
    assert [tokenizer.encode(text) for text in texts()] == ids(name)["llama"]
    assert tokenizer.decode(tokenizer.encode(texts()[40])) == read(name).decode(read(name).encode(texts()[40]))


@pytest.mark.parametrize("name", NAMES)
def test_a_file_holds_it(name, tmp_path):
    described, settings, ends = text_of(f"{name}.files")
    written = metadata_of(described, settings, ends=ends).metadata
    write_gguf(tmp_path / "x.gguf", {"general.architecture": "llama", **written}, [])
    file = open_gguf(tmp_path / "x.gguf")
    assert same({key: value for key, value in file.metadata.items() if key.startswith("tokenizer")}, written)
    assert tokenizer_of(file.metadata) == tokenizer_of(written)


# -- names of rules ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.names[0])
def test_a_rule_is_found_again_in_what_was_made_of_it(rule):
    assert rule in [each for each in RULES if each.steps == steps_of(pre_tokenizer_of(rule.steps), "x")]
    assert all(rule_called(name, "x") is rule for name in rule.names)


def test_no_name_stands_for_two_rules():
    names = [name for rule in RULES for name in rule.names]
    assert len(set(names)) == len(names)


def sequence(*steps):
    return {"type": "Sequence", "pretokenizers": list(steps)}


def split(pattern, behavior="Isolated", invert=False):
    level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    step = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": invert}
    return sequence(step, level)


def test_the_same_pattern_is_known_in_other_spellings():
    tiktoken = (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
    )
    adapted = LLAMA3.replace(
        "(?i:'s|'t|'re|'ve|'m|'ll|'d)", "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
    )
    for pattern in (tiktoken, adapted, LLAMA3.replace(r"\r", "\r").replace(r"\n", "\n")):
        assert steps_of(split(pattern), "x") == (LLAMA3,)
    assert steps_of(split(QWEN2, "Removed", True), "x") == (QWEN2,)
    assert steps_of(split(GPT2), "x") == steps_of({"type": "ByteLevel", "add_prefix_space": False}, "x") == (GPT2,)
    one, other = (tokenizers.Tokenizer(tokenizers.models.BPE()) for _ in range(2))
    one.pre_tokenizer, other.pre_tokenizer = (
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in (tiktoken, LLAMA3)
    )
    for text in texts():
        assert one.pre_tokenizer.pre_tokenize_str(text) == other.pre_tokenizer.pre_tokenize_str(text)


def test_an_unknown_name_is_refused_and_the_known_ones_named():
    with pytest.raises(
        CheckpointError, match=r"x: tokenizer.ggml.pre is 'kimi-k9', .* known are .*gpt-2.* qwen2, .*: use"
    ):
        tokenizer_of({**metadata("gpt2"), f"{GGML}pre": "kimi-k9"}, "x")


def test_a_name_of_bpe_of_characters_is_refused_with_the_reason():
    with pytest.raises(CheckpointError, match=r"x: tokenizer.ggml.pre is gemma4, BPE of characters .* use the"):
        rule_called("gemma4", "x")


# -- the project's own tokenizers --------------------------------------------------------------------


def test_the_byte_tokenizer_comes_back_byte_for_byte(tmp_path):
    described, settings = map(json.loads, byte_tokenizer_files().values())
    written = metadata_of(described, settings, rows=264)
    assert written.losses == ()
    assert written.metadata[f"{GGML}tokens"][256:] == ["<|endoftext|>", *(f"[PAD{i}]" for i in range(257, 264))]
    assert written.metadata[f"{GGML}token_type"].tolist() == [1] * 256 + [3] + [5] * 7
    made = tokenizer_of(written.metadata)
    for name, content in made.files().items():
        (tmp_path / name).write_bytes(content)
    assert is_byte_tokenizer(tmp_path)
    assert made.files() == byte_tokenizer_files()
    assert made.ends == (256,)


@pytest.mark.parametrize("style", [TokenizerStyle.DEEPZIG, TokenizerStyle.DEEPZIG_WS])
def test_what_loses_text_is_refused(style):
    made = train_tokenizer(["some text, and some more text"] * 9, vocab_size=60, style=style)
    rule = "continuing_subword_prefix|makes no bytes"
    with pytest.raises(DataError, match=rf"tokenizer.json: .*({rule}).*; keep the model as a folder"):
        metadata_of(json.loads(made.backend.to_str()), {})


# -- what a GGUF file cannot say ---------------------------------------------------------------------


def changed(name, **changes):
    described, settings, _ = text_of(f"{name}.files")
    return {**described, **changes}, settings


def with_added(name, **flags):
    described, settings, _ = text_of(f"{name}.files")
    *rest, last = described["added_tokens"]
    return {**described, "added_tokens": [*rest, {**last, **flags}]}, settings


def test_flags_of_tokens_are_losses():
    losses = metadata_of(*with_added("trained", lstrip=True, rstrip=True, single_word=True)).losses
    assert len(losses) == 2
    assert "takes away the white space before it and the white space after it" in losses[0]
    assert "only as a word of its own" in losses[1]


def test_a_tokenizer_without_an_end_says_which_token_llama_cpp_takes():
    described, settings = changed("gpt2")
    losses = metadata_of(described, {**settings, "eos_token": None}).losses
    assert losses == ("no token ends a text, and llama.cpp takes the one with the id 11 then, ','",)


def test_more_ends_than_three_are_a_loss():
    described, settings = changed("trained")
    made = metadata_of(described, settings, ends=(4, 5, 6))
    assert [made.metadata[f"{GGML}{key}_token_id"] for key in ("eos", "eot", "eom")] == [2, 4, 5]
    assert made.losses == ("a text ends at '<assistant>' too; a GGUF file names 3 such tokens",)
    assert tokenizer_of(made.metadata).ends == (2, 4, 5)


def test_words_that_are_taken_whole_are_a_loss_only_where_it_matters():
    described, settings = changed("llama3")
    model = described["model"]
    by_merges = {**described, "model": {**model, "ignore_merges": False}}
    assert metadata_of(by_merges, settings).metadata[f"{GGML}pre"] == "smaug-bpe"
    qwen = json.loads(json.dumps(described).replace("{1,3}", ""))
    assert metadata_of(qwen, settings).losses == ()  # each token is what its characters are merged into
    vocab = {**model["vocab"], "Ġwhole": max(model["vocab"].values()) + 9}
    (loss,) = metadata_of({**qwen, "model": {**model, "vocab": vocab}}, settings).losses
    assert loss == "no merges make 1 token ('Ġwhole'), which are taken for a word, and not by llama.cpp"


@pytest.mark.parametrize(
    ("name", "changes", "rule"),
    [
        ("gpt2", {"normalizer": {"type": "Lowercase"}}, "normalizer has the step .*Lowercase"),
        ("gpt2", {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "puts a space before a text"),
        ("gpt2", {"pre_tokenizer": split("x")}, "words are divided by 'x', and no way that llama.cpp has a name for"),
        ("gpt2", {"pre_tokenizer": sequence({"type": "Whitespace"}, {"type": "ByteLevel"})}, "the step .*Whitespace"),
        ("gpt2", {"pre_tokenizer": None}, "makes no bytes"),
        ("gpt2", {"model": {"type": "WordPiece", "vocab": {"a": 0}}}, "its model is 'WordPiece'"),
        ("gpt2", {"post_processor": {"type": "BertProcessing", "sep": ["b", 1], "cls": ["a", 0]}}, "processor puts"),
        ("sentencepiece", {"normalizer": None}, "marks spaces in no way"),
        ("unigram", {"pre_tokenizer": None}, "divided by something else than Metaspace"),
    ],
)  # fmt: skip
def test_what_would_change_ids_is_refused_with_a_remedy(name, changes, rule):
    described, settings = changed(name, **changes)
    if name == "gpt2" and "post_processor" in changes:
        settings = {**settings, "bos_token": "c"}
    with pytest.raises(DataError, match=rf"^tokenizer.json: .*{rule}.*; .*keep the model as a folder") as caught:
        metadata_of(described, settings)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_with_more_ids_than_the_model_has_rows_is_refused():
    with pytest.raises(DataError, match=r"the largest id is 70\d, but the model has 5 rows"):
        metadata_of(*changed("gpt2"), rows=5)


def test_scores_only_where_merges_have_them():
    vocab = {"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4, "abc": 5}
    whole = [("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc")]
    scores = scores_of_merges(whole, vocab, set(), "x")
    assert scores.tolist() == [0, 0, 0, -1, -2, -3]
    back, notes = merges_of_scores(vocab, scores.astype(float), set(), "x")
    assert {tuple(pair) for pair in back[2:]} == {("ab", "c"), ("a", "bc")}
    assert (back[:2], notes) == ([["a", "b"], ["b", "c"]], [])
    with pytest.raises(DataError, match=r"'a' and 'bc' make the token 'abc' but are no merge"):
        scores_of_merges(whole[:3], vocab, set(), "x")
    with pytest.raises(DataError, match=r"other merges come between those of 'abc'"):
        scores_of_merges([whole[0], whole[2], whole[1], whole[3]], vocab, set(), "x")


def test_shared_scores_and_unknown_characters_are_noted():
    vocab = {"a": 0, "b": 1, "ab": 2, "ba": 3, "bé": 4}
    _, notes = merges_of_scores(vocab, np.array([0.0, 0, -1, -1, -2]), set(), "x")
    assert "2 tokens that texts are merged into have the score of another" in notes[0]
    assert "1 token have characters" in notes[1] or "characters that are no tokens" in notes[1]


def test_templates_go_both_ways():
    described, settings = changed("gpt2")
    named = [{"name": "default", "template": "A"}, {"name": "tool_use", "template": "B"}]
    made = metadata_of(described, {**settings, "chat_template": named})
    assert made.metadata["tokenizer.chat_templates"] == ["tool_use"]
    assert made.metadata["tokenizer.chat_template.tool_use"] == "B"
    assert tokenizer_of(made.metadata).settings["chat_template"] == named
    one = metadata_of(described, {**settings, "chat_template": "A"}).metadata
    assert tokenizer_of(one).settings["chat_template"] == "A"
    with pytest.raises(DataError, match="'a b', but a name is of letters"):
        metadata_of(described, {**settings, "chat_template": [{"name": "a b", "template": "x"}]})


# -- files -------------------------------------------------------------------------------------------


def test_the_files_of_a_folder_go_into_the_metadata_and_come_back(tmp_path):
    described, _, _ = text_of("trained.files")
    files = {
        "tokenizer.json": json.dumps(described).encode(),
        "tokenizer_config.json": json.dumps({"chat_template": "old", "bos_token": "<s>"}).encode(),
        "special_tokens_map.json": b'{"pad_token": {"content": "<pad>"}}',
        "chat_template.jinja": b"new",
        "additional_chat_templates/rag.jinja": b"rag",
        "generation_config.json": b'{"eos_token_id": [2, 5]}',
    }
    companions = Companions(files, {"eos_token_id": 7, "unk_token_id": 0})
    made = metadata_of_companions(companions, rows=1000)
    assert {key: made.metadata[f"{GGML}{key}_token_id"] for key in ("bos", "eos", "eot", "padding", "unknown")} == {
        "bos": 1, "eos": 2, "eot": 5, "padding": 3, "unknown": 0,
    }  # fmt: skip
    assert len(made.metadata[f"{GGML}tokens"]) == 1000
    assert made.metadata["tokenizer.chat_template"] == "new"
    assert made.metadata["tokenizer.chat_template.rag"] == "rag"
    back, notes = companions_of(made.metadata)
    assert notes == ()
    assert json.loads(back.files["generation_config.json"]) == {"eos_token_id": [2, 5]}
    for name, content in back.files.items():
        (tmp_path / name).write_bytes(content)
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.chat_template == "new"
    assert [tokenizer.encode(text) for text in texts()] == ids("trained")["llama"]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.unk_id) == (1, 2, 3, 0)


def test_no_tokenizer_is_no_error_and_a_damaged_one_is():
    assert metadata_of_companions(Companions({"vocab.json": b"{}"}), rows=5) is None
    assert not companions_of({"general.architecture": "llama"})[0]
    assert not companions_of({f"{GGML}model": "none"})[0]
    for content in (b"", b"{", b'{"model": {}}', b'{"model": {"type": "BPE", "vocab": 3}}'):
        with pytest.raises(DataError, match=r"^tokenizer.json .*; it is damaged: copy it again") as caught:
            metadata_of_companions(Companions({"tokenizer.json": content}), rows=5)
        assert "\n" not in str(caught.value)


# -- hostile metadata --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"model": None}, "lacks tokenizer.ggml.model"),
        ({"model": 7}, "tokenizer.ggml.model is 7, but must be text"),
        ({"model": "bert"}, "'bert', WordPiece"),
        ({"model": "rwkv"}, "'rwkv', not one of those read here, which are gpt2, llama, t5"),
        ({"tokens": None}, "lacks tokenizer.ggml.tokens"),
        ({"tokens": "abc"}, "tokenizer.ggml.tokens is 'abc', but must be a list of texts"),
        ({"tokens": []}, "has 701 entries, but must have one for each of the 0 entries|tokens holds no token"),
        ({"tokens": ["a", "b"]}, "token_type has 70. entries, but must have one for each of the 2 entries"),
        ({"tokens": ["x"] * 10_000_000}, "tokens has 10,000,000 entries, and at most 524,287 are read"),
        ({"tokens": ["x" * (1 << 27)]}, "tokens has 134,217,728 characters"),
        ({"token_type": np.ones(3, np.int32)}, "token_type has 3 entries"),
        ({"token_type": "x"}, "token_type is 'x', but must be an array of whole numbers"),
        ({"bos_token_id": 1 << 31}, "bos_token_id is 2147483648, but the file has 70. tokens"),
        ({"bos_token_id": -1}, "bos_token_id is -1, but the file has"),
        ({"eos_token_id": "2"}, "eos_token_id is '2', but must be a whole number"),
        ({"eos_token_id": True}, "eos_token_id is True, but must be a whole number"),
        ({"add_bos_token": 1}, "add_bos_token is 1, but must be true or false"),
        ({"bos_token_id": None, "add_bos_token": True}, "add_bos_token is True, but tokenizer.ggml.bos_token_id"),
        ({"merges": None}, "lacks tokenizer.ggml.merges"),
        ({"merges": ["ab"]}, r"merges\[0\] is 'ab', but must be two tokens"),
        ({"merges": ["a b c"]}, r"merges\[0\] is 'a b c', but must be two tokens"),
        ({"merges": ["a \u0416"]}, r"merges\[0\] is 'a Ж', but 'Ж' is not one of tokenizer.ggml.tokens"),
        ({"merges": [3]}, r"merges\[0\] is 3, but must be text"),
        ({"merges": ["a b"] * ((1 << 22) + 1)}, "merges has 4,194,305 entries"),
        ({"scores": np.full(701, np.nan, np.float32)}, r"scores\[0\] is nan, but must be a finite number"),
        ({"pre": 3}, "pre is 3, but must be text"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, str) else "",
)  # fmt: skip
def test_hostile_metadata_is_an_error_that_names_key_and_rule(changes, rule):
    given = {**metadata("gpt2"), **{GGML + key: value for key, value in changes.items()}}
    begin = time.process_time()
    with pytest.raises(CheckpointError, match=rf"^bad.gguf:? .*({rule}).*; ") as caught:
        tokenizer_of(given, "bad.gguf")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1500
    assert time.process_time() - begin < 5


def test_tokens_that_come_twice_and_kinds_that_are_none_are_refused():
    given = metadata("gpt2")
    tokens = [*given[f"{GGML}tokens"][:-1], given[f"{GGML}tokens"][3]]
    with pytest.raises(CheckpointError, match=r"tokens: the ids 3 and 70\d have the same token"):
        tokenizer_of({**given, f"{GGML}tokens": tokens})
    kinds = given[f"{GGML}token_type"].copy()
    kinds[5] = 9
    with pytest.raises(CheckpointError, match=r"token_type\[5\] is 9, but kinds of tokens are 0 to 6"):
        tokenizer_of({**given, f"{GGML}token_type": kinds})
    with pytest.raises(CheckpointError, match=r"chat_templates\[0\] is 'x', but there is no tokenizer.chat_template.x"):
        tokenizer_of({**given, "tokenizer.chat_templates": ["x"]})


def test_long_pieces_and_missing_bytes_of_sentencepiece_are_refused():
    given = metadata("sentencepiece")
    tokens = list(given[f"{GGML}tokens"])
    tokens[-2] = "x" * 5000
    with pytest.raises(
        CheckpointError, match="of 5,000 characters; the tokens of a llama vocabulary have at most 1,024"
    ):
        tokenizer_of({**given, f"{GGML}tokens": tokens})
    tokens = [f"no {i}" if token == "<0x0A>" else token for i, token in enumerate(given[f"{GGML}tokens"])]
    with pytest.raises(CheckpointError, match="255 of the 256 byte tokens, and lacks <0x0A>"):
        tokenizer_of({**given, f"{GGML}tokens": tokens})


def test_a_charsmap_is_bytes_of_its_form():
    given = metadata("unigram")
    good = np.frombuffer((4).to_bytes(4, "little") + bytes(4) + b"a\0", np.uint8)
    made = tokenizer_of({**given, f"{GGML}precompiled_charsmap": good}).tokenizer
    assert made["normalizer"]["normalizers"][0]["type"] == "Precompiled"
    for bad in (good[:5], np.zeros(9, np.float32), np.frombuffer(b"\xff\xff\xff\xff" + bytes(9), np.uint8)):
        with pytest.raises(CheckpointError, match=r"precompiled_charsmap is .*, but must be"):
            tokenizer_of({**given, f"{GGML}precompiled_charsmap": bad})


def test_mutated_metadata_opens_or_is_an_error():
    rng = random.Random(7)
    values = (None, "", "a", 0, -1, 1 << 40, True, [], ["a"], [1], np.zeros(3), np.zeros((2, 2)), np.zeros(0), b"x", {})
    for name in ("bytes", "gpt2", "sentencepiece", "unigram"):
        given = metadata(name)
        for _ in range(120):
            key = rng.choice([*given, f"{GGML}add_space_prefix", "tokenizer.chat_templates", f"{GGML}scores"])
            value = rng.choice(values)
            if isinstance(given.get(key), list) and rng.random() < 0.7:
                value = list(given[key])
                value[rng.randrange(len(value) or 1) : None] = rng.choice(([], value[:3], ["\u0000", "x y"]))
            try:
                made = tokenizer_of({**given, key: value})
                opened(made.tokenizer, made.settings).encode("a b <s> é")
                message = ""
            except AbiError as error:
                message = str(error)
            assert "\n" not in message
