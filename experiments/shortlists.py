"""What PPO over shortlists, instead of all items, costs in quality, over several seeds.

    python -m experiments.shortlists --dataset synthetic --candidates 100 --seeds 3

    all items                 pages are drawn from the whole catalogue, the log-probabilities too
    100 of a user             --candidates 100: a shortlist of each user, fixed before each rollout
    100 of a user, lazy rows  and rows move only in the steps that read them
    without reward            the policy of SFT

The pages that are scored are written from the whole catalogue in every row. Writes
runs/<study>/<dataset>-<candidates>.parquet and prints it; Markdown and LaTeX with effect sizes lie
beside it. Four minutes a seed on the synthetic shop. Rows already done are not run again.
--pretrain, --sft, --reward and --ppo take options of those stages.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from experiments.study import COMMON, PAIRS_PPO, Stages, Variant, overrides, publish, study
from pagellm import ppo, pretrain, reward, sft
from pagellm.stage.command import main
from pagellm.stage.config import Options, check

__all__ = ["Config", "run"]


STAGES = {"pretrain": pretrain, "sft": sft, "reward": reward, "ppo": ppo}
FIXED = COMMON | {"reward_run", "candidates"}
START = {"ppo": PAIRS_PPO}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Does PPO learn from shortlists what it learns from the whole catalogue?"""

    dataset: str = "synthetic"  # name of the data set
    raw: str = ""  # directory of its raw files, if it is not prepared yet
    study: str = "shortlists"  # name of the study: results lie in <runs>/<study>
    candidates: int = 100  # items of a user's shortlist
    seeds: int = 3  # number of seeds: 0, 1, ...; each trains all stages anew
    preset: str = "auto"  # auto: every stage begins with the data set's preset, if there is one;
    # none: with its defaults
    data: str = "data"  # directory of prepared data sets
    runs: str = "runs"  # directory of runs
    pretrain: Options = Options("")  # options for that stage in every row, as on its command line
    sft: Options = Options("")  # options for sft
    reward: Options = Options("")  # options for reward
    ppo: Options = Options("")  # options for ppo, e.g. "--epochs 1"

    def __post_init__(self):
        check(
            self,
            seeds=(self.seeds > 0, "1 or more"),
            candidates=(self.candidates >= 4, "4 or more"),
        )


def run(config: Config) -> list[dict]:
    """Train and compare the rows. Returns the records of compare_seeds."""
    options = {
        name: overrides(module, getattr(config, name), FIXED, START.get(name))
        for name, module in STAGES.items()
    }
    few = {"candidates": config.candidates}
    rows = [
        Variant("all items"),
        Variant(f"{config.candidates} of a user", ppo=few),
        Variant(f"{config.candidates} of a user, lazy rows", ppo=few | {"lazy_rows": True}),
        Variant("without reward", policy="sft"),
    ]
    stages = Stages(config.data, config.runs, config.raw, config.preset, **options)
    results = study(config.study, config.dataset, rows, range(config.seeds), stages)
    path = Path(config.runs) / config.study / f"{config.dataset}-{config.candidates}.parquet"
    return publish(results, path, config.dataset)


if __name__ == "__main__":
    sys.exit(main(Config, run, "experiments.shortlists"))
