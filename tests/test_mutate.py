"""The edits of `mutate.py` still apply, and are still Python."""

import ast

import pytest
from mutate import MUTATIONS, ROOT


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: f"{mutation.file}:{mutation.new.strip()[:40]}")
def test_an_edit_applies_once(mutation):
    text = (ROOT / mutation.file).read_text(encoding="utf-8")
    assert text.count(mutation.old) == 1
    assert mutation.old != mutation.new
    if mutation.file.endswith(".py"):
        ast.parse(text.replace(mutation.old, mutation.new))
    for test in mutation.tests.split():
        assert (ROOT / test).exists()
