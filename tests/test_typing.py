"""What a type checker and `help()` find: types, the fields of config classes, short signatures."""

import configparser
import inspect
import os
import pydoc
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import abi_py as abi
from abi_py.data.tokenizer_training import TokenizerTrainingConfig
from abi_py.fields import fields_of
from abi_py.kernels import rms_norm
from abi_py.kernels.unchecked import MODULES
from abi_py.rope_scaling import RopeScaling
from abi_py.runs.settings import RUN_SECTIONS

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = [*RUN_SECTIONS.values(), abi.GenerationConfig, abi.LoraConfig, RopeScaling, TokenizerTrainingConfig]


def test_a_program_over_the_documented_names_is_typed(tmp_path_factory):
    pytest.importorskip("mypy")
    cache = ROOT / ".mypy_cache" / "typed" if os.access(ROOT, os.W_OK) else tmp_path_factory.mktemp("mypy")
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--follow-imports=silent"]
    result = subprocess.run(
        [*command, f"--cache-dir={cache}", "tests/typed/program.py"],
        cwd=ROOT,
        env={**os.environ, "MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_package_says_that_it_has_types():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert (ROOT / "abi_py/py.typed").is_file()
    assert "py.typed" in setup["options.package_data"]["abi_py"].split()


# -- help() ------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", CONFIGS, ids=lambda cls: cls.__name__)
def test_help_lists_every_field_of_a_config_class_once(cls):
    lines = cls.__doc__.splitlines()
    assert lines[0].endswith(".")
    for option in fields_of(cls):
        (title,) = (line for line in lines if line.startswith(f"{option.name}: "))
        assert option.required or "derive" in option.metadata or " = " in title
        assert option.help.split()[0] in cls.__doc__
    assert max(len(line) for line in lines if line.startswith("    ")) <= 100


def test_a_field_is_told_with_type_default_rule_and_when_it_acts():
    text = abi.LlmTrainingConfig.__doc__
    assert "epochs: int = 10\n    passes over the data; must be at least 1\n" in text
    assert "nesterov: bool = False\n    Nesterov's form of the momentum; acts with optimizer sgd and" in text
    assert "beta1: float = 0.9\n    decay of Adam's mean of gradients; must be at least 0 and below 1; acts" in text
    assert "checkpoint_path: str or None = None\n" in text
    shape = abi.TrainableModelConfig.__doc__
    assert "hidden_dim: int\n    must be given; width of the model; must be at least 1\n" in shape
    assert "base of the RoPE frequencies; must be a positive number; acts with family other than gpt2" in shape


def test_a_signature_fits_on_a_line_and_has_every_parameter():
    found = inspect.signature(abi.LlmTrainingConfig)
    assert str(found) == "(*, epochs=10, batch_size=4, max_seq_len=512, ...)"
    assert [*found.parameters] == [option.name for option in fields_of(abi.LlmTrainingConfig)]
    assert found.parameters["beta1"].default == 0.9
    shown = pydoc.plain(pydoc.render_doc(abi.LlmTrainingConfig))
    assert "LlmTrainingConfig(*, epochs=10, batch_size=4, max_seq_len=512, ...)" in shown
    assert "__init__(self, *, epochs=10, batch_size=4, max_seq_len=512, ...)" in shown
    assert str(inspect.signature(abi.GenerationConfig.__init__)).startswith("(self, *, ")


def test_public_kernels_are_annotated():
    for module in (import_module(f"abi_py.kernels.{name}") for name in MODULES):
        for name, function in vars(module).items():
            own = not name.startswith("_") and getattr(function, "__module__", "") == module.__name__
            if own and inspect.isfunction(inspect.unwrap(function)):
                parameters = inspect.signature(function).parameters
                assert {*function.__annotations__} >= {*parameters, "return"}, f"{module.__name__}.{name}"
    shown = pydoc.plain(pydoc.render_doc(rms_norm))
    arrays = ", ".join(f"{name}: numpy.ndarray" for name in "yrxw")
    assert f"rms_norm_forward({arrays}, eps: float)" in shown


def test_help_of_what_a_user_holds_names_types_shortly():
    for cls in (abi.LlamaTrainer, abi.TrainableModel, abi.Batch, abi.TokenizedDataset, abi.Generator):
        shown = pydoc.plain(pydoc.render_doc(cls))
        assert "numpy._typing" not in shown, cls
