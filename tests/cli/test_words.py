"""The words of the command line: one flag for one thing in all verbs, and numbers with their nouns."""

import ast
import re
from pathlib import Path

import abi_py

PRODUCT = sorted(Path(abi_py.__file__).parent.rglob("*.py"))
NOUNS = "token|epoch|step|conversation|row|thread|document|file|update|evaluation|window|sample|checkpoint|answer"
# Numbers that are never 1 where the sentence is written, and rates.
NEVER_ONE = {
    *("len(ids)", "length", "TIME", "BATCH * TIME", "count", "config.epochs"),
    *("speed", "report.avg_throughput"),
    *("generator.prefill_tokens / generator.prefill_seconds", "generator.decode_tokens / generator.decode_seconds"),
    *("facts['context']",),  # a window has two tokens or more
}


def test_nothing_says_1_epochs():
    """A number before a plural goes through `errors.counted`, which knows one from many."""
    found = []
    for path in [each for each in PRODUCT if not each.name.startswith("deepzig")]:
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
