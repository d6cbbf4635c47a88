"""Ranked pages of many users: their type, their file pages.parquet, checks, and the scorer.

Whatever ranks items, ours or another library, comes out as RankedPages and is scored by one Scorer.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from pagellm.data.shop import SPLITS, Rows, Shop
from pagellm.pages import metrics, stats
from pagellm.pages.energy import gain, gains, near_duplicates, page_energy
from pagellm.pages.topk import Rank, largest
from pagellm.pages.truth import item_scores
from pagellm.stage import randomness
from pagellm.stage.config import PageLLMError
from pagellm.stage.files import atomic
from pagellm.stage.hints import counted

__all__ = [
    "BLOCK",
    "RankedPages",
    "Scorer",
    "audience",
    "check_leak",
    "check_mask",
    "check_pages",
    "label_ranks",
    "last_evaluated",
    "popularity_pages",
    "rank_all",
    "read_pages",
    "score_row",
    "seen_rows",
    "tie_breaker",
    "top_items",
    "with_users",
    "write_pages",
]

# Scores held at once, 128 MB in float32: of 256 users at 131,000 items, of 32 at a million.
BLOCK = 2**25
FIRST, USERS = 32, 512  # users of rank_all's first block and of its later ones


@dataclass
class RankedPages:
    """Ranked items of many users; the first `slots` of a row are the page, the rest rank after it.

    user   (U,) int64, rising
    item   (U, depth) int64, best first; -1 past the end of a row
    score  (U, depth) float32
    slots  (U,) int64
    """

    user: np.ndarray
    item: np.ndarray
    score: np.ndarray
    slots: np.ndarray


def tie_breaker(seed: int, users: np.ndarray, n_users: int, n_items: int) -> Rank:
    """Breaks ties between equal scores by a seeded random order.

    The order differs from user to user: of any two items each goes first for half of the users, so
    no item is favoured because of its id.

    users    (B,) users of the rows that will be ranked
    returns  rank for topk.largest: shuffled[item] xor drawn[user]
    """
    shuffled, every = tie_draws(seed, n_users, n_items)
    drawn = every[users]
    return lambda row, column: shuffled[column] ^ drawn[row]


@lru_cache(maxsize=2)
def tie_draws(seed: int, n_users: int, n_items: int) -> tuple[np.ndarray, np.ndarray]:
    """What `tie_breaker` draws for all items and all users; not to be written to."""
    shuffled = randomness.rng(seed, "ties", "items").permutation(n_items)
    drawn = randomness.rng(seed, "ties", "users").integers(
        1 << max(1, (n_items - 1).bit_length()), size=n_users
    )
    shuffled.flags.writeable = drawn.flags.writeable = False
    return shuffled, drawn


class Scorer:
    """Scores ranked pages against the held-out rows of a split: metrics.py and the page energy.

    A user's labels are ordered by rating, then by s_i; labels equal in both share a rank. `energy`
    uses the held-out ratings as gains; on a synthetic shop, where every true rating is known,
    `true_energy` uses those of all slots.

    users  (U,) users with held-out items
    held   the held-out rows of all users
    """

    def __init__(self, shop: Shop, split: str):
        self.shop, self.held = shop, shop.csr(split)
        self.s, self.near = item_scores(shop), near_duplicates(shop.catalogue)
        self.categories = metrics.described(shop.catalogue.categories)
        self.users = np.flatnonzero(self.held.counts() > 0)
        user = np.repeat(np.arange(shop.n_users), self.held.counts())
        self.refs = (
            user,
            self.held.items,
            label_ranks(user, self.held.ratings, self.s[self.held.items]),
        )

    def __call__(self, ranked: RankedPages, k: int) -> dict[str, np.ndarray]:
        """metric -> (U,) float64 for pages of k slots, in the order of ranked.user; or NaN."""
        kept = ranked.item >= 0
        user = np.broadcast_to(ranked.user[:, None], kept.shape)[kept]
        rank = np.broadcast_to(np.arange(1, kept.shape[1] + 1), kept.shape)[kept]
        scores = metrics.score_pages(
            ranked.user,
            (user, rank, ranked.item[kept]),
            self.refs,
            self.categories,
            page_k=k,
            group=self.near.group,
        )
        page, mask, leaf = ranked.item[:, :k], kept[:, :k], self.shop.catalogue.leaf_id
        known = gains(ranked.user, page, self.held, self.s)
        scores["energy"] = page_energy(page, mask, known, leaf, self.near)
        if self.shop.truth is not None:
            worth = gain(self.shop.truth[ranked.user[:, None], np.maximum(page, 0)], self.s[page])
            scores["true_energy"] = page_energy(page, mask, worth, leaf, self.near)
        return scores


def label_ranks(user: np.ndarray, rating: np.ndarray, s: np.ndarray) -> np.ndarray:
    """Ranks 1 to n of each user's n labels by (rating, s_i), best first; equals share their mean.

    user, rating, s  (R,) of each label, in any order; NaN in rating or s is lowest
    returns          (R,) float64
    """
    worth = np.stack([np.nan_to_num(x, nan=-1.0) for x in (rating, s)])
    order = np.lexsort((-worth[1], -worth[0], user))
    start = np.searchsorted(user[order], user[order])  # where the user's labels begin
    place = np.arange(len(user)) - start + 1.0
    new = np.ones(len(user), dtype=bool)
    new[1:] = (user[order][1:] != user[order][:-1]) | (
        worth[:, order][:, 1:] != worth[:, order][:, :-1]
    ).any(0)
    group = np.cumsum(new) - 1
    mean = np.bincount(group, place) / np.maximum(np.bincount(group), 1) if len(group) else place
    ranks = np.empty(len(user))
    ranks[order] = mean[group]
    return ranks


SUSPECT = 3.0  # times EASE's score: more than this is suspected to be a leak


def check_mask(mask: str) -> tuple[bool, str]:
    """A rule for config.check: whether `mask` is valid, and what a valid one looks like.

    mask  names of splits with + between them: train, and perhaps valid and unused
    """
    names = mask.split("+")
    return (
        "train" in names and set(names) <= set(SPLITS) - {"test"} and len(set(names)) == len(names),
        "train, train+valid or train+valid+unused",
    )


def seen_rows(shop: Shop, split: str, mask: str) -> Rows:
    """The items that no page may hold when `split` is scored, liked or not.

    For "test" these are the rows of the mask's splits, for "valid" always the train rows.
    """
    return shop.csr(tuple(mask.split("+")) if split == "test" else "train", positive=None)


def top_items(
    score: Tensor, users: np.ndarray, seen: Rows, depth: int, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """The best `depth` items of each user in the whole catalogue, except those in `seen`.

    score    (B, N) float
    users    (B,) users of the rows
    seed     of tie_breaker, which orders equal scores
    returns  item (B, depth) int64, best first, -1 past the end; their score (B, depth) float32

    Raises ValueError if a score is NaN.
    """
    table = score.detach().float().contiguous().numpy()
    row, gone = seen.flat(users)
    before = table[row, gone]
    if np.isnan(before).any():
        raise ValueError("top_items: a score is NaN")
    rank = tie_breaker(seed, users, len(seen.indptr) - 1, table.shape[1])
    # Written into the caller's memory and restored: a copy would cost more than all the rest.
    table[row, gone] = -np.inf
    try:
        item, value = largest(table, depth, rank)
    finally:
        table[row, gone] = before
    return torch.from_numpy(item), torch.from_numpy(value)


def rank_all(
    score: Callable[[np.ndarray], Tensor],
    users: np.ndarray,
    seen: Rows,
    k: int,
    depth: int,
    seed: int = 0,
    block: int | None = None,
) -> RankedPages:
    """`top_items` of many users, `block` at a time.

    score    a function: users (B,) -> scores (B, N)
    users    (U,) rising
    k        slots of a page; depth: ranks in all
    block    None: USERS, or as many as have BLOCK scores, after a first block that counts the items
    """
    parts, at, size = [], 0, block or FIRST
    while at < len(users):
        some = users[at : at + size]
        table = score(some)
        parts.append(top_items(table, some, seen, depth, seed))
        at += size
        size = block or max(1, min(USERS, BLOCK // max(1, table.shape[1])))
    item, value = (torch.cat(column).numpy() for column in zip(*parts, strict=True))
    return RankedPages(users, item, value, np.minimum((item >= 0).sum(1), k))


def popularity_pages(
    shop: Shop, users: np.ndarray, seen: Rows, k: int, depth: int, seed: int = 0
) -> RankedPages:
    """For each user the most liked train items that are not in `seen`."""
    count = torch.from_numpy(np.bincount(shop.csr("train").items, minlength=shop.n_items)).float()
    return rank_all(lambda some: count.expand(len(some), -1), users, seen, k, depth, seed)


def check_pages(name: str, ranked: RankedPages, users: np.ndarray, seen: Rows) -> None:
    """Raise PageLLMError unless `ranked` has exactly these users (rising) and no item of `seen`."""
    if not np.array_equal(ranked.user, users):
        raise PageLLMError(
            f"{name}: lists of {len(ranked.user):,} users, where {len(users):,} have held-out "
            "items: every one of them must count\n  Write a list, if an empty one, for each."
        )
    base = max(int(seen.items.max(initial=0)), int(ranked.item.max(initial=0))) + 1
    masked = np.repeat(np.arange(len(seen.indptr) - 1), seen.counts()) * base + seen.items
    shown = (ranked.user[:, None] * base + ranked.item)[ranked.item >= 0]
    bad = np.isin(shown, masked)
    if bad.any():
        user, item = divmod(int(shown[bad][0]), base)
        raise PageLLMError(
            f"{name}: {int(bad.sum()):,} listed items are masked, first item {item} of user "
            f"{user}\n  Leave out what the mask takes out before ranking."
        )


def check_leak(
    name: str,
    scores: dict[str, np.ndarray],
    n_labels: np.ndarray,
    ease: dict[str, dict] | None = None,
) -> None:
    """Raise PageLLMError for scores that an honest run cannot have.

    These are an NDCG that the recall does not allow, and scores above SUSPECT times those of EASE.
    Where EASE is too good for that, it is an NDCG that comes SUSPECT times closer to 1 than EASE's.

    name      of the row, for errors
    scores    as Scorer gives them
    n_labels  (U,) number of held-out items of each user
    ease      metric -> {"mean": ...} of EASE on the same users; None: not known
    """
    bound = metrics.ndcg_bound(n_labels, {20: scores["Recall@20"], 40: scores["Recall@40"]})
    above = scores["NDCG@100"] > bound + 1e-9
    if above.any():
        raise PageLLMError(
            f"{name}: NDCG@100 of {int(above.sum()):,} users exceeds what their recall allows: "
            "suspected leak or broken metric\n  Look at how these lists were scored."
        )
    look = (
        "  Look for held-out rows in what it was fitted to, or for ranking among a few candidates."
    )
    for metric in ("Recall@20", "Recall@40", "NDCG@100"):
        mean, plain = (
            float(np.nanmean(scores[metric])),
            (ease or {}).get(metric, {}).get("mean", np.inf),
        )
        if mean > SUSPECT * plain > 0:
            raise PageLLMError(
                f"{name}: {metric} {mean:.4f} is more than {SUSPECT:g} times EASE's {plain:.4f}: "
                f"suspected leak\n{look}"
            )
    # Not for recall: in a small catalogue a page holds most items, and any recall is nearly 1.
    if SUSPECT * plain >= 1 and 1 - mean < (1 - plain) / SUSPECT:
        raise PageLLMError(
            f"{name}: NDCG@100 {mean:.4f} misses less than 1/{SUSPECT:g} of what EASE's "
            f"{plain:.4f} misses: suspected leak\n{look}"
        )


def score_row(
    folder: Path,
    name: str,
    ranked: RankedPages,
    scorer: Scorer,
    seen: Rows,
    k: int,
    seed: int = 0,
    n_boot: int = 1000,
) -> tuple[dict[str, np.ndarray], dict[str, dict]]:
    """Check one row of a results table, write its files into `folder`, and score what was written.

    Writes pages.parquet and per_user.parquet (user and every score). The scores come from the file
    read back, so that they are those of what others can read.

    name          of the row, for errors
    ranked        lists of exactly scorer.users, free of the items in `seen`
    k             slots of a page
    seed, n_boot  of the bootstrap
    returns       metric -> (U,) scores, and metric -> stats.summary of them where any user counts

    Raises PageLLMError as check_pages does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    check_pages(name, ranked, scorer.users, seen)
    write_pages(folder / "pages.parquet", ranked, scorer.shop)
    written = read_pages(folder / "pages.parquet", scorer.shop)
    scores = scorer(with_users(written, scorer.users), k)
    with atomic(folder / "per_user.parquet") as beside:
        pq.write_table(pa.table({"user": scorer.users, **scores}), beside)
    return scores, {
        metric: stats.summary(values, seed, n_boot)
        for metric, values in scores.items()
        if not np.isnan(values).all()
    }


def audience(shop: Shop, scorer: Scorer, mask: str, split: str = "test") -> str:
    """One sentence on what is scored: users, cold ones, held-out items, cold ones, candidates."""
    users, held = scorer.users, scorer.held
    cold = int((shop.csr("train").counts()[users] == 0).sum())
    trained = np.bincount(shop.csr("train").items, minlength=shop.n_items) > 0
    return (
        f"{counted(len(users), 'user')}, all counted, {cold:,} of them cold (no train row); "
        f"{len(held.items):,} held-out items, {int((~trained[held.items]).sum()):,} of them cold; "
        f"ranked: all {counted(shop.n_items, 'item')} less the user's "
        f"{mask if split == 'test' else 'train'} rows"
    )


def write_pages(path: Path, ranked: RankedPages, shop: Shop) -> None:
    """Write pages.parquet: user, rank (from 1), item, score, page (True on the page's slots).

    user_id and item_id, the shop's own, stand after them.
    """
    kept = ranked.item >= 0
    rank = np.broadcast_to(np.arange(1, ranked.item.shape[1] + 1), kept.shape)
    user = np.broadcast_to(ranked.user[:, None], kept.shape)
    on_page = rank <= ranked.slots[:, None]
    columns = {
        "user": user[kept].astype(np.int32),
        "rank": rank[kept].astype(np.int32),
        "item": ranked.item[kept].astype(np.int32),
        "score": ranked.score[kept],
        "page": on_page[kept],
        "user_id": pa.array(shop.user_ids, pa.string()).take(pa.array(user[kept])),
        "item_id": pa.array(shop.catalogue.ids, pa.string()).take(pa.array(ranked.item[kept])),
    }
    with atomic(path) as beside:
        pq.write_table(pa.table(columns), beside)


def read_pages(path: Path, shop: Shop) -> RankedPages:
    """Read pages.parquet as write_pages or another library wrote it.

    Columns user, rank and item are needed. Without score, items get falling scores by rank; without
    page, all ranks are the page.

    Raises PageLLMError on missing columns, unknown users or items, or ranks other than 1, 2, 3 ...
    """
    data = pq.read_table(path)
    missing = {"user", "rank", "item"} - set(data.column_names)
    if missing:
        raise PageLLMError(f"{path}: no column {', '.join(sorted(missing))}; want user, rank, item")
    user, rank, item = (data[c].to_numpy().astype(np.int64) for c in ("user", "rank", "item"))
    for name, values, n in (("user", user, shop.n_users), ("item", item, shop.n_items)):
        if len(values) and not (0 <= values.min() and values.max() < n):
            raise PageLLMError(
                f"{path}: {name} {values.min()}..{values.max()} is outside 0..{n - 1}"
            )
    order = np.lexsort((rank, user))
    user, rank, item = user[order], rank[order], item[order]
    users, start, count = np.unique(user, return_index=True, return_counts=True)
    if not np.array_equal(rank, np.arange(len(rank)) - np.repeat(start, count) + 1):
        raise PageLLMError(f"{path}: the ranks of a user must be 1, 2, 3 ... without gap or repeat")
    grid = np.full((len(users), count.max(initial=1)), -1, dtype=np.int64)
    score = np.full(grid.shape, -np.inf, dtype=np.float32)
    row = np.repeat(np.arange(len(users)), count)
    grid[row, rank - 1] = item
    score[row, rank - 1] = (
        data["score"].to_numpy()[order] if "score" in data.column_names else -rank
    )
    slots = (
        np.bincount(row, data["page"].to_numpy(zero_copy_only=False)[order], len(users)).astype(
            np.int64
        )
        if "page" in data.column_names
        else count
    )
    return RankedPages(users, grid, score, slots)


def last_evaluated(folder: Path) -> str:
    """The policy that a comparison of a run's pages is about: compose if `evaluate` has written its
    pages into this directory, else ppo."""
    return "compose" if (folder / "compose" / "pages.parquet").exists() else "ppo"


def with_users(ranked: RankedPages, users: np.ndarray) -> RankedPages:
    """The same lists, and an empty one for each of `users` (rising) that `ranked` lacks.

    A user without any legal item has no row in a file, but still counts.
    """
    at = np.searchsorted(users, ranked.user)
    item = np.full((len(users), ranked.item.shape[1]), -1, np.int64)
    score, slots = np.full(item.shape, -np.inf, np.float32), np.zeros(len(users), np.int64)
    item[at], score[at], slots[at] = ranked.item, ranked.score, ranked.slots
    return RankedPages(users, item, score, slots)
