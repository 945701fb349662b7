"""Compiling ahead: what is compiled, in which processes, and that these run nothing else and end with their parent."""

import io
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console
from waiting import PATIENCE, until

import abi_py.cli
from abi_py.cli.compiling import compile_showing
from abi_py.errors import AbiError
from abi_py.kernels.engine import cache
from abi_py.kernels.engine.cache import CacheWarning, Store
from abi_py.model.presets import preset
from abi_py.runs import compile_worker, compiling
from abi_py.shape import ModelFamily

ROOT = Path(__file__).resolve().parents[2]
compiled_only = pytest.mark.skipif(not compiling.kernel_names(), reason="nothing is compiled without JIT")


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """Return a store without kernels that this process and those that it starts use.

    Routines are copied from this process's own, if they are there: each worker would compile them first.
    """
    own = cache.STORE
    monkeypatch.setenv("ABI_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "STORE", Store(cache.cache_directory()))
    for name in own.names("routines-"):
        cache.STORE.write(name, own.read(name))
    return cache.STORE


@compiled_only
def test_compiles_into_an_empty_cache_once(empty_cache):
    names = ["swiglu_backward", "swiglu_backward:bf16"]
    assert not any(map(compiling.is_cached, names))
    done, said = [], []
    compiling.compile_kernels(names, lambda name, seconds: done.append(name))
    assert sorted(done) == names
    assert all(map(compiling.is_cached, names))
    assert not compiling.is_cached("swiglu_forward")
    compiling.compile_missing(names, said.append)
    assert said == []

    (listed,) = bytes(empty_cache.read("swiglu_backward-bf16.list")).decode().split()
    path = empty_cache.path(listed)
    path.write_bytes(b"")
    with pytest.warns(CacheWarning, match=f"{listed} is damaged"):
        assert not compiling.is_cached("swiglu_backward:bf16")
    assert compiling.is_cached("swiglu_backward")
    compiling.compile_missing(names, said.append)
    assert said[0] == "1 kernel for this processor, once; later runs find them in the cache ..."
    assert all(map(compiling.is_cached, names))


@compiled_only
def test_a_module_in_the_current_directory_is_not_run(empty_cache, tmp_path, monkeypatch):
    """Neither one of the library's, nor one that is installed, nor one named like this package."""
    for name in ("uuid", "numba", "numpy", "abi_py", "pickle"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r})")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    monkeypatch.syspath_prepend(str(tmp_path))
    compiling.compile_kernels(["global_norm"], lambda name, seconds: None)
    assert compiling.is_cached("global_norm")
    assert not (tmp_path / "ran").exists()


COMPILES_LONG = """
import subprocess, sys
from abi_py.runs.compiling import compile_kernels
start = subprocess.Popen.__init__
def told(process, *words, **options):
    start(process, *words, **options)
    print(process.pid, flush=True)
subprocess.Popen.__init__ = told
compile_kernels(["_attention_backward", "_attention_forward", "_cached_attention"], print, processes=1)
"""


def runs(pid):
    """Say whether a process that is no child of ours runs; one that nobody has asked for its exit code does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@compiled_only
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for a process in /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_a_killed_parent_takes_the_compiling_processes_along(empty_cache, number):
    """A worker that goes on until it is done leaves its kernels in the cache; the last of these three comes late."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", COMPILES_LONG]
    with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True) as parent:
        worker = int(parent.stdout.readline())
        assert runs(worker)
        time.sleep(1)
        parent.send_signal(number)
        assert parent.wait(PATIENCE) == -number
        assert until(lambda: not runs(worker))
    assert not compiling.is_cached("_attention_forward")


@compiled_only
def test_nothing_is_compiled_ahead_where_nothing_can_be_kept(empty_cache, monkeypatch):
    """The reason comes once, as a warning; `warmup`, which has nothing else to do, fails."""

    def never(*words, **options):
        raise AssertionError("a process was started")

    monkeypatch.setattr(compiling.subprocess, "Popen", never)
    cache.make_private(empty_cache.directory)
    empty_cache.directory.chmod(0o777)
    monkeypatch.setattr(cache, "STORE", Store(empty_cache.directory))
    said = []
    with pytest.warns(CacheWarning, match="may be written by others"):
        compiling.compile_missing(["swiglu_forward", "global_norm"], said.append)
    assert said == ["2 kernels for this run alone, each at its first call"]
    done = CliRunner().invoke(abi_py.cli.cli, ["warmup"])
    assert done.exit_code == 1
    assert done.output.splitlines()[-1] == "error: nothing is compiled ahead, because nothing can be kept"


@pytest.mark.parametrize("terminal", [False, True])
def test_compiling_is_counted(monkeypatch, empty_cache, terminal):
    """On a terminal by a line that moves; in a pipe by two lines."""
    console = Console(file=io.StringIO(), force_terminal=terminal, width=80, highlight=False)

    def compile_kernels(names, done):
        for number, name in enumerate(names, 1):
            done(name, 1.0)
            shown = f"compile  {number} of 2 kernels, 0:0"
            assert not terminal or until(lambda shown=shown: shown in console.file.getvalue())

    monkeypatch.setattr(compiling, "compile_kernels", compile_kernels)
    monkeypatch.setattr(compiling, "is_cached", lambda name: name == "rope_forward")
    names = ["swiglu_forward", "rope_forward", "global_norm"]
    compile_showing(names, console, lambda text: console.print(f"compile  {text}", soft_wrap=True))
    lines = [line for line in console.file.getvalue().splitlines() if "of 2" not in line]
    assert "2 kernels for this processor, once" in lines[0]
    assert "done in " in lines[-1]
    assert terminal or console.file.getvalue().count("\n") == 2


@compiled_only
def test_a_kernel_of_bfloat16_is_not_that_of_float32(empty_cache):
    """Their files differ by types, which names do not show; the list of the variant does."""
    beginning = compiling.dispatchers()["swiglu_backward"][1]._cache.beginning
    empty_cache.write(f"{beginning}1.kernel", b"code")
    empty_cache.write("swiglu_backward-bf16.list", f"{beginning}1.kernel".encode())
    assert compiling.is_cached("swiglu_backward:bf16")
    assert not compiling.is_cached("swiglu_backward")
    empty_cache.write(f"{beginning}2.kernel", b"code")
    assert compiling.is_cached("swiglu_backward")


@compiled_only
def test_generation_needs_no_other_kernels(tmp_path):
    """In a process of its own: here, other tests have compiled."""
    (tmp_path / "t.py").write_text(
        "import numpy as np\n"
        "from abi_py.runs import compiling\n"
        "from abi_py.config import TrainableModelConfig\n"
        "from abi_py.generation.decoder import Decoder, weights_mark\n"
        "from abi_py.model import TrainableModel\n"
        "shape = dict(hidden_dim=16, num_layers=1, num_heads=2, num_kv_heads=1, intermediate_dim=16, vocab_size=32)\n"
        "config = TrainableModelConfig(**shape, max_seq_len=300)\n"
        "model = TrainableModel(config)\n"
        "weights_mark(model)\n"
        "decoder = Decoder(model)\n"
        "decoder.prefill(0, np.arange(256, dtype=np.int32) % 32)\n"
        "decoder.step(np.zeros(1, np.int32), np.zeros(1, np.int32))\n"
        "used = {name for name, (_, kernel) in compiling.dispatchers().items() if kernel.overloads}\n"
        "print(sorted(used ^ {*compiling.kernels_of_generation(config)}))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, str(tmp_path / "t.py")]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stdout) == (0, "['routines', 'routines:stream']\n"), done.stderr


DECODES_FROZEN = """
import numpy as np
from abi_py.cli.models import compile_for_decoding
from abi_py.config import TrainableModelConfig
from abi_py.formats.safetensors import Stored
from abi_py.generation.decoder import Decoder
from abi_py.kernels.engine.cache import KernelCache
from abi_py.kernels.storage import STORAGES
from abi_py.model import TrainableModel
from abi_py.model.frozen import FrozenModel
shape = dict(hidden_dim=32, num_layers=2, num_heads=2, num_kv_heads=1, intermediate_dim=16, vocab_size=32)
plain = TrainableModel(TrainableModelConfig(**shape, max_seq_len=300))
raw = {name: STORAGES["bf16"].encode_ref(w) if w.ndim == 2 else w for name, w in plain.weights.items()}
model = FrozenModel(plain.config, {name: Stored(w, w.ndim == 2) for name, w in raw.items()})
compile_for_decoding(model)
def never(kernel, types, target):
    raise AssertionError(f"compiled after compile_for_decoding: {types}")
KernelCache.load_overload = never
decoder = Decoder(model)
decoder.prefill(0, np.arange(256, dtype=np.int32) % 32)
decoder.step(np.zeros(1, np.int32), np.zeros(1, np.int32))
print("done")
"""


@compiled_only
def test_a_folder_in_bf16_is_decoded_with_what_was_compiled_before():
    """Or the speed that is shown of its first prompt has compiling in it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", DECODES_FROZEN]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_a_warning_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(warnings, "showwarning", None)
    with pytest.raises(SystemExit):
        abi_py.cli.main(["--version"])
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("one\nline", CacheWarning, stacklevel=1)
    assert capsys.readouterr().err == "warning: one line\n"


def test_work_is_shared_out_by_its_length():
    groups = compiling._share_out(["_attention_backward", "_attention_forward", "_product", "a", "b"], 2)
    assert sorted(name for group in groups for name in group) == sorted(
        ["_attention_backward", "_attention_forward", "_product", "a", "b"]
    )
    assert groups[0][0] == "_attention_backward"
    assert groups[1][:2] == ["_attention_forward", "_product"]
    groups = compiling._share_out(["_attention_backward", "routines", "routines:bf16"], 2)
    assert [group[0] for group in groups] == ["routines", "routines:bf16"]
    assert compiling._share_out([], 2) == []


def test_variants_of_kernels_are_compiled_last():
    names = ["_product:lora", "_product", "routines:bf16"]
    assert sorted(names, key=compile_worker._after_plain) == ["_product", "routines:bf16", "_product:lora"]


@compiled_only
def test_a_worker_may_be_given_a_variant_before_the_plain_kernel(tmp_path):
    """What runs the variant calls the plain kernel, too; which comes first is a matter of seconds measured."""
    code = "from abi_py.runs.compile_worker import worker; worker(['bias_forward:lora_narrow', 'bias_forward'])"
    environment = {**os.environ, "ABI_CACHE_DIR": str(tmp_path)}
    read, write = os.pipe()  # a worker ends when its input does
    try:
        command = [sys.executable, "-c", code]
        made = subprocess.run(command, env=environment, stdin=read, capture_output=True, text=True, check=False)
    finally:
        os.close(read)
        os.close(write)
    assert made.returncode == 0, made.stderr
    assert [line.split()[0] for line in made.stdout.splitlines()] == ["bias_forward", "bias_forward:lora_narrow"]


@compiled_only
def test_every_kernel_is_compiled_by_what_runs_it_and_once():
    """In a process of its own, where no other test has called one.

    Each layout of an operand is another compilation of many seconds: a step takes the same ones throughout.
    """
    code = """
from abi_py.runs import compile_worker, compiling
from abi_py.shape import ModelFamily
for name in compiling.kernel_names():
    kernel, _, variant = name.partition(":")
    if kernel not in (compiling.ROUTINES, compiling.STORED_ROWS):
        compile_worker.exercise(kernel, variant)
for family in ModelFamily:  # no other family takes other types than the one that each was compiled with
    for kernel, variant in (("global_norm", ""), ("_attention_forward", "bf16"), ("cache_append", ""),
                            ("_product", "lora"), ("_product", "lora_bf16")):
        compile_worker.exercise(kernel, variant, family)
# For saved bfloat16; for the columns of one row and of several; for whole rows and rows of heads.
twice = {"swiglu_backward": 2, "weighted_swiglu_backward": 2, "gelu_backward": 2, "cache_append": 2}
twice |= {"rms_norm_forward": 2, "rms_norm_backward": 2}
twice["bias_forward"] = 2  # of all parts together, and of each
twice |= {"_dora_forward": 2, "dora_backward": 2}  # the same
twice["_product"] = 7  # of whole arrays; of adapters, whose operands are columns of arrays, three; as many of bfloat16
twice["_streamed"] = 3  # of float32; of an expert's few rows by bfloat16: columns of an array, and whole ones
twice |= dict.fromkeys(compiling.ON_BLOCKS, 0)  # left to whoever opens a quantised model
for name, (_, kernel) in compiling.dispatchers().items():
    if len(kernel.overloads) != twice.get(name, 1):
        print(name, len(kernel.overloads))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr


def test_kernels_of_training_leave_other_optimizers_out():
    shape = preset("test")
    names = compiling.kernels_of_training(shape, "sgd")
    assert "adam_" not in names
    assert "_dropout" not in names
    if compiling.kernel_names():
        assert "sgd_" in names
        assert "_attention_forward" in names
        assert not any(":" in name for name in names)
        narrow = compiling.kernels_of_training(shape, "sgd", "bf16")
        assert {"swiglu_backward:bf16", "routines:bf16", "_product", "_attention_forward"} <= set(narrow)
        assert "swiglu_backward" not in narrow
        assert "routines" in narrow  # whatever else compiles runs in a step of float32


STEPS = """
import sys
from abi_py.runs import compile_worker, compiling
from abi_py.shape import ModelFamily
for precision in ("fp32", "bf16"):
    compile_worker.exercise("global_norm", "" if precision == "fp32" else precision, ModelFamily(sys.argv[1]))
shape = compiling.tiny_shape(ModelFamily(sys.argv[1]))
used = {name for name, (_, kernel) in compiling.dispatchers().items() if kernel.overloads}
listed = {name.partition(":")[0] for each in ("fp32", "bf16")
          for name in compiling.kernels_of_training(shape, "adamw", each)}
print(*sorted(used ^ listed - {"routines"}))
"""


@compiled_only
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_a_run_compiles_what_its_model_runs_and_no_more(family):
    words = [sys.executable, "-c", STEPS, family]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr


@compiled_only
def test_every_kernel_belongs_to_a_model():
    """`Layer.kernels` names none that is not there."""
    known = {name.partition(":")[0] for name in compiling.kernel_names()}
    for family in ModelFamily:
        assert {name.partition(":")[0] for name in compiling.of_layers(compiling.tiny_shape(family))} <= known


def test_compiling_says_what_failed(monkeypatch, empty_cache):
    monkeypatch.setattr(compiling.sys, "executable", "/bin/false")
    with pytest.raises(AbiError, match="exit code 1"):
        compiling.compile_kernels(["swiglu_forward"], lambda name, seconds: None)


def test_a_run_compiles_alone_where_no_process_can_be_started(monkeypatch, empty_cache):
    said = []
    monkeypatch.setattr(compiling.sys, "executable", "/no/such/python")
    monkeypatch.setattr(compiling, "is_cached", lambda name: False)
    compiling.compile_missing(compiling.kernels_of_training(preset("test"), "adamw", "bf16"), said.append)
    if compiling.kernel_names():
        assert "one by one instead" in said[-1]
