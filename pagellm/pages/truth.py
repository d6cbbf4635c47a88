"""Ground-truth pages (appendix A.2 of arXiv 2506.09084): the best page for some items of one user.

    s, near = item_scores(shop), near_duplicates(shop.catalogue)
    given, label = split_history(items, ratings, 0.2, rng)     # of one user's liked train items
    tie = Ties(shop.n_users, shop.n_items).of(user, items[label])
    page, removed = ground_truth_page(items[label], ratings[label], shop.catalogue, s, near, tie)

Everything here reads train rows only.
"""

import math

import numpy as np

from pagellm.data.shop import Catalogue, Shop
from pagellm.pages.energy import Near, near_duplicates
from pagellm.stage import randomness

__all__ = [
    "PageMaker",
    "Ties",
    "best_first",
    "draw_labels",
    "ground_truth_page",
    "item_scores",
    "label_counts",
    "level_members",
    "page_of",
    "popularity",
    "rating_levels",
    "single_level",
    "split_history",
]


def popularity(shop: Shop) -> np.ndarray:
    """(N,) int64: number of train rows of every item, liked or not."""
    return np.bincount(shop.csr("train", positive=None).items, minlength=shop.n_items)


def item_scores(shop: Shop, shrink: float = 0.0) -> np.ndarray:
    """The score s_i of every item: the mean of its train ratings over all raters.

    shrink   m in (sum of ratings + m mu) / (n_i + m), where n_i is the number of raters and mu the
             mean of all train ratings. It pulls items with few raters towards mu
    returns  (N,) float64 in rating units. NaN for an item without ratings, whatever shrink is

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
    """Ratings as numbers to sort by: NaN (unknown) becomes -inf, one level below all known ones."""
    ratings = np.asarray(ratings, dtype=np.float64)
    return np.where(np.isnan(ratings), -np.inf, ratings)


def split_history(
    items: np.ndarray, ratings: np.ndarray, share: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Split one user's liked items into input and labels, at random within each rating level.

    Of a level with m items, max(1, round(share * m)) become labels, but never all of them: a level
    of one item is all input. If no level gives a label, one random item becomes the label.

    items    (n,) item ids
    ratings  (n,) float; items of unknown rating (NaN) form one level of their own
    share    share of the items that become labels, between 0 and 1
    returns  given, label: two sorted index arrays into items, which together hold 0 to n - 1. They
             are sorted, so that a history keeps its order

    Raises ValueError on no items, unequal lengths, or a share outside (0, 1).
    """
    if len(items) == 0 or len(items) != len(ratings):
        raise ValueError(
            f"split_history: {len(items)} items, {len(ratings)} ratings: want both, as many"
        )
    if not 0 < share < 1:
        raise ValueError(f"split_history: share={share}, want it between 0 and 1")
    chosen, members = np.zeros(len(items), dtype=bool), level_members(ratings)
    draw_labels(chosen, members, label_counts(members, share), rng)
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


def level_members(ratings: np.ndarray) -> list[np.ndarray]:
    """Places of the ratings (n,) of each level, levels rising, the unknown first."""
    level = rating_levels(ratings)
    return [np.flatnonzero(level == value) for value in sorted(set(level.tolist()))]


def label_counts(members: list[np.ndarray], share: float) -> list[int]:
    """How many items of each level become labels; members from `level_members`."""
    return [
        min(max(1, math.floor(share * len(places) + 0.5)), len(places) - 1) for places in members
    ]


def draw_labels(
    chosen: np.ndarray, members: list[np.ndarray], counts: list[int], rng: np.random.Generator
) -> None:
    """Set the labels that `split_history` draws in chosen (n,) bool, where all are False."""
    for places, count in zip(members, counts, strict=True):
        if count:
            chosen[rng.permutation(places)[:count]] = True
    if not any(counts):
        chosen[rng.integers(len(chosen))] = True


def single_level(ratings: np.ndarray, given: np.ndarray, label: np.ndarray) -> bool:
    """Whether some rating level occurs on one side of the split only.

    ratings (n,) of one user; given, label as split_history returns them
    """
    level = rating_levels(ratings)
    return set(level[given]) != set(level[label])


class Ties:
    """Breaks ties between equally good items by a random order, drawn for every user.

    Shops without ratings have many ties. If the item id broke them, ids would decide the order of
    the pages that a policy learns from, and which items are cut off.
    """

    def __init__(self, n_users: int, n_items: int, seed: int = 0):
        draw = randomness.rng(seed, "truth", "ties")
        self.item, self.user = (
            draw.integers(2**64, size=n, dtype=np.uint64) for n in (n_items, n_users)
        )

    def of(self, user: int, items: np.ndarray) -> np.ndarray:
        """(n,) uint64: one number per item, all different for a user; smaller ones go first.

        The item's and the user's random numbers are mixed, so that every user has another order.
        Source: the finaliser of SplitMix64, Steele et al., OOPSLA 2014.
        """
        x = self.item[items] ^ self.user[user]
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def ground_truth_page(
    items: np.ndarray,
    ratings: np.ndarray,
    catalogue: Catalogue,
    s: np.ndarray,
    near: Near,
    tie: np.ndarray,
) -> tuple[np.ndarray, int]:
    """The best page that some items of one user make (the paper's appendix A.2).

    Items are ordered by rating, highest first, unknown ratings last. Within one rating level:

    1. items whose leaf category the page does not show yet come before the others;
    2. then higher s_i come first (unknown last);
    3. then smaller `tie` come first.

    Diversity counts within a level only; otherwise it would put worse items before better ones. Of
    near-duplicates only the highest one stays.

    items    (n,) item ids
    ratings  (n,) float, NaN where unknown
    s        (N,) from item_scores
    tie      (n,) from Ties
    returns  the page, (n or fewer,) int64, best first; and the number of items removed as redundant
    """
    items = np.asarray(items, dtype=np.int64)
    level, order = rating_levels(ratings), best_first(items, ratings, s, tie)
    ordered = items[order]
    page = page_of(
        ordered.tolist(), level[order].tolist(), catalogue.leaf_id[ordered].tolist(), near
    )
    return np.array(page, dtype=np.int64), len(items) - len(page)


def best_first(
    items: np.ndarray, ratings: np.ndarray, s: np.ndarray, tie: np.ndarray
) -> np.ndarray:
    """(n,) places of items by rating, s_i and tie, best first; of some of them it is their order.

    Arguments as in `ground_truth_page`.
    """
    score = rating_levels(np.asarray(s)[items])
    return np.lexsort((tie, -score, -rating_levels(ratings)))


def page_of(
    item_list: list[int], level_list: list[float], leaf: list[int], near: Near
) -> list[int]:
    """The page of `ground_truth_page` from items in the order of `best_first`, with their rating
    level and leaf category.
    """
    ordered: list[int] = []
    seen = {-1}  # an unknown leaf category (-1) never counts as new
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
    indptr, neighbour = near.lists
    for item in ordered:
        if item not in barred:
            page.append(item)
            barred.add(item)
            barred.update(neighbour[indptr[item] : indptr[item + 1]])
    return page


class PageMaker:
    """Draws training examples from a shop's train rows: a history and its ground-truth page.

    users  (U,) users with at least two liked train items: one for the history, one for the page
    """

    def __init__(self, shop: Shop, shrink: float = 0.0):
        self.catalogue, self.train = shop.catalogue, shop.csr("train")
        self.time = shop.time[shop.rows("train")]
        self.s = item_scores(shop, shrink)
        self.near = near_duplicates(shop.catalogue)
        self.ties = Ties(shop.n_users, shop.n_items)
        self.users = np.flatnonzero(self.train.counts() > 1)

    def example(
        self, user: int, share: float, rng: np.random.Generator, longest: int | None = None
    ):
        """One random example of a user: (items, ratings) of the history, and the page of the rest.

        share    of the user's liked items that go to the page
        longest  slots of the page at most
        """
        items, ratings = self.train.of(user)
        given, label = split_history(items, ratings, share, rng)
        page = self.page(user, items[label], ratings[label])
        return (items[given], ratings[given]), page[:longest]

    def later(self, user: int, rng: np.random.Generator, longest: int | None = None):
        """`example`, but split in time: the history is what the user liked before a random point.

        returns  (items, ratings) of the history, the page of what came after, and the time of the
                 page's earliest item in seconds. Rows of equal time count in their order
        """
        items, ratings = self.train.of(user)
        at = int(rng.integers(1, len(items)))
        page = self.page(user, items[at:], ratings[at:])
        return (
            (items[:at], ratings[:at]),
            page[:longest],
            int(self.time[self.train.indptr[user] + at]),
        )

    def page(self, user: int, items: np.ndarray, ratings: np.ndarray) -> np.ndarray:
        """The best page of some of a user's items."""
        tie = self.ties.of(user, items)
        return ground_truth_page(items, ratings, self.catalogue, self.s, self.near, tie)[0]

    def clock(self, times: int) -> tuple[int, ...]:
        """times - 1 increasing times, in seconds, that cut the train rows into about equal parts.

        Fewer where many rows have the same time.
        """
        if times < 2:
            return ()
        return tuple(
            np.unique(np.quantile(self.time, np.arange(1, times) / times, method="higher")).tolist()
        )

    def single_level_share(self, share: float, seed: int) -> float:
        """Share of users for whom one random split leaves some rating level on one side only."""
        alone = [
            single_level(
                self.train.of(u)[1],
                *split_history(*self.train.of(u), share, randomness.rng(seed, "levels", u)),
            )
            for u in self.users.tolist()
        ]
        return float(np.mean(alone))
