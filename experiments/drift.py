"""Drift (the paper's limitations): a shop changes; train on the past, score on what came after.

    make drift                              python -m experiments.drift --dataset synthetic
    make drift DATASET=instruments RAW=...  python -m experiments.drift --planted

Each user's latest tenth is the test split, and the tenth before it validation, in
<data>/temporal/<dataset>. Rows:

    popularity                  of the train rows
    recent popularity           of the latest `--recent` share of the train rows
    random cuts                 SFT by default: histories and pages mix past and future
    time cuts                   SFT whose page comes after its history (--cut time)
    time cuts, token            the same, and a token in the prompt shows which of `times` periods
                                it is (pretrain --times)
    ... token, told the first   the same policy, but the prompt shows the first period: does the
                                policy use the token?

SFT and popularity are also scored on the same users under the paper's random split, to show what
that split hides. --planted gives the synthetic shop's rows other times, so that a fashion moves
through the departments for everybody. Then time carries information; in the plain synthetic shop it
does not.

Writes data/temporal/<dataset>[-planted]/, runs/<study>/...,
runs/<study>/<dataset>[-planted].parquet. About two and a half minutes a seed for the synthetic shop
on two idle cores.
"""

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from experiments.study import overrides
from pagellm import pretrain, sft
from pagellm.data import prepare
from pagellm.data.filters import split_by_time, tie_ranks
from pagellm.data.shop import Shop, load
from pagellm.model.policy import Policy
from pagellm.pages.ranked import (
    RankedPages,
    Scorer,
    check_pages,
    popularity_pages,
    rank_all,
    seen_rows,
)
from pagellm.pages.stats import difference
from pagellm.pages.tables import compare, markdown, write_table
from pagellm.stage import randomness
from pagellm.stage.command import main
from pagellm.stage.config import Options, PageLLMError, check
from pagellm.stage.files import atomic
from pagellm.stage.run import file_id

__all__ = ["Config", "plant", "recent_pages", "run"]


SHOWN = ("Recall@20", "Recall@40", "NDCG@100")
MASK, K, DEPTH = "train+valid", 20, 100
FIXED = {"dataset", "run", "data", "runs", "seed", "source_run", "times", "cut", "raw", "split"}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Compare random and temporal splits, and prompts with and without a token for the time."""

    dataset: str = "synthetic"  # name of the data set; its rows need times
    raw: str = ""  # directory of its raw files
    planted: bool = False  # synthetic shop only: plant a fashion that moves through the departments
    study: str = "drift"  # name of the study: results lie in <runs>/<study>
    seeds: int = 3  # number of seeds: 0, 1, ...; each trains anew
    times: int = 8  # number of periods that the time token distinguishes, with about equally many
    # train rows each
    recent: float = 0.2  # share of the train rows that recent popularity counts: the latest
    preset: str = "auto"  # auto: every stage begins with the data set's preset, if there is one;
    # none: with its defaults
    data: str = "data"  # directory of prepared data sets
    runs: str = "runs"  # directory of runs
    prepare: Options = Options("")  # options for prepare, which splits by time
    pretrain: Options = Options("--steps 160")  # options for that stage in every row, as on its
    # command line
    sft: Options = Options("--epochs 10")  # options for sft

    def __post_init__(self):
        check(
            self,
            seeds=(self.seeds > 0, "1 or more"),
            times=(self.times > 1, "2 or more"),
            recent=(0 < self.recent <= 1, "above 0, at most 1"),
            planted=(
                not self.planted or self.dataset == "synthetic",
                "for the synthetic shop only",
            ),
        )


def plant(source: Path, target: Path, seed: int, passes: int = 2, noise: float = 0.1) -> None:
    """Copy a prepared data set with other times, so that a fashion moves through the departments.

    The fashion is the same for everybody and passes through all departments `passes` times. A row's
    time is that of its department in a random pass, plus noise (in units of a pass). Rows are split
    by the new times. Does nothing if the copy exists; raises PageLLMError if there is another.
    """
    record = {
        "from": file_id(source / "interactions.parquet"),
        "seed": seed,
        "passes": passes,
        "noise": noise,
    }
    if (target / "source.json").exists():
        if json.loads((target / "source.json").read_text()).get("planted") != record:
            raise PageLLMError(f"{target} was planted differently\n  Remove it to make it anew.")
        return
    shop, rng = load(source), randomness.rng(seed, "drift")
    top = np.array([names[0] if names else "" for names in shop.catalogue.categories])
    names = np.unique(top)
    phase = rng.permutation(len(names))[np.searchsorted(names, top)] / len(names)
    fashion = (
        rng.integers(passes, size=len(shop.item))
        + phase[shop.item]
        + noise * rng.standard_normal(len(shop.item))
    ) / passes
    days = np.rint(np.clip(fashion, 0, 1) * (shop.time.max() - shop.time.min()) / 86400).astype(
        np.int64
    )
    time = shop.time.min() + 86400 * days
    ids = shop.user_ids, shop.catalogue.ids
    tie = tie_ranks(seed, shop.user, shop.item, time, *ids)
    resort = np.lexsort((tie, time, shop.user))
    item, rating, positive, time, tie = (
        x[resort] for x in (shop.item, shop.rating, shop.positive, time, tie)
    )
    split = split_by_time(shop.user, tie, time, positive, False)
    kinds = np.array(["train", "valid", "test", "unused"], dtype=object)[split]
    with prepare.building(target) as folder:
        for path in source.iterdir():
            shutil.copyfile(path, folder / path.name)
        pq.write_table(
            pa.table(
                {
                    "user": shop.user.astype(np.int32),
                    "item": item.astype(np.int32),
                    "rating": pa.array(rating, mask=np.isnan(rating)),
                    "time": time,
                    "positive": positive,
                    "split": pa.array(kinds.tolist(), pa.string()).dictionary_encode(),
                }
            ),
            folder / "interactions.parquet",
            compression="zstd",
        )
        if (folder / "reviews.parquet").exists():  # remove the text of rows that are now held out
            reviews = pq.read_table(folder / "reviews.parquet")
            held = (shop.user * shop.n_items + item)[kinds != "train"]
            code = (
                reviews["user"].to_numpy().astype(np.int64) * shop.n_items
                + reviews["item"].to_numpy()
            )
            pq.write_table(
                reviews.filter(pa.array(~np.isin(code, held))),
                folder / "reviews.parquet",
                compression="zstd",
            )
        written = {
            path.name: file_id(path)
            for path in sorted(folder.iterdir())
            if path.name != "source.json"
        }
        about = json.loads((source / "source.json").read_text()) | {
            "planted": record,
            "written": written,
        }
        (folder / "source.json").write_text(json.dumps(about, indent=1, sort_keys=True) + "\n")


def recent_pages(shop: Shop, users: np.ndarray, seen, share: float, seed: int = 0) -> RankedPages:
    """Pages of the items bought most often in the latest `share` of the train rows.

    Rows of one moment count all or none: in the order of rows, some users' would count alone.
    """
    rows = np.flatnonzero(shop.rows("train"))
    since = np.sort(shop.time[rows])[-max(1, round(share * len(rows)))]
    late = rows[shop.time[rows] >= since]
    count = torch.from_numpy(np.bincount(shop.item[late], minlength=shop.n_items)).float()
    return rank_all(lambda some: count.expand(len(some), -1), users, seen, K, DEPTH, seed)


def trained(
    config: Config,
    data: str,
    dataset: str,
    name: str,
    seed: int,
    times: int = 0,
    cut: str = "random",
) -> Policy:
    """Run pretrain and sft of one row, unless they are done. Returns SFT's policy."""
    common: dict[str, Any] = {
        "dataset": dataset,
        "run": f"{config.study}/{dataset}-{name}-s{seed}",
        "seed": seed,
        "data": data,
        "runs": config.runs,
    }
    pretrain.run(pretrain.Config(**common, times=times, **overrides(pretrain, config.pretrain)))
    made = sft.Config(**common, cut=cut, **overrides(sft, config.sft))
    sft.run(made)
    return Policy.load(made.stage("sft"))


def scored(
    shop: Shop, policy: Policy | None, seed: int, recent: float = 0.0, first: bool = False
) -> dict[str, np.ndarray]:
    """Per-user scores of a policy for all users of the shop; NaN for users without test rows.

    policy  None: popularity
    first   tell the policy that every page is shown in the first period
    recent  share of the rows that popularity counts, as in recent_pages; 0: all
    """
    scorer, seen = Scorer(shop, "test"), seen_rows(shop, "test", MASK)
    when = np.full(shop.n_users, shop.time.min()) if first else shop.moments("test")
    if policy is not None:
        ranked = policy.rank(scorer.users, shop.csr("train"), seen, K, DEPTH, when=when)
    elif recent:
        ranked = recent_pages(shop, scorer.users, seen, recent, seed)
    else:
        ranked = popularity_pages(shop, scorer.users, seen, K, DEPTH, seed)
    check_pages("drift", ranked, scorer.users, seen)
    out = {}
    for name, values in scorer(ranked, K).items():
        out[name] = np.full(shop.n_users, np.nan)
        out[name][scorer.users] = values
    return out


def run(config: Config) -> list[dict]:
    for stage, module in (("prepare", prepare), ("pretrain", pretrain), ("sft", sft)):
        overrides(module, getattr(config, stage), FIXED)
    later, name = str(Path(config.data) / "temporal"), config.dataset
    for folder, split in ((config.data, "random"), (later, "temporal")):
        if not (Path(folder) / config.dataset / "source.json").exists():
            prepare.run(
                prepare.Config(
                    dataset=config.dataset,
                    raw=config.raw,
                    data=folder,
                    split=split,
                    **overrides(prepare, config.prepare),
                )
            )
    if config.planted:
        name = f"{config.dataset}-planted"
        plant(Path(later) / config.dataset, Path(later) / name, 0)
    shop, mixed = load(Path(later) / name), load(Path(config.data) / config.dataset)
    if not shop.time.any() or len(np.unique(shop.time[shop.rows("train")])) < config.times:
        raise PageLLMError(
            f"{shop.path}: the rows have no times, or fewer than {config.times} moments: nothing "
            "to show"
        )
    if shop.user_ids != mixed.user_ids:
        raise PageLLMError(
            f"{shop.path} and {mixed.path} have other users\n  Remove both to prepare them anew."
        )
    results: dict[str, list[dict]] = {}
    splits: dict[str, list[dict]] = {}
    for seed in range(config.seeds):
        plain = trained(config, later, name, "random", seed)
        cuts = trained(config, later, name, "cuts", seed, cut="time")
        token = trained(config, later, name, "token", seed, config.times, "time")
        for row, scores in {
            "time cuts": scored(shop, cuts, seed),
            "time cuts, token": scored(shop, token, seed),
            "time cuts, token, told the first": scored(shop, token, seed, first=True),
            "random cuts": scored(shop, plain, seed),
            "popularity": scored(shop, None, seed),
            "recent popularity": scored(shop, None, seed, config.recent),
        }.items():
            results.setdefault(row, []).append(scores)
        if not config.planted:
            own = trained(config, config.data, config.dataset, "paper", seed)
            for row, scores in {
                "SFT": scored(mixed, own, seed),
                "popularity": scored(mixed, None, seed),
            }.items():
                splits.setdefault(row, []).append(scores)
    records = compare(results, SHOWN, "time cuts")
    lines = [
        f"{name}, temporal split, {config.seeds} seeds, {config.times} periods; mean, and the "
        "difference to time cuts with its 95% interval (bootstrap over seeds and users)\n\n"
        f"{markdown(records)}"
    ]
    for row, seeds in splits.items():
        cells = []
        for metric in SHOWN:
            a = [s[metric] for s in results["random cuts" if row == "SFT" else row]]
            b = [s[metric] for s in seeds]
            mean, low, high = difference(a, b)
            before, after = (np.mean([np.nanmean(x) for x in side]) for side in (b, a))
            cells.append(
                f"{metric} {before:.4f} → {after:.4f} ({mean:+.4f} [{low:+.4f}, {high:+.4f}])"
            )
        lines.append(f"{row}, random split → temporal split: {', '.join(cells)}")
    path = Path(config.runs) / config.study / f"{name}.parquet"
    write_table(path, records)
    with atomic(path.with_suffix(".md")) as beside:
        beside.write_text("\n\n".join(lines) + "\n")
    print("\n\n".join([*lines, str(path)]))
    return records


if __name__ == "__main__":
    sys.exit(main(Config, run, "experiments.drift"))
