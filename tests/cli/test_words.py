"""The words of the command line: one flag for one thing in all verbs, and numbers with their nouns."""

import ast
import itertools
import re
from collections import defaultdict
from pathlib import Path

import click
from test_every_option import verbs

import abi_py
from abi_py.cli.options import FieldOption

PRODUCT = sorted(Path(abi_py.__file__).parent.rglob("*.py"))
NOUNS = "token|epoch|step|conversation|row|thread|document|file|update|evaluation|window|sample|checkpoint|answer"
# Numbers that are never 1 where the sentence is written, and rates.
NEVER_ONE = {
    *(
        "len(ids)",
        "length",
        "TIME",
        "BATCH * TIME",
        "count",
        "config.epochs",
        "skipped + steps",
        "2 * SPAN",
        "tokenizer.vocab_size",
        "len(ENDS)",
    ),
    *("speed", "report.avg_throughput"),
    *("generator.prefill_tokens / generator.prefill_seconds", "generator.decode_tokens / generator.decode_seconds"),
    *("facts['context']",),  # a window has two tokens or more
}


def test_nothing_says_1_epochs():
    """A number before a plural goes through `errors.counted`, which knows one from many."""
    found = []
    for path in PRODUCT:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for value, after in zip(getattr(node, "values", ())[:-1], getattr(node, "values", ())[1:]):
                text = getattr(after, "value", None)
                if not (isinstance(value, ast.FormattedValue) and isinstance(text, str)):
                    continue
                if re.match(rf" (?:[a-z]+ )?(?:{NOUNS})s\b", text) and not re.match(r" (has|holds|whose)\b", text):
                    said = ast.unparse(value.value)
                    if said not in NEVER_ONE:
                        found.append(f"{path.name}:{node.lineno}: {said}{text[:20]}")
    assert found == []


# -- flags ---------------------------------------------------------------------------------------

# What one flag says in several verbs differs in its first clause only where the thing itself is another one.
OF_ITS_VERB = {
    "--seed": re.compile(r"seed of|which documents"),
    "--vocab-size": re.compile("number of token ids"),
    "--debug": re.compile("show the traceback"),
}
# Two names of one thing: the first is ours, the others are spellings, of the ABI, of the seed's scripts, or short.
ALIASES = {
    "--epochs": {"-e"},
    "--batch-size": {"-b"},
    "--learning-rate": {"--lr"},
    "--grad-accum-steps": {"--grad-accum"},
    "--max-grad-norm": {"--gradient-clip"},
    "--out": {"-o"},
    "--prompt": {"-p"},
    "--count": {"-n"},
    "--format": {"--to"},
}
# The words that a verb has from where it comes from: the DeepZig seed, the ABI's own verb.
ITS_OWN = {
    "deepzig": {"--output-dir": "--out", "--eval-split": "--valid-fraction", "--use-lora": "--lora"},
    "llm": {"--dataset-path": "--data", "--gradient-accumulation": "--grad-accum-steps"},
}
SEED = {text: flag for own in ITS_OWN.values() for text, flag in own.items()}
# Words that another name for the same thing would have, and the flag that has it.
NOT = {
    "--threads": "--num-threads",
    "--output": "--out",
    "--dest": "--out",
    "--context": "--max-seq-len",
    "--ctx": "--max-seq-len",
    "--seq-len": "--max-seq-len",
    "--valid-split": "--valid-fraction",
    "--overwrite": "--force",
    "--yes": "--force",
    "--chat-template": "--template",
    "--verbose": "--debug",
    "--limit": "--max-samples",
    "--precision": "--mixed-precision",
}


# What a flag that is no field of a config class means: the field that it sets in other verbs, or a sentence.
MEANS = {
    "--adapter": "adapters on the model",
    "--base": "base.path",
    "--batch-size": "training.batch_size",
    "--check-json": "data.check_json",
    "--data-format": "tokenize.format",
    "--dtype": "export.dtype",
    "--family": "model.family",
    "--field": "tokenize.field",
    "--format": "export.format",
    "--max-seq-len": "training.max_seq_len",
    "--merge-base": "export.merge_base",
    "--num-threads": "training.num_threads",
    "--prompt": "data.prompt",
    "--quantize": "training.export_quantize",
    "--seed": "training.seed",
    "--skip-bad-rows": "chat.skip_bad_rows",
    "--template": "chat.template",
    "--tokenizer": "data.tokenizer",
    "--best": "of a run, the best checkpoint",
    "--last": "of a run, the newest checkpoint",
    "--by": "what curves are drawn over",
    "--config": "a file of settings",
    "--count": "how many conversations are shown",
    "--debug": "the traceback",
    "--dataset-format": "what the data must be",
    "--dry-run": "a plan, and nothing else",
    "--find-lr": "a suggested rate, and nothing else",
    "--force": "what is there is replaced",
    "--help": "the help",
    "--help-all": "all of the help",
    "--ids": "a prompt as token ids",
    "--imatrix": "how much each column counts",
    "--json": "output for machines",
    "--max-shard-size": "the largest file of weights",
    "--model-size": "a shape by its name",
    "--no-check": "what was written is not read again",
    "--no-times": "no times in the output",
    "--only": "a phase of a recipe, and no other",
    "--once": "one question, and then the end",
    "--out": "where to write",
    "--perplexity": "a text on which it is measured",
    "--plot": "a picture of the curves",
    "--schedule": "what a resumed run does with the learning rate",
    "--stride": "how far windows are apart",
    "--system": "the system's turn",
    "--table": "some types side by side",
    "--tensors": "all tensors",
    "--text": "a text that is taken apart",
}
# Fields of two sections that are the same thing in different verbs, by the meaning that counts.
SAME = {
    "generation.seed": "training.seed",
    "tokenize.seed": "training.seed",
    "tokenize.skip_bad_rows": "chat.skip_bad_rows",
    "tokenize.tokenizer": "data.tokenizer",
    "tokenize.valid_fraction": "data.valid_fraction",
    "tokenizer.vocab_size": "model.vocab_size",
}
# Flags that share values and are different things all the same: a model to start from, one that is left.
# What a text is taken for, and what the ABI's verb wants it to be.
SHARING = [{"--which", "--base-which"}, {"--data-format", "--dataset-format"}]


def meaning(name, param):
    """Return what a flag means: section and field, or what is declared of it."""
    if isinstance(param, FieldOption):
        own = f"{param.section}.{param.field}"
        return SAME.get(own, own)
    return MEANS[name]


def values_of(param):
    """Return the values among which a flag chooses."""
    return tuple(getattr(param.type, "choices", None) or ())


def flags():
    """Return name -> list of verb and parameter, of every flag of every verb."""
    found = defaultdict(list)
    for name, command in verbs():
        for param in command.get_params(click.Context(command)):
            if isinstance(param, click.Option) and (isinstance(param, FieldOption) or not param.hidden):
                own = [text for text in param.opts if text not in SEED]
                found[own[-1]].append((name, param))
    return found


def test_every_verb_has_the_flags_that_all_have():
    for name, command in verbs():
        ctx = click.Context(command, info_name=name, help_option_names=["-h", "--help"])
        spelled = {text for param in command.get_params(ctx) for text in param.opts}
        assert {"-h", "--help", "--debug"} <= spelled, name


def test_one_flag_has_the_same_spellings_in_all_verbs():
    for name, found in flags().items():
        for verb, param in found:
            assert {SEED.get(text, text) for text in param.opts} - {name} <= ALIASES.get(name, set()) | {"-h"}, verb
            assert set(param.opts) & set(SEED) <= set(ITS_OWN.get(verb, ())), verb
        assert len({tuple(text for text in param.opts if text not in SEED) for _, param in found}) == 1, (name, found)


def test_one_flag_says_the_same_in_all_verbs():
    for name, found in flags().items():
        heads = {re.split(r"[;(]|  \[", param.help or "")[0].strip() for _, param in found}
        if name in OF_ITS_VERB:
            assert all(OF_ITS_VERB[name].match(head) for head in heads), (name, heads)
        else:
            assert len(heads) == 1, (name, heads)
        assert len({param.is_flag for _, param in found}) == 1, name  # nowhere a switch, elsewhere a value


def test_no_thing_has_a_second_name():
    names = flags()
    assert not set(NOT) & set(names)
    assert set(NOT.values()) <= set(names)
    for name, shorter in ALIASES.items():
        assert name in names
        assert not shorter & set(names)
    spelled = defaultdict(set)
    for name, found in names.items():
        for _, param in found:
            for text in (*param.opts, *param.secondary_opts):
                spelled[text].add(name)
    assert {text: owners for text, owners in spelled.items() if len(owners) > 1} == {}


def test_one_meaning_has_one_name_and_one_name_one_meaning():
    names, meanings = defaultdict(set), defaultdict(set)
    for name, found in flags().items():
        for _, param in found:
            names[meaning(name, param)].add(name)
            meanings[name].add(meaning(name, param))
    assert {each: found for each, found in names.items() if len(found) > 1} == {}
    assert {each: found for each, found in meanings.items() if len(found) > 1} == {}
    assert set(MEANS) <= set(meanings)  # none is declared that is gone


def test_flags_that_choose_among_the_same_values_are_one_flag():
    values = defaultdict(set)
    for name, found in flags().items():
        for _, param in found:
            values[name].update(values_of(param))
    shared = [
        {name, other}
        for name, other in itertools.combinations(values, 2)
        if len(values[name] & values[other]) >= 2 and {name, other} not in SHARING
    ]
    assert shared == []


def test_the_values_of_one_flag_are_the_same_in_all_verbs():
    """A verb may take fewer of them (a run leaves no ABIC file), in the same order, by the same names."""
    for name, found in flags().items():
        lists = sorted({values_of(param) for _, param in found}, key=len)
        for fewer in lists[:-1]:
            assert [value for value in lists[-1] if value in fewer] == list(fewer), name
