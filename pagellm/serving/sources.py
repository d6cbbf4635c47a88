"""What pages are made from: the data, the policies and the reward model of a run that are there,
and which of a user's rows a prompt shows and a page leaves out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pagellm.data.shop import Rows, Shop
from pagellm.model.choice import recorded_mode
from pagellm.model.composer import Maker
from pagellm.pages.variety import KINDS
from pagellm.pages.yardstick import best_of, said_of_best
from pagellm.stage.config import PageLLMError, check
from pagellm.stage.files import read_json
from pagellm.stage.run import StageConfig, file_id, finished

__all__ = [
    "Default",
    "NEED",
    "PLAIN",
    "POLICIES",
    "SPLITS",
    "Sources",
    "WRITERS",
    "check_policy",
    "check_variety",
    "check_writer",
    "known_rows",
    "pick_policy",
    "split_in_words",
]


POLICIES = ("ppo", "sft")  # networks with the reward, and without it
WRITERS = ("compose", *POLICIES)  # what writes pages; where validation says nothing, the first one
PLAIN = "plain"  # ALS with facts and MMR, which comes with composed pages, to compare with
NEED = {
    "sft": "SFT policy",
    "ppo": "PageLLM policy",
    "reward": "reward model",
    "compose": "composed pages",
}
SPLITS = ("none", "test", "valid")


@dataclass(frozen=True, kw_only=True)
class Sources(StageConfig):
    """Where a page's models and data come from."""

    dataset: str = "synthetic"  # name of the data set: its prepared data are in <data>/<dataset>;
    # auto: the data that the run was made from, so that a link to a run leads to its data too
    source_run: str = ""  # run whose sft is read; empty: this run (studies share one)
    reward_run: str = ""  # run whose reward model is read; empty: source_run
    split: str = "none"  # rows that are held out. none, for a shop: prompts show every row, and no
    # page holds an item that its user has. test or valid, for research: as evaluate does, prompts
    # show train rows, and the held-out items may be on the page

    def __post_init__(self):
        super().__post_init__()
        check(
            self,
            split=(self.split in SPLITS, ", ".join(SPLITS)),
            run=(bool(self.run) or self.dataset != "auto", "a run, for dataset=auto"),
        )

    @property
    def data_dir(self) -> Path:
        """Directory of the prepared data set."""
        if self.dataset != "auto":
            return super().data_dir
        for name in WRITERS:
            made = self.where(name) / "config.json"
            if made.exists():
                config = read_json(made)["config"]
                return Path(config["data"]) / config["dataset"]
        raise PageLLMError(
            f"{self.stage('')} has no policy, so nothing says which data it was made from\n"
            f"  Name them with --dataset, or see the runs that are there: pagellm runs"
        )

    def where(self, verb: str) -> Path:
        """Directory of sft, ppo, compose or reward."""
        return self.stage(
            verb,
            {"sft": self.source_run, "reward": self.reward_run or self.source_run}.get(verb, ""),
        )

    def make(self, target: str, run: str = "") -> str:
        """The command that makes a stage, in the run where it is looked for."""
        return super().make(target, run or self.where(target).parent.name)

    def proposer(self, policy: str, run: str) -> Path:
        """Directory of the policy that composed pages were made with."""
        return self.stage(policy, run or (self.source_run if policy == "sft" else ""))

    def policy_there(self, policy: str = "") -> str:
        """`policy`, or if it is empty the first of POLICIES that is finished."""
        return pick_policy(policy, self.where, self.make)

    def stale(self) -> list[str]:
        """Inputs of the composed pages that have changed since; [] too if there are none."""
        if not is_done(self.where("compose")):
            return []
        if "unit" not in read_json(self.where("compose") / "done"):
            return ["version of this library"]
        data = file_id(self.data_dir / "source.json")
        return Maker.of(self.where("compose"), "").stale(self.proposer, data)

    def policies_there(self) -> tuple[str, ...]:
        """All of WRITERS that are finished, at least one. Raises PageLLMError if none is.

        Composed pages whose policy or data have been made anew since are left out.
        """
        found = tuple(name for name in WRITERS if is_done(self.where(name)))
        if "compose" in found and self.stale():
            found = tuple(name for name in found if name != "compose")
        return found or (self.policy_there(),)

    def default(self, policy: str = "") -> "Default":
        """The policy named; empty: the best on validation of those there."""
        if policy:
            return Default(policy, "asked for", {})
        there, left = self.policies_there(), ""
        if gone := self.stale():
            left = f"; composed pages are left out: made from another {' and '.join(gone)}"
        found = {}
        for name in there:
            done = read_json(self.where(name) / "done")
            found[name] = done.get("valid") or done.get("decoding", {}).get("valid")
        known = {name: row for name, row in found.items() if row}
        users = {(row["who"], row["k"]) for row in known.values()}
        if len(there) == 1:
            return Default(there[0], "the only one there" + left, {})
        if len(known) < len(there) or len(users) > 1:
            lacking = [name for name in there if name not in known] or list(there)
            why = f"validation does not compare them ({', '.join(lacking)} made otherwise)"
            return Default(there[0], f"first of {', '.join(there)}: {why}{left}", {})
        name, worst = best_of({name: row["means"] for name, row in known.items()})
        return Default(name, said_of_best(name, worst) + left, worst)

    def mode_of(self, policy: str) -> str:
        """The mode of decoding that validation chose for sft or ppo; greedy where none was."""
        return recorded_mode(self.where(policy))

    def reward_there(self) -> bool:
        """Whether rewards can be given; a reward_run that was named must be there."""
        return bool(self.reward_run) or is_done(self.where("reward"))


class Default(NamedTuple):
    """The policy that writes where none is named.

    why     in words        worst  name -> worst relative difference to another on validation
    """

    policy: str
    why: str
    worst: dict[str, float]


def is_done(path: Path) -> bool:
    """Whether a stage has finished in this directory."""
    return (path / "done").exists()


def check_policy(policy: str) -> tuple[bool, str]:
    """A rule for config.check: whether a Config's policy is known, and which are."""
    return policy in ("", *POLICIES), "ppo, sft, or nothing for what is there"


def check_writer(policy: str) -> tuple[bool, str]:
    """The same rule for everything that writes pages: composed pages and the plain row too."""
    allowed = (*WRITERS, PLAIN)
    return policy in ("", *allowed), f"{', '.join(allowed)}, or nothing for validation's choice"


def check_variety(variety: str, strength: float) -> dict[str, tuple[bool, str]]:
    """Rules for config.check: the options variety and strength."""
    return {
        "variety": (variety in KINDS, ", ".join(KINDS)),
        "strength": (0 <= strength < np.inf, "0 or more"),
    }


def pick_policy(policy: str, where: Callable[[str], Path], make: Callable[[str], str]) -> str:
    """`policy`; if it is empty, the first of POLICIES that is finished.

    where  policy -> its directory        make  policy -> the command that makes it
    Raises PageLLMError, which says how to make SFT's, if there is none.
    """
    if policy:
        return policy
    for name in POLICIES:
        if is_done(where(name)):
            return name
    finished(where("sft"), NEED["sft"], make("sft"))
    raise PageLLMError(f"{where('sft')} has just been finished; try again")


def known_rows(shop: Shop, split: str) -> tuple[Rows, Rows, Rows]:
    """history, met, held of every user, for a split of SPLITS.

    history  liked items that prompts show
    met      items that no page holds, whatever their ratings
    held     items held out: what the user liked later, which neither prompt nor page is told
    """
    if split == "none":
        nothing = Rows(
            np.zeros(shop.n_users + 1, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32)
        )
        return shop.csr(None), shop.csr(None, positive=None), nothing
    met = ("train", "valid") if split == "test" else "train"
    return shop.csr("train"), shop.csr(met, positive=None), shop.csr(split)


def split_in_words(split: str, seen: str = "hide") -> str:
    """What a split and the filter `seen` mean for prompts and pages, for the screen."""
    again = "none of it" if seen == "hide" else "what was liked"
    return {
        "none": f"no rows held out: prompts show all that is known, pages repeat {again}",
        "test": "test rows held out: prompts show train rows, pages may hold test items",
        "valid": "valid rows held out: prompts show train rows, pages may hold valid, test items",
    }[split]
