"""Does meta-information pre-training pay? Steps of Eq. 2 and Eq. 3 before SFT, against none.

    python -m experiments.pretraining --dataset instruments --seeds 3

All rows begin with the same factors, those of the data set's preset, and have the same SFT:

    no steps        SFT begins with the factors
    gentle          steps of pre-training at a small rate, rows at a part of it
    frozen rows     the same steps, but user and item rows stay at their factors: only the trunk and
                    the words learn
    items alone     as gentle, but what is read is what the catalogue says; no purchases, no ratings

Writes runs/<study>/..., runs/<study>/<dataset>.{parquet,md}. Stages that are done are not run
again.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.study import COMMON, Stages, Variant, overrides, prepared, run_variant
from pagellm import evaluate, pretrain, sft
from pagellm.pages.tables import compare_seeds, markdown, per_user, write_table
from pagellm.stage.command import main
from pagellm.stage.config import Options, check
from pagellm.stage.files import atomic, slug

__all__ = ["ARMS", "Config", "run"]


ARMS = ("no steps", "gentle", "frozen rows", "items alone")
SHOWN = ("Recall@20", "Recall@40", "NDCG@100", "ILD")
FIXED = COMMON


@dataclass(frozen=True, kw_only=True)
class Config:
    """What steps of pre-training add to pages after SFT."""

    dataset: str = "instruments"  # name of the data set
    raw: str = ""  # directory of its raw files, if it is not prepared yet
    study: str = "pretraining"  # name of the study: results lie in <runs>/<study>
    seeds: int = 3  # number of seeds: 0, 1, ...
    arms: str = ",".join(ARMS)  # rows, comma-separated; the first is what others are compared with
    steps: int = 120  # steps of pre-training in all rows but `no steps`
    lr: float = 5e-4  # their learning rate
    row_lr: float = 0.05  # learning rate of rows as a share of it
    preset: str = "auto"  # auto: every stage begins with the data set's preset, if there is one;
    # none: with its defaults
    data: str = "data"  # directory of prepared data sets
    runs: str = "runs"  # directory of runs
    pretrain: Options = Options("")  # options for that stage in every row, as on its command line
    sft: Options = Options("")  # options for sft
    evaluate: Options = Options("")  # options for evaluate

    def __post_init__(self):
        check(
            self,
            seeds=(self.seeds > 0, "1 or more"),
            steps=(self.steps > 0, "1 or more"),
            lr=(self.lr > 0, "above 0"),
            row_lr=(self.row_lr > 0, "above 0"),
            arms=(set(self.arms.split(",")) <= set(ARMS), f"some of {', '.join(ARMS)}"),
        )

    def options(self, arm: str) -> dict:
        """What this row changes in pretrain."""
        if arm == "no steps":
            return {"steps": 0}
        changed = {"steps": self.steps, "lr": self.lr, "row_lr": self.row_lr}
        if arm == "frozen rows":
            changed["row_lr"] = 1e-9
        if arm == "items alone":
            changed |= {"interaction": 0.0, "first_order": 0.0, "rating": 0.0}
        return changed


def run(config: Config) -> list[dict]:
    """Train and score every row and seed, print the table, return its records."""
    options = {
        name: overrides(module, getattr(config, name), FIXED)
        for name, module in (("pretrain", pretrain), ("sft", sft), ("evaluate", evaluate))
    }
    prepared(config.dataset, config.raw, config.data, config.preset)
    results: dict[str, list] = {arm: [] for arm in config.arms.split(",")}
    for seed in range(config.seeds):
        for arm, scores in results.items():
            each: dict[str, Any] = options | {"pretrain": options["pretrain"] | config.options(arm)}
            stages = Stages(config.data, config.runs, config.raw, **each)
            name = f"{config.study}/{slug(arm)}"
            path = run_variant(name, config.dataset, Variant(arm, policy="sft"), seed, stages)
            scores.append(per_user(path))
    records = compare_seeds(results, SHOWN)
    path = Path(config.runs) / config.study / f"{config.dataset}.parquet"
    write_table(path, records)
    text = (
        f"{config.dataset}, {config.seeds} seeds, {config.steps} steps; mean, and the difference "
        f"to {next(iter(results))} with its 95% interval (bootstrap over seeds and users)\n\n"
        f"{markdown(records)}\n"
    )
    with atomic(path.with_suffix(".md")) as beside:
        beside.write_text(text)
    print(text)
    return records


if __name__ == "__main__":
    sys.exit(main(Config, run, "experiments.pretraining"))
