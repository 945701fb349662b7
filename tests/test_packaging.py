"""The source archive and the wheel, built here from what git holds: nothing is missing, nothing is too much."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from configparser import ConfigParser
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = ConfigParser()
SETTINGS.read(ROOT / "setup.cfg", encoding="utf-8")
PAGE = ROOT / SETTINGS["metadata"]["long_description"].removeprefix("file: ")
BUILD = "import sys; from setuptools import build_meta as b; out = sys.argv[1]; b.build_sdist(out); b.build_wheel(out)"
MADE = re.compile(r"PKG-INFO|abi_py\.egg-info/.*")  # by the build, in the source archive


def tracked():
    """Return the files in git, links as themselves; where there is none, those of the tree that it would not ignore."""
    if shutil.which("git") is not None and (ROOT / ".git").exists():
        done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
        return [name for name in done.stdout.split("\0") if name and (ROOT / name).exists()]
    patterns = (ROOT / ".gitignore").read_text(encoding="utf-8").split()

    def ignored(folder, name):
        path = "/" + os.path.relpath(os.path.join(folder, name), ROOT)
        return any(fnmatch(path if each.startswith("/") else name, each.rstrip("/")) for each in patterns)

    found = []
    for folder, folders, files in os.walk(ROOT):
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        folders[:] = [name for name in folders if name not in links and not ignored(folder, name)]
        kept = [name for name in files + links if not ignored(folder, name)]
        found += [os.path.relpath(os.path.join(folder, name), ROOT) for name in kept]
    return [name for name in found if not MADE.fullmatch(name)]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Build both from a copy of what is in git; return its names, and those of the archive and of the wheel."""
    setuptools = pytest.importorskip("setuptools")
    if int(setuptools.__version__.split(".")[0]) < 77:
        pytest.skip("the build needs setuptools 77")
    names = tracked()
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    for name in names:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tree / name, follow_symlinks=False)
    done = subprocess.run([sys.executable, "-c", BUILD, str(out)], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (archive,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    with tarfile.open(archive) as file:
        members = [member for member in file.getmembers() if not member.isdir()]
    with zipfile.ZipFile(wheel) as file:
        inside = file.namelist()
        metadata = file.read(next(name for name in inside if name.endswith("/METADATA"))).decode()
    return names, {member.name.partition("/")[2]: member for member in members}, inside, metadata


def test_the_source_archive_is_what_git_holds(built):
    names, members, _, _ = built
    assert {name for name in members if not MADE.fullmatch(name)} == set(names)
    assert members["abi_py/kernels"].issym()
    assert members["abi_py/kernels"].linkname == "../kernels"


def test_the_wheel_has_all_of_the_product_and_nothing_else(built):
    names, _, inside, _ = built
    product = {name for name in names if name.startswith("abi_py/") and name != "abi_py/kernels"}
    product |= {f"abi_py/{name}" for name in names if name.startswith("kernels/") and name.endswith(".py")}
    assert {name for name in inside if ".dist-info/" not in name} == product
    assert {"abi_py/py.typed", "abi_py/kernels/rope.py", "abi_py/data/deepzig_conversations.jsonl"} <= product


def test_the_metadata(built):
    _, _, _, metadata = built
    for line in ("License-Expression: MIT", "Description-Content-Type: text/markdown", "Classifier: Typing :: Typed"):
        assert line in metadata.splitlines()
    assert metadata.rstrip().endswith(PAGE.read_text(encoding="utf-8").rstrip())


def test_the_page_of_an_index_has_no_link_into_the_tree():
    """There is no tree beside it: a link must be a whole address, or a place on the page itself."""
    markdown = pytest.importorskip("markdown_it")  # rich brings it
    tokens = markdown.MarkdownIt().parse(PAGE.read_text(encoding="utf-8"))
    inner = [child for token in tokens for child in token.children or ()]
    found = [child.attrs for child in inner if child.type in ("link_open", "image")]
    links = [attributes.get("href") or attributes.get("src") for attributes in found]
    assert [link for link in links if not re.match(r"https?://|#", str(link))] == []
    assert tokens[0].tag == "h1"


def test_the_oldest_python_is_named_once_more():
    oldest = SETTINGS["options"]["python_requires"].removeprefix(">=")
    versions = re.findall(r"Python :: (3\.\d+)$", SETTINGS["metadata"]["classifiers"], re.MULTILINE)
    assert versions[0] == oldest
    ruff = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'target-version = "py{oldest.replace(".", "")}"' in ruff
