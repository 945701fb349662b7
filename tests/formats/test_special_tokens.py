"""What begins, ends and pads a text: the files of a folder in the order of transformers."""

import json
from pathlib import Path

import pytest
import tokenizers

from abi_py.data.tokenizer import Tokenizer
from abi_py.errors import DataError
from abi_py.formats.special_tokens import special_token_ids

FOLDERS = json.loads((Path(__file__).parents[1] / "golden/folders.json").read_text(encoding="utf-8"))
END, TURN, BEGIN, CLOSE = FOLDERS["names"]


@pytest.fixture
def folder(tmp_path):
    """Return a function that writes files of JSON beside a tokenizer; None: no such file."""
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    backend.add_special_tokens(FOLDERS["names"])
    backend.save(str(tmp_path / "tokenizer.json"))

    def written(**files):
        for name, content in files.items():
            if content is not None:
                (tmp_path / f"{name}.json").write_text(json.dumps(content))
        return tmp_path

    return written


@pytest.mark.parametrize(("generation", "changes", "wanted"), FOLDERS["stops"], ids=str)
def test_ids_that_end_a_text(folder, generation, changes, wanted):
    found = special_token_ids(folder(generation_config=generation, config=changes), "eos")
    assert found == (None if wanted is None else (wanted,) if isinstance(wanted, int) else tuple(wanted))


def test_config_json_is_asked_where_generation_config_json_says_nothing(folder):
    assert special_token_ids(folder(generation_config={"top_k": 3}, config={"eos_token_id": 7}), "eos") == (7,)


@pytest.mark.parametrize(("config", "names", "wanted"), FOLDERS["tokens"], ids=str)
def test_names_of_a_tokenizer(folder, config, names, wanted):
    tokenizer = Tokenizer.load(folder(tokenizer_config=config, special_tokens_map=names))
    found = {key: getattr(tokenizer, f"{key[:3]}_id") for key in wanted}
    for key, name in wanted.items():
        # Where no file says anything, ours takes a special token of a usual name.
        if name is not None or key in config:
            assert tokenizer.token_of(found[key]) == name if name else found[key] is None, key


def test_a_map_speaks_where_a_config_with_tokens_is_silent(folder):
    config = {"added_tokens_decoder": {}, "bos_token": END}
    names = {"eos_token": TURN, "bos_token": BEGIN}
    tokenizer = Tokenizer.load(folder(tokenizer_config=config, special_tokens_map=names))
    assert [tokenizer.token_of(i) for i in (tokenizer.eos_id, tokenizer.bos_id)] == [TURN, END]


def test_a_tokenizer_without_names_asks_the_models_files_before_it_guesses(folder):
    plain = Tokenizer.load(folder())
    assert plain.token_of(plain.eos_id) == CLOSE
    of = {name: plain.id_of(name) for name in FOLDERS["names"]}
    root = folder(config={"eos_token_id": [of[END], of[TURN]], "bos_token_id": of[TURN], "pad_token_id": -1})
    tokenizer = Tokenizer.load(root)
    assert [tokenizer.token_of(i) for i in (tokenizer.eos_id, tokenizer.bos_id)] == [END, TURN]
    assert tokenizer.pad_id == plain.pad_id
    folder(tokenizer_config={"eos_token": None})
    assert Tokenizer.load(root).eos_id is None  # null says that there is none


def test_what_was_found_is_saved(folder, tmp_path):
    tokenizer = Tokenizer.load(folder(special_tokens_map={"eos_token": {"content": TURN, "lstrip": False}}))
    tokenizer.save(tmp_path / "copy")
    assert Tokenizer.load(tmp_path / "copy").eos_id == tokenizer.id_of(TURN)
    assert not (tmp_path / "copy/special_tokens_map.json").exists()


@pytest.mark.parametrize(
    ("files", "parts"),
    [
        ({"config": {"eos_token_id": "2"}}, r"config\.json: eos_token_id is '2', but must be an id or a list of ids"),
        ({"config": {"eos_token_id": [2, -1]}}, r"eos_token_id is \[2, -1\]"),
        ({"config": {"eos_token_id": [-1] * 1000}}, r"eos_token_id is \[-1, -1, -1, -1, \.\.\.\], but"),
        ({"generation_config": {"eos_token_id": True}}, r"generation_config\.json: eos_token_id is True"),
        ({"config": [1]}, r"config\.json: it is \[1\], but must be an object"),
        (
            {"special_tokens_map": {"eos_token": "<no>"}},
            r"special_tokens_map\.json: eos_token is '<no>', .* vocabulary",
        ),
        ({"special_tokens_map": {"eos_token": [END, TURN]}}, r"special_tokens_map\.json: eos_token is \["),
        ({"tokenizer_config": {"bos_token": {"content": "x"}}}, r"tokenizer_config\.json: bos_token is 'x'"),
    ],
)
def test_nonsense_is_named(folder, files, parts):
    with pytest.raises(DataError, match=parts):
        Tokenizer.load(folder(**files))


def test_a_git_lfs_pointer_is_called_so(folder):
    root = folder()
    (root / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(DataError, match=r"tokenizer\.json is a git-lfs pointer"):
        Tokenizer.load(root)
