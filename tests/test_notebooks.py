"""Every cell of the notebooks runs, in order, in a fresh directory: in a kernel where there is one.

With the extra [dev] a real kernel runs them, as a reader's does, and what it shows is looked at:
figures, cards, tables. Without it the code cells run as one script.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
KERNEL = """
import sys
import nbclient, nbformat

book = nbformat.read(sys.argv[1], 4)
nbclient.NotebookClient(book, kernel_name="python3").execute()
nbformat.write(book, "shown.ipynb")
"""
# What a reader sees besides text: forms of output, and in how many cells.
SHOWN = {"own-data": {"text/html": 1}, "ppo-and-rewards": {"image/png": 2}}


def cells_of(path):
    """The code cells of a notebook."""
    book = json.loads(path.read_text(encoding="utf-8"))
    assert (book["nbformat"], book["metadata"]["kernelspec"]["name"]) == (4, "python3")
    return [cell for cell in book["cells"] if cell["cell_type"] == "code"]


def seen(path):
    """Form of output -> cells that show it, in a notebook that was run."""
    forms = [{f for o in cell["outputs"] for f in o.get("data", ())} for cell in cells_of(path)]
    return {form: sum(form in cell for cell in forms) for form in ("text/html", "image/png")}


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_cell_runs(path, tmp_path):
    cells = cells_of(path)
    assert len(cells) > 3 and all(not c["outputs"] for c in cells), "outputs are not kept"
    code = "\n\n".join("".join(cell["source"]) for cell in cells)
    if "matplotlib" in code and not find_spec("matplotlib"):
        pytest.skip("needs the extra [report]")
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    kernel = find_spec("nbclient") and find_spec("ipykernel")
    if kernel:
        env.pop("MPLBACKEND", None)  # the kernel's own: figures in the notebook
        words = ["-c", KERNEL, str(path)]
    else:
        env["MPLBACKEND"] = "Agg"
        words = ["-c", code]
    done = subprocess.run(
        [sys.executable, *words], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    if kernel:
        found = seen(tmp_path / "shown.ipynb")
        assert {form: n for form, n in found.items() if n} == SHOWN[path.stem]


def test_there_are_notebooks():
    assert {path.stem for path in NOTEBOOKS} == set(SHOWN)
