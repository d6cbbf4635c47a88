"""Rows for items and users that a trained network has not met, made from the rows that it has.

    items = fold_items([model.item], old_item, liked, groups)     # old_item[i] = -1: i is new
    users = fold_users(model.user, old_user, liked, items.space)

The trained item rows are taken as the item factors of implicit ALS (model/als.py), and frozen. One
half step of ALS gives every user a place among them. A new item begins where its category, brand
and title words put it, by a ridge regression from words to places, and moves from there towards its
buyers. How strong the regression is, and how firmly an item is held where it begins, are chosen on
known items, each taken for a new one: without its own row, and with as many buyers as one of the
new items has. A user's row is carried over from their place by another regression; so is an output
row from the item's row, where a network has such.

Source of the fold-in: Hu, Koren and Volinsky, ICDM 2008, around a prior mean. The regressions are
not in the literature; what they are worth is in docs/results/updates.md.
"""

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pagellm.data.shop import Rows
from pagellm.model.als import als_side, fold_towards, penalty_scale, sizes, transpose
from pagellm.model.judges import rows_of
from pagellm.stage import randomness

__all__ = ["FoldedItems", "FoldedUsers", "fold_items", "fold_users"]

ALPHA0, REG = 0.001, 0.03  # of als.als with nu = 1
PARTS = 3  # parts of the known items; each is folded in by the others
PRACTICE = 6000  # known items, or users, that the regression is learnt from
RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)  # tried; per example, features being standardised
STRENGTHS = (0.1, 0.3, 1.0, 3.0, 10.0)  # tried, of the ridge from words; their rows have length 1
TRIED_ON = 3000  # known items that the strength is chosen on
HOLDS = (0.3, 1.0, 4.0, 16.0)  # tried, of how firmly a new item is held where its words put it
CHUNK = 4096  # items whose words are compared at once


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


def thinned(rows: Rows, most: np.ndarray, rng: np.random.Generator) -> Rows:
    """By-item rows with at most `most` (N,) people each, drawn at random."""
    item = np.repeat(np.arange(len(rows.indptr) - 1), rows.counts())
    order = np.lexsort((rng.random(len(item)), item))
    rank = np.empty(len(item), np.int64)
    rank[order] = np.arange(len(item)) - rows.indptr[:-1][item[order]]
    keep = rank < most[item]
    indptr = np.zeros(len(rows.indptr), np.int64)
    np.cumsum(np.bincount(item[keep], minlength=len(rows.indptr) - 1), out=indptr[1:])
    return Rows(indptr, rows.items[keep], rows.ratings[keep])


class Words:
    """TF-IDF rows of items over categories, brands and title words; each row has length 1.

    groups  the items of every category, brand and word (als.item_groups)
    """

    def __init__(self, groups: list[np.ndarray], n_items: int):
        item = np.concatenate([*groups, np.zeros(0, np.int64)])
        wide = np.array([len(items) for items in groups], np.int64)
        fact = np.repeat(np.arange(len(groups)), wide)
        order = np.argsort(item, kind="stable")
        self.fact, self.n_facts = fact[order], len(groups)
        weight = np.log(n_items / np.maximum(wide, 1.0))[self.fact]
        length = np.sqrt(np.bincount(item[order], weight**2, n_items)).clip(1e-9)
        self.weight = (weight / length[item[order]]).astype(np.float32)
        self.indptr = np.zeros(n_items + 1, np.int64)
        np.cumsum(np.bincount(item, minlength=n_items), out=self.indptr[1:])

    def table(self, items: np.ndarray) -> Tensor:
        """(len(items), number of facts) sparse."""
        place, at = Rows(self.indptr, np.arange(len(self.fact)), self.weight).flat(items)
        return torch.sparse_coo_tensor(
            torch.from_numpy(np.stack([place, self.fact[at]])),
            torch.from_numpy(self.weight[at]),
            (len(items), self.n_facts),
            check_invariants=False,
        ).coalesce()

    def dots(self, some: np.ndarray, others: np.ndarray) -> Tensor:
        """(len(some), len(others)) dot products of their rows."""
        if not self.n_facts or not len(some):
            return torch.zeros(len(some), len(others))
        right = self.table(others).T.coalesce()
        found = []
        for at in range(0, len(some), CHUNK):
            with warnings.catch_warnings():  # torch calls its sparse tables a beta
                warnings.simplefilter("ignore", UserWarning)
                found.append(torch.sparse.mm(self.table(some[at : at + CHUNK]), right).to_dense())
        return torch.cat(found)


def by_words(K: Tensor, y: Tensor, others: Tensor, strength: float) -> Tensor:
    """What a ridge regression says of other items: (n, C).

    K (E, E) dot products of the examples' words, y (E, C) their targets, others (n, E)
    """
    level = y.mean(0)
    factor = torch.linalg.cholesky(K + strength * torch.eye(len(K)))
    return level + others @ torch.cholesky_solve(y - level, factor)


def crossed(K: Tensor, y: Tensor, part: np.ndarray, strength: float) -> Tensor:
    """What `by_words` says of each part (E,) of the examples, having seen the others: (E, C)."""
    out = torch.empty_like(y)
    for p in range(PARTS):
        mine = torch.from_numpy(part == p)
        if mine.any():
            rest = ~mine
            out[mine] = by_words(K[rest][:, rest], y[rest], K[mine][:, rest], strength)
    return out


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


class Placing:
    """Places of items among users, from where their words put them and from their buyers.

    Y (N, C) places of the known items, keep (N,) bool; liked (U) rows by user; practice (E,) known
    items that are taken for new ones, each with its part (E,)
    begins  (E, C) where words put them, the part itself not having been seen
    """

    def __init__(
        self,
        Y: Tensor,
        liked: Rows,
        keep: np.ndarray,
        scale: float,
        practice: np.ndarray,
        part: np.ndarray,
        begins: Tensor,
    ):
        self.Y, self.scale, self.practice, self.part = Y, scale, practice, part
        self.begins = begins
        self.by_item = transpose(liked, len(Y))
        self.users, self.apart = places(Y, liked, keep, scale), []
        for p in range(PARTS):
            rest = keep.copy()
            rest[practice[part == p]] = False
            self.apart.append(places(Y, liked, rest, scale))

    def moved(self, users: Tensor, begin: Tensor, buyers: Rows, hold: float) -> Tensor:
        penalty = hold * penalties(buyers, len(users), self.scale)
        return fold_towards(users, begin, buyers, ALPHA0, penalty)

    def placed(self, items: np.ndarray, begin: Tensor, hold: float) -> Tensor:
        """(n, C) places of new items that begin there."""
        return self.moved(self.users, begin, rows_of(self.by_item, items), hold)

    def practised(self, most: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, float]:
        """Places of the practice items with at most so many (N,) buyers, and the hold that suits.

        That is the one with which they come closest to where these items are.
        """
        buyers = thinned(self.by_item, most, rng)
        real = self.Y[torch.from_numpy(self.practice)]
        best, least = None, float("inf")
        for hold in HOLDS if most.any() else HOLDS[:1]:
            place = torch.empty_like(real)
            for p, users in enumerate(self.apart):
                mine = self.part == p
                at = torch.from_numpy(mine)
                some = rows_of(buyers, self.practice[mine])
                place[at] = self.moved(users, self.begins[at], some, hold)
            error = float((place - real).square().sum())
            if best is None or error < least:
                best, least = (place, hold), error
        assert best is not None
        return best


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
    keep = old_item >= 0
    scale = penalty_scale(liked, len(liked.indptr) - 1, len(old_item), ALPHA0, REG, 1.0)
    level = out[0][torch.from_numpy(known)].mean(0)
    Y = torch.where(torch.from_numpy(keep)[:, None], out[0] - level, 0.0)
    Y = balanced(Y, liked, keep, scale)
    people = np.bincount(liked.items, minlength=len(old_item))
    bought = ~keep & (people > 0)
    if not len(new):
        return FoldedItems(out, Y, bought, float("nan"))

    rng = randomness.rng(seed, "fold items")
    practice, part = practice_of(known, rng)
    words, of_practice = Words(groups, len(old_item)), Y[torch.from_numpy(practice)]
    K, few = words.dots(practice, practice), slice(TRIED_ON)
    strength = min(
        STRENGTHS,
        key=lambda s: float(
            (crossed(K[few, few], of_practice[few], part[few], s) - of_practice[few]).square().sum()
        ),
    )
    begins = crossed(K, of_practice, part, strength)
    learner = Placing(Y, liked, keep, scale, practice, part, begins)
    stretch = float(Y.norm() / (out[0] - level)[torch.from_numpy(known)].norm().clamp_min(1e-12))
    real = out[0][torch.from_numpy(practice)]
    others = [learnt(real, table[torch.from_numpy(practice)], part)[0] for table in out[1:]]
    agree = []
    for some in (new[people[new] > 0], new[people[new] == 0]):
        if not len(some):
            continue
        begin = by_words(K, of_practice, words.dots(some, practice), strength)
        most = np.zeros(len(old_item), np.int64)
        most[practice] = rng.choice(people[some], len(practice))
        place, hold = learner.practised(most, rng)
        agree.append((cosine(level + place / stretch, real), len(some)))
        there, at = learner.placed(some, begin, hold), torch.from_numpy(some)
        out[0][at] = level + there / stretch
        for table, regression in zip(out[1:], others, strict=True):
            table[at] = regression(out[0][at])
        Y[at] = there
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
