"""Every day: seven updates of a trained run, against training anew each day and doing nothing.

    make updates DATASET=complete_journey RAW=path/to/files       python -m experiments.updates

A log is cut at eight moments. A model is trained on what lies before the first. Then seven times a
step of the log arrives, and pages are scored on what each user chooses for the first time in the
step after it. Rows:

    nothing             the first model, and the histories that it was trained on
    histories           the first model, prompts with all that is known by now of the items it knows
    fold-in             `pagellm update` of the day before, without a fit
    update, N steps     `pagellm update` of the day before, with a short fit
    ..., M slots kept   the same two, M of 20 slots kept for new items (`recommend --new_items`)
    trained anew        pre-training and SFT on everything, each day

All are scored on the same users and items; an item that a model does not know cannot be on its
pages. "New" is an item without a row before the first cut. For each row: means over users (of a
user's mean over days) with 95% bootstrap intervals, the paired difference to training anew, the new
items' share of slots, how many of the new items that users chose were on their pages, and processor
minutes a day.

complete_journey steps by a week from week 25 on, x_wines by 60 days from 2018 on. --users are drawn
at random, and items with fewer than --least rows among these users in the whole log are left out:
so what is new has a few rows by the end. Writes <data>/updates, <runs>/<study>, and the table
<runs>/<study>/<dataset>.parquet.
"""

import csv
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.csv
import pyarrow.parquet as pq
import torch
from torch import nn

from experiments.study import overrides
from pagellm import pretrain, sft, update
from pagellm.data import prepare
from pagellm.data.shop import Rows, Shop, load
from pagellm.model.policy import Policy
from pagellm.model.vocab import Vocab
from pagellm.pages import stats
from pagellm.pages.ranked import RankedPages, Scorer
from pagellm.pages.tables import write_table
from pagellm.serving.newcomers import ranks_with_new
from pagellm.stage.command import main
from pagellm.stage.config import Options, PageLLMError, check

__all__ = ["Config", "Log", "cut", "run"]

DAYS, K, DEPTH, VALID = 7, 20, 100, 0.3
SHOWN = ("Recall@20", "NDCG@100")
FIRST = {"complete_journey": "2017-06-18", "x_wines": "2018-01-01"}
STEP = {"complete_journey": 7, "x_wines": 60}  # days


@dataclass(frozen=True, kw_only=True)
class Config:
    """Seven updates against training anew each time, and against doing nothing."""

    dataset: str = "complete_journey"  # complete_journey or x_wines
    raw: str = ""  # directory of its files; empty: data/raw/<dataset>
    study: str = "updates"  # name of the study: results lie in <runs>/<study>
    data: str = "data"  # directory of prepared data sets
    runs: str = "runs"  # directory of runs
    users: int = 1500  # users drawn at random
    least: int = 10  # rows that an item has at least among them
    steps: int = 20  # steps of the fit in the row with one
    kept: int = 2  # slots that are kept for new items, in the rows with such
    pretrain: Options = Options("--size mini --rows als --pool --row_scale 0.05 --steps 0")
    # options of pretrain
    sft: Options = Options(
        "--epochs 2 --lr 3e-4 --row_lr 0.3 --label_share 0.2 --max_page 8 --eval_every 16 "
        "--no-use_user --no-use_ratings"
    )  # options of sft
    seed: int = 0  # of the draws and of every stage

    def __post_init__(self):
        check(
            self,
            dataset=(self.dataset in FIRST, " or ".join(FIRST)),
            users=(self.users > 0, "1 or more"),
            least=(self.least > 0, "1 or more"),
            steps=(self.steps > 0, "1 or more"),
            kept=(0 < self.kept <= K, f"1 to {K}, the slots of a page"),
        )


@dataclass(frozen=True)
class Log:
    """First choices: user, item (R,) text, time (R,) days since 1970; about: item -> its facts."""

    user: np.ndarray
    item: np.ndarray
    time: np.ndarray
    about: dict[str, tuple[str, str, str]]  # title, brand, category


def read(config: Config) -> Log:
    """The rows of the users drawn, each pair once, at its first time."""
    folder = Path(config.raw or Path("data") / "raw" / config.dataset)
    if not folder.is_dir():
        raise PageLLMError(f"no {folder}; name the directory of {config.dataset} with --raw")
    if config.dataset == "x_wines":
        t = pyarrow.csv.read_csv(folder / "XWines_Slim_150K_ratings.csv.gz")
        names, when = ("UserID", "WineID"), t["Date"]
        with open(folder / "XWines_Slim_1K_wines.csv", encoding="utf-8", newline="") as file:
            about = {
                w["WineID"]: (w["WineName"], w["WineryName"], f"{w['Type']} {w['Country']}")
                for w in csv.DictReader(file)
            }
    else:
        t = pq.read_table(folder / "transactions.parquet")
        names, when = ("household_id", "product_id"), t["transaction_timestamp"]
        items = pq.read_table(folder / "products.parquet").to_pylist()
        about = {
            str(p["product_id"]): (
                p["product_type"] or "",
                str(p["manufacturer_id"]),
                p["product_category"] or "",
            )
            for p in items
        }
    user, item = (t[name].to_numpy() for name in names)
    day = when.to_numpy().astype("datetime64[s]").astype(np.float64) / 86_400
    rng = np.random.default_rng(config.seed)
    drawn = rng.permutation(np.unique(user))[: config.users]
    keep = np.flatnonzero(np.isin(user, drawn))
    keep = keep[np.argsort(day[keep], kind="stable")]
    _, first = np.unique(np.stack([user[keep], item[keep]]), axis=1, return_index=True)
    keep = keep[np.sort(first)]
    many = np.bincount(item[keep], minlength=1)
    keep = keep[many[item[keep]] >= config.least]
    return Log(user[keep].astype(str), item[keep].astype(str), day[keep], about)


def cut(log: Log, config: Config, day: int) -> prepare.Config:
    """Write the log as it is known on a day, and what comes in the step after it, as raw files.

    Three tenths of the newest step's rows, drawn by their place in the log, are for validation;
    from the next day on these are train rows.
    """
    begin = np.datetime64(FIRST[config.dataset]).astype("datetime64[D]").astype(np.float64)
    step = STEP[config.dataset]
    now = begin + day * step
    known, later = log.time < now, (log.time >= now) & (log.time < now + step)
    draws = np.random.default_rng(config.seed + 1).random(len(log.time))
    valid = known & (log.time >= now - step) & (draws < VALID)
    name = f"{config.dataset}-{day}"
    raw = Path(config.data) / "updates" / "raw" / name
    raw.mkdir(parents=True, exist_ok=True)
    for split, rows in (("train", known & ~valid), ("valid", valid), ("test", later)):
        with open(raw / f"{split}.csv", "w", newline="") as file:
            out = csv.writer(file)
            out.writerow(["user", "item", "timestamp"])
            at = (log.time[rows] * 86_400).astype(np.int64)
            out.writerows(zip(log.user[rows], log.item[rows], at, strict=True))
    with open(raw / "items.csv", "w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow(["item", "title", "brand", "category"])
        out.writerows((i, *log.about.get(i, ("", "", ""))) for i in np.unique(log.item))
    return prepare.Config(
        dataset=name,
        raw=str(raw),
        data=str(Path(config.data) / "updates"),
        split="given",
        item_files="items.csv",
        train="train.csv",
        valid="valid.csv",
        test="test.csv",
    )


def widened(policy: Policy, old: Shop, new: Shop) -> tuple[Policy, update.Change]:
    """A policy in the numbers of other data. Items that it does not know have a row of zeros."""
    found = update.change(old, new)
    model, known = policy.model, torch.from_numpy(found.item >= 0)
    item = torch.where(known[:, None], model.item.detach()[found.item], 0.0)
    model.item, model.n_items = nn.Parameter(item), new.n_items
    model.user = nn.Parameter(model.user.detach()[np.maximum(found.user, 0)])
    model.n_users = new.n_users
    vocab = Vocab(policy.vocab.tokenizer, new.n_users, new.n_items, policy.vocab.times)
    return Policy(model, vocab, replace(policy.style, use_user=False)), found


def in_numbers(rows: Rows, old: Shop, found: update.Change, n_users: int) -> Rows:
    """Rows of the older data, in the numbers of the newer."""
    item_of = np.full(old.n_items, -1)
    item_of[found.item[found.item >= 0]] = np.flatnonzero(found.item >= 0)
    parts = [item_of[rows.of(u)[0]] if u >= 0 else rows.items[:0] for u in found.user]
    parts = [part[part >= 0] for part in parts]
    indptr = np.concatenate([[0], np.cumsum([len(part) for part in parts])])
    items = np.concatenate(parts)
    return Rows(indptr, items, np.full(len(items), np.nan, np.float32))


def joined(first: Rows, second: Rows) -> Rows:
    """The rows of both, by user."""
    parts = [
        np.concatenate([a, b])
        for a, b in zip(
            np.split(first.items, first.indptr[1:-1]),
            np.split(second.items, second.indptr[1:-1]),
            strict=True,
        )
    ]
    items = np.concatenate(parts)
    indptr = np.concatenate([[0], np.cumsum([len(part) for part in parts])])
    return Rows(indptr, items, np.full(len(items), np.nan, np.float32))


@contextmanager
def counted(minutes: dict[str, float], name: str) -> Iterator[None]:
    """Add the processor minutes of a block."""
    began = time.process_time()
    yield
    minutes[name] = minutes.get(name, 0.0) + (time.process_time() - began) / 60


class Day:
    """One day's data, the users that are scored, and the scores of every row."""

    def __init__(self, shop: Shop, first: Shop):
        self.shop, self.scorer = shop, Scorer(shop, "test")
        self.history = shop.csr(("train", "valid"))
        self.users = self.scorer.users[self.history.counts()[self.scorer.users] > 0]
        before = {first.catalogue.ids[i] for i in np.unique(first.item[first.rows("train")])}
        self.new = np.array([name not in before for name in shop.catalogue.ids])
        self.held = shop.csr("test")

    def scored(
        self,
        policy: Policy,
        history: Rows | None = None,
        unknown: np.ndarray | None = None,
        kept: int = 0,
    ) -> dict[str, np.ndarray]:
        """Scores (U,) of pages of the policy.

        unknown  (N,) bool: items that it cannot show      kept  slots that are kept for new items
        """
        told = self.history if history is None else history
        seen = self.history if unknown is None else self.without(unknown)
        ranked = policy.rank(self.users, told, seen, K, DEPTH, "greedy")
        if kept:
            some = policy.rank(self.users, told, self.without(~self.new), kept, kept, "greedy")
            pages = [
                set(page[:n]) for page, n in zip(ranked.item.tolist(), ranked.slots, strict=True)
            ]
            fresh = [
                [i for i in row if i >= 0 and i not in page]
                for row, page in zip(some.item.tolist(), pages, strict=True)
            ]
            ranked.item = ranks_with_new(ranked.item, ranked.slots, fresh, self.new, kept)
        return self.scorer(ranked, K) | self.exposed(ranked)

    def without(self, items: np.ndarray) -> Rows:
        """What no page may hold: each user's own, and these items (N,) bool."""
        every, n = np.flatnonzero(items), self.shop.n_users
        more = Rows(np.arange(n + 1) * len(every), np.tile(every, n), np.zeros(n * len(every)))
        return joined(self.history, more) if len(every) else self.history

    def exposed(self, ranked: RankedPages) -> dict[str, np.ndarray]:
        """Per user: share of slots with a new item; share of chosen new items that were shown."""
        page = ranked.item[:, :K]
        slots = (self.new[np.maximum(page, 0)] & (page >= 0)).sum(1) / K
        found = np.full(len(page), np.nan)
        for row, user in enumerate(ranked.user):
            chosen = self.held.of(user)[0]
            if self.new[chosen].any():
                found[row] = np.isin(chosen[self.new[chosen]], page[row]).mean()
        return {"new slots": slots, "new found": found}


def trained(config: Config, day: int) -> sft.Config:
    """Pre-training and SFT on a day's data; -> the Config of SFT, which is done."""
    common: dict[str, Any] = common_of(config, day) | {
        "run": f"{config.study}/{name_of(config, day)}"
    }
    pretrain.run(pretrain.Config(**common, **overrides(pretrain, config.pretrain)))
    made = sft.Config(**common, **overrides(sft, config.sft))
    sft.run(made)
    return made


def name_of(config: Config, day: int) -> str:
    return f"{config.dataset}-{day}"


def common_of(config: Config, day: int) -> dict[str, Any]:
    """Where data and runs of a day are."""
    return {
        "dataset": name_of(config, day),
        "data": str(Path(config.data) / "updates"),
        "runs": config.runs,
        "seed": config.seed,
    }


def updated(config: Config, day: int, steps: int) -> Path:
    """`pagellm update` from the day before; -> the directory of its SFT policy."""
    study, name = config.study, name_of(config, day)
    before = name_of(config, day - 1) + (f"-s{steps}" if day > 1 else "")
    made = update.Config(
        **common_of(config, day),
        source_run=f"{study}/{before}",
        run=f"{study}/{name}-s{steps}",
        steps=steps,
    )
    update.run(made)
    return made.stage("sft")


def one_day(config: Config, first: Shop, day: int, minutes: dict) -> tuple[Day, dict]:
    """-> the day, and row -> scores."""
    rows, fit = {}, f"update, {config.steps} steps"
    shop = load(Path(config.data) / "updates" / name_of(config, day))
    today = Day(shop, first)
    start = Path(config.runs) / config.study / name_of(config, 0) / "sft"
    wide, found = widened(Policy.load(start), first, shop)
    then = in_numbers(first.csr(("train", "valid")), first, found, shop.n_users)
    known = np.zeros(first.n_items, bool)
    known[first.item[first.rows("train")]] = True
    unknown = np.where(found.item >= 0, ~known[found.item], True)
    rows["nothing"] = today.scored(wide, then, unknown)
    clean = in_numbers_of(today.history, unknown)
    rows["histories"] = today.scored(wide, clean, unknown)
    for name, steps in (("fold-in", 0), (fit, config.steps)):
        with counted(minutes, name):
            where = updated(config, day, steps)
        policy = Policy.load(where)
        rows[name] = today.scored(policy)
        rows[f"{name}, {config.kept} slots kept"] = today.scored(policy, kept=config.kept)
    with counted(minutes, "trained anew"):
        made = trained(config, day)
    rows["trained anew"] = today.scored(Policy.load(made.stage("sft")))
    return today, rows


def in_numbers_of(rows: Rows, unknown: np.ndarray) -> Rows:
    """The rows whose item is known."""
    keep = ~unknown[rows.items]
    user = np.repeat(np.arange(len(rows.indptr) - 1), rows.counts())[keep]
    indptr = np.concatenate([[0], np.cumsum(np.bincount(user, minlength=len(rows.indptr) - 1))])
    return Rows(indptr, rows.items[keep], rows.ratings[keep])


def by_user(days: list[tuple[Day, dict]], row: str, metric: str) -> np.ndarray:
    """A user's mean over the days on which it is defined, users by their ids."""
    found: dict[str, list[float]] = {}
    for day, rows in days:
        for user, value in zip(day.users, rows[row][metric], strict=True):
            found.setdefault(day.shop.user_ids[user], []).append(value)
    kept = (np.array(found[name])[~np.isnan(found[name])] for name in sorted(found))
    return np.array([values.mean() if len(values) else np.nan for values in kept])


def records_of(config: Config, days: list[tuple[Day, dict]], minutes: dict) -> list[dict]:
    """One record a row and measure: mean, low, high, and the difference to training anew."""
    out = []
    for row in days[0][1]:
        for metric in (*SHOWN, "new slots", "new found"):
            mine, anew = by_user(days, row, metric), by_user(days, "trained anew", metric)
            differs = stats.summary(mine - anew, config.seed)
            record = {"row": row, "metric": metric, **stats.summary(mine, config.seed)}
            record |= {f"versus_{part}": differs[part] for part in ("mean", "low", "high")}
            took = minutes.get(row.removesuffix(f", {config.kept} slots kept"), 0.0)
            out.append(record | {"minutes": took / len(days)})
    return out


def markdown(config: Config, days: list[tuple[Day, dict]], records: list[dict]) -> str:
    """The table, and under it what was scored."""

    def cell(record: dict, versus: bool) -> str:
        text = f"{record['mean']:.4f} [{record['low']:.4f}, {record['high']:.4f}]"
        if versus and record["row"] != "trained anew":
            low, high = record["versus_low"], record["versus_high"]
            text += f" ({record['versus_mean']:+.4f} [{low:+.4f}, {high:+.4f}])"
        return text

    head = [
        *SHOWN,
        "new items: share of slots",
        "new items chosen that were shown",
        "minutes a day",
    ]
    lines = ["| row | " + " | ".join(head) + " |", "|---" * (len(head) + 1) + "|"]
    for row in days[0][1]:
        mine = [r for r in records if r["row"] == row]
        cells = [cell(r, r["metric"] in SHOWN) for r in mine] + [f"{mine[0]['minutes']:.2f}"]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    last = days[-1][0]
    chosen = sum(int(day.new[day.held.items].sum()) for day, _ in days)
    every = sum(len(day.held.items) for day, _ in days)
    lines += [
        "",
        f"{config.dataset}: {len(by_user(days, 'nothing', SHOWN[0])):,} users scored over "
        f"{len(days)} days; {last.shop.n_items:,} items, {int(last.new.sum()):,} of them new "
        f"by the end; {chosen:,} of {every:,} test rows are of new items",
    ]
    return "\n".join(lines)


def run(config: Config) -> list[dict]:
    """Train, update, score; print the table and write it."""
    torch.set_num_threads(1)
    log = read(config)
    for day in range(DAYS + 1):
        prepare.run(cut(log, config, day))
    minutes: dict[str, float] = {}
    trained(config, 0)
    first = load(Path(config.data) / "updates" / name_of(config, 0))
    days = [one_day(config, first, day, minutes) for day in range(1, DAYS + 1)]
    records = records_of(config, days, minutes)
    write_table(Path(config.runs) / config.study / f"{config.dataset}.parquet", records)
    print(markdown(config, days, records))
    return records


if __name__ == "__main__":
    sys.exit(main(Config, run, "experiments.updates"))
