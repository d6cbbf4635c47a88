"""From an item's text to its ALS factors: a ridge regression, and the fold-in of a few buyers.

    world = World.fit(rows, n_items, settings, path)        # ALS of the items that have rows
    strength, hold, length = Practice(world, shop, few, users, draw).choose(x)
    begin = Ridge(x[world.warm], world.items[world.warm])(x[new], strength)
    rows = length * fold_in(world, world.everybody, begin, buyers, hold)

What is chosen is chosen on validation picks of warm items, each taken for cold once: a fold-in of
users without it, a regression that has not seen it, and as many buyers as a cold item may have.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from experiments.text_vectors import cached
from pagellm.data.filters import group_rank
from pagellm.data.shop import Rows, Shop
from pagellm.model.als import (
    als,
    als_side,
    basis_of,
    fold_towards,
    penalty_scale,
    sizes,
    transpose,
)
from pagellm.stage import randomness

__all__ = ["Practice", "Ridge", "World", "fold_in", "ndcg", "subset", "without"]


DEPTH = 100
PARTS = 4  # parts of the warm items; each is taken for cold once
STRENGTHS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)  # of the ridge; texts have length 1
HOLDS = (0.3, 1.0, 4.0, 16.0)  # of the fold-in's penalty, as a multiple of ALS's
LENGTHS = (0.5, 1.0, 1.5, 2.0, 3.0, 5.0)  # by which cold rows are multiplied


def without(rows: Rows, items: np.ndarray) -> Rows:
    """The rows of other items; items (N,) bool."""
    kept = ~items[rows.items]
    user = np.repeat(np.arange(len(rows.indptr) - 1), rows.counts())[kept]
    indptr = np.zeros(len(rows.indptr), np.int64)
    np.cumsum(np.bincount(user, minlength=len(rows.indptr) - 1), out=indptr[1:])
    return Rows(indptr, rows.items[kept], rows.ratings[kept])


class Ridge:
    """Ridge regression of targets on features, solved anew for each strength.

    minimise  |y - mean(y) - (x - mean(x)) w|^2 + strength |w|^2
    """

    def __init__(self, x: Tensor, y: Tensor):
        self.mean, self.level = x.mean(0), y.mean(0)
        z = x - self.mean
        self.gram, self.right = z.T @ z, z.T @ (y - self.level)
        self.solved: dict[float, Tensor] = {}

    def weights(self, strength: float) -> Tensor:
        """(F, d); the last ones are kept."""
        if strength not in self.solved:
            factor = torch.linalg.cholesky(self.gram + strength * torch.eye(len(self.gram)))
            self.solved = {strength: torch.cholesky_solve(self.right, factor)}
        return self.solved[strength]

    def __call__(self, x: Tensor, strength: float) -> Tensor:
        """What it says of these features (n, F): (n, d)."""
        return (x - self.mean) @ self.weights(strength) + self.level


@dataclass(frozen=True)
class World:
    """ALS fitted to the rows of warm items, and what folds items and users in.

    rows    (U) train positives of warm items      warm (N,) bool: the items that have such rows
    items   (N, d) factors; those of other items are 0
    """

    rows: Rows
    warm: np.ndarray
    items: Tensor
    settings: dict
    penalty: float

    @classmethod
    def fit(cls, rows: Rows, n_items: int, settings: dict, path: Path) -> "World":
        """path: where the factors lie, or will."""
        n_users = len(rows.indptr) - 1
        items = torch.from_numpy(
            cached(path, lambda: als(rows, n_users, n_items, **settings)[1].numpy())
        )
        rest = (settings[name] for name in ("alpha0", "reg", "nu"))
        penalty = penalty_scale(rows, n_users, n_items, *rest)
        return cls(rows, np.bincount(rows.items, minlength=n_items) > 0, items, settings, penalty)

    def ridge(self, rows: Rows, others: int) -> Tensor:
        """ALS's penalty of every owner of these rows."""
        size = sizes(rows, self.settings["alpha0"], others)
        return (self.penalty * size.pow(self.settings["nu"])).float()

    def users(self, hidden: np.ndarray) -> Tensor:
        """(U, d) users' places among the items that are not hidden (N,) bool."""
        rows = without(self.rows, hidden)
        table = torch.where(torch.from_numpy(~hidden)[:, None], self.items, 0.0)
        return als_side(table, rows, self.settings["alpha0"], self.ridge(rows, len(table)))

    @cached_property
    def everybody(self) -> Tensor:
        return self.users(~self.warm)


def fold_in(
    world: World, users: Tensor, begin: Tensor, buyers: Rows, hold: float, basis=None
) -> Tensor:
    """`als.fold_towards` with ALS's penalty times `hold`."""
    penalty = hold * world.ridge(buyers, len(users))
    return fold_towards(users, begin, buyers, world.settings["alpha0"], penalty, basis)


def ndcg(score: Tensor, picks: Rows, at: np.ndarray) -> float:
    """Mean NDCG@100 of users' picks (1 or 0) among the columns of score (B, M).

    at (N,) the column of each item, -1 for one that is not there. Users without picks there do not
    count.
    """
    place, item = picks.flat(np.arange(len(score)))
    there = at[item] >= 0
    worth = torch.zeros_like(score)
    worth[torch.from_numpy(place[there]), torch.from_numpy(at[item[there]])] = 1.0
    discount = 1.0 / torch.log2(torch.arange(2.0, 2.0 + min(DEPTH, score.shape[1])))
    first = torch.topk(score, len(discount), dim=1).indices
    found = (worth.gather(1, first) * discount).sum(1)
    many = worth.sum(1).long()
    best = discount.cumsum(0)[many.clamp(1, len(discount)) - 1]
    return float((found / best)[many > 0].mean()) if bool((many > 0).any()) else 0.0


def subset(rows: Rows, users: np.ndarray) -> Rows:
    """The rows of these users, numbered anew."""
    place, items = rows.flat(users)
    indptr = np.zeros(len(users) + 1, np.int64)
    np.cumsum(np.bincount(place, minlength=len(users)), out=indptr[1:])
    return Rows(indptr, items, np.full(len(items), np.nan, np.float32))


class Practice:
    """Warm items taken for cold, part by part, on which strengths and lengths are chosen.

    few  how many buyers a cold item may keep: 0 in `none`
    """

    def __init__(self, world: World, shop: Shop, few: int, users: int, draw: int):
        rng = randomness.rng(draw, "text rows", "practice", few)
        self.world, self.few = world, few
        some = np.flatnonzero(shop.csr("valid").counts() > 0)
        some = np.sort(rng.permutation(some)[: users or None])
        self.some, self.picks = some, subset(shop.csr("valid"), some)
        self.seen = subset(world.rows, some).flat(np.arange(len(some)))
        warm = rng.permutation(np.flatnonzero(world.warm))
        self.parts = []
        by_item = transpose(world.rows, shop.n_items)
        for p in range(PARTS):
            mine = np.sort(warm[p::PARTS])
            hidden = np.zeros(shop.n_items, bool)
            hidden[mine] = True
            X = world.users(hidden)
            self.parts.append((mine, X, thinned(by_item, mine, few, rng)))
        self.bases = [basis_of(X) if few else None for _, X, _ in self.parts]

    def ranked(self, score: Tensor, at: np.ndarray) -> float:
        """NDCG of the validation picks among these columns, less what the users have."""
        place, item = self.seen
        there = at[item] >= 0
        score[torch.from_numpy(place[there]), torch.from_numpy(at[item[there]])] = -torch.inf
        return ndcg(score, self.picks, at)

    def choose(self, x: Tensor) -> tuple[float, float, float]:
        """strength, hold, length for features x (N, F)."""
        world, n = self.world, len(self.world.warm)
        tried = [(s, h) for s in STRENGTHS for h in (HOLDS if self.few else HOLDS[:1])]
        found = np.zeros(len(tried))
        ridges: list = []

        def made(p: int, strength: float, hold: float) -> Tensor:
            mine, X, buyers = self.parts[p]
            begin = ridges[p](x[mine], strength)
            return fold_in(world, X, begin, buyers, hold, self.bases[p]) if self.few else begin

        for p, (mine, X, _) in enumerate(self.parts):
            rest = world.warm.copy()
            rest[mine] = False
            at = np.full(n, -1)
            at[mine] = np.arange(len(mine))
            ridges.append(Ridge(x[rest], world.items[rest]))
            for i, (strength, hold) in enumerate(tried):
                found[i] += self.ranked(X[self.some] @ made(p, strength, hold).T, at)
        strength, hold = tried[int(found.argmax())]
        worth = np.zeros(len(LENGTHS))
        at = np.where(world.warm, np.arange(n), -1)
        for p, (mine, X, _) in enumerate(self.parts):
            base, own = X[self.some] @ world.items.T, X[self.some] @ made(p, strength, hold).T
            base[:, ~world.warm] = -torch.inf
            for k, length in enumerate(LENGTHS):
                score = base.clone()
                score[:, mine] = length * own
                worth[k] += self.ranked(score, at)
        return strength, hold, LENGTHS[int(worth.argmax())]


def thinned(by_item: Rows, items: np.ndarray, most: int, rng: np.random.Generator) -> Rows:
    """The buyers of these items, 1 to `most` of each, drawn; none where `most` is 0."""
    mine = subset(by_item, items)
    item = np.repeat(np.arange(len(items)), mine.counts())
    keep = rng.integers(1, most + 1, len(items)) if most else np.zeros(len(items), np.int64)
    rank, _ = group_rank(item, rng.random(len(item)))
    kept = rank < keep[item]
    indptr = np.zeros(len(items) + 1, np.int64)
    np.cumsum(np.bincount(item[kept], minlength=len(items)), out=indptr[1:])
    return Rows(indptr, mine.items[kept], mine.ratings[kept])
