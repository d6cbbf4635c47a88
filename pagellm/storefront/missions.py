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


def missions(orders: Rows, leaf: np.ndarray, k: int = 20, seed: int = 0) -> np.ndarray:
    """(C,) int64: the mission of each category, 0..k-1, the one with the most sales first.

    orders  items of every basket        leaf  (N,) int64 category of every item, -1 where unknown
    Raises ValueError unless k is 1 or more.
    """
    if k < 1:
        raise ValueError(f"missions: k={k}, want 1 or more")
    n_categories = int(leaf.max(initial=-1)) + 1
    known = leaf[orders.items]
    sales = np.bincount(known[known >= 0], minlength=n_categories).astype(np.float64)
    size = np.bincount(leaf[leaf >= 0], minlength=n_categories)
    likeness = affinity(joint_counts(orders, leaf, n_categories), max(len(orders.indptr) - 1, 1))
    # As many directions as groups: with all of them, every category would be a group of its own.
    points = spectral(likeness, min(COLUMNS, k))
    weight = np.sqrt(sales) * (size >= min(FEWEST, size.max(initial=1)))
    if weight.sum() <= 0:
        weight = np.ones(n_categories)
    cluster = kmeans(points, weight, k, randomness.rng(seed, "missions"))
    return by_sales(cluster, sales, k)[cluster]


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

    def held(self, of_category: np.ndarray, rows: int = ROWS, slots: int = SLOTS) -> float:
        """Mean expected clicks in a person's best rows, one a mission, of so many slots each."""
        people, k = len(self.category), int(of_category.max(initial=0)) + 1
        mission = np.where(self.category >= 0, of_category[np.maximum(self.category, 0)], -1)
        worth, filled = np.zeros((people, k)), np.zeros((people, k), dtype=np.int64)
        person = np.arange(people)
        for place in range(mission.shape[1]):
            m = mission[:, place]
            take = (m >= 0) & (filled[person, m] < slots)
            at = person[take], m[take]
            worth[at] += self.clicks[take, place]
            filled[at] += 1
        return float(np.sort(worth, axis=1)[:, ::-1][:, :rows].sum(1).mean())


def cohesion(of_category: np.ndarray, likeness: np.ndarray, sales: np.ndarray) -> float:
    """Mean affinity in nats of two categories of one mission, weighed by the root of sales."""
    weight = np.sqrt(np.outer(sales, sales))
    inside = of_category[:, None] == of_category[None]
    np.fill_diagonal(inside, False)
    total = weight[inside].sum()
    return float((likeness * weight)[inside].sum() / total) if total > 0 else 0.0


def refined(found: Missions, orders: Orders, shelves: Shelves) -> Missions:
    """Missions that hold more of what people would be shown, as close together as before.

    k-means does not know what a page has room for: of a mission that holds much of somebody's best
    items, ten are shown, and the rest is lost. Here the largest categories move, one after the
    other, to one of the three missions whose centres lie nearest, where that raises the expected
    clicks in people's best five rows and takes less than 2% of the missions' cohesion in all.
    """
    of_category, n = found.of_category.copy(), len(found.names)
    if n < 2:
        return found
    baskets = orders.baskets()
    likeness = affinity(joint_counts(baskets, found.category, n), max(len(baskets.indptr) - 1, 1))
    points = spectral(likeness, min(COLUMNS, found.k))
    sold = found.category[baskets.items]
    sales = np.bincount(sold[sold >= 0], minlength=n).astype(np.float64)
    weighed = points * np.sqrt(sales)[:, None]
    least = (1 - GIVEN_UP) * cohesion(of_category, likeness, sales)
    best = shelves.held(of_category)
    for c in np.argsort(-sales, kind="stable")[:MOVED].tolist():
        centres = np.array([weighed[of_category == m].sum(0) for m in range(found.k)])
        length = np.linalg.norm(centres, axis=1)
        near = np.where(length > 1e-12, centres @ points[c] / np.maximum(length, 1e-12), -np.inf)
        for m in np.argsort(-near, kind="stable")[:NEAREST].tolist():
            changed = of_category.copy()
            changed[c] = m
            if m == of_category[c] or cohesion(changed, likeness, sales) < least:
                continue
            if (held := shelves.held(changed)) > best + 1e-9:
                of_category, best = changed, held
    place = by_sales(of_category, sales, found.k)
    of_category = place[of_category]
    of_item = np.where(found.category >= 0, of_category[found.category], -1)
    return Missions(found.category, found.names, of_category, of_item, found.k)


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
