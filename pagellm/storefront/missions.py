"""Missions: sets of categories that are bought together, such as all that a breakfast needs.

mission = missions(orders.baskets(), category, k=20, seed=0)      (C,) mission of each category

Rows of missions cost a page far less recall than rows of single categories do, since a person's next
purchases spread over many categories. Measured: docs/how-to/storefront.md.
"""

import numpy as np

from pagellm.data.shop import Rows
from pagellm.stage import randomness

__all__ = ["affinity", "joint_counts", "kmeans", "mission_names", "missions", "spectral"]

FEWEST = (
    10  # items of a category that takes part in the clustering; smaller ones join their nearest
)
COLUMNS = 16  # eigenvectors
ROUNDS = 100
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
    """s_ij = max(0, ln((n_ij B + 1) / (n_i n_j + 1))): how much more often than by chance, in nats."""
    alone = joint.diagonal()
    return np.maximum(0.0, np.log((joint * n_baskets + 1) / (np.outer(alone, alone) + 1)))


def spectral(likeness: np.ndarray, columns: int = COLUMNS) -> np.ndarray:
    """(C, d) unit rows: the top eigenvectors of D^-1/2 s D^-1/2; a row of zeros for a lonely category."""
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
    points = spectral(
        affinity(joint_counts(orders, leaf, n_categories), max(len(orders.indptr) - 1, 1))
    )
    weight = np.sqrt(sales) * (size >= min(FEWEST, size.max(initial=1)))
    if weight.sum() <= 0:
        weight = np.ones(n_categories)
    cluster = kmeans(points, weight, k, randomness.rng(seed, "missions"))
    total = np.bincount(cluster, sales, minlength=k)
    place = np.empty(len(total), dtype=np.int64)
    place[np.lexsort((np.arange(len(total)), -total))] = np.arange(len(total))
    return place[cluster]


def mission_names(
    mission: np.ndarray, category_names: list[str], sales: np.ndarray
) -> list[tuple[str, ...]]:
    """The two best-selling categories of each mission, best first; sales (C,)."""
    found = []
    for m in range(int(mission.max(initial=-1)) + 1):
        members = np.flatnonzero(mission == m)
        best = members[np.lexsort((members, -sales[members]))][:2]
        found.append(tuple(category_names[c] for c in best))
    return found
