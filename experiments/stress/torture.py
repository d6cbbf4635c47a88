"""Stress tests of the stages: kill them, fill the disk, damage files, feed malformed input.

    make torture                    python -m experiments.stress.torture --suites kill,signal,input

kill    SIGKILL at random times and at random file operations, also while a checkpoint is written
        and between its rename and LAST. The same command, run again, must end with the same bytes
        as an undisturbed run
signal  SIGTERM and SIGINT: exit codes 143 and 130, one line, and the same bytes in the end
fault   full disk, read-only directory, damaged checkpoints, lost or changed inputs, NaN, too little
        memory
ranks   two processes under torchrun: one is killed, the job must end, and one process continues it
input   mutated lines of every format, gzip bombs, endless lines: no crash, and every line is
        counted as kept or broken
silent  a clean shop's files changed in every way that exports go wrong: `prepare` must come to the
        same tables, or name the change (see experiments.stress.silent)
soak    all stages in a loop in one process for `minutes`: memory, open files, threads and temporary
        files must not grow (make soak)

Every trial runs in a forked child, so this process must have no other threads: run it as a command.
Prints what was tried. Exits with 1, and says what broke, if anything did.
"""

import contextlib
import faulthandler
import gc
import gzip
import hashlib
import importlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from experiments.stress import silent
from pagellm import evaluate, ppo, pretrain, reward, sft
from pagellm.data import prepare, synthetic
from pagellm.data.amazon import parse_item, parse_review
from pagellm.data.logs import ITEM_COLUMNS, LOG_COLUMNS, match, read_items, read_log
from pagellm.data.records import Tally, parsed
from pagellm.data.sequences import read_sequences
from pagellm.stage.command import main
from pagellm.stage.config import PageLLMError, check

__all__ = ["Config", "Trials", "fuzzed_line", "merged", "run"]


SUITES = ("kill", "signal", "fault", "ranks", "input", "silent", "soak")
VERBS = {
    "prepare": prepare,
    "pretrain": pretrain,
    "sft": sft,
    "reward": reward,
    "ppo": ppo,
    "evaluate": evaluate,
}
# Presets would override what makes a shop and its networks this small.
SMALL = {
    "prepare": "--users 60 --items 40",
    "pretrain": "--size nano --steps 8 --batch 8 --rating_batch 8 --words 300 --warmup 2 "
    "--save_every 2",
    "sft": "--epochs 2 --batch 16 --eval_every 3 --max_history 8 --warmup 2 --k 6 --save_every 2",
    "reward": "--per_kind 1 --batch 16 --warmup 2 --save_every 2",
    "ppo": "--epochs 1 --rollout 16 --minibatch 8 --micro 4 --inner_epochs 2 --k 6 --eval_every 2 "
    "--critic_warmup 4 --lr 1e-3 --min_steps 8 --save_every 2 --gate_users 8 --force true",
    "evaluate": "--policies popularity,sft,ppo --k 6 --depth 40 --n_boot 50 --examples 1",
}
SMALL = {verb: f"--preset none {options}" for verb, options in SMALL.items()}


# Critical moments for a kill: the file operation that comes next, as `operations` describes it.
SPOTS = {
    "while a checkpoint is written": ("open", ".step-"),
    "between its rename and LAST": ("open", ".LAST"),
    "before old checkpoints are gone": ("os.remove", "step-"),
    "between model.pt and done": ("open", ".done"),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Break things on purpose and count what survives."""

    suites: str = "kill,signal,fault,ranks,input,silent"  # suites to run, comma-separated;
    # also soak
    moments: int = 20  # kills of each stage; half as many signals
    inputs: int = 100_000  # number of mutated lines
    mutations: int = 500  # number of shops with a silent fault
    minutes: float = 30.0  # length of soak
    rounds: int = 8  # that soak runs in any case
    seed: int = 0  # seed of all random choices

    def __post_init__(self):
        names = self.suites.split(",")
        check(
            self,
            suites=(set(names) <= set(SUITES), f"some of {','.join(SUITES)}"),
            moments=(self.moments > 0, "1 or more"),
            inputs=(self.inputs >= 0, "0 or more"),
            mutations=(self.mutations >= 0, "0 or more"),
            minutes=(0 < self.minutes < 1e6, "above 0"),
            rounds=(self.rounds >= 4, "4 or more: its quarters are compared"),
        )


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


def snapshot(folder: Path) -> dict[str, str]:
    """Relative path -> hash of every file that a finished stage leaves, without times."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir() or name in ("lock", "timing.jsonl"):
            continue
        data = path.read_bytes()
        if path.name in ("done", "config.json"):
            passing = ("seconds", "cpu_seconds", "peak_mb", "versions")
            data = json.dumps(
                {k: v for k, v in json.loads(data).items() if k not in passing}
            ).encode()
        found[name] = hashlib.sha256(data).hexdigest()
    return found


def steps_of(stage: Path) -> list[dict]:
    """Lines of a stage's log, without the validation before the first step."""
    rows = [json.loads(line) for line in (stage / "log.jsonl").read_text().splitlines()]
    return [row for row in rows if row["step"] > 0]


def merged(options: str, more: str) -> list[str]:
    """ "--a 1 --b 2" and "--b 3" -> the words of "--a 1 --b 3"."""
    words = f"{options} {more}".split()
    last = dict(zip(words[::2], words[1::2], strict=True))
    return [word for option in last.items() for word in option]


class Trials:
    """A reference run of all stages on a tiny shop, and trials that are compared with it."""

    def __init__(self, root: Path, seed: int = 0):
        self.root, self.random = root, random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []
        self.reference = root / "reference"
        self.reference.mkdir(parents=True)
        self.whole: dict[str, Outcome] = {}
        for verb in VERBS:
            self.whole[verb] = outcome = self.stage(self.reference, verb)
            if outcome.code:
                raise RuntimeError(f"{verb} fails when left in peace:\n{outcome.text}")

    @staticmethod
    def place(folder: Path, verb: str) -> Path:
        """The directory that a stage writes."""
        return folder / ("data/synthetic" if verb == "prepare" else f"runs/synthetic/{verb}")

    def stage(self, folder: Path, verb: str, more: str = "", **how) -> Outcome:
        """Run the stage's command line in a child."""
        module, options = VERBS[verb], merged(SMALL[verb], more)
        return forked(
            folder, lambda: main(module.Config, module.run, f"pagellm {verb}", options), **how
        )

    def trial(self, verb: str) -> Path:
        """A new directory with the output of all stages before this one."""
        folder = self.root / "trial"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        if verb != "prepare":
            shutil.copytree(self.reference / "data", folder / "data")
        for before in list(VERBS)[1 : list(VERBS).index(verb)]:
            shutil.copytree(self.place(self.reference, before), self.place(folder, before))
        return folder

    def expect(self, holds: bool, what: str, outcome: Outcome | None = None) -> None:
        if not holds:
            tail = "\n    ".join(outcome.text.strip().splitlines()[-6:]) if outcome else ""
            self.failures.append(f"{what}\n    {tail}")

    def same(self, folder: Path, verb: str, what: str) -> None:
        """Expect the stage's files to equal the reference's, and no temporary files."""
        mine, reference = (
            snapshot(self.place(folder, verb)),
            snapshot(self.place(self.reference, verb)),
        )
        odd = sorted(
            name for name in set(mine) | set(reference) if mine.get(name) != reference.get(name)
        )
        self.expect(
            not odd, f"{verb}, {what}: {', '.join(odd[:4])} differ from the undisturbed run"
        )
        left = [str(p.relative_to(folder)) for p in folder.rglob(".*") if p.name.endswith(".tmp")]
        self.expect(not left, f"{verb}, {what}: left behind {left[:3]}")

    def carry_on(self, folder: Path, verb: str, what: str, **how) -> Outcome:
        outcome = self.stage(folder, verb, **how)
        self.expect(
            outcome.code == 0, f"{verb}, {what}: the same command did not carry on", outcome
        )
        if outcome.code == 0:
            self.same(folder, verb, what)
        return outcome

    # The suites.

    def kill(self, verb: str) -> None:
        """Kill the stage at random file operations, times and critical moments, and resume it.

        Some trials kill the resumed run as well.
        """
        folder, whole = self.trial(verb), self.whole[verb]
        for round_ in range(1 + (self.random.random() < 0.3)):
            dice = self.random.random()
            if verb in ("pretrain", "sft", "reward", "ppo") and dice < 0.4:
                spot, nth = self.random.choice(list(SPOTS)), self.random.randint(1, 2)
                event, name = SPOTS[spot]
                # in the middle of the operation
                delay = 10 ** self.random.uniform(-5, -3) if name == ".step-" else None
                arm = die_where(f"{event} runs/synthetic/{verb}/{name}", nth, delay)
                what = f"killed {spot} ({nth}), round {round_}"
                self.counts[f"aimed {spot}"] += 1
            elif dice < 0.7:
                at = self.random.randint(1, max(1, whole.operations))
                delay = self.random.choice([None, None, 10 ** self.random.uniform(-5, -2.5)])
                arm, what = die_at(at, delay), f"killed at file operation {at}, round {round_}"
            else:
                seconds = self.random.uniform(0.01, whole.seconds)
                arm, what = die_after(seconds), f"killed after {seconds:.3f} s, round {round_}"
            ended = self.stage(folder, verb, arm=arm)
            self.counts[
                "killed" if ended.code in (-signal.SIGKILL, -signal.SIGALRM) else "finished before"
            ] += 1
            self.expect(
                ended.code in (0, -signal.SIGKILL, -signal.SIGALRM),
                f"{verb}, {what}: exit {ended.code}",
                ended,
            )
        self.carry_on(folder, verb, what)

    def signal(self, verb: str, signum: int) -> None:
        folder = self.trial(verb)
        after = self.random.uniform(0.05, max(0.1, self.whole[verb].seconds))
        ended = self.stage(folder, verb, signum=signum, after=after)
        what = f"{signal.Signals(signum).name} after {after:.3f} s"
        said = [line for line in ended.text.splitlines() if "stopped by" in line]
        if ended.code == 0:
            self.counts["finished before the signal"] += 1
        elif ended.code == -signum and not ended.text.strip():
            self.counts["before the stage had begun"] += 1
        else:
            self.counts["stopped by a signal"] += 1
            self.expect(
                ended.code == 128 + signum and len(said) == 1 and "carries on" in said[0],
                f"{verb}, {what}: exit {ended.code}",
                ended,
            )
        self.carry_on(folder, verb, what)

    def faults(self) -> None:
        for fault in (
            self.full_disk,
            self.no_rights,
            self.damaged_checkpoints,
            self.lost_input,
            self.changed_data,
            self.changed_option,
            self.two_at_once,
            self.not_a_number,
            self.little_memory,
        ):
            fault()

    def refused(self, outcome: Outcome, what: str, *words: str) -> None:
        """Expect exit code 2 and one message with these words, without a traceback."""
        self.counts["faults"] += 1
        self.expect(
            outcome.code == 2
            and "Traceback" not in outcome.text
            and all(w in outcome.text for w in words),
            f"{what}: exit {outcome.code}, wanted 2 and {words}",
            outcome,
        )

    def full_disk(self) -> None:
        """Run into a file-size limit, and, where mounting is allowed, into a full tmpfs."""
        for verb in ("prepare", "pretrain", "sft", "reward", "ppo", "evaluate"):
            largest = max(
                p.stat().st_size for p in self.place(self.reference, verb).rglob("*") if p.is_file()
            )
            folder, limit = self.trial(verb), max(600, int(largest * self.random.uniform(0.2, 0.9)))
            full = self.stage(folder, verb, arm=lambda limit=limit: limited_files(limit))
            self.refused(full, f"{verb} on a full disk", "too large")
            self.carry_on(folder, verb, "after a full disk")
        folder = self.trial("sft")
        with small_disk(folder / "runs", 64 << 20) as mounted:
            if not mounted:
                self.counts["skipped: no right to mount a tmpfs"] += 1
                return
            shutil.copytree(self.place(self.reference, "pretrain"), self.place(folder, "pretrain"))
            room = os.statvfs(folder / "runs")
            (folder / "runs" / "ballast").write_bytes(
                b"\1" * (room.f_bavail * room.f_frsize - 150_000)
            )
            full = self.stage(folder, "sft")
            self.refused(full, "sft on a full tmpfs", "disk is full")
            (folder / "runs" / "ballast").unlink()
            self.carry_on(folder, "sft", "after a full tmpfs")

    def no_rights(self) -> None:
        folder = self.trial("sft")
        os.chmod(folder / "runs" / "synthetic", 0o555)
        self.refused(
            self.stage(folder, "sft", arm=nobody), "sft in a read-only directory", "cannot write"
        )
        os.chmod(folder / "runs" / "synthetic", 0o755)
        self.carry_on(folder, "sft", "after a read-only directory")

    def damaged_checkpoints(self) -> None:
        for verb in ("pretrain", "sft", "reward", "ppo"):
            folder = self.trial(verb)
            place, kept = self.place(folder, verb), folder / "kept"
            last = [0]

            def watch(_n: int, _what: str, place=place, last=last) -> None:
                if len(list(place.glob("step-*.pt"))) == 2 and (place / "LAST").exists():
                    last[0] += 1
                    if last[0] == 8:
                        os.kill(os.getpid(), signal.SIGKILL)

            self.stage(folder, verb, arm=lambda watch=watch: watchers.append(watch))
            shutil.copytree(place, kept)
            names = [line.split()[0] for line in (place / "LAST").read_text().splitlines()]
            for harm in ("flip", "cut", "both"):
                shutil.rmtree(place)
                shutil.copytree(kept, place)
                for name in names[: 2 if harm == "both" else 1]:
                    data = bytearray((place / name).read_bytes())
                    if harm == "cut":
                        data = data[: self.random.randrange(len(data))]
                    else:
                        data[self.random.randrange(len(data))] ^= 1 << self.random.randrange(8)
                    (place / name).write_bytes(data)
                again = self.carry_on(folder, verb, f"checkpoint damaged ({harm})")
                self.counts["faults"] += 1
                self.expect(
                    "is damaged" in again.text,
                    f"{verb}: a damaged checkpoint ({harm}) went unnoticed",
                    again,
                )

    def lost_input(self) -> None:
        for verb, before in (
            ("sft", "pretrain"),
            ("reward", "sft"),
            ("ppo", "reward"),
            ("evaluate", "ppo"),
        ):
            folder = self.trial(verb)
            model = self.place(folder, before) / "model.pt"
            data = bytearray(model.read_bytes())
            data[self.random.randrange(len(data))] ^= 1
            model.write_bytes(data)
            self.refused(self.stage(folder, verb), f"{verb} with a changed {before}", "model.pt")
            model.unlink()
            self.refused(self.stage(folder, verb), f"{verb} without {before}'s model", "model.pt")
            shutil.rmtree(self.place(folder, before))
            self.refused(self.stage(folder, verb), f"{verb} without {before}", f"pagellm {before}")

    def changed_data(self) -> None:
        for verb in ("pretrain", "sft", "reward", "ppo", "evaluate"):
            folder = self.trial(verb)
            self.stage(folder, verb, arm=die_after(self.whole[verb].seconds * 0.8))
            path = folder / "data/synthetic/interactions.parquet"
            path.write_bytes(path.read_bytes() + b" ")
            self.refused(
                self.stage(folder, verb),
                f"{verb} on changed data",
                "interactions.parquet",
                "changed",
            )

    def changed_option(self) -> None:
        for verb in ("pretrain", "sft", "reward", "ppo"):
            folder = self.trial(verb)
            self.stage(folder, verb, arm=die_after(self.whole[verb].seconds * 0.8))
            if (self.place(folder, verb) / "config.json").exists():
                self.refused(
                    self.stage(folder, verb, "--lr 0.5" if verb != "ppo" else "--kl_coef 0.5"),
                    f"{verb} with another option",
                    "0.5",
                    "--run another",
                )
                self.carry_on(folder, verb, "after a refused option")

    def two_at_once(self) -> None:
        folder = self.trial("sft")
        place = self.place(folder, "sft")

        def both() -> int:
            child = os.fork()
            if child == 0:
                os._exit(main(sft.Config, sft.run, "pagellm sft", SMALL["sft"].split()))
            while not (place / "config.json").exists():
                time.sleep(0.002)
            second = main(sft.Config, sft.run, "pagellm sft", SMALL["sft"].split())
            first = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            return second if first == 0 else 98

        self.refused(forked(folder, both), "two runs in one directory", "another process")
        self.carry_on(folder, "sft", "after two at once")

    def not_a_number(self) -> None:
        for verb in ("pretrain", "sft", "reward", "ppo"):
            folder = self.trial(verb)
            ended = self.stage(
                folder,
                verb,
                {
                    "pretrain": "--lr 1e30 --warmup 0 --steps 40",
                    "ppo": "--lr 1e30 --critic_warmup 0 --max_kl 1e30",
                }.get(verb, "--lr 1e30 --warmup 0 --epochs 40"),
            )
            self.refused(ended, f"{verb} with an absurd learning rate", "not finite", "bad-")
            kept = list(self.place(folder, verb).glob("bad-*.pt"))
            self.expect(
                len(kept) == 1 and len(torch.load(kept[0], weights_only=True)) > 3,
                f"{verb}: no batch kept for a closer look",
                ended,
            )

    def little_memory(self) -> None:
        folder, more = self.trial("pretrain"), "--size small --steps 2"
        for megabytes in (8, 24, 40):  # runs out while it reads, while it builds, while it trains
            ended = self.stage(folder, "pretrain", more, arm=partial(little_memory, megabytes))
            what = f"pretrain with {megabytes} MB of memory"
            self.refused(ended, what, "out of memory", "--batch")
        again = self.stage(folder, "pretrain", more)
        self.expect(again.code == 0, "pretrain after too little memory", again)

    def ranks(self) -> None:
        """Kill one of two processes in training: the job must end soon, one process continues."""
        folder, more = self.trial("sft"), "--epochs 20 --dropout 0"
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            "2",
            "-m",
            "--",
            "pagellm.sft",
            *merged(SMALL["sft"], more),
        ]
        path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
        job = subprocess.Popen(
            command,
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        place = self.place(folder, "sft")
        deadline = time.time() + 120
        while time.time() < deadline and job.poll() is None and not (place / "LAST").exists():
            time.sleep(0.05)
        workers = [int(pid) for pid in children_of(job.pid)]
        began = time.time()
        if workers:
            os.kill(self.random.choice(workers), signal.SIGKILL)
        try:
            job.communicate(timeout=90)
        except subprocess.TimeoutExpired:
            os.killpg(job.pid, signal.SIGKILL)
        self.counts["ranks killed"] += 1
        self.counts["seconds until the job had ended"] += round(time.time() - began)
        self.expect(
            bool(workers) and job.returncode not in (0, None, -9), "the job outlived its rank"
        )
        resumed = self.stage(folder, "sft", more)
        self.expect(
            resumed.code == 0 and (place / "done").exists(),
            "one process did not carry on for two",
            resumed,
        )
        log = steps_of(place)
        alone = self.trial("sft")
        self.stage(alone, "sft", more)
        want = steps_of(self.place(alone, "sft"))
        close = len(log) == len(want) and all(
            abs(a["loss"] - b["loss"]) < 1e-3 * abs(b["loss"])
            for a, b in zip(log, want, strict=True)
        )
        self.expect(close, "two processes, then one, do not train like one throughout")

    def soak(self, minutes: float, least: int) -> None:
        """Run the pipeline in a loop in one process: what it holds after a round must not grow.

        minutes, least  it ends after so many minutes, but not before so many rounds
        """
        folder = self.root / "soak"
        folder.mkdir()
        ended = forked(folder, lambda: rounds(minutes * 60, least), patience=False)
        lines = [line for line in ended.text.splitlines() if line.startswith('{"memory_mb"')]
        self.expect(
            ended.code == 0 and len(lines) >= 4,
            f"soak: exit {ended.code} after {len(lines)} rounds",
            ended,
        )
        if len(lines) < 4:
            return
        held = [json.loads(line) for line in lines]
        quarter = len(held) // 4
        early, late = held[quarter : 2 * quarter + 1], held[-quarter - 1 :]
        for what in held[0]:
            before, after = (sum(row[what] for row in some) / len(some) for some in (early, late))
            self.counts[f"soak: {what}, second quarter"] = round(before)
            self.counts[f"soak: {what}, last quarter"] = round(after)
            # Pools start a thread or two late; a leak of one in every round soon exceeds that.
            room = {"memory_mb": 0.05 * before + 4, "threads": 2.0}.get(what, 0.0)
            self.expect(
                after <= before + room, f"soak: {what} grew from {before:.1f} to {after:.1f}"
            )
        self.counts["soak: rounds"] = len(held)

    def input(self, lines: int) -> None:
        """Mutated lines through every reader, directories of them through prepare, and bombs."""
        shop = synthetic.make(30, 20, seed=1)
        sources = {}
        for spelling in ("amazon2014", "amazon2018", "amazon2023", "sequences", "csv", "jsonl"):
            folder = self.root / "spellings" / spelling
            synthetic.write(shop, folder, spelling, compress=False)
            sources[spelling] = {
                path.name: path.read_bytes().split(b"\n")[:-1] for path in sorted(folder.iterdir())
            }
        bar = tqdm(total=lines, desc="inputs", unit="line", mininterval=1.0)
        while self.counts["inputs"] < lines:
            spelling = self.random.choice(list(sources))
            name, source = self.random.choice(list(sources[spelling].items()))
            header = source[:1] if spelling == "csv" else []
            batch = [fuzzed_line(self.random, source[len(header) :]) for _ in range(1000)]
            folder = self.root / "fuzz"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            (folder / "input").write_bytes(b"\n".join(header + batch) + b"\n")
            ended = forked(
                folder,
                partial(read_everything, spelling, name),
                arm=lambda: signal.alarm(60),
            )
            self.counts["inputs"] += len(batch)
            bar.update(len(batch))
            self.expect(
                ended.code == 0 and ended.peak_mb < 2000,
                f"{spelling} {name}: exit {ended.code}, {ended.peak_mb:.0f} MB",
                ended,
            )
            if ended.code:
                keep = self.root / f"failed-{len(self.failures)}"
                keep.write_bytes((folder / "input").read_bytes())
            else:
                counted = json.loads(ended.text.splitlines()[-1])
                for what, number in counted.items():
                    self.counts[f"rows {what}"] += number
        bar.close()
        self.directories(sources, max(3, lines // 5000))
        self.odd_shops(all_ratings=lines >= 50_000)
        self.bombs(large=lines >= 50_000)

    def silent(self, mutations: int) -> None:
        """Change clean shops; every kind of change comes about as often as any other."""
        shops, kinds = silent.Shops(self.root / "silent"), list(silent.MUTATIONS)
        for n in tqdm(range(mutations), "silent", unit="mutation"):
            name = kinds[n % len(kinds)]
            ended, said = shops.trial(self.random, name)
            self.counts[f"silent faults: {ended}"] += 1
            self.expect(ended != "silent", f"{name.replace('_', ' ')}: not a word of it\n{said}")
        self.counts["silent faults: kinds"] = min(mutations, len(kinds))

    def directories(self, sources: dict, count: int) -> None:
        """prepare directories in which some or all lines are malformed: success or one message."""
        for _ in range(count):
            folder = self.root / "fuzz"
            shutil.rmtree(folder, ignore_errors=True)
            (folder / "raw").mkdir(parents=True)
            spelling = self.random.choice(list(sources))
            share = self.random.choice([0.0, 0.005, 0.3, 1.0])
            for name, source in sources[spelling].items():
                rows = [
                    line if self.random.random() >= share else fuzzed_line(self.random, source)
                    for line in source
                ]
                (folder / "raw" / name).write_bytes(b"\n".join(rows))
            options = ["--dataset", "shop", "--raw", "raw"]
            if self.random.random() < 0.5:
                options += ["--max_broken", "1"]
            ended = forked(
                folder,
                partial(main, prepare.Config, prepare.run, "pagellm.prepare", options),
                arm=lambda: signal.alarm(60),
            )
            self.counts["directories prepared" if ended.code == 0 else "directories refused"] += 1
            self.expect(
                ended.code in (0, 2) and "Traceback" not in ended.text,
                f"prepare: exit {ended.code}",
                ended,
            )
            left = (
                [p.name for p in (folder / "data").glob(".*")] if (folder / "data").exists() else []
            )
            self.expect(not left, f"prepare left {left}")

    def odd_shops(self, all_ratings: bool) -> None:
        """Run extreme shops through all stages: each ends, or stops with one clear message."""
        rows = {
            "nothing": [],
            "one user, one item": [("u", "i")],
            "one user": [("u", f"i{n}") for n in range(30)],
            "one item": [(f"u{n}", "i") for n in range(30)],
            "everybody has everything": [(f"u{n}", f"i{m}") for n in range(12) for m in range(9)],
            "two of each": [(f"u{n}", f"i{m}") for n in range(2) for m in range(2)],
            "ids that look alike": [
                (u, i) for u in ("a", "\u0430", "A", "a ", "\u212b", "\u00c5") for i in "xyzvw"
            ],
        }
        kinds = ("", "5", "mixed")
        for n, (name, pairs) in enumerate(rows.items()):
            for ratings in kinds if all_ratings else kinds[n % 3 : n % 3 + 1]:
                folder = self.root / "fuzz"
                shutil.rmtree(folder, ignore_errors=True)
                (folder / "raw").mkdir(parents=True)
                lines = ["user_id,item_id" + (",rating" if ratings else "")]
                lines += [
                    f"{u},{i}" + (f",{ratings if ratings == '5' else 1 + n % 5}" if ratings else "")
                    for n, (u, i) in enumerate(pairs)
                ]
                (folder / "raw" / "log.csv").write_text("\n".join(lines) + "\n")
                for verb, module in VERBS.items():
                    words = merged(SMALL[verb], "--dataset odd")
                    if verb == "prepare":
                        words = ["--dataset", "odd", "--raw", "raw", "--k_core", "0"]
                    ended = forked(
                        folder,
                        partial(main, module.Config, module.run, f"pagellm {verb}", words),
                        arm=lambda: signal.alarm(120),
                    )
                    self.expect(
                        ended.code in (0, 2) and "Traceback" not in ended.text,
                        f"{name}, ratings {ratings or 'none'}: {verb} exit {ended.code}",
                        ended,
                    )
                    if ended.code:
                        break
                self.counts[
                    "odd shops: all stages" if ended.code == 0 else "odd shops: refused"
                ] += 1

    def bombs(self, large: bool) -> None:
        """A gigabyte of zeros in a megabyte of gzip, a line of 100 MB, very deep brackets."""

        def bomb(write: Callable) -> None:
            folder = self.root / "fuzz"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            write(folder / "input")
            ended = forked(
                folder,
                lambda: read_everything("amazon2018", "reviews"),
                arm=lambda: signal.alarm(120),
            )
            self.counts["bombs"] += 1
            self.expect(
                ended.code == 0 and ended.peak_mb < 1500,
                f"bomb: exit {ended.code}, {ended.peak_mb:.0f} MB",
                ended,
            )

        def zeros(path: Path) -> None:
            with gzip.open(path, "wb", compresslevel=1) as file:
                for _ in range(1024):
                    file.write(bytes(1 << 20))

        if large:
            bomb(zeros)
            bomb(lambda path: path.write_bytes(b'{"reviewerID": "' + b"a" * 100_000_000 + b'"}\n'))
        for piece in (
            b"[",
            b'{"a":',
            b"{'a': (",
            b"-",
            b"{'a': " + b"-" * 1000,
            b'"\\u',
            b"\xff\xfe",
            b"{'a':not ",
        ):
            many = piece * (900_000 // len(piece))
            bomb(lambda path, many=many: path.write_bytes(b"{'b': " + many + b"\n" + many))


PIECES = [
    b"\0",
    b"\xff",
    b"\xc3(",
    b"\xed\xa0\x80",
    b"\xe2\x80\xa8",
    b"\xe2\x80\xae",
    b"\xd0\xb0",
    b'"',
    b"'",
    b"\\",
    b",",
    b"\t",
    b"\r",
    b" ",
    b"",
    b"\xef\xbb\xbf",
    b"[" * 50,
    b"{" * 50,
    b"(" * 50,
    b"NaN",
    b"Infinity",
    b"-1",
    b"1e999",
    b"9" * 400,
    b"null",
    b"true",
    b"\\ud800",
    b"&lt;",
    b"&#0;",
    b"&#xD800;",
    b"<br>",
    b"__import__('os')",
]
LOG_FIELDS = ["user_id", "item_id", "rating", "timestamp", "summary", "text"]
ITEM_FIELDS = ["item_id", "title", "brand", "categories", "price", "description"]
VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    6,
    1e308,
    10**30,
    -(10**30),
    "",
    " ",
    "a\nb",
    "x" * 300,
    [],
    {},
    [[]],
    [None],
    {"a": {}},
    "5",
    "five",
    4.5,
    "\u0000",
    "\ud800",
    ["a", ["b"]],
]


def fuzzed_line(draw: random.Random, source: list[bytes]) -> bytes:
    """A line of the file with wrong bytes, structure or types, or spliced with another line.

    It never contains a line break.
    """
    line = draw.choice(source)
    for _ in range(draw.randint(1, 3)):
        kind = draw.randrange(6)
        at = draw.randrange(len(line) + 1)
        if kind == 0 and line:
            line = line[:at] + bytes([draw.randrange(256)]) + line[at + 1 :]
        elif kind == 1:
            line = line[:at] + draw.choice(PIECES) + line[at:]
        elif kind == 2:
            line = line[:at] + line[min(len(line), at + draw.randint(1, 30)) :]
        elif kind == 3:
            other = draw.choice(source)
            line = line[:at] + other[draw.randrange(len(other) + 1) :]
        elif kind == 4:
            line = line[:at]
        else:
            try:
                record = json.loads(line)
                record[draw.choice(list(record))] = draw.choice(VALUES)
                line = json.dumps(record).encode()
            except (ValueError, TypeError, IndexError, AttributeError):
                line = line[:at] + draw.choice(PIECES) * draw.randint(1, 5) + line[at:]
    return line.replace(b"\n", b" ")


def read_everything(spelling: str, name: str) -> int:
    """Read ./input as the file `name` of a format, print the counts, return 0 if they add up.

    A file that could mean two things is refused in words, which is right as well.
    """
    try:
        return counted(spelling, name)
    except PageLLMError as error:
        print(f"\nrefused: {error}")
        print(json.dumps({"refused": Path("input").read_bytes().count(b"\n")}))
        return 0


def counted(spelling: str, name: str) -> int:
    """What read_everything prints and returns, for a file that can be read."""
    path, tally = Path("input"), Tally()
    is_items = name.startswith(("meta", "items"))
    records: Iterator
    if spelling == "sequences" and not is_items:
        records = read_sequences(path, tally, {})
    elif spelling in ("csv", "jsonl"):
        with open(path, encoding="utf-8", errors="replace") as file:
            first = file.readline().strip()
        names = first.split(",") if spelling == "csv" else ITEM_FIELDS if is_items else LOG_FIELDS
        columns = match(names, ITEM_COLUMNS if is_items else LOG_COLUMNS, {})
        records = (
            read_items(path, spelling, columns, tally)
            if is_items
            else read_log(path, spelling, columns, tally, {}, (1.0, 5.0))
        )
    else:
        records = parsed(path, parse_item if is_items else parse_review, tally)
    found = sum(1 for _ in records)
    print()
    passed, broken = tally.passed.total(), tally.broken.total()
    print(json.dumps({"read": tally.read, "kept": tally.kept, "passed": passed, "broken": broken}))
    adds_up = tally.read == tally.kept + passed + broken
    if spelling != "sequences" or is_items:  # a line of sequences holds several records
        adds_up = adds_up and found == tally.kept
    data = path.read_bytes() if path.stat().st_size < 1e7 else b""
    if data and spelling != "csv" and data[:2] != b"\x1f\x8b":  # a CSV record may span lines
        adds_up = adds_up and tally.read == data.count(b"\n") + (not data.endswith(b"\n"))
    return 0 if adds_up else 1


def rounds(seconds: float, least: int) -> int:
    """Run all stages again and again; after each round print what this process holds, as JSON.

    Stops after `seconds`, but not before `least` rounds.
    """
    end = time.time() + seconds
    while time.time() < end or least > 0:
        least -= 1
        for verb, module in VERBS.items():
            code = main(module.Config, module.run, f"pagellm {verb}", SMALL[verb].split())
            if code:
                return code
        left = sum(1 for path in Path(".").rglob(".*") if path.name.endswith(".tmp"))
        shutil.rmtree("data")
        shutil.rmtree("runs")
        gc.collect()
        memory = (
            int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
        )
        held = {
            "memory_mb": memory,
            "open_files": len(os.listdir("/proc/self/fd")),
            "threads": len(os.listdir("/proc/self/task")),
            "temporary_files": left + len(os.listdir(".")),
        }
        print("\n" + json.dumps(held), flush=True)
    return 0


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


def run(config: Config) -> list[str]:
    """Run the suites. Returns what broke, one line each."""
    tqdm.monitor_interval = 0  # tqdm's monitor thread could hold a lock at the moment of a fork
    began, wanted = time.time(), config.suites.split(",")
    with tempfile.TemporaryDirectory(prefix="torture-") as folder:
        trials = Trials(Path(folder), config.seed)
        if "kill" in wanted:
            for verb in tqdm(
                [v for v in VERBS for _ in range(config.moments)], "kill", unit="moment"
            ):
                trials.kill(verb)
        if "signal" in wanted:
            both = (signal.SIGTERM, signal.SIGINT)  # by turns, so that one moment each tries both
            half = max(1, config.moments // 2)
            moments = [(v, both[(i + n) % 2]) for i, v in enumerate(VERBS) for n in range(half)]
            for verb, signum in tqdm(moments, "signal", unit="moment"):
                trials.signal(verb, signum)
        if "fault" in wanted:
            trials.faults()
        if "ranks" in wanted:
            trials.ranks()
        if "input" in wanted:
            trials.input(config.inputs)
        if "silent" in wanted:
            trials.silent(config.mutations)
        if "soak" in wanted:
            trials.soak(config.minutes, config.rounds)
    print(f"\n{time.time() - began:.0f} s")
    for what, count in sorted(trials.counts.items()):
        print(f"  {count:>9,}  {what}")
    for failure in trials.failures:
        print(f"  BROKEN  {failure}")
    print("nothing broke" if not trials.failures else f"{len(trials.failures)} broke")
    if trials.failures:
        raise SystemExit(1)
    return trials.failures


if __name__ == "__main__":
    sys.exit(main(Config, run, "experiments.stress.torture"))
