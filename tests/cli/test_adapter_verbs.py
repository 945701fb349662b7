"""Adapters at the shell: in the files of other programs and back, several beside a model, merged into it."""

import io
import json
import re

import numpy as np
import pytest
from world import make_folder, write_talks

from abi_py.config import LoraConfig
from abi_py.formats.checkpoint_names import BASE_FINGERPRINT
from abi_py.formats.gguf import open_gguf
from abi_py.formats.safetensors import read_metadata, read_safetensors, write_safetensors
from abi_py.generation import generate
from abi_py.model import LoraModel, TrainableModel
from abi_py.model.frozen import FrozenModel
from abi_py.model.stored_adapter import base_facts_of
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
    assert "abi-train merge BASE one.gguf -o MERGED" in err
    code, _, err = abi_train("merge", "one.gguf", "--base", "base", "-o", "m")
    assert (code, err) == (0, ""), err
    assert ids_of(abi_train, "m") == ids_of(abi_train, "one")
    code, _, err = abi_train("run", "--base", "one.gguf", "--data", "x.txt", "--dry-run")
    assert code == 2
    assert "holds adapters, not a whole model" in err


# -- several beside a model ---------------------------------------------------------------------------


@pytest.fixture
def several(abi_train, base, tmp_path):
    """Return what the model writes alone, and with each of two adapters, one of them a GGUF file."""
    make_adapter(tmp_path / "two", base, seed=4)
    assert abi_train("export", "two", "--to", "gguf-adapter", "-o", "two.gguf")[0] == 0
    alone, one, two = (ids_of(abi_train, name)[0] for name in ("base", "one", "two"))
    assert len({str(each) for each in (alone, one, two)}) == 3
    return alone, one, two


def test_each_adapter_writes_in_turn_under_its_name(abi_train, several):
    _, one, two = several
    flags = ("--adapter", "one", "--adapter", "b=two.gguf")
    code, out, err = abi_train("generate", "base", *flags, *QUICK)
    assert code == 0, err
    lines = [json.loads(line) for line in out.splitlines()]
    assert [(line["adapter"], line["ids"]) for line in lines] == [("one", one), ("b", two)]
    code, out, _ = abi_train("generate", "base", *flags, *QUICK[:-1])
    assert code == 0
    assert [line for line in out.splitlines() if line.startswith("==")] == ["== one", "== b"]
    assert ids_of(abi_train, "base", "--adapter", "one") == [one]
    assert "==" not in abi_train("generate", "base", "--adapter", "one", *QUICK[:-1])[1]


def test_on_a_quantised_file(abi_train, base, tmp_path):
    """Adapters that PEFT or llama.cpp wrote do not say of which weights they are."""
    wide = make_folder(tmp_path / "wide", family="llama", hidden_dim=64, intermediate_dim=96)
    assert abi_train("export", wide, "--to", "gguf", "--quantize", "Q4_0", "-o", "q.gguf")[0] == 0
    for seed, name in enumerate(("a", "b")):
        make_adapter(tmp_path / name, tmp_path / "q.gguf", seed)
        assert ids_of(abi_train, "q.gguf", "--adapter", name) == ids_of(abi_train, name)  # it names its base
    before = (tmp_path / "q.gguf").read_bytes()
    code, out, err = abi_train("generate", "q.gguf", "--adapter", "a", "--adapter", "b", *QUICK)
    assert code == 0, err
    found = [json.loads(line)["ids"] for line in out.splitlines()]
    assert found[0] != found[1]
    assert found == [ids_of(abi_train, name)[0] for name in ("a", "b")]
    assert (tmp_path / "q.gguf").read_bytes() == before


def test_on_a_base_that_was_encoded_for_them_it_is_encoded_again(abi_train, base, tmp_path):
    """Unless others beside them were trained on another one, which is told."""
    for seed, name in enumerate(("a", "b")):
        lora = LoraModel(FrozenModel.from_pretrained(base, storage="nf4"), LoraConfig(rank=2, alpha=6.0), str(base))
        lora.parameters.weights_flat[:] = np.random.default_rng(seed).normal(0, 0.4, lora.num_params())
        lora.save(tmp_path / name)
    (tmp_path / "t.txt").write_text("What is 1 plus 2? 1 plus 2 is 3. " * 20)

    def measured(*words):
        code, out, err = abi_train("eval", *words, "t.txt", "--json")
        assert code == 0, err
        return [json.loads(line)["perplexity"] for line in out.splitlines()], err

    alone = [measured(name)[0][0] for name in ("a", "b")]
    found, err = measured("base", "--adapter", "a", "--adapter", "b")
    assert found == alone
    assert "the model is encoded in nf4, as it was when the adapters were trained" in err
    (mixed, _), err = measured("base", "--adapter", "a", "--adapter", "one")
    assert mixed != alone[0]
    assert "adapter a was trained on the model in nf4, and others here were not" in err


def test_eval_measures_each(abi_train, several, tmp_path):
    (tmp_path / "t.txt").write_text("What is 1 plus 2? 1 plus 2 is 3. " * 20)
    flags = ("--adapter", "one", "--adapter", "b=two.gguf")
    code, out, err = abi_train("eval", "base", *flags, "t.txt", "--json")
    assert code == 0, err
    found = {(each := json.loads(line))["adapter"]: each["perplexity"] for line in out.splitlines()}
    alone = {name: json.loads(abi_train("eval", name, "t.txt", "--json")[1])["perplexity"] for name in ("one", "two")}
    assert found == pytest.approx({"one": alone["one"], "b": alone["two"]})
    code, out, _ = abi_train("eval", "base", *flags, "t.txt")
    assert [line for line in out.splitlines() if line.startswith("adapter")] == [
        *("adapter        one", "adapter        b"),
    ]


def test_chat_switches(abi_train, several, monkeypatch, tmp_path):
    """Every answer has the ids that it has in a new process: nothing that another has read is kept."""
    flags = ("--temperature", "0", "--max-new-tokens", "6")
    asked = "What is 1 plus 1?"
    wanted = {
        name: abi_train("chat", "base", *adapter, "--once", asked, *flags)[1]
        for name, adapter in {"none": (), "one": ("--adapter", "one"), "b": ("--adapter", "b=two.gguf")}.items()
    }
    assert len(set(wanted.values())) == 3
    typed = ["one", "b", "none", "one", "none", "b"]
    lines = "".join(f"/reset\n/adapter {name}\n{asked}\n" for name in typed)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(f"{asked}\n/adapter\n{lines}".encode())))
    code, out, err = abi_train("chat", "base", "--adapter", "one", "--adapter", "b=two.gguf", *flags)
    assert code == 0, err
    assert out == "".join(wanted[name] for name in ["one", *typed])
    assert "adapter one; the others: b, none" in err
    assert "adapter none; the others: one, b" in err


@pytest.mark.parametrize(
    ("words", "said", "wrong"),
    [
        (["base", "--adapter", "one", "--adapter", "x/one"], "adapter (one) is given twice; name them", 2),
        (["base", "--adapter", "none=one"], "adapter (none) is what stands for no adapter", 2),
        (["base", "--adapter", "=one"], "the name '' must be one word", 2),
        (["base", "--adapter", "a=nowhere"], "does not exist", 2),
        (["base", "--adapter", "base"], "is a whole model, and has no adapters", 1),
        (["base", "--adapter", "empty"], "empty holds no adapters (adapter_config.json and adapter_model.safe", 1),
        (["base", "--adapter", "half"], "half has adapter_model.safetensors but no adapter_config.json", 1),
        (["one", "--adapter", "one"], "holds adapters itself", 2),
        (["other", "--adapter", "one"], "were trained on other weights than those in other", 1),
        (["wider", "--adapter", "one"], "has shape (2, 16); rank 2 on this model takes (2, 32)", 1),
        (["gpt2", "--adapter", "one"], "this model has no such projection", 1),
    ],
)
def test_what_does_not_fit_is_refused_by_name(abi_train, base, tmp_path, words, said, wrong):
    for name in ("empty", "half"):
        (tmp_path / name).mkdir()
    (tmp_path / "half/adapter_model.safetensors").write_bytes(b"")
    if "x/one" in words:
        make_adapter(tmp_path / "x/one", base)
    if words[0] in ("other", "wider", "gpt2"):
        changes = {"other": {"family": "llama"}, "wider": {"family": "llama", "hidden_dim": 32}}
        changes["gpt2"] = {"family": "gpt2", "num_kv_heads": 2}
        folder = make_folder(tmp_path / words[0], **changes[words[0]])
        if words[0] == "other":
            weights = dict(read_safetensors(folder / "model.safetensors"))
            weights["model.norm.weight"] = weights["model.norm.weight"] + 1
            write_safetensors(folder / "model.safetensors", weights)
    assert said in ids_of(abi_train, *words, code=wrong)


def test_calls_of_chat_that_cannot_be(abi_train, base, monkeypatch, tmp_path):
    make_adapter(tmp_path / "two", base, seed=4)
    code, _, err = abi_train("chat", "base", "--adapter", "one", "--adapter", "two", "--once", "hi")
    assert code == 2
    assert "adapter (of 2) must be one with --once" in err
    for flags, typed, said in (
        ((), "/adapter one", "there are none; give --adapter NAME=PATH"),
        (("--adapter", "one"), "/adapter three", "adapter (three) is not there; there are one"),
    ):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(typed.encode())))
        code, _, err = abi_train("chat", "base", *flags)
        assert code == 2
        assert said in err


def test_of_a_run_its_adapters_are_taken(abi_train, base, tmp_path):
    words = ("--max-steps", "2", "--sample-tokens", "0", "--lora", "--lora-rank", "2", "--out", "r", "--lr", "0.01")
    code, _, err = abi_train("run", write_talks(tmp_path / "talks.jsonl"), "--base", "base", *words)
    assert code == 0, err
    assert ids_of(abi_train, "base", "--adapter", "r") == ids_of(abi_train, "r/adapter")


def test_another_tokenizer_beside_adapters_is_told(abi_train, base, tmp_path):
    (tmp_path / "one/chat_template.jinja").write_text("{{ messages }}")
    for path in base.glob("*token*.json"):
        (tmp_path / "one" / path.name).write_bytes(path.read_bytes())
    told = "adapter one comes with another tokenizer or chat template than the model; --tokenizer one takes it"
    code, _, err = abi_train("generate", "base", "--adapter", "one", *QUICK)
    assert code == 0
    assert told in err
    (tmp_path / "one/chat_template.jinja").unlink()
    place = tmp_path / "one/tokenizer.json"
    content = json.loads(place.read_text())
    content["decoder"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": False}
    place.write_text(json.dumps(content))  # as one that was a GGUF file's is: the same words, other entries
    code, _, err = abi_train("generate", "base", "--adapter", "one", *QUICK)
    assert (code, told in err) == (0, False)
    words = content["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    place.write_text(json.dumps(content))
    assert told in abi_train("generate", "base", "--adapter", "one", *QUICK)[2]


def test_what_holds_no_adapters_is_told(abi_train, base, tmp_path):
    (tmp_path / "talks.jsonl").write_text("{}\n")
    assert abi_train("export", "base", "--to", "gguf", "-o", "whole/base.gguf")[0] == 0
    for given, said in (
        ("talks.jsonl", "talks.jsonl is no file of adapters; give a folder, a run, or a GGUF file of some"),
        ("whole", "whole holds no adapters ("),
    ):
        code, _, err = abi_train("generate", "base", "--adapter", given, *QUICK)
        assert (code, said in err) == (1, True), err
    assert abi_train("export", "one", "--to", "gguf-adapter", "-o", "whole/one.gguf")[0] == 0
    code, _, err = abi_train("generate", "base", "--adapter", "whole", *QUICK)
    assert "whole is a directory of GGUF files; give one of them: whole/one.gguf" in err
    code, _, err = abi_train("run", "talks.jsonl", "--base", "whole/one.gguf", "--lora")
    assert (code, "abi-train merge BASE whole/one.gguf -o MERGED" in err) == (2, True)


@pytest.mark.parametrize("given", ["", "a="])
def test_an_empty_path_is_told(abi_train, base, given):
    code, _, err = abi_train("generate", "base", "--adapter", given, *QUICK)
    assert code == 2
    assert "'' is no path; give the name of a file or directory" in err


# -- on the base in another type ----------------------------------------------------------------------


@pytest.fixture
def types(base, tmp_path):
    """Return a wider base and adapters on it, and write it in other types beside it; and one of another seed."""
    folder = make_folder(tmp_path / "wide", family="llama", hidden_dim=256, intermediate_dim=256)
    make_adapter(tmp_path / "on-wide", folder)
    model = load_model(folder).model
    for kind in ("F16", "Q4_K_M"):
        model.write_gguf(tmp_path / f"{kind}.gguf", kind, check=False)
    model.save_pretrained(tmp_path / "bfloat16", "bfloat16")
    other = TrainableModel(model.config)
    other.companions = model.companions
    other.write_gguf(tmp_path / "other.gguf", "Q4_K_M", check=False)
    return folder


SAYS = "note: {} was trained on this model in {}, and here it is in {}"


def test_adapters_of_a_folder_on_its_gguf_file(abi_train, types, tmp_path):
    """With every verb; one line says it, and what is computed is the model of that type with these adapters."""
    lines = {"F16.gguf": "float16", "Q4_K_M.gguf": "q4_k and q6_k", "bfloat16": "bf16"}
    for place, kinds in lines.items():
        code, out, err = abi_train("generate", place, "--adapter", "on-wide", *QUICK)
        assert code == 0, err
        notes = [line for line in err.splitlines() if line.startswith("note")]
        assert notes == [SAYS.format("on-wide", "float32", kinds)]
        lora = LoraModel.load(FrozenModel.from_pretrained(tmp_path / place), tmp_path / "on-wide")
        wanted = generate(lora, [5, 9, 40, 7], 12, temperature=0)
        assert json.loads(out)["ids"] == list(wanted)
    said = SAYS.format("on-wide", "float32", "q4_k and q6_k")
    (tmp_path / "t.txt").write_text("1 plus 2 is 3, and 3 plus 3 is 6. " * 20)
    for words in (
        ("eval", "Q4_K_M.gguf", "--adapter", "on-wide", "t.txt"),
        ("chat", "Q4_K_M.gguf", "--adapter", "on-wide", "--once", "hi", "--max-new-tokens", "2"),
        ("merge", "Q4_K_M.gguf", "on-wide", "--to", "gguf", "-o", "merged.gguf"),
        ("export", "on-wide", "--base", "Q4_K_M.gguf", "--to", "gguf-adapter", "-o", "a.gguf"),
    ):
        code, _, err = abi_train(*words)
        assert code == 0, err
        assert err.splitlines().count(said) == 1, words
    assert open_gguf(tmp_path / "merged.gguf").tensors["blk.0.attn_q.weight"].kind.name == "Q4_K"
    code, _, err = abi_train("generate", "wide", "--adapter", "on-wide", *QUICK)
    assert (code, "was trained on" in err) == (0, False)


@pytest.mark.parametrize("form", ["peft", "gguf-adapter", "mlx-lm"])
def test_adapters_of_a_gguf_file_on_its_folder(abi_train, types, form):
    """The other way round, in the file of every program."""
    make_adapter(types.parent / "on-blocks", types.parent / "Q4_K_M.gguf")
    words = ("on-blocks", "--base", "Q4_K_M.gguf", "--to", form, "-o", "a.gguf")
    code, _, err = abi_train("export", *words)
    assert (code, err) == (0, ""), err
    code, _, err = abi_train("generate", "wide", "--adapter", "a.gguf", *QUICK)
    assert code == 0, err
    assert SAYS.format("a.gguf", "q4_k and q6_k", "float32") in err.splitlines()
    said = ids_of(abi_train, "other.gguf", "--adapter", "a.gguf", code=1)
    assert "trained on other weights than those in other.gguf (token_embedding and 10 more, further off than" in said


@pytest.mark.parametrize("form", ["peft", "gguf-adapter", "mlx-lm"])
def test_what_is_exported_on_another_type_says_what_it_was_trained_on(abi_train, types, form, tmp_path):
    """Not what it was put on meanwhile: on its own base nothing is to be said of it."""
    code, _, err = abi_train("export", "on-wide", "--base", "Q4_K_M.gguf", "--to", form, "-o", "a.gguf")
    assert code == 0, err
    assert base_facts_of(tmp_path / "a.gguf") == base_facts_of(tmp_path / "on-wide")
    for place, said in (("wide", False), ("Q4_K_M.gguf", True)):
        code, _, err = abi_train("generate", place, "--adapter", "a.gguf", *QUICK)
        assert code == 0, err
        assert (SAYS.format("a.gguf", "float32", "q4_k and q6_k") in err.splitlines()) == said
        assert ("was trained on" in err) == said


def test_trained_in_nf4_and_saved_on_blocks_they_go_on_the_same_blocks(types, tmp_path):
    """Until they are trained there: then it is these blocks that they were trained on."""
    blocks = tmp_path / "Q4_K_M.gguf"
    lora = LoraModel(FrozenModel.from_pretrained(types, storage="nf4"), LoraConfig(rank=2), types)
    lora.save(tmp_path / "on-nf4")
    on_blocks = load_model(tmp_path / "on-nf4", base=blocks, frozen=True).model
    on_blocks.save(tmp_path / "again")
    again = load_model(tmp_path / "again", base=blocks, frozen=True).model
    assert (again.model.storage, again.trained_in) == (None, "nf4")
    assert "in float32, and here it is in q4_k and q6_k" in again.other_type
    assert load_model(tmp_path / "again", base=types, frozen=True).model.model.storage == "nf4"

    ids = np.arange(8)[None]
    again.compute_loss(ids, ids, backward=True)
    assert (again.trained_in, again.other_type) == (None, "")
    again.save(tmp_path / "trained")
    assert base_facts_of(tmp_path / "trained") == again.model.identity.facts()
    assert load_model(tmp_path / "trained", base=blocks, frozen=True).notes == ()


def test_blocks_of_a_file_are_not_encoded_again(abi_train, types, tmp_path):
    """For adapters that were trained on the folder in NF4; on a file in halves they are on NF4, as on the folder."""
    lora = LoraModel(FrozenModel.from_pretrained(types, storage="nf4"), LoraConfig(rank=2), types)
    lora.parameters.weights_flat[:] = np.random.default_rng(1).normal(0, 0.4, lora.num_params())
    lora.save(tmp_path / "on-nf4")
    for place, storages in (("wide", "bf16 nf4"), ("F16.gguf", "nf4"), ("Q4_K_M.gguf", "q4_k q6_k")):
        model = load_model("on-nf4", base=place, frozen=True).model.model
        assert set(storages.split()) >= set(model.storages()) - {"float32", "float16"}, place
        code, _, err = abi_train("generate", place, "--adapter", "on-nf4", *QUICK)
        assert code == 0, err
        assert ("is encoded in nf4" in err) == (place != "Q4_K_M.gguf")
    code, _, err = abi_train("merge", "Q4_K_M.gguf", "on-nf4", "--merge-base", "dequant", "-o", "m")
    assert code == 2
    assert "Q4_K_M.gguf is the model in another type than on-nf4 was trained on; give --base" in err
    code, out, err = abi_train("merge", "Q4_K_M.gguf", "on-nf4", "-o", "m")
    assert code == 0, err
    assert "these are the original weights; they were trained on those in nf4" in out


def test_another_model_in_another_type_is_refused(abi_train, types, tmp_path):
    said = ids_of(abi_train, "other.gguf", "--adapter", "on-wide", code=1)
    assert "trained on other weights than those in other.gguf (token_embedding and " in said
    assert "further off than float32 and q6_k would explain); put these back" in said
    assert "trained on other weights than" in abi_train("merge", "other.gguf", "on-wide", "-o", "m")[2]
    assert not (tmp_path / "m").exists()


def test_adapters_without_a_fingerprint_are_held_against_their_digest(abi_train, types, tmp_path):
    """As those of earlier versions; those of other programs, without either, go on any base."""
    file = tmp_path / "on-wide/adapter_model.safetensors"
    said, tensors = read_metadata(file), read_safetensors(file)
    write_safetensors(file, tensors, {name: text for name, text in said.items() if name != BASE_FINGERPRINT})
    words = ("F16.gguf", "--adapter", "on-wide")
    assert "other weights than those in F16.gguf (another digest); put" in ids_of(abi_train, *words, code=1)
    assert ids_of(abi_train, "wide", "--adapter", "on-wide")
    write_safetensors(file, tensors, {**said, BASE_FINGERPRINT: "{}"})
    assert "one of the two has no" in ids_of(abi_train, *words, code=1)
    write_safetensors(file, tensors, {**said, BASE_FINGERPRINT: "?"})
    assert "on-wide: abi_py.base_fingerprint is not JSON" in ids_of(abi_train, *words, code=1)
    write_safetensors(file, tensors)
    assert ids_of(abi_train, "other.gguf", "--adapter", "on-wide")


# -- merged -------------------------------------------------------------------------------------------


def logits_off(out):
    """Return how far merged logits are from those of adapters beside the model, in per cent of their spread."""
    return float(re.search(r"; logits of 16 tokens ([\d.e-]+)% of their spread from the model's", out)[1])


def test_merge_takes_the_base_first(abi_train, base, tmp_path):
    (wanted,) = ids_of(abi_train, "one")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "base").rename(tmp_path / "elsewhere/base")
    code, out, err = abi_train("merge", "elsewhere/base", "one", "-o", "m")
    assert (code, err) == (0, ""), err
    assert logits_off(out) < 1e-3
    assert ids_of(abi_train, "m") == [wanted]
    code, out, err = abi_train("merge", "one", "--base", "elsewhere/base", "-o", "n")
    assert (code, err) == (0, ""), err
    assert (tmp_path / "n/model.safetensors").read_bytes() == (tmp_path / "m/model.safetensors").read_bytes()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_merge_writes_gguf(abi_train, family, tmp_path):
    """Also into a quantised base, in its own type, which stays as it is."""
    folder = make_folder(tmp_path / "b", family=family, hidden_dim=64, num_kv_heads=2, intermediate_dim=64)
    make_adapter(tmp_path / "a", folder)
    code, out, err = abi_train("merge", "b", "a", "--to", "gguf", "-o", "m.gguf")
    assert (code, err) == (0, ""), err
    assert "weights in F32, read again: as they were written" in out
    assert logits_off(out) < 1e-3
    assert ids_of(abi_train, "m.gguf") == ids_of(abi_train, "a")
    assert abi_train("export", "b", "--to", "gguf", "--quantize", "Q8_0", "-o", "q.gguf")[0] == 0
    before = (tmp_path / "q.gguf").read_bytes()
    make_adapter(tmp_path / "on-q", tmp_path / "q.gguf")
    code, out, err = abi_train("merge", "q.gguf", "on-q", "--format", "gguf", "-o", "mq.gguf")
    assert (code, err) == (0, ""), err
    assert "weights in Q8_0, read again: they lost Q8_0 0." in out
    assert (tmp_path / "q.gguf").read_bytes() == before
    assert abi_train("merge", "q.gguf", "on-q", "--quantize", "F16", "-o", "mh.gguf")[0] == 0
    assert open_gguf(tmp_path / "mh.gguf").metadata["general.file_type"] == 1
    assert abi_train("merge", "q.gguf", "on-q", "-o", "mf")[0] == 0  # its numbers, decoded
    assert ids_of(abi_train, "mf") == ids_of(abi_train, "q.gguf", "--adapter", "on-q", "--no-integer-products")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["base", "one", "--base", "base", "-o", "m"], "base (base) must not be given twice"),
        (["base", "one", "--to", "hf", "--quantize", "F16", "-o", "m"], "quantize (F16) acts only with --format gguf"),
        (["base", "one", "--to", "gguf", "--dtype", "float16", "-o", "m"], "dtype (float16) has no effect on gguf"),
        (["base", "one", "--to", "peft", "-o", "m"], "'peft' is not one of 'hf', 'gguf'"),
        (["base", "base", "-o", "m"], "base is a whole model, not adapters"),
        (["base", "one", "--quantize", "Q9", "-o", "m"], "Q9"),
    ],
)
def test_calls_of_merge_that_cannot_be(abi_train, base, words, said, tmp_path):
    code, _, err = abi_train("merge", *words)
    assert code == 2, err
    assert said in err
    assert not (tmp_path / "m").exists()
