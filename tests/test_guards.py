"""What the tree promises about itself, read from the files: names, imports, the map in the README."""

import ast
import itertools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KERNELS = sorted(path for path in (ROOT / "kernels").glob("*.py") if path.stem != "__init__")
PRODUCT = sorted(path for path in (ROOT / "abi_py").rglob("*.py") if "kernels" not in path.relative_to(ROOT).parts)
PRODUCT += KERNELS
MAP = (ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").exists() else ""

# Who may import whom: only from a lower floor, or from its own package.
FLOORS = [
    {"kernels"},
    {"errors", "gradcheck"},
    {"locks", "untrusted"},
    {"fields", "files"},
    {"shape"},
    {"config"},
    {"parameters"},
    {"formats"},
    {"model", "data"},
    {"training", "generation", "verification", "trainable_model"},
    {"abi", "pipelines"},
    {"cli"},
    {"__main__"},
]
FORBIDDEN = {"torch", "scipy", "pickle", "jax", "tensorflow", "sklearn", "requests", "urllib", "http", "socket"}
# What Numba keeps of a compiled function holds objects of its own; the checksum is compared before (docs/decisions.md).
ALLOWED = {("kernels/_cache.py", "pickle")}


def operations():
    """Return the stems of the kernel files that define a reference: the operations."""
    return [
        path.stem for path in KERNELS if re.search(r"^def \w+_ref\(", path.read_text(encoding="utf-8"), re.MULTILINE)
    ]


def imports(path):
    """Yield (line, absolute module name) of every import in a file, those inside functions too."""
    package = ["abi_py", "kernels"] if path in KERNELS else list(path.relative_to(ROOT).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            if node.module and module not in ("abi_py", "abi_py.kernels"):
                yield node.lineno, module
            else:
                yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def room(path):
    if path in KERNELS:
        return "kernels"
    parts = path.relative_to(ROOT / "abi_py").parts
    return parts[0].removesuffix(".py")


def floor(name):
    return next((index for index, names in enumerate(FLOORS) if name in names), None)


def test_every_operation_has_its_four_files():
    assert len(operations()) >= 10
    for stem in operations():
        assert (ROOT / f"tests/kernels/test_{stem}.py").exists(), f"{stem} has no test"
        assert (ROOT / f"bench/bench_{stem}.py").exists(), f"{stem} has no benchmark"
        assert list((ROOT / "docs").glob(f"*-{stem}.md")), f"{stem} has no page"


def test_no_test_bench_or_page_without_its_kernel():
    stems = {path.stem.lstrip("_") for path in KERNELS}
    for path in (ROOT / "tests/kernels").glob("test_*.py"):
        assert path.stem.removeprefix("test_") in stems, path
    for path in (ROOT / "docs").glob("4-*.md"):
        assert path.stem.removeprefix("4-") in stems | {"model"}, path


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downwards(path):
    here = room(path)
    if here == "__init__":
        return  # the public names, loaded lazily
    assert floor(here) is not None, f"{path} stands on no floor; add it to FLOORS"
    for line, module in imports(path):
        parts = module.split(".")
        if parts[0] != "abi_py" or len(parts) < 2:
            continue
        there = parts[1]
        if there in ("__version__", here):
            continue
        assert floor(there) is not None, f"{path}:{line} imports {module}, which stands on no floor"
        assert floor(there) < floor(here), f"{path}:{line}: {here} must not import {there}"


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


def test_only_jit_decorates():
    for path in PRODUCT:
        if path.name == "_jit.py":
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert not names & {"njit", "jit", "vectorize", "guvectorize", "register_jitable", "overload"}, path


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
    names = set(re.findall(r"[\w-]+\.py\b", block))
    for path in PRODUCT:
        if path.name in ("__init__.py", "__main__.py"):
            continue
        assert path.name in names, f"{path.relative_to(ROOT)} is not on the map in README.md"
    there = {path.name for path in PRODUCT}
    assert names <= there, f"the map in README.md names what is not there: {names - there}"


def test_what_the_readme_names_exists():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", MAP):
        assert (ROOT / target).exists(), f"README.md links to {target}"


def test_links_between_pages():
    for page in [*ROOT.glob("docs/*.md"), ROOT / "kernels/README.md", ROOT / "CHANGELOG.md"]:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


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
    there = {".".join(path.relative_to(ROOT).parts[:-1]) for path in (ROOT / "abi_py").rglob("__init__.py")}
    assert listed == there | {"abi_py.kernels"}
