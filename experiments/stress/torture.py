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

import gc
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from experiments.stress import silent
from experiments.stress.children import (
    Outcome,
    children_of,
    die_after,
    die_at,
    die_where,
    forked,
    limited_files,
    little_memory,
    nobody,
    small_disk,
    watchers,
)
from experiments.stress.malformed import every_input
from experiments.stress.trials import SMALL, VERBS, Trials, merged
from pagellm import sft
from pagellm.stage.command import main
from pagellm.stage.config import check

__all__ = ["Config", "Suites", "run"]


SUITES = ("kill", "signal", "fault", "ranks", "input", "silent", "soak")


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


def steps_of(stage: Path) -> list[dict]:
    """Lines of a stage's log, without the validation before the first step."""
    rows = [json.loads(line) for line in (stage / "log.jsonl").read_text().splitlines()]
    return [row for row in rows if row["step"] > 0]


class Suites(Trials):
    """What is done to the stages, and must not hurt them."""

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

    def signal(self, verb: str, signum: int, tries: int = 3) -> None:
        """Stop the stage at a random moment, and resume it.

        The machine may be faster or slower than when the whole stage was timed: a moment at which
        nothing was there to stop is followed by another one, later or earlier.
        """
        low, high = 0.05, max(0.1, self.whole[verb].seconds)
        for _ in range(tries):
            after = self.random.uniform(low, high)
            ended = self.signalled(verb, signum, after)
            if ended.code == 0:
                high = after
            elif ended.code == -signum:
                low = after
            else:
                return

    def signalled(self, verb: str, signum: int, after: float) -> Outcome:
        """The stage as it ended, stopped after some seconds; it is resumed."""
        folder = self.trial(verb)
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
        return ended

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

    def silent(self, mutations: int) -> None:
        """Change clean shops; every kind of change comes about as often as any other."""
        shops, kinds = silent.Shops(self.root / "silent"), list(silent.MUTATIONS)
        for n in tqdm(range(mutations), "silent", unit="mutation"):
            name = kinds[n % len(kinds)]
            ended, said = shops.trial(self.random, name)
            self.counts[f"silent faults: {ended}"] += 1
            self.expect(ended != "silent", f"{name.replace('_', ' ')}: not a word of it\n{said}")
        self.counts["silent faults: kinds"] = min(mutations, len(kinds))


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


def run(config: Config) -> list[str]:
    """Run the suites. Returns what broke, one line each."""
    tqdm.monitor_interval = 0  # tqdm's monitor thread could hold a lock at the moment of a fork
    began, wanted = time.time(), config.suites.split(",")
    with tempfile.TemporaryDirectory(prefix="torture-") as folder:
        trials = Suites(Path(folder), config.seed)
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
            every_input(trials, config.inputs)
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
