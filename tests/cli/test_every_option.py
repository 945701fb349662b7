"""Every option of every verb acts, or is refused by a sentence that names it and what it needs."""

import importlib
import re
from pathlib import Path

import click
import pytest

from abi_py.cli import VERBS
from abi_py.cli.options import FieldArgument, FieldOption, given_values
from abi_py.config import OFF, ON, convert, fields_of
from abi_py.data.tokenizer_training import TokenizerTrainingConfig
from abi_py.data.tokenizing import TokenizeConfig
from abi_py.errors import ConfigError
from abi_py.fields import Other, needs
from abi_py.generation.settings import GenerationConfig
from abi_py.runs.settings import RUN_SECTIONS

HERE = Path(__file__).parent
CLASSES = {**RUN_SECTIONS, "generation": GenerationConfig, "tokenize": TokenizeConfig}
CLASSES["tokenizer"] = TokenizerTrainingConfig
# Fields of other versions: any value but the default is refused (tests/training/test_effects.py has them all).
LEFT = {each.name for cls in CLASSES.values() for each in fields_of(cls) if each.metadata.get("refused")}
SHAPE = {"hidden_dim": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "intermediate_dim": 24}
SHAPE["vocab_size"] = 300
# Values that fit where "one more" or "half" does not.
VALUES = {
    **{"hidden_dim": 32, "num_kv_heads": 2, "num_heads": 4, "head_dim": 4, "log_dir": "logs"},
    **{"loss_on": "all", "tokenizer": "tok", "bad_words_ids": "5 17", "digest": "0123456789abcdef"},
    **{"initial_loss_scale": 1024.0, "min_loss_scale": 2.0, "max_loss_scale": 2.0**20, "special": "<x>"},
    **{"loss_scale_growth_factor": 4.0, "loss_scale_backoff_factor": 0.25, "stop_ids": 3},
    **{"warmup_steps": 3, "warmup_ratio": 0.25},
    **{"rope_scaling": "linear:2", "layer_types": ("full_attention", "sliding_attention")},
    **{"momentum": 0.5, "muon_momentum": 0.5, "top_p": 0.5, "min_p": 0.1, "mlp_only_layers": (0,)},
    **{"rank_pattern": "q_proj=2", "alpha_pattern": "q_proj=2", "bias": "all"},
    **{"logprobs": 2, "category": "x", "mix": "m.jsonl"},
}
BESIDE = {"nesterov": {"momentum": 0.9}, "num_heads": {"num_kv_heads": 1}, "valid_fraction": {"tokenizer": "tok"}}
BESIDE |= {"layers_pattern": {"enabled": True}, "ensure_weight_tying": {"enabled": True}}
BESIDE |= {name: {"num_layers": 2} for name in ("layer_types", "mlp_only_layers", "decoder_sparse_step")}
# Options that are no fields: the test file of this directory that uses each and looks at what it does.
OTHERS = {
    "run": {
        **dict.fromkeys(("--out", "--config", "--dry-run", "--find-lr", "--json"), "run"),
        "--model-size": "deepzig",
    },
    "resume": {"--schedule": "run"},
    "llm": {
        **dict.fromkeys(("--out", "--config", "--find-lr", "--json"), "run"),
        **{"--dry-run": "llm", "--dataset-format": "llm", "--model-size": "deepzig"},
    },
    "deepzig": {
        **dict.fromkeys(("--out", "--config", "--dry-run", "--model-size"), "deepzig"),
        **{"--find-lr": "run", "--json": "run"},
    },
    "phases": {"--out": "phases", "--only": "phases", "--dry-run": "phases"},
    "generate": dict.fromkeys(("--prompt", "--ids", "--tokenizer", "--config", "--json", "--num-threads"), "generate"),
    "chat": {
        **dict.fromkeys(("--system", "--once", "--template", "--tokenizer"), "chat"),
        **{"--config": "every_option", "--num-threads": "every_option"},
    },
    "eval": {
        **dict.fromkeys(("--max-seq-len", "--stride", "--tokenizer", "--template", "--json"), "eval"),
        "--check-json": "json_answers",
        "--num-threads": "every_option",
    },
    "export": {
        **dict.fromkeys(("--out", "--format", "--dtype", "--max-shard-size", "--quantize", "--no-check"), "export"),
        **{"--force": "export", "--base": "adapter_verbs"},
    },
    "quantize": {
        **dict.fromkeys(("--table", "--imatrix", "--perplexity", "--max-shard-size"), "quantize"),
        **dict.fromkeys(("--no-check", "--json"), "quantize"),
        **{"--force": "quantize", "--best": "quantize", "--last": "quantize", "--num-threads": "quantize"},
    },
    "merge": {
        **dict.fromkeys(("--out", "--base", "--dtype", "--max-shard-size", "--best", "--last", "--force"), "run_lora"),
        "--merge-base": "run_quantized_base",
        **{"--format": "adapter_verbs", "--quantize": "adapter_verbs"},
    },
    "preview": {
        **dict.fromkeys(("--tokenizer", "--count", "--max-seq-len", "--batch-size"), "conversations"),
        "--seed": "every_option",
    },
    "tokenizer train": dict.fromkeys(
        ("--out", "--data-format", "--field", "--skip-bad-rows", "--force"), "tokenizing_verbs"
    ),
    "tokenizer info": {"--text": "tokenizing_verbs"},
    "tokenize": {"--out": "verbs", "--force": "verbs"},
    "runs": {"--json": "comparing_verbs"},
    "compare": dict.fromkeys(("--plot", "--by", "--json"), "comparing_verbs"),
    "inspect": {"--tensors": "inspect", "--json": "inspect"},
    "info": {"--json": "verbs"},
    "trace": {"--no-times": "verbs", "--family": "verbs"},
    "verify": {"--seed": "every_option"},
    "warmup": {},
}
for _verb in ("generate", "chat", "eval"):
    OTHERS[_verb] |= {"--adapter": "adapter_verbs"}
for _verb in ("generate", "chat", "eval", "export", "inspect"):
    OTHERS[_verb] |= dict.fromkeys(("--best", "--last"), "what_a_run_leaves")


def verbs():
    for name in VERBS:
        command = importlib.import_module(f"abi_py.cli.{name}").command
        if isinstance(command, click.Group):
            yield from ((f"{name} {verb}", each) for verb, each in command.commands.items())
        else:
            yield name, command


FIELDS = [
    pytest.param(command, param, id=f"{verb} {param.section}.{param.field}")
    for verb, command in verbs()
    for param in command.params
    if isinstance(param, FieldOption)
]


def other_value(option):
    """Return a value that is not the default."""
    if option.name in VALUES:
        return VALUES[option.name]
    if option.choices:
        default = getattr(option.default, "value", option.default)
        return next(choice for choice in option.choices if choice != default)
    if option.type is bool:
        return not option.default
    if option.type is int:
        return (option.default or 1) + 1
    return (option.default or 1.0) / 2 if option.type is float else "x"


def needed(cls, option):
    """Return values of other fields beside which a field acts: those of its first group of conditions."""
    kinds = {each.name: each for each in fields_of(cls)}
    acts = option.metadata.get("acts", {})
    values = {}
    for name, wanted in (acts if isinstance(acts, dict) else acts[0]).items():
        kind = kinds[name]
        if wanted is OFF:
            values[name] = () if kind.many else None if kind.optional else 0
        elif wanted is ON:
            values[name] = True if kind.type is bool else kind.default or other_value(kind)
        elif isinstance(wanted, Other):
            values[name] = next(choice for choice in kind.choices if choice != wanted.value.value)
        else:
            values[name] = wanted[0] if isinstance(wanted, tuple) else wanted
    return values


def spoilt(cls, option):
    """Return values of other fields beside which a field does not act."""
    kinds = {each.name: each for each in fields_of(cls)}
    acts = option.metadata.get("acts", {})
    values = {}
    for group in (acts,) if isinstance(acts, dict) else acts:
        name, wanted = next(iter(group.items()))
        kind = kinds[name]
        if wanted is OFF:
            values[name] = other_value(kind)
        elif wanted is ON:
            values[name] = () if kind.many else None if kind.optional else False if kind.type is bool else 0
        elif isinstance(wanted, Other):
            values[name] = wanted.value
        else:
            good = [each.value for each in (wanted if isinstance(wanted, tuple) else (wanted,))]
            values[name] = next(choice for choice in kind.choices if choice not in good)
    return values


def flag_of(command, param, value):
    """Return the words of a command line that say so."""
    long = next(flag for flag in param.opts if flag.startswith("--"))
    if param.is_flag:
        return [long if value else param.secondary_opts[0]]
    values = value if isinstance(value, tuple) else (value,)
    return [word for each in values for word in (long, str(getattr(each, "value", each)))]


def completed(cls, values):
    """Return values with those that a class cannot do without, and places for what needs one."""
    base = dict(SHAPE) if cls is CLASSES["model"] else {}
    if values.get("family") == "gpt2":
        del base["num_kv_heads"]
    if any(value for name, value in values.items() if name.startswith("enable_")):
        base["log_dir"] = "logs"
    if "log_dir" in values:
        base["enable_metrics_stream"] = True
    if values.get("valid_path") or values.get("tokenizer") or values.get("train_tokenizer"):
        base |= {"path": "a.txt"} if cls is CLASSES["data"] else {}
    return {**base, **values}


@pytest.mark.parametrize(("command", "param"), FIELDS)
def test_every_flag_arrives_and_acts_or_is_refused(command, param):
    cls = CLASSES[param.section]
    option = next(each for each in fields_of(cls) if each.name == param.field)
    value = other_value(option)
    places = ["x" for each in command.params if isinstance(each, click.Argument) and each.required]
    words = [*places, *flag_of(command, param, value)]
    required = [word for each in command.params if each.required and isinstance(each, click.Option)
                for word in (each.opts[-1], "out")]  # fmt: skip
    for each in command.params:
        if isinstance(each.type, click.Path):
            each.type.exists, before = False, each.type.exists
            each.type.was = before
    try:
        ctx = command.make_context("verb", [*words, *required], resilient_parsing=False)
    finally:
        for each in command.params:
            if isinstance(each.type, click.Path):
                each.type.exists = each.type.was
    words = {each.field for each in command.params
             if isinstance(each, FieldArgument) and each.required and each.section == param.section}  # fmt: skip
    given = {name: each for name, each in given_values(ctx)[param.section].items() if name not in words}
    assert list(given) == [param.field]
    if option.name in LEFT:
        with pytest.raises(ConfigError, match=option.name):
            cls(**given)
        return
    beside = {**needed(cls, option), **BESIDE.get(option.name, {})}
    made = cls.from_dict(completed(cls, {**beside, **given}), given)  # acts: what tests/training/test_effects.py shows
    plain = getattr(made, option.name)
    assert plain != option.default
    assert plain == convert(option, value)
    if needs(cls, option):
        with pytest.raises(ConfigError) as caught:
            cls.from_dict(completed(cls, {**spoilt(cls, option), **given}), given)
        message = str(caught.value)
        assert message.startswith(option.name), message
        assert f"acts only {needs(cls, option)}; change that, or leave {option.name} out" in message
        own = [each for each in command.params if getattr(each, "section", "") == param.section]
        flags = {each.field: each.metavar if isinstance(each, FieldArgument) else each.opts[-1] for each in own}
        assert needs(cls, option, flags) in param.help


def test_options_that_are_no_fields():
    for verb, command in verbs():
        found = {
            next(flag for flag in param.opts if flag in OTHERS[verb] or flag == param.opts[-1])
            for param in command.params
            if isinstance(param, click.Option) and not isinstance(param, FieldOption) and not param.hidden
        }
        assert found - {"--debug"} == set(OTHERS[verb]), verb
        for flag, file in OTHERS[verb].items():
            short = [o for p in command.params if flag in p.opts for o in p.opts]
            text = (HERE / f"test_{file}.py").read_text(encoding="utf-8")
            assert any(re.search(rf"[\"' ]{re.escape(each)}[\"', ]", text) for each in short), f"{verb} {flag}: {file}"


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (["run", "--beta1", "0.9", "--optimizer", "sgd"], "acts only with optimizer adam, adamw, adamw_8bit or muon"),
        (["run", "--log-dir", "x"], "log_dir (x) acts only with enable_tensorboard true, enable_wandb true or"),
        (["run", "--wandb-project", "x"], "wandb_project (x) acts only with enable_wandb true"),
        (["run", "--patience", "3", "--no-early-stopping"], "patience (3) acts only with enabled true"),
        (["run", "--lr-schedule", "constant", "--decay-steps", "9"], "decay_steps (9) acts only with lr_schedule"),
        (["run", "--model-checkpoint-interval", "4"], "checkpoint_interval (4) acts only with checkpointing"),
        (["run", "--loss-on", "assistant", "--corpus-bytes", "2000"], "loss_on is for conversations"),
        (["run", "--eval-interval", "4", "--valid-fraction", "0"], "eval_interval (4) has no effect without data for"),
        (["run", "--sample-length", "9"], "sample_length (9) acts only with sample_prompts (--sample-prompt)"),
        (["deepzig", "--lora-rank", "16", "--no-lora"], "rank (16) acts only with enabled true (--lora)"),
        (["tokenize", "a.txt", "-o", "x.bin", "--seed", "0"], "seed (0) acts only with valid_fraction above 0"),
        (["verify", "--seed", "-1"], "--seed"),
        (["preview", "a.txt", "--tokenizer", "tok", "--seed", "-1"], "--seed"),
        (["generate", "a.txt", "--logprobs", "2"], "logprobs (2) acts only with --json"),
        (["chat", "a.txt", "--logprobs", "2"], "logprobs (2) has no effect in a conversation"),
        (["chat", "a.txt", "--config", "b.json"], "b.json"),
        (["eval", "a.txt", "a.txt", "--num-threads", "-1"], "num_threads (-1) must be at least 0"),
        (["chat", "a.txt", "--num-threads", "-1"], "num_threads (-1) must be at least 0"),
    ],
)
def test_flags_without_effect_end_the_call(abi_train, tmp_path, call, said):
    (tmp_path / "a.txt").write_text("some text\n")
    (tmp_path / "tok").mkdir()
    code, out, err = abi_train(*call)
    assert (code, out) == (2, ""), err
    assert said in err
    assert not (tmp_path / "runs").exists()
