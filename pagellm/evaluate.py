"""Evaluation: policies -> pages.parquet -> one piece of code that scores them all.

Reads   data/<dataset>, runs/<run>/sft, runs/<run>/ppo
Writes  runs/<run>/evaluate                 <policy>/pages.parquet (user, rank, item, score, page)
                                            <policy>/per_user.parquet, metrics.json, table.txt

    make evaluate                           python -m pagellm.evaluate --dataset synthetic --policies popularity,sft

Seconds for the synthetic shop on two CPU cores.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pagellm import metrics
from pagellm.config import PageLLMError, check, main
from pagellm.data.shop import Shop, load
from pagellm.policy import MODES, Policy, RankedPages, score_users
from pagellm.run import Common, Run, atomic, file_id, finished, write_json
from pagellm.train import pick_device

__all__ = ["COLUMNS", "Config", "LABELS", "popularity_pages", "read_pages", "run", "table", "write_pages"]

LABELS = {"popularity": "popularity", "sft": 'SFT = "w/o reward"', "ppo": "PageLLM"}
COLUMNS = ("Recall@20", "Recall@40", "NDCG@100", "WAS", "PWKT", "WMRD", "DPA", "ILD", "entropy", "redundancy",
           "duplicate_rate")


@dataclass(frozen=True, kw_only=True)
class Config(Common):
    """Write everybody's pages with each policy, score them on held-out items, print the table and some pages."""

    policies: str = "popularity,sft,ppo"  # which to evaluate, comma-separated
    split: str = "test"          # held-out rows that count as right: test or valid
    k: int = 20                  # slots of a page, decoded one after another
    depth: int = 100             # ranks in all; past the page by the first slot's logits
    mode: str = "greedy"         # greedy, beam, or one_shot (all ranks by the first slot's logits)
    batch: int = 256             # users decoded at once
    n_boot: int = 1000           # bootstrap draws behind an interval
    examples: int = 3            # users whose pages are printed

    def __post_init__(self):
        names = self.policies.split(",")
        check(self, policies=(set(names) <= set(LABELS) and len(set(names)) == len(names),
                              f"some of {','.join(LABELS)}"),
              split=(self.split in ("test", "valid"), "test or valid"), k=(self.k > 0, "1 or more"),
              depth=(self.depth >= self.k, f"k={self.k} or more"), mode=(self.mode in MODES, ", ".join(MODES)),
              batch=(self.batch > 0, "1 or more"), n_boot=(self.n_boot > 1, "2 or more"),
              examples=(self.examples >= 0, "0 or more"))


def popularity_pages(shop: Shop, users: np.ndarray, seen, k: int, depth: int) -> RankedPages:
    """The most bought train items that a user has not seen; ties by id."""
    count = np.bincount(shop.csr("train").items, minlength=shop.n_items)
    order = np.lexsort((np.arange(shop.n_items), -count))
    item = np.full((len(users), depth), -1, dtype=np.int64)
    for row, user in enumerate(users):
        gone = seen.of(user)[0]
        top = order[: depth + len(gone)]
        top = top[~np.isin(top, gone)][:depth]
        item[row, : len(top)] = top
    score = np.where(item >= 0, count[item], -np.inf).astype(np.float32)
    return RankedPages(users, item, score, np.minimum((item >= 0).sum(1), k))


def write_pages(path: Path, ranked: RankedPages) -> None:
    """pages.parquet: user, rank (from 1), item, score, page (True on the page's own slots)."""
    kept = ranked.item >= 0
    rank = np.broadcast_to(np.arange(1, ranked.item.shape[1] + 1), kept.shape)
    user = np.broadcast_to(ranked.user[:, None], kept.shape)
    on_page = rank <= ranked.slots[:, None]
    with atomic(path) as beside:
        pq.write_table(pa.table({"user": user[kept].astype(np.int32), "rank": rank[kept].astype(np.int32),
                                 "item": ranked.item[kept].astype(np.int32), "score": ranked.score[kept],
                                 "page": on_page[kept]}), beside)


def read_pages(path: Path, shop: Shop) -> RankedPages:
    """The inverse of write_pages; also takes pages.parquet from any other library (columns user, rank, item).

    Raises PageLLMError for missing columns, unknown users or items, or ranks that are not 1, 2, 3 ...
    """
    data = pq.read_table(path)
    missing = {"user", "rank", "item"} - set(data.column_names)
    if missing:
        raise PageLLMError(f"{path}: no column {', '.join(sorted(missing))}; want user, rank, item")
    user, rank, item = (data[c].to_numpy().astype(np.int64) for c in ("user", "rank", "item"))
    for name, values, n in (("user", user, shop.n_users), ("item", item, shop.n_items)):
        if len(values) and not (0 <= values.min() and values.max() < n):
            raise PageLLMError(f"{path}: {name} {values.min()}..{values.max()} is outside 0..{n - 1}")
    order = np.lexsort((rank, user))
    user, rank, item = user[order], rank[order], item[order]
    users, start, count = np.unique(user, return_index=True, return_counts=True)
    if not np.array_equal(rank, np.arange(len(rank)) - np.repeat(start, count) + 1):
        raise PageLLMError(f"{path}: the ranks of a user must be 1, 2, 3 ... without gap or repeat")
    grid = np.full((len(users), count.max(initial=1)), -1, dtype=np.int64)
    score = np.full(grid.shape, -np.inf, dtype=np.float32)
    row = np.repeat(np.arange(len(users)), count)
    grid[row, rank - 1] = item
    score[row, rank - 1] = (data["score"].to_numpy()[order] if "score" in data.column_names else -rank)
    slots = (np.bincount(row, data["page"].to_numpy(zero_copy_only=False)[order], len(users)).astype(np.int64)
             if "page" in data.column_names else count)
    return RankedPages(users, grid, score, slots)
