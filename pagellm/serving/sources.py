"""What pages are made from: the data, the policies and the reward model of a run that are there,
and which of a user's rows a prompt shows and a page leaves out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pagellm.data.shop import Rows, Shop
from pagellm.stage.config import PageLLMError, check
from pagellm.stage.run import StageConfig, finished

__all__ = [
    "NEED",
    "POLICIES",
    "SPLITS",
    "Sources",
    "check_policy",
    "known_rows",
    "pick_policy",
    "split_in_words",
]


POLICIES = ("ppo", "sft")  # with the reward, and without it; the first that is there is taken
NEED = {"sft": "SFT policy", "ppo": "PageLLM policy", "reward": "reward model"}
SPLITS = ("none", "test", "valid")


@dataclass(frozen=True, kw_only=True)
class Sources(StageConfig):
    """Where a page's models and data come from."""

    source_run: str = ""  # run whose sft is read; empty: this run (studies share one)
    reward_run: str = ""  # run whose reward model is read; empty: source_run
    split: str = "none"  # rows that are held out. none, for a shop: prompts show every row, and no
    # page holds an item that its user has. test or valid, for research: as evaluate does, prompts
    # show train rows, and the held-out items may be on the page

    def __post_init__(self):
        super().__post_init__()
        check(self, split=(self.split in SPLITS, ", ".join(SPLITS)))

    def where(self, verb: str) -> Path:
        """Directory of sft, ppo or reward."""
        return self.stage(
            verb,
            {"sft": self.source_run, "reward": self.reward_run or self.source_run}.get(verb, ""),
        )

    def policy_there(self, policy: str = "") -> str:
        """`policy`, or if it is empty the first of POLICIES that is finished."""
        return pick_policy(policy, self.where, self.make)

    def policies_there(self) -> tuple[str, ...]:
        """All of POLICIES that are finished, at least one. Raises PageLLMError if none is."""
        found = tuple(name for name in POLICIES if is_done(self.where(name)))
        return found or (self.policy_there(),)

    def reward_there(self) -> bool:
        """Whether rewards can be given; a reward_run that was named must be there."""
        return bool(self.reward_run) or is_done(self.where("reward"))


def is_done(path: Path) -> bool:
    """Whether a stage has finished in this directory."""
    return (path / "done").exists()


def check_policy(policy: str) -> tuple[bool, str]:
    """Whether a Config's policy is one, and what would be: a rule for config.check."""
    return policy in ("", *POLICIES), "ppo, sft, or nothing for what is there"


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


def split_in_words(split: str) -> str:
    """What a split means for prompts and pages, for the screen."""
    return {
        "none": "no rows held out: prompts show all that is known, pages repeat none of it",
        "test": "test rows held out: prompts show train rows, pages may hold test items",
        "valid": "valid rows held out: prompts show train rows, pages may hold valid, test items",
    }[split]
