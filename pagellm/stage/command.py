"""Run a stage as a command: exit codes, signals, and faults of the machine in words."""

import dataclasses
import errno
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import contextmanager

from pagellm.stage.config import PageLLMError, help_text, parse

__all__ = ["Interrupted", "Waiting", "deferred_signals", "main"]


class Interrupted(BaseException):
    """SIGINT or SIGTERM asked this process to stop: exit code 128 + signum. `saved` says what can be carried on."""

    def __init__(self, signum: int, saved: str = ""):
        super().__init__(signum, saved)
        self.signum, self.saved = signum, saved


class Waiting:
    """The signal that came while signals are deferred, or None."""

    signum: int | None = None


deferring: list[Waiting] = []  # the innermost block that puts signals off, if any


def on_signal(signum: int, _frame) -> None:
    """Stop here and now, unless a block wants to end its step first; a second signal does not wait."""
    if deferring and deferring[-1].signum is None:
        deferring[-1].signum = signum
        return
    raise Interrupted(signum)


@contextmanager
def deferred_signals():
    """Put SIGINT and SIGTERM off; the yielded object's `signum` says which one waits. Whatever still waits at the
    end of the block stops the process there."""
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
    """SIGINT and SIGTERM reach `on_signal` within the block; elsewhere than in the main thread nothing changes."""
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
LOST_PROCESS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "gloo/transport",
    "NCCL error",
    "Broken pipe",
)
OUT_OF_MEMORY = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "cannot allocate memory",
)


def explain(error: Exception, cls) -> str | None:
    """One message for a fault of the machine: full or read-only disk, too little memory. None for any other error."""
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and any(words in str(error).lower() for words in OUT_OF_MEMORY)
    ):
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
            + (
                ". The same command carries on from the last checkpoint; a changed option may need RUN=another."
            )
        )
    if isinstance(error, RuntimeError) and any(words in str(error) for words in LOST_PROCESS):
        return "another process of this job has ended; the same command carries on from the last checkpoint"
    if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
        # torch.save wraps what its file said; any other mistake keeps its traceback
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
                f"cannot write or read{where}: {os.strerror(error.errno)}; give yourself the right, "
                "or use another directory"
            )
    return None


def main(cls, run: Callable, prog: str, argv: list[str] | None = None) -> int:
    """Parse the command line and run the stage. -> exit code: 0; 2 with one message for what a person can mend;
    130 or 143 after Ctrl-C or SIGTERM. Of several processes (torchrun) those beside the first name their rank."""
    argv = sys.argv[1:] if argv is None else argv
    rank = os.environ.get("RANK", "0")
    who = prog if rank == "0" else f"{prog} (rank {rank})"
    try:
        if any(word in ("--help", "-h") for word in argv):
            print(help_text(cls, prog), flush=True)
            return 0
        with handled_signals():
            run(parse(cls, argv, prog))
            sys.stdout.flush()
    except PageLLMError as error:
        print(f"{who}: {error}", file=sys.stderr)
        return 2
    except (Interrupted, KeyboardInterrupt) as error:
        signum = getattr(error, "signum", signal.SIGINT)
        saved = getattr(error, "saved", "") or "nothing is half-written"
        if rank == "0":
            print(
                f"\n{prog}: stopped by {signal.Signals(signum).name}; {saved}. The same command carries on.",
                file=sys.stderr,
            )
        return 128 + signum
    except BrokenPipeError:
        # Whoever read our output has gone (`| head`): no message, and none at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception as error:
        text = explain(error, cls)
        if text is None:
            raise
        print(f"{who}: {text}", file=sys.stderr)
        return 2
    return 0
