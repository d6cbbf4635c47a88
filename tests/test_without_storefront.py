"""PageLLM is whole without its second system: nothing outside pagellm/storefront needs it."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

# Stands in for a checkout whose pagellm/storefront was removed. What is missing of the extras may
# be missing; what is missing of this package may not.
WITHOUT = """
import sys, importlib, pathlib
from importlib.abc import MetaPathFinder

class Removed(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[:2] == ["pagellm", "storefront"] or "experiments.storefront" in name:
            raise ModuleNotFoundError(f"removed: {name}", name=name)

sys.meta_path.insert(0, Removed())
"""
IMPORTS = """
done = 0
for room in ("pagellm", "experiments"):
    for path in sorted(pathlib.Path(room).rglob("*.py")):
        parts = path.with_suffix("").parts
        # stress/clients.py is read by locust alone, which is told its plan.
        if any(part.startswith(("storefront", "__main__", "clients")) for part in parts):
            continue
        name = ".".join(part for part in parts if part != "__init__")
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if str(error.name).split(".")[0] in ("pagellm", "experiments"):
                sys.exit(f"{name}: {error}")
            continue
        done += 1
print(done, not any(name.startswith("pagellm.storefront") for name in sys.modules))
"""
VERB = """
import runpy
sys.argv[0] = "pagellm"
runpy.run_module("pagellm", run_name="__main__")
"""


def python(code, *words, cwd=ROOT):
    command = [sys.executable, "-c", WITHOUT + code, *map(str, words)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


def test_every_other_module_is_imported_without_the_storefront():
    found = python(IMPORTS)
    assert not found.returncode, found.stderr
    done, clean = found.stdout.split()[-2:]
    assert int(done) > 100 and clean == "True"


def test_verbs_run_without_the_storefront_and_its_own_say_that_it_is_gone(tmp_path):
    places = ("--data", tmp_path / "data", "--runs", tmp_path / "runs")
    said = python(VERB, "--help")
    assert not said.returncode and "prepare" in said.stdout, said.stderr
    said = python(VERB, "prepare", *places[:2], "--users", "40", "--items", "40")
    assert not said.returncode, said.stderr
    said = python(VERB, "baselines", *places, "--device", "cpu")
    assert not said.returncode, said.stderr
    said = python(VERB, "storefront", "build", *places)
    assert said.returncode and "removed: pagellm.storefront" in said.stderr
