"""Chains of runs: recipes that are read strictly, plans, what is done and left, and what is refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import PATIENCE
from world import make_folder, write_talks

from abi_py.errors import AbiError, CheckpointError, ConfigError, DataError
from abi_py.pipelines import phase_plan, train_phases
from abi_py.pipelines.chain import Chain
from abi_py.pipelines.recipe import SHIPPED, Recipe
from abi_py.runs import training

ROOT = Path(__file__).resolve().parents[2]
COMMON = """
common:
  base: {path: base}
  data: {path: [talks.jsonl], valid_fraction: 0.1, sample_tokens: 0}
  training: {max_seq_len: 64, batch_size: 4, grad_accum_steps: 1, epochs: 1, learning_rate: 0.01, num_threads: 1}
  lora: {rank: 2, dropout: 0.1}
phases:
"""
CHAIN = f"""name: small
{COMMON}
  first:
    leaves_model: merged
  two:
    after: first
    leaves_adapter: adapter
    training: {{epochs: 2}}
  three:
    after: first
    leaves_adapter: adapter
    chat: {{match: plus 3}}
    lora: {{rank: 4}}
  files:
    after: first
    quantize: [F16, Q8_0]
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "base")
    write_talks(tmp_path / "talks.jsonl")
    (tmp_path / "r.yaml").write_text(CHAIN)
    return tmp_path


def weights(out):
    """Return the bytes of what the phases have left."""
    files = [path for path in Path(out).rglob("*") if path.suffix in (".safetensors", ".gguf", ".md")]
    files = [path for path in files if "run" not in path.relative_to(out).parts]
    return {str(path.relative_to(out)): path.read_bytes() for path in files if path.name != "README.md"}


# -- recipes ---------------------------------------------------------------------------------------


def test_the_shipped_recipe_is_the_seeds_chain():
    recipe = Recipe.read(SHIPPED["tiny"])
    leaves = {f"{phase.name}/{phase.config.leaves_model or phase.config.leaves_adapter}" for phase in recipe.phases}
    assert leaves > {
        "phase1_base_csdl/final_merged", "phase2_reasoning_atlas/atlas_lora",
        "phase3_content_marketing/marketing_lora", "phase4_coder_nexus/nexus_lora",
    }  # fmt: skip
    ranks = {phase.name: phase.settings["lora"]["rank"] for phase in recipe.phases[1:5]}
    assert [*ranks.values()] == [16, 32, 16, 32]
    assert [phase.config.after for phase in recipe.phases[2:]] == ["phase1_base_csdl"] * 4
    assert recipe.phases[0].settings["lora"]["enabled"] is False
    assert recipe.phases[-1].config.quantize == ("F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_K_S")


def test_the_shipped_rows_are_those_of_their_script(tmp_path):
    script = ROOT / "examples/csdl/make_rows.py"
    subprocess.run([sys.executable, script, tmp_path / "rows.jsonl"], check=True, timeout=PATIENCE)
    assert (tmp_path / "rows.jsonl").read_text() == (ROOT / "abi_py/data/csdl_conversations.jsonl").read_text()


def test_a_phase_has_the_common_settings_under_its_own(place):
    first, two, three, files = Recipe.read(place / "r.yaml").phases
    assert first.settings["lora"] == {"enabled": True, "rank": 2, "dropout": 0.1}
    assert three.settings["lora"]["rank"] == 4
    assert two.settings["training"]["epochs"] == 2
    assert "base" not in two.settings  # it starts from what the first one leaves
    assert (files.settings, files.trains) == ({}, False)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("phases: {}", "r.yaml must have `phases:`"),
        ("steps: 1\nphases: {a: {leaves_model: m}}", "r.yaml:1: unknown key 'steps'"),
        ("name: a/b\nphases: {a: {leaves_model: m}}", "r.yaml:1: name ('a/b') must be of letters"),
        ("phases:\n  a/b: {leaves_model: m}", "r.yaml:2: phase 'a/b' must have the name of a folder"),
        ("phases:\n  a: 3", "r.yaml:2: phase a must hold `key: value` lines; got 3"),
        (
            "phases:\n  a:\n    leaves_modell: m",
            "r.yaml:3: unknown key 'leaves_modell' of phase a; did you mean leaves_model",
        ),
        (
            "phases:\n  a:\n    leaves_model: m\n    training:\n      epoch: 1",
            "r.yaml:5: section training: unknown key 'epoch'",
        ),
        (
            "common:\n  training: {epochs: many}\nphases: {a: {leaves_model: m}}",
            "r.yaml:2: section training: epochs ('many')",
        ),
        ("common:\n  trainig: {}\nphases: {a: {leaves_model: m}}", "r.yaml:2: unknown section 'trainig'"),
        ("phases:\n  a: {after: b, leaves_model: m}", "r.yaml:2: phase a: after (b) must be a phase above it"),
        (
            "phases:\n  a: {leaves_adapter: m, lora: {rank: 2}}\n  b: {after: a, leaves_model: m}",
            "after (a) must leave a model",
        ),
        ("phases:\n  a: {}", "leaves_model or leaves_adapter must be given"),
        ("phases:\n  a: {leaves_adapter: m}", "acts only where adapters are trained"),
        ("phases:\n  a: {leaves_model: run}", "leaves_model (run) must be the name of a folder"),
        ("phases:\n  a: {leaves_model: m, leaves_adapter: m, lora: {rank: 2}}", "must be two folders"),
        (
            "phases:\n  a: {leaves_model: m, training: {checkpoint_path: x}}",
            "checkpoint_path of training must be left out",
        ),
        ("phases:\n  a: {leaves_model: m, perplexity: x}", "perplexity acts only with quantize"),
        ("phases:\n  a: {quantize: [F16]}", "quantize must come with after"),
        (
            "phases:\n  a: {leaves_model: m}\n  b: {after: a, quantize: [F16, f16]}",
            "r.yaml:3: phase b: quantize (F16, f16) must name F16 once",
        ),
        (
            "phases:\n  a: {leaves_adapter: m, lora: {rank: 2}, export: {dtype: bfloat16}}",
            "r.yaml:2: phase a: dtype of export acts only with leaves_model",
        ),
        (
            "phases:\n  a: {leaves_model: m, lora: {rank: 2}, export: {merge_base: dequant}}",
            "r.yaml:2: phase a: merge_base of export acts only with leaves_model, and adapters on a base_storage",
        ),
        ("phases:\n  a: {leaves_model: m}\n  b: {after: a, quantize: [F17]}", "phase b: "),
        (
            "phases:\n  a: {leaves_model: m}\n  b: {after: a, quantize: [F16], chat: {match: x}}",
            "chat has no effect on a phase",
        ),
        (
            "phases:\n  a: {leaves_model: m}\n  b: {after: a, leaves_model: m, base: {path: x}}",
            "base must be left out",
        ),
    ],
)  # fmt: skip
def test_a_wrong_recipe_is_refused_with_its_line(tmp_path, text, said):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        Recipe.read(tmp_path / "r.yaml")
    assert said in str(error.value)


# -- a chain ---------------------------------------------------------------------------------------


def test_a_chain_is_done_once_and_in_any_order(place):
    found = train_phases("r.yaml", "out")
    assert {*found} == {"first", "two", "three", "files"}
    made = weights("out")
    assert {*made} == {
        "first/merged/model.safetensors", "two/adapter/adapter_model.safetensors",
        "three/adapter/adapter_model.safetensors", "files/small-F16.gguf", "files/small-Q8_0.gguf", "files/table.md",
    }  # fmt: skip
    assert not (place / "out/first/run/model").exists()  # it is left once
    assert found["files"].figures["types"]["Q8_0"]["perplexity"] > 1
    assert "4 conversations that first keeps for validation" in made["files/table.md"].decode()
    base = json.loads((place / "out/two/adapter/adapter_config.json").read_text())["base_model_name_or_path"]
    assert os.path.samefile(base, place / "out/first/merged")

    steps = (place / "out/two/run/metrics.jsonl").stat().st_mtime_ns
    assert train_phases("r.yaml", "out") == found  # nothing is left to do
    assert (place / "out/two/run/metrics.jsonl").stat().st_mtime_ns == steps

    for name in ("first", "three", "two", "files"):
        train_phases("r.yaml", "other", only=name)
    assert weights("other") == made

    shutil.rmtree(place / "out/first")  # done again, it is the same, and so is what started from it
    assert train_phases("r.yaml", "out")["two"] == found["two"]


def test_what_was_begun_otherwise_is_refused(place):
    train_phases("r.yaml", "out", only="first")
    merged = place / "out/first/merged/model.safetensors"
    (place / "r.yaml").write_text(CHAIN.replace("rank: 2,", "rank: 3,"))
    with pytest.raises(ConfigError, match=r"lora.rank \(3\) is not that with which out/first was begun \(2\)"):
        train_phases("r.yaml", "out")
    (place / "r.yaml").write_text(CHAIN.replace("num_threads: 1", "num_threads: 2"))  # changes no bits
    train_phases("r.yaml", "out", only="first")
    with open(place / "talks.jsonl", "a") as file:
        file.write('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n')
    with pytest.raises(ConfigError, match=r"data \(talks.jsonl\) is not what it was when out/first was begun"):
        train_phases("r.yaml", "out")
    write_talks(place / "talks.jsonl")
    content = bytearray(merged.read_bytes())
    content[-1] ^= 1
    merged.write_bytes(content)
    with pytest.raises(CheckpointError, match="is not what phase first has left there"):
        train_phases("r.yaml", "out")


def test_another_chain_is_refused_before_anything_is_done(place):
    """Also where what its phases start from is not done: that would be hours of training, and then the refusal."""
    train_phases("r.yaml", "out")
    shutil.rmtree(place / "out/first")
    (place / "r.yaml").write_text(CHAIN.replace("rank: 4", "rank: 3"))
    with pytest.raises(ConfigError, match=r"lora.rank \(3\) is not that with which out/three was begun \(4\)"):
        train_phases("r.yaml", "out")
    (place / "r.yaml").write_text(CHAIN.replace("name: small", "name: large"))  # its files would be called otherwise
    with pytest.raises(ConfigError, match=r"recipe.name \(large\) .* with which out/files was begun \(small\)"):
        train_phases("r.yaml", "out")
    assert not (place / "out/first").exists()


def test_a_folder_that_is_not_a_phases_is_left_alone(place):
    (place / "out/files").mkdir(parents=True)
    (place / "out/files/small-F16.gguf").write_text("somebody's")
    (place / "out/first").mkdir()
    (place / "out/first/.abi-lock").touch()  # of one that was killed before it wrote anything
    with pytest.raises(ConfigError, match=r"out/files must be empty before its phase begins, and holds small-F16"):
        train_phases("r.yaml", "out")
    assert not (place / "out/first/phase.json").exists()
    assert (place / "out/files/small-F16.gguf").read_text() == "somebody's"
    train_phases("r.yaml", "out", only="first")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"settings": {"training": 1}}, "settings.training is 1, but must be an object"),
        ({"outputs": {"../../x": "0"}}, "does not say what its phase leaves, merged; remove out/first"),
        ({"figures": {}}, "does not say what its phase leaves, merged; remove out/first"),
        ({"figures": {"total_steps": "many"}}, "figures.total_steps is 'many', but must be a whole number"),
        ({"figures": {"types": {"F16": {"bytes": 1}}}}, "types 'F16': lacks 'bits_per_weight'"),
        ({"figures": {"perplexity": None}}, "figures: "),
    ],
)
def test_a_damaged_record_is_refused_by_name(place, change, said):
    train_phases("r.yaml", "out", only="first")
    path = place / "out/first/phase.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError, match=r"^out/first/phase\.json") as error:
        train_phases("r.yaml", "out", only="first")
    assert said in str(error.value)
    assert "and the phase is done again" in str(error.value)


def test_what_is_wrong_with_data_names_its_phase(place):
    (place / "r.yaml").write_text(CHAIN.replace("plus 3", "minus 3"))
    with pytest.raises(DataError, match=r"^r.yaml: phase three: .*talks.jsonl: none of 36 rows fits match 'minus 3'"):
        train_phases("r.yaml", "out")
    assert not (place / "out").exists()


def test_every_file_that_a_phase_leaves_counts(place):
    recipe = Recipe.read(place / "r.yaml")
    for name in ("first", "two", "files"):
        train_phases(recipe, "out", only=name)

    def is_refused(phase, path, content):
        """Say whether a phase is refused with another content of a file, None for no file; it is put back."""
        before = path.read_bytes()
        path.unlink() if content is None else path.write_bytes(content)
        try:
            assert Chain(recipe, Path("out")).done(recipe.phase(phase)) is not None
        except (CheckpointError, ConfigError) as error:
            assert f"phase {phase} has left" in str(error) or "tokenizer and chat template of its base" in str(error)  # noqa: PT017
            return True
        finally:
            path.write_bytes(before)
        return False

    settings = json.loads((place / "out/two/adapter/adapter_config.json").read_text())
    other = json.dumps({**settings, "lora_alpha": 1000}).encode()
    assert is_refused("two", place / "out/two/adapter/adapter_config.json", other)
    assert is_refused("two", place / "out/two/adapter/adapter_config.json", None)
    assert is_refused("first", place / "out/first/merged/tokenizer.json", None)
    assert is_refused("first", place / "out/first/merged/chat_template.jinja", b"x")
    assert is_refused("files", place / "out/files/table.md", None)
    assert is_refused("first", place / "base/chat_template.jinja", b"x")
    assert not is_refused("first", place / "out/first/merged/README.md", b"x")  # it tells of the run, with its time
    train_phases(recipe, "out", only="files")


def test_what_changes_no_weight_may_change(place):
    train_phases("r.yaml", "out", only="first")
    changed = CHAIN.replace("sample_tokens: 0", "sample_tokens: 2").replace("num_threads: 1", "log_interval: 3")
    (place / "r.yaml").write_text(changed)
    train_phases("r.yaml", "out", only="first")
    (place / "r.yaml").write_text(CHAIN.replace("sample_tokens: 0", "sample_tokens: 0, check_json: 2"))
    with pytest.raises(ConfigError, match=r"check_json \(2\) has no effect: none of the 4 conversations kept"):
        train_phases("r.yaml", "other", only="first")  # its answers are words, and it is told before training
    assert not (place / "other/first/run").exists()
    (place / "r.yaml").write_text(CHAIN)
    train_phases("r.yaml", "other", only="first")


@pytest.mark.parametrize("has_checkpoint", [True, False])
def test_a_chain_that_was_moved_goes_on(place, monkeypatch, has_checkpoint):
    whole = place / "whole"
    whole.mkdir()
    for name in ("base", "talks.jsonl"):
        (place / name).rename(whole / name)
    merged = CHAIN.replace("leaves_adapter: adapter\n    training", "leaves_model: m\n    training")
    (whole / "r.yaml").write_text(merged)
    monkeypatch.chdir(whole)
    train_phases("r.yaml", "out", only="first")

    def killed(*args):
        raise KeyboardInterrupt

    recipe = Recipe.read(Path("r.yaml"))

    def train(run, checkpoint):
        with monkeypatch.context() as patch:
            patch.setattr(training, "leave_model", killed)
            if not has_checkpoint:
                patch.setattr(type(run), "make_trainer", killed)
            return training.train_run(run, checkpoint)

    with pytest.raises(KeyboardInterrupt):
        Chain(recipe, Path("out")).do(recipe.phase("two"), train, lambda label, text: None)
    monkeypatch.chdir(place)
    whole.rename(place / "moved")
    monkeypatch.chdir(place / "moved")
    found = train_phases("r.yaml", "out", only="two")
    assert found["two"].done
    assert train_phases("r.yaml", "out", only="two") == found


def test_what_is_refused_before_anything_is_written(place, monkeypatch):
    with pytest.raises(ConfigError, match=r"phase two starts from what first leaves, and that is not done; first: "):
        train_phases("r.yaml", "out", only="two")
    with pytest.raises(ConfigError, match=r"only \(four\) must be a phase of r.yaml: first, two, three, files"):
        train_phases("r.yaml", "out", only="four")
    (place / "r.yaml").write_text(CHAIN.replace("leaves_model: merged", "leaves_model: merged\n    rows: 35"))
    with pytest.raises(ConfigError, match=r"r.yaml: phase first: rows \(35\) must be 36"):
        train_phases("r.yaml", "out")
    (place / "r.yaml").write_text(CHAIN + "    perplexity: nothere.txt\n")
    with pytest.raises(ConfigError, match=r"r.yaml:\d+: phase files: perplexity \(nothere.txt\) does not exist"):
        train_phases("r.yaml", "out")
    (place / "r.yaml").write_text(CHAIN)
    free = shutil.disk_usage(place)
    monkeypatch.setattr(phase_plan.shutil, "disk_usage", lambda path: free._replace(free=1000))
    with pytest.raises(ConfigError, match=r"out \(out\) needs .* MB, and 0.0 MB are free there"):
        train_phases("r.yaml", "out")
    with pytest.raises(AbiError):
        train_phases("missing.yaml", "out")
    assert not (place / "out").exists()


def test_a_plan_counts_what_is_then_done(place):
    recipe = Recipe.read(place / "r.yaml")
    plans = {plan.phase.name: plan for plan in phase_plan.plan_phases(Chain(recipe, place / "out"))}
    assert (plans["first"].rows, plans["first"].kept, plans["first"].steps) == (32, 4, 8)
    assert (plans["two"].steps, plans["three"].rows + plans["three"].kept) == (16, 6)
    assert plans["two"].trained * 2 == plans["three"].trained
    assert all(plan.memory and plan.disk for plan in plans.values())
    done = train_phases(recipe, place / "out")
    for name in ("first", "two", "three"):
        assert done[name].figures["total_steps"] == plans[name].steps
    written = sum(path.stat().st_size for path in (place / "out/two").rglob("*.safetensors"))
    headers = sum(4096 for _ in (place / "out/two").rglob("*.safetensors"))  # names and places of the tensors
    assert plans["two"].disk / 2 < written < plans["two"].disk + headers
    again = {plan.phase.name: plan for plan in phase_plan.plan_phases(Chain(recipe, place / "out"))}
    assert all(plan.record is not None and plan.disk == 0 for plan in again.values())
