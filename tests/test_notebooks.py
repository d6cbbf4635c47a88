"""Every code cell of the notebooks runs, in order, in a fresh directory."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def code_of(path):
    """The code cells of a notebook as one script."""
    book = json.loads(path.read_text(encoding="utf-8"))
    assert (book["nbformat"], book["metadata"]["kernelspec"]["name"]) == (4, "python3")
    cells = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert len(cells) > 3 and all(not c["outputs"] for c in cells), "outputs are not kept"
    return "\n\n".join("".join(cell["source"]) for cell in cells)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_cell_runs(path, tmp_path):
    code = code_of(path)
    if "matplotlib" in code and not find_spec("matplotlib"):
        pytest.skip("needs the extra [report]")
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_there_are_notebooks():
    assert {path.stem for path in NOTEBOOKS} == {"own-data", "ppo-and-rewards"}
