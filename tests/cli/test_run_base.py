"""`run --base`: a model of the world is trained further, and stays what it was: shape, tokenizer, template, ends."""

import json
import shutil

import numpy as np
import pytest
import yaml
from world import make_folder, make_tokenizer, write_talks

from abi_py.data import TokenizedDataset, Tokenizer
from abi_py.formats.companions import Companions
from abi_py.formats.safetensors import read_safetensors, write_safetensors
from abi_py.runs.base import digest_of
from abi_py.training.checkpoint import verify
from abi_py.training.finding import find_place

SETTINGS = {"data": "talks.jsonl", "batch-size": 4, "epochs": 2, "learning-rate": 2e-3, "sample-tokens": 0}
RUN = [word for name, value in SETTINGS.items() for word in (f"--{name}", str(value))]


@pytest.fixture
def base(abi_train, tmp_path):
    """Write a folder and conversations; return the folder."""
    write_talks(tmp_path / "talks.jsonl")
    return make_folder(tmp_path / "base")


def run(abi_train, *words):
    code, out, err = abi_train("run", *RUN, *words)
    assert (code, err) == (0, ""), err
    return out


def last(directory):
    return directory / "checkpoints" / (directory / "checkpoints" / "latest").read_text().strip()


def test_a_folder_is_trained_further_and_stays_what_it_was(abi_train, base, tmp_path):
    out = run(abi_train, "--base", base, "--out", "r")
    told = [float(line.split("validation loss ")[1].split(",")[0]) for line in out.splitlines() if "step " in line[:5]
            and "validation loss" in line]  # fmt: skip
    assert "step 0: validation loss" in out
    assert told == sorted(told, reverse=True)
    assert told[-1] < told[0] - 0.1
    assert f"base     {base}, digest {digest_of(base)[:12]}; all of its weights are trained, learning rate 0.002" in out
    report = json.loads((tmp_path / "r/report.json").read_text())
    assert report["initial_val_loss"] == pytest.approx(told[0], abs=1e-4)

    config = yaml.safe_load((tmp_path / "r/config.yaml").read_text())
    assert config["base"] == {"path": str(base), "digest": digest_of(base), "which": None}
    checkpoint = last(tmp_path / "r")
    verify(checkpoint)
    ours, theirs = Companions.of(checkpoint), Companions.of(base)
    assert ours.files == theirs.files
    assert len(ours.files) == 5
    assert ours.ids == theirs.ids == {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
    before, after = read_safetensors(base / "model.safetensors"), read_safetensors(checkpoint / "model.safetensors")
    assert {name: w.shape for name, w in before.items()} == {name: w.shape for name, w in after.items()}
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == set(before) - {name for name in before if name.endswith("k_proj.bias")} | (
        changed & {name for name in before if name.endswith("k_proj.bias")}  # softmax is blind to a bias of all keys
    )


def test_the_weights_before_the_first_step_are_the_base_s(abi_train, base, tmp_path):
    run(abi_train, "--base", base, "--out", "r", "--max-steps", "1", "--max-checkpoints", "0")
    stored = read_safetensors(tmp_path / "r/checkpoints/llm_step_0/model.safetensors")
    for name, weight in read_safetensors(base / "model.safetensors").items():
        assert np.array_equal(stored[name], weight), name


def test_a_stopped_run_goes_on_to_the_same_bits_without_its_base(abi_train, base, tmp_path):
    schedule = ["--decay-steps", "18", "--warmup-steps", "1"]
    run(abi_train, "--base", base, *schedule, "--out", "whole")
    run(abi_train, "--base", base, *schedule, "--max-steps", "7", "--out", "part")
    shutil.rmtree(base)
    code, _, err = abi_train("resume", "part", "--max-steps", "0")
    assert (code, err) == (0, ""), err
    for name in ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "added_tokens.json"):
        assert (last(tmp_path / "whole") / name).read_bytes() == (last(tmp_path / "part") / name).read_bytes(), name
    code, _, err = abi_train("resume", "part", "--base", "base")
    assert code == 2
    assert "base (base) has no effect on a run that goes on" in err
    assert "digest (12345678) has no effect on" in abi_train("resume", "part", "--base-digest", "12345678")[2]


def test_a_run_that_never_saved_begins_again_from_the_same_base_or_not_at_all(abi_train, base, tmp_path):
    run(abi_train, "--base", base, "--out", "r")
    shutil.rmtree(tmp_path / "r/checkpoints")
    (tmp_path / "r/metrics.jsonl").unlink()
    assert abi_train("resume", "r")[0] == 0
    shutil.rmtree(tmp_path / "r/checkpoints")
    (tmp_path / "r/metrics.jsonl").unlink()
    weights = {name: w + 1 for name, w in read_safetensors(base / "model.safetensors").items()}
    write_safetensors(base / "model.safetensors", weights)
    code, _, err = abi_train("resume", "r")
    assert code == 2
    assert "these are other weights" in err


def test_a_run_and_a_checkpoint_are_bases_too(abi_train, base, tmp_path):
    run(abi_train, "--base", base, "--out", "first")
    for where in ("first", last(tmp_path / "first")):
        out = run(abi_train, "--base", where, "--out", f"then{len(str(where))}", "--max-steps", "1")
        assert "step 0: validation loss" in out
    checkpoint = tmp_path / "then5/checkpoints/llm_step_0"
    stored = read_safetensors(checkpoint / "model.safetensors")
    for name, weight in read_safetensors(last(tmp_path / "first") / "model.safetensors").items():
        assert np.array_equal(stored[name], weight), name
    assert Companions.of(checkpoint).files == Companions.of(base).files


def test_another_template_takes_the_place_of_the_base_s(abi_train, base, tmp_path):
    template = "{% for turn in messages %}<|im_start|>{{ turn['content'] }}<|im_end|>{% endfor %}"
    (tmp_path / "own.jinja").write_text(template)
    settings = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": "{{ messages }}"}))
    (base / "chat_template.json").write_text("{}")
    run(abi_train, "--base", base, "--out", "r", "--template", "own.jinja", "--max-steps", "1")
    kept = Tokenizer.load(last(tmp_path / "r"))
    assert kept.chat_template == Tokenizer.load(tmp_path / "r").chat_template != Tokenizer.load(base).chat_template
    assert kept.hash == Tokenizer.load(base).hash
    assert (last(tmp_path / "r") / "chat_template.jinja").read_text() == template
    assert "chat_template" not in json.loads((last(tmp_path / "r") / "tokenizer_config.json").read_text())
    stays = {"tokenizer.json", "added_tokens.json", "generation_config.json"}
    before, after = Companions.of(base).files, Companions.of(last(tmp_path / "r")).files
    assert {name for name in before if before[name] == after.get(name)} == stays
    assert after.keys() == before.keys() - {"chat_template.json"}


def test_what_is_no_property_of_the_weights_may_be_chosen(abi_train, base, tmp_path):
    make_folder(tmp_path / "experts", family="mixtral")
    chosen = {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.25}
    words = [word for name, value in chosen.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    run(abi_train, "--base", "experts", "--out", "r", "--max-steps", "1", *words)
    config = yaml.safe_load((tmp_path / "r/config.yaml").read_text())["model"]
    assert {name: config[name] for name in chosen} == chosen


def test_a_text_ends_where_the_answers_ended_that_were_trained(abi_train, base, tmp_path):
    """The base's ends, and those of the template that the run was given; other settings stay."""
    ends = {"eos_token_id": 0, "pad_token_id": 0, "temperature": 0.7}
    (base / "generation_config.json").write_text(json.dumps(ends))
    run(abi_train, "--base", base, "--out", "r", "--template", "chatml", "--max-steps", "1")
    end = make_tokenizer().id_of("<|im_end|>")
    written = json.loads((last(tmp_path / "r") / "generation_config.json").read_text())
    assert written == {**ends, "eos_token_id": [0, end]}


def test_texts_are_read_by_the_base_s_tokenizer_and_token_files_of_another_are_refused(abi_train, base, tmp_path):
    (tmp_path / "texts.txt").write_text("What is 3 plus 4? It is 7. " * 200)
    words = ["--data", "texts.txt", "--sample-tokens", "4", "--max-steps", "2", "--valid-fraction", "0.2"]
    code, out, err = abi_train("run", "--base", base, "--out", "r", *words)
    assert (code, err) == (0, ""), err
    assert f"ids of   {base}/tokenizer.json" in out
    assert abi_train("tokenize", "texts.txt", "--tokenizer", base, "-o", "own.bin")[0] == 0
    assert abi_train("tokenize", "texts.txt", "-o", "bytes.bin")[0] == 0
    words[1] = "own.bin"
    assert abi_train("run", "--base", base, "--out", "r2", *words)[0] == 0
    words[1] = "bytes.bin"
    code, _, err = abi_train("run", "--base", base, "--out", "r3", *words)
    assert code == 1
    assert "bytes.bin was made as bytes" in err
    assert not (tmp_path / "r3").exists()


def test_a_byte_level_base_reads_bytes(abi_train, tmp_path):
    make_folder(tmp_path / "bytes", tokenizer=False, vocab_size=257)
    code, out, err = abi_train("run", "--base", "bytes", "--corpus-bytes", "3000", "--epochs", "1", "--out", "r")
    assert (code, err) == (0, ""), err
    assert "sample" in out
    assert not (tmp_path / "r/tokenizer.json").exists()


def test_a_run_is_not_hidden_by_a_model_in_its_directory(abi_train, base, tmp_path):
    """It is not written into a model's folder, its base's included; a config.json that comes later hides nothing."""
    for name in ("bytes", "other bytes"):
        make_folder(tmp_path / name, tokenizer=False, vocab_size=257)
        code, _, err = abi_train("run", "--base", "bytes", "--corpus-bytes", "9000", "--out", name)
        assert code == 2
        assert f"out ({name}) must not be the folder of a model: its config.json would hide" in err
    make_folder(tmp_path / "other")
    run(abi_train, "--base", "other", "--out", "r", "--max-steps", "1")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tmp_path / "other" / name, tmp_path / "r")
    assert find_place(tmp_path / "r").folder == tmp_path / "r/model"
    assert find_place(tmp_path / "r", "last").folder == last(tmp_path / "r")
    code, _, err = abi_train("export", "r", "-o", "model")
    assert (code, err) == (0, ""), err
    places = (last(tmp_path / "r"), tmp_path / "model")
    trained, after = (read_safetensors(place / "model.safetensors") for place in places)
    assert all(np.array_equal(trained[name], after[name]) for name in trained)
    (tmp_path / "other/config.yaml").write_text("axolotl: true\n")  # of another program: no run
    assert find_place(tmp_path / "other").folder == tmp_path / "other"


def test_the_plan_is_that_of_the_base(abi_train, base, tmp_path):
    code, out, err = abi_train("run", "--data", "talks.jsonl", "--base", base, "--dry-run")
    assert (code, err) == (0, ""), err
    assert "width 16, 2 heads (1 for keys)" in out
    assert "learning rate 2e-05" in out
    assert "warmup_cosine: 2e-05" in out
    assert "│ epochs       │ 3 " in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "talks.jsonl"]


def test_the_config_of_a_run_begins_another_from_the_same_base(abi_train, base, tmp_path):
    run(abi_train, "--base", base, "--out", "r")
    code, _, err = abi_train("run", "--config", "r/config.yaml", "--out", "again")
    assert (code, err) == (0, ""), err
    name = "checkpoints/llm_step_18/model.safetensors"
    assert (tmp_path / "r" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    other = make_folder(tmp_path / "other")
    (other / "config.json").write_text((other / "config.json").read_text() + "\n")
    words = ["--base", other, "--config", "r/config.yaml", "--max-steps", "1", "--out", "third"]
    code, _, err = abi_train("run", *words)  # the digest in the file is not of this base
    assert (code, err) == (0, ""), err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--base", "nowhere"], "base (nowhere) does not exist; give the folder of a model"),
        (["--base", "talks.jsonl"], "base (talks.jsonl) is a file; give the folder of a model"),
        (["--base", "empty"], "base (empty) holds no model: neither config.json and weights nor a checkpoint"),
        (["--base", "adapter"], "base (adapter) holds adapters, not a whole model; merge them first: abi-train merge"),
        (["--base", ""], "'' is no path; give the name of a file or directory"),
        (["--base", "base", "--hidden-dim", "32"], "hidden_dim (32) of the model contradicts base ("),
        (["--base", "base", "--family", "llama"], "whose family is qwen2; leave family out"),
        (["--base", "base", "--no-tie-embeddings"], "tie_embeddings (False) of the model contradicts base ("),
        (["--base", "base", "--model-seed", "0"], "seed (0) of the model has no effect with base ("),
        (["--base", "base", "--max-seq-len", "97"], "must not exceed the model's (96); that is the context of base"),
        (["--base", "base", "--base-digest", "12345678"], "12345678 is asked for: these are other weights"),
        (["--base", "base", "--base-digest", "xyz"], "digest (xyz) must be 8 to 64 hexadecimal digits"),
        (["--base-digest", "12345678"], "digest (12345678) acts only with path (--base)"),
        (["--base", "base", "--tokenizer", "other"], "other) is another one (hash "),
        (["--base", "base", "--train-tokenizer", "300"], "knows the ids of its tokenizer; leave it out"),
        (["--base", "deaf", "--train-tokenizer", "300"], "knows ids it was given; leave it out"),
        (["--base", "bytes"], "reads text as bytes and has no chat template, without which there are no conversations"),
        (["--base", "wide"], "ids, its model 260; the two do not belong together"),
        (["--base", "deaf"], "talks.jsonl: base ("),
        (["--base", "torn"], "torn has neither model.safetensors nor model.safetensors.index.json"),
        (["--base", "torn", "--dry-run"], "torn has neither model.safetensors nor model.safetensors.index.json"),
        (["--base", "base", "--valid-fraction", "0", "--early-stopping"], "valid_fraction (0) must be above 0"),
    ],
)
def test_what_does_not_go_with_a_base_is_said_before_anything_is_written(abi_train, base, tmp_path, words, said):
    (tmp_path / "empty").mkdir()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    make_folder(tmp_path / "deaf", tokenizer=False)
    shutil.copytree(base, tmp_path / "torn")
    (tmp_path / "torn/model.safetensors").unlink()
    if "wide" in words:
        make_folder(tmp_path / "wide", vocab_size=260)
    if "bytes" in words:
        make_folder(tmp_path / "bytes", tokenizer=False, vocab_size=257)
    other = make_tokenizer()
    other.backend.add_tokens(["<more>"])
    Tokenizer(other.backend).save(tmp_path / "other")
    before = sorted(path.name for path in tmp_path.iterdir())
    code, out, err = abi_train("run", "--data", "talks.jsonl", *words, "--out", "r")
    assert (code, out) == (1 if "torn" in words else 2, ""), err
    assert said in err
    assert err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_base_that_reads_no_bytes_wants_data(abi_train, base):
    code, _, err = abi_train("run", "--base", base)
    assert code == 2
    assert "data must be given with base" in err


def test_token_files_without_a_sidecar_are_held_against_the_vocabulary(abi_train, base, tmp_path):
    TokenizedDataset.from_slice(np.arange(400) % 310).tokens.astype("<u4").tofile(tmp_path / "raw.bin")
    code, _, err = abi_train("run", "--base", base, "--data", "raw.bin", "--out", "r")
    assert code == 1
    assert "raw.bin" in err
