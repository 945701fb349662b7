"""The model card in each folder that a model is written into, and the weights that the last sample is of."""

import json
import shutil

import numpy as np
from world import write_state

from abi_py.choices import ExportFormat
from abi_py.cli import training
from abi_py.data.holdout import PARTS
from abi_py.formats.companions import Companions
from abi_py.runs.model_card import card_of_another_form
from abi_py.training.loading import load_model

AUTO, ZIG, GOES_ON = "AutoModelForCausalLM", "`model_type` in `config.json` is changed", "may still go on"


def card(folder):
    """Return the model card of a folder."""
    return (folder / "README.md").read_text(encoding="utf-8")


def flat(text):
    """Return a text without its line breaks."""
    return " ".join(text.split())


def test_a_card_fits_the_form_of_its_folder(abi_train, tiny, tmp_path):
    often = ["--max-steps", 4, "--eval-interval", 2, "--checkpoint-interval", 2]
    for form in ("hf", "zig"):
        code, _, err = abi_train("run", *tiny, *often, "--format", form, "--out", form)
        assert code == 0, err
        run = tmp_path / form
        assert (AUTO in card(run / "model"), ZIG in flat(card(run / "model"))) == (form == "hf", form == "zig")
        for step in (2, 4):  # checkpoints are of Hugging Face's kind in any run
            text = flat(card(run / f"checkpoints/llm_step_{step}"))
            assert (AUTO in text, ZIG in text, GOES_ON in text) == (True, False, True)
        for into in ("hf", "zig"):
            for words, name in (([], "model"), (["--last"], "checkpoint")):
                out = tmp_path / f"{form}-{into}-{name}"
                assert abi_train("export", form, "--format", into, *words, "-o", out)[0] == 0
                text = card(out)
                assert (AUTO in text, ZIG in flat(text), GOES_ON in flat(text)) == (into == "hf", into == "zig", False)
                assert f"library_name: {'transformers' if into == 'hf' else 'abi_py'}\n" in text
                assert "These weights are those of step 4, the last" in text
        assert card(tmp_path / f"{form}-{form}-model") == card(run / "model")


def test_another_card_stays_as_it_is():
    text = "# Mine\n\nA word.\n\n## Use\n\nAs you like.\n"
    assert card_of_another_form(text, Companions(), ExportFormat.ZIG, None) == text


def test_merged_adapters_have_the_card_of_the_model_of_their_run(abi_train, tiny, tmp_path):
    assert abi_train("run", *tiny, "--max-steps", 8, "--out", "named")[0] == 0
    words = ["--lora-rank", 2, "--learning-rate", "0.01"]
    for base, out in (("named/model", "of-model"), ("named/checkpoints/llm_step_8", "of-step"), ("named", "first-l")):
        code, _, err = abi_train("run", *tiny, "--max-steps", 2, *words, "--base", base, "--out", out)
        assert code == 0, err
        assert "Training went on from `named`" in flat(card(tmp_path / out / "model"))
    for verb, path, out in (("merge", "first-l", "a"), ("export", "first-l/adapter", "b"), ("export", "first-l", "c")):
        code, _, err = abi_train(verb, path, "-o", out)
        assert code == 0, err
        assert card(tmp_path / out) == card(tmp_path / "first-l/model")


def test_the_sample_is_of_the_model_that_is_left(abi_train, tiny, tmp_path, monkeypatch):
    """The best is step 2, as the state says; what is sampled after the text run is that and not the last step."""
    code, _, err = abi_train("run", *tiny, "--max-steps", 4, "--eval-interval", 2, "--checkpoint-interval", 2,
                             "--out", "r")  # fmt: skip
    assert code == 0, err
    write_state(tmp_path / "r/checkpoints/llm_step_4", best_step=2)
    shutil.rmtree(tmp_path / "r/model")
    sampled = []
    monkeypatch.setattr(training, "show_sample", lambda model, *rest: sampled.append(model.collect_weights().copy()))
    code, out, err = abi_train("resume", "r")
    assert (code, err) == (0, "")
    assert "r/model: step 2 of 4, the best" in out
    assert np.array_equal(sampled[0], load_model(tmp_path / "r/model").model.collect_weights())
    assert not np.array_equal(sampled[0], load_model(tmp_path / "r", "last").model.collect_weights())


def test_the_card_names_each_part_of_what_is_kept(abi_train, tmp_path):
    words = "--max-steps 2 --batch-size 4 --num-threads 1 --eval-interval 2".split()  # noqa: SIM905
    code, out, err = abi_train("deepzig", *words, "--sample-tokens", 0, "--out", "d")
    assert code == 0, err
    figures, text = json.loads((tmp_path / "d/evaluation.json").read_text()), card(tmp_path / "d/model")
    assert figures.keys() == {"told", "new"}
    for name, title in PARTS.items():
        figure = figures[name]
        assert f"| {title}: conversations | {figure['conversations']} |" in text
        assert f"| {title}: loss, perplexity | {figure['loss']:.4f}, {figure['perplexity']:.2f} |" in text
    assert f"| best validation loss, perplexity ({PARTS['told']}) | " in text
    kept = sum(figure["conversations"] for figure in figures.values())
    assert f"{kept} more were kept for validation" in flat(text)
    assert f"; {kept} more for validation" in out
