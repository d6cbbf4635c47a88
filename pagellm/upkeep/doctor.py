"""Look at an installation: packages, machine, folders, data sets, runs. What is wrong, what to do.

    pagellm doctor                  ends with 1 if something is wrong, else with 0
    pagellm doctor --json           the same as one JSON object, for a bug report

Reads   data/*/source.json, runs/*/<stage>/config.json and done. Writes and removes a file in each
        folder, to see whether that can be done.
"""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock, Timeout

from pagellm.report.runs import UNREADABLE, described, links
from pagellm.stage import hints
from pagellm.stage.command import ExitCode, main
from pagellm.stage.config import PageLLMError, check_numbers
from pagellm.stage.files import read_json
from pagellm.stage.run import commit, is_changed, machine, versions

__all__ = ["Config", "Finding", "examine", "run"]

BASE = ("torch", "numpy", "pyarrow", "tokenizers", "tqdm", "filelock")
# Extra -> a package that it brings.
EXTRAS = {
    "serve": "fastapi",
    "search": "faiss-cpu",
    "gguf": "gguf",
    "hub": "huggingface_hub",
    "sweep": "optuna",
    "tensorboard": "tensorboard",
    "mlflow": "mlflow-skinny",
    "report": "matplotlib",
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Say whether all is well with the installation, the data and the runs, and what to do next."""

    data: str = "data"  # directory of prepared data sets
    runs: str = "runs"  # directory of runs
    least_gb: float = 1.0  # free disk space, in GB, below which something is wrong
    json: bool = False  # print one JSON object instead of lines

    def __post_init__(self):
        check_numbers(self)


class Finding(NamedTuple):
    """One line: ok, note or wrong; about what; what was found; what to do, empty if nothing."""

    kind: str
    about: str
    found: str
    do: str = ""


def installed(name: str) -> str:
    """The version of a package; empty if it is not there."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def of_packages() -> Iterator[Finding]:
    """Versions, where this copy comes from, which extras are there."""
    base = {name: installed(name) for name in BASE}
    for name in (name for name, found in base.items() if not found):
        yield Finding("wrong", "packages", f"{name} is missing", f"pip install {name}")
    known = versions()
    said = ", ".join(f"{name} {found}" for name, found in base.items() if found)
    yield Finding("ok", "packages", f"pagellm {known['pagellm']}, python {known['python']}, {said}")
    made = commit()
    where = f"a checkout at {made}" if made else "an installed package"
    yield Finding("ok", "source", f"{where}: {Path(__file__).resolve().parents[1]}")
    there = [f"{extra} ({name} {v})" for extra, name in EXTRAS.items() if (v := installed(name))]
    yield Finding("ok", "extras", ", ".join(there) or "none")


def memory_gb() -> tuple[float, ...] | None:
    """All memory and what is available, in GB; None where the system does not say."""
    path = Path("/proc/meminfo")
    if not path.exists():
        return None
    lines = dict(line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
    return tuple(int(lines[k].split()[0]) / 1e6 for k in ("MemTotal", "MemAvailable"))


def of_machine() -> Iterator[Finding]:
    """Cores, threads, memory, GPU."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = torch.get_num_threads()
    yield Finding("ok", "machine", machine())
    if cores and threads > cores:
        yield Finding(
            "note",
            "threads",
            f"torch takes {threads} threads for {cores} cores, which is slow",
            f"export OMP_NUM_THREADS={cores}",
        )
    if memory := memory_gb():
        text = f"{memory[0]:.1f} GB, {memory[1]:.1f} available"
        low = memory[1] < 1.0
        do = "stop other programs, or take smaller batches" if low else ""
        yield Finding("note" if low else "ok", "memory", text, do)
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        bf16 = "with" if torch.cuda.is_bf16_supported() else "without"
        yield Finding("ok", "cuda", f"{', '.join(names)}, {bf16} bfloat16")
    else:
        built = torch.version.cuda
        said = f"torch is built for {built}" if built else "torch is built without it"
        yield Finding("ok", "cuda", f"no GPU; {said}")


def of_folders(config: Config) -> Iterator[Finding]:
    """Whether data and runs can be written, and how much room is left."""
    for name in (config.data, config.runs):
        path = Path(name)
        there = next((p for p in (path, *path.absolute().parents) if p.exists()), Path("/"))
        try:
            with tempfile.TemporaryFile(dir=there):
                pass
        except OSError as error:
            do = f"give yourself the right to write there, or choose another with --{name}"
            yield Finding("wrong", name, f"{there} cannot be written: {error.strerror}", do)
            continue
        free = shutil.disk_usage(there).free / 1e9
        text = f"{'' if path.exists() else 'not there yet; '}can be written, {free:,.1f} GB free"
        short = free < config.least_gb
        do = "free some space, or ask for less with --least_gb" if short else ""
        yield Finding("wrong" if short else "ok", name, text, do)


def of_data(config: Config) -> Iterator[Finding]:
    """Prepared data sets, and whether their files are there."""
    found = sorted(Path(config.data).glob("*/source.json"))
    for path in found:
        name = path.parent.name
        again = f"remove {path.parent} and prepare it again: {hints.prepare(name, config.data)}"
        try:
            about = read_json(path)
            counts = about["counts"]
            users, items = (hints.counted(counts[f"{n}s"], n) for n in ("user", "item"))
            text = f"{users}, {items}"
            gone = [n for n in about.get("written", {}) if not (path.parent / n).exists()]
        except (PageLLMError, KeyError, TypeError) as error:
            yield Finding("wrong", f"data set {name}", f"source.json: {error}", again)
            continue
        if gone:
            yield Finding("wrong", f"data set {name}", f"{', '.join(gone)} is gone", again)
        else:
            yield Finding("ok", f"data set {name}", f"{text}, split {about['config'].get('split')}")
    if not found:
        yield Finding("note", "data sets", "none", f"prepare one: {hints.prepare('mine')}")


def is_held(stage: Path) -> bool:
    """Whether a process works in a stage's directory. A lock file without one is harmless."""
    if not (stage / "lock").exists():
        return False
    try:
        with FileLock(stage / "lock", blocking=False):
            return False
    except (Timeout, OSError):
        return True


def of_run(path: Path, names: list[str]) -> Iterator[Finding]:
    """A run: its stages, what was only begun, whether its data are there."""
    about = f"run {path.name}"
    try:
        record = described(path)
        if record is None:
            return
        made = [read_json(path / s / "config.json")["config"] for s in record["stages"]]
        changed = [s for s in record["stages"] if is_changed(path / s / "model.pt")]
    except UNREADABLE as error:
        yield Finding("wrong", about, f"cannot be read: {error}", f"remove what it names in {path}")
        return
    live = f", live as {', '.join(names)}" if names else ""
    yield Finding("ok", about, f"{', '.join(record['stages']) or 'no stage is done'}{live}")
    for stage in record["begun"]:
        if is_held(path / stage):
            yield Finding("note", about, f"a process works on {stage} now")
        else:
            yield Finding(
                "wrong",
                about,
                f"{stage} was begun and not finished",
                f"give its command again, which carries on, or remove {path / stage}",
            )
    for stage in changed:
        do = f"remove {path / stage} and make it again"
        yield Finding("wrong", about, f"{stage}/model.pt is not what its stage wrote", do)
    for home in sorted({Path(c["data"]) / c["dataset"] for c in made if "data" in c}):
        if not (home / "source.json").exists():
            do = f"prepare them again, or remove {path}"
            yield Finding("wrong", about, f"its data, {home}, are gone", do)


def of_runs(config: Config) -> Iterator[Finding]:
    """Every run, and links that lead nowhere."""
    runs = Path(config.runs)
    if not runs.is_dir():
        return
    linked = links(runs)
    for path in sorted(runs.iterdir()):
        if path.is_symlink():
            if not path.exists():
                do = f"pagellm promote --back --live {path.name}, or remove the link"
                yield Finding(
                    "wrong", f"link {path.name}", f"leads to {os.readlink(path)}, gone", do
                )
        elif path.is_dir():
            yield from of_run(path, linked.get(path.resolve(), []))


def left_behind(config: Config) -> Iterator[Finding]:
    """Files that a killed process left half-written."""
    found = [p for d in (config.data, config.runs) for p in Path(d).rglob(".*.tmp")]
    if found:
        few = ", ".join(map(str, found[:3]))
        do = "the next run of the same command clears them, or remove them while nothing runs"
        yield Finding("note", "half-written", f"{hints.counted(len(found), 'file')}: {few}", do)


def examine(config: Config) -> list[Finding]:
    """Everything that was looked at, in order."""
    return [
        *of_packages(),
        *of_machine(),
        *of_folders(config),
        *of_data(config),
        *of_runs(config),
        *left_behind(config),
    ]


def run(config: Config) -> ExitCode:
    """Print what was found; returns the exit code: 1 if something is wrong."""
    found = examine(config)
    wrong = [f for f in found if f.kind == "wrong"]
    if config.json:
        print(json.dumps({"wrong": len(wrong), "found": [f._asdict() for f in found]}, indent=1))
        return ExitCode(bool(wrong))
    mark: dict[str, Any] = {"ok": "ok   ", "note": "note ", "wrong": "WRONG"}
    for f in found:
        print(f"{mark[f.kind]} {f.about}: {f.found}" + (f"\n      -> {f.do}" if f.do else ""))
    count = f"{hints.counted(len(wrong), 'thing')} {'is' if len(wrong) == 1 else 'are'}"
    print(f"\n{count if wrong else 'nothing is'} wrong")
    return ExitCode(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(Config, run, "pagellm doctor"))
