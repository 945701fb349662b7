"""Killed at any moment, every verb that writes comes to the same bits by the command that it names.

A case is begun, killed, and called again, as its user would call it; a refusal names the command that goes on.  Half of
the kills come at a random moment, by one of four signals; half right before one of the calls by which files take their
places, which is where it matters.  ABI_KILLS is the number of kills of each case (2 if not set).
"""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np
import pytest
from waiting import PATIENCE
from world import make_folder, write_talks

ROOT = Path(__file__).resolve().parents[2]
KILLS = int(os.environ.get("ABI_KILLS", "2"))
pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and fork")

# Imports everything once; then each call is a fork, which costs no start of Python.  No kernel has run before it.
NURSERY = """
import json, os, signal, sys
from abi_py.cli import VERBS, cli, main
import abi_py.training.trainer, abi_py.pipelines, abi_py.generation
for verb in VERBS:
    cli.get_command(None, verb)

def count_calls(die_at, file):
    calls = [0]
    def counted(original):
        def function(*args, **kwargs):
            calls[0] += 1
            if calls[0] == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            if not die_at:
                with open(file, "w") as count:
                    count.write(str(calls[0]))
            return original(*args, **kwargs)
        return function
    for name in ("replace", "fsync", "unlink", "rmdir", "mkdir"):
        setattr(os, name, counted(getattr(os, name)))

for line in sys.stdin:
    call = json.loads(line)
    child = os.fork()
    if child == 0:
        os.chdir(call["directory"])
        for stream in (1, 2):
            os.dup2(os.open(call["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        count_calls(call["die_at"], call["output"] + ".calls")
        try:
            main(call["words"])
        except SystemExit as end:
            sys.stdout.flush()
            os._exit(end.code or 0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Nursery:
    """A process that has imported abi_train, and forks a child for each call of it."""

    def __init__(self, output):
        self.output = output
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
        words = [sys.executable, "-c", NURSERY]
        self.process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def call(self, directory, words, die_at=0, wait=None, number=None):
        """Call abi-train; send it signal `number` after `wait` seconds; return exit code, output and seconds."""
        self.output.unlink(missing_ok=True)
        facts = {"directory": str(directory), "words": words, "die_at": die_at, "output": str(self.output)}
        self.process.stdin.write(json.dumps(facts) + "\n")
        self.process.stdin.flush()
        child, began = int(self.process.stdout.readline()), time.monotonic()
        if wait is not None:
            time.sleep(wait)
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, number)
        code = int(self.process.stdout.readline())
        return code, self.output.read_text() if self.output.exists() else "", time.monotonic() - began

    def calls(self):
        """Return how many of the calls that can be died at the last child made."""
        return int(Path(f"{self.output}.calls").read_text())


@pytest.fixture(scope="module")
def nursery(tmp_path_factory):
    made = Nursery(tmp_path_factory.mktemp("nursery") / "output")
    yield made
    made.process.stdin.close()
    made.process.wait(timeout=PATIENCE)
    made.process.stdout.close()


# -- what is compared --------------------------------------------------------------------------

# What depends on the clock and the machine; nothing else in a run's records does.
TIMES = {"time", "tokens_per_second", "gflops", "memory", "size", "total_time_ns", "avg_throughput"}
ORIGIN = "origin.json"  # its order is the time at which a checkpoint was saved


def records(file, gentle):
    """Return a metrics.jsonl without what depends on the clock; a run that was asked to stop has more checkpoints."""
    left_out = {*TIMES, "checkpoints_saved"} if gentle else TIMES
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows = [row for row in rows if not (gentle and row["type"] == "checkpoint")]
    return [{key: value for key, value in row.items() if key not in left_out} for row in rows]


def content(file):
    """Return what a file holds, without what depends on the clock; a base is named by way of the run's directory."""
    if file.name == "adapter_config.json":
        described = json.loads(file.read_text())
        return {**described, "base_model_name_or_path": os.path.realpath(described["base_model_name_or_path"] or "")}
    return {**json.loads(file.read_text()), "order": 0} if file.name == ORIGIN else file.read_bytes()


def result_of_run(directory, gentle):
    checkpoints = directory / "r/checkpoints"
    final = checkpoints / (checkpoints / "latest").read_text().strip()
    files = [*final.iterdir(), *(directory / "r/model").iterdir(), *(directory / "r").glob("adapter/*")]
    files = [path for path in files if path.name.endswith((".safetensors", "config.json"))]
    return {str(path.relative_to(directory)): content(path) for path in files} | {
        "final": final.name,
        "metrics": records(directory / "r/metrics.jsonl", gentle),
    }


def result_of_deepzig(directory, gentle):
    folder = directory / "m"
    timed = {"trainer_state.json", "report.json", "metrics.jsonl"}
    files = [path for path in folder.rglob("*") if path.is_file() and "checkpoints" not in path.parts]
    result = {str(path.relative_to(folder)): content(path) for path in files if path.name not in timed}
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    clock = ("runtime", "per_second")
    result["history"] = [{key: row[key] for key in row if not key.endswith(clock)} for row in history]
    return result | {"metrics": records(folder / "metrics.jsonl", gentle)}


def result_of_phases(directory, gentle):
    models = directory / "models"
    files = [path for path in models.rglob("*") if path.is_file() and path.parents[0].name not in ("run", models.name)]
    files = [path for path in files if "run" not in path.relative_to(models).parts and path.name != "phase.json"]
    files = [path for path in files if path.name.endswith((".safetensors", "config.json", ".gguf", ".md"))]
    files = [path for path in files if path.name != "README.md"]  # of a model: it names its checkpoint's time
    result = {str(path.relative_to(models)): content(path) for path in files}
    for path, value in result.items():
        if path.endswith("adapter_config.json"):  # the base of an adapter is in the same directory
            base = "base_model_name_or_path"
            result[path] = {**value, base: os.path.relpath(value[base], os.path.realpath(models))}
    runs = {str(path.relative_to(models)): records(path, gentle) for path in models.rglob("metrics.jsonl")}
    done = {path.parent.name: json.loads(path.read_text())["done"] for path in models.rglob("phase.json")}
    return result | runs | {"done": done}


def result_of_files(directory, gentle):
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@dataclass(frozen=True)
class Case:
    """A command, what its result is, and what a refusal says when there is nothing left to do."""

    words: str
    result: object
    done: str = ""


TINY = (
    "--hidden-dim 16 --num-layers 1 --num-heads 2 --num-kv-heads 1 --intermediate-dim 16 --max-seq-len 16 "
    "--batch-size 8 --epochs 3 --corpus-bytes 3000 --valid-fraction 0.2 --sample-tokens 0 --num-threads 1 "
    "--checkpoint-interval 5 --eval-interval 7 --max-checkpoints 2 --log-interval 2"
)
ADAPTERS = (
    "--base ../base --lora-rank 2 --lora-dropout 0.2 --learning-rate 0.01 --max-seq-len 64 --batch-size 4 --epochs 2 "
    "--data ../talks.jsonl --grad-accum-steps 1 --valid-fraction 0.1 --sample-tokens 0 --num-threads 1 "
    "--checkpoint-interval 5 --eval-interval 7 --max-checkpoints 2 --log-interval 2"
)
SMALL = (
    "--max-samples 16 --epochs 2 --batch-size 4 --checkpoint-interval 2 --eval-interval 3 --log-interval 1 "
    "--sample-tokens 5 --num-threads 1"
)
CHAIN = """
common:
  data: {path: [../talks.jsonl], valid_fraction: 0.1, sample_tokens: 0}
  training: {max_seq_len: 64, batch_size: 4, grad_accum_steps: 1, epochs: 1, learning_rate: 0.01, num_threads: 1,
             checkpoint_interval: 3, eval_interval: 4, log_interval: 2}
  lora: {rank: 2, dropout: 0.2}
phases:
  first: {leaves_model: merged, base: {path: ../base}}
  two: {after: first, leaves_adapter: adapter}
  three: {after: first, leaves_adapter: adapter, chat: {match: plus 3}, lora: {rank: 4}}
  files: {after: first, quantize: [F16, Q8_0]}
"""
CASES = {
    "run": Case(f"run {TINY} --out r", result_of_run),
    "run-lora": Case(f"run {ADAPTERS} --out r", result_of_run),
    "deepzig": Case(f"deepzig {SMALL} --out m", result_of_deepzig),
    "deepzig-lora": Case(f"deepzig {SMALL} --use-lora --lora-rank 2 --out m", result_of_deepzig),
    "phases": Case("phases ../chain.yaml", result_of_phases),
    "tokenize": Case("tokenize ../texts -o t/train.bin --valid-fraction 0.3", result_of_files),
    "tokenizer": Case(
        "tokenizer train ../texts -o t --vocab-size 400", result_of_files, "must not hold tokenizer"
    ),
}


@pytest.fixture
def texts(tmp_path):
    """Write twenty documents, conversations and a model; the cases work in directories beside them."""
    write_talks(tmp_path / "talks.jsonl")
    make_folder(tmp_path / "base")
    (tmp_path / "chain.yaml").write_text(CHAIN)
    (tmp_path / "texts").mkdir()
    random = np.random.default_rng(2)
    words = ["".join(random.choice(list("etaoinshrdlu"), 5)) for _ in range(300)]
    for number in range(20):
        (tmp_path / f"texts/{number}.txt").write_text(" ".join(random.choice(words, 2000)))


@pytest.mark.parametrize("name", CASES)
def test_killed_at_any_moment_it_comes_to_the_same_bits(nursery, texts, tmp_path, name):
    case, random = CASES[name], np.random.default_rng(17)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    code, output, seconds = nursery.call(whole, shlex.split(case.words))
    assert code == 0, output
    moments, kills = nursery.calls(), 0
    while kills < KILLS:
        parts.mkdir()
        words, log, gentle = shlex.split(case.words), [], False
        for _ in range(min(4, KILLS - kills)):  # as many kills of one run, then it may end
            how = draw(random, moments, seconds)
            code, output, _ = nursery.call(parts, words, **how)
            log.append((words, how, code, output[-400:]))
            if code == 0 or ended(case, code, output):
                break
            assert code in (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGHUP, 129, 130, 143), log
            kills, gentle = kills + 1, gentle or how.get("number", signal.SIGKILL) != signal.SIGKILL
            words, code = go_on(nursery, case, parts, words, output, log)
            if code == 0:
                break
        if code != 0 and not ended(case, code, output):
            code, output, _ = nursery.call(parts, words)
            assert code == 0 or ended(case, code, output), [*log, (words, code, output)]
        left = [str(path.relative_to(parts)) for path in parts.rglob(".*") if path.name.startswith((".abi", ".old"))]
        assert not left, log
        compare(case.result(parts, gentle), case.result(whole, gentle), log)
        shutil.rmtree(parts)


def compare(found, wanted, log):
    """Fail with the name, and of records with the first that differs."""
    assert set(found) == set(wanted), log
    for name, value in wanted.items():
        if isinstance(value, list):
            rows = [(ours, theirs) for ours, theirs in zip_longest(found[name], value) if ours != theirs]
            assert not rows, (name, rows[:3], log)
        assert found[name] == value, (name, log)


def draw(random, moments, seconds):
    """Return when and how the next kill comes."""
    if random.random() < 0.5:
        return {"die_at": int(random.integers(1, moments + 1))}
    numbers = [signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
    return {"wait": float(random.uniform(0, seconds)), "number": int(random.choice(numbers))}


def ended(case, code, output):
    """Say whether a call was refused because everything is there."""
    return code == 2 and bool(case.done) and case.done in output


def go_on(nursery, case, directory, words, output, log):
    """Return what a user calls next, and the exit code if that has been called: a refusal names another command."""
    named = re.search(r"go on with: abi-train (.*)", output)
    if named:  # it was asked to stop, and says how to go on
        return shlex.split(named[1]), None
    if case.words.startswith("tokenizer"):
        return [*shlex.split(case.words), "--force"], None  # one of its two files may be there
    if words != shlex.split(case.words) or case.words.startswith(("token", "phases")):
        return words, None  # the same again
    code, output, _ = nursery.call(directory, words)
    log.append((words, "again", code, output[-400:]))
    named = re.search(r"by abi-train (.*)", output)
    assert code == 0 or named or ended(case, code, output), log
    return (shlex.split(named[1]) if named else words), (0 if code == 0 or not named else None)
