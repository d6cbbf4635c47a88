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
    for name in ("setup.cfg", "pyproject.toml", "Makefile"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def added(name: str) -> list[str]:
    """The tests that a diff brings."""
    found = re.findall(r"^\+\+\+ b/(tests/\S*test_\S+\.py)$", DIFFS[name], re.M)
    return [path for path in found if not (ROOT / path).exists()]


def apply(tree: Path, name: str, *options: str) -> None:
    done = subprocess.run(
        ["git", "apply", *options], cwd=tree, input=DIFFS[name], capture_output=True, text=True
    )
    assert done.returncode == 0, f"{name}: {done.stderr}"


def test_every_kind_of_addition_has_its_example():
    assert set(DIFFS) == {"metric", "reward_term", "format", "stage", "study"}
    assert all(map(added, DIFFS)), "an example brings a test of its own"


def test_every_diff_applies_and_its_own_tests_pass(tree):
    """Each applies to the source as it is; their tests run in one process, which costs less."""
    for name in DIFFS:
        apply(tree, name, "--check")
    for name in DIFFS:
        apply(tree, name)
    wanted = [path for name in DIFFS for path in added(name)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rp", "-p", "no:cacheprovider", *wanted],
        cwd=tree,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.findall(r"^PASSED (\S+?)::", done.stdout, re.M)
    assert set(passed) == set(wanted), done.stdout
