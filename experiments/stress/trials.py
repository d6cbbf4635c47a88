"""The bench of the stress tests: all stages on a tiny shop, and trials compared with them.

trials = Trials(Path(folder), seed=0)
folder = trials.trial("sft")                    what lies before SFT, in a new directory
trials.carry_on(folder, "sft", "after a kill")  runs it, expects the bytes of an undisturbed run
trials.failures
"""

import hashlib
import json
import random
import shutil
from collections import Counter
from pathlib import Path

from experiments.stress.children import Outcome, forked
from pagellm import evaluate, ppo, pretrain, reward, sft
from pagellm.data import prepare
from pagellm.stage.command import main

__all__ = ["SMALL", "VERBS", "Trials", "merged", "snapshot"]


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
