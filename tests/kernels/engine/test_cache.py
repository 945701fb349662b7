"""The cache of compiled code: what is read is what was written, the directory is the user's own, nothing ends a run."""

import errno
import os
import shutil
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from waiting import PATIENCE

from abi_py.kernels.engine import cache
from abi_py.kernels.engine.cache import DIGEST, PART, PART_SECONDS, STORE, CacheWarning, Store, cache_directory
from abi_py.kernels.engine.jit import JIT, kernel, prange

ROOT = Path(__file__).resolve().parents[3]
compiled_only = pytest.mark.skipif(not JIT, reason="nothing is compiled")
posix_only = pytest.mark.skipif(os.name != "posix", reason="owners and permissions of POSIX")


# -- the directory's name ------------------------------------------------------------------------


def test_directory_depends_on_settings(monkeypatch, tmp_path):
    monkeypatch.setenv("ABI_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("ABI_SIMD", "avx2")
    first = cache_directory()
    assert first.parent == tmp_path
    monkeypatch.setenv("ABI_SIMD", "generic")
    assert cache_directory() != first


def test_a_user_without_a_home_can_import_the_kernels(monkeypatch, tmp_path):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("ABI_CACHE_DIR", str(tmp_path))
    assert cache_directory().parent == tmp_path
    monkeypatch.delenv("ABI_CACHE_DIR")
    assert not cache_directory().parents[1].exists()


def test_a_relative_directory_does_not_move_with_the_process(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ABI_CACHE_DIR", "here")
    assert cache_directory().parent == tmp_path / "here"


@pytest.mark.parametrize("name", cache.NUMBA_SETTINGS)
def test_directory_depends_on_what_numba_is_told(monkeypatch, name):
    """Kernels of a run with NUMBA_OPT=0, say, are slow; they must not be those of the next run as well."""
    before = cache_directory()
    assert hasattr(cache.numba_config, name)
    monkeypatch.setattr(cache.numba_config, name, "another")
    assert cache_directory() != before


def test_directory_depends_on_every_kernel_file(monkeypatch, tmp_path):
    shutil.copytree(Path(cache.__file__).resolve().parents[1], tmp_path / "kernels")
    monkeypatch.setattr(cache, "__file__", str(tmp_path / "kernels/engine/cache.py"))
    seen = {cache_directory()}
    assert cache_directory() in seen
    for number, name in enumerate(("rope.py", "engine/simd.py"), start=2):
        with (tmp_path / "kernels" / name).open("a") as file:
            file.write("\n")
        seen.add(cache_directory())
        assert len(seen) == number, name
    (tmp_path / "kernels/__init__.py").write_text("")
    assert cache_directory() in seen  # a table of names; tests/test_guards.py holds that it is no more


# -- files ---------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path, monkeypatch):
    """Return a store in a directory of its own, which this process's kernels use."""
    monkeypatch.setattr(cache, "STORE", Store(tmp_path / "cache" / "key"))
    return cache.STORE


def test_what_is_written_is_read(store):
    assert store.read("a") is None
    store.write("a", b"one")
    store.write("b", b"")
    store.write("a", b"two")
    assert bytes(store.read("a")) == b"two"
    assert bytes(store.read("b")) == b""
    assert store.names("") == ["a", "b"]
    assert store.names("b") == ["b"]


def overwrite(content):
    return lambda path: path.write_bytes(content(path.read_bytes()))


def put_directory(path):
    path.unlink()
    path.mkdir()


DAMAGES = {
    "empty": overwrite(lambda x: b""),
    "shorter than a checksum": overwrite(lambda x: x[: DIGEST - 1]),
    "cut": overwrite(lambda x: x[:-1]),
    "longer": overwrite(lambda x: x + b"\0"),
    "a bit of the checksum": overwrite(lambda x: bytes([x[0] ^ 1]) + x[1:]),
    "a bit of the content": overwrite(lambda x: x[:-1] + bytes([x[-1] ^ 128])),
    "zeros": overwrite(lambda x: bytes(len(x))),
    "another's content": lambda path: path.write_bytes(path.with_name("other").read_bytes()),
    "a directory": put_directory,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_what_is_damaged_is_not_read_and_can_be_written_again(store, damage):
    store.write("other", b"other")
    store.write("name", b"content")
    damage(store.path("name"))
    with pytest.warns(CacheWarning, match=r"cache/key/name is damaged \(it.*\); what is damaged is compiled again"):
        assert store.read("name") is None
    assert store.read("name") is None  # a second warning would be an error
    store.write("name", b"content")
    assert bytes(store.read("name")) == b"content"


def test_what_may_not_be_read_is_damaged(store, monkeypatch):
    def closed(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    store.write("name", b"content")
    monkeypatch.setattr(Path, "read_bytes", closed)
    with pytest.warns(CacheWarning, match=r"name is damaged \(Permission denied\)"):
        assert store.read("name") is None


def test_a_full_directory_in_the_place_of_a_file_is_kept(store):
    (store.path("name") / "mine").mkdir(parents=True)
    store.directory.chmod(0o700)
    store.directory.parent.chmod(0o700)
    with pytest.warns(CacheWarning, match=r"not kept: .*/key/name: Is a directory; set ABI_CACHE_DIR"):
        store.write("name", b"content")
    assert (store.path("name") / "mine").is_dir()
    assert store.names("") == ["name"]  # and nothing half-written


def test_one_flipped_bit_anywhere_is_found(store, rng):
    """In copies of the files that this process's kernels were compiled into, if there are any yet."""
    sources = [path for path in STORE.directory.glob("*") if path.is_file() and not path.name.startswith(PART)]
    for path in sources[:40]:
        store.write(path.name, path.read_bytes()[DIGEST:])
    store.write("made", bytes(1000))
    store._told.add("damage")
    names = store.names("")
    for _ in range(500):
        path = store.path(names[rng.integers(len(names))])
        raw = bytearray(path.read_bytes())
        bit = int(rng.integers(8 * len(raw)))
        raw[bit // 8] ^= 1 << bit % 8
        path.write_bytes(raw)
        assert store.read(path.name) is None, (path, bit)
        raw[bit // 8] ^= 1 << bit % 8
        path.write_bytes(raw)
        assert store.read(path.name) is not None


def test_a_reader_beside_two_writers_finds_all_or_nothing(store):
    contents, wrong = [bytes([value]) * 100_000 for value in (1, 2)], []

    def write(content):
        for _ in range(60):
            store.write("name", content)

    writers = [threading.Thread(target=write, args=(content,)) for content in contents]
    store.write("name", contents[0])
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        found = store.read("name")
        if found is None or bytes(found) not in contents:
            wrong.append(found)
    assert not wrong
    assert [path.name for path in store.directory.iterdir()] == ["name"]


def test_what_a_killed_process_left_is_removed_when_it_is_old(store):
    store.write("name", b"")
    old, young = (store.path(f"{PART}{age}") for age in ("old", "young"))
    for part in (old, young):
        part.write_bytes(b"half")
    long_ago = time.time() - PART_SECONDS - 60
    os.utime(old, (long_ago, long_ago))
    store.write("name", b"")
    assert not old.exists()
    assert young.exists()


# -- the directory -------------------------------------------------------------------------------


@posix_only
def test_the_directory_is_made_for_the_user_alone(store):
    before = os.umask(0)
    try:
        store.write("name", b"content")
    finally:
        os.umask(before)
    for path, mode in ((store.directory.parent, 0o700), (store.directory, 0o700), (store.path("name"), 0o600)):
        assert stat.S_IMODE(path.stat().st_mode) == mode, path


@posix_only
@pytest.mark.parametrize("above", [False, True])
@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777])
def test_a_directory_that_others_may_write_is_not_used(store, mode, above):
    store.write("name", b"content")
    directory = store.directory.parent if above else store.directory
    directory.chmod(mode)
    again = Store(store.directory)
    with pytest.warns(CacheWarning, match=rf"neither read nor kept: {directory} may be written by others \(chmod go-w"):
        assert again.read("name") is None
    again.write("other", b"")  # a second warning would be an error
    assert again.names("") == []
    assert not again.has_room()
    assert [path.name for path in store.directory.iterdir()] == ["name"]


@posix_only
def test_the_directory_above_may_be_the_systems_for_temporary_files(store):
    store.write("name", b"content")
    store.directory.parent.chmod(0o1777)
    assert bytes(Store(store.directory).read("name")) == b"content"


@posix_only
def test_a_directory_of_somebody_else_is_not_used(store, monkeypatch):
    store.write("name", b"content")
    owner = os.geteuid()
    monkeypatch.setattr(cache.os, "geteuid", lambda: owner + 1)
    with pytest.warns(CacheWarning, match=rf"belongs to another user \(id {owner}\); set ABI_CACHE_DIR"):
        assert Store(store.directory).read("name") is None


def test_a_directory_that_cannot_be_made_is_not_used(tmp_path):
    (tmp_path / "file").write_text("a file where the directory should be")
    store = Store(tmp_path / "file" / "cache" / "key")
    with pytest.warns(CacheWarning, match="neither read nor kept: .*file.*: (Not a directory|File exists)"):
        assert store.read("name") is None


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_takes_nothing_more_is_told_once_and_still_read(store, monkeypatch, code):
    def full(descriptor, mode):
        os.close(descriptor)
        raise OSError(code, os.strerror(code))

    store.write("before", b"content")
    assert store.has_room()
    monkeypatch.setattr(cache, "open", full, raising=False)
    remedy = "free some space, or set ABI_CACHE_DIR" if code == errno.ENOSPC else "set ABI_CACHE_DIR"
    with pytest.warns(CacheWarning, match=f"not kept: {store.directory}: {os.strerror(code)}; {remedy}"):
        store.write("name", b"content")
    store.write("other", b"content")  # a second warning would be an error
    assert not store.has_room()
    assert bytes(store.read("before")) == b"content"
    assert [path.name for path in store.directory.iterdir()] == ["before"]
    monkeypatch.undo()
    assert store.has_room()  # somebody has made room


# -- kernels -------------------------------------------------------------------------------------


def double(y, x):
    for i in prange(len(x)):
        y[i] = 2 * x[i]


def doubled(dtype=np.float32):
    """Return whether a process that begins now would compile, having checked what `double` computes."""
    compiled = kernel(double)
    x = np.arange(5, dtype=dtype)
    y = np.empty_like(x)
    compiled(y, x)
    assert y.tolist() == [0, 2, 4, 6, 8]
    return not compiled.stats.cache_hits


@compiled_only
def test_kernels_are_compiled_once_for_each_list_of_types(store):
    assert doubled()
    assert not doubled()
    assert doubled(np.int64)
    assert not doubled(np.int64)
    assert not doubled()
    assert len(store.names(f"{__name__}.double-")) == 2
    assert all(kernel(double)._cache.cache_path == str(store.directory) for _ in range(2))


@compiled_only
def test_what_only_compiling_needs_is_not_loaded(tmp_path):
    program = (
        "import sys, numpy as np\n"
        "from abi_py.kernels.bias import bias_forward\n"
        "bias_forward(np.ones((2, 4), np.float32), np.ones(4, np.float32))\n"
        "print('numba.np.linalg' in sys.modules)"
    )
    environment = os.environ | {"ABI_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    said = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=True,
        )
        said.append(done.stdout.strip())
    assert said == ["True", "False"]  # compiled, then read


@compiled_only
def test_a_damaged_kernel_is_not_even_unpickled(store, monkeypatch):
    assert doubled()
    (name,) = store.names("")

    def never(content):
        raise AssertionError("unpickled what was not verified")

    monkeypatch.setattr(cache.pickle, "loads", never)
    for damage in ("empty", "cut", "a bit of the content", "a directory"):
        DAMAGES[damage](store.path(name))
        store._told.clear()
        with pytest.warns(CacheWarning, match="damaged"):
            assert doubled()
        assert store.read(name) is not None


@compiled_only
def test_kernels_run_where_nothing_can_be_kept(store):
    store.directory.parent.write_text("a file where the directory should be")
    with pytest.warns(CacheWarning, match="neither read nor kept"):
        assert doubled()
    assert doubled()  # and no second warning, which would be an error


TRAINING = """
import hashlib, sys
import numpy as np
from abi_py import LlamaTrainer, LlmTrainingConfig, TrainableModel, TrainableModelConfig
from abi_py.kernels.engine.cache import Store
read, names = Store.read, []
Store.read = lambda store, name: names.append(name) or read(store, name)
model = TrainableModel(TrainableModelConfig(
    hidden_dim=16, num_layers=2, num_heads=2, num_kv_heads=1, intermediate_dim=16, vocab_size=32, max_seq_len=8))
config = LlmTrainingConfig(learning_rate=1e-2, grad_accum_steps=1, max_seq_len=8, warmup_steps=0)
trainer = LlamaTrainer(model, config)
ids = np.random.default_rng(0).integers(0, 32, (4, 9))
for _ in range(3):
    trainer.train_step(ids[:, :-1], ids[:, 1:])
print(hashlib.sha256(model.collect_weights().tobytes()).hexdigest(), *names)
"""


def train(directory, *flags):
    environment = {**os.environ, "ABI_CACHE_DIR": str(directory), "PYTHONPATH": str(ROOT)}
    words = [sys.executable, *flags, "-c", TRAINING]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    digest, *names = done.stdout.split()
    return digest, names, done.stderr


@compiled_only
def test_training_over_a_damaged_cache_has_the_same_weights(tmp_path, rng):
    """One random bit of a random file that training reads; ABI_FLIPS=100 for a campaign."""
    digest, names, _ = train(STORE.directory.parent)  # on a cold cache, this compiles
    cache = tmp_path / "cache" / STORE.directory.name
    make_cache = shutil.copytree(STORE.directory, cache)
    for path in (make_cache.parent, make_cache):
        path.chmod(0o700)
    for _ in range(int(os.environ.get("ABI_FLIPS", "2"))):
        path = cache / names[rng.integers(len(names))]
        whole = path.read_bytes()
        raw, bit = bytearray(whole), int(rng.integers(8 * len(whole)))
        raw[bit // 8] ^= 1 << bit % 8
        path.write_bytes(raw)
        again, _, told = train(cache.parent)
        assert again == digest, (path, bit)
        assert told.count("CacheWarning") == 1, told
        assert path.name in told
        again, _, told = train(cache.parent, "-Werror")
        assert (again, told) == (digest, "")  # it was compiled again, and kept
