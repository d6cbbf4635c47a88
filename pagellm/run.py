"""A run directory: runs/<run>/<verb>/. Whatever a stage leaves behind is written through here.

    config.json    the stage's whole Config, the ids of the stages it read, and versions
    log.jsonl      one line a step; other .jsonl files likewise
    step-000120.pt a checkpoint, written beside, synced, renamed; LAST names the newest whole one
    model.pt       what the next stage reads
    done           written last: the id of this stage's result, and what it cost

The same command again carries on from LAST. Nothing that is pickled is ever loaded.
"""

import fcntl
import hashlib
import json
import os
import platform
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from pagellm import __version__
from pagellm.config import PageLLMError

__all__ = ["Common", "Run", "atomic", "file_id", "finished", "load_model_file", "write_json"]


@dataclass(frozen=True, kw_only=True)
class Common:
    """Fields that every stage has."""

    dataset: str = "synthetic"   # name of the data set: prepared data lie in <data>/<dataset>
    run: str = ""                # name of the run: results lie in <runs>/<run>/<stage>; empty: the data set's name
    data: str = "data"           # directory of prepared data sets
    runs: str = "runs"           # directory of runs
    seed: int = 0                # of every random draw in this stage
    device: str = "auto"         # cpu, cuda, cuda:1; auto takes cuda where there is one
    save_every: int = 50         # steps between checkpoints

    @property
    def data_dir(self) -> Path:
        return Path(self.data) / self.dataset

    def stage(self, verb: str, run: str = "") -> Path:
        """Directory of a stage, in this run or in another."""
        return Path(self.runs) / (run or self.run or self.dataset) / verb

    def make(self, target: str) -> str:
        """The command that makes an earlier stage."""
        return f"make {target} DATASET={self.dataset}" + (f" RUN={self.run}" if self.run else "")


@contextmanager
def atomic(path: str | Path):
    """Yield a temporary path beside `path`; on success sync it and rename it into place, else remove it."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield beside
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    finally:
        beside.unlink(missing_ok=True)


def write_json(path: str | Path, value) -> None:
    with atomic(path) as beside:
        beside.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")


def file_id(path: str | Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:16]


def finished(path: str | Path, need: str, make: str) -> dict:
    """The `done` record of an earlier stage. Raises PageLLMError saying what is missing and how to make it."""
    path = Path(path)
    try:
        return json.loads((path / "done").read_text())
    except FileNotFoundError:
        half = " (begun, not finished)" if (path / "config.json").exists() else ""
        raise PageLLMError(f"no {need} in {path}{half}\n  Make it with: {make}") from None


def load_model_file(path: str | Path) -> dict:
    """torch.load with weights_only: tensors and plain values, never a pickle."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise PageLLMError(f"{path} is gone; remove {Path(path).parent} and make it again") from None
    except Exception as error:
        raise PageLLMError(f"{path} cannot be read ({type(error).__name__}: {error}); "
                           f"remove {Path(path).parent} and make it again") from error


class Run:
    """One stage's directory, locked while this object lives.

    config   the stage's Config (a dataclass)
    inputs   name -> id of everything it reads; a changed input is refused like a changed option
    free     fields that may differ when a run is carried on (they move no number)
    """

    def __init__(self, path: str | Path, config, inputs: dict[str, str], free: tuple[str, ...] = ()):
        self.path = Path(path)
        self.started = time.time()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / "lock", "w")
        except OSError as error:
            raise PageLLMError(f"cannot write in {self.path}: {error.strerror}") from error
        try:
            # The kernel drops the lock with the process, so a lock file left by a killed run is no obstacle.
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise PageLLMError(f"another process works in {self.path}; wait for it, or use RUN=another") from None
        for left in self.path.glob(".*.tmp"):
            left.unlink(missing_ok=True)
        self._check(asdict(config), inputs, free)
        self._logs: dict = {}

    def _check(self, config: dict, inputs: dict, free: tuple[str, ...]) -> None:
        path = self.path / "config.json"
        if path.exists():
            before = json.loads(path.read_text())
            for name in sorted(set(before["config"]) | set(config)):
                old, new = before["config"].get(name), config.get(name)
                if old != new and name not in free:
                    raise PageLLMError(
                        f"{self.path} was made with {name}={old!r}, now {name}={new!r}\n"
                        f"  Keep both with RUN=another, or remove {self.path} to make it anew.")
            for name in sorted(set(before["inputs"]) | set(inputs)):
                if before["inputs"].get(name) != inputs.get(name):
                    raise PageLLMError(f"{self.path} was made from another {name}, which has changed since\n"
                                       f"  Remove {self.path} to make it anew, or use RUN=another.")
        else:
            write_json(path, {"config": config, "inputs": inputs,
                              "versions": {"pagellm": __version__, "torch": torch.__version__,
                                           "python": platform.python_version(), "machine": platform.machine()}})

    @property
    def done(self) -> bool:
        return (self.path / "done").exists()

    def load(self) -> dict | None:
        """The newest whole checkpoint, log.jsonl cut back to it; None at the start of a run."""
        last = self.path / "LAST"
        state = None
        if last.exists():
            state = load_model_file(self.path / last.read_text().strip())
        for path in self.path.glob("*.jsonl"):
            self._cut(path, state["step"] if state else -1)
        return state

    @staticmethod
    def _cut(path: Path, step: int) -> None:
        """Drop lines past the checkpoint: they are about to be written again, identically."""
        kept = []
        for line in path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError):
                break           # a line that a dying process left half-written
        with atomic(path) as beside:
            beside.write_text("".join(kept))

    def log(self, step: int, file: str = "log", **values) -> None:
        """Append one line to <file>.jsonl. Numbers are written so that they read back exactly."""
        if file not in self._logs:
            self._logs[file] = open(self.path / f"{file}.jsonl", "a")
        self._logs[file].write(json.dumps({"step": step, **{k: plain(v) for k, v in values.items()}}) + "\n")
        self._logs[file].flush()

    def read_log(self) -> list[dict]:
        path = self.path / "log.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def save(self, state: dict) -> None:
        """Write a checkpoint (state["step"] is its number), then LAST, then drop all but the last two."""
        name = f"step-{state['step']:08d}.pt"
        for file in self._logs.values():
            os.fsync(file.fileno())
        with atomic(self.path / name) as beside:
            torch.save(state, beside)
        with atomic(self.path / "LAST") as beside:
            beside.write_text(name + "\n")
        for old in sorted(self.path.glob("step-*.pt"))[:-2]:
            old.unlink(missing_ok=True)

    def finish(self, model: dict | None = None, **result) -> None:
        """Write model.pt and `done`; the checkpoints are no longer needed."""
        identity = None
        if model is not None:
            with atomic(self.path / "model.pt") as beside:
                torch.save(model, beside)
            identity = file_id(self.path / "model.pt")
        write_json(self.path / "done", {"id": identity, "seconds": round(time.time() - self.started, 1), **result})
        (self.path / "LAST").unlink(missing_ok=True)
        for old in self.path.glob("step-*.pt"):
            old.unlink(missing_ok=True)

    def close(self) -> None:
        for file in self._logs.values():
            file.close()
        self._logs.clear()
        self._lock.close()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def plain(value):
    if isinstance(value, torch.Tensor):
        return value.item() if value.ndim == 0 else value.tolist()
    return value.item() if hasattr(value, "item") else value
