"""Missions: sets of categories that are bought together, such as all that a breakfast needs.

mission = missions(orders.baskets(), category, k=20, seed=0)      (C,) mission of each category

Rows of missions cost a page far less recall than rows of single categories, because a person's next
purchases spread over many categories. Measured: docs/how-to/storefront.md.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from pagellm.data.orders import Orders
from pagellm.data.shop import Catalogue, Rows
from pagellm.stage import randomness
from pagellm.storefront.text import words

__all__ = [
    "SLOTS",
    "Missions",
    "Shelves",
    "Together",
    "affinity",
    "cohesion",
    "category_names",
    "find_missions",
    "joint_counts",
    "kmeans",
    "missions",
    "refined",
    "spectral",
    "top_of_groups",
]

FEWEST = (
    10  # items of a category that takes part in the clustering; smaller ones join their nearest
)
AVERAGE = 25  # items that the categories of a level hold on average, to be what rows are made of
COLUMNS = 16  # eigenvectors
ROUNDS = 100
ROWS, SLOTS = 5, 10  # of the page that missions are refined for
MOVED, NEAREST = 150, 3  # categories that may move, the largest; missions that each may move to
PASSES = 6  # over all of them, at most; fewer where one moves none
GIVEN_UP = 0.02  # share of the cohesion that may be lost
BLOCK = 4096  # baskets held at once as a dense table


def joint_counts(baskets: Rows, category: np.ndarray, n_categories: int) -> np.ndarray:
    """n_ij (C, C): baskets that hold categories i and j; n_ii those that hold i.

    category (N,) int64 of every item, -1 where unknown
    """
    n_baskets = len(baskets.indptr) - 1
    total = np.zeros((n_categories, n_categories))
    for start in range(0, n_baskets, BLOCK):
        place, item = baskets.flat(np.arange(start, min(start + BLOCK, n_baskets)))
        name = category[item]
        held = np.zeros((min(BLOCK, n_baskets - start), n_categories), dtype=np.float32)
        held[place[name >= 0], name[name >= 0]] = 1.0
        total += held.T @ held  # whole numbers below 2^24: exact in float32
    return total


def affinity(joint: np.ndarray, n_baskets: int) -> np.ndarray:
    """s_ij = max(0, ln((n_ij B + 1) / (n_i n_j + 1))):

    how much more often than by chance, in nats.
    """
    alone = joint.diagonal()
    return np.maximum(0.0, np.log((joint * n_baskets + 1) / (np.outer(alone, alone) + 1)))


def spectral(likeness: np.ndarray, columns: int = COLUMNS) -> np.ndarray:
    """(C, d) unit rows: the top eigenvectors of D^-1/2 s D^-1/2; a row of zeros for a lonely
    category.
    """
    degree = likeness.sum(1)
    scale = np.where(degree > 0, 1 / np.sqrt(np.where(degree > 0, degree, 1)), 0.0)
    _, vectors = np.linalg.eigh(likeness * scale[:, None] * scale)
    top = vectors[:, ::-1][:, :columns]
    # An eigenvector's sign is free; fix it, so that every machine starts from the same points.
    top = top * np.where(top.sum(0) < 0, -1.0, 1.0)
    length = np.linalg.norm(top, axis=1, keepdims=True)
    return np.divide(top, length, out=np.zeros_like(top), where=length > 1e-12)


def kmeans(points: np.ndarray, weight: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """(C,) cluster of each unit row: weighted k-means on the sphere, started by k-means++.

    weight (C,) 0 or more; at most k clusters, fewer where there are fewer different points
    """
    k = min(k, len(np.unique(points[weight > 0].round(12), axis=0)))
    if k < 1:
        return np.zeros(len(points), dtype=np.int64)
    chance = weight / weight.sum()
    centre = points[rng.choice(len(points), p=chance)][None]
    while len(centre) < k:
        far = np.maximum(0.0, 1 - (points @ centre.T).max(1)) * weight
        if far.sum() <= 0:
            break
        centre = np.vstack([centre, points[rng.choice(len(points), p=far / far.sum())]])
    cluster = np.full(len(points), -1)
    for _ in range(ROUNDS):
        nearest = (points @ centre.T).argmax(1)
        if np.array_equal(nearest, cluster):
            break
        cluster = nearest
        for c in range(len(centre)):
            mean = (points * weight[:, None])[cluster == c].sum(0)
            length = np.linalg.norm(mean)
            if length > 1e-12:
                centre[c] = mean / length
    return cluster


@dataclass(frozen=True)
class Together:
    """What is known of categories before they are put into missions.

    likeness  (C, C) affinity in nats        sales  (C,) train lines        size  (C,) items
    """

    likeness: np.ndarray
    sales: np.ndarray
    size: np.ndarray

    @classmethod
    def of(cls, orders: Rows, leaf: np.ndarray) -> "Together":
        """orders: items of every basket; leaf: (N,) category of every item, -1 where unknown."""
        n = int(leaf.max(initial=-1)) + 1
        known = leaf[orders.items]
        return cls(
            affinity(joint_counts(orders, leaf, n), max(len(orders.indptr) - 1, 1)),
            np.bincount(known[known >= 0], minlength=n).astype(np.float64),
            np.bincount(leaf[leaf >= 0], minlength=n),
        )

    def points(self, k: int) -> np.ndarray:
        """(C, d) unit rows. As many directions as groups: with all of them, every category would
        be a group of its own.
        """
        return spectral(self.likeness, min(COLUMNS, k))

    def drawn(self, points: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
        """(C,) mission of each category, by one start of k-means."""
        weight = np.sqrt(self.sales) * (self.size >= min(FEWEST, self.size.max(initial=1)))
        if weight.sum() <= 0:
            weight = np.ones(len(weight))
        return kmeans(points, weight, k, rng)


def missions(orders: Rows, leaf: np.ndarray, k: int = 20, seed: int = 0) -> np.ndarray:
    """(C,) int64: the mission of each category, 0..k-1, the one with the most sales first.

    orders  items of every basket        leaf  (N,) int64 category of every item, -1 where unknown
    Raises ValueError unless k is 1 or more.
    """
    if k < 1:
        raise ValueError(f"missions: k={k}, want 1 or more")
    known = Together.of(orders, leaf)
    cluster = known.drawn(known.points(k), k, randomness.rng(seed, "missions"))
    return by_sales(cluster, known.sales, k)[cluster]


@dataclass(frozen=True)
class Missions:
    """The categories that rows are made of, and the mission of each.

    category  (N,) int64 category of every item        names  (C,) their names
    of_category  (C,) int64 mission        of_item  (N,) int64 mission        k  how many missions
    """

    category: np.ndarray
    names: list[str]
    of_category: np.ndarray
    of_item: np.ndarray
    k: int


def category_names(catalogue: Catalogue) -> list[str]:
    """One category an item: of the deepest level whose categories hold 25 items on average.

    Without categories, the commonest title word that an item shares with ten others stands for one.
    """
    paths = catalogue.categories
    if not any(paths):
        return word_names(catalogue)
    chosen = [path[0] if path else "" for path in paths]
    for depth in range(2, max(map(len, paths)) + 1):
        names = [path[min(depth, len(path)) - 1] if path else "" for path in paths]
        if len(names) / max(len(set(names)), 1) < AVERAGE:
            break
        chosen = names
    return chosen


def word_names(catalogue: Catalogue) -> list[str]:
    own = [[w for w in dict.fromkeys(words(t)) if len(w) > 2] for t in catalogue.title]
    often = Counter(word for title in own for word in title)
    found = []
    for title in own:
        best = max(title, key=lambda word: (often[word], word), default="")
        found.append(best if often[best] >= FEWEST else "")
    return found


def find_missions(catalogue: Catalogue, orders: Orders, k: int = 20, seed: int = 0) -> Missions:
    """Missions of a shop from its train orders."""
    item_names = category_names(catalogue)
    names = sorted(set(item_names) - {""})
    number = {name: n for n, name in enumerate(names)}
    category = np.array([number.get(name, -1) for name in item_names], dtype=np.int64)
    of_category = missions(orders.baskets(), category, k, seed) if names else np.zeros(0, np.int64)
    of_item = np.where(category >= 0, of_category[category] if names else -1, -1)
    return Missions(category, names, of_category, of_item, k)


@dataclass(frozen=True)
class Shelves:
    """What some people would be shown, to see how much of it rows of missions can hold.

    category  (U, T) int64 categories of each person's best items, best first; -1: not to be shown
    clicks    (U, T) float64 expected clicks of the same items, 0 past the end
    """

    category: np.ndarray
    clicks: np.ndarray

    def worth(self, inside: np.ndarray, slots: int = SLOTS) -> np.ndarray:
        """(U,) each person's expected clicks in one row of the categories inside (C,) bool."""
        fits = np.r_[inside, False][self.category]  # -1 is the last
        first = fits & (np.cumsum(fits, axis=1, dtype=np.int32) <= slots)
        return np.where(first, self.clicks, 0.0).sum(1)

    def held(self, of_category: np.ndarray, rows: int = ROWS, slots: int = SLOTS) -> float:
        """Mean expected clicks in a person's best rows, one a mission, of so many slots each."""
        k = int(of_category.max(initial=0)) + 1
        return best_rows(np.stack([self.worth(of_category == m, slots) for m in range(k)], 1), rows)


def best_rows(worth: np.ndarray, rows: int = ROWS) -> float:
    """Mean over people of the sum of their best rows; worth (U, k)."""
    rows = min(rows, worth.shape[1])
    return float(np.partition(worth, -rows, axis=1)[:, -rows:].sum(1).mean())


def cohesion(of_category: np.ndarray, likeness: np.ndarray, sales: np.ndarray) -> float:
    """Mean affinity in nats of two categories of one mission, weighed by the root of sales."""
    weight = np.sqrt(np.outer(sales, sales))
    inside = of_category[:, None] == of_category[None]
    np.fill_diagonal(inside, False)
    total = weight[inside].sum()
    return float((likeness * weight)[inside].sum() / total) if total > 0 else 0.0


def moved(
    of_category: np.ndarray, known: Together, points: np.ndarray, shelves: Shelves, k: int
) -> tuple[np.ndarray, float]:
    """(C,) missions after the moves of `refined`, and the expected clicks they hold."""
    of_category = of_category.copy()
    root = np.sqrt(known.sales)
    weight = np.outer(root, root)
    np.fill_diagonal(weight, 0.0)
    tied = known.likeness * weight
    inside = of_category[:, None] == of_category[None]
    total = np.array([tied[inside].sum(), weight[inside].sum()])  # cohesion is their ratio
    least = (1 - GIVEN_UP) * cohesion(of_category, known.likeness, known.sales)
    worth = np.stack([shelves.worth(of_category == m) for m in range(k)], 1)
    best = best_rows(worth)
    for _ in range(PASSES):
        before = best
        for c in np.argsort(-known.sales, kind="stable")[:MOVED].tolist():
            near = nearness(points[c], of_category, points * root[:, None], k)
            for m in np.argsort(-near, kind="stable")[:NEAREST].tolist():
                left, joined = of_category == of_category[c], of_category == m
                if joined[c]:
                    continue
                new = total + [2 * (t[c][joined].sum() - t[c][left].sum()) for t in (tied, weight)]
                if new[0] < least * new[1]:
                    continue
                left[c], joined[c] = False, True
                changed = worth.copy()
                changed[:, of_category[c]] = shelves.worth(left)
                changed[:, m] = shelves.worth(joined)
                if (held := best_rows(changed)) > best + 1e-9:
                    of_category[c], worth, best, total = m, changed, held, new
        if best == before:
            break
    return of_category, best


def nearness(point: np.ndarray, of_category: np.ndarray, weighed: np.ndarray, k: int) -> np.ndarray:
    """(k,) cosine of a unit point (d,) and the centre of each mission, -inf where that is empty."""
    centre = np.zeros((k, len(point)))
    np.add.at(centre, of_category, weighed)
    length = np.linalg.norm(centre, axis=1)
    filled = length > 1e-12
    return np.where(filled, centre @ point / np.where(filled, length, 1.0), -np.inf)


def refined(
    found: Missions, orders: Orders, shelves: Shelves, starts: int = 1, seed: int = 0
) -> Missions:
    """Missions that hold more of what people would be shown, as close together as before.

    k-means does not know what a page has room for: of a mission that holds much of somebody's best
    items, ten are shown, and the rest is lost. Here the largest categories move, one after the
    other, to one of the three missions whose centres lie nearest, where that raises the expected
    clicks in people's best five rows and takes less than 2% of the missions' cohesion in all;
    again and again, until none moves, six times at most.

    starts  of k-means, the first being `found`; the one that holds most after its moves is kept
    """
    n, k = len(found.names), found.k
    if n < 2:
        return found
    known = Together.of(orders.baskets(), found.category)
    points = known.points(k)
    draws = [found.of_category]
    draws += [
        known.drawn(points, k, randomness.rng(seed, "missions", start))
        for start in range(1, starts)
    ]
    tried = [moved(draw, known, points, shelves, k) for draw in draws]
    of_category = max(tried, key=lambda one: one[1])[0]
    of_category = by_sales(of_category, known.sales, k)[of_category]
    of_item = np.where(found.category >= 0, of_category[found.category], -1)
    return Missions(found.category, found.names, of_category, of_item, k)


def by_sales(cluster: np.ndarray, sales: np.ndarray, k: int) -> np.ndarray:
    """(k,) the new number of each cluster: the one with the most sales is 0."""
    total = np.bincount(cluster, sales, minlength=k)
    place = np.empty(len(total), dtype=np.int64)
    place[np.lexsort((np.arange(len(total)), -total))] = np.arange(len(total))
    return place


def top_of_groups(order: np.ndarray, group: np.ndarray, n_groups: int, most: int) -> np.ndarray:
    """(G, most) the first items of each group, -1 past its end.

    order (n,) items, best first        group (N,) int64 of every item, -1 for none
    """
    name = group[order]
    order, name = order[name >= 0], name[name >= 0]
    by_group = np.argsort(name, kind="stable")
    name = name[by_group]
    rank = np.arange(len(name)) - np.searchsorted(name, name)
    out = np.full((n_groups, most), -1, dtype=np.int64)
    first = rank < most
    out[name[first], rank[first]] = order[by_group[first]]
    return out
