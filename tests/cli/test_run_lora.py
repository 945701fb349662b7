"""`run --lora`: adapters on a frozen base, what resumes them, what they leave."""

import json
import shutil

import numpy as np
import pytest
import yaml
from world import make_folder, write_talks

from abi_py.data.tokenizer import Tokenizer
from abi_py.formats.safetensors import read_safetensors, write_safetensors
from abi_py.model import LoraModel
from abi_py.training.checkpoint import list_checkpoints
from abi_py.training.loading import load_model

MIXTURES = ("mixtral", "qwen3_moe")
QUICK = ["--max-seq-len", "16", "--corpus-bytes", "3000", "--sample-tokens", "0"]
LORA = ["--lora-rank", "4", "--lora-targets", "q,v_proj", "--lora-dropout", "0.1", "--learning-rate", "0.01"]


@pytest.fixture
def base(abi_train, tiny, tmp_path):
    """Train a small model of bytes; return its run."""
    assert abi_train("run", *tiny, "--out", "base")[0] == 0
    return tmp_path / "base"


def trained(abi_train, *words):
    code, out, err = abi_train(*words)
    assert (code, err) == (0, ""), err
    return out


def weights(run, step):
    return read_safetensors(run / f"checkpoints/llm_step_{step}/adapter_model.safetensors")


def test_adapters_are_trained_and_go_on_to_the_same_bits(abi_train, base, tmp_path):
    run = ("run", "--base", base, *QUICK, *LORA, "--lr-schedule", "constant")
    out = trained(abi_train, *run, "--epochs", "2", "--out", "whole")
    assert "lora     224 trained parameters, 3.93 % of 5,696 (rank 4: q_proj, v_proj)" in out
    assert "its weights stay as they are, learning rate 0.01" in out
    listed = out[: out.index("step 0")]  # before the first step
    assert ["layers.0.w_q.b", "(16,", "4)", "64"] in [line.replace("│", " ").split() for line in listed.splitlines()]
    assert "step 0: validation loss" in out
    assert f"the adapters need {base}/model as it is; before that run is trained further, copy it" in out
    config = yaml.safe_load((tmp_path / "whole/config.yaml").read_text())
    assert {**config["lora"], "target_modules": ["q_proj", "v_proj"]} == config["lora"]
    assert (config["lora"]["rank"], config["lora"]["enabled"]) == (4, True)
    assert config["training"]["weight_decay"] == 0

    trained(abi_train, *run, "--epochs", "1", "--out", "parts")
    out = trained(abi_train, "resume", "parts", "--epochs", "2")
    assert "lora     224 trained" in out
    one, other = weights(tmp_path / "whole", 46), weights(tmp_path / "parts", 46)
    assert {name: array.shape for name, array in one.items()} == {name: array.shape for name, array in other.items()}
    assert all(np.array_equal(one[name], other[name]) for name in one)
    assert any(array.any() for name, array in one.items() if "lora_B" in name)


def test_what_is_trained_whole_is_counted_saved_and_gone_on_with(abi_train, base, tmp_path):
    """Patterns, and copies of a tied embedding and of norms: in the dry run, the files, resume, merge and chat."""
    chosen = ("--lora-targets", ".*(q|down)_proj", "--lora-rank-pattern", "q=3", "--lora-alpha-pattern", "q=9")
    whole = ("--lora-modules-to-save", "lm_head,norm", "--lora-rank", "4", "--learning-rate", "0.01")
    run = ("run", "--base", base, *QUICK, *chosen, *whole, "--lr-schedule", "constant")
    out = trained(abi_train, *run, "--dry-run", "--out", "whole")
    shape = load_model(base).model.config
    copies = shape.vocab_size * shape.hidden_dim + 3 * shape.hidden_dim
    assert f"(rank 3, 4: q_proj, down_proj); {copies:,} of them in 4 tensors trained whole" in out
    assert "output_proj" in out
    assert "layers.0.ffn_norm" in out
    trained(abi_train, *run, "--epochs", "2", "--out", "whole")
    config = yaml.safe_load((tmp_path / "whole/config.yaml").read_text())["lora"]
    assert (config["rank_pattern"], config["modules_to_save"]) == (["q_proj=3"], ["lm_head", "norm"])
    content = json.loads((tmp_path / "whole/adapter/adapter_config.json").read_text())
    assert (content["rank_pattern"], content["alpha_pattern"]) == ({"q_proj": 3}, {"q_proj": 9})
    assert "base_model.model.lm_head.weight" in read_safetensors(tmp_path / "whole/adapter/adapter_model.safetensors")
    trained(abi_train, *run, "--epochs", "1", "--out", "parts")
    trained(abi_train, "resume", "parts", "--epochs", "2")
    one, other = weights(tmp_path / "whole", 46), weights(tmp_path / "parts", 46)
    assert all(np.array_equal(one[name], other[name]) for name in one)
    assert written(abi_train, "whole") == written(abi_train, "whole/adapter") == written(abi_train, "parts/model")
    merged = json.loads((tmp_path / "whole/model/config.json").read_text())
    assert merged["tie_word_embeddings"] is False
    assert load_model(base).model.config.tie_embeddings
    trained(abi_train, "run", "--base", "whole", *QUICK, "--lora", "--epochs", "1", "--out", "further")
    card = (tmp_path / "whole/model/README.md").read_text()
    assert "Only adapters of rank 4 (q_proj=3) and all of lm_head, norm were trained (LoRA)" in card
    said = refused(abi_train, "resume", "whole", "--epochs", "3", "--lora-rank-pattern", "q=2")
    assert "rank_pattern (q_proj=2) of lora must stay q_proj=3" in said


def test_what_makes_other_adapters_is_refused_by_name(abi_train, base):
    trained(abi_train, "run", "--base", base, *QUICK, *LORA, "--epochs", "1", "--out", "r")
    for words, said in (
        (("--lora-rank", "8"), "rank (8) of lora must stay 4"),
        (("--lora-alpha", "8"), "alpha (8.0) of lora must stay 16.0"),
        (("--lora-targets", "q"), "target_modules (q_proj) of lora must stay q_proj, v_proj"),
        (("--lora-dropout", "0.2"), "dropout (0.2) of lora must stay 0.1"),
        (("--lora-seed", "1"), "seed (1) of lora must stay 0"),
        (("--no-lora",), "enabled (false) of lora has no effect: this run trains adapters"),
    ):
        code, _, err = abi_train("resume", "r", "--epochs", "2", *words)
        assert (code, said in err) == (2, True), err
    code, _, err = abi_train("resume", base, "--epochs", "3", "--lora")
    assert code == 2
    assert "this run trains all weights; begin another run for that: abi-train run --base RUN --lora" in err
    trained(abi_train, "resume", "r", "--epochs", "2", "--lora", "--lora-targets", "v,q")


def test_adapters_on_random_weights_are_warned_of(abi_train, tiny):
    out = trained(abi_train, "run", *tiny, "--lora", "--out", "r")
    assert "warning  the frozen weights are random, so adapters can do little; --base names a trained model" in out


@pytest.mark.parametrize(
    "words",
    [
        ("--mixed-precision", "bf16"),
        ("--mixed-precision", "fp16"),
    ],
)
def test_other_ways_of_training_train_adapters(abi_train, base, tmp_path, words):
    trained(abi_train, "run", "--base", base, *QUICK, "--lora-rank", "2", "--epochs", "1", "--out", "r", *words)
    newest = list_checkpoints(tmp_path / "r/checkpoints")[-1][0]
    assert newest > 0
    halves = read_safetensors(tmp_path / "r/adapter/adapter_model.safetensors")
    assert all(np.isfinite(array).all() for array in halves.values())
    assert any(array.any() for name, array in halves.items() if "lora_B" in name)


def test_muon_trains_no_adapters(abi_train, base, tmp_path):
    said = refused(abi_train, "run", "--base", base, *QUICK, "--lora", "--optimizer", "muon", "--out", "r")
    assert "optimizer (muon) is for hidden matrices, and an adapter is half of one; take adamw" in said
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_dry_run_counts_what_is_trained_and_what_is_read(abi_train, base, tmp_path, dtype):
    assert abi_train("export", "base", "-o", "folder", "--dtype", dtype)[0] == 0
    from abi_py.runs.plan import memory_by_part, trained_tensors
    from abi_py.runs.resolve import Given

    flags = {"base": {"path": "folder"}, "lora": {"rank": 4, "dropout": 0.1}, "training": {"max_seq_len": 16}}
    given = Given({**flags, "data": {"corpus_bytes": 3000}}, {})
    run = given.resolve(given.open_data(), tmp_path / "r")
    model, parts = run.make_model(), memory_by_part(run)
    assert sum(tensor.size for tensor in trained_tensors(run.config)) == model.num_params()
    plan = model.memory_plan(run.config.training.batch_size, 16)
    assert parts["frozen weights"] + parts["adapters"] == plan["weights"]
    assert parts["adapters"] == 4 * model.num_params()
    assert {**plan, **parts}.items() >= plan.items()  # the other parts are the same
    out = trained(abi_train, "run", "--base", "folder", *QUICK, "--lora-rank", "4", "--dry-run")
    assert f"lora     {model.num_params()} trained parameters" in out
    assert "layers.0.w_q.a" in out
    assert "frozen weights" in out


# -- what a run leaves, and who reads it ------------------------------------------------------------


@pytest.fixture
def left(abi_train, base, tmp_path):
    """Train adapters on a base for an epoch; return the run."""
    words = ("--lora-rank", "4", "--learning-rate", "0.05", "--epochs", "1")
    trained(abi_train, "run", "--base", "base", *QUICK, *words, "--out", "r")
    return tmp_path / "r"


DRAWN = ("--prompt", "The ", "--max-new-tokens", "12", "--temperature", "1", "--seed", "3", "--json")


def written(abi_train, path, *more):
    code, out, err = abi_train("generate", path, *more, *DRAWN)
    assert code == 0, err
    return json.loads(out)["ids"]


def refused(abi_train, *words):
    code, _, err = abi_train(*words)
    assert code in (1, 2)
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


def test_a_run_leaves_adapters_and_a_merged_model(abi_train, base, left, tmp_path):
    adapters = json.loads((left / "adapter/adapter_config.json").read_text())
    assert adapters["base_model_name_or_path"] == str(base / "model")
    loaded = load_model(left / "adapter")
    merged = load_model(left / "model").model
    assert merged.collect_weights().tobytes() == loaded.model.merged().collect_weights().tobytes()
    assert merged.collect_weights().tobytes() != load_model(base).model.collect_weights().tobytes()
    newest = list_checkpoints(left / "checkpoints")[-1][1]
    ids = [written(abi_train, place) for place in (left, left / "model", left / "adapter", newest)]
    assert ids[1:] == ids[:-1]
    companions = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
    for place in (left / "adapter", newest):  # a whole folder but for the weights of the base
        assert [(place / name).read_text() for name in companions] == [
            (left / "model" / name).read_text() for name in companions
        ]
    trained(abi_train, "resume", left, "--epochs", "2")
    newest = list_checkpoints(left / "checkpoints")[-1][1]
    assert (newest / "generation_config.json").read_text() == (left / "model/generation_config.json").read_text()
    assert ids[0] != written(abi_train, base)


def test_merge_writes_what_the_run_left(abi_train, base, left, tmp_path):
    newest = list_checkpoints(left / "checkpoints")[-1][1]
    for number, source in enumerate(((left,), (left, "--best"), (left / "adapter", "--base", base), (newest,))):
        out = trained(abi_train, "merge", *source, "-o", f"m{number}", "--max-shard-size", "5MB")
        assert "adapters are merged into the weights" in out
        assert "read again: as they were written" in out
        made = (tmp_path / f"m{number}/model.safetensors").read_bytes()
        assert made == (left / "model/model.safetensors").read_bytes()
    trained(abi_train, "merge", left, "--last", "-o", "m0", "--dtype", "bfloat16", "--force")
    assert json.loads((tmp_path / "m0/config.json").read_text())["dtype"] == "bfloat16"
    for words, said in (
        ((left, "-o", "m1"), "out (m1) is there already; --force replaces it"),
        ((base, "-o", "new"), "is a whole model, and has no adapters; abi-train export"),
        ((newest, "-o", "new", "--base", "m1"), "holds adapters that were trained on other weights than those in m1"),
        ((left / "adapter", "-o", "new", "--base", left / "adapter"), "but holds adapters itself; merge them into"),
        ((left / "adapter", "-o", base, "--force"), "must be another place than that of the base under the adapters"),
    ):
        assert said in refused(abi_train, "merge", *words)
    assert not (tmp_path / "new").exists()
    trained(abi_train, "export", left, "--to", "peft", "-o", "peft")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "peft" / name).read_bytes() == (left / "adapter" / name).read_bytes()
    assert "has no adapters" in refused(abi_train, "export", base, "--to", "peft", "-o", "new")
    assert "must be float32 for peft" in refused(
        abi_train, "export", left, "--to", "peft", "--dtype", "float16", "-o", "new"
    )


def test_a_base_is_known_by_its_digest_wherever_it_is(abi_train, base, left, tmp_path):
    base.rename(tmp_path / "moved")
    said = refused(abi_train, "generate", left / "adapter")
    assert "is not there; put it back, or say where it is: abi-train merge" in said
    again = ("resume", left, "--epochs", "2")
    assert f"does not exist; say where it is: abi-train resume {left} --base FOLDER" in refused(abi_train, *again)
    trained(abi_train, "run", "--base", "moved", *QUICK, "--epochs", "1", "--out", "other")
    said = refused(abi_train, *again, "--base", "other")
    assert "these are other weights, as of a run that was trained further; say where it is: abi-train resume" in said
    assert "digest (00000000) has no effect" in refused(abi_train, *again, "--base-digest", "00000000")
    trained(abi_train, *again, "--base", "moved")
    recorded = yaml.safe_load((left / "config.yaml").read_text())["base"]["path"]
    assert recorded == str(tmp_path / "moved")
    first = left / "checkpoints/llm_step_0"  # names the old place; its run knows the new one
    assert load_model(first).model.base_model == str(tmp_path / "moved/model")
    # In place of the base, another model of its shape:
    (tmp_path / "moved").rename(tmp_path / "kept")
    (tmp_path / "other").rename(tmp_path / "moved")
    assert "trained on other weights than those in" in refused(abi_train, "generate", first)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_are_not_put_on_what_their_base_became(abi_train, base, tmp_path, dtype):
    """In every place and form that the run's adapters are in; those of PEFT, which do not say it, go on any base."""
    trained(abi_train, "export", "base", "-o", "folder", "--dtype", dtype)
    words = ("--lora-rank", "4", "--learning-rate", "0.05", "--epochs", "1")
    trained(abi_train, "run", "--base", "folder", *QUICK, *words, "--out", "r")
    trained(abi_train, "export", "r", "--to", "peft", "-o", "peft")
    for place in ("r/adapter", "peft"):
        trained(abi_train, "merge", place, "-o", "m", "--force")
        assert load_model(place).model.merged().collect_weights().any()
    trained(abi_train, "resume", "base", "--epochs", "3")
    trained(abi_train, "export", "base", "-o", "folder", "--dtype", dtype, "--force")
    for verb in (
        ("merge", "r", "-o", "new"),
        ("merge", "r/adapter", "-o", "new"),
        ("merge", "r/adapter", "--base", "base", "-o", "new"),
        ("generate", "r/adapter"),
        ("generate", "peft"),
        ("export", "r", "--to", "peft", "-o", "new"),
    ):
        assert "holds adapters that were trained on other weights than those in " in refused(abi_train, *verb)
    assert not (tmp_path / "new").exists()
    trained(abi_train, "export", "r", "-o", "whole")  # RUN/model needs no base
    tensors = read_safetensors(tmp_path / "peft/adapter_model.safetensors")
    write_safetensors(tmp_path / "peft/adapter_model.safetensors", tensors)
    trained(abi_train, "merge", "peft", "-o", "new")


def test_adapters_go_on_what_adapters_made(abi_train, left, tmp_path):
    words = ("--lora-rank", "2", "--learning-rate", "0.05", "--epochs", "1")
    trained(abi_train, "run", "--base", left, *QUICK, *words, "--out", "second")
    adapters = json.loads((tmp_path / "second/adapter/adapter_config.json").read_text())
    assert adapters["base_model_name_or_path"] == str(left / "model")
    under = load_model(left / "model").model.collect_weights()
    assert load_model(tmp_path / "second/adapter").model.model.collect_weights().tobytes() == under.tobytes()
    assert "holds adapters, not a whole model; merge them first: abi-train merge" in refused(
        abi_train, "run", "--base", left / "adapter", *QUICK, "--out", "third"
    )


def test_adapters_on_random_weights_are_read_from_the_seed(abi_train, tiny, tmp_path):
    trained(abi_train, "run", *tiny, "--lora", "--learning-rate", "0.05", "--model-seed", "3", "--out", "r")
    newest = list_checkpoints(tmp_path / "r/checkpoints")[-1][1]
    ids = [written(abi_train, place) for place in ("r/model", "r/adapter", newest)]
    assert ids[1:] == ids[:-1]
    settings = (newest / "config.yaml").read_text()
    assert "  seed: 3" in settings
    # What it left is whole: it makes the same weights wherever it is, and says so where they cannot be made.
    out = trained(abi_train, "export", "r", "--to", "peft", "-o", "peft")
    assert "PEFT:" not in out  # which has no base to open
    shutil.copytree(tmp_path / "r/adapter", tmp_path / "copied")
    assert [written(abi_train, place) for place in ("peft", "copied")] == ids[:2]
    trained(abi_train, "merge", "copied", "-o", "merged")
    whole = (tmp_path / "merged/model.safetensors").read_bytes()
    assert whole == (tmp_path / "r/model/model.safetensors").read_bytes()
    assert "random weights, made again from their seed" in trained(abi_train, "inspect", "copied")
    base = tmp_path / "copied/random_base.json"
    base.write_text(base.read_text().replace('"seed": 3', '"seed": 4'))
    said = refused(abi_train, "generate", "copied")
    assert "trained on other weights than the random weights of its shape and seed" in said
    base.unlink()
    assert "names no model that they are of" in refused(abi_train, "generate", "copied")
    trained(abi_train, "resume", "r", "--epochs", "3")  # and takes its place again
    assert written(abi_train, "r") == written(abi_train, "r/adapter")


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        *((family, dtype) for family in ("gpt2", "qwen3_moe", "gemma3") for dtype in ("float32", "bfloat16")),
        *((family, "float32") for family in ("mistral", "mixtral", "qwen3")),
    ],
)
def test_every_kind_of_family_has_adapters(abi_train, tmp_path, family, dtype):
    """Of conversations, on a folder with a tokenizer: adapter and model carry it."""
    write_talks(tmp_path / "talks.jsonl")
    make_folder(tmp_path / "float32", family=family)
    trained(abi_train, "export", "float32", "-o", "base", "--dtype", dtype)
    out = trained(
        abi_train,
        *("run", "--base", "base", "--data", "talks.jsonl", "--lora-rank", "2"),
        *(() if family in MIXTURES else ("--lora-dropout", "0.1")),
        *("--batch-size", "4", "--epochs", "1", "--learning-rate", "0.02", "--sample-tokens", "0", "--out", "r"),
    )
    assert "get no adapters" not in out
    assert ("mlp.gate.weight, mlp.experts.gate_up_proj, mlp.experts.down_proj" in out) == (family in MIXTURES)
    trained(abi_train, "resume", "r", "--epochs", "2")
    written(abi_train, "r/adapter")
    own = Tokenizer.load(tmp_path / "base")
    newest = list_checkpoints(tmp_path / "r/checkpoints")[-1][1]
    manner = (tmp_path / "r/model/generation_config.json").read_text()
    assert (newest / "README.md").is_file()
    for place in ("adapter", "model", newest):
        assert (tmp_path / "r" / place / "generation_config.json").read_text() == manner
        made = Tokenizer.load(tmp_path / "r" / place)
        assert (made.hash, made.chat_template) == (own.hash, own.chat_template)
    adapted, merged = load_model(tmp_path / "r/adapter").model, load_model(tmp_path / "r/model").model
    assert isinstance(adapted, LoraModel)
    ids = np.arange(12)[None]
    assert np.allclose(adapted.forward(ids), merged.forward(ids), atol=1e-4)
    expected = any(array.any() for name, array in adapted.weights.items() if name.endswith(".b"))
    assert expected, "no adapter was trained"


def test_an_adapter_that_nothing_reads_is_named(abi_train, base, tmp_path):
    """In a dry run, too: it measures some steps."""
    folder = tmp_path / "base/model"
    weights, last = dict(read_safetensors(folder / "model.safetensors")), "model.layers.0.self_attn.o_proj.weight"
    weights[last] = np.zeros_like(weights[last])
    write_safetensors(folder / "model.safetensors", weights, {"format": "pt"})
    words = ("run", "--base", folder, *QUICK, "--lora-targets", "q,up")
    for more in (["--dry-run"], ["--out", "r"]):
        code, _, err = abi_train(*words, *more)
        assert code == 2
        assert "error: layers.0.w_q: no gradient in 2 steps, so this has no effect on the loss; leave out of" in err


@pytest.mark.parametrize(
    ("targets", "vectors", "tensor", "elsewhere"),
    [
        ("all-linear", 7, "layers.0.w_down.m", ""),
        ("v,embed_tokens,lm_head", 3, "token_embedding.m", "one matrix for embedding and head"),
    ],
)
def test_lengths_are_trained_and_gone_on_with(abi_train, base, tmp_path, targets, vectors, tensor, elsewhere):
    """The same bits after resume, merged weights compute what adapters do; other programs have no place for them."""
    run = ("run", "--base", base, *QUICK, "--lora-rank", "4", "--dora", "--learning-rate", "0.01")
    run += ("--lr-schedule", "constant", "--lora-dropout", "0.1", "--lora-targets", targets)
    out = trained(abi_train, *run, "--epochs", "2", "--out", "whole")
    assert "with lengths of rows (DoRA)" in out
    assert tensor in out
    trained(abi_train, *run, "--epochs", "1", "--out", "half")
    trained(abi_train, "resume", "half", "--epochs", "2")
    one, other = (
        read_safetensors(list_checkpoints(tmp_path / run / "checkpoints")[-1][1] / "adapter_model.safetensors")
        for run in ("whole", "half")
    )
    assert all(np.array_equal(one[name], other[name]) for name in one)
    assert sum(name.endswith("lora_magnitude_vector") for name in one) == vectors
    ids = np.arange(9)[None] % 250
    adapted, merged = (load_model(tmp_path / place).model for place in ("whole/adapter", "whole/model"))
    assert np.abs(adapted.forward(ids) - merged.forward(ids)).max() < 1e-4
    code, _, err = abi_train("export", "whole", "--format", "gguf-adapter", "-o", "elsewhere")
    assert code == 2
    assert "holds adapters alone, and lengths of rows are trained (use_dora)" in err
    code, _, err = abi_train("export", "whole", "--format", "mlx-lm", "-o", "mlx")
    assert (code, elsewhere in err) == ((2, True) if elsewhere else (0, True)), err
    if not elsewhere:
        theirs = load_model(tmp_path / "mlx").model
        assert np.abs(theirs.forward(ids) - adapted.forward(ids)).max() < 1e-5


def test_experts(abi_train, tmp_path):
    """Adapters on experts in the dry run, a run, resume, what is left, merge, inspect; where they have no place."""
    folder = make_folder(tmp_path / "mixture", family="mixtral", num_layers=2)
    data = write_talks(tmp_path / "talks.jsonl")
    stacks = "mlp.experts.gate_up_proj,mlp.experts.down_proj"
    quick = ("--data", data, "--max-seq-len", "64", "--batch-size", "4", "--sample-tokens", "0")
    chosen = ("--lora-targets", "q", "--lora-target-parameters", stacks, "--lora-rank", "2")
    run = ("run", "--base", folder, *quick, *chosen)
    out = trained(abi_train, *run, "--dry-run", "--out", "whole")
    assert "(rank 2: q_proj, mlp.experts.gate_up_proj, mlp.experts.down_proj)" in out
    assert "routers get no adapters" in out
    assert "layers.0-1.experts_gate_up.a" in out
    run = (*run, "--lr-schedule", "constant", "--learning-rate", "0.01")
    trained(abi_train, *run, "--epochs", "2", "--out", "whole")
    trained(abi_train, *run, "--epochs", "1", "--out", "parts")
    trained(abi_train, "resume", "parts", "--epochs", "2")
    places = (tmp_path / run / "adapter/adapter_model.safetensors" for run in ("whole", "parts"))
    one, other = map(read_safetensors, places)
    assert all(np.array_equal(one[name], other[name]) for name in one)
    name = "base_model.model.model.layers.1.mlp.experts.base_layer.lora_B.weight"
    assert one[name].any()
    assert written(abi_train, "whole") == written(abi_train, "whole/adapter")
    trained(abi_train, "merge", "whole/adapter", "-o", "merged")
    assert written(abi_train, "merged") == written(abi_train, "whole")
    trained(abi_train, "merge", "whole/adapter", "--to", "gguf", "-o", "merged.gguf")
    ids = np.arange(5, 15)[None]
    found = [load_model(tmp_path / each).model.forward(ids) for each in ("whole/adapter", "merged", "merged.gguf")]
    assert max(np.abs(each - found[0]).max() for each in found) < 1e-4
    trained(abi_train, "export", "whole", "--format", "peft", "-o", "peft")
    assert "mlp.experts.down_proj" in trained(abi_train, "inspect", "peft")
    trained(abi_train, "export", "whole", "--format", "gguf-adapter", "-o", "a.gguf")
    assert written(abi_train, "mixture", "--adapter", "a.gguf") == written(abi_train, "whole")
    said = refused(abi_train, "resume", "whole", "--epochs", "3", "--lora-target-parameters", "experts.down_proj")
    assert "target_parameters (experts.down_proj) of lora must stay mlp.experts.gate_up_proj, mlp.exp" in said
    for wrong, why in (("experts.up_proj", "try mlp.gate.weight, mlp.experts.gate_up_proj"), ("gate.bias", "no such")):
        said = refused(abi_train, "run", "--base", folder, *quick, "--lora-target-parameters", wrong, "--out", "x")
        assert why in said


def test_routers(abi_train, tmp_path):
    """Named as a module or as a parameter, a router alone is trained; dropout and DoRA are refused, with a way out."""
    folder = make_folder(tmp_path / "mixture", family="qwen3_moe", num_layers=2)
    quick = ("run", "--base", folder, "--data", write_talks(tmp_path / "talks.jsonl"), "--max-seq-len", "64")
    quick += ("--batch-size", "4", "--sample-tokens", "0", "--lora-rank", "2", "--learning-rate", "0.01")
    out = trained(abi_train, *quick, "--lora-target-parameters", "gate.weight", "--epochs", "1", "--out", "r")
    assert "experts get no adapters" in out
    one = read_safetensors(tmp_path / "r/adapter/adapter_model.safetensors")
    name = "base_model.model.model.layers.1.mlp.gate.lora_"
    assert one[f"{name}B.weight"].any()
    assert len(one) == 4
    assert written(abi_train, "r") == written(abi_train, "r/adapter")
    out = trained(abi_train, *quick, "--lora-targets", "q,mlp.gate", "--epochs", "1", "--out", "s")
    assert "(rank 2: q_proj, mlp.gate.weight)" in out
    for option in ("--lora-dropout=0.1", "--dora"):
        said = refused(abi_train, *quick, option, "--out", "x")
        assert "where target_modules mean experts or routers (model.layers.0.mlp.gate.weight)" in said
        trained(abi_train, *quick, option, "--lora-targets", "q,k,v,o", "--dry-run", "--out", "x")


def test_adapters_that_learned_nothing_are_said_to_be_as_they_began(abi_train, base, tmp_path):
    """A rate far too high: the best evaluation is the one before training, whose adapters are zeros."""
    wild = ("--learning-rate", "30", "--max-grad-norm", "0", "--max-steps", "4")
    run = ("run", "--base", base, *QUICK, *LORA[:4], *wild)
    said = "no evaluation was better than before training: what is left is as it began"
    out = trained(abi_train, *run, "--out", "r")
    assert f"warning  {said}" in out
    assert "r/model: step 0 of 4, the best by validation loss" in out
    assert json.loads((tmp_path / "r/report.json").read_text())["warnings"] == [said]
    card = "No evaluation was better than before training: these weights are as the run began.\n\n| | |"
    assert card in (tmp_path / "r/model/README.md").read_text()
    trained(abi_train, *run, "--which", "last", "--out", "last")
    card = "No evaluation was better than before training, by the loss on what was kept for validation.\n"
    assert card in (tmp_path / "last/model/README.md").read_text()
    trained(abi_train, "run", "--base", base, *QUICK, *LORA[:4], "--max-steps", "4", "--out", "better")
    assert "No evaluation was better" not in (tmp_path / "better/model/README.md").read_text()
    left = read_safetensors(tmp_path / "r/adapter/adapter_model.safetensors")
    assert not any(array.any() for name, array in left.items() if "lora_B" in name)
    out = trained(abi_train, "resume", "r", "--which", "last")
    assert said not in out


def test_a_folder_that_no_run_replaces_need_not_be_copied(abi_train, base, tmp_path):
    """An exported folder says of which step it is, and stays as it is all the same; RUN/model by itself does not."""
    trained(abi_train, "export", base, "-o", "folder")
    for name, noted in (("folder", False), ("base/model", True)):
        out = trained(abi_train, "run", "--base", name, *QUICK, *LORA, "--max-steps", "1", "--out", f"on-{noted}")
        assert "from     step" in out
        assert ("before that run is trained further" in out) is noted


@pytest.mark.parametrize(("own", "other"), [("adamw_8bit", "adamw"), ("adamw", "adamw_8bit"), ("adamw", "sgd")])
def test_another_optimizer_is_refused_by_name_before_data_are_read(abi_train, tmp_path, tiny, own, other):
    trained(abi_train, "run", *tiny, "--max-steps", "2", "--optimizer", own, "--out", "r")
    code, out, err = abi_train("resume", "r", "--max-steps", "4", "--optimizer", other)
    assert code == 2
    assert f"optimizer ({other}) must stay {own}, whose moments the checkpoint holds" in err
    assert "data" not in out
