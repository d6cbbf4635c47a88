"""The examples of CONTRIBUTING.md: each is a diff that applies, and the test it brings passes."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
DIFFS = dict(re.findall(r"<!-- diff: (\w+) -->\n\n```diff\n(.*?)^```$", TEXT, re.S | re.M))


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the source, as a newcomer would have it."""
    folder = tmp_path_factory.mktemp("newcomer") / "project"
    for name in ("kernels", "pagellm", "experiments", "tests"):
        shutil.copytree(
            ROOT / name,
            folder / name,
            symlinks=True,
            ignore=shutil.ignore_patterns("__pycache__", "old_run"),
        )
    for name in ("setup.cfg", "pyproject.toml"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def test_every_kind_of_addition_has_its_example():
    assert set(DIFFS) == {"metric", "reward_term", "format", "stage", "study"}


@pytest.mark.parametrize("name", sorted(DIFFS))
def test_the_diff_applies_and_its_own_test_passes(tree, name):
    def apply(*options):
        done = subprocess.run(
            ["git", "apply", *options], cwd=tree, input=DIFFS[name], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr

    added = re.findall(r"^\+\+\+ b/(tests/\S*test_\S+\.py)$", DIFFS[name], re.M)
    added = [path for path in added if not (ROOT / path).exists()]
    assert added, "an example brings a test of its own"
    apply()
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *added],
            cwd=tree,
            env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    finally:
        apply("--reverse")
