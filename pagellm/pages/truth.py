"""Ground-truth pages, near-duplicates, page energy E, feedback set F (SPEC 2.2, 2.3; paper: A.2, Eq. 13).

    s, near = item_scores(shop), near_duplicates(shop.catalogue)
    given, label = split_history(items, ratings, 0.2, rng)              # of one user's train positives
    page, removed = ground_truth_page(items[label], ratings[label], shop.catalogue, s, near)
    energy(page, gain(ratings_on_page, s[page]), shop.catalogue.leaf_id, near)

E is a value: higher is better (the paper's "potential energy" is -E). Everything reads train rows only.
"""

import math

import numpy as np

from pagellm.data.shop import Catalogue, Shop
from pagellm.pages.energy import Near, near_duplicates
from pagellm.stage import randomness

__all__ = [
    "PageMaker",
    "ground_truth_page",
    "item_scores",
    "popularity",
    "rating_levels",
    "single_level",
    "split_history",
]


def popularity(shop: Shop) -> np.ndarray:
    """(N,) int64: train interactions of every item, liked or not."""
    return np.bincount(shop.csr("train", positive=None).items, minlength=shop.n_items)


def item_scores(shop: Shop, shrink: float = 0.0) -> np.ndarray:
    """s_i, the mean train rating of every item over all its raters (SPEC 2.2 step 3).

    shrink  m in (sum r + m mu) / (n_i + m), mu the mean of all train ratings: few raters pull an item less
    returns (N,) float64 in rating units; NaN for an item nobody rated, whatever shrink: no rating is invented

    Raises ValueError on a negative shrink.
    """
    if shrink < 0:
        raise ValueError(f"item_scores: shrink={shrink}, want 0 or more")
    rows = shop.csr("train", positive=None)
    known = ~np.isnan(rows.ratings)
    items, ratings = rows.items[known], rows.ratings[known].astype(np.float64)
    count = np.bincount(items, minlength=shop.n_items)
    total = np.bincount(items, weights=ratings, minlength=shop.n_items)
    prior = ratings.mean() if len(ratings) else 0.0
    score = np.full(shop.n_items, np.nan)
    rated = count > 0
    score[rated] = (total[rated] + shrink * prior) / (count[rated] + shrink)
    return score


def rating_levels(ratings: np.ndarray) -> np.ndarray:
    """Ratings as comparable numbers: NaN (level unknown) becomes one level below all known ones."""
    ratings = np.asarray(ratings, dtype=np.float64)
    return np.where(np.isnan(ratings), -np.inf, ratings)


def split_history(
    items: np.ndarray, ratings: np.ndarray, share: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Input/label split of one user's positives, stratified by rating level (SPEC 2.2 step 2).

    Of a level with m items, max(1, round(share m)) but never all become labels; a level of one item is input.
    If that leaves no label, one item drawn at random becomes the label.

    items, ratings (n,): NaN ratings form one level of their own    share  of the labels, between 0 and 1
    returns given, label: index arrays into items, each rising (so a history keeps its order); together 0..n-1

    Raises ValueError on no items, unequal lengths, or a share outside (0, 1).
    """
    if len(items) == 0 or len(items) != len(ratings):
        raise ValueError(
            f"split_history: {len(items)} items, {len(ratings)} ratings: want both, as many"
        )
    if not 0 < share < 1:
        raise ValueError(f"split_history: share={share}, want it between 0 and 1")
    level = rating_levels(ratings)
    chosen = np.zeros(len(items), dtype=bool)
    for value in np.unique(level):
        members = np.flatnonzero(level == value)
        count = min(max(1, math.floor(share * len(members) + 0.5)), len(members) - 1)
        chosen[rng.permutation(members)[:count]] = True
    if not chosen.any():
        chosen[rng.integers(len(items))] = True
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


def single_level(ratings: np.ndarray, given: np.ndarray, label: np.ndarray) -> bool:
    """True if some rating level of the user stands on one side of the split only (SPEC 2.2 step 2)."""
    level = rating_levels(ratings)
    return set(level[given]) != set(level[label])


def ground_truth_page(
    items: np.ndarray, ratings: np.ndarray, catalogue: Catalogue, s: np.ndarray, near: Near
) -> tuple[np.ndarray, int]:
    """The best page of some items of one user (SPEC 2.2 steps 4 and 5; the paper's A.2).

    Rating levels from high to low, the unknown level last. Inside a level: first items of a leaf category
    that the page does not show yet, then higher s_i (unknown last), then smaller id. Of near-duplicates the
    higher one stays. Diversity acts within a level only: across levels it would break the coarse order.

    items, ratings (n,)    s (N,) from item_scores
    returns the page (<= n,) int64, best first, and how many items were removed as redundant
    """
    items = np.asarray(items, dtype=np.int64)
    level = rating_levels(ratings)
    score = rating_levels(np.asarray(s)[items])
    order = np.lexsort((items, -score, -level))
    item_list, level_list = items[order].tolist(), level[order].tolist()
    leaf = catalogue.leaf_id[items[order]].tolist()
    ordered: list[int] = []
    seen = {-1}  # an unknown leaf never counts as a new category
    start = 0
    while start < len(item_list):
        stop = start
        while stop < len(item_list) and level_list[stop] == level_list[start]:
            stop += 1
        fresh: list[int] = []  # of a category that the page does not show yet
        rest: list[int] = []
        for at in range(start, stop):
            (rest if leaf[at] in seen else fresh).append(item_list[at])
            seen.add(leaf[at])
        ordered += fresh + rest
        start = stop
    page: list[int] = []
    barred: set[int] = set()
    for item in ordered:
        if item not in barred:
            page.append(item)
            barred.update((item, *near.of(item).tolist()))
    return np.array(page, dtype=np.int64), len(ordered) - len(page)


class PageMaker:
    """Histories and ground-truth pages of a shop's train rows (SPEC 2.2)."""

    def __init__(self, shop: Shop, shrink: float = 0.0):
        self.catalogue, self.train = shop.catalogue, shop.csr("train")
        self.time = shop.time[shop.rows("train")]
        self.s = item_scores(shop, shrink)
        self.near = near_duplicates(shop.catalogue)
        # one for the history, one for the page
        self.users = np.flatnonzero(self.train.counts() > 1)

    def example(
        self, user: int, share: float, rng: np.random.Generator, longest: int | None = None
    ):
        """-> (items, ratings) of the history, and the page (item ids, best first, at most `longest`)."""
        items, ratings = self.train.of(user)
        given, label = split_history(items, ratings, share, rng)
        page, _ = ground_truth_page(items[label], ratings[label], self.catalogue, self.s, self.near)
        return (items[given], ratings[given]), page[:longest]

    def later(self, user: int, rng: np.random.Generator, longest: int | None = None):
        """`example` cut at a moment: what the user had before it, the page of what came after; and the moment (s) of
        the page's earliest item. Equal moments count in the order of the rows."""
        items, ratings = self.train.of(user)
        at = int(rng.integers(1, len(items)))
        page, _ = ground_truth_page(items[at:], ratings[at:], self.catalogue, self.s, self.near)
        return (
            (items[:at], ratings[:at]),
            page[:longest],
            int(self.time[self.train.indptr[user] + at]),
        )

    def clock(self, times: int) -> tuple[int, ...]:
        """times - 1 rising moments that cut the train rows into about equal parts; fewer where rows share a moment."""
        if times < 2:
            return ()
        return tuple(
            np.unique(np.quantile(self.time, np.arange(1, times) / times, method="higher")).tolist()
        )

    def single_level_share(self, share: float, seed: int) -> float:
        """Share of users with a rating level on one side of the split only (SPEC 2.2 step 2), over one draw."""
        alone = [
            single_level(
                self.train.of(u)[1],
                *split_history(*self.train.of(u), share, randomness.rng(seed, "levels", u)),
            )
            for u in self.users.tolist()
        ]
        return float(np.mean(alone))
