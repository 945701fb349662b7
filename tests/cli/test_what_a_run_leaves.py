"""What a run leaves, and which weights a path to a run means; what transformers makes of it is in tests/oracle."""

import errno
import json
import shutil

import numpy as np
import pytest
import yaml
from world import TEMPLATE, make_folder, make_tokenizer, write_state, write_talks

from abi_py.data import Tokenizer
from abi_py.formats.companions import Companions
from abi_py.formats.safetensors import map_safetensors
from abi_py.model import folder_writing
from abi_py.runs.companions import with_bytes
from abi_py.training.finding import find_place
from abi_py.training.loading import load_model

WHOLE = {"README.md", "config.json", "generation_config.json", "model.safetensors", "origin.json"}
WHOLE |= {"tokenizer.json", "tokenizer_config.json"}


def read(path):
    """Return a file of JSON."""
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture
def run(abi_train, tiny, tmp_path):
    """Train four steps on bytes, evaluated after every second; return the run's directory."""
    code, _, err = abi_train("run", *tiny, "--max-steps", 4, "--eval-interval", 2, "--checkpoint-interval", 2,
                             "--out", "r")  # fmt: skip
    assert code == 0, err
    return tmp_path / "r"


def test_a_run_on_bytes_leaves_a_whole_folder(abi_train, run, tmp_path):
    folder = run / "model"
    assert {path.name for path in folder.iterdir()} == WHOLE
    newest = run / "checkpoints/llm_step_4"
    assert {path.name for path in newest.iterdir()} >= WHOLE - {"origin.json"}
    for place in (folder, newest):
        assert read(place / "config.json")["eos_token_id"] == 256
        assert read(place / "generation_config.json")["eos_token_id"] == 256
        settings = read(place / "generation_config.json")
        assert (settings["max_length"], settings.get("max_new_tokens")) == (16, None)  # the context
        head = (place / "README.md").read_text(encoding="utf-8").split("---\n")[1]
        assert yaml.safe_load(head) == {
            "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["abi_py", "llama"],
        }  # fmt: skip
        assert str(tmp_path) not in (place / "README.md").read_text(encoding="utf-8")
    assert read(folder / "origin.json")["step"] == 4
    code, out, err = abi_train("generate", run, "--prompt", "The ", "--json", "--temperature", 0)
    assert code == 0
    assert err.startswith("model: step 4, the last and the best by validation loss: ")
    assert json.loads(out)["model"] == {"folder": str(folder), "step": 4, "steps": 4, "is_best": True}
    assert json.loads(out)["new_tokens"] == 12  # what the context allows beyond the prompt
    _, of_model, _ = abi_train("generate", folder, "--prompt", "The ", "--json", "--temperature", 0)
    _, of_checkpoint, said = abi_train("generate", newest, "--prompt", "The ", "--json", "--temperature", 0)
    assert json.loads(out)["ids"] == json.loads(of_model)["ids"] == json.loads(of_checkpoint)["ids"]
    assert said.startswith(f"model: step 4: {newest}")
    code, out, err = abi_train("generate", run, "--prompt", "The cat sat there.")
    assert (code, out) == (0, "\n")
    assert "note: a prompt of 18 tokens leaves no room for another one; --max-new-tokens writes on" in err


def test_damaged_files_of_a_run_are_told(abi_train, run):
    """As the fuzzer found them: each ended in a traceback."""
    origin = run / "model/origin.json"
    origin.write_text(json.dumps({"step": 4, "is_best": True, "order": read(origin)["order"]}))  # the rest may be null
    code, out, err = abi_train("generate", run, "--prompt", "The ", "--json", "--max-new-tokens", 1)
    assert code == 0, err
    assert json.loads(out)["model"]["steps"] is None

    (run / "model/README.md").write_bytes(b"\xff")
    code, _, err = abi_train("export", run, "--out", "hf")
    assert (code, "README.md must be UTF-8, but byte 0 is not" in err) == (1, True), err

    shutil.rmtree(run / "checkpoints")
    with open(run / "metrics.jsonl", "ab") as metrics:
        metrics.write(b"\xff")
    code, _, err = abi_train("resume", run)
    assert (code, "holds no checkpoint, though the run in" in err) == (1, True), err


def test_a_long_context_keeps_the_usual_number_of_new_tokens():
    settings = [json.loads(with_bytes(Companions(), context).files["generation_config.json"]) for context in (511, 512)]
    assert [(each.get("max_new_tokens"), each.get("max_length")) for each in settings] == [(None, 511), (256, None)]


def test_the_best_is_left_and_a_finished_run_without_its_model_makes_it(abi_train, run, tmp_path):
    """As after a kill between report and model: resume writes it, of the best checkpoint."""
    write_state(run / "checkpoints/llm_step_4", best_step=2)
    shutil.rmtree(run / "model")
    assert find_place(run).folder == run / "checkpoints/llm_step_4"
    code, out, err = abi_train("resume", run)
    assert (code, err) == (0, ""), err
    assert f"model    {run}/model: step 2 of 4, the best by validation loss\n" in out
    assert (run / "checkpoints/llm_step_4/state.json").is_file()  # nothing was trained
    best = map_safetensors(run / "checkpoints/llm_step_2/model.safetensors")
    assert all(np.array_equal(best[name].raw, value.raw) for name, value in
               map_safetensors(run / "model/model.safetensors").items())  # fmt: skip
    assert find_place(run).folder == run / "model"
    assert find_place(run, "last").folder == run / "checkpoints/llm_step_4"
    assert "nothing is left to do" in abi_train("resume", run)[1]
    _, out, err = abi_train("eval", run, "r/config.yaml", "--last", "--json")
    assert json.loads(out)["model"]["step"] == 4
    assert err.startswith("model: step 4, the last: ")


def test_a_newer_checkpoint_beats_the_model_until_the_run_ends(abi_train, run, tmp_path):
    shutil.copytree(run / "model", tmp_path / "before")
    code, _, err = abi_train("resume", run, "--max-steps", 6)
    assert code == 0, err
    assert read(run / "model/origin.json")["steps"] == 6
    shutil.rmtree(run / "model")
    shutil.copytree(tmp_path / "before", run / "model")  # as if it had been stopped there
    place = find_place(run)
    assert (place.folder.name, place.origin.step) == ("llm_step_6", 6)
    with open(place.folder / "model.safetensors", "ab") as file:
        file.write(b"more")
    place = find_place(run)
    assert place.folder.name == "llm_step_4" or place.folder == run / "model"
    assert "damaged" in place.skipped[0]
    shutil.rmtree(run / "checkpoints")  # who keeps the model alone
    assert find_place(run).folder == run / "model"
    assert abi_train("generate", run, "--prompt", "a", "--max-new-tokens", 2)[0] == 0
    assert abi_train("inspect", run)[0] == 0


def test_a_full_disk_costs_the_model_alone(abi_train, tiny, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(folder_writing, "write_synced", full)
        code, out, err = abi_train("run", *tiny, "--max-steps", 2, "--out", "r")
    assert code == 1
    assert "saved    r/checkpoints/llm_step_2" in out
    assert err.count("\n") == 1
    assert "r/model was not written: " in err
    assert "the checkpoints are safe" in err
    assert "abi-train export r --best -o FOLDER" in err
    assert sorted(path.name for path in tmp_path.joinpath("r").iterdir() if path.name.startswith(".")) == []
    assert abi_train("generate", "r", "--prompt", "a", "--max-new-tokens", 2)[0] == 0
    assert "model    r/model: step 2" in abi_train("resume", "r")[1]


def test_ids_without_a_text_have_no_tokenizer_and_that_is_said(abi_train, shape, tmp_path):
    np.arange(3000, dtype=np.uint32).__mod__(50).tofile(tmp_path / "ids.bin")
    code, out, err = abi_train("run", "--data", "ids.bin", *shape, "--max-steps", 2, "--out", "r")
    assert (code, err) == (0, ""), err
    assert "note     it has no tokenizer" in out
    assert not (tmp_path / "r/model/tokenizer.json").exists()
    assert "has no tokenizer" in (tmp_path / "r/model/README.md").read_text(encoding="utf-8")


def test_conversations_end_where_their_template_ends_an_answer(abi_train, shape, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save(tmp_path / "tok")
    write_talks(tmp_path / "talks.jsonl")
    words = ["--data", "talks.jsonl", "--tokenizer", "tok", "--max-steps", 2, "--model-max-seq-len", 96]
    code, _, err = abi_train("run", *shape, *words, "--max-seq-len", 96, "--out", "r")
    assert code == 0, err
    for place in (tmp_path / "r/model", tmp_path / "r/checkpoints/llm_step_2"):
        kept = Tokenizer.load(place)
        assert kept.chat_template == TEMPLATE
        ends = read(place / "generation_config.json")["eos_token_id"]
        assert kept.id_of("<|im_end|>") in (ends if isinstance(ends, list) else [ends])
        assert read(place / "config.json")["eos_token_id"] == kept.eos_id
        assert "conversational" in (place / "README.md").read_text(encoding="utf-8")
    assert abi_train("chat", "r", "--once", "What is 1 plus 1?", "--max-new-tokens", 4)[0] == 0


def test_another_template_of_chat_brings_its_own_ends(abi_train, tmp_path, monkeypatch):
    from abi_py.cli import chat

    make_folder(tmp_path / "base")
    (tmp_path / "own.jinja").write_text(TEMPLATE.replace("im_end", "endoftext"), encoding="utf-8")
    seen = []
    monkeypatch.setattr(chat.Chat, "answer", lambda self, question: seen.append((self.settings, self.eos_ids)))
    for words in ([], ["--template", "own.jinja"], ["--template", "own.jinja", "--stop-ids", "3"]):
        assert abi_train("chat", "base", "--once", "a", *words)[0] == 0
    (own, _), (other, ends), (given, _) = seen
    assert own.stop_ids == (2, 0)
    assert other.stop_ids is None  # so each answer ends at those of the template ...
    assert set(ends) == {0, 2}  # ... and where the model's files say
    assert given.stop_ids == (3,)


def test_the_form_and_the_type_of_what_is_left(abi_train, tiny, tmp_path):
    assert abi_train("run", *tiny, "--max-steps", 1, "--dtype", "bfloat16", "--which", "last", "--out", "a")[0] == 0
    assert read(tmp_path / "a/model/config.json")["dtype"] == "bfloat16"
    assert load_model(tmp_path / "a").directory == tmp_path / "a/model"
    assert load_model(tmp_path / "a", "last").directory == tmp_path / "a/checkpoints/llm_step_1"
    assert abi_train("run", *tiny, "--max-steps", 1, "--format", "zig", "--out", "b")[0] == 0
    content = read(tmp_path / "b/model/config.json")
    assert (content["model_type"], content["eos_token_id"]) == ("deepzig_conversational", 256)
    weights = [load_model(tmp_path / "b", which).model.collect_weights() for which in (None, "last")]
    assert np.array_equal(*weights)
    code, out, err = abi_train("inspect", "a", "--last", "--json")
    assert (code, json.loads(out)["path"]) == (0, "a/checkpoints/llm_step_1")
    assert err.startswith("model: step 1, the last and the best by validation loss: a/checkpoints/llm_step_1")
    assert "abi-train generate a/checkpoints/llm_step_1 --prompt TEXT" in json.loads(out)["uses"]  # bytes need no ids
    for run, form in (("a", "hf"), ("b", "zig")):  # a form is the same thing in both verbs, by both spellings
        words = ["--dtype", "bfloat16"] if form == "hf" else []
        for flag in ("--format", "--to"):
            assert abi_train("export", run, flag, form, *words, "-o", run + flag)[0] == 0
            for file in ("config.json", "model.safetensors"):
                assert (tmp_path / f"{run}{flag}" / file).read_bytes() == (tmp_path / run / "model" / file).read_bytes()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--format", "zig", "--family", "qwen2"], "format (zig) holds plain Llama models alone"),
        (["--format", "zig", "--dtype", "bfloat16"], "dtype (bfloat16) acts only with format hf"),
        (["--which", "best", "--valid-fraction", "0"], "which (best) must come with evaluations"),
        (["--base-which", "best"], "which (best) acts only with path (--base)"),
    ],
)
def test_what_cannot_be_left_is_said_before_training(abi_train, tiny, tmp_path, words, said):
    code, _, err = abi_train("run", *tiny, *words, "--out", "r")
    assert code == 2
    assert said in err
    assert not (tmp_path / "r").exists()


def test_a_run_goes_on_from_what_another_left(abi_train, run, tiny, tmp_path):
    words = ["--corpus-bytes", 3000, "--max-steps", 1, "--sample-tokens", 0]
    own = {**read(run / "model/generation_config.json"), "temperature": 0.31, "repetition_penalty": 1.07}
    (run / "model/generation_config.json").write_text(json.dumps(own), encoding="utf-8")
    code, out, err = abi_train("run", "--base", run, *words, "--out", "s")
    assert (code, err) == (0, ""), err
    assert "from     step 4, the last and the best by validation loss: " in out
    assert read(tmp_path / "s/model/generation_config.json") == own  # how it writes is the base's
    code, out, err = abi_train("run", "--base", run, "--base-which", "last", *words, "--out", "t")
    assert (code, err) == (0, ""), err
    assert f"from     step 4, the last and the best by validation loss: {run}/checkpoints/llm_step_4" in out
    code, _, err = abi_train("run", *tiny, "--out", run / "model")
    assert code == 2
    assert "must not hold tokenizer.json yet" in err


def test_the_best_moves_with_the_checkpoints(abi_train, tiny, tmp_path):
    """What is saved elsewhere from now on is whole there: the best of before is among it, and the old place may go."""
    assert abi_train("run", *tiny, "--max-steps", 2, "--eval-interval", 1, "--out", "r")[0] == 0
    write_state(tmp_path / "r/checkpoints/llm_step_2", best_step=1, best_val_loss=0.0, best_metric=0.0)
    code, out, err = abi_train("resume", "r", "--max-steps", 4, "--checkpoint-path", "other")
    assert (code, err) == (0, ""), err
    assert "model    r/model: step 1 of 4, the best by validation loss" in out
    assert {path.name for path in (tmp_path / "other").glob("llm_step_*")} == {"llm_step_1", "llm_step_4"}
    shutil.rmtree(tmp_path / "r/checkpoints")
    assert find_place(tmp_path / "r", "best").folder == tmp_path / "other/llm_step_1"
    # Who removes the best is warned, and gets the last; who asks for the best is told the way.
    shutil.rmtree(tmp_path / "r/model")
    shutil.rmtree(tmp_path / "other/llm_step_1")
    code, _, err = abi_train("resume", "r", "--max-steps", 5, "--which", "best")
    assert code == 1
    assert "is not there any more; take --last, or abi-train resume r --which last" in err
    code, out, err = abi_train("resume", "r", "--max-steps", 6)
    assert code == 1  # it is the run's choice now
    code, out, err = abi_train("resume", "r", "--which", "last")
    assert (code, err) == (0, ""), err
    assert "llm_step_1, the best checkpoint, is not beside llm_step_6 any more" in out
    assert "model    r/model: step 6, the last" in out


def test_what_is_left_of_a_finished_run_changes_without_training(abi_train, run):
    """The words of RUN/model act on a run that is done; the others still say that they do nothing."""
    for words, dtype in ((["--dtype", "bfloat16"], "bfloat16"), (["--dtype", "float32", "--which", "last"], "float32")):
        code, out, err = abi_train("resume", run, *words)
        assert (code, err) == (0, ""), err
        assert f"model    {run}/model: step 4, the last" in out
        assert read(run / "model/config.json")["dtype"] == dtype
    assert abi_train("resume", run, "--format", "zig")[0] == 0
    assert read(run / "model/config.json")["model_type"] == "deepzig_conversational"
    code, _, err = abi_train("resume", run, "--which", "last", "--log-interval", 2)
    assert code == 2
    assert "log_interval: without effect, because max_steps (4) is reached" in err


def test_settings_for_other_tools_name_no_path_of_the_machine(abi_train, tiny, tmp_path):
    assert abi_train("run", *tiny, "--max-steps", 1, "--trainer-files", "--out", tmp_path / "r")[0] == 0
    assert read(tmp_path / "r/model/training_args.json")["output_dir"] == "r"


def test_samples_that_a_resumed_run_cannot_show_are_refused(abi_train, tiny):
    assert abi_train("run", *tiny, "--max-steps", 2, "--valid-fraction", 0, "--out", "r")[0] == 0
    code, _, err = abi_train("resume", "r", "--max-steps", 4, "--sample-prompt", "foo")
    assert code == 2
    assert "sample_prompts must come with evaluations" in err


def test_a_choice_where_there_is_none(abi_train, run):
    for words in (["generate", run / "model", "--best"], ["eval", run / "checkpoints/llm_step_4", "x", "--last"]):
        assert abi_train(*words)[0] == 2
    write_state(run / "checkpoints/llm_step_4", best_step=-1)
    code, _, err = abi_train("generate", run, "--best", "--prompt", "a")
    assert code == 2
    assert "was never evaluated" in err
