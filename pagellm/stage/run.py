"""A run directory: runs/<run>/<verb>/. Whatever a stage leaves behind is written through here.

    config.json    the stage's whole Config, the ids of the stages it read; versions, commit and machine at its start
    log.jsonl      one line a step; other .jsonl files likewise
    step-000120.pt a checkpoint, written beside, synced, renamed; LAST names the two newest and their checksums
    model.pt       what the next stage reads
    done           written last: the id of this stage's result, and what it cost

The same command again carries on from LAST; a damaged checkpoint is passed over for the one before. Nothing that is
pickled is ever loaded. Of several processes only the main one writes.
"""

import fcntl
import hashlib
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import ClassVar

import torch
from tqdm import tqdm

from pagellm import __version__
from pagellm.stage import dist, hints
from pagellm.stage.command import Interrupted, Waiting, deferred_signals
from pagellm.stage.config import PageLLMError, check, check_numbers
from pagellm.stage.files import atomic, file_id, read_json, write_json

__all__ = [
    "Run",
    "StageConfig",
    "TrainingConfig",
    "commit",
    "digest",
    "file_id",
    "finished",
    "load_model_file",
    "machine",
    "versions",
]


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """Options that every stage has."""

    # Fields of subclasses that may be infinity, which means no limit.
    INFINITE: ClassVar[tuple[str, ...]] = ("grad_clip", "max_kl", "value_clip")

    dataset: str = "synthetic"  # name of the data set: its prepared data are in <data>/<dataset>
    run: str = ""  # name of the run: results go to <runs>/<run>/<stage>; empty: the data set's name
    preset: str = "auto"  # options found to fit the data set; others on the command line override
    # them. auto: <dataset>/<stage> in ./presets or in the package, if it is there; none; or a path
    data: str = "data"  # directory of prepared data sets
    runs: str = "runs"  # directory of runs
    seed: int = 0  # seed of every random draw in this stage
    device: str = "auto"  # cpu, cuda, cuda:1; auto: cuda if there is a GPU, else cpu
    save_every: int = 50  # steps between checkpoints
    parallel: str = "ddp"  # how several processes share a model: ddp, each holds all of it; or
    # fsdp, weights and moments are split among them
    checkpoint_blocks: bool = False  # compute a block's activations again in the backward pass
    # instead of storing them: slower, less memory

    def __post_init__(self):
        check_numbers(self, infinite=self.INFINITE)
        if hasattr(self, "grad_clip"):
            check(self, grad_clip=(self.grad_clip > 0, "above 0, or inf for no limit"))
        check(
            self,
            save_every=(self.save_every > 0, "1 or more"),
            parallel=(self.parallel in dist.MODES, " or ".join(dist.MODES)),
        )

    @property
    def data_dir(self) -> Path:
        """Directory of the prepared data set."""
        return Path(self.data) / self.dataset

    def stage(self, verb: str, run: str = "") -> Path:
        """Directory of a stage of this run, or of the run named."""
        return Path(self.runs) / (run or self.run or self.dataset) / verb

    def make(self, target: str) -> str:
        """The command that runs an earlier stage of this run."""
        elsewhere = {n: getattr(self, n) for n in ("data", "runs") if getattr(self, n) != n}
        return hints.command(target, self.dataset, self.run, **elsewhere)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(StageConfig):
    """Options of every stage that trains."""

    precision: str = "auto"  # of the trunk's matrix products in training: float32, bfloat16, or
    # auto: bfloat16 if the processor has it and the trunk is wide enough to gain. A run that is
    # carried on keeps the one it began with

    def __post_init__(self):
        super().__post_init__()
        check(self, precision=(self.precision in dist.PRECISIONS, ", ".join(dist.PRECISIONS)))


def save_tensors(state, path: Path) -> None:
    """torch.save through a plain file, so that a full disk is an OSError like everywhere else."""
    with open(path, "wb") as file:
        torch.save(state, file)


def digest(state) -> str:
    """A hash of nested dicts, lists, tensors and plain values: equal if and only if every bit is (16 hex digits)."""
    hashed = hashlib.sha256()

    def add(value) -> None:
        if isinstance(value, torch.Tensor):
            hashed.update(f"{value.dtype}{tuple(value.shape)}".encode())
            hashed.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                hashed.update(f"{key}:".encode())
                add(value[key])
        elif isinstance(value, list | tuple):
            hashed.update(f"[{len(value)}".encode())
            for part in value:
                add(part)
        else:
            hashed.update(repr(value).encode())

    add(state)
    return hashed.hexdigest()[:16]


def finished(path: str | Path, need: str, make: str) -> dict:
    """The `done` record of an earlier stage. Raises PageLLMError saying what is missing and how to make it."""
    path = Path(path)
    try:
        return read_json(path / "done")
    except FileNotFoundError:
        half = " (begun, not finished)" if (path / "config.json").exists() else ""
        raise PageLLMError(f"no {need} in {path}{half}\n  Make it with: {make}") from None


def load_model_file(path: str | Path) -> dict:
    """torch.load with weights_only: tensors and plain values, never a pickle.

    A stage's model.pt must still be what its `done` says. Raises PageLLMError for a file that is gone or damaged.
    """
    path = Path(path)
    record = path.parent / "done"
    if (
        path.name == "model.pt"
        and path.exists()
        and record.exists()
        and file_id(path) != read_json(record)["id"]
    ):
        raise PageLLMError(
            f"{path} is not what its stage wrote: changed or damaged since\n"
            f"  Remove {path.parent} and make it again."
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise PageLLMError(
            f"{path} is gone; remove {Path(path).parent} and make it again"
        ) from None
    except Exception as error:
        raise PageLLMError(
            f"{path} cannot be read ({type(error).__name__}: {error}); "
            f"remove {Path(path).parent} and make it again"
        ) from error


def commit(folder: str | Path = Path(__file__).parent) -> str | None:
    """The git commit of the source tree that holds run.py in `folder`, "-dirty" behind it if tracked files are changed.

    None without git, and for an installed copy, also one inside somebody else's repository.
    """
    # a hook sets them
    plain = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "--no-optional-locks", *words],
            cwd=folder,
            env=plain,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "run.py")
        return git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*") or None
    except (OSError, subprocess.SubprocessError):
        return None


def machine(device: str = "cpu") -> str:
    """Processor, cores this process may use, threads of torch, processes of the job, and a GPU if `device` is one."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    on = dist.pick_device(device)
    parts = [
        found[1] if found else platform.processor() or platform.machine(),
        f"{cores} cores",
        f"{torch.get_num_threads()} threads",
        *([f"{dist.world()} processes"] if dist.world() > 1 else []),
        *([torch.cuda.get_device_name(on)] if on.type == "cuda" else []),
        platform.system(),
    ]
    return ", ".join(parts)


def versions() -> dict[str, str]:
    """What the numbers of a stage depend on beside its options; a package that is not installed is left out."""
    out = {"pagellm": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for name in ("numpy", "pyarrow", "tokenizers"):
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            pass
    return out


# Options that may differ when a run is carried on. `preset` is one of them, since the options that a
# preset sets are compared themselves.
FREE = ("preset", "device", "save_every", "parallel", "checkpoint_blocks")


class Run:
    """One stage's directory, locked while this object lives.

    config   the stage's Config (a dataclass)
    inputs   name -> id of everything it reads; a changed input is refused like a changed option
    free     fields that may differ when a run is carried on (they move no number), beside FREE
    """

    def __init__(
        self, path: str | Path, config, inputs: dict[str, str], free: tuple[str, ...] = ()
    ):
        self.path = Path(path)
        self.started = time.time()
        self.save_every = getattr(config, "save_every", 0)
        self._logs: dict = {}
        self._queue: list[tuple] = []  # lines whose numbers may still be on the GPU
        self.last: dict = {}  # the newest line of log.jsonl that was written
        self._lock = None
        self._waiting = Waiting()
        if dist.is_main():
            self._open(config, inputs, free)
        dist.barrier()

    def _open(self, config, inputs: dict, free: tuple[str, ...]) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / "lock", "w")
        except OSError as error:
            raise PageLLMError(f"cannot write in {self.path}: {error.strerror}") from error
        try:
            # The kernel drops the lock with the process, so a lock file left by a killed run is no obstacle.
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise PageLLMError(
                f"another process works in {self.path}; wait for it, or use {hints.another_run()}"
            ) from None
        for left in self.path.rglob(".*.tmp"):
            left.unlink(missing_ok=True)
        if self.done:
            self._drop_checkpoints()
        self._check(config, inputs, (*FREE, *free))

    def _check(self, dataclass, inputs: dict, free: tuple[str, ...]) -> None:
        """Write config.json, or compare with the one there: PageLLMError if the run differs."""
        config, default = asdict(dataclass), {f.name: f.default for f in fields(dataclass)}
        if config.get("preset") == "auto":
            config["preset"] = "none"  # none was found, or none was looked for
        path = self.path / "config.json"
        if path.exists():
            self._compare(read_json(path), config, default, inputs, free)
        else:
            # Versions, commit and machine say where a run began. They are never compared: another
            # commit or machine may carry it on.
            write_json(
                path,
                {
                    "config": config,
                    "inputs": inputs,
                    "versions": versions()
                    | {"commit": commit(), "machine": machine(config.get("device", "cpu"))},
                },
            )

    def _compare(
        self, before: dict, config: dict, default: dict, inputs: dict, free: tuple[str, ...]
    ) -> None:
        """Raise PageLLMError if the run was made with other options or from other inputs."""
        for name in sorted(set(before["config"]) | set(config)):
            # A run made before an option existed counts as made with its default.
            old, new = before["config"].get(name, default.get(name)), config.get(name)
            if name == "precision":
                # "auto" keeps what was chosen at the start; a run older than the choice is float32.
                old = before.get("precision", old if old in dist.PRECISIONS[1:] else "float32")
                new = old if new in ("auto", None) else new
            if old != new and name not in free:
                taken, then = config.get("preset", "none"), before["config"].get("preset", "none")
                raise PageLLMError(
                    f"{self.path} was made with {name}={old!r}, now {name}={new!r}\n"
                    f"  Keep both with {hints.another_run()}, "
                    f"or remove {self.path} to make it anew."
                    + (
                        f"\n  If it was made without the preset {taken}, add --preset none."
                        if taken != "none" and then == "none"
                        else ""
                    )
                )
        for name in sorted(set(before["inputs"]) | set(inputs)):
            if before["inputs"].get(name) != inputs.get(name):
                raise PageLLMError(
                    f"{self.path} was made from another {name}, which has changed since\n"
                    f"  Remove {self.path} to make it anew, or use {hints.another_run()}."
                )

    def precision(self, name: str, device: torch.device, width: int) -> str:
        """What the trunk multiplies in: decided at the start of a run (dist.pick_precision), kept in config.json, and
        the same whenever and wherever the run is carried on. Ask on every process. -> "float32" or "bfloat16"
        """
        chosen = None
        if dist.is_main():
            record = read_json(self.path / "config.json")
            begun = (
                "float32"
                if (self.path / "LAST").exists()
                else dist.pick_precision(name, device, width)
            )
            chosen = record.get("precision", begun)
            if "precision" not in record:
                write_json(self.path / "config.json", record | {"precision": chosen})
        return dist.all_gather(chosen)[0]

    @property
    def done(self) -> bool:
        return (self.path / "done").exists()

    def already_done(self) -> bool:
        """Whether this stage is done. If so, the main process says it on the screen."""
        if self.done and dist.is_main():
            print(f"{self.path.name}: already done in {self.path}")
        return self.done

    def load(self) -> dict | None:
        """The newest whole checkpoint, log.jsonl cut back to it; None at the start of a run.

        A checkpoint whose checksum differs is passed over, which is said on stderr. The run then repeats the steps
        since the one before, and ends the same.
        """
        last = self.path / "LAST"
        state = None
        for line in last.read_text().splitlines() if last.exists() else ():
            name, _, checksum = line.partition(" ")
            path = self.path / name
            if path.exists() and file_id(path) == checksum:
                state = load_model_file(path)
                break
            if dist.is_main():
                tqdm.write(
                    f"{path} is {'damaged' if path.exists() else 'gone'}; going on from the one before",
                    file=sys.stderr,
                )
        dist.barrier()  # everybody has read before the main process writes
        if dist.is_main():
            for path in self.path.glob("*.jsonl"):
                self._cut(path, state["step"] if state else -1)
        return state

    @staticmethod
    def _cut(path: Path, step: int) -> None:
        """Drop lines past the checkpoint: they are about to be written again, identically."""
        kept = []
        for line in path.read_text(errors="replace").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                break  # a line that a dying process left half-written
        with atomic(path) as beside:
            beside.write_text("".join(kept))

    def log(self, step: int, file: str = "log", **values) -> None:
        """Append one line to <file>.jsonl. Numbers are written so that they read back exactly.

        A line of numbers on a GPU is written with the next step's, or by `flush`: nobody waits for the GPU.
        """
        if not dist.is_main():
            return
        scalars = {
            k: v
            for k, v in values.items()
            if isinstance(v, torch.Tensor) and v.ndim == 0 and v.is_floating_point()
        }
        self._queue.append((file, step, values, [*scalars], dist.AsyncScalars([*scalars.values()])))
        self.flush(before=step if any(v.is_cuda for v in scalars.values()) else None)

    def flush(self, before: int | None = None) -> None:
        """Write the lines that wait: all, or those of earlier steps."""
        while self._queue and (before is None or self._queue[0][1] < before):
            file, step, values, names, fetch = self._queue.pop(0)
            numbers = dict(zip(names, fetch.read(), strict=True))
            row = {
                "step": step,
                **{k: numbers[k] if k in numbers else plain(v) for k, v in values.items()},
            }
            if file == "log":
                self.last = row
            if file not in self._logs:
                self._logs[file] = open(self.path / f"{file}.jsonl", "a")
            self._logs[file].write(json.dumps(row) + "\n")
            self._logs[file].flush()

    def read_log(self) -> list[dict]:
        self.flush()
        path = self.path / "log.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def steps(self, bar: Iterable[int]) -> Iterator[int]:
        """The steps of a loop. SIGINT and SIGTERM wait for the end of a step, where `due` says to save and `save`
        stops; a second signal stops at once."""
        with deferred_signals() as self._waiting:
            yield from bar

    def due(self, step: int, total: int) -> bool:
        """Whether a checkpoint is to be written after `step` of `total`: every save_every, or on a signal to any of
        the processes."""
        if dist.any_rank(self._waiting.signum is not None):
            self._waiting.signum = self._waiting.signum or signal.SIGTERM
            return step < total
        return step % self.save_every == 0 and step < total

    def save(self, state: dict) -> None:
        """Write a checkpoint (state["step"] is its number), then LAST, then drop all but the last two.

        Raises Interrupted, everything written, if a signal waits for the end of the step.
        """
        if dist.is_main():
            self._write_checkpoint(state)
        dist.barrier()
        if self._waiting.signum is not None:
            raise Interrupted(
                self._waiting.signum, f"{self.path} holds the checkpoint of step {state['step']}"
            )

    def _write_checkpoint(self, state: dict) -> None:
        name = f"step-{state['step']:08d}.pt"
        self.flush()
        for file in self._logs.values():
            os.fsync(file.fileno())
        with atomic(self.path / name) as beside:
            save_tensors(state, beside)
            checksum = file_id(beside)
        last = self.path / "LAST"
        before = (
            [line for line in last.read_text().splitlines() if not line.startswith(name)]
            if last.exists()
            else []
        )
        lines = [f"{name} {checksum}", *before[:1]]
        with atomic(last) as beside:
            beside.write_text("".join(line + "\n" for line in lines))
        kept = {line.partition(" ")[0] for line in lines}
        for old in self.path.glob("step-*.pt"):
            if old.name not in kept:
                old.unlink(missing_ok=True)

    def _drop_checkpoints(self) -> None:
        (self.path / "LAST").unlink(missing_ok=True)
        for old in self.path.glob("step-*.pt"):
            old.unlink(missing_ok=True)

    def keep_for_replay(self, step: int, state: dict) -> Path:
        """bad-<step>.pt: what made a step go wrong, to be looked at; -> its path."""
        path = self.path / f"bad-{step:08d}.pt"
        if dist.is_main():
            with atomic(path) as beside:
                save_tensors(state, beside)
        return path

    def finish(self, model: dict | None = None, state=None, **result) -> None:
        """Write model.pt and `done`; the checkpoints are no longer needed.

        state  weights, moments and whatever else a checkpoint would hold; its digest goes into `done`, so that two
               runs can be compared to the last bit
        """
        if dist.is_main():
            identity = None
            self.flush()
            for file in self._logs.values():
                os.fsync(file.fileno())
            if model is not None:
                with atomic(self.path / "model.pt") as beside:
                    save_tensors(model, beside)
                identity = file_id(self.path / "model.pt")
            if state is not None:
                result["state"] = digest(state)
            write_json(
                self.path / "done",
                {
                    "id": identity,
                    "seconds": round(time.time() - self.started, 1),
                    "peak_mb": round(dist.peak_memory(), 1),
                    **result,
                },
            )
            self._drop_checkpoints()
        dist.barrier()

    def close(self) -> None:
        self.flush()
        for file in self._logs.values():
            file.close()
        self._logs.clear()
        if self._lock is not None:
            self._lock.close()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def plain(value):
    if isinstance(value, torch.Tensor):
        return value.item() if value.ndim == 0 else value.tolist()
    return value.item() if hasattr(value, "item") else value
