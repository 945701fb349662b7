"""What the tree promises about itself, read from the files: names, imports, the map in the README."""

import ast
import itertools
import re
from collections import deque
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KERNELS = sorted(path for path in (ROOT / "kernels").rglob("*.py") if path.stem != "__init__")
PRODUCT = sorted(path for path in (ROOT / "abi_py").rglob("*.py") if "kernels" not in path.relative_to(ROOT).parts)
PRODUCT += sorted((ROOT / "kernels").rglob("*.py"))
MAP = (ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").exists() else ""
PAGES = [*ROOT.glob("docs/*.md"), ROOT / "README.md", ROOT / "kernels/README.md", ROOT / "CHANGELOG.md"]
LONGEST = 400  # lines of a file of the product that gives no reason
REASON = re.compile(r"^Longer than 400 lines because \w+", re.MULTILINE)

# Who may import whom: only from a lower floor, or from its own room.
FLOORS = [
    {"kernels/engine"},
    {"kernels/storage"},
    {"kernels"},
    {"errors", "gradcheck", "reprs"},
    {"locks", "untrusted"},
    {"declared"},
    {"field_help"},
    {"fields", "files"},
    {"rope_scaling"},
    {"shape", "lora_config", "settings_file"},
    {"parameters"},
    {"formats"},
    {"model/inputs"},
    {"model/reference_experts"},
    {"model/reference"},
    {"model/layers"},
    {"families"},
    {"choices"},
    {"config"},
    {"model", "data"},
    {"training", "generation", "verification", "trainable_model"},
    {"abi", "runs"},
    {"pipelines"},
    {"cli"},
    {"__main__", "__init__"},  # the public names of abi_py, loaded when they are asked for
]
ROOMS = {name for names in FLOORS for name in names if name.startswith("model/")}
FORBIDDEN = {"torch", "scipy", "pickle", "jax", "tensorflow", "sklearn", "requests", "urllib", "http", "socket"}
# What Numba keeps of a compiled function holds objects of its own; the checksum is compared before (docs/decisions.md).
ALLOWED = {("kernels/engine/cache.py", "pickle")}


def operations():
    """Return the stems of the kernel files that define a reference: the operations."""
    files = sorted((ROOT / "kernels").glob("*.py"))
    return [path.stem for path in files if re.search(r"^def \w+_ref\(", path.read_text(encoding="utf-8"), re.MULTILINE)]


def dotted(path):
    """Return the name under which a file is imported: kernels/rope.py is abi_py.kernels.rope."""
    parts = [*path.relative_to(ROOT).parts[:-1], path.stem]
    parts = ["abi_py", *parts] if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {dotted(path): path for path in PRODUCT}


def imports(path, text=None, modules=MODULES):
    """Yield (line, absolute name of the file or package) of every import: at the top, in a function, for types only.

    A name of the whole package, which is loaded when it is asked for, is yielded as abi_py.NAME; so is what a call of
    `import_module` or `__import__` names.
    """
    package = dotted(path).split(".")
    package = package if path.stem == "__init__" else package[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8") if text is None else text)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
            yield from ((node.lineno, name if name in modules or module == "abi_py" else module) for name in names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from ((node.lineno, word.value) for word in node.args[:1] if isinstance(word, ast.Constant))


def circles(graph):
    """Return the shortest circle through each file that is in one: [a, b, a], each circle once."""
    found = {}
    for start in sorted(graph):
        before, waiting = {}, deque([start])
        while waiting and start not in before:
            here = waiting.popleft()
            for there in sorted(graph.get(here, ())):
                if there not in before:
                    before[there] = here
                    waiting.append(there)
        if start in before:
            circle = [start]
            while len(circle) == 1 or circle[-1] != start:
                circle.append(before[circle[-1]])
            found.setdefault(frozenset(circle), circle[::-1])
    return list(found.values())


def room(name):
    """Return the room of a file by its dotted name: kernels and model have rooms of their own."""
    parts = name.split(".")[1:] or ["__init__"]
    if "/".join(parts[:2]) in ROOMS:
        return "/".join(parts[:2])
    return "/".join(parts[: 2 if parts[0] == "kernels" and (ROOT / "kernels" / "/".join(parts[1:2])).is_dir() else 1])


def floor(name):
    return next((index for index, names in enumerate(FLOORS) if name in names), None)


def test_every_operation_has_its_four_files():
    assert len(operations()) >= 10
    for stem in operations():
        assert (ROOT / f"tests/kernels/test_{stem}.py").exists(), f"{stem} has no test"
        assert (ROOT / f"bench/bench_{stem}.py").exists(), f"{stem} has no benchmark"
        assert list((ROOT / "docs").glob(f"*-{stem}.md")), f"{stem} has no page"


def test_no_test_bench_or_page_without_its_kernel():
    names = {path.relative_to(ROOT / "kernels").with_name(path.stem).as_posix() for path in KERNELS}
    for path in (ROOT / "tests/kernels").rglob("test_*.py"):
        name = path.relative_to(ROOT / "tests/kernels").with_name(path.stem.removeprefix("test_")).as_posix()
        assert name in names, path
    stems = {name.rpartition("/")[2] for name in names}
    for path in (ROOT / "docs").glob("4-*.md"):
        assert path.stem.removeprefix("4-") in stems | {"model", "storage"}, path


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downwards(path):
    here = room(dotted(path))
    assert floor(here) is not None, f"{path} is on no floor; add {here} to FLOORS"
    for line, module in imports(path):
        if module.split(".")[0] != "abi_py" or module == "abi_py.__version__":
            continue
        there = room(module)
        assert floor(there) is not None, f"{path}:{line} imports {module}, which is on no floor"
        assert there == here or floor(there) < floor(here), f"{path}:{line}: {here} must not import {there}"


@pytest.mark.parametrize("text", ["from .. import LlamaTrainer", "import abi_py", "import_module('abi_py.runs.run')"])
def test_no_way_to_import_is_overlooked(text):
    ((_, module),) = imports(ROOT / "abi_py/data/batch.py", text)
    assert floor(room(module)) is None or floor(room(module)) > floor("data")


def product_graph():
    return {
        name: {module for _, module in imports(path) if module in MODULES and module != name}
        for name, path in MODULES.items()
    }


def test_no_two_files_import_each_other():
    found = [" -> ".join(circle) for circle in circles(product_graph())]
    assert not found, f"files that import each other: {'; '.join(found)}; move what they share into a file below both"


@pytest.mark.parametrize(
    "text",
    [
        "from . import c",
        "from .c import f",
        "import abi_py.data.c",
        "def g():\n    from .c import f",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..data.c import f",
    ],
)
def test_a_made_up_circle_is_found_and_named(text):
    texts = {
        "a": "from .b import f\nimport os",
        "b": text,
        "c": "from . import a",
        "d": "from .a import f\nfrom . import c",
    }
    files = {f"abi_py.data.{name}": ROOT / f"abi_py/data/{name}.py" for name in texts}
    graph = {name: {module for _, module in imports(path, texts[path.stem], files)} for name, path in files.items()}
    assert [[name[-1] for name in circle] for circle in circles(graph)] == [["a", "b", "c", "a"]]
    del graph["abi_py.data.c"]
    assert circles(graph) == []


def test_every_circle_is_found():
    assert circles({"a": {"b"}, "b": {"a", "c"}, "c": {"d"}, "d": {"b"}}) == [["a", "b", "a"], ["c", "d", "b", "c"]]
    assert circles({"a": {"a"}}) == [["a", "a"]]


def too_long(text):
    """Say whether a file has more lines than one should have, and its docstring no reason."""
    return len(text.splitlines()) > LONGEST and not REASON.search(ast.get_docstring(ast.parse(text)) or "")


def test_no_file_is_long_without_a_reason():
    found = {path.relative_to(ROOT).as_posix() for path in PRODUCT if too_long(path.read_text(encoding="utf-8"))}
    rule = f"more than {LONGEST} lines: make two files, or say why in the docstring (Longer than 400 lines because ...)"
    assert not found, f"{', '.join(sorted(found))}: {rule}"


def test_a_long_file_needs_a_reason_in_its_docstring():
    lines = "x = 1\n" * LONGEST
    reason = "Longer than 400 lines because it is one table."
    assert not too_long(lines)
    assert too_long(f"{lines}x = 1")
    assert too_long(f"# {reason}\n{lines}")
    assert too_long(f'"""A table.\n\nLonger than 400 lines because\n"""\n{lines}')
    assert not too_long(f'"""A table.\n\n{reason}\n"""\n{lines}')


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_forbidden_imports(path):
    for line, module in imports(path):
        name = module.split(".")[0]
        allowed = (str(path.relative_to(ROOT)), name) in ALLOWED
        assert allowed or name not in FORBIDDEN, f"{path}:{line} imports {module}"


def test_nobody_imports_the_package_kernels():
    # Hugging Face has a package of that name.
    for path in [*PRODUCT, *ROOT.glob("tests/**/*.py"), *ROOT.glob("bench/**/*.py"), *ROOT.glob("examples/*.py")]:
        for line, module in imports(path):
            assert module.split(".")[0] != "kernels", f"{path}:{line}: write abi_py.kernels"


def test_the_table_of_kernels_is_only_that():
    """Compiled kernels are kept by the text of all files but kernels/__init__.py, so nothing may come from there."""
    import abi_py.kernels

    table = ROOT / "kernels/__init__.py"
    names = {path.stem for path in KERNELS if path.parent == table.parent}
    names |= {path.parent.name for path in table.parent.glob("*/__init__.py")}
    assert sorted(abi_py.kernels.__all__) == dir(abi_py.kernels) == sorted(names)
    assert {module for _, module in imports(table)} == {"importlib", "types"}
    for path in KERNELS:
        for line, module in imports(path):
            assert module != "abi_py.kernels", f"{path}:{line}: take it from the file in which it is"


def test_only_jit_decorates():
    for path in PRODUCT:
        if path == ROOT / "kernels/engine/jit.py":
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        names |= {node.name for node in ast.walk(tree) if isinstance(node, ast.alias)}  # whatever it is called here
        typing = (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "typing")
        names -= {alias.name for node in typing for alias in node.names}  # its `overload` is for type checkers
        decorators = {"njit", "jit", "vectorize", "guvectorize", "register_jitable", "overload", "stencil", "cfunc"}
        assert not names & decorators, path


def test_a_constant_of_the_kernels_has_one_meaning():
    homes = {}
    # What each storage has of its own, by what its bytes are.
    own = {"AROUND", "GROUPS", "MIDDLES", "RAISED", "STEPS", "STORAGE", "TOP", "TRIED", "VALUES"}
    for path in KERNELS:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            names = [part for target in targets for part in getattr(target, "elts", [target])]
            for name in {part.id for part in names if isinstance(part, ast.Name) and part.id.isupper()}:
                homes.setdefault(name, []).append(str(path.relative_to(ROOT)))
    assert len(homes) > 40
    kept = lambda name, path: name in own and path.startswith("kernels/storage/")  # noqa: E731
    homes = {name: [path for path in paths if not kept(name, path)] for name, paths in homes.items()}
    twice = {name: paths for name, paths in homes.items() if len(paths) > 1}
    assert not twice


def test_no_bare_assert_and_no_todo_in_the_product():
    for path in PRODUCT:
        text = path.read_text(encoding="utf-8")
        assert not any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(text))), f"{path} checks with assert"
        assert not re.search(r"\b(TODO|FIXME|XXX)\b", text), path


def idle(test):
    """Say why an assertion can't fail, or a part of it can't matter; None if neither is plain from the text."""
    if (isinstance(test, ast.Constant) and test.value) or (isinstance(test, ast.Tuple) and test.elts):
        return "is true"
    if isinstance(test, ast.Compare) and isinstance(test.ops[0], ast.Eq | ast.LtE | ast.GtE):
        left, right = ast.unparse(test.left), ast.unparse(test.comparators[0])
        if left == right and "(" not in left:  # two calls may give two things
            return "compares with itself"
        if left.startswith("len(") and right == "0" and isinstance(test.ops[0], ast.GtE):
            return "is true of every length"
    if isinstance(test, ast.BoolOp):
        if isinstance(test.op, ast.Or) and any(map(idle, test.values)):
            return "has a part that is true"
        parts = [value for value in test.values if isinstance(value, ast.Compare) and isinstance(value.ops[0], ast.In)]
        for one, other in itertools.permutations(parts, 2):
            texts = [getattr(part.left, "value", None) for part in (one, other)]
            within = ast.dump(one.comparators[0]) == ast.dump(other.comparators[0])
            if within and all(isinstance(text, str) for text in texts) and texts[0] in texts[1]:
                return f"looks for {texts[1]!r} where {texts[0]!r} is enough"
    return None


@pytest.mark.parametrize(
    "text",
    [
        *("'words'", "(x == 1, 'message')", "x == 1 or 'words'", "table['a'] == table['a']", "len(x) >= 0"),
        *("'</s>' in out or '</b></s>' in out", "'a' in out and 'ab' in out"),
    ],
)
def test_idle_assertions_are_known(text):
    assert idle(ast.parse(text, mode="eval").body)


def test_no_assertion_is_idle():
    for path in sorted(ROOT.glob("tests/**/*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Assert):
                assert idle(node.test) is None, f"{path.relative_to(ROOT)}:{node.lineno} {idle(node.test)}"


def test_the_map_in_the_readme_is_complete():
    (block,) = re.findall(r"^```\n(abi_py/\n.*?)^```", MAP, re.MULTILINE | re.DOTALL)
    folders, on_map = [], []
    for line in filter(str.strip, block.splitlines()):
        words = line.split()
        del folders[(len(line) - len(line.lstrip())) // 2 :]
        if words[0].endswith("/"):
            folders.append(words[0])
        on_map += ["".join([*folders, word]) for word in itertools.takewhile(lambda word: word.endswith(".py"), words)]
    there = {path.relative_to(ROOT).as_posix() for path in PRODUCT if path.name not in ("__init__.py", "__main__.py")}
    assert there - set(on_map) == set(), "not on the map in README.md"
    assert set(on_map) - there == set(), "on the map in README.md, and not there"
    assert len(on_map) == len(set(on_map)), "twice on the map in README.md"


def test_links_between_pages():
    for page in PAGES:
        for target, place in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", page.read_text(encoding="utf-8")):
            other = page.parent / target if target else page
            assert other.exists(), f"{page.name} links to {target}"
            heads = re.findall(r"^#+ (.*)$", other.read_text(encoding="utf-8"), re.MULTILINE) if place else []
            anchors = {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}
            assert not place or place in anchors, f"{page.name} links to {target}#{place}"


def test_files_that_are_named_in_text_exist():
    """In pages, docstrings and comments: what was moved is named where it is now."""
    past = {"docs/log.md", "CHANGELOG.md", "docs/extending.md"}  # the files of then; those of a made-up operation
    named = re.compile(r"(?<![\w/.])((?:abi_py|kernels|tests|bench|docs)/[\w/.-]*\.(?:py|md|txt))\b")
    for path in [*PAGES, *PRODUCT, *ROOT.glob("bench/*.py")]:
        if path.relative_to(ROOT).as_posix() not in past:
            for name in named.findall(path.read_text(encoding="utf-8")):
                assert (ROOT / name).exists(), f"{path.relative_to(ROOT)} names {name}"


def test_public_names():
    import abi_py

    public = set(abi_py._HOMES) | set(abi_py._MODULES) | {"__version__"}
    assert set(abi_py.__all__) == public == set(dir(abi_py))
    for name in abi_py.__all__:
        assert getattr(abi_py, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = abi_py.no_such_name
    tree = ast.parse((ROOT / "abi_py/__init__.py").read_text(encoding="utf-8"))
    for_checkers = {
        alias.asname
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level
        for alias in node.names
    }
    assert set(abi_py._HOMES) <= for_checkers


def test_import_is_quick_and_without_numba():
    import subprocess
    import sys

    code = "import sys, abi_py; abi_py.__version__; sys.exit('numba' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_every_package_is_listed():
    import configparser

    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    listed = set(setup["options"]["packages"].split())
    files = [path for folder in ("abi_py", "kernels") for path in (ROOT / folder).rglob("__init__.py")]
    assert listed == {dotted(path) for path in files}


def test_no_two_files_of_tests_have_one_name():
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]  # pytest imports them by it
    twice = sorted({name for name in names if names.count(name) > 1})
    assert not twice, f"{', '.join(twice)}: give each file of tests a name of its own"
