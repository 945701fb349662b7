"""A DeepZig run: settings have their effect, the best weights are taken, a stopped run goes on, the folder is right."""

import dataclasses
import json
import os
import re

import numpy as np
import pytest

from abi_py.cli import main
from abi_py.config import LlmTrainingConfig, TrainableModelConfig
from abi_py.errors import ConfigError, DataError
from abi_py.families import write_config
from abi_py.formats.deepzig import deepzig_config, generation_config
from abi_py.formats.safetensors import read_safetensors
from abi_py.generation import Generator
from abi_py.model.presets import PRESETS
from abi_py.pipelines import DeepZigConfig, DeepZigRun, train_deepzig
from abi_py.pipelines.deepzig import check_free, finish, load_run_config
from abi_py.pipelines.deepzig_config import SIZES
from abi_py.pipelines.training_args import training_args
from abi_py.training.loading import load_model
from abi_py.training.schedule import learning_rate
from abi_py.training.stop import GracefulStop
from abi_py.training.trainer import LlamaTrainer

SMALL = {"max_samples": 20, "epochs": 1, "batch_size": 4, "num_threads": 1}
STATE_KEYS = {
    *("best_global_step", "best_metric", "best_model_checkpoint", "epoch", "eval_steps", "global_step"),
    *("is_hyper_param_search", "is_local_process_zero", "is_world_process_zero", "log_history", "logging_steps"),
    *("max_steps", "num_input_tokens_seen", "num_train_epochs", "save_steps", "stateful_callbacks", "total_flos"),
    *("train_batch_size", "trial_name", "trial_params"),
}


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture
def config(tmp_path):
    """Return a function that makes settings of a run of a second in tmp_path/NAME."""
    return lambda name="model", **changes: DeepZigConfig.from_dict(
        {**SMALL, "output_dir": str(tmp_path / name), **changes}
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return the folder of a small finished run: 18 conversations trained on, 2 kept."""
    folder = tmp_path_factory.mktemp("finished") / "model"
    train_deepzig(DeepZigConfig(output_dir=str(folder), eval_steps=2, logging_steps=2, **SMALL))
    return folder


def rows_file(path, count, word="alpha"):
    rows = [{"instruction": f"Say {word} {i}", "response": f"{word} {i}, as you wish"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# -- settings ----------------------------------------------------------------------------------


# The training arguments of the original's script for the conversational model ("seed") and of its later one with sizes.
ORIGINAL = """
                         seed    test   small  medium  large
learning_rate            2e-4    5e-4   2e-4   1e-4    5e-5
grad_accum_steps         4       1      2      4       8
warmup_ratio             0.03    0      0.03   0.1     0.1
weight_decay             0.01    0      0.01   0.01    0.01
max_grad_norm            1       0.5    1      1       1
beta2                    0.999   0.95   0.95   0.95    0.95
logging_steps            25      5      10     25      50
save_steps               500     50     100    250     500
eval_steps               500     25     50     125     250
save_total_limit         3       2      2      2       2
gradient_checkpointing   1       0      0      1       1
max_samples              20000   200    1000   10000   10000
epochs                   3       3      3      3       5
batch_size               4       4      4      2       1
"""


def test_sizes_are_those_of_the_original(tmp_path):
    data = str(rows_file(tmp_path / "rows.jsonl", 3))
    (_, *sizes), *rows = [line.split() for line in f"name {ORIGINAL.strip()}".splitlines()]
    for place, size in enumerate(sizes):
        resolved = DeepZigConfig(model_size=size, data=(data,)).resolved()
        expected = {name: float(values[place]) for name, *values in rows}
        assert {name: getattr(resolved, name) for name in expected} == expected
        assert SIZES[size].keys() == expected.keys()
    assert SIZES.keys() == {*sizes}
    assert DeepZigConfig().resolved().output_dir == "deepzig-test-model"
    assert DeepZigConfig(model_size="seed").resolved().output_dir == "deepzig-conversational-model"
    defaults = DeepZigConfig()
    assert (defaults.use_lora, defaults.lora_rank, defaults.eval_split, defaults.loss_on) == (
        False, 16, 0.1, "assistant"
    )  # fmt: skip


def test_shipped_data_bring_their_own_settings_and_flags_beat_them():
    assert DeepZigConfig().resolved().epochs == 30
    assert DeepZigConfig(epochs=2).resolved().epochs == 2
    assert DeepZigConfig(model_size="small").resolved().learning_rate == pytest.approx(1e-3)


def test_training_settings(config, tmp_path):
    run = DeepZigRun.prepare(config(epochs=3, warmup_ratio=0.3, grad_accum_steps=2, max_grad_norm=0.25, beta2=0.9))
    assert run.steps_per_epoch == 3  # 18 rows, 5 batches of 4, windows of 2
    training = run.training
    assert (training.decay_steps, training.warmup_steps, training.min_learning_rate) == (9, 3, 0.0)
    rates = [learning_rate(training, step) / training.learning_rate for step in (0, 3, 5, 9)]
    assert rates == pytest.approx([1 / 3, 1, 0.75, 0])  # a cosine: (1 + cos(pi / 3)) / 2 after a third of its fall
    assert (training.max_grad_norm, training.beta2, training.grad_accum_steps) == (0.25, 0.9, 2)
    assert training.checkpoint_path == str(tmp_path / "model" / "checkpoints")


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"max_samples": 10}, lambda run: (len(run.train), len(run.valid)) == (9, 1)),
        ({"eval_split": 0.5}, lambda run: (len(run.train), len(run.held_out.kept)) == (10, 10)),
        ({"eval_split": 0.0}, lambda run: (len(run.train), run.valid) == (20, None)),
        ({"epochs": 5}, lambda run: run.training.decay_steps == 25),
        ({"batch_size": 2}, lambda run: run.steps_per_epoch == 9),
        ({"model_size": "small"}, lambda run: run.shape.hidden_dim == PRESETS["small"].hidden_dim),
        ({"seed": 7}, lambda run: run.shape.seed == 7 and run.training.seed == 7),
        ({"precision": "bf16"}, lambda run: run.training.mixed_precision.value == "bf16"),
        ({"learning_rate": 0.5}, lambda run: run.training.learning_rate == 0.5),
        ({"gradient_checkpointing": True}, lambda run: run.shape.checkpointing.value == "full"),
        ({"loss_on": "all"}, lambda run: run.train.num_targets == run.train.num_tokens - len(run.train)),
        ({"max_seq_len": 24}, lambda run: run.train.lengths.max() <= 24 and run.train.stats.truncated > 0),
        ({"eval_steps": 3}, lambda run: run.training.eval_interval == 3),
        ({"save_steps": 4}, lambda run: run.training.checkpoint_interval == 4),
        ({"logging_steps": 9}, lambda run: run.training.log_interval == 9),
        ({"save_total_limit": 5}, lambda run: run.training.max_checkpoints == 5),
        ({"num_threads": 2}, lambda run: run.training.num_threads == 2),
        ({"weight_decay": 0.7}, lambda run: run.training.weight_decay == 0.7),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_each_setting_has_its_effect(config, changes, found):
    assert not found(DeepZigRun.prepare(config())), "the effect is there without the setting"
    assert found(DeepZigRun.prepare(config(**changes)))


def test_the_seed_decides_what_adapters_begin_with(config):
    first = [DeepZigRun.prepare(config(use_lora=True, seed=seed)).make_model() for seed in (1, 2, 2)]
    a = [model.weights["layers.1.w_down.a"].tobytes() for model in first]
    assert a[0] != a[1] == a[2]


def answers(rows):
    return {message.content for row in rows for message in row.messages if message.role == "assistant"}


def test_answers_told_and_answers_never_told_are_kept_for_evaluation():
    run = DeepZigRun.prepare(DeepZigConfig())
    told, new, train = run.held_out.told, run.held_out.new, run.held_out.train
    assert len(run.selection.conversations) == len(train) + len(told) + len(new)
    assert min(len(told), len(new)) >= 0.04 * len(run.selection.conversations)
    assert {row.category for row in told} == {"again"}
    assert answers(told) <= answers(train)
    assert not answers(new) & answers(train)
    assert run.valid.fingerprint() == run.parts["told"].fingerprint()
    assert DeepZigRun.prepare(DeepZigConfig()).train.fingerprint() == run.train.fingerprint()
    assert DeepZigRun.prepare(DeepZigConfig(seed=1)).train.fingerprint() != run.train.fingerprint()


def test_own_data(config, tmp_path):
    data = [str(rows_file(tmp_path / f"{word}.jsonl", 10, word)) for word in ("alpha", "beta")]
    run = DeepZigRun.prepare(config(data=data))
    assert run.selection.sources == {path: 10 for path in data}
    assert "alpha 3, as you wish" in {row.messages[-1].content for row in [*run.selection.conversations]}
    assert "Zig" not in run.tokenizer.decode(run.train.ids)


def test_bad_rows(config, tmp_path):
    data = rows_file(tmp_path / "rows.jsonl", 5)
    data.write_text(data.read_text() + '{"question": "?"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"rows\.jsonl:6"):
        DeepZigRun.prepare(config(data=[str(data)]))
    run = DeepZigRun.prepare(config(data=[str(data)], skip_bad_rows=True))
    assert len(run.selection.skipped) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_split": 1.0}, "eval_split"),
        ({"epochs": 0}, "epochs"),
        ({"lora_rank": 0}, "lora_rank"),
        ({"loss_on": "user"}, "loss_on"),
        ({"warmup_ratio": 1.0}, "warmup_ratio"),
        ({"base": "there", "model_size": "test"}, "model_size"),
        ({"base": "nowhere"}, "must be the folder of a trained model"),
        ({"max_seq_len": 513}, "context"),
    ],
)
def test_wrong_settings(config, changes, message):
    with pytest.raises(ConfigError, match=message):
        DeepZigRun.prepare(config(**changes))


def test_one_row_cannot_be_split(config, tmp_path):
    data = str(rows_file(tmp_path / "rows.jsonl", 1))
    with pytest.raises(DataError, match="eval-split 0"):
        DeepZigRun.prepare(config(data=[data]))
    assert len(DeepZigRun.prepare(config(data=[data], eval_split=0.0)).train) == 1


# -- the folder --------------------------------------------------------------------------------


def test_the_folder_is_whole(finished):
    names = {path.name for path in finished.iterdir()}
    assert names == {
        *("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"),
        *("training_args.json", "trainer_state.json", "evaluation.json", "README.md", "checkpoints"),
    }


def test_each_part_is_evaluated_by_its_name(finished):
    """The figures are those of the weights in the folder, and the card has both."""
    parts, stored = DeepZigRun.prepare(load_run_config(finished)).parts, read(finished / "evaluation.json")
    trainer = LlamaTrainer(load_model(finished).model, LlmTrainingConfig(max_seq_len=512))
    assert set(parts) == set(stored) != set()
    card = " ".join((finished / "README.md").read_text().split())
    for name, part in parts.items():
        result = trainer.evaluate(part)
        assert stored[name]["conversations"] == len(part)
        assert stored[name]["loss"] == pytest.approx(result.loss, abs=1e-5)
        assert stored[name]["accuracy"] == pytest.approx(result.accuracy, abs=1e-5)
        assert f"loss {result.loss:.3f}" in card


def test_weights_with_an_explicit_head(finished):
    tensors = read_safetensors(finished / "model.safetensors")
    shape = load_model(finished).model.config
    layer = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    names = {f"model.layers.{i}.{name}.weight" for i in range(2) for name in layer}
    names |= {f"model.layers.{i}.{n}_layernorm.weight" for i in range(2) for n in ("input", "post_attention")}
    assert set(tensors) == {*names, "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert all(tensor.dtype == np.float32 for tensor in tensors.values())
    assert tensors["lm_head.weight"].shape == (shape.vocab_size, 128)
    assert np.array_equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    assert tensors["model.layers.1.mlp.down_proj.weight"].shape == (128, 384)


def test_config_has_what_the_zig_loader_reads(finished):
    text, content = (finished / "config.json").read_text(), read(finished / "config.json")
    assert content["model_type"] == "deepzig_conversational"
    assert content["architectures"] == ["DeepZigConversationalModel"]
    assert (content["pad_token_id"], content["bos_token_id"], content["eos_token_id"]) == (3, 1, 2)
    for name in ("rope_base", "rope_theta", "qk_rope_base", "rms_norm_eps"):
        assert isinstance(content[name], float), name
        literal = re.search(rf'"{name}": ([^,\n]+)', text)[1]
        assert "." in literal or "e" in literal, f"{name} is written as {literal}, which Zig reads as an integer"
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings"):
        assert isinstance(content[name], int), name
    assert content["tie_word_embeddings"] is True


def test_whole_numbers_stay_floats_in_config():
    content = deepzig_config(write_config(PRESETS["test"].replace(rope_theta=1e6, norm_eps=1.0)), {})
    assert '"qk_rope_base": 1000000.0' in json.dumps(content)
    assert '"rms_norm_eps": 1.0' in json.dumps(content)


def test_generation_settings(finished):
    content = read(finished / "generation_config.json")
    assert (content["pad_token_id"], content["bos_token_id"], content["eos_token_id"]) == (3, 1, [2, 7])
    assert content["max_length"] == 512
    assert content["top_p"] == 0.9
    assert content["top_k"] == 40
    assert content["do_sample"] is True
    assert (content["temperature"], content["repetition_penalty"]) == (0.2, 1.0)
    original = generation_config(4096, {"pad": 3, "bos": 1}, (2,))
    assert original["max_length"] == 2048
    assert (original["temperature"], original["repetition_penalty"]) == (0.8, 1.1)


def test_trainer_state_has_the_keys_of_transformers(finished):
    state = read(finished / "trainer_state.json")
    assert set(state) == STATE_KEYS
    assert (state["global_step"], state["max_steps"], state["epoch"]) == (5, 5, 1.0)
    assert [row["step"] for row in state["log_history"] if "loss" in row] == [1, 2, 4]
    evaluated = [row for row in state["log_history"] if "eval_loss" in row]
    assert [row["step"] for row in evaluated] == [2, 4, 5]
    assert state["best_metric"] == min(row["eval_loss"] for row in evaluated)
    assert state["best_model_checkpoint"].endswith(f"llm_step_{state['best_global_step']}")
    assert {"train_loss", "train_runtime", "train_samples_per_second", "total_flos"} <= set(state["log_history"][-1])
    assert set(state["log_history"][0]) == {"epoch", "step", "loss", "grad_norm", "learning_rate"}
    assert state["stateful_callbacks"]["TrainerControl"]["args"]["should_training_stop"] is True
    train = DeepZigRun.prepare(load_run_config(finished)).train
    assert state["num_input_tokens_seen"] == sum(train.lengths - 1)  # one epoch; the last id of a row is no input
    assert state["total_flos"] == load_model(finished).model.flops_per_token(512) * state["num_input_tokens_seen"]


def test_training_args_say_what_is_trained_with(config):
    names = {"epochs": 3, "batch_size": 2, "grad_accum_steps": 4, "logging_steps": 5, "save_steps": 6, "eval_steps": 7}
    rates = {"learning_rate": 0.5, "warmup_ratio": 0.3, "weight_decay": 0.2, "max_grad_norm": 0.1, "beta2": 0.7}
    run = DeepZigRun.prepare(config(**names, **rates, save_total_limit=8, seed=9, precision="bf16", use_lora=True))
    expected = {
        **{"num_train_epochs": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        **{"logging_steps": 5, "save_steps": 6, "eval_steps": 7, "save_total_limit": 8, "seed": 9},
        **{"learning_rate": 0.5, "lr_scheduler_type": "cosine", "warmup_ratio": 0.3, "warmup_steps": 3},
        **{"weight_decay": 0.2, "max_grad_norm": 0.1, "label_smoothing_factor": 0.0, "fp16": False, "bf16": True},
        **{"adam_beta1": 0.9, "adam_beta2": 0.7, "adam_epsilon": 1e-8, "gradient_checkpointing": False},
        "lora": {"r": 16, "lora_alpha": 32.0, "lora_dropout": 0.1},
    }
    content = training_args(run.config, run.training)
    assert {name: content[name] for name in expected} == expected
    assert DeepZigConfig.from_dict(content["abi_py"]) == run.config


def test_training_args_and_card(finished):
    arguments = read(finished / "training_args.json")
    assert (arguments["num_train_epochs"], arguments["per_device_train_batch_size"]) == (1, 4)
    assert arguments["load_best_model_at_end"] is True
    assert DeepZigConfig.from_dict(arguments["abi_py"]).max_samples == 20
    card = (finished / "README.md").read_text()
    assert "20 conversations (20 from deepzig_conversations.jsonl), 2 of them kept" in card
    assert str(finished.parent) not in card


def test_tokenizer_and_template(finished):
    from abi_py.data import Tokenizer, template_for

    tokenizer = Tokenizer.load(finished)
    specials = [*("<unk>", "<s>", "</s>", "<pad>", "<user>", "</user>", "<assistant>", "</assistant>")]
    specials += [*("<system>", "</system>", "<tool>", "</tool>")]
    assert [tokenizer.token_of(i) for i in range(12)] == specials
    template = template_for(tokenizer)
    assert template.name == "deepzig"
    text = template.render([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    assert text == "<s><user>Hi</user><assistant>"
    assert "generation %}" not in read(finished / "tokenizer_config.json")["chat_template"]


def test_the_model_in_the_folder_answers(finished):
    from abi_py.data import Tokenizer

    model = load_model(finished).model
    (result,) = Generator(model, Tokenizer.load(finished)).run(["<s><user>Hi</user><assistant>"], max_new_tokens=3)
    assert len(result.ids) <= 3


# -- training ----------------------------------------------------------------------------------


def test_the_best_weights_are_taken(config, tmp_path):
    # The rows that are kept have words of their own: after a few steps the model only gets surer of the wrong ones.
    data = [str(rows_file(tmp_path / "rows.jsonl", 12))]
    settings = {"epochs": 24, "eval_steps": 3, "learning_rate": 1e-2, "data": data, "eval_split": 0.3}
    report, folder = train_deepzig(config(**settings))
    state = read(folder / "trainer_state.json")
    best, last = state["best_global_step"], state["global_step"]
    assert best < last, "the last step is the best, so nothing is shown"
    stored = read_safetensors(folder / "checkpoints" / f"llm_step_{best}" / "model.safetensors")
    final = read_safetensors(folder / "model.safetensors")
    for name, tensor in stored.items():
        assert np.array_equal(final[name], tensor), name
    assert not np.array_equal(
        read_safetensors(folder / "checkpoints" / f"llm_step_{last}" / "model.safetensors")["model.norm.weight"],
        final["model.norm.weight"],
    )
    assert report.best_val_loss == state["best_metric"]


class StopAt:
    """Requests a stop at a step."""

    def __init__(self, step, stop):
        self.step, self.stop = step, stop

    def handle(self, event):
        if event.type == "step" and event.step == self.step:
            self.stop.request()

    def close(self):
        pass


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_stopped_run_goes_on_to_the_same_bits(config, lora):
    _, straight = train_deepzig(config("straight", epochs=2, eval_steps=2, use_lora=lora))
    stop = GracefulStop()
    settings = config("stopped", epochs=2, eval_steps=2, use_lora=lora)
    report, folder = train_deepzig(settings, [StopAt(5, stop)], stop)
    assert report.interrupted
    assert not (folder / "model.safetensors").exists()
    run = DeepZigRun.prepare(load_run_config(folder))
    trainer = run.make_trainer()
    trainer.load_checkpoint(folder)
    finish(run, trainer, trainer.fit(run.train, run.valid))
    ours, theirs = (read_safetensors(each / "model.safetensors") for each in (folder, straight))
    for name, tensor in theirs.items():
        assert np.array_equal(ours[name], tensor), name
    logs = [read(each / "trainer_state.json")["log_history"] for each in (folder, straight)]
    losses = [[(row["step"], row["loss"]) for row in log if "loss" in row] for log in logs]
    assert losses[0] == losses[1]


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_killed_at_each_rename_of_the_end_the_model_is_whole_or_not_there(config, tmp_path, monkeypatch, lora):
    """And the command that resumes writes the same folder."""
    _, straight = train_deepzig(config("straight", use_lora=lora))
    wanted = contents(straight)
    run = DeepZigRun.prepare(config("killed", use_lora=lora))
    trainer = run.make_trainer()
    report = trainer.fit(run.train, run.valid)
    original, made = os.replace, []
    for call in range(1, 20):
        count = iter(range(1, 1000))

        def dying(*paths, count=count, call=call):
            if next(count) == call:
                raise Killed
            original(*paths)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", dying)
            try:
                finish(run, trainer, report)
            except Killed:
                made.append(len(contents(run.directory)))
                assert not (run.directory / "config.json").exists()
                if not lora:  # no reader takes half a model; adapters on random weights cannot be read alone
                    assert load_model(run.directory).directory.parent.name == "checkpoints"
                continue
        break
    assert made == sorted(made)
    assert len(made) == (7 if lora else 5)
    (run.directory / "config.json").unlink()  # as if the last kill had been the one that counts
    again = DeepZigRun.prepare(load_run_config(run.directory))
    check_free(again.directory, resume=True)
    trainer = again.make_trainer()
    trainer.load_checkpoint(again.directory)
    finish(again, trainer, trainer.fit(again.train, again.valid))
    found = contents(run.directory)
    assert set(found) == set(wanted)
    for name, content in wanted.items():
        assert found[name] == content.replace(b"straight", b"killed"), name


def contents(folder):
    """Return a model's files by name, those of the training left out."""
    files = [path for path in folder.rglob("*") if path.is_file() and "checkpoints" not in path.parts]
    return {path.relative_to(folder): path.read_bytes() for path in files if path.name != "trainer_state.json"}


def test_a_run_that_ended_before_its_first_checkpoint(config, tmp_path, monkeypatch, capsys):
    train_deepzig(config("straight"))
    DeepZigRun.prepare(config("killed")).make_trainer()
    for words in (["--output-dir", "killed"], ["--resume", "--output-dir", "killed"]):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as end:
            main(["deepzig", *words])
        out, err = capsys.readouterr()
        assert (end.value.code, "by abi-train deepzig --resume --output-dir killed" in err) in ((2, True), (0, False))
    assert "killed ended before its first checkpoint; it begins again" in out
    assert end.value.code == 0
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("straight", "killed")]
    assert weights[0] == weights[1]


def test_lora_on_an_earlier_model(config, finished, tmp_path):
    data = str(rows_file(tmp_path / "rows.jsonl", 8))
    settings = {"base": str(finished), "data": [data], "use_lora": True, "lora_rank": 4, "learning_rate": 1e-2}
    _, folder = train_deepzig(config("tuned", **settings))
    adapter = read(folder / "adapter" / "adapter_config.json")
    assert (adapter["r"], adapter["lora_alpha"], adapter["lora_dropout"]) == (4, 32, 0.1)
    a = read_safetensors(folder / "adapter" / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.mlp.up_proj"
    first, second = a[f"{name}.lora_A.weight"], a[f"{name}.lora_B.weight"]
    assert (first.shape, second.shape) == ((4, 128), (384, 4))
    before, after = (read_safetensors(each / "model.safetensors") for each in (finished, folder))
    key = "model.layers.0.mlp.up_proj.weight"
    assert not np.array_equal(before[key], after[key])
    np.testing.assert_allclose(after[key], before[key] + 32 / 4 * (second @ first), rtol=0, atol=1e-6)
    assert np.array_equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    assert (folder / "tokenizer.json").read_text() == (finished / "tokenizer.json").read_text()


def test_all_weights_of_an_earlier_model(config, finished, tmp_path):
    data = str(rows_file(tmp_path / "rows.jsonl", 8))
    run = DeepZigRun.prepare(config("tuned", base=str(finished), data=[data]))
    assert run.config.learning_rate == SIZES["test"]["learning_rate"]  # the preset nearest to the base
    weights = run.make_model().weights["final_norm"]
    assert np.array_equal(weights, load_model(finished).model.weights["final_norm"])
    assert dataclasses.replace(run.shape, checkpointing="none") == TrainableModelConfig.from_dict(
        load_model(finished).model.config.to_dict()
    )


def test_a_folder_is_not_overwritten(config, finished):
    with pytest.raises(ConfigError, match=r"must not hold config\.json"):
        train_deepzig(config(output_dir=str(finished)))


def test_nothing_to_go_on_with(tmp_path):
    with pytest.raises(ConfigError, match=r"has no training_args\.json"):
        load_run_config(tmp_path)
    (tmp_path / "training_args.json").write_text("{}")
    with pytest.raises(ConfigError, match="damaged"):
        load_run_config(tmp_path)
