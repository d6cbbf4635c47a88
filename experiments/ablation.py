"""Ablation of the reward (the paper's Table 5), over several seeds.

    make ablation                       python -m experiments.ablation --dataset synthetic --seeds 3

--rows table5   mixed reward, item-only, page-only, without reward: the paper's four rows
--rows pairs    reward models that are fitted without one kind of pair
--rows hits     not in the paper: SFT's loss added to PPO's, and a reward for hits on hidden train
                items beside the learnt one

The same with an item head that knows outcomes, and without hits, which would pay for train items:

    python -m experiments.ablation --ppo "--item_reward outcome --w_hit 0"

Writes runs/<study>/<dataset>-<rows>.parquet and prints it; Markdown and LaTeX with effect sizes lie
in runs/<study>/<dataset>-<rows>/table.{md,tex,parquet}. About six minutes a seed on the synthetic
shop with two cores. Rows already done are not run again.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from experiments.study import COMMON, PAIRS_PPO, Stages, Variant, overrides, publish, study
from pagellm import compose, evaluate, ppo, pretrain, reward, sft
from pagellm.stage.command import main
from pagellm.stage.config import Options, check

__all__ = ["Config", "PAIRS", "TABLE5", "run"]


TABLE5 = [
    Variant("mixed"),
    Variant("item-only", ppo={"w_page": 0.0}),
    Variant("page-only", ppo={"w_token": 0.0}),
    Variant("without reward", policy="sft"),
]
PAIRS = [
    Variant("mixed"),
    Variant("no diversity, redundancy pairs", reward={"kinds": "preference,ranked"}),
    Variant("no ranked pairs", reward={"kinds": "preference,diversity,redundancy"}),
    Variant("no preference pairs", reward={"kinds": "ranked,diversity,redundancy"}),
    Variant("without reward", policy="sft"),
]
KEEP = {"sft_coef": 1.0, "label_share": 0.5}
HITS = [
    Variant("without reward", policy="sft"),
    Variant("mixed"),
    Variant("mixed, SFT's loss", ppo=KEEP),
    Variant("mixed, SFT's loss, hits", ppo=KEEP | {"w_hit": 3.0}),
    Variant("SFT's loss, hits", ppo=KEEP | {"w_hit": 3.0, "w_token": 0.0, "w_page": 0.0}),
]
SETS = {"table5": TABLE5, "pairs": PAIRS, "hits": HITS}
STAGES = {
    "pretrain": pretrain,
    "sft": sft,
    "reward": reward,
    "compose": compose,
    "ppo": ppo,
    "evaluate": evaluate,
}
FIXED = COMMON
START = {"ppo": PAIRS_PPO}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Compare what the parts of the reward contribute, over several seeds."""

    dataset: str = "synthetic"  # name of the data set
    raw: str = ""  # directory of its raw files, if it is not prepared yet
    study: str = "ablation"  # name of the study: results lie in <runs>/<study>
    rows: str = "table5"  # table5 (the paper's four rows), pairs (reward models without one kind of
    # pair) or hits (SFT's loss and hits on hidden train items beside the learnt reward)
    seeds: int = 3  # number of seeds: 0, 1, ...; each trains all stages anew
    preset: str = "auto"  # auto: every stage begins with the data set's preset, if there is one;
    # none: with its defaults
    data: str = "data"  # directory of prepared data sets
    runs: str = "runs"  # directory of runs
    pretrain: Options = Options("")  # options for that stage in every row, as on its command line
    sft: Options = Options("")  # options for sft
    reward: Options = Options("")  # options for reward
    compose: Options = Options("")  # options for compose, which runs where --ppo says
    # "--item_reward outcome": its outcome model then pays the slots
    ppo: Options = Options("")  # options for ppo, e.g. "--epochs 1"
    evaluate: Options = Options("")  # options for evaluate

    def __post_init__(self):
        check(
            self,
            rows=(self.rows in SETS, f"one of {', '.join(SETS)}"),
            seeds=(self.seeds > 0, "1 or more"),
        )


def run(config: Config) -> list[dict]:
    """Train and compare the rows. Returns the records of compare_seeds."""
    options = {
        name: overrides(module, getattr(config, name), FIXED, START.get(name))
        for name, module in STAGES.items()
    }
    stages = Stages(config.data, config.runs, config.raw, config.preset, **options)
    results = study(config.study, config.dataset, SETS[config.rows], range(config.seeds), stages)
    path = Path(config.runs) / config.study / f"{config.dataset}-{config.rows}.parquet"
    return publish(results, path, config.dataset)


if __name__ == "__main__":
    sys.exit(main(Config, run, "experiments.ablation"))
