"""Run a stage as a command: exit codes, signals, and messages for faults such as a full disk."""

import dataclasses
import errno
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import contextmanager

from pagellm.stage import hints
from pagellm.stage.config import PageLLMError, help_text, parse, verb_of

__all__ = [
    "ExitCode",
    "Interrupted",
    "Waiting",
    "deferred_signals",
    "explain",
    "handled_signals",
    "main",
]


class Interrupted(BaseException):
    """SIGINT or SIGTERM asked this process to stop. The exit code is 128 + signum.

    saved  what has been written, for the message; empty if nothing can be carried on
    """

    def __init__(self, signum: int, saved: str = ""):
        super().__init__(signum, saved)
        self.signum, self.saved = signum, saved


class Waiting:
    """Holds the signal that arrived inside a `deferred_signals` block, or None."""

    signum: int | None = None


deferring: list[Waiting] = []  # open `deferred_signals` blocks, innermost last


def on_signal(signum: int, _frame) -> None:
    """Signal handler: raise Interrupted at once, or let the innermost block finish first.

    A second signal never waits.
    """
    if deferring and deferring[-1].signum is None:
        deferring[-1].signum = signum
        return
    raise Interrupted(signum)


@contextmanager
def deferred_signals():
    """Hold SIGINT and SIGTERM back inside the block.

    Yields a Waiting, whose `signum` is the signal that arrived, or None. If one arrived, the end of
    the block raises Interrupted.
    """
    waiting = Waiting()
    deferring.append(waiting)
    try:
        yield waiting
    finally:
        deferring.remove(waiting)
    if waiting.signum is not None:
        raise Interrupted(waiting.signum)


@contextmanager
def handled_signals():
    """Inside the block `on_signal` handles SIGINT and SIGTERM; only in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {
        number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is too large",
}
NO_PLACE = {
    errno.ENOTDIR: "a part of this path is a file, not a directory",
    errno.EEXIST: "a file of this name is in the way",
    errno.EISDIR: "a directory of this name is in the way",
    errno.ENAMETOOLONG: "the name is too long",
}
LOST_PROCESS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "gloo/transport",
    "NCCL error",
    "Broken pipe",
)
STARVED = 64 << 20  # bytes: with less than this left, an import may fail for want of memory
OUT_OF_MEMORY = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "cannot allocate memory",
)


def ran_out(error: Exception) -> bool:
    """Whether this error comes of too little memory."""
    if isinstance(error, RuntimeError):
        return any(words in str(error).lower() for words in OUT_OF_MEMORY)
    if isinstance(error, ImportError | SystemError | AttributeError):
        # Modules that find no memory while they are imported fail in ways of their own.
        try:
            bytearray(STARVED)
        except MemoryError:
            return True
    return isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM


def explain(error: Exception, cls) -> str | None:
    """A message for a fault of the machine, or None for any other error.

    Faults are a full or read-only disk, a path that cannot be, too little memory, and a lost
    process of the job.

    cls  the command's Config: the message names those of its options that lower memory
    """
    if ran_out(error):
        names = [f.name for f in dataclasses.fields(cls)]
        lower = [
            f"--{name}"
            for name in (
                "micro",
                "batch",
                "rating_batch",
                "rollout",
                "minibatch",
                "max_history",
                "k",
            )
            if name in names
        ]
        return (
            "out of memory"
            + (f"; lower {', '.join(lower)}" if lower else "")
            + ". The same command carries on from the last checkpoint; "
            + f"a changed option may need {hints.another_run()}."
        )
    if isinstance(error, RuntimeError) and any(words in str(error) for words in LOST_PROCESS):
        return (
            "another process of this job has ended; "
            "the same command carries on from the last checkpoint"
        )
    if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
        # torch.save wraps the file's error. Any other mistake keeps its traceback.
        error = error.__context__
    if isinstance(error, OSError) and error.errno is not None:
        where = f" ({error.filename})" if error.filename else ""
        if error.errno in FULL:
            return (
                f"{FULL[error.errno]}{where}: free some space; what was written before is whole, "
                "and the same command carries on"
            )
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return (
                f"cannot write or read{where}: {os.strerror(error.errno)}; "
                "give yourself the right, or use another directory"
            )
        if error.errno in NO_PLACE:
            name = error.filename2 or error.filename  # what is renamed ends at the second name
            return f"{name}: {NO_PLACE[error.errno]}; name another file or directory"
    return None


class ExitCode(int):
    """What `run` returns where the command's exit code says something, as that of doctor does."""


def main(cls, run: Callable, prog: str, argv: list[str] | None = None) -> int:
    """Parse the command line, run the command, and return the exit code.

    The code is 0 after success, or what `run` returns as an ExitCode; 2, with one message, after an
    error that the user can correct; 130 after Ctrl-C, 143 after SIGTERM.

    cls   the command's Config      run   called with it      argv  default: sys.argv
    prog  the command as it is typed, "pagellm sft": every message begins with it. What follows
          `pagellm` is the name under which the data set's preset is looked up (`verb_of`).
          Processes of torchrun other than the first add their rank.
    """
    argv = sys.argv[1:] if argv is None else argv
    rank = os.environ.get("RANK", "0")
    who = prog if rank == "0" else f"{prog} (rank {rank})"

    def tell(line: str) -> None:
        if rank == "0":
            print(f"{prog}: {line}", file=sys.stderr, flush=True)

    try:
        if any(word in ("--help", "-h") for word in argv):
            print(help_text(cls, prog), flush=True)
            return 0
        with handled_signals():
            code = run(parse(cls, argv, prog, verb_of(prog), tell))
            sys.stdout.flush()
    except PageLLMError as error:
        print(f"{who}: {error}", file=sys.stderr)
        return 2
    except (Interrupted, KeyboardInterrupt) as error:
        signum = getattr(error, "signum", signal.SIGINT)
        saved = getattr(error, "saved", "") or "nothing is half-written"
        if rank == "0":
            print(
                f"\n{prog}: stopped by {signal.Signals(signum).name}; {saved}. "
                "The same command carries on.",
                file=sys.stderr,
            )
        return 128 + signum
    except BrokenPipeError:
        # The reader of our output has gone (`| head`). Print nothing now, and nothing at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + getattr(signal, "SIGPIPE", 13)  # Windows has no such signal
    except Exception as error:
        text = explain(error, cls)
        if text is None:
            raise
        print(f"{who}: {text}", file=sys.stderr)
        return 2
    return int(code) if isinstance(code, ExitCode) else 0
