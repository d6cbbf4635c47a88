"""The option --only-skips, with which .ci/run starts the tests."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SKIPS = """
import pytest

@pytest.mark.skipif(True, reason="cuda: no CUDA device")
def test_allowed(): pass

def test_missing(): pytest.importorskip("no_such_package")

@pytest.mark.parametrize("x", [])
def test_nothing_to_test(x): pass

def test_passes(): pass
"""


def test_only_skips_for_the_named_reasons_pass(tmp_path):
    """A missing package, an empty list of cases, a file that skips as a whole: each fails."""
    (tmp_path / "test_some.py").write_text(SKIPS)
    (tmp_path / "test_file.py").write_text("import pytest\npytest.importorskip('no_such_package')")

    def outcome(name, *more):
        words = ["-p", "tests.only_skips", "-c", "/dev/null", "--rootdir", str(tmp_path), *more]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *words, name],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout

    some, file = str(tmp_path / "test_some.py"), str(tmp_path / "test_file.py")
    assert "1 passed, 3 skipped" in outcome(some)[1]
    code, said = outcome(some, "--only-skips", "cuda,shared")
    assert code == 1 and "1 failed, 1 passed, 1 skipped, 1 error" in said
    assert "only cuda,shared may be: could not import 'no_such_package'" in said
    assert outcome(file)[0] in (0, 5) and outcome(file, "--only-skips", "cuda")[0] == 2
