"""Adapters at the shell: in the files of other programs and back, several beside a model, merged into it."""

import json

import numpy as np
import pytest
from world import make_folder

from abi_py.config import LoraConfig
from abi_py.formats.safetensors import read_safetensors
from abi_py.model import LoraModel
from abi_py.training.loading import load_model

QUICK = ("--ids", "5 9 40 7", "--temperature", "0", "--max-new-tokens", "12", "--json")


def make_adapter(folder, base, seed=3, **changes):
    """Write adapters of random values, trained on a base as they say; return them."""
    lora = LoraModel(load_model(base).model, LoraConfig(**({"rank": 2, "alpha": 6.0} | changes)), str(base))
    lora.parameters.weights_flat[:] = np.random.default_rng(seed).normal(0, 0.4, lora.num_params())
    lora.save(folder)
    return lora


@pytest.fixture
def base(tmp_path):
    """Return a folder of a model, a llama, whose q and k llama.cpp keeps in another order; adapters lie beside it."""
    folder = make_folder(tmp_path / "base", family="llama")
    make_adapter(tmp_path / "one", folder)
    return folder


def ids_of(abi_train, *words, code=0):
    """Return what `generate` writes, as ids."""
    done, out, err = abi_train("generate", *words, *QUICK)
    assert done == code, err
    return err if code else [json.loads(line)["ids"] for line in out.splitlines()]


# -- in the files of other programs -------------------------------------------------------------------


def test_forms_of_adapters_and_back(abi_train, base, tmp_path):
    (wanted,) = ids_of(abi_train, "one")
    code, out, err = abi_train("export", "one", "--to", "gguf-adapter", "-o", "one.gguf")
    assert (code, err) == (0, ""), err
    assert "weights in F32, read again: as they were written" in out
    assert "merged" not in out
    assert f"abi-train generate {base} --adapter one.gguf; llama.cpp: llama-cli -m BASE.gguf --lora one.gguf" in out
    code, out, err = abi_train("export", "one", "--to", "mlx-lm", "-o", "one-mlx")
    assert (code, err) == (0, ""), err
    assert "mlx-lm: mlx_lm.generate --model BASE --adapter-path one-mlx" in out
    assert ids_of(abi_train, "one-mlx") == [wanted]  # it names its base
    for form, words in (("one.gguf", ["--base", "base"]), ("one-mlx", [])):
        code, out, err = abi_train("export", form, *words, "--to", "peft", "-o", "again", "--force")
        assert (code, err) == (0, ""), err
        theirs, ours = (read_safetensors(tmp_path / name / "adapter_model.safetensors") for name in ("one", "again"))
        assert theirs.keys() == ours.keys()
        assert all(np.array_equal(theirs[name], ours[name]) for name in theirs)
    narrow = abi_train("export", "one", "--to", "gguf-adapter", "--quantize", "f16", "-o", "half.gguf")
    assert "weights in F16, read again: they lost F16 0.0" in narrow[1]
    assert (tmp_path / "half.gguf").stat().st_size < (tmp_path / "one.gguf").stat().st_size
    plain = abi_train("export", "one", "--to", "gguf-adapter", "-o", "half.gguf", "--force", "--no-check")
    assert "read again" not in plain[1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["base", "--to", "gguf-adapter"], "is a whole model, and has no adapters"),
        (["one", "--to", "gguf-adapter", "--quantize", "Q4_K_M"], "quantize (Q4_K_M) must be F32, F16 or BF16"),
        (["one", "--to", "gguf-adapter", "--dtype", "float16"], "dtype (float16) must be float32 for gguf-adapter"),
        (["one", "--to", "mlx-lm", "--max-shard-size", "1MB"], "max_shard_size (1MB) has no effect on adapters"),
        (["one", "--to", "mlx-lm", "--quantize", "F16"], "quantize (F16) acts only with --format gguf"),
        (["one", "--to", "peft", "--no-check"], "--no-check acts only with --format gguf and gguf-adapter"),
        (["base", "--to", "hf", "--base", "base"], "is a whole model, not adapters; leave it out"),
    ],
)
def test_settings_without_effect_on_adapters(abi_train, base, words, said):
    code, _, err = abi_train("export", *words, "-o", "out")
    assert code == 2
    assert said in err


def test_what_these_files_are(abi_train, base, tmp_path):
    assert abi_train("export", "one", "--to", "gguf-adapter", "-o", "one.gguf")[0] == 0
    assert abi_train("export", "one", "--to", "mlx-lm", "-o", "mlx")[0] == 0
    code, out, _ = abi_train("inspect", "one.gguf")
    assert code == 0
    assert "adapters of LoRA (GGUF)" in out
    assert "attn_q, attn_k, attn_v" in out
    assert "llama-cli -m BASE.gguf --lora one.gguf" in out
    code, out, _ = abi_train("inspect", "mlx")
    assert code == 0
    assert "adapters of LoRA (mlx-lm)" in out
    assert "self_attn.q_proj" in out


def test_a_file_of_adapters_does_not_say_its_model(abi_train, base):
    assert abi_train("export", "one", "--to", "gguf-adapter", "-o", "one.gguf")[0] == 0
    assert "names no model that they are of" in ids_of(abi_train, "one.gguf", code=1)
    code, _, err = abi_train("merge", "one.gguf", "-o", "m")
    assert code == 1
    assert "abi-train merge one.gguf --base FOLDER -o MERGED" in err
    code, _, err = abi_train("merge", "one.gguf", "--base", "base", "-o", "m")
    assert (code, err) == (0, ""), err
    assert ids_of(abi_train, "m") == ids_of(abi_train, "one")
    code, _, err = abi_train("run", "--base", "one.gguf", "--data", "x.txt", "--dry-run")
    assert code == 2
    assert "holds adapters, not a whole model" in err
