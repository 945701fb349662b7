"""The example notebook: stored without outputs, and run cell by cell."""

import contextlib
import io
import json
from pathlib import Path

NOTEBOOK = Path(__file__).resolve().parents[1] / "examples/own_loop.ipynb"


def test_the_notebook_runs_and_is_stored_without_outputs():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in cells)
    names, out = {}, io.StringIO()
    with contextlib.redirect_stdout(out):
        for cell in cells:
            if cell["cell_type"] == "code":
                exec("".join(cell["source"]), names)
    assert "steps: " in out.getvalue()
    assert names["losses"][-1] < 0.5 * names["losses"][0]
