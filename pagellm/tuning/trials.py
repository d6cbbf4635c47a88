"""Trials of `pagellm tune`: stages run in directories of their own, pages scored on validation.

    bench = Bench(config, shop, plan)
    bench.stage("sft", "sft-1e-4", {"lr": 1e-4})             runs/<run>/tune/sft-1e-4/sft
    scores = bench.policy("sft-1e-4", "sft", "one_shot")     metric -> (U,), always the same users
    added = compared(scores, before)                         paired 95% intervals

A stage of a trial is a stage like any other: it is carried on where it stopped. Scores lie in
files, so that nothing is scored twice.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pagellm import compose, ppo, pretrain, reward, sft
from pagellm.data.shop import Shop
from pagellm.model.composer import Composer
from pagellm.model.networks import from_state
from pagellm.model.policy import Policy, PromptStyle
from pagellm.model.vocab import Vocab
from pagellm.pages.ranked import RankedPages, Scorer, seen_rows
from pagellm.pages.tables import per_user
from pagellm.pages.yardstick import ACCURACY, SHARE, best_of, verdicts
from pagellm.stage import dist, randomness
from pagellm.stage.config import PageLLMError, as_words
from pagellm.stage.files import atomic, read_json, slug, write_json
from pagellm.stage.run import StageConfig, load_model_file

__all__ = ["SHOWN", "STAGES", "Bench", "better", "compared", "copied", "pays", "write_preset"]

STAGES: dict[str, ModuleType] = {
    "pretrain": pretrain,
    "sft": sft,
    "reward": reward,
    "ppo": ppo,
    "compose": compose,
}
SHOWN = (*ACCURACY, "ILD", "energy")  # what is compared


def compared(ours: dict, theirs: dict, seed: int = 0) -> dict[str, dict]:
    """metric -> {difference, low, high, value, verdict} of `verdicts`, for two rows of scores."""
    found = verdicts([ours], {"": [theirs]}, SHOWN, seed)
    return {r["metric"]: {k: v for k, v in r.items() if k not in ("row", "metric")} for r in found}


def pays(added: dict[str, dict], by: tuple[str, ...] = SHOWN) -> bool:
    """Whether a stage is worth having: ahead in one of `by`, and no accuracy lost.

    An accuracy is lost where its mean falls by more than 1%. Its interval does not decide: for some
    hundred users it is wider than that whatever a stage does.
    """
    there = [added[m] for m in ACCURACY if m in added]
    lost = any(row["difference"] < -SHARE * abs(row["value"]) for row in there)
    return not lost and any(added[m]["verdict"] == "ahead" for m in by if m in added)


def better(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> bool:
    """Which of two kinds of pages to take: whether ours are, by `best_of` over SHOWN."""
    turned = {
        name: {m: float(np.nanmean(row[m])) for m in SHOWN if m in row}
        for name, row in (("theirs", theirs), ("ours", ours))
    }
    return best_of(turned, SHOWN)[0] == "ours"


class Bench:
    """What all trials of one run share.

    judged  validation users that candidates are compared on; 0: all
    k       slots of a page
    """

    def __init__(self, config: StageConfig, shop: Shop, judged: int, k: int = 20):
        self.config, self.shop, self.k = config, shop, k
        self.preset = config.stage("preset")
        self.depth = max(100, k)
        self.folder = config.stage("tune")
        self.scorer = Scorer(shop, "valid")
        users = self.scorer.users[shop.csr("train").counts()[self.scorer.users] > 0]
        if len(users) == 0:
            raise PageLLMError(
                f"no user of {config.data_dir} has both train and validation items: nothing to "
                "choose by"
            )
        if 0 < judged < len(users):
            drawn = randomness.rng(config.seed, "tune", "users").permutation(users)
            users = np.sort(drawn[:judged])
        self.users, self.seen = users, seen_rows(shop, "valid", "train")
        self.device = dist.pick_device(config.device)

    def run_of(self, trial: str) -> str:
        """The name of a trial's run."""
        return f"{self.config.run or self.config.dataset}/tune/{trial}"

    def where(self, stage: str, trial: str) -> Path:
        """The directory of a stage of a trial."""
        return self.config.stage(stage, self.run_of(trial))

    def stage(self, stage: str, trial: str, options: Mapping[str, Any], **more: Any) -> Path:
        """Run a stage of a trial; returns its directory. more: what else its `run` takes."""
        c = self.config
        common: dict[str, Any] = {
            "dataset": c.dataset,
            "data": c.data,
            "runs": c.runs,
            "run": self.run_of(trial),
        }
        common |= {"seed": c.seed, "device": c.device, "preset": "none"}
        STAGES[stage].run(STAGES[stage].Config(**common | dict(options)), **more)
        return self.where(stage, trial)

    def lend(self, stage: str, trial: str, to: str) -> None:
        """A trial begins from a stage of another one: its files, hard-linked."""
        copied(self.where(stage, trial), self.where(stage, to))

    def scores(self, name: str, pages: Callable[[], RankedPages]) -> dict[str, np.ndarray]:
        """metric -> (U,) of pages of `users`; read from their file if they have been scored."""
        path = self.folder / "scores" / f"{slug(name)}.parquet"
        if not path.exists():
            found = self.scorer(pages(), self.k)
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic(path) as beside:
                pq.write_table(pa.table(found), beside)
        return per_user(path)

    def pages(self, policy: Policy, mode: str, users: np.ndarray | None = None) -> RankedPages:
        """A policy's pages of the judged users, or of some others."""
        train, when = self.shop.csr("train"), self.shop.moments("valid")
        some = self.users if users is None else users
        return policy.rank(some, train, self.seen, self.k, self.depth, mode, when=when)

    def policy(self, trial: str, stage: str, mode: str) -> dict[str, np.ndarray]:
        """The scores of a trial's policy."""
        where = self.where(stage, trial)
        name = f"{trial}-{stage}-{mode}"
        return self.scores(name, lambda: self.pages(Policy.load(where, self.device), mode))

    def start(self, trial: str, style: PromptStyle, mode: str) -> dict[str, np.ndarray]:
        """The scores of a pre-trained model after page prompts of some style."""
        where = self.where("pretrain", trial)

        def pages() -> RankedPages:
            model = from_state(load_model_file(where / "model.pt")).to(self.device).eval()
            return self.pages(Policy(model, Vocab.load(where), style), mode)

        shown = f"{style.max_history}-{int(style.use_ratings)}{int(style.use_user)}"
        return self.scores(f"{trial}-start-{shown}-{mode}", pages)

    def composed(self, trial: str, policy: Path | None) -> dict[str, np.ndarray]:
        """The scores of a trial's composed pages."""

        def pages() -> RankedPages:
            proposer = None if policy is None else Policy.load(policy, self.device)
            composer = Composer.load(self.where("compose", trial), self.shop, proposer)
            return composer.rank(self.users, self.seen, self.k, self.depth)

        return self.scores(f"{trial}-compose", pages)

    def keep(self, stage: str, trial: str, preset: Path) -> None:
        """A trial's stage becomes the run's own."""
        target = self.config.stage(stage)
        source = self.where(stage, trial)
        if (target / "done").exists():
            if read_json(target / "done")["id"] == read_json(source / "done")["id"]:
                return
            raise PageLLMError(
                f"{target} is there already, made with other options than tune found\n"
                f"  Remove it, or tune under another name: --run another"
            )
        run = {"run": self.config.run, "source_run": "", "reward_run": "", "compose_run": ""}
        run["preset"] = str(preset)
        copied(source, target, run)


def copied(source: Path, target: Path, changed: Mapping[str, str] | None = None) -> None:
    """A finished stage's directory again, all or nothing; files are hard-linked where they can be.

    changed  fields of config.json that the copy has otherwise, where the stage has them
    """
    if (target / "done").exists():
        return
    shutil.rmtree(target, ignore_errors=True)
    beside = target.with_name(f".{target.name}.copy")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    for path in sorted(source.iterdir()):
        if path.name == "lock" or path.is_dir():
            continue
        if path.name == "config.json" and changed:
            record = json.loads(path.read_text())
            record["config"] |= {k: v for k, v in changed.items() if k in record["config"]}
            write_json(beside / path.name, record)
            continue
        try:
            os.link(path, beside / path.name)
        except OSError:
            shutil.copy2(path, beside / path.name)
    os.replace(beside, target)


def write_preset(path: Path, options: Mapping[str, Any], why: str) -> None:
    """A preset's file: one line of options, and why above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as beside:
        beside.write_text(f"# {why}\n{as_words(dict(options))}\n")
