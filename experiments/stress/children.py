"""A child process whose end is looked at: run, watched, killed, short of disk, memory or rights.

ended = forked(folder, lambda: main(...), arm=die_at(7, None))
ended.code, ended.text, ended.operations
"""

import contextlib
import faulthandler
import importlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

__all__ = [
    "Outcome",
    "children_of",
    "die_after",
    "die_at",
    "die_where",
    "forked",
    "limited_files",
    "little_memory",
    "nobody",
    "small_disk",
    "watchers",
]


@dataclass
class Outcome:
    """How a child ended: exit code, or minus the signal that ended it; output; file operations."""

    code: int
    text: str
    operations: int
    seconds: float
    peak_mb: float


TRIAL_SECONDS = (
    180  # a trial that takes longer counts as hanging: its stack is printed, it is killed
)


def forked(
    folder: Path,
    action: Callable[[], int],
    arm: Callable[[], object] | None = None,
    signum: int = 0,
    after: float = 0.0,
    patience: bool = True,
) -> Outcome:
    """Run action() in a forked child whose working directory is `folder`.

    arm            called in the child first
    signum, after  signal that the parent sends after so many seconds; 0: none
    patience       kill a child that hangs, after TRIAL_SECONDS; False: wait without a limit
    """
    out, count = folder / ".out", folder / ".operations"
    began = time.time()
    child = os.fork()
    if child == 0:
        code = 99
        try:
            os.chdir(folder)
            handle = os.open(".out", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            sys.stdout, sys.stderr = (open(n, "w", buffering=1, closefd=False) for n in (1, 2))
            # tqdm's lock is a semaphore that forked processes share. A child killed while it draws
            # a bar would keep it, and the next bar, even one of the parent, would wait for ever.
            tqdm.set_lock(threading.RLock())
            faulthandler.register(signal.SIGQUIT)
            torch.set_num_threads(1)
            counted = operations()
            if arm:
                arm()
            code = action()
            with contextlib.suppress(OSError):  # the child may have no right or no room to write
                Path(".operations").write_text(str(counted[0]))
        except BaseException as error:  # an exception that `main` does not handle is a crash
            import traceback

            traceback.print_exception(error)
        finally:
            sys.stdout.flush()
            os._exit(code)
    if signum:
        time.sleep(after)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signum)
    deadline, asked = time.time() + TRIAL_SECONDS + after, False
    while not (ended := os.wait4(child, os.WNOHANG))[0]:
        # print where it hangs; its end is then reported like any other
        if time.time() > deadline and patience:
            os.kill(child, signal.SIGKILL if asked else signal.SIGQUIT)
            deadline, asked = deadline + 1, True
        time.sleep(0.002)
    _, status, usage = ended
    text = out.read_text(errors="replace") if out.exists() else ""
    done = int(count.read_text() or 0) if count.exists() else 0  # empty: killed while writing it
    for path in (out, count):
        path.unlink(missing_ok=True)
    code = os.waitstatus_to_exitcode(status)
    return Outcome(code, text, done, time.time() - began, usage.ru_maxrss / 1024)


watchers: list[Callable[[int, str], None]] = []


def operations() -> list[int]:
    """Count this process's openings, renames and removals of files below data/ and runs/.

    Calls `watchers` at each, with its number and "event path".
    """
    count = [0]

    def hook(event: str, args: tuple) -> None:
        if event in ("open", "os.rename", "os.remove", "os.mkdir") and isinstance(
            args[0], str | bytes | os.PathLike
        ):
            path = os.fsdecode(args[0])
            if "runs/" in path or path.startswith("data"):
                count[0] += 1
                for watch in watchers:
                    watch(count[0], f"{event} {path}")

    sys.addaudithook(hook)
    return count


def die_at(operation: int, delay: float | None) -> Callable[[], object]:
    """Prepare a child's SIGKILL at its n-th file operation, or `delay` seconds after it."""

    def watch(n: int, _what: str) -> None:
        if n == operation:
            die(delay)

    return lambda: watchers.append(watch)


def die(delay: float | None) -> None:
    """Kill this process now, or in `delay` seconds by an alarm; no handler or cleanup runs."""
    if delay is None:
        os.kill(os.getpid(), signal.SIGKILL)
    else:
        signal.setitimer(signal.ITIMER_REAL, delay)


def die_where(words: str, nth: int, delay: float | None) -> Callable[[], object]:
    """Like die_at, at the n-th operation whose description contains these words."""
    seen = [0]

    def watch(_n: int, what: str) -> None:
        if words in what:
            seen[0] += 1
            if seen[0] == nth:
                die(delay)

    return lambda: watchers.append(watch)


def die_after(seconds: float) -> Callable[[], object]:
    return lambda: signal.setitimer(signal.ITIMER_REAL, seconds)


def limited_files(size: int) -> None:
    """Limit every file that this process writes to `size` bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def little_memory(megabytes: int) -> None:
    """Limit this process to so many megabytes more than it has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + (megabytes << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def nobody() -> None:
    """Give up root's rights: root may write into a read-only directory."""
    if os.getuid() == 0:
        # Arrow imports it on demand, and without rights this may fail half-way.
        with contextlib.suppress(ImportError):
            importlib.import_module("pandas")
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)


@contextlib.contextmanager
def small_disk(folder: Path, size: int):
    """Mount a tmpfs of `size` bytes at `folder`; yields False if this process may not mount."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True
    )
    try:
        yield made.returncode == 0
    finally:
        if made.returncode == 0:
            subprocess.run(["umount", str(folder)], check=True)


def children_of(pid: int) -> list[str]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += (task / "children").read_text().split()
    return found
