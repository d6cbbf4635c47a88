"""A build, a teacher or a student that is killed carries on, and leaves the same bytes."""

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from pagellm.storefront import build, student, teach

TINY = {"size": "llama-mini", "words": 600, "epochs": 4, "batch": 8}


def killed_at(command, there, cwd):
    """Start a command and kill -9 it as soon as `there` is true."""
    process = subprocess.Popen(
        command, cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    for _ in range(2400):
        if there() or process.poll() is not None:
            break
        time.sleep(0.05)
    assert process.poll() is None, "it ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()


def run_with_a_build(made, runs):
    """Options of a run of its own, that has the storefront's build and weights."""
    for name in ("build", "tune"):
        source = Path(made["runs"]) / "synthetic/storefront" / name
        shutil.copytree(source, runs / "synthetic/storefront" / name)
    return made | {"runs": str(runs)}


def test_a_killed_teacher_and_a_killed_student_carry_on_with_the_same_bytes(made, tmp_path):
    whole_run = run_with_a_build(made, tmp_path / "whole")
    teach.run(teach.Config(**whole_run, people=12))
    student.run(student.Config(**whole_run, **TINY))
    runs = tmp_path / "runs"
    common = run_with_a_build(made, runs)
    folder, root = runs / "synthetic/storefront", Path(__file__).parents[2]
    options = [f"--{name}={value}" for name, value in common.items()]
    path = folder / "teach/traces.jsonl"
    command = [sys.executable, "-m", "pagellm", "storefront", "teach", *options, "--people=12"]
    killed_at(command, lambda: path.exists() and path.stat().st_size > 0, root)
    assert not (folder / "teach/done").exists()
    path.write_bytes(path.read_bytes() + b'{"task": "them')  # a line that was half written
    teach.run(teach.Config(**common, people=12))
    whole = tmp_path / "whole/synthetic/storefront"
    assert path.read_bytes() == (whole / "teach/traces.jsonl").read_bytes()

    options += [f"--{name}={value}" for name, value in TINY.items()] + ["--save_every=2"]
    command = [sys.executable, "-m", "pagellm", "storefront", "student", *options]
    killed_at(command, lambda: list((folder / "student-clean").glob("step-*.pt")), root)
    assert not (folder / "student-clean/done").exists()
    student.run(student.Config(**common, **TINY, save_every=2))
    name = "student-clean/model/model.safetensors"
    assert (folder / name).read_bytes() == (whole / name).read_bytes()


def test_a_killed_build_is_made_by_the_same_command_with_the_same_bytes(made, tmp_path):
    common = made | {"runs": str(tmp_path)}
    folder, root = tmp_path / "synthetic/storefront/build", Path(__file__).parents[2]
    options = [f"--{name}={value}" for name, value in common.items()]
    command = [sys.executable, "-m", "pagellm", "storefront", "build", *options]
    killed_at(command, lambda: (folder / "config.json").exists(), root)
    assert not (folder / "done").exists()
    build.run(build.Config(**common))
    whole = Path(made["runs"]) / "synthetic/storefront/build/model.pt"
    assert (folder / "model.pt").read_bytes() == whole.read_bytes()
