"""Near-duplicate items, the gain of an item, and the energy E of a page.

    near = near_duplicates(shop.catalogue)
    energy(page, gain(ratings_on_page, s[page]), shop.catalogue.leaf_id, near)

E is a value: higher is better. The paper's "potential energy", which it leaves undefined, is -E.
"""

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from pagellm.data.shop import Catalogue, Rows

__all__ = [
    "LAMBDA_D",
    "LAMBDA_R",
    "Move",
    "Near",
    "cosine_pairs",
    "energy",
    "feedback",
    "gain",
    "gains",
    "near_duplicates",
    "page_energy",
]


LAMBDA_D = 0.3  # added for a slot whose category stands nowhere above it
LAMBDA_R = 0.3  # subtracted for a slot that repeats an item above it


@dataclass(frozen=True)
class Near:
    """The relation "near-duplicate of": symmetric, not transitive, and no item is one of itself.

    indptr (N + 1,), neighbour (E,) int64: the near-duplicates of item i are
    neighbour[indptr[i] : indptr[i + 1]], rising
    group  (N,) int64: the smallest item reachable over near-duplicates; i itself if it has none
    """

    indptr: np.ndarray
    neighbour: np.ndarray
    group: np.ndarray

    @classmethod
    def of_pairs(cls, pairs: np.ndarray, n_items: int) -> "Near":
        """From (E, 2) pairs of different items, in any order, also repeated."""
        pairs = np.asarray(pairs, dtype=np.int64).reshape(-1, 2)
        both = np.unique(np.concatenate([pairs, pairs[:, ::-1]]), axis=0)
        indptr = np.zeros(n_items + 1, dtype=np.int64)
        np.cumsum(np.bincount(both[:, 0], minlength=n_items), out=indptr[1:])
        return cls(indptr, both[:, 1].copy(), components(both, n_items))

    def __len__(self) -> int:
        return len(self.group)

    def of(self, item: int) -> np.ndarray:
        """The near-duplicates of one item, by rising id."""
        return self.neighbour[self.indptr[item] : self.indptr[item + 1]]

    @cached_property
    def lists(self) -> tuple[list[int], list[int]]:
        """indptr and neighbour as lists: a loop over single items reads these much faster."""
        return self.indptr.tolist(), self.neighbour.tolist()


def components(both: np.ndarray, n_items: int) -> np.ndarray:
    """(N,) smallest item of each item's connected component; pairs (E, 2) hold both directions."""
    group = np.arange(n_items, dtype=np.int64)
    while len(both):
        lower = group.copy()
        np.minimum.at(lower, both[:, 0], group[both[:, 1]])
        lower = lower[lower]  # pointer jumping: a chain of length n takes about log n rounds
        if np.array_equal(lower, group):
            break
        group = lower
    return group


def near_duplicates(
    catalogue: Catalogue,
    embedding: np.ndarray | None = None,
    jaccard: float = 0.8,
    cosine: float = 0.95,
) -> Near:
    """Find all near-duplicate items.

    Two items are near-duplicates if they have the same brand and the same leaf category, both
    known, and the Jaccard index of their title tokens is at least `jaccard`; or if the cosine of
    their embeddings is at least `cosine`. The tokens are the distinct lower-case words and numbers
    of a title. An item without a title, or with an embedding of length 0, has no near-duplicates by
    that rule.

    embedding  (N, d) finite float, or None: titles alone
    jaccard    in (0, 1]
    cosine     in (0, 1]

    Raises ValueError on an embedding of another shape or a threshold outside (0, 1].
    """
    if not (0 < jaccard <= 1 and 0 < cosine <= 1):
        raise ValueError(
            f"near_duplicates: jaccard={jaccard}, cosine={cosine}: want both above 0, at most 1"
        )
    pairs = [title_pairs(catalogue, jaccard)]
    if embedding is not None:
        embedding = np.asarray(embedding, dtype=np.float32)
        if (
            embedding.ndim != 2
            or len(embedding) != len(catalogue)
            or not np.isfinite(embedding).all()
        ):
            raise ValueError(
                f"near_duplicates: embedding {embedding.shape}: "
                f"want ({len(catalogue)}, d), all finite"
            )
        pairs.append(cosine_pairs(embedding, cosine))
    return Near.of_pairs(np.concatenate(pairs), len(catalogue))


def title_pairs(catalogue: Catalogue, threshold: float) -> np.ndarray:
    """(E, 2) items of one brand and leaf category whose title tokens have Jaccard >= threshold.

    Exact, and nearly linear in N by a prefix filter: two sets with Jaccard >= t share at least
    ceil(t |A|) tokens. With all tokens in one fixed order they therefore share one among the first
    |A| - ceil(t |A|) + 1 of A. The order is rarest first, which makes the candidate lists short.
    """
    brand, leaf = catalogue.brand_id.tolist(), catalogue.leaf_id.tolist()
    tokens = {
        i: set(re.findall(r"\w+", title.lower()))
        for i, title in enumerate(catalogue.title)
        if brand[i] >= 0 and leaf[i] >= 0
    }
    frequency: dict[str, int] = defaultdict(int)
    for words in tokens.values():
        for word in words:
            frequency[word] += 1
    index: dict[tuple, list[int]] = defaultdict(list)
    found = []
    for i, words in tokens.items():
        need = math.ceil(threshold * len(words) - 1e-9)  # 0.8 * 5 may round above 4
        prefix = sorted(words, key=lambda word: (frequency[word], word))[: len(words) - need + 1]
        keys = [(brand[i], leaf[i], word) for word in prefix]
        for j in {j for key in keys for j in index[key]}:
            common = len(words & tokens[j])
            if common / (len(words) + len(tokens[j]) - common) >= threshold:
                found.append((j, i))
        for key in keys:
            index[key].append(i)
    return np.array(found, dtype=np.int64).reshape(-1, 2)


def cosine_pairs(embedding: np.ndarray, threshold: float, block: int = 1024) -> np.ndarray:
    """(E, 2) rows i < j of embedding (N, d) with cosine >= threshold, `block` rows at a time."""
    length = np.linalg.norm(embedding, axis=1, keepdims=True)
    unit = np.divide(embedding, length, out=np.zeros_like(embedding), where=length > 0)
    found = [np.zeros((0, 2), dtype=np.int64)]
    for start in range(0, len(unit), block):
        row, column = np.nonzero(unit[start : start + block] @ unit[start:].T >= threshold)
        found.append(np.stack([row, column], 1)[column > row] + start)
    return np.concatenate(found)


def gain(rating: np.ndarray, s: np.ndarray, implicit_gain: float = 1.0) -> np.ndarray:
    """Gain g of items that the user has rated or chosen:  g = (r - 3) + 0.5 (s_i - 1) / 4.

    rating         (...) r from 1 to 5; NaN where the user chose the item without a rating
    s              (...) mean rating of each item, from truth.item_scores; NaN adds nothing
    implicit_gain  stands for r - 3 where the rating is NaN. Only the energy uses it: no rating is
                   made up
    returns        (...) float64

    An item that the user has nothing to do with has gain 0: see `gains`.
    """
    rating, s = np.asarray(rating, dtype=np.float64), np.asarray(s, dtype=np.float64)
    coarse = np.where(np.isnan(rating), implicit_gain, rating - 3.0)
    return coarse + np.where(np.isnan(s), 0.0, 0.5 * (s - 1.0) / 4.0)


def gains(
    users: np.ndarray, pages: np.ndarray, rows: Rows, s: np.ndarray, implicit_gain: float = 1.0
) -> np.ndarray:
    """Gain of every slot, looked up in the users' known ratings.

    users    (B,) int
    pages    (B, K) int item ids, -1 in empty slots
    rows     the ratings to look up, of all users
    s        (N,) from truth.item_scores
    returns  (B, K) float64; 0 for items that are not among the user's rows, and for empty slots
    """
    n_items = len(s)
    code = np.repeat(np.arange(len(rows.indptr) - 1), rows.counts()) * n_items + rows.items
    order = np.argsort(code)
    want = np.asarray(users)[:, None] * n_items + pages
    if len(code) == 0:
        return np.zeros(pages.shape)
    at = np.minimum(np.searchsorted(code, want, sorter=order), len(code) - 1)
    found = (pages >= 0) & (code[order[at]] == want)
    value = gain(rows.ratings, s[rows.items], implicit_gain)
    return np.where(found, value[order[at]], 0.0)


def energy(
    page: Sequence[int],
    gain: Sequence[float],
    leaf: Sequence[int] | np.ndarray,
    near: Near,
    lambda_d: float = LAMBDA_D,
    lambda_r: float = LAMBDA_R,
) -> float:
    """Energy E of one page, slot by slot; higher is better.

        E = sum_k d_k (g_k + lambda_d nov_k - lambda_r red_k)        d_k = 1 / log2(k + 1), k from 1

        nov_k = 1 if the item's leaf category is known and stands nowhere above, else 0
        red_k = 1 if an item above is the same or a near-duplicate, else 0

    page  (K,) item ids, best first
    gain  (K,) g_k of each slot
    leaf  (N,) leaf category of every item, -1 if unknown
    """
    total, leaves, repeats = 0.0, {-1}, set()
    indptr, neighbour = near.lists
    for k, (item, g) in enumerate(zip(page, gain, strict=True), start=1):
        item = int(item)
        category = int(leaf[item])
        novel, redundant = category not in leaves, item in repeats
        total += (float(g) + lambda_d * novel - lambda_r * redundant) / math.log2(k + 1)
        leaves.add(category)
        repeats.add(item)
        repeats.update(neighbour[indptr[item] : indptr[item + 1]])
    return total


def page_energy(
    pages: np.ndarray,
    mask: np.ndarray,
    gain: np.ndarray,
    leaf: np.ndarray,
    near: Near,
    lambda_d: float = LAMBDA_D,
    lambda_r: float = LAMBDA_R,
    log2: np.ndarray | None = None,
) -> np.ndarray:
    """`energy` of a batch of pages, without a loop over pages or slots.

    pages    (B, K) int
    mask     (B, K) bool, True on the slots of each page: True, then False
    gain     (B, K) float; where the mask is False, pages and gain may hold anything
    leaf     (N,) int, -1 if unknown
    log2     (K,) log2(k + 1) of slot k; None: NumPy's. With math.log2 every bit is that of `energy`
    returns  (B,) float64; 0 for an empty page

    Raises ValueError on unequal shapes or a mask with a hole.
    """
    pages, mask, gain = (
        np.asarray(pages),
        np.asarray(mask, dtype=bool),
        np.asarray(gain, dtype=np.float64),
    )
    if not pages.shape == mask.shape == gain.shape or pages.ndim != 2:
        raise ValueError(
            f"page_energy: pages {pages.shape}, mask {mask.shape}, gain {gain.shape}: "
            "want one (B, K)"
        )
    if (mask[:, 1:] & ~mask[:, :-1]).any():
        raise ValueError("page_energy: mask has a hole; every row must be True, then False")
    row, slot = np.nonzero(mask)  # in reading order: by page, then from the top
    item = pages[row, slot]
    worth = (
        gain[row, slot]
        + lambda_d * novel_slots(row, np.asarray(leaf)[item])
        - lambda_r * redundant_slots(row, item, near)
    )
    discount = np.log2(slot + 2.0) if log2 is None else log2[slot]
    return np.bincount(row, weights=worth / discount, minlength=len(pages))


def novel_slots(row: np.ndarray, leaf: np.ndarray) -> np.ndarray:
    """(S,) bool of slots in reading order: first of its page with this leaf; False for leaf -1."""
    base = leaf.max(initial=0) + 2
    novel = np.zeros(len(row), dtype=bool)
    novel[np.unique(row * base + leaf + 1, return_index=True)[1]] = True
    return novel & (leaf >= 0)


def redundant_slots(row: np.ndarray, item: np.ndarray, near: Near) -> np.ndarray:
    """(S,) bool of slots in reading order: the same item or a near-duplicate stands above it."""
    code, first = np.unique(row * len(near) + item, return_index=True)
    redundant = np.ones(len(row), dtype=bool)
    redundant[first] = False
    redundant[near_above(row, item, near, code, first)[1]] = True
    return redundant


def near_above(
    row: np.ndarray, item: np.ndarray, near: Near, code: np.ndarray, first: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """above, below (E,): two slots (S,) in reading order of one page that hold near-duplicates.

    code, first  np.unique of row * len(near) + item, with its return_index
    """
    begin, degree = near.indptr[item], near.indptr[item + 1] - near.indptr[item]
    slot = np.repeat(np.arange(len(item)), degree)
    within = np.arange(len(slot)) - np.repeat(np.cumsum(degree) - degree, degree)
    want = row[slot] * len(near) + near.neighbour[begin[slot] + within]
    at = np.minimum(np.searchsorted(code, want), len(code) - 1)
    found = (code[at] == want) & (first[at] < slot)
    return first[at[found]], slot[found]


class Move(NamedTuple):
    """One element of the feedback set F (the paper's Eq. 13), from `feedback`; no stage uses it.

    Moving `item` from slot k to slot k2 (both from 1) changes the page's energy by delta_E.
    """

    item: int
    k: int
    k2: int
    delta_E: float


def feedback(
    page: Sequence[int],
    gain: Sequence[float],
    leaf: np.ndarray,
    near: Near,
    reach: int = 5,
    beneficial_only: bool = False,
) -> list[Move]:
    """The feedback set F of one page (the paper's Eq. 13): every move of one item that changes E.

    No stage uses it: the reward model learns from pairs of pages (pairs.py).

    A move takes an item out of its slot and puts it back at most `reach` slots away; the items
    between shift by one. Section 3 of the paper keeps the beneficial moves only, Eq. 13 those of
    either sign.

    page, gain, leaf  as in `energy`
    beneficial_only   leave out the moves that lower E
    """
    items, worth = np.asarray(page, dtype=np.int64), np.asarray(gain, dtype=np.float64)
    length = len(items)
    moves = [(k, k2) for k in range(length) for k2 in range(length) if 0 < abs(k - k2) <= reach]
    order = np.array(
        [np.insert(np.delete(np.arange(length), k), k2, k) for k, k2 in moves], dtype=np.int64
    )
    order = np.concatenate([np.arange(length)[None], order.reshape(-1, length)])
    value = page_energy(items[order], np.ones(order.shape, dtype=bool), worth[order], leaf, near)
    delta = value[1:] - value[0]
    return [
        Move(int(items[k]), k + 1, k2 + 1, float(change))
        for (k, k2), change in zip(moves, delta, strict=True)
        # a change below 1e-12 is rounding
        if abs(change) > 1e-12 and (change > 0 or not beneficial_only)
    ]
