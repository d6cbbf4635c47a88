"""The edits of `pairs.py` for many pages at once: what each page's own generator would draw.

    rejected, edited, made = ranked(pages, stock, streams)

`pairs.py` has the same functions for a single page, to be read; a test says that both agree to the
last draw. All return (R, K) pages, (R, K) bool edited slots, and (R,) bool: False where a page
allows no such edit.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pagellm.data.shop import Catalogue, Shop
from pagellm.pages.energy import Near, near_duplicates
from pagellm.pages.stats import average_ranks
from pagellm.pages.truth import Ties, item_scores, popularity, rating_levels
from pagellm.stage.randomness import Streams

__all__ = [
    "Closest",
    "Pages",
    "Stock",
    "diversity",
    "ranked",
    "redundancy",
    "swapped_diversity",
    "swapped_redundancy",
]


MATCHES = 5  # a replacement is drawn from so many items, those nearest in popularity and s_i
NOBODY = np.zeros(0, dtype=np.int64)
FIRST = 64  # items looked at first in the search for them
Edits = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Stock:
    """What pair making needs of the catalogue, computed once from the train rows."""

    catalogue: Catalogue
    near: Near
    s: np.ndarray  # (N,) truth.item_scores
    weight: np.ndarray  # (N,) popularity ** 0.75: odds of an item to fill a rejected page
    level: np.ndarray  # (N,) s as truth.rating_levels has it
    coordinate: np.ndarray  # (2, N) in 0..1: popularity rank and s_i, to match replacements by
    by_leaf: list[np.ndarray]  # items of every leaf category
    ties: Ties  # the order of labels that nothing else tells apart
    flag: np.ndarray  # (N,) bool to work with, False between any two uses

    @classmethod
    def of(cls, shop: Shop, near: Near | None = None, shrink: float = 0.0) -> "Stock":
        catalogue, s, count = shop.catalogue, item_scores(shop, shrink), popularity(shop)
        order = np.argsort(catalogue.leaf_id, kind="stable")
        cuts = np.searchsorted(catalogue.leaf_id[order], np.arange(len(catalogue.leaf_names) + 1))
        known = ~np.isnan(s)
        middle = s[known].mean() if known.any() else 3.0
        rank = (len(count) - average_ranks(count)) / max(1, len(count) - 1)
        coordinate = np.stack([rank, (np.where(known, s, middle) - 1.0) / 4.0])
        return cls(
            catalogue,
            near or near_duplicates(catalogue),
            s,
            count**0.75,
            rating_levels(s),
            coordinate,
            [order[a:b] for a, b in zip(cuts, cuts[1:], strict=False)],
            Ties(shop.n_users, shop.n_items),
            np.zeros(shop.n_items, dtype=bool),
        )

    @cached_property
    def closest(self) -> "Closest":
        """Replacements of every item, nearest first."""
        return Closest(self.coordinate, np.concatenate([NOBODY, *self.by_leaf]))


@dataclass(frozen=True)
class Pages:
    """R pages of K slots at most."""

    item: np.ndarray  # (R, K) item ids, -1 in empty slots
    level: np.ndarray  # (R, K) rating of each slot, -inf where unknown
    leaf: np.ndarray  # (R, K) leaf category, -1 where unknown and in empty slots
    buyer: np.ndarray  # (R,) row of the page's user in free
    free: np.ndarray  # (B, N) bool: items that the user has not dealt with

    @property
    def length(self) -> np.ndarray:
        """(R,) slots of each page."""
        return (self.item >= 0).sum(1)


class Closest:
    """For an item, all items of a known category, nearest in popularity rank and s_i first.

    coordinate  (2, N), as in Stock; the distance is the sum of both differences
    order       (M,) items by category: of equally distant ones the first goes first
    """

    def __init__(self, coordinate: np.ndarray, order: np.ndarray):
        self.coordinate, self.order = coordinate, order
        self.known = np.zeros(coordinate.shape[1], dtype=bool)
        self.table = np.zeros((len(self.known), len(order)), dtype=np.int32)

    def to(self, items: np.ndarray) -> np.ndarray:
        """(N, M) items whose rows `items` are filled in."""
        for item in np.unique(items[~self.known[items]]).tolist():
            popular, liked = np.abs(self.coordinate[:, self.order] - self.coordinate[:, [item]])
            self.table[item] = self.order[np.argsort(popular + liked, kind="stable")]
            self.known[item] = True
        return self.table


def ragged(row: np.ndarray, value: np.ndarray, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Values as the beginnings of the rows of a table, and how many each has; row rises."""
    count = np.bincount(row, minlength=rows)
    table = np.zeros((rows, count.max(initial=0)), dtype=np.int64)
    table[row, np.arange(len(row)) - (np.cumsum(count) - count)[row]] = value
    return table, count


def swap(pages: Pages, worth: np.ndarray, streams: Streams, most: int) -> Edits:
    """Swap 1 to `most` disjoint pairs of positions a < b, drawn among those with worth[:, a, b].

    worth  (R, K, K) bool
    """
    R, K = pages.item.shape
    there = np.triu(np.ones((K, K), dtype=bool), 1) & (pages.item >= 0)[:, None]
    row, both = np.nonzero((worth & there).reshape(R, K * K))
    table, count = ragged(row, both, R)
    table = streams.permutation(table, count)
    left = 1 + streams.integers(np.where(count > 0, most, 1))
    rejected, edited = pages.item.copy(), np.zeros((R, K), dtype=bool)
    todo = np.flatnonzero(count)
    for at in range(table.shape[1]):
        if not len(todo):
            break
        a, b = np.divmod(table[todo, at], K)
        fresh = ~edited[todo, a] & ~edited[todo, b]
        r, a, b = todo[fresh], a[fresh], b[fresh]
        rejected[r, a], rejected[r, b] = rejected[r, b], rejected[r, a]
        edited[r, a] = edited[r, b] = True
        left[r] -= 1
        todo = todo[(left[todo] > 0) & (count[todo] > at + 1)]
    return rejected, edited, count > 0


def ranked(pages: Pages, stock: Stock, streams: Streams) -> Edits:
    """Swap 1 to 3 disjoint pairs of positions a < b where a has the better (rating, s_i)."""
    level, s = pages.level, stock.level[pages.item]
    worth = level[:, :, None] > level[:, None]
    worth |= (level[:, :, None] == level[:, None]) & (s[:, :, None] > s[:, None])
    return swap(pages, worth, streams, most=3)


def lonely(leaf: np.ndarray) -> np.ndarray:
    """(R, K) bool: slots that are the only one of their (known) leaf category."""
    return (leaf >= 0) & ((leaf[:, :, None] == leaf[:, None]).sum(2) == 1)


def swapped_diversity(pages: Pages, stock: Stock, streams: Streams) -> Edits:
    """Swap the only item of a category with a later item of a shared category."""
    alone = lonely(pages.leaf)
    return swap(pages, alone[:, :, None] & ~alone[:, None], streams, most=1)


def swapped_redundancy(pages: Pages, stock: Stock, streams: Streams) -> Edits:
    """Swap an item upwards, to below another item of its own category."""
    leaf = pages.leaf
    same = (leaf[:, :, None] == leaf[:, None]) & (leaf >= 0)[:, None]
    return swap(pages, (np.cumsum(same, axis=1) > 0) & ~same, streams, most=1)


def replaced(pages: Pages, slot: np.ndarray, item: np.ndarray, made: np.ndarray) -> Edits:
    """The edits that put `item` into `slot`, both (R,)."""
    R, K = pages.item.shape
    edited = (np.arange(K) == slot[:, None]) & made[:, None]
    return np.where(edited, item[:, None], pages.item), edited, made


def near_of(pages: Pages, stock: Stock, above_last: bool) -> tuple[np.ndarray, ...]:
    """Row, slot and item of all near-duplicates of the pages' items, in reading order.

    above_last  leave out those of the last slot
    """
    there = pages.item >= 0
    if above_last:
        there &= np.arange(there.shape[1]) < (pages.length - 1)[:, None]
    row, slot = np.nonzero(there)
    begin = stock.near.indptr[pages.item[row, slot]]
    degree = stock.near.indptr[pages.item[row, slot] + 1] - begin
    of = np.repeat(np.arange(len(row)), degree)
    within = np.arange(len(of)) - np.repeat(np.cumsum(degree) - degree, degree)
    return row[of], slot[of], stock.near.neighbour[begin[of] + within]


def diversity(pages: Pages, stock: Stock, streams: Streams) -> Edits:
    """Replace the only item of a category by an unseen one of a category that is on the page.

    The new item is drawn from the MATCHES nearest ones.
    """
    R, every = len(pages.item), np.arange(len(pages.item))
    row, at = np.nonzero(lonely(pages.leaf))
    table, count = ragged(row, at, R)
    some = count > 0
    slot, drawn = np.zeros(R, dtype=np.int64), streams.integers(np.maximum(count, 1))
    slot[some] = table[some, drawn[some]]
    old = pages.item[every, slot]
    wanted = np.zeros((R, len(stock.by_leaf) + 1), dtype=bool)
    wanted[every[:, None], pages.leaf] = True
    wanted[every, pages.leaf[every, slot]] = False
    wanted[:, -1] = False  # leaf -1: unknown, or no slot
    barred = np.zeros((R, len(stock.level)), dtype=bool)
    row, _, item = near_of(pages, stock, above_last=False)
    barred[row, item] = True
    found, number = np.zeros((R, MATCHES), dtype=np.int64), np.zeros(R, dtype=np.int64)
    todo, width = np.flatnonzero(some & wanted.any(1)), FIRST
    closest = stock.closest.to(old[todo])
    while len(todo):
        near = closest[old[todo], :width]
        fits = pages.free[pages.buyer[todo][:, None], near] & ~barred[todo[:, None], near]
        fits &= wanted[todo[:, None], stock.catalogue.leaf_id[near]]
        place = np.cumsum(fits, axis=1)
        number[todo] = np.minimum(place[:, -1], MATCHES)
        row, at = np.nonzero(fits & (place <= MATCHES))
        found[todo[row], place[row, at] - 1] = near[row, at]
        todo = todo[number[todo] < MATCHES] if width < closest.shape[1] else todo[:0]
        width *= 8
    drawn = streams.integers(np.maximum(number, 1))
    return replaced(pages, slot, found[every, drawn], number > 0)


def redundancy(pages: Pages, stock: Stock, streams: Streams) -> Edits:
    """Replace an item by an unseen near-duplicate of an item above it."""
    R = len(pages.item)
    row, slot, copy = near_of(pages, stock, above_last=True)
    free = pages.free[pages.buyer[row], copy]
    first, count = ragged(row[free], np.flatnonzero(free), R)
    made = count > 0
    drawn = streams.integers(np.maximum(count, 1))
    which = first[made, drawn[made]]
    above, item = np.zeros(R, dtype=np.int64), np.zeros(R, dtype=np.int64)
    above[made], item[made] = slot[which], copy[which]
    below = streams.integers(np.where(made, pages.length - above - 1, 1))
    return replaced(pages, above + 1 + below, item, made)
