"""Every function that reads a file, and every format, is reached by some reader of the fuzzer."""

import ast
import dataclasses
import sys
from importlib.util import find_spec
from pathlib import Path

import fuzz
import pytest

import abi_py

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the fuzzer's limits of a process are POSIX's")

ROOT = Path(abi_py.__file__).resolve().parent
DAMAGED = 6  # inputs of each reader: what looks for a wrong line of YAML is reached by damaged files alone
READS = {"read_json", "read_yaml", "read_bytes", "read_text", "read_safetensors", "map_safetensors", "open_gguf"}
READS |= {"open", "np.memmap", "np.fromfile", "mmap.mmap"}
WRITING = ("'w'", "'wb'", "'a'", "'ab'", "mode")  # modes of `open`

OURS = "writes, and reads what it has just written"
MACHINE = "what the system says of the machine"
NOT_HOSTILE = {  # functions, and files of formats, that no file from elsewhere reaches, and why
    "cli/describe.py: cpu_name": MACHINE,
    "cli/resume.py: _about_file": "four bytes, for a message",
    "data/corpus.py: _library_documents": "Python's own library",
    "formats/deepzig.py": OURS,
    "formats/gguf/checking.py": OURS,
    "formats/gguf/checking.py: read_again": OURS,
    "formats/gguf/vocabulary_writing.py": OURS,
    "formats/gguf/writing.py": OURS,
    "formats/merged.py": OURS,
    "pipelines/chain.py: _figures": "the report of a run, as the reader of runs has it",
    "runs/plan.py: available_memory": MACHINE,
    "training/metrics.py: memory_in_use": MACHINE,
    "training/saving.py: _bring_best": "a checkpoint that the run itself has made, copied",
}


def _name(call):
    """Return what is called, by its last word where it is a method."""
    name = ast.unparse(call.func)
    return name.rpartition(".")[2] if name.endswith((".read_text", ".read_bytes")) else name


def _reads(node):
    """Say whether a function, without those inside of it, calls what reads a file."""
    for call in ast.walk(node):
        if isinstance(call, ast.Call) and _name(call) in READS:
            mode = ast.unparse(call.args[1]) if _name(call) == "open" and len(call.args) > 1 else ""
            if mode not in WRITING:
                return True
    return False


def functions_that_read():
    """Return them as "file: function"."""
    found = set()
    for path in ROOT.rglob("*.py"):
        file = path.relative_to(ROOT).as_posix()
        if not file.startswith("kernels/"):
            nodes = ast.walk(ast.parse(path.read_text("utf-8")))
            found |= {f"{file}: {node.name}" for node in nodes if isinstance(node, ast.FunctionDef) and _reads(node)}
    return found


def formats():
    return {path.relative_to(ROOT).as_posix() for path in (ROOT / "formats").rglob("[a-z]*.py")}


@pytest.fixture(scope="module")
def reached(tmp_path_factory):
    """Return the functions that the readers call, as "file: function"."""
    codes = set()

    def watched(read):
        def watching(folder):
            sys.setprofile(lambda frame, event, argument: codes.add(frame.f_code))
            try:
                read(folder)
            finally:
                sys.setprofile(None)

        return watching

    table = [dataclasses.replace(reader, read=watched(reader.read)) for reader in dict.fromkeys(fuzz.schedule([]))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fuzz, "schedule", lambda names: table)
        folder = tmp_path_factory.mktemp("readers")
        worker = fuzz.Worker([], 0, folder)
        patch.chdir(folder)
        for number in range(DAMAGED * len(table)):
            worker.read(number)
    places = [(Path(code.co_filename).resolve(), code.co_name) for code in codes]
    return {f"{path.relative_to(ROOT).as_posix()}: {name}" for path, name in places if ROOT in path.parents}


def test_every_function_that_reads_a_file_has_a_reader(reached):
    without_library = set() if find_spec("pyarrow") else {"data/parquet.py: parquet_rows"}
    missing = functions_that_read() - reached - NOT_HOSTILE.keys() - without_library
    assert not missing, "\n".join(sorted(missing))


def test_every_format_has_a_reader(reached):
    missing = formats() - {place.partition(":")[0] for place in reached} - NOT_HOSTILE.keys()
    assert not missing, "\n".join(sorted(missing))


def test_what_needs_no_reader_is_there():
    assert NOT_HOSTILE.keys() <= functions_that_read() | formats()
