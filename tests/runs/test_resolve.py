"""What the settings of a run mean: precedence, what is derived from what, each rule worked out once."""

import ast
import dataclasses
import textwrap
from pathlib import Path

import numpy as np
import pytest

import abi_py.runs
from abi_py.cli.options import in_flags
from abi_py.cli.run import command
from abi_py.config import fields_of
from abi_py.data import TokenizedDataset
from abi_py.errors import ConfigError
from abi_py.lora_config import LoraConfig
from abi_py.pipelines import presets
from abi_py.runs.defaults import DEFAULTS, DERIVED, FINE_TUNING
from abi_py.runs.directory import new_directory
from abi_py.runs.opening import OpenData
from abi_py.runs.resolve import Given
from abi_py.runs.resuming import changed
from abi_py.runs.settings import RUN_SECTIONS, DataConfig, read_run_config

HERE = Path("r")


def tokens(count):
    return TokenizedDataset.from_slice(np.zeros(count, np.int64))


def resolved(flags, file=None, train=None, valid=None, vocab_size=9, directory=HERE):
    train = tokens(801) if train is None else train
    data = OpenData(train, valid, vocab_size, DataConfig())
    return Given(flags, file or {}).resolve(data, directory).config


# -- flags beat file beats defaults --------------------------------------------------------------

# A field of each kind: section, field, the value of a run that was told nothing, of a file, of a flag.
KINDS = [
    ("training", "epochs", 10, 3, 4),  # a default of its class
    ("training", "batch_size", 8, 3, 4),  # a default of `run`
    ("training", "learning_rate", 3e-3, 0.5, 0.25),
    ("training", "nan_guard", True, False, True),
    ("training", "optimizer", "adamw", "sgd", "adam"),
    ("training", "max_steps", None, 7, 0),
    ("training", "decay_steps", 1000, 30, 20),  # derived
    ("training", "checkpoint_path", "r/checkpoints", "there", "elsewhere"),
    ("model", "hidden_dim", 96, 32, 64),
    ("model", "vocab_size", 9, 11, 12),
    ("model", "max_seq_len", 128, 500, 400),
    ("model", "head_dim", None, 8, 6),
    ("data", "valid_fraction", 0.05, 0.5, 0.25),
    ("data", "sample_tokens", 250, 3, 0),
    ("early_stopping", "patience", 3, 5, 7),
]


@pytest.mark.parametrize(("section", "field", "default", "file", "flag"), KINDS, ids=lambda value: str(value))
def test_flag_beats_file_beats_default(section, field, default, file, flag):
    def value(flags, file):
        return getattr(resolved(flags, file, tokens(100 * 1024 + 1), tokens(9)), section).to_dict()[field]

    assert value({}, {}) == default
    assert value({}, {section: {field: file}}) == file
    assert value({section: {field: flag}}, {section: {field: file}}) == flag
    assert value({section: {field: flag}}, {}) == flag


LORA = {"rank": 4, "target_modules": ("q", "o_proj")}


@pytest.mark.parametrize("flags", [{}, {"epochs": 3}], ids=str)
def test_adapters_are_off_unless_something_of_them_is_set(flags):
    assert resolved({"training": flags}).lora is None
    assert resolved({"lora": {"enabled": False}, "training": flags}, {"lora": LORA}).lora is None
    for given, file in (({"lora": LORA}, {}), ({}, {"lora": LORA}), ({"lora": {"enabled": True}}, {"lora": LORA})):
        made = resolved({**given, "training": flags}, file)
        assert made.lora.enabled
        assert (made.lora.rank, made.lora.target_modules) == (4, ("q_proj", "o_proj"))
        assert made.lora.adapters() == LoraConfig(rank=4, target_modules=("q_proj", "o_proj"))
        assert (made.training.learning_rate, made.training.weight_decay) == (2e-4, 0)
    every = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert resolved({"lora": {"enabled": True}}).lora.target_modules == every
    assert resolved({"lora": LORA, "training": {"learning_rate": 0.5}}).training.learning_rate == 0.5


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"lora": {"enabled": False, "rank": 4}}, r"rank \(4\) acts only with enabled true \(--lora\)"),
        ({"lora": {"target_modules": ("c_attn",)}}, r"target_modules \('c_attn'\): this model has no such projection"),
        ({"lora": {"rank": 0}}, r"rank \(0\) must be at least 1"),
        ({"lora": LORA, "training": {"optimizer": "muon"}}, r"optimizer \(muon\) .* leave --lora out"),
    ],
    ids=str,
)
def test_adapters_that_cannot_be_are_refused(flags, said):
    with pytest.raises(ConfigError, match=said):
        Given(flags, {})


def test_paths_are_absolute_wherever_they_come_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.jinja").write_text("")
    for flags, file in (({"data": {"path": ("a.txt",)}}, {}), ({}, {"data": {"path": ("a.txt",)}})):
        assert Given(flags, file).data.path == (str(tmp_path / "a.txt"),)
    for name, wanted in (("t.jinja", str(tmp_path / "t.jinja")), ("chatml", "chatml")):
        assert Given({"chat": {"template": name}}, {}).chat.template == wanted


@pytest.mark.parametrize(
    ("flags", "file", "enabled", "patience"),
    [
        ({}, {}, False, 3),
        ({"patience": 2}, {}, True, 2),
        ({}, {"patience": 2}, True, 2),
        ({"patience": 2}, {"enabled": False}, True, 2),
        ({"enabled": False}, {"patience": 2, "enabled": True}, False, 3),
        ({"min_delta": 0.5}, {"patience": 2}, True, 2),
    ],
)
def test_who_sets_the_patience_wants_early_stopping(flags, file, enabled, patience):
    config = resolved({"early_stopping": flags}, {"early_stopping": file}, valid=tokens(9)).early_stopping
    assert (config.enabled, config.patience) == (enabled, patience)


# -- what is derived -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "changes", "warmup", "least", "decay", "checkpoints", "evaluations"),
    [
        (100, {}, 5, 0.002, 100, 25, 25),
        (100, {"epochs": 200}, 100, 0.002, 5000, 25, 25),
        (5000, {"epochs": 1}, 62, 0.002, 1250, 1000, 500),
        (100, {"lr_schedule": "linear"}, 0, 0.002, 100, 25, 25),
        (100, {"decay_steps": 3, "min_learning_rate": 0.01}, 3, 0.01, 3, 25, 25),
        (100, {"max_steps": 40, "eval_interval": 7, "checkpoint_interval": 9}, 2, 0.002, 40, 9, 7),
    ],
)
def test_what_follows_from_the_number_of_steps(rows, changes, warmup, least, decay, checkpoints, evaluations):
    """Windows of 2 x 2 rows of 8 tokens in 4 epochs, where nothing else is said."""
    data = TokenizedDataset.from_slice(np.zeros(8 * rows + 1, np.int64))
    sizes = {"max_seq_len": 8, "batch_size": 2, "grad_accum_steps": 2, "epochs": 4, "learning_rate": 0.02}
    training = resolved({"training": {**sizes, **changes}}, {}, data, data).training
    assert (training.warmup_steps, training.decay_steps) == (warmup, decay)
    assert training.min_learning_rate == pytest.approx(least)
    assert (training.checkpoint_interval, training.eval_interval) == (checkpoints, evaluations)
    assert training.checkpoint_path == str(HERE / "checkpoints")
    if "eval_interval" not in changes:
        assert resolved({"training": {**sizes, **changes}}, {}, data, None).training.eval_interval == 0


@pytest.mark.parametrize(
    ("changes", "name", "value"),
    [
        ({"training": {"learning_rate": 0.5}}, "training.min_learning_rate", 0.05),
        ({"training": {"max_seq_len": 64}}, "model.max_seq_len", 64),
        ({"training": {"max_steps": 5}}, "training.decay_steps", 5),
        ({"training": {"epochs": 3}}, "training.decay_steps", 3),
        ({"training": {"batch_size": 1}}, "training.checkpoint_interval", 7),
        ({"training": {"batch_size": 1, "grad_accum_steps": 2}}, "training.checkpoint_interval", 4),
        ({"training": {"lr_schedule": "cosine"}}, "training.warmup_steps", 0),
    ],
)
def test_derived_values_follow_what_they_are_derived_from(changes, name, value):
    """800 labels: 7 rows of 128 tokens, one batch of 8."""
    section, field = name.split(".")
    assert getattr(getattr(resolved(changes), section), field) == pytest.approx(value)
    assert getattr(getattr(resolved({}, changes), section), field) == pytest.approx(value)


def test_what_does_not_act_is_not_derived():
    training = resolved({"training": {"lr_schedule": "constant"}}).training
    assert (training.decay_steps, training.min_learning_rate) == (10000, 1e-7)  # those of the class
    with pytest.raises(ConfigError, match=r"decay_steps \(9\) acts only with lr_schedule"):
        resolved({"training": {"lr_schedule": "constant", "decay_steps": 9}})


def test_null_in_a_file_is_not_given(tmp_path):
    (tmp_path / "a.yaml").write_text("training:\n  checkpoint_path: null\n  max_steps: null\n")
    training = resolved({}, read_run_config(tmp_path / "a.yaml")).training
    assert (training.checkpoint_path, training.max_steps) == (str(HERE / "checkpoints"), None)


@pytest.mark.parametrize(
    ("training", "said"),
    [
        ({"warmup_steps": 20000}, None),  # the decay is the run's, however long that is
        ({"decay_steps": 50}, None),  # so is the warm-up
        ({"learning_rate": 1e-9}, None),
        ({"warmup_steps": 50, "decay_steps": 20}, r"warmup_steps \(50\) must not exceed decay_steps \(20\)"),
        ({"learning_rate": -1.0}, r"learning_rate \(-1.0\) must be a positive number"),
    ],
)
def test_what_can_be_told_without_the_data(training, said):
    if said is None:
        Given({"training": training}, {})
    else:
        with pytest.raises(ConfigError, match=said):
            Given({"training": training}, {})


def test_what_was_resolved_is_what_is_saved_and_read_again(tmp_path):
    run = Given({"training": {"epochs": 2}}, {}).resolve(OpenData(tokens(801), tokens(9), 257, DataConfig()), tmp_path)
    run.write_config()
    assert changed(None, {}, tmp_path)[0] == run.config


def test_a_program_resolves_a_run_as_the_command_line_does(tmp_path, monkeypatch):
    """The lines in the docstring of `abi_py.runs`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("a note, and another one\n" * 100)
    names = {"Given": Given, "Path": Path}
    exec(textwrap.dedent(abi_py.runs.__doc__[abi_py.runs.__doc__.index("    given = ") :]), names)
    run = names["run"]
    assert run.config.training.decay_steps == run.steps[1] == 3 * run.steps[0]
    assert (run.config.training.epochs, run.config.model.vocab_size) == (3, 257)
    assert run.config.data.path == (str(tmp_path / "notes.txt"),)
    assert not Path("my-run").exists()


# -- the help and the run read one table ---------------------------------------------------------


def shown(verb):
    return {(param.section, param.field): param.help for param in verb.params if hasattr(param, "section")}


def test_the_help_shows_the_defaults_and_the_rules():
    texts = shown(command)
    for section, table in DERIVED.items():
        spelled = {param.field: param.opts[-1] for param in command.params if getattr(param, "section", "") == section}
        for each in table:
            assert texts[section, each.name].endswith(f"  [{in_flags(each.rule, spelled)}]")
    for section, values in DEFAULTS.items():
        for name, value in values.items():
            tuned = FINE_TUNING.get(name) if section == "training" else None
            most = "at most " if name == "max_seq_len" else ""  # a base may have a shorter context
            said = {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value).lower()
            ends = f"  [{said}]" if tuned is None else f"  [{value:g}; with --base {most}{tuned:g}"
            assert ends in texts[section, name]


def test_a_rule_and_its_function_say_the_same():
    """Each rule as it is written, against a run that is told little."""
    train, valid = tokens(128 * 8 * 40 + 1), tokens(9)
    steps = 40 * 3
    config = resolved({"training": {"epochs": 3, "learning_rate": 0.25}}, {}, train, valid, 300)
    said = {
        "that of the tokenizer; 257 for text as bytes; else largest id + 1": (config.model.vocab_size, 300),
        "that of the training": (config.model.max_seq_len, config.training.max_seq_len),
        "steps of the whole run": (config.training.decay_steps, steps),
        "warmup_cosine and wsd: 5% of them, at most 100; else 0": (config.training.warmup_steps, steps // 20),
        "learning_rate / 10": (config.training.min_learning_rate, 0.025),
        "an epoch, at most 1000": (config.training.checkpoint_interval, 40),
        "an epoch, at most 500": (config.training.eval_interval, 40),
        "OUT/checkpoints": (config.training.checkpoint_path, "r/checkpoints"),
    }
    assert [each.rule for table in DERIVED.values() for each in table] == list(said)
    for rule, (found, wanted) in said.items():
        assert found == wanted, rule


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("training.epochs", "by size: 3 or 5; 30 for the package's own data"),
        ("training.batch_size", "by size: 4, 2 or 1; 8 for the package's own data"),
        (
            "training.learning_rate",
            "by size: 0.0005, 0.0002, 0.0001 or 5e-05; 0.002 * 128 / width for the package's own data",
        ),
        ("model.checkpointing", "full for medium, large, seed"),
        ("model.hidden_dim", "by size: 128, 256, 768, 1024 or 512"),
        ("model.rope_theta", 10000.0),
        ("training.max_checkpoints", "by size: 2 or 3"),
        ("data.train_tokenizer", "by size: 2000, 8000, 16000, 32000 or 32000; 0 with base or tokenizer"),
    ],
)
def test_the_rules_of_a_deepzig_run_are_made_of_its_numbers(name, rule):
    section, field = name.split(".")
    assert presets.SHOWN[section][field] == rule


def test_what_the_help_of_deepzig_shows_are_fields():
    for section, values in presets.SHOWN.items():
        assert set(values) <= {option.name for option in fields_of(RUN_SECTIONS[section])}, section


# -- the directory -------------------------------------------------------------------------------


def test_a_new_directory_that_stays_empty_is_removed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with new_directory() as first, new_directory() as second:
        assert first.is_dir()
        assert second.is_dir()
        assert first != second
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match="wrong"), new_directory():
        raise ConfigError("wrong")
    assert list(tmp_path.iterdir()) == []
    with new_directory() as kept:
        (kept / "config.yaml").write_text("")
    assert (kept / "config.yaml").exists()


# -- the floor -----------------------------------------------------------------------------------


def test_nothing_here_knows_the_command_line():
    """Neither the libraries of the terminal nor a line that is printed."""
    folder = Path(abi_py.runs.__file__).parent
    for path in sorted(folder.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & {"click", "rich"}, path
            is_print = isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"
            assert not is_print or path.name == "compile_worker.py", path  # its workers talk to it that way


def test_the_sections_are_those_of_the_class_that_holds_them():
    fields = {field.name for field in dataclasses.fields(abi_py.runs.settings.RunConfig)}
    assert fields == set(RUN_SECTIONS)
