"""Bought again: pages that may repeat what a household has, on the next week of a grocery.

    make repeats DATASET=complete_journey RAW=path/to/files      python -m experiments.repeats

A year of orders is cut at a day. Composed pages of plain models (`fit`, stage compose, --policy
none) are made from what lies before it, and scored on everything that each household bought in the
week after it, for the first time or again. Rows:

    most often          the household's own items, those bought on the most days first; then the
                        shop's
    hide                the default: no page holds what the household has
    allow               `recommend --seen allow`
    allow, --repeat     the same, on data that were prepared with `--repeat`: an item's rating says
                        how often it was bought
    hide, --repeat      what --repeat does without it

For each row: Recall@20 and NDCG@20 over all items of the week, and Recall@20 over those that were
bought again and those that were new to the household, with 95% bootstrap intervals over households
and the paired difference to "allow". Writes <data>/repeats, <runs>/<study>, and the table
<runs>/<study>/<dataset>.parquet.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

import pagellm
from pagellm.pages import stats
from pagellm.pages.tables import write_table
from pagellm.serving.filters import SEEN
from pagellm.stage.command import main
from pagellm.stage.config import PageLLMError, check

__all__ = ["Config", "Log", "run", "scores"]

K, WEEK = 20, 7
VERSUS = "allow"
METRICS = ("Recall@20", "NDCG@20", "Recall@20, again", "Recall@20, new")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Pages that may repeat what a household has, scored on the week after them."""

    dataset: str = "complete_journey"  # complete_journey alone
    raw: str = ""  # directory of its files; empty: data/raw/<dataset>
    study: str = "repeats"  # name of the study: results lie in <runs>/<study>
    data: str = "data"  # directory of prepared data sets
    runs: str = "runs"  # directory of runs
    users: int = 800  # households drawn at random
    least: int = 30  # rows that an item has at least among them before the cut
    day: str = "2017-10-02"  # the cut
    seed: int = 0  # of the draw and of every stage

    def __post_init__(self):
        check(
            self,
            dataset=(self.dataset == "complete_journey", "complete_journey"),
            users=(self.users > 0, "1 or more"),
            least=(self.least > 0, "1 or more"),
        )


@dataclass(frozen=True)
class Log:
    """Purchases: user, item (R,) text, day (R,) int, days since 1970."""

    user: np.ndarray
    item: np.ndarray
    day: np.ndarray

    def some(self, keep: np.ndarray) -> "Log":
        return Log(self.user[keep], self.item[keep], self.day[keep])


def read(config: Config) -> tuple[Log, Log, pa.Table]:
    """Purchases before the cut and in the week after it, and the item table."""
    folder = Path(config.raw or Path("data") / "raw" / config.dataset)
    if not folder.is_dir():
        raise PageLLMError(f"no {folder}; name the directory of {config.dataset} with --raw")
    t = pq.read_table(folder / "transactions.parquet")
    day = t["transaction_timestamp"].to_numpy().astype("datetime64[D]").astype(np.int64)
    user, item = (t[name].to_numpy().astype(str) for name in ("household_id", "product_id"))
    drawn = np.random.default_rng(config.seed).permutation(np.unique(user))[: config.users]
    log = Log(user, item, day).some(np.isin(user, drawn))
    now = int(np.datetime64(config.day, "D").astype(np.int64))
    before, after = log.some(log.day < now), log.some((log.day >= now) & (log.day < now + WEEK))
    names, rows = np.unique(before.item, return_counts=True)
    common = names[rows >= config.least]
    about = pq.read_table(folder / "products.parquet")
    items = {
        "product_id": about["product_id"].cast(pa.string()),
        "title": about["product_type"],
        "brand": about["manufacturer_id"].cast(pa.string()),
        "category": about["product_category"],
    }
    return (
        before.some(np.isin(before.item, common)),
        after.some(np.isin(after.item, common)),
        pa.table(items).filter(pa.array(np.isin(np.asarray(items["product_id"]), common))),
    )


def most_often(log: Log, users: list[str]) -> dict[str, list[str]]:
    """Each household's items by the days on which they were bought, then the shop's by theirs."""
    days = np.unique(np.stack([log.user, log.item, log.day.astype(str)]), axis=1)
    shop, n = np.unique(days[1], return_counts=True)
    popular = shop[np.argsort(-n, kind="stable")].tolist()
    out = {}
    for user in users:
        mine, n = np.unique(days[1][days[0] == user], return_counts=True)
        own = mine[np.argsort(-n, kind="stable")].tolist()
        out[user] = list(dict.fromkeys([*own, *popular]))[:K]
    return out


def scores(page: list[str], bought: set[str], had: set[str]) -> dict[str, float]:
    """Scores of one page by METRICS; NaN where the household bought no such item."""
    hits = [item in bought for item in page]
    worth = 1 / np.log2(np.arange(K) + 2)

    def recall(of: set[str]) -> float:
        return len(of & set(page)) / min(len(of), K) if of else np.nan

    gained, ideal = worth[: len(hits)][hits].sum(), worth[: len(bought)].sum()
    found = (recall(bought), gained / ideal, recall(bought & had), recall(bought - had))
    return dict(zip(METRICS, found, strict=True))


def pages_of(model: pagellm.Model, users: list[str], seen: str) -> dict[str, list[str]]:
    """user -> the items of the page."""
    table = model.pages(users=users, k=K, seen=seen)
    out: dict[str, list[str]] = {user: [] for user in users}
    for user, item in zip(table["user"].to_pylist(), table["item"].to_pylist(), strict=True):
        out[user].append(item)
    return out


def rows_of(config: Config) -> tuple[dict[str, dict[str, list[str]]], Log, Log, list[str]]:
    """Row -> user -> page; the purchases before and after the cut, and the users scored."""
    before, after, items = read(config)
    table = pa.table(
        {
            "customer_id": before.user,
            "product_id": before.item,
            "date": pa.array(before.day.astype("datetime64[D]")),
        }
    )
    users = sorted(set(before.user) & set(after.user))
    rows = {"most often": most_often(before, users)}
    for repeat in (False, True):
        name = f"{config.dataset}-{'repeat' if repeat else 'once'}"
        data = pagellm.prepare(
            table,
            items=items,
            dataset=name,
            data=Path(config.data) / "repeats",
            repeat=repeat,
            split="temporal",
        )
        model = pagellm.fit(
            data,
            stages="compose",
            compose={"policy": "none"},
            run=name,
            runs=Path(config.runs) / config.study,
            seed=config.seed,
        )
        for seen in SEEN:
            rows[f"{seen}, --repeat" if repeat else seen] = pages_of(model, users, seen)
    return rows, before, after, users


def records_of(
    rows: dict[str, dict[str, list[str]]], before: Log, after: Log, users: list[str], seed: int
) -> list[dict]:
    """One record a row and metric: mean, low, high, and the difference to VERSUS."""
    had: dict[str, set[str]] = {user: set() for user in users}
    bought: dict[str, set[str]] = {user: set() for user in users}
    for log, sets in ((before, had), (after, bought)):
        for user, item in zip(log.user.tolist(), log.item.tolist(), strict=True):
            if user in sets:
                sets[user].add(item)
    found = {
        row: [scores(pages[user], bought[user], had[user]) for user in users]
        for row, pages in rows.items()
    }
    out = []
    for row, some in found.items():
        for metric in METRICS:
            mine = np.array([of[metric] for of in some])
            gap = mine - np.array([of[metric] for of in found[VERSUS]])
            record = {"row": row, "metric": metric, **stats.summary(mine, seed)}
            differs = stats.summary(gap, seed)
            out.append(record | {f"versus_{p}": differs[p] for p in ("mean", "low", "high")})
    return out


def markdown(records: list[dict]) -> str:
    """The table."""

    def cell(record: dict) -> str:
        text = f"{record['mean']:.3f} [{record['low']:.3f}, {record['high']:.3f}]"
        if record["row"] != VERSUS:
            low, high = record["versus_low"], record["versus_high"]
            text += f", {record['versus_mean']:+.3f} [{low:+.3f}, {high:+.3f}]"
        return text

    lines = ["| row | " + " | ".join(METRICS) + " |", "|---" * (len(METRICS) + 1) + "|"]
    for row in dict.fromkeys(record["row"] for record in records):
        cells = [cell(record) for record in records if record["row"] == row]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def run(config: Config) -> list[dict]:
    """Prepare, fit, write pages and score them; print the table and write it."""
    torch.set_num_threads(1)
    rows, before, after, users = rows_of(config)
    records = records_of(rows, before, after, users, config.seed)
    write_table(Path(config.runs) / config.study / f"{config.dataset}.parquet", records)
    print(markdown(records))
    had = {*zip(before.user.tolist(), before.item.tolist(), strict=True)}
    pairs = {*zip(after.user.tolist(), after.item.tolist(), strict=True)}
    pairs = {pair for pair in pairs if pair[0] in set(users)}
    print(
        f"\n{len(users):,} households, {len(set(before.item.tolist())):,} items; of "
        f"{len(pairs):,} pairs of the week {len(pairs & had):,} were bought before"
    )
    return records


if __name__ == "__main__":
    sys.exit(main(Config, run, "experiments.repeats"))
