"""Rows for items and users that a trained network has not met, made from the rows that it has.

    items = fold_items([model.item], old_item, liked, groups)     # old_item[i] = -1: i is new
    users = fold_users(model.user, old_user, liked, items.space)

The trained item rows are taken as the item factors of implicit ALS (model/als.py), and frozen. One
half step of ALS gives every user, category, brand and title word a place among them; the next gives
each new item a place, from its buyers and from its words. A ridge regression then carries these
places over to rows of the network. It is learnt on known items, each folded in as if it were new:
without its own row, and with as many buyers as one of the new items has.

Source of the fold-in: Hu, Koren and Volinsky, ICDM 2008. The regression is not in the literature.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pagellm.data.shop import Rows
from pagellm.model.als import add_pseudo_users, als_side, penalty_scale, sizes, transpose
from pagellm.model.judges import rows_of
from pagellm.stage import randomness

__all__ = ["FoldedItems", "FoldedUsers", "fold_items", "fold_users"]

ALPHA0, REG = 0.1, 0.03  # of als.als with nu = 1: those of the plain row ALS+facts
PARTS = 3  # parts of the known items; each is folded in by the others
PRACTICE = 6000  # known items, or users, that the regression is learnt from
RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)  # tried; per example, features being standardised


@dataclass(frozen=True)
class FoldedItems:
    """Rows of all items of the new data.

    tables  for each table given: (N, C) rows; those of known items are as they were
    space   (N, C) the item factors in which users find their places
    bought  (N,) bool: new, and folded in from buyers; other new items from words alone
    cosine  mean cosine between known items' rows (less their mean) and the rows that they would
            have got as new ones; NaN where there is no new item
    """

    tables: list[Tensor]
    space: Tensor
    bought: np.ndarray
    cosine: float


@dataclass(frozen=True)
class FoldedUsers:
    """rows (U, C), known users' as they were; cosine as in FoldedItems."""

    rows: Tensor
    cosine: float


def penalties(rows: Rows, others: int, scale: float) -> Tensor:
    """(len(rows),) the ridge of every row's owner, as in `als.als` with nu = 1."""
    return (scale * sizes(rows, ALPHA0, others)).float()


def only(rows: Rows, keep: np.ndarray) -> Rows:
    """The rows whose item is kept; keep (N,) bool."""
    mine = keep[rows.items]
    user = np.repeat(np.arange(len(rows.indptr) - 1), rows.counts())[mine]
    indptr = np.zeros(len(rows.indptr), np.int64)
    np.cumsum(np.bincount(user, minlength=len(rows.indptr) - 1), out=indptr[1:])
    return Rows(indptr, rows.items[mine], rows.ratings[mine])


def places(Y: Tensor, rows: Rows, keep: np.ndarray, scale: float) -> Tensor:
    """(U, C) every user's place among the kept items alone."""
    mine = only(rows, keep)
    Y = torch.where(torch.from_numpy(keep)[:, None], Y, 0.0)
    return als_side(Y, mine, ALPHA0, penalties(mine, int(keep.sum()), scale))


def balanced(Y: Tensor, rows: Rows, keep: np.ndarray, scale: float) -> Tensor:
    """Y times a number, such that users and items pay equal penalties, as at an optimum of ALS."""
    by_item = transpose(rows, len(Y))
    item = penalties(by_item, len(rows.indptr) - 1, scale)
    for _ in range(3):
        user = penalties(only(rows, keep), int(keep.sum()), scale)
        pays_u = float((user[:, None] * places(Y, rows, keep, scale).square()).sum())
        pays_i = float((item[:, None] * Y.square()).sum())
        Y = Y * (max(pays_u, 1e-12) / max(pays_i, 1e-12)) ** 0.25
    return Y


def thinned(rows: Rows, n_people: int, most: np.ndarray, rng: np.random.Generator) -> Rows:
    """By-item rows with at most `most` (N,) people each, drawn at random; the facts all stay.

    Users from n_people on are facts: categories, brands and words (als.add_pseudo_users).
    """
    item = np.repeat(np.arange(len(rows.indptr) - 1), rows.counts())
    person = rows.items < n_people
    order = np.lexsort((rng.random(len(item)), ~person, item))  # people first, at random
    rank = np.empty(len(item), np.int64)
    rank[order] = np.arange(len(item)) - rows.indptr[:-1][item[order]]
    keep = ~person | (rank < most[item])
    indptr = np.zeros(len(rows.indptr), np.int64)
    np.cumsum(np.bincount(item[keep], minlength=len(rows.indptr) - 1), out=indptr[1:])
    return Rows(indptr, rows.items[keep], rows.ratings[keep])


def described(place: Tensor, counts: np.ndarray) -> Tensor:
    """What the regression reads of each: its place, and how many rows it was made from."""
    return torch.cat([place, torch.from_numpy(np.log1p(counts)).float()[:, None]], 1)


@dataclass(frozen=True)
class Regression:
    """target ~ features: ridge regression on standardised features.

    mean, std (F,) of the features; weight (F, C); level (C,) the targets' mean
    """

    mean: Tensor
    std: Tensor
    weight: Tensor
    level: Tensor

    @classmethod
    def fit(cls, x: Tensor, y: Tensor, ridge: float) -> "Regression":
        mean, std, level = x.mean(0), x.std(0, correction=0).clamp_min(1e-6), y.mean(0)
        z = ((x - mean) / std).double()
        gram = z.T @ z + ridge * len(z) * torch.eye(z.shape[1], dtype=z.dtype)
        weight = torch.linalg.solve(gram, z.T @ (y - level).double())
        return cls(mean, std, weight.float(), level)

    def __call__(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std @ self.weight + self.level


def learnt(x: Tensor, y: Tensor, part: np.ndarray) -> tuple[Regression, Tensor]:
    """The regression with the best ridge, and what it says of each part having seen the others.

    x (E, F), y (E, C), part (E,) in 0..PARTS-1
    """
    best, least = None, float("inf")
    for ridge in RIDGES:
        out = torch.empty_like(y)
        for p in range(PARTS):
            mine = torch.from_numpy(part == p)
            if mine.any():
                out[mine] = Regression.fit(x[~mine], y[~mine], ridge)(x[mine])
        error = float((out - y).square().sum())
        if best is None or error < least:
            best, least = (ridge, out), error
    assert best is not None
    return Regression.fit(x, y, best[0]), best[1]


def cosine(said: Tensor, real: Tensor) -> float:
    """Mean cosine of two tables' rows, both less the mean of the real ones."""
    level = real.mean(0)
    return float(torch.cosine_similarity(said - level, real - level, dim=1).mean())


def practice_of(known: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """At most PRACTICE of the known, in random order, and the part of each."""
    chosen = rng.permutation(known)[:PRACTICE]
    return chosen, np.arange(len(chosen)) % PARTS


def fold_items(
    tables: list[Tensor],
    old_item: np.ndarray,
    liked: Rows,
    groups: list[np.ndarray],
    seed: int = 0,
) -> FoldedItems:
    """Rows of all items of the new data, in its numbers.

    tables    (N_old, C) each: the network's item rows, and its output rows if it has such
    old_item  (N,) the old number of each item; -1 for a new one
    liked     (U) new train rows by user        groups  items of every category, brand and word
    Raises ValueError with fewer known items than 2 * PARTS, on which nothing can be learnt.
    """
    known, new = np.flatnonzero(old_item >= 0), np.flatnonzero(old_item < 0)
    if len(known) < 2 * PARTS:
        raise ValueError(f"fold_items: {len(known)} known items, want {2 * PARTS} or more")
    old = torch.from_numpy(old_item[known])
    out = [table.new_zeros(len(old_item), table.shape[1]) for table in tables]
    for table, rows in zip(out, tables, strict=True):
        table[torch.from_numpy(known)] = rows.detach().float()[old]
    n_people, keep = len(liked.indptr) - 1, old_item >= 0
    everybody = add_pseudo_users(liked, groups)
    scale = penalty_scale(everybody, len(everybody.indptr) - 1, len(old_item), ALPHA0, REG, 1.0)
    level = out[0][torch.from_numpy(known)].mean(0)
    Y = torch.where(torch.from_numpy(keep)[:, None], out[0] - level, 0.0)
    Y = balanced(Y, everybody, keep, scale)
    by_item = transpose(everybody, len(old_item))
    people = np.bincount(liked.items, minlength=len(old_item))
    bought = ~keep & (people > 0)
    if not len(new):
        return FoldedItems(out, Y, bought, float("nan"))

    def folded(items: np.ndarray, X: Tensor, rows: Rows) -> Tensor:
        mine = rows_of(rows, items)
        return als_side(X, mine, ALPHA0, penalties(mine, len(X), scale))

    rng = randomness.rng(seed, "fold items")
    practice, part = practice_of(known, rng)
    X = places(Y, everybody, keep, scale)
    apart = []
    for p in range(PARTS):
        rest = keep.copy()
        rest[practice[part == p]] = False
        apart.append(places(Y, everybody, rest, scale))
    target = torch.cat([table[torch.from_numpy(practice)] for table in out], 1)
    agree = []
    for some in (new[people[new] > 0], new[people[new] == 0]):
        if not len(some):
            continue
        most = np.zeros(len(old_item), np.int64)
        most[practice] = rng.choice(people[some], len(practice))
        few = thinned(by_item, n_people, most, rng)
        place = Y.new_zeros(len(practice), Y.shape[1])
        for p in range(PARTS):
            mine = part == p
            place[torch.from_numpy(mine)] = folded(practice[mine], apart[p], few)
        seen = np.minimum(people[practice], most[practice])
        regression, said = learnt(described(place, seen), target, part)
        agree.append((cosine(said, target), len(some)))
        found = regression(described(folded(some, X, by_item), people[some]))
        at = torch.from_numpy(some)
        for table, rows_found in zip(out, found.split(tables[0].shape[1], 1), strict=True):
            table[at] = rows_found
        Y[at] = folded(some, X, by_item)
    total = sum(c * n for c, n in agree) / sum(n for _, n in agree)
    return FoldedItems(out, Y, bought, total)


def fold_users(
    table: Tensor, old_user: np.ndarray, liked: Rows, space: Tensor, seed: int = 0
) -> FoldedUsers:
    """Rows of all users of the new data, in its numbers: those of new ones from what they liked.

    table     (U_old, C) the network's user rows
    old_user  (U,) the old number of each user; -1 for a new one
    space     of FoldedItems
    """
    known, new = np.flatnonzero(old_user >= 0), np.flatnonzero(old_user < 0)
    out = table.new_zeros(len(old_user), table.shape[1])
    out[torch.from_numpy(known)] = table.detach().float()[torch.from_numpy(old_user[known])]
    if not len(new):
        return FoldedUsers(out, float("nan"))
    if len(known) < 2 * PARTS:
        raise ValueError(f"fold_users: {len(known)} known users, want {2 * PARTS} or more")
    practice, part = practice_of(known, randomness.rng(seed, "fold users"))
    scale = penalty_scale(liked, len(old_user), len(space), ALPHA0, REG, 1.0)
    X = als_side(space, liked, ALPHA0, penalties(liked, len(space), scale))
    x = described(X, liked.counts())
    target = out[torch.from_numpy(practice)]
    regression, said = learnt(x[torch.from_numpy(practice)], target, part)
    out[torch.from_numpy(new)] = regression(x[torch.from_numpy(new)])
    return FoldedUsers(out, cosine(said, target))
