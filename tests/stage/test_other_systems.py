"""What Linux has and other systems have not is asked for only where it is there."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Every module of the package, imported where the modules that only Unix has cannot be.
IMPORT_ALL = """
import importlib, pkgutil, sys
sys.modules.update({name: None for name in ("fcntl", "resource", "pwd", "grp", "termios")})
for name in ("SIGPIPE", "SIGHUP", "SIGKILL"):
    delattr(__import__("signal"), name)
import pagellm
for module in pkgutil.walk_packages(pagellm.__path__, "pagellm."):
    if not module.name.startswith(("pagellm.__main__", "pagellm.baselines.outside")):
        importlib.import_module(module.name)
from pagellm.stage import dist
print(dist.peak_memory())
"""


def test_every_module_can_be_imported_without_the_modules_that_only_unix_has():
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0.0"]
