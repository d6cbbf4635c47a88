"""The wheel alone: one name at its top, its data inside, and commands that need no checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PARTS = ("pagellm", "kernels", "setup.cfg", "pyproject.toml", "README.md")
# Every stage in a small way, and then what reads its results.
COMMANDS = [
    "prepare --users 80 --items 60",
    "pretrain --size nano --steps 4 --batch 8 --rating_batch 8 --words 300 --warmup 2",
    "sft --epochs 1 --batch 16 --eval_every 4 --max_history 8 --warmup 2 --k 6",
    "reward --per_kind 1 --batch 32 --warmup 2",
    "compose --folds 1 --networks 1 --k 6 --depth 40",
    "ppo --epochs 0.5 --rollout 16 --minibatch 8 --micro 4 --k 6 --eval_every 2 --min_steps 1",
    "evaluate --k 6 --depth 40 --n_boot 50 --examples 1",
    "baselines --k 6 --depth 40 --n_boot 50",
    "casestudy --users 1",
    "export",
    "simulator --k 6",
    "abtest --log runs/synthetic/simulator/log.parquet --control sft",
    "report",
]
# All of them in one process: torch starts once.
DRIVER = """
import shlex, sys
import pagellm, pagellm.__main__ as door
print(pagellm.__file__)
for line in sys.stdin.read().splitlines():
    sys.argv = ["pagellm", *shlex.split(line)]
    print(line, door.main())
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel, built from a copy of the sources: nothing of an earlier build is in the way."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in PARTS:
        if (ROOT / name).is_dir():  # pagellm/kernels stays the link that it is
            shutil.copytree(ROOT / name, folder / name, symlinks=True)
        else:
            shutil.copy(ROOT / name, folder / name)
    here = ["--no-build-isolation"] if find_spec("setuptools") else []
    pip("wheel", "--no-deps", *here, "--wheel-dir", folder / "out", folder)
    (path,) = (folder / "out").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A directory that holds what the wheel holds, and an empty one to work in."""
    target = tmp_path_factory.mktemp("site")
    pip("install", "--no-deps", "--no-index", "--target", target, wheel)
    return target, tmp_path_factory.mktemp("shop")


def pip(*words):
    subprocess.run([sys.executable, "-m", "pip", "-q", *map(str, words)], check=True)


def call(installed, *words, text=""):
    """Run a command in the empty directory; only the installed wheel is on the path."""
    target, folder = installed
    return subprocess.run(
        [*map(str, words)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(target), "OMP_NUM_THREADS": "1"},
        input=text,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_the_wheel_has_one_name_at_its_top_and_all_data_inside(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        (info,) = {name.split("/")[0] for name in names} - {"pagellm"}
        assert file.read(f"{info}/top_level.txt").decode().split() == ["pagellm"]
    assert info.endswith(".dist-info") and "pagellm/kernels/advantage.py" in names
    for path in (ROOT / "pagellm").rglob("*"):  # whatever is no code is there, too
        if path.is_file() and "__pycache__" not in path.parts and path.name[0] != ".":
            assert path.relative_to(ROOT).as_posix() in names


@pytest.mark.slow
def test_the_wheel_alone_runs_the_pipeline_and_what_reads_its_results(installed):
    target, folder = installed
    done = call(installed, sys.executable, "-c", DRIVER, text="\n".join(COMMANDS))
    assert done.stdout.startswith(f"{target}/pagellm/__init__.py\n"), done.stdout[:200]
    for line in COMMANDS:
        assert f"{line} 0\n" in done.stdout, done.stderr[-2000:]
    assert "preset synthetic/baselines.json" in done.stderr
    run = folder / "runs" / "synthetic"
    for name in ("evaluate/metrics.json", "baselines/table.md", "export-ppo/manifest.json"):
        assert (run / name).is_file()
    assert (run / "simulator" / "abtest.json").is_file()
    assert "make " not in done.stdout.replace("make it", "")
    page = (run / "report.html").read_text()
    assert "python -m experiments.ablation" in page and "make ablation" not in page


@pytest.mark.slow
def test_hints_of_the_wheel_name_its_own_command(installed):
    target, _ = installed
    done = call(installed, target / "bin" / "pagellm", "ppo", "--dataset", "toys", "--run", "mine")
    assert (done.returncode, done.stdout) == (2, "")
    assert "pagellm ppo: preset toys/ppo: " in done.stderr
    assert "Make it with: pagellm sft --dataset toys --run mine\n" in done.stderr
    assert "make sft" not in done.stderr
