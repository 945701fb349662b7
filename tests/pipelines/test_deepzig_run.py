"""A DeepZig run: its defaults are the original's, settings have their effect, the best weights are taken, a stopped run
goes on, and the folder that it leaves is right in both forms."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

from abi_py.cli import main
from abi_py.config import TrainableModelConfig
from abi_py.data.tokenizer_training import train_tokenizer
from abi_py.errors import ConfigError, DataError
from abi_py.families import write_config
from abi_py.formats.deepzig import deepzig_config, generation_config
from abi_py.formats.safetensors import read_safetensors
from abi_py.generation import Generator
from abi_py.model.presets import PRESETS
from abi_py.pipelines import deepzig_preset, train_deepzig
from abi_py.pipelines.presets import SIZES, directory_of, size_of
from abi_py.runs.conversations import select_chat
from abi_py.runs.exporting import Source, export
from abi_py.runs.resolve import Given
from abi_py.runs.resuming import Resumed
from abi_py.runs.shipped import SHIPPED, place_of
from abi_py.runs.trainer_files import training_args
from abi_py.training.loading import load_model
from abi_py.training.schedule import learning_rate
from abi_py.training.stop import GracefulStop

SMALL = {"chat.max_samples": 20, "training.epochs": 1, "training.batch_size": 4, "training.num_threads": 1}
STATE_KEYS = {
    *("best_global_step", "best_metric", "best_model_checkpoint", "epoch", "eval_steps", "global_step"),
    *("is_hyper_param_search", "is_local_process_zero", "is_world_process_zero", "log_history", "logging_steps"),
    *("max_steps", "num_input_tokens_seen", "num_train_epochs", "save_steps", "stateful_callbacks", "total_flos"),
    *("train_batch_size", "trial_name", "trial_params"),
}


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def sections(values):
    """Return section -> field -> value from "section.field" -> value."""
    made = {}
    for name, value in values.items():
        section, field = name.split(".")
        made.setdefault(section, {})[field] = value
    return made


def given(size=None, **values):
    return Given(sections(values), {}, deepzig_preset(size))


@pytest.fixture
def prepare(tmp_path):
    """Return a function that makes a run of a second in tmp_path/NAME, of which nothing is written."""

    def prepare(name="run", size=None, **values):
        asked = given(size, **{**SMALL, **values})
        return asked.resolve(asked.open_data(), tmp_path / name)

    return prepare


@pytest.fixture
def train(tmp_path):
    """Return a function that trains for a second in tmp_path/NAME."""

    def train(name="run", *more, **values):
        return train_deepzig(sections({**SMALL, **values}), *more, out=tmp_path / name)

    return train


@pytest.fixture
def abi_train(tmp_path, monkeypatch, capsys):
    """Return a function that calls abi-train in tmp_path and gives exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return end.value.code, out, err

    return call


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return the directory of a small finished run: 18 conversations trained on, 2 kept."""
    directory = tmp_path_factory.mktemp("finished") / "run"
    values = {**SMALL, "training.eval_interval": 2, "training.log_interval": 2}
    train_deepzig(sections(values), out=directory)
    return directory


def rows_file(path, count, word="alpha"):
    rows = [{"instruction": f"Say {word} {i}", "response": f"{word} {i}, as you wish"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# -- defaults ----------------------------------------------------------------------------------


# The training arguments of the original's script for the conversational model ("seed") and of its later one with sizes.
ORIGINAL = """
                         seed    test   small  medium  large
training.learning_rate            2e-4    5e-4   2e-4   1e-4    5e-5
training.grad_accum_steps         4       1      2      4       8
training.warmup_ratio             0.03    0      0.03   0.1     0.1
training.weight_decay             0.01    0      0.01   0.01    0.01
training.max_grad_norm            1       0.5    1      1       1
training.beta2                    0.999   0.95   0.95   0.95    0.95
training.log_interval            25      5      10     25      50
training.checkpoint_interval               500     50     100    250     500
training.eval_interval               500     25     50     125     250
training.max_checkpoints         3       2      2      2       2
model.checkpointing full none none full full
chat.max_samples              20000   200    1000   10000   10000
training.epochs                   3       3      3      3       5
training.batch_size               4       4      4      2       1
"""


def test_sizes_are_those_of_the_original(tmp_path):
    data = (str(rows_file(tmp_path / "rows.jsonl", 3)),)
    (_, *sizes), *rows = [line.split() for line in f"name {ORIGINAL.strip()}".splitlines()]
    for place, size in enumerate(sizes):
        asked = {"training": {}, "model": {}, "data": {"path": data}}
        defaults = deepzig_preset(size).defaults(asked, None)
        expected = {name: values[place] for name, *values in rows}
        assert SIZES[size].keys() == expected.keys()
        for name, value in expected.items():
            section, field = name.split(".")
            found = defaults[section].get(field, 0.0)  # a share of 0 is no share
            assert found == value if field == "checkpointing" else float(found) == float(value), (size, name)
        assert defaults["training"].get("warmup_steps", 0) == 0
        assert defaults["data"]["train_tokenizer"] == PRESETS[size].vocab_size
    assert SIZES.keys() == {*sizes}
    assert (size_of(None, None), directory_of("test")) == ("test", "deepzig-test-model")
    assert directory_of("seed") == "deepzig-conversational-model"
    asked = given()
    assert (asked.lora, asked.data.valid_fraction, asked.chat.loss_on, asked.chat.template) == (
        None, 0.1, "assistant", "deepzig"
    )  # fmt: skip
    lora = given(**{"lora.enabled": True}).lora
    assert (lora.rank, lora.alpha, lora.dropout, len(lora.target_modules)) == (16, 32, 0.1, 7)


def test_shipped_data_bring_their_own_settings_and_flags_beat_them():
    assert given().training.epochs == 30
    assert given(**{"training.epochs": 2}).training.epochs == 2
    assert given("small").training.learning_rate == pytest.approx(1e-3)
    assert given("small", **{"model.hidden_dim": 512}).training.learning_rate == pytest.approx(5e-4)
    file = {"training": {"epochs": 7}, "model": {"hidden_dim": 64}}
    asked = Given({"training": {"batch_size": 3}}, file, deepzig_preset())
    assert (asked.training.epochs, asked.training.batch_size) == (7, 3)
    assert asked.training.learning_rate == pytest.approx(4e-3)


def test_training_settings(prepare, tmp_path):
    rates = {"training.warmup_ratio": 0.3, "training.max_grad_norm": 0.25, "training.beta2": 0.9}
    run = prepare(**rates, **{"training.epochs": 3, "training.grad_accum_steps": 2})
    assert run.steps == (3, 9)  # 18 rows, 5 batches of 4, windows of 2
    training = run.config.training
    assert (training.decay_steps, training.warmup_steps, training.min_learning_rate) == (9, 3, 0.0)
    rates = [learning_rate(training, step) / training.learning_rate for step in (0, 3, 5, 9)]
    assert rates == pytest.approx([1 / 3, 1, 0.75, 0])  # a cosine: (1 + cos(pi / 3)) / 2 after a third of its fall
    assert (training.max_grad_norm, training.beta2, training.grad_accum_steps) == (0.25, 0.9, 2)
    assert training.checkpoint_path == str(tmp_path / "run" / "checkpoints")


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"chat.max_samples": 10}, lambda run: (len(run.train), len(run.valid)) == (9, 1)),
        ({"data.valid_fraction": 0.5}, lambda run: len(run.train) == 10 == sum(map(len, run.parts.values()))),
        ({"data.valid_fraction": 0.0}, lambda run: (len(run.train), run.valid) == (20, None)),
        ({"data.valid_fraction": 0.0}, lambda run: run.config.training.eval_interval == 0),
        ({"training.epochs": 5}, lambda run: run.config.training.decay_steps == 25),
        ({"training.batch_size": 2}, lambda run: run.steps[0] == 9),
        ({"training.seed": 7}, lambda run: run.config.model.seed == 7 and run.config.training.seed == 7),
        ({"training.warmup_steps": 4}, lambda run: run.config.training.warmup_steps == 4),
        ({"training.lr_schedule": "linear"}, lambda run: run.config.training.warmup_steps == 0),
        ({"chat.loss_on": "all"}, lambda run: run.train.num_targets == run.train.num_tokens - len(run.train)),
        ({"training.max_seq_len": 24}, lambda run: run.train.lengths.max() <= 24 and run.train.stats.truncated > 0),
        ({"training.eval_interval": 3}, lambda run: run.config.training.eval_interval == 3),
        ({"data.train_tokenizer": 300}, lambda run: run.config.model.vocab_size == 300),
        ({"chat.template": "chatml"}, lambda run: run.find_tokenizer()[0].token_of(3) == "<|im_end|>"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_each_setting_has_its_effect(prepare, changes, found):
    assert not found(prepare()), "the effect is there without the setting"
    assert found(prepare(**changes))


def test_a_size_is_a_shape(prepare):
    assert prepare(size="small").config.model.hidden_dim == PRESETS["small"].hidden_dim
    assert prepare(size="medium").config.model.checkpointing.value == "full"


def test_the_seed_decides_what_adapters_begin_with(prepare):
    first = [prepare(**{"lora.enabled": True, "training.seed": seed}).make_model() for seed in (1, 2, 2)]
    a = [model.weights["layers.1.w_down.a"].tobytes() for model in first]
    assert a[0] != a[1] == a[2]


def test_answers_told_and_answers_never_told_are_kept_for_evaluation(tmp_path):
    def shipped(**values):
        asked = given(**values)
        return asked.resolve(asked.open_data(), tmp_path)

    run = shipped()
    told, new = run.parts["told"], run.parts["new"]
    assert len(run.train) + len(told) + len(new) == 916
    assert min(len(told), len(new)) >= 0.04 * 916
    answers = [{run.train.row(i)[0][run.train.row(i)[1]].tobytes() for i in range(len(run.train))}]
    answers += [{part.row(i)[0][part.row(i)[1]].tobytes() for i in range(len(part))} for part in (told, new)]
    assert answers[1] <= answers[0]
    assert not answers[2] & answers[0]
    assert run.valid is told
    assert shipped().train.fingerprint() == run.train.fingerprint()
    assert shipped(**{"training.seed": 1}).train.fingerprint() != run.train.fingerprint()
    assert run.config.data.path == (SHIPPED,)  # no path of a machine


def test_own_data(prepare, tmp_path):
    data = [str(rows_file(tmp_path / f"{word}.jsonl", 10, word)) for word in ("alpha", "beta")]
    run = prepare(**{"data.path": data})
    assert run.train.name == ", ".join(data)
    tokenizer = run.find_tokenizer()[0]
    text = tokenizer.decode(run.train.ids)
    assert "alpha 3, as you wish" in text + tokenizer.decode(run.valid.ids)
    assert "Zig" not in text
    assert run.valid is not None
    assert len(run.parts) == 1
    assert run.config.training.learning_rate == SIZES["test"]["training.learning_rate"]


def test_the_tokenizer_has_seen_the_training_part_alone(prepare):
    run = prepare()
    chosen = select_chat([Path(place_of(SHIPPED))], run.config.chat, seed=42).conversations
    for numbers, same in ((run.train.numbers, True), (range(20), False)):
        texts = [text for number in numbers for text in chosen[number].strings()]
        assert (train_tokenizer(texts, 2_000).hash == run.find_tokenizer()[0].hash) is same


def test_bad_rows(prepare, tmp_path):
    data = rows_file(tmp_path / "rows.jsonl", 5)
    data.write_text(data.read_text() + '{"question": "?"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"rows\.jsonl:6"):
        prepare(**{"data.path": (str(data),)})
    run = prepare(**{"data.path": (str(data),), "chat.skip_bad_rows": True})
    assert len(run.train.stats.bad) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.valid_fraction": 1.0}, "valid_fraction"),
        ({"training.epochs": 0}, "epochs"),
        ({"lora.rank": 0}, "rank"),
        ({"chat.loss_on": "user"}, "loss_on"),
        ({"training.warmup_ratio": 1.0}, "warmup_ratio"),
        ({"training.warmup_ratio": 0.5, "training.warmup_steps": 2}, r"warmup_steps \(2\) acts only without"),
        ({"base.path": "nowhere"}, "does not exist"),
        ({"training.max_seq_len": 513}, r"must not exceed the model's \(512\)"),
        ({"data.path": ("builtin:deepzip",)}, "must be builtin:deepzig"),
    ],
)
def test_wrong_settings(prepare, changes, message):
    with pytest.raises(ConfigError, match=message):
        prepare(**changes)


def test_one_row_cannot_be_split(prepare, tmp_path):
    data = {"data.path": (str(rows_file(tmp_path / "rows.jsonl", 1)),)}
    with pytest.raises(DataError, match="valid-fraction 0"):
        prepare(**data)
    assert len(prepare(**data, **{"data.valid_fraction": 0.0}).train) == 1


# -- what a run leaves -------------------------------------------------------------------------


def test_the_directory_is_that_of_a_run_and_the_folder_is_whole(finished):
    assert {path.name for path in finished.iterdir()} >= {
        *("config.yaml", "metrics.jsonl", "report.json", "checkpoints", "model", "evaluation.json"),
        *("training_args.json", "trainer_state.json", "tokenizer.json", "tokenizer_config.json"),
    }
    assert {path.name for path in (finished / "model").iterdir()} >= {
        *("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"),
        "training_args.json",
    }


def test_each_part_is_evaluated_by_its_name(finished, prepare):
    """The figures are those of the weights in the folder."""
    run = prepare(**{"training.eval_interval": 2})
    stored = read(finished / "evaluation.json")
    trainer = run_trainer(finished, run)
    assert set(run.parts) == set(stored) != set()
    for name, part in run.parts.items():
        result = trainer.evaluate(part)
        assert stored[name]["conversations"] == len(part)
        assert stored[name]["loss"] == pytest.approx(result.loss, abs=1e-5)
        assert stored[name]["accuracy"] == pytest.approx(result.accuracy, abs=1e-5)


def run_trainer(directory, run):
    from abi_py.training.trainer import LlamaTrainer

    return LlamaTrainer(load_model(directory / "model").model, run.config.training.replace(checkpoint_path=None))


def test_the_model_is_a_llama_by_default(finished):
    content = read(finished / "model/config.json")
    assert (content["model_type"], content["architectures"]) == ("llama", ["LlamaForCausalLM"])
    assert (content["pad_token_id"], content["bos_token_id"], content["eos_token_id"]) == (3, 1, 2)


@pytest.fixture(scope="module")
def zig(finished):
    """Return the folder of the finished run in the form of the Zig loader."""
    export(Source.open(finished), finished.parent / "zig", "zig")
    return finished.parent / "zig"


def test_format_zig_leaves_that_form(train, tmp_path, finished, zig):
    """Byte for byte what an export of the same weights is."""
    train("made", **{"export.format": "zig", "training.eval_interval": 2, "training.log_interval": 2})
    for name in ("config.json", "model.safetensors", "generation_config.json", "tokenizer.json"):
        assert (tmp_path / "made/model" / name).read_bytes() == (zig / name).read_bytes(), name


def test_weights_with_an_explicit_head(zig):
    tensors = read_safetensors(zig / "model.safetensors")
    shape = load_model(zig).model.config
    layer = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    names = {f"model.layers.{i}.{name}.weight" for i in range(2) for name in layer}
    names |= {f"model.layers.{i}.{n}_layernorm.weight" for i in range(2) for n in ("input", "post_attention")}
    assert set(tensors) == {*names, "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert all(tensor.dtype == np.float32 for tensor in tensors.values())
    assert tensors["lm_head.weight"].shape == (shape.vocab_size, 128)
    assert np.array_equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    assert tensors["model.layers.1.mlp.down_proj.weight"].shape == (128, 384)


def test_config_has_what_the_zig_loader_reads(zig):
    text, content = (zig / "config.json").read_text(), read(zig / "config.json")
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
    content = read(finished / "model/generation_config.json")
    assert (content["pad_token_id"], content["bos_token_id"], content["eos_token_id"]) == (3, 1, [2, 7])
    assert content["max_length"] == 512
    assert content["top_p"] == 0.9
    assert content["top_k"] == 40
    assert content["do_sample"] is True
    assert (content["temperature"], content["repetition_penalty"]) == (0.2, 1.0)
    original = generation_config(4096, {"pad": 3, "bos": 1}, (2,))
    assert original["max_length"] == 2048
    assert (original["temperature"], original["repetition_penalty"]) == (0.8, 1.1)


def test_trainer_state_has_the_keys_of_transformers(finished, prepare):
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
    train = prepare().train
    assert state["num_input_tokens_seen"] == sum(train.lengths - 1)  # one epoch; the last id of a row is no input
    flops = load_model(finished / "model").model.flops_per_token(512)
    assert state["total_flos"] == flops * state["num_input_tokens_seen"]


def test_training_args_say_what_is_trained_with(prepare):
    names = {"epochs": 3, "batch_size": 2, "grad_accum_steps": 4, "log_interval": 5, "checkpoint_interval": 6}
    rates = {"learning_rate": 0.5, "warmup_ratio": 0.3, "weight_decay": 0.2, "max_grad_norm": 0.1, "beta2": 0.7}
    more = {"eval_interval": 7, "max_checkpoints": 8, "seed": 9, "mixed_precision": "bf16"}
    values = {f"training.{name}": value for name, value in {**names, **rates, **more}.items()}
    run = prepare(**values, **{"lora.enabled": True})
    expected = {
        **{"num_train_epochs": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        **{"logging_steps": 5, "save_steps": 6, "eval_steps": 7, "save_total_limit": 8, "seed": 9},
        **{"learning_rate": 0.5, "lr_scheduler_type": "cosine", "warmup_steps": 3},
        **{"weight_decay": 0.2, "max_grad_norm": 0.1, "label_smoothing_factor": 0.0, "fp16": False, "bf16": True},
        **{"adam_beta1": 0.9, "adam_beta2": 0.7, "adam_epsilon": 1e-8, "gradient_checkpointing": False},
        "lora": {"r": 16, "lora_alpha": 32.0, "lora_dropout": 0.1},
    }
    content = training_args(run.config, "x")
    assert {name: content[name] for name in expected} == expected
    assert content["load_best_model_at_end"] is True
    left_last = prepare(**values, **{"export.which": "last"})
    assert training_args(left_last.config, "x")["load_best_model_at_end"] is False


def test_training_args_are_beside_run_and_model(finished):
    arguments = read(finished / "training_args.json")
    assert (arguments["num_train_epochs"], arguments["per_device_train_batch_size"]) == (1, 4)
    assert arguments["load_best_model_at_end"] is True
    assert (finished / "model/training_args.json").read_bytes() == (finished / "training_args.json").read_bytes()


def test_tokenizer_and_template(finished):
    from abi_py.data import Tokenizer, template_for

    specials = [*("<unk>", "<s>", "</s>", "<pad>", "<user>", "</user>", "<assistant>", "</assistant>")]
    specials += [*("<system>", "</system>", "<tool>", "</tool>")]
    for place in (finished, finished / "model"):
        tokenizer = Tokenizer.load(place)
        assert [tokenizer.token_of(i) for i in range(12)] == specials
        template = template_for(tokenizer)
        assert template.name == "deepzig"
        text = template.render([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
        assert text == "<s><user>Hi</user><assistant>"
        assert "generation %}" not in read(place / "tokenizer_config.json")["chat_template"]
        assert read(place / "tokenizer_config.json")["model_max_length"] == 512


def test_the_model_in_the_folder_answers(finished):
    from abi_py.data import Tokenizer

    model, tokenizer = load_model(finished / "model").model, Tokenizer.load(finished / "model")
    (result,) = Generator(model, tokenizer).run(["<s><user>Hi</user><assistant>"], max_new_tokens=3)
    assert len(result.ids) <= 3


# -- training ----------------------------------------------------------------------------------


def test_the_best_weights_are_taken(train, tmp_path):
    # The rows that are kept have words of their own: after a few steps the model only gets surer of the wrong ones.
    data = {"data.path": [str(rows_file(tmp_path / "rows.jsonl", 12))], "data.valid_fraction": 0.3}
    rates = {"training.epochs": 24, "training.eval_interval": 3, "training.learning_rate": 1e-2}
    report, directory = train(**data, **rates)
    state = read(directory / "trainer_state.json")
    best, last = state["best_global_step"], state["global_step"]
    assert best < last, "the last step is the best, so nothing is shown"
    stored = read_safetensors(directory / "checkpoints" / f"llm_step_{best}" / "model.safetensors")
    final = read_safetensors(directory / "model/model.safetensors")
    for name, tensor in stored.items():
        assert np.array_equal(final[name], tensor), name
    assert not np.array_equal(
        read_safetensors(directory / "checkpoints" / f"llm_step_{last}" / "model.safetensors")["model.norm.weight"],
        final["model.norm.weight"],
    )
    assert report.best_val_loss == state["best_metric"]
    assert read(directory / "evaluation.json")["new"]["loss"] == pytest.approx(state["best_metric"], abs=1e-5)


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
def test_a_stopped_run_goes_on_to_the_same_bits(train, abi_train, lora):
    values = {"training.epochs": 2, "training.eval_interval": 2, "lora.enabled": lora}
    _, straight = train("straight", **values)
    stop = GracefulStop()
    report, directory = train("stopped", [StopAt(5, stop)], stop, **values)
    assert report.interrupted
    assert not (directory / "model").exists()
    assert read(directory / "trainer_state.json")["global_step"] == report.total_steps
    code, _, err = abi_train("resume", directory)
    assert code == 0, err
    ours, theirs = (read_safetensors(each / "model/model.safetensors") for each in (directory, straight))
    for name, tensor in theirs.items():
        assert np.array_equal(ours[name], tensor), name
    logs = [read(each / "trainer_state.json")["log_history"] for each in (directory, straight)]
    losses = [[(row["step"], row["loss"]) for row in log if "loss" in row] for log in logs]
    assert losses[0] == losses[1]
    for name in ("evaluation.json", "tokenizer.json"):
        assert (directory / name).read_bytes() == (straight / name).read_bytes(), name


def test_a_tokenizer_that_has_gone_is_missed(train, abi_train):
    stop = GracefulStop()
    _, directory = train("stopped", [StopAt(2, stop)], stop)
    (directory / "tokenizer.json").unlink()
    code, _, err = abi_train("resume", directory)
    assert code == 1
    assert "tokenizer.json is missing, which the run has trained on its data; put it back" in err


def test_a_run_that_ended_before_its_first_checkpoint(train, prepare, abi_train, tmp_path):
    train("straight")
    run = prepare("killed")
    run.directory.mkdir()
    run.begin()
    code, _, err = abi_train("deepzig", "--out", "killed")
    assert code == 2
    assert "go on with it by abi-train resume killed" in err
    code, out, err = abi_train("resume", "killed")
    assert code == 0, err
    assert "killed ended before its first checkpoint; it begins again" in out
    weights = [(tmp_path / name / "model/model.safetensors").read_bytes() for name in ("straight", "killed")]
    assert weights[0] == weights[1]


def test_lora_on_an_earlier_run(train, finished, tmp_path):
    data = {"data.path": [str(rows_file(tmp_path / "rows.jsonl", 8))], "base.path": str(finished)}
    _, directory = train("tuned", **data, **{"lora.enabled": True, "lora.rank": 4, "training.learning_rate": 1e-2})
    adapter = read(directory / "adapter" / "adapter_config.json")
    assert (adapter["r"], adapter["lora_alpha"], adapter["lora_dropout"]) == (4, 32, 0.1)
    a = read_safetensors(directory / "adapter" / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.mlp.up_proj"
    first, second = a[f"{name}.lora_A.weight"], a[f"{name}.lora_B.weight"]
    assert (first.shape, second.shape) == ((4, 128), (384, 4))
    before, after = (read_safetensors(each / "model/model.safetensors") for each in (finished, directory))
    key = "model.layers.0.mlp.up_proj.weight"
    assert not np.array_equal(before[key], after[key])
    np.testing.assert_allclose(after[key], before[key] + 32 / 4 * (second @ first), rtol=0, atol=1e-6)
    assert np.array_equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    assert (directory / "model/tokenizer.json").read_text() == (finished / "model/tokenizer.json").read_text()


def test_all_weights_of_an_earlier_model(prepare, finished, zig, tmp_path):
    """Of a run, of the folder that it left, of a checkpoint, and of an older folder in the Zig form."""
    data = {"data.path": [str(rows_file(tmp_path / "rows.jsonl", 8))]}
    model = load_model(finished / "model").model
    for place in (finished, finished / "model", finished / "checkpoints/llm_step_5", zig):
        run = prepare(**data, **{"base.path": str(place)})
        assert run.config.training.learning_rate == SIZES["test"]["training.learning_rate"]  # the nearest preset
        assert run.config.data.train_tokenizer == 0
        shape = dataclasses.replace(run.config.model, checkpointing="none")
        assert shape == TrainableModelConfig.from_dict(model.config.to_dict())
    made = prepare(**data, **{"base.path": str(finished / "model")}).make_model()
    assert np.array_equal(made.weights["final_norm"], model.weights["final_norm"])


def test_a_directory_is_not_overwritten(train, finished):
    with pytest.raises(ConfigError, match=r"must not hold config\.yaml"):
        train_deepzig(sections(SMALL), out=finished)


def test_what_was_resolved_goes_on_as_it_was(finished):
    """The run's config.yaml names the same settings, without the preset."""
    config = Resumed.find(finished, {}, print).config
    assert config.data.path == (SHIPPED,)
    assert (config.training.learning_rate, config.training.beta2) == (2e-3, 0.95)
    assert config.export.trainer_files
