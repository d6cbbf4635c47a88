"""Study of prompts: what is it worth to tell the network more about a person's history?

    python -m experiments.prompt_study
    python -m experiments.prompt_study --dataset movielens_small --sft "--epochs 4 --lr 1e-4"

All rows of a seed begin at one pre-trained model and make the same number of SFT steps. What a row
says of its prompts holds, whatever --sft says.

    items               the last 24 items that the user liked; the row that others are compared with
    last 6 items        recent ones alone
    user                the user's own token before them
    ratings             the rating after each item
    category, brand, price   in words after each item (sft --show)
    all facts           user, ratings, category, brand and price
    cut by time         as `items`; what comes after a drawn moment is the page (sft --cut time)
    cut by time, time   that, and the period of the page (pretrain --times): compare it with the row
                        above

Facts that the shop does not have are left out. Where so many facts of 24 items do not fit in the
context, a row shows as many items as fit, and says so.

Writes runs/<study>/<dataset>.parquet and prints it; Markdown and LaTeX with effect sizes lie in
runs/<study>/<dataset>/. A minute a row and seed on the synthetic shop. Rows already done are not
run again.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from experiments.study import COMMON, Stages, Variant, overrides, prepared, publish, run_variant
from pagellm import evaluate, pretrain, sft
from pagellm.data.shop import Shop, load
from pagellm.pages.tables import per_user
from pagellm.pages.truth import PageMaker
from pagellm.stage import hints
from pagellm.stage.command import main
from pagellm.stage.config import Options, check
from pagellm.stage.files import slug
from pagellm.tuning.trials import copied

__all__ = ["Config", "rows_of", "run"]

FIRST = "items"  # the row that others are compared with, and begin with
ITEMS = {"use_user": False, "use_ratings": False}
TIME = ITEMS | {"cut": "time"}
STAGES = {"pretrain": pretrain, "sft": sft, "evaluate": evaluate}
FIXED = COMMON


@dataclass(frozen=True, kw_only=True)
class Config:
    """Compare what page prompts say of a person's history, over several seeds."""

    dataset: str = "synthetic"  # name of the data set
    raw: str = ""  # directory of its raw files, if it is not prepared yet
    study: str = "prompts"  # name of the study: results lie in <runs>/<study>
    seeds: int = 3  # number of seeds: 0, 1, ...; each trains all rows anew
    periods: int = 12  # of the row with time tokens
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
            periods=(self.periods > 0, "1 or more"),
        )


def rows_of(shop: Shop) -> dict[str, dict[str, Any]]:
    """Name of a row -> its fields of sft.Config; only of what the shop knows."""
    about = shop.catalogue
    there = {
        "category": any(about.leaf),
        "brand": any(about.brand),
        "price": not np.isnan(about.price).all(),
    }
    facts = [name for name, known in there.items() if known]
    rated = {"use_ratings": True} if shop.rated else {}
    rows: dict[str, dict[str, Any]] = {FIRST: ITEMS, "last 6 items": ITEMS | {"max_history": 6}}
    rows["user"] = ITEMS | {"use_user": True}
    rows |= {"ratings": ITEMS | rated} if rated else {}
    rows |= {name: ITEMS | {"show": name} for name in facts}
    if facts:
        rows["all facts"] = ITEMS | rated | {"use_user": True, "show": ",".join(facts)}
    if len(np.unique(shop.time)) > 1:
        rows |= {"cut by time": TIME, "cut by time, time": TIME}
    return rows


def fitting(config: sft.Config, before: Path, shop: Shop) -> int:
    """Items of history that fit in the context beside a page: config.max_history, or fewer."""
    maker = PageMaker(shop, config.shrink)
    one, two = (
        sft.new_policy(replace(config, max_history=n), before, maker, shop, "cpu") for n in (1, 2)
    )
    page = max(config.k, min(max(1, int(maker.train.counts().max())), config.max_page))
    each = two.prompts.page_room - one.prompts.page_room
    left = one.model.shape.n_ctx - page - one.prompts.page_room
    return min(config.max_history, 1 + left // each)


def one(config: Config, options: dict, name: str, fields: dict, seed: int, shop: Shop) -> Path:
    """Run the stages of a row that are missing; returns its per_user.parquet."""
    runs, study = Path(config.runs), f"{config.study}/{slug(name)}"
    each: dict[str, Any] = options | {"sft": options["sft"] | fields}
    if name.endswith(", time"):
        each["pretrain"] = options["pretrain"] | {"times": config.periods}
    elif name != FIRST:  # all of these begin at one pre-trained model
        run = f"{study}/{config.dataset}-s{seed}"
        begin = runs / config.study / FIRST / f"{config.dataset}-s{seed}" / "pretrain"
        copied(begin, runs / run / "pretrain", {"run": run})
        wanted = sft.Config(dataset=config.dataset, data=config.data, **each["sft"])
        if (fits := fitting(wanted, begin, shop)) < wanted.max_history:
            print(f"{name}: the context has room for {hints.counted(fits, 'item')} of history")
            each["sft"] |= {"max_history": fits}
    stages = Stages(config.data, config.runs, config.raw, config.preset, **each)
    return run_variant(study, config.dataset, Variant(name, policy="sft"), seed, stages)


def run(config: Config) -> list[dict]:
    """Train and compare the rows. Returns the records of compare_seeds."""
    options = {
        name: overrides(module, getattr(config, name), FIXED) for name, module in STAGES.items()
    }
    prepared(config.dataset, config.raw, config.data, config.preset)
    shop = load(Path(config.data) / config.dataset)
    rows = rows_of(shop)
    results = {
        name: [
            per_user(one(config, options, name, row, seed, shop)) for seed in range(config.seeds)
        ]
        for name, row in rows.items()
    }
    path = Path(config.runs) / config.study / f"{config.dataset}.parquet"
    return publish(results, path, config.dataset)


if __name__ == "__main__":
    sys.exit(main(Config, run, "experiments.prompt_study"))
