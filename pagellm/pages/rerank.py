"""Re-ranking: from a list of candidates to a page that is relevant and varied. Numpy only.

    kin = Kin.of(shop.catalogue)
    page = reranked(ranked, kin, k=20, method="mmr", strength=0.1)      # RankedPages in and out

Each method fills the slots one after another, for many users at once. Each slot takes the
candidate with the highest value given the items above it:

    mmr     rel_i - strength * (largest similarity to an item above)
            maximal marginal relevance, Carbonell & Goldstein, SIGIR 1998
    dpp     the item that makes log det L of the page grow most, L = diag(q) S diag(q),
            q = exp(rel / strength); fast greedy MAP, Chen, Zhang & Zhou, NeurIPS 2018
    energy  rel_i + strength * (LAMBDA_D novel_i - LAMBDA_R redundant_i)
            the page energy of pages/energy.py, maximised greedily

At strength 0 every method leaves the order as it is. `choose` picks a strength by
validation scores.

Shapes: U users, M candidates of a user, K slots of a page, N items.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pagellm.data.shop import Catalogue
from pagellm.pages.energy import LAMBDA_D, LAMBDA_R, Near, near_duplicates
from pagellm.pages.metrics import Described, described
from pagellm.pages.ranked import RankedPages

__all__ = [
    "METHODS",
    "STRENGTHS",
    "Kin",
    "choose",
    "dpp",
    "energy",
    "mmr",
    "placed",
    "relevance",
    "reranked",
    "sort_page",
]

BLOCK = 100_000  # numbers in the largest arrays held at once, so that they stay in the cache
SETS = 2048  # different sets of categories up to which all their similarities are kept: 32 MB
# Share of a DPP kernel that is the identity, so that two items of one kind are not quite the same.
OWN = 0.01


@dataclass(frozen=True)
class Kin:
    """How similar items are.

    kinds  the categories of every item as numbers (metrics.described)
    group  (N,) near-duplicate group; items of one group have similarity 1
    leaf   (N,) leaf category, -1 if unknown
    near   which items nearly repeat which
    """

    kinds: Described
    group: np.ndarray
    leaf: np.ndarray
    near: Near

    @classmethod
    def of(cls, catalogue: Catalogue, near: Near | None = None) -> "Kin":
        near = near_duplicates(catalogue) if near is None else near
        return cls(described(catalogue.categories), near.group, catalogue.leaf_id, near)

    @cached_property
    def sets(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Which set of categories every item has, (N + 1,), and the Jaccard similarity of any two
        sets, (S, S) float64, 0 for two empty ones. None where there are more than SETS of them."""
        if self.kinds.table.shape[1] == 0:
            return np.zeros(len(self.kinds.table), np.int64), np.zeros((1, 1))
        sets, of = np.unique(np.sort(self.kinds.table, axis=1), axis=0, return_inverse=True)
        if len(sets) > SETS:
            return None
        has = np.zeros((len(sets), self.kinds.known + 1), np.float32)
        np.put_along_axis(has, sets, 1.0, axis=1)  # -1, no category, is the last column
        has[:, -1] = 0.0
        both, size = has @ has.T, has.sum(1)
        union = np.maximum(size[:, None] + size - both, 1.0)
        return of.reshape(-1), both.astype(np.float64) / union

    def similarity(self, item: np.ndarray, other: np.ndarray) -> np.ndarray:
        """Jaccard similarity of category sets; 1 for two items of one near-duplicate group.

        Two different items without categories have similarity 0.

        item (B, M), other (B,) item ids -> (B, M) float64 in 0..1
        """
        same = self.group[item] == self.group[other][:, None]
        if self.sets is not None:
            of, like = self.sets
            return np.where(same, 1.0, like.take(of[other][:, None] * len(like) + of[item]))
        table, size = self.kinds.table, self.kinds.size
        mine, theirs = table[item], table[other]  # (B, M, m), (B, m)
        both = np.zeros(item.shape, np.int64)
        for c in theirs.T:
            both += ((mine == c[:, None, None]) & (c >= 0)[:, None, None]).any(2)
        union = size[item] + size[other][:, None] - both
        return np.where(same, 1.0, both / np.maximum(union, 1))


def relevance(item: np.ndarray, score: np.ndarray) -> np.ndarray:
    """Scores of each user's candidates, stretched to 0..1; a user whose scores are all equal has 1.

    item   (U, M), -1 where there is no candidate; the relevance is then -inf
    score  (U, M) float, higher is better
    returns (U, M) float64
    """
    there = item >= 0
    low = np.where(there, score, np.inf).min(1, keepdims=True, initial=np.inf)
    high = np.where(there, score, -np.inf).max(1, keepdims=True, initial=-np.inf)
    width = np.where(high > low, high - low, 1.0)
    with np.errstate(invalid="ignore"):
        return np.where(there, np.where(high > low, (score - low) / width, 1.0), -np.inf)


def mmr(item: np.ndarray, rel: np.ndarray, kin: Kin, k: int, strength: float) -> np.ndarray:
    """Maximal marginal relevance: rel_i - strength * (largest similarity to an item above).

    The paper's lambda is 1 / (1 + strength). Of equal candidates the one further left goes first.

    item     (U, M) int, -1 where there is no candidate
    rel      (U, M) float, on any scale
    returns  (U, min(k, M)) int64: the column that fills each slot, -1 past the last candidate
    """

    def fill(item: np.ndarray, rel: np.ndarray) -> np.ndarray:
        most = np.zeros(rel.shape)

        def after(chosen: np.ndarray, _: np.ndarray) -> np.ndarray:
            np.maximum(most, kin.similarity(item, chosen), out=most)
            return rel - strength * most

        return fill_slots(item, rel, k, after)

    return in_blocks(fill, item, rel)


def energy(item: np.ndarray, rel: np.ndarray, kin: Kin, k: int, strength: float) -> np.ndarray:
    """Greedy page energy: rel_i + strength * (LAMBDA_D novel_i - LAMBDA_R redundant_i).

    An item is novel if its leaf category is known and stands on no slot above. It is redundant if
    an item above nearly repeats it. Arguments and result as in `mmr`.
    """
    width = max(1, int(np.diff(kin.near.indptr).max(initial=0)))
    at = kin.near.indptr[:-1, None] + np.arange(width)
    neighbour = np.append(kin.near.neighbour, -1)[np.minimum(at, len(kin.near.neighbour))]
    twins = np.where(at < kin.near.indptr[1:, None], neighbour, -1)

    def fill(item: np.ndarray, rel: np.ndarray) -> np.ndarray:
        leaf = kin.leaf[item]
        bonus = LAMBDA_D * (leaf >= 0)
        malus = np.zeros(rel.shape)

        def after(chosen: np.ndarray, _: np.ndarray) -> np.ndarray:
            bonus[leaf == kin.leaf[chosen][:, None]] = 0.0
            for twin in twins[chosen].T:
                malus[(item == twin[:, None]) & (twin >= 0)[:, None]] = LAMBDA_R
            return rel + strength * (bonus - malus)

        return fill_slots(item, rel + strength * bonus, k, after)

    return in_blocks(fill, item, rel)


def dpp(item: np.ndarray, rel: np.ndarray, kin: Kin, k: int, strength: float) -> np.ndarray:
    """Fast greedy MAP of a determinantal point process with kernel L = diag(q) S diag(q).

    q = exp(rel / strength); S is the similarity, mixed with OWN of the identity. Each slot takes
    the item that makes log det L of the page grow most, by 2 rel_i / strength + log d_i^2. d_i^2 is
    the part of S_ii that the items above do not explain. Arguments and result as in `mmr`.
    """
    if strength == 0:
        return mmr(item, rel, kin, k, 0.0)

    def fill(item: np.ndarray, rel: np.ndarray) -> np.ndarray:
        B, M = rel.shape
        left = np.ones((B, M))  # d_i^2
        factor = np.zeros((B, M, min(k, M)))  # row i of the Cholesky factor
        rows, step = np.arange(B), 0

        def value() -> np.ndarray:
            return rel + 0.5 * strength * np.log(np.maximum(left, 1e-12))

        def after(chosen: np.ndarray, column: np.ndarray) -> np.ndarray:
            nonlocal step
            S = (1 - OWN) * kin.similarity(item, chosen)
            S[rows, column] = 1.0
            root = np.sqrt(np.maximum(left[rows, column], 1e-12))[:, None]
            e = (S - np.einsum("bs,bms->bm", factor[rows, column], factor)) / root
            factor[:, :, step] = e
            step += 1
            np.maximum(left - e * e, 0.0, out=left)
            return value()

        return fill_slots(item, value(), k, after)

    return in_blocks(fill, item, rel)


def fill_slots(
    item: np.ndarray,
    value: np.ndarray,
    k: int,
    after: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> np.ndarray:
    """Fill slot after slot with the free candidate of largest value.

    after   (item chosen (B,), its column (B,)) -> the new values (B, M). For a user without a free
            candidate it is given the first column.
    returns (B, min(k, M)) int64 columns, -1 past the last candidate
    """
    free, rows = item >= 0, np.arange(len(item))
    out = np.full((len(item), min(k, item.shape[1])), -1, np.int64)
    for slot in range(out.shape[1]):
        column = np.where(free, value, -np.inf).argmax(1)
        held = free[rows, column]
        out[held, slot] = column[held]
        free[rows, column] = False
        if slot + 1 < out.shape[1]:
            value = after(np.maximum(item[rows, column], 0), column)
    return out


def in_blocks(fill: Callable, item: np.ndarray, rel: np.ndarray) -> np.ndarray:
    """Apply fill(item, rel) to blocks of users. Raises ValueError on unequal shapes."""
    if item.shape != rel.shape or item.ndim != 2:
        raise ValueError(f"re-ranking: item {item.shape}, rel {rel.shape}: want (U, M) for both")
    size = max(1, BLOCK // (8 * max(1, item.shape[1])))
    parts = [
        fill(item[at : at + size], np.asarray(rel[at : at + size], np.float64))
        for at in range(0, len(item), size)
    ]
    return np.concatenate(parts) if parts else np.zeros((0, 0), np.int64)


METHODS: dict[str, Callable] = {"mmr": mmr, "dpp": dpp, "energy": energy}
# Strengths to try on relevances of 0..1, rising. MMR: the paper's lambda from .98 to .6.
STRENGTHS: dict[str, tuple[float, ...]] = {
    "mmr": (0.02, 0.05, 0.08, 0.11, 0.15, 0.2, 0.25, 0.33, 0.43, 0.67),
    "dpp": (0.02, 0.03, 0.05, 0.07, 0.1, 0.14, 0.2, 0.25, 0.33, 0.5),
    "energy": (0.06, 0.125, 0.18, 0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0),
}


def placed(
    item: np.ndarray, score: np.ndarray, column: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Put the chosen candidates first; the others follow in their old order.

    item, score  (U, M) candidates and their scores
    column       (U, K) the column that fills each slot, -1 past the last
    returns      item, score (U, M). Scores fall along each row: those of the page are lifted above
                 all others.
    """
    M, K = item.shape[1], column.shape[1]
    if (column >= 0).all():  # the usual case needs no sort
        left = np.ones(item.shape, bool)
        np.put_along_axis(left, column, False, axis=1)
        order = np.concatenate([column, np.nonzero(left)[1].reshape(len(item), M - K)], axis=1)
        on_page = np.broadcast_to(np.arange(M) < K, item.shape)
    else:
        key = np.broadcast_to(np.arange(M) + K, item.shape).copy()
        row, slot = np.nonzero(column >= 0)
        key[row, column[row, slot]] = slot
        order = np.argsort(key, axis=1)
        on_page = np.take_along_axis(key, order, 1) < K
    best = np.where(item >= 0, score, -np.inf).max(1, keepdims=True, initial=-np.inf)
    behind = np.take_along_axis(score, order, 1)
    lifted = np.where(on_page, best + K - np.arange(M), behind)
    return np.take_along_axis(item, order, 1), lifted.astype(score.dtype)


def reranked(ranked: RankedPages, kin: Kin, k: int, method: str, strength: float) -> RankedPages:
    """Pages of k re-ranked among all ranks of each user. Relevance is the score, stretched to 0..1.

    method    one of METHODS
    strength  0 leaves the pages as they are
    """
    rel = relevance(ranked.item, ranked.score)
    column = METHODS[method](ranked.item, rel, kin, k, strength)
    item, score = placed(ranked.item, ranked.score, column)
    return RankedPages(ranked.user, item, score, np.minimum((item >= 0).sum(1), k))


def sort_page(column: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Sort the items of each page by value, best first; equal values keep their places.

    Variety decides which items are on a page; value decides their slots.

    column (U, K) as `mmr` gives it, value (U, M) float -> (U, K)
    """
    at = np.where(column >= 0, np.take_along_axis(value, np.maximum(column, 0), 1), -np.inf)
    return np.take_along_axis(column, np.argsort(-at, axis=1, kind="stable"), 1)


def choose(
    tried: dict[float, dict[str, float]],
    keep: tuple[str, ...] = ("Recall@20", "NDCG@100"),
    share: float = 0.99,
) -> float:
    """The largest strength at which all of `keep` have at least `share` of their value at 0.

    This gives as much variety as possible without a real loss of accuracy. Strengths are tried in
    rising order, up to the first one that loses too much.

    tried   strength -> mean of each measure on validation; 0 must be among them
    Raises ValueError if strength 0 is missing.
    """
    if 0 not in tried:
        raise ValueError("choose: strength 0 is missing, so there is no accuracy to keep")
    best = 0.0
    for strength in sorted(tried):
        if any(tried[strength][name] < share * tried[0][name] for name in keep):
            break
        best = strength
    return best
