"""A run directory, runs/<run>/<stage>/: a stage writes all its files through here.

    config.json       the stage's whole Config, and the ids of what it read. Also where it began:
                      versions of packages, git commit, machine
    log.jsonl         one line a step; so have other .jsonl files
    step-00000120.pt  a checkpoint
    LAST              names the two newest checkpoints, with their checksums
    model.pt          what the next stage reads
    frozen-<id>.pt    weights of it that never learn (a published trunk under adapters), named by
                      their hash; stages that share them share one file on disk (a hard link)
    done              written last: the id of model.pt, and how long the stage took

Every file but the logs is written under another name, synced to disk and renamed, so a file that is
there is whole. The same command again carries on from the newest checkpoint; if that is damaged,
from the one before. Only tensors and plain values are loaded, never a pickle. Of several processes
only the main one writes.
"""

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
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar, TextIO

import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from pagellm import __version__
from pagellm.stage import dist, hints
from pagellm.stage.command import Interrupted, Waiting, deferred_signals
from pagellm.stage.config import PageLLMError, check, check_numbers
from pagellm.stage.files import atomic, file_id, read_json, write_json

__all__ = [
    "FREE",
    "Run",
    "StageConfig",
    "TrainingConfig",
    "commit",
    "digest",
    "file_id",
    "finished",
    "is_changed",
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
    # them. auto: preset/<stage> of the run, else <dataset>/<stage> in ./presets or in the package,
    # if it is there; none; or a path
    data: str = "data"  # directory of prepared data sets
    runs: str = "runs"  # directory of runs
    seed: int = 0  # seed of every random draw in this stage
    device: str = "auto"  # cpu, cuda, cuda:1; auto: cuda if there is a GPU, else cpu
    save_every: int = 50  # steps between checkpoints
    parallel: str = "ddp"  # how several processes share a model: ddp, each holds all of it; fsdp,
    # weights and moments are split among them, and each step fetches them; rows, as fsdp, but user
    # and item rows stay where they are
    checkpoint_blocks: bool = False  # compute a block's activations again in the backward pass
    # instead of storing them: slower, less memory

    def __post_init__(self):
        check_numbers(self, infinite=self.INFINITE)
        if hasattr(self, "grad_clip"):
            check(self, grad_clip=(self.grad_clip > 0, "above 0, or inf for no limit"))
        check(
            self,
            save_every=(self.save_every > 0, "1 or more"),
            parallel=(self.parallel in dist.MODES, ", ".join(dist.MODES)),
        )

    @property
    def data_dir(self) -> Path:
        """Directory of the prepared data set."""
        return Path(self.data) / self.dataset

    def stage(self, verb: str, run: str = "") -> Path:
        """Directory of a stage of this run, or of the run named."""
        return Path(self.runs) / (run or self.run or self.dataset) / verb

    def make(self, target: str, run: str = "") -> str:
        """The command that runs an earlier stage of this run, or of the run named."""
        elsewhere = {n: getattr(self, n) for n in ("data", "runs") if getattr(self, n) != n}
        run = run or self.run
        return hints.command(target, self.dataset, "" if run == self.dataset else run, **elsewhere)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(StageConfig):
    """Options of every stage that trains."""

    precision: str = "auto"  # of the trunk's matrix products in training: float32, bfloat16, or
    # auto: bfloat16 if the processor has it and the trunk is wide enough to gain. A run that is
    # carried on keeps the one it began with

    def __post_init__(self):
        super().__post_init__()
        check(self, precision=(self.precision in dist.PRECISIONS, ", ".join(dist.PRECISIONS)))


def save_tensors(state: Any, path: Path) -> None:
    """torch.save to an open file: a full disk then raises OSError and not RuntimeError."""
    with open(path, "wb") as file:
        torch.save(state, file)


def put_apart(model: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Write a model's `frozen` weights to a file that is named by their hash; name it instead.

    Where another stage of these runs has that file, it is linked: the disk holds it once, and each
    stage's directory is whole by itself.
    """
    if not isinstance(frozen := model.get("frozen"), dict):
        return model
    identity = digest(frozen)
    path = folder / f"frozen-{identity}.pt"
    if not path.exists():
        same = (
            other
            for other in sorted(folder.absolute().parent.parent.glob(f"*/*/{path.name}"))
            if frozen_id(other) == identity
        )
        with atomic(path) as beside:
            try:
                os.link(next(same).resolve(), beside)
            except (OSError, StopIteration):  # none is there, or this disk has no links
                save_tensors(frozen, beside)
    return {**model, "frozen": identity}


def put_together(model: dict[str, Any], path: Path) -> dict[str, Any]:
    """The inverse of `put_apart`. Raises PageLLMError where the frozen weights are not there.

    path   the file that the model was read from; its frozen weights lie beside it
    """
    if not isinstance(identity := model.pop("frozen", None), str):
        return model if identity is None else {**model, "frozen": identity}
    beside = path.parent / f"frozen-{identity}.pt"
    found = frozen_id(beside)
    if found != identity:
        raise PageLLMError(
            f"{beside} is {'damaged' if found else 'gone'}; {path.name} needs it\n  Copy it from "
            f"another stage that has it, or remove {path.parent} and make it again."
        )
    frozen = torch.load(beside, map_location="cpu", weights_only=True, mmap=True)
    return {**model, "weights": model["weights"] | frozen}


def frozen_id(path: Path) -> str:
    """The `digest` of the weights in a file; empty if it is not there or cannot be read."""
    try:
        about = path.stat()
    except OSError:
        return ""
    return digest_of(str(path.absolute()), about.st_mtime_ns, about.st_size)


@lru_cache(maxsize=64)
def digest_of(path: str, mtime: int, size: int) -> str:
    """`frozen_id` of a file as it is at this moment: large, and read by several networks."""
    try:
        return digest(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
    except Exception:  # whatever a damaged file leads to
        return ""


def digest(state: Any) -> str:
    """A hash (16 hex digits) of nested dicts, lists, tensors and plain values.

    Two states have the same hash if they are equal to the last bit, whatever device they are on.
    """
    hashed = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            hashed.update(f"{value.dtype}{tuple(value.shape)}".encode())
            flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            hashed.update(flat.numpy().data)
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


def finished(path: str | Path, need: str, make: str) -> dict[str, Any]:
    """The `done` record of an earlier stage.

    path   the stage's directory
    need   what is missing without it, in words, e.g. "reward model"
    make   the command that makes it

    Raises PageLLMError if the stage is not finished.
    """
    path = Path(path)
    try:
        return read_json(path / "done")
    except FileNotFoundError:
        half = " (begun, not finished)" if (path / "config.json").exists() else ""
        others = hints.other_runs(path.parent)
        raise PageLLMError(f"no {need} in {path}{half}\n  Make it with: {make}{others}") from None


def is_changed(path: Path) -> bool:
    """Whether a model.pt is another file than the `done` record beside it names."""
    record = path.parent / "done"
    return path.exists() and record.exists() and file_id(path) != read_json(record)["id"]


def load_model_file(path: str | Path, mapped: bool = False) -> dict[str, Any]:
    """The tensors and plain values in a model.pt or checkpoint, on the CPU.

    mapped  tensors are mapped from the file, so that what is not read takes no memory. Do not
            change them

    No pickle is run (torch.load with weights_only). A model.pt must be the file that the `done`
    record beside it names. Raises PageLLMError for a file that is gone, changed or damaged.
    """
    path = Path(path)
    if path.name == "model.pt" and is_changed(path):
        raise PageLLMError(
            f"{path} is not what its stage wrote: changed or damaged since\n"
            f"  Remove {path.parent} and make it again."
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped or None)
    except FileNotFoundError:
        raise PageLLMError(
            f"{path} is gone; remove {Path(path).parent} and make it again"
        ) from None
    except Exception as error:
        raise PageLLMError(
            f"{path} cannot be read ({type(error).__name__}: {error}); "
            f"remove {Path(path).parent} and make it again"
        ) from error
    return put_together(state, path) if isinstance(state, dict) else state


def commit(folder: str | Path = Path(__file__).parent) -> str | None:
    """The git commit of the source tree that holds the run.py in `folder`: 12 hex digits.

    "-dirty" follows if tracked files were changed. None without git, and for an installed copy,
    even if it lies inside some other repository.
    """
    # Within a git hook these variables would point git to the repository of the hook.
    outer = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "--no-optional-locks", *words],
            cwd=folder,
            env=outer,
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
    """This machine in one line, as config.json keeps it.

    Processor, cores that this process may use, threads of torch, processes of the job if there are
    several, the GPU if `device` is one, operating system.
    """
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
    """Package -> version, for those on which the numbers of a stage depend."""
    out = {"pagellm": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for name in ("numpy", "pyarrow", "tokenizers"):
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            pass
    return out


# Options that may differ when a run is carried on: no result depends on them. `preset` is one,
# since the options that a preset sets are compared themselves. So are the places: a run may be
# moved or named in another way, and what it read is compared by the ids of its inputs.
PLACES = ("run", "runs", "data")
FREE = ("preset", "device", "save_every", "parallel", "checkpoint_blocks", *PLACES)

# What a stage writes before it has learnt anything.
BEGUN = {"config.json", "lock", "log.jsonl", "vocab.json", "tokenizer.json", "gate.json"}


class Run:
    """One stage's directory. No other process can use it until this object is closed.

    path     the directory; made if it is not there
    config   the stage's Config (a dataclass)
    inputs   name -> id of everything that the stage reads
    free     fields of the Config, beside FREE, that may differ when a run is carried on, because no
             result depends on them

    A stage uses it like this:

        with Run(config.stage("sft"), config, inputs) as out:
            if out.already_done():
                return
            state = out.load()                          # None at the start of a run
            for step in out.steps(range(begin, total)):
                ...
                out.log(step, loss=loss)
                if out.due(step + 1, total):
                    out.save({"step": step + 1, ...})
            out.finish(model)

    Raises PageLLMError if another process uses the directory, if it cannot be written, or if it was
    begun with other options or inputs.
    """

    def __init__(
        self,
        path: str | Path,
        config: Any,
        inputs: dict[str, str],
        free: tuple[str, ...] = (),
    ):
        self.path = Path(path)
        self.started, self.began = time.time(), time.process_time()
        self.save_every = getattr(config, "save_every", 0)
        self._logs: dict[str, TextIO] = {}
        # lines of the logs whose numbers may still be on the GPU: file, step, values, names of the
        # values that are tensors, their numbers
        self._queue: list[tuple[str, int, dict[str, Any], list[str], dist.AsyncScalars]] = []
        self.last: dict[str, Any] = {}  # the newest line of log.jsonl that was written
        self._lock: FileLock | None = None
        self._waiting = Waiting()
        if dist.is_main():
            self._open(config, inputs, free)
        dist.barrier()

    def _open(self, config: Any, inputs: dict[str, str], free: tuple[str, ...]) -> None:
        """Lock the directory, clear what a killed run left behind, and compare the options."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            # The system drops the lock when the process ends, so the lock file of a killed run does
            # no harm.
            self._lock = FileLock(self.path / "lock")
            self._lock.acquire(blocking=False)
        except Timeout:
            self._lock = None
            raise PageLLMError(
                f"another process works in {self.path}; wait for it, or use {hints.another_run()}"
            ) from None
        except OSError as error:
            raise PageLLMError(f"cannot write in {self.path}: {error.strerror}") from error
        for left in self.path.rglob(".*.tmp"):
            left.unlink(missing_ok=True)
        if self.done:
            self._drop_checkpoints()
        self._check(config, inputs, (*FREE, *free))

    def _check(self, dataclass: Any, inputs: dict[str, str], free: tuple[str, ...]) -> None:
        """Write config.json, or compare options and inputs with those of the one that is there."""
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
        self,
        before: dict[str, Any],
        config: dict[str, Any],
        default: dict[str, Any],
        inputs: dict[str, str],
        free: tuple[str, ...],
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
        """The number format of the network's matrix products: "float32" or "bfloat16".

        It is chosen at the start of a run (see `dist.pick_precision` for the arguments) and kept in
        config.json, so it stays the same when the run is carried on, on whatever machine. Call it
        on every process.
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
        """Whether the stage is finished."""
        return (self.path / "done").exists()

    def already_done(self) -> bool:
        """Whether this stage is done. If so, the main process says it on the screen."""
        if self.done and dist.is_main():
            print(f"{self.path.name}: already done in {self.path}")
        return self.done

    def load(self) -> dict[str, Any] | None:
        """The newest undamaged checkpoint; None at the start of a run.

        The logs are cut back to its step. If a checkpoint's checksum is wrong, a message on stderr
        says so and the one before is loaded: the run repeats the steps between them, with the same
        result. Call it on every process.
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
                fault = "damaged" if path.exists() else "gone"
                tqdm.write(f"{path} is {fault}; going on from the one before", file=sys.stderr)
        dist.barrier()  # the main process writes only after all others have read
        if dist.is_main():
            for path in self.path.glob("*.jsonl"):
                self._cut(path, state["step"] if state else -1)
        return state

    @staticmethod
    def _cut(path: Path, step: int) -> None:
        """Drop the lines after a checkpoint's step: the run is about to write them again."""
        kept = []
        for line in path.read_text(errors="replace").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                break  # a half-written line, left by a process that was killed
        with atomic(path) as beside:
            beside.write_text("".join(kept))

    def log(self, step: int, file: str = "log", **values: Any) -> None:
        """Append one line to <file>.jsonl. Numbers are written so that they read back exactly.

        Numbers that are on a GPU are copied in the background. Their line is written with that of
        the next step, or by `flush`, so that the CPU does not wait for the GPU.
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
        """Write the lines that still wait for numbers: all, or those of steps below `before`."""
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

    def read_log(self) -> list[dict[str, Any]]:
        """All lines of log.jsonl so far."""
        self.flush()
        path = self.path / "log.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def steps(self, bar: Iterable[int]) -> Iterator[int]:
        """Yield the steps of a training loop, with interruptions put off to the end of a step.

        After SIGINT or SIGTERM the step in progress is finished. Then `due` returns True, and
        `save` raises Interrupted once the checkpoint is written. A second signal stops at once.
        """
        with deferred_signals() as self._waiting:
            yield from bar

    def due(self, step: int, total: int) -> bool:
        """Whether a checkpoint is to be written after `step` of `total` steps, counted from 1.

        That is every `save_every` steps, and after a signal to any of the processes; never after
        the last step, which `finish` follows. Call it on every process.
        """
        if dist.any_rank(self._waiting.signum is not None):
            self._waiting.signum = self._waiting.signum or signal.SIGTERM
            return step < total
        return step % self.save_every == 0 and step < total

    def save(self, state: dict[str, Any]) -> None:
        """Write a checkpoint, and remove all but the two newest.

        state   tensors and plain values; state["step"] is the number of steps done

        Raises Interrupted afterwards if a signal came during the step. Call it on every process.
        """
        if dist.is_main():
            self._write_checkpoint(state)
        dist.barrier()
        if self._waiting.signum is not None:
            raise Interrupted(
                self._waiting.signum, f"{self.path} holds the checkpoint of step {state['step']}"
            )

    def _write_checkpoint(self, state: dict[str, Any]) -> None:
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

    def keep_for_replay(self, step: int, state: dict[str, Any]) -> Path:
        """Write what made a step go wrong to bad-<step>.pt, for a closer look; returns its path."""
        path = self.path / f"bad-{step:08d}.pt"
        if dist.is_main():
            with atomic(path) as beside:
                save_tensors(state, beside)
        return path

    def finish(self, model: dict[str, Any] | None = None, state: Any = None, **result: Any) -> None:
        """Write model.pt and `done`, and remove the checkpoints, which are no longer needed.

        model    what the next stage reads; None: no model.pt
        state    weights, moments and whatever else a checkpoint would hold. Its `digest` goes into
                 `done`, so that two runs can be compared to the last bit
        result   what else `done` is to say: plain values

        Call it on every process.
        """
        if dist.is_main():
            identity = None
            self.flush()
            for file in self._logs.values():
                os.fsync(file.fileno())
            if model is not None:
                model = put_apart(model, self.path)
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
                    "cpu_seconds": round(time.process_time() - self.began, 1),
                    "peak_mb": round(dist.peak_memory(), 1),
                    **result,
                },
            )
            self._drop_checkpoints()
        dist.barrier()

    def close(self, failed: bool = False) -> None:
        """Write what waits, close the logs, and let other processes use the directory.

        failed  an error ended the stage
        """
        self.flush()
        for file in self._logs.values():
            file.close()
        self._logs.clear()
        if failed and dist.is_main():
            self._leave_nothing()
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None and issubclass(kind, Exception))

    def _leave_nothing(self) -> None:
        """Clear a directory in which nothing was learnt, so that the mended command may begin here.

        Otherwise a mistyped option would be what the run was made with for good.
        """
        # An error here, as on a disk that became read-only, would hide the one that ended the
        # stage. A directory that holds something else stays.
        with suppress(OSError):
            there = {one.name for one in self.path.iterdir()}
            if there <= BEGUN and not self.last.get("step"):
                for name in (*(there - {"lock"}), "lock"):
                    (self.path / name).unlink()
                self.path.rmdir()
                self.path.parent.rmdir()


def plain(value: Any) -> Any:
    """A tensor or NumPy number as a Python number or list, which JSON can hold."""
    if isinstance(value, torch.Tensor):
        return value.item() if value.ndim == 0 else value.tolist()
    return value.item() if hasattr(value, "item") else value
