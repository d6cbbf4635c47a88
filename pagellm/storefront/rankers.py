"""Rankers: a logit for every (person, item). Any ranker of a shop can stand in their place.

rank = Blend(popularity, factors)
rank(context)                           (N,) float64, higher is better

    popularity   ln(1 + households)
    frequency    -3 + ln(1 + orders) + households / most households
    als          implicit matrix factorisation (Hu et al., ICDM 2008), folded in from the history
    blend        ln(1 + orders) + .5 als, the default
    lightgbm     trees over habit, taste, categories and brands (trees.py)
    file         scores of any ranker outside, from a Parquet file (user, item, score)
    policy       logits of PageLLM's own policy for a page's first slot (page_ranker in front.py)
    compose      what PageLLM's composed pages think of each item, for rows of new items

A logit becomes a probability by Platt's rule, p = 1 / (1 + exp(-(alpha + beta logit))).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np

from pagellm.data.shop import Rows
from pagellm.data.tables import ids_of, read_table, told
from pagellm.stage import randomness
from pagellm.stage.config import PageLLMError
from pagellm.stage.hints import counted
from pagellm.storefront.parts import Context

__all__ = [
    "Als",
    "Blend",
    "Factors",
    "File",
    "Frequency",
    "Logits",
    "NAMES",
    "Platt",
    "Popularity",
    "Ranker",
    "calibration_error",
    "fit_factors",
    "fit_platt",
    "fold_in",
    "make_ranker",
]

NAMES = ("popularity", "frequency", "als", "blend", "file", "lightgbm", "policy", "compose")
FACTORS, ALPHA, RIDGE, SWEEPS = 64, 10.0, 50.0, 6


class Ranker(Protocol):
    """Anything with a name, which is part of every cache key, and a logit for every item.

    Where it also has of(context), which gives a function from items (n,) to their logits (n,), bit
    for bit those of the whole, a page that is ranked from kept rows costs no more in a large shop.
    """

    @property
    def name(self) -> str: ...

    def __call__(self, context: Context) -> np.ndarray: ...


class Logits:
    """A person's logits, indexed by items (n,) or a boolean mask; worked out as far as needed."""

    def __init__(self, ranker: Ranker, context: Context):
        self.ranker, self.context = ranker, context
        of = getattr(ranker, "of", None)
        self.some: Callable[[np.ndarray], np.ndarray] | None = of(context) if of else None

    @cached_property
    def all(self) -> np.ndarray:
        """(N,) float64."""
        return self.ranker(self.context)

    def __getitem__(self, items: np.ndarray) -> np.ndarray:
        if self.some is None or "all" in self.__dict__:
            return self.all[items]
        return self.some(items)


def dots(rows: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """(n,) product of each row with a vector: the same bits whichever other rows are there, which
    a matrix product does not promise.
    """
    return np.einsum("ij,j->i", rows, vector)


@dataclass(frozen=True)
class Factors:
    """Item factors and what folding a history in needs: item (N, d), gram (d, d) = item' item."""

    item: np.ndarray
    gram: np.ndarray

    @classmethod
    def of(cls, item: np.ndarray) -> "Factors":
        return cls(item, item.T @ item)

    def taste(self, context: Context) -> np.ndarray:
        """(d,) `fold_in` of a person's history; it remembers the last few: a page asks thrice."""
        item, count = (x.astype(np.int64).tobytes() for x in (context.item, context.count))
        return self.of_history(item, count)

    def liked(self, context: Context) -> np.ndarray:
        """(N,) every item's product with `taste`, read-only; it remembers the last two."""
        return self.of_taste(self.taste(context).tobytes())

    @cached_property
    def of_taste(self) -> Callable[[bytes], np.ndarray]:
        def products(taste: bytes) -> np.ndarray:
            found = dots(self.item, np.frombuffer(taste))
            found.setflags(write=False)
            return found

        return lru_cache(2)(products)

    @cached_property
    def of_history(self) -> Callable[[bytes, bytes], np.ndarray]:
        def folded(item: bytes, count: bytes) -> np.ndarray:
            return fold_in(self, np.frombuffer(item, np.int64), np.frombuffer(count, np.int64))

        return lru_cache(8)(folded)


def fold_in(factors: Factors, item: np.ndarray, count: np.ndarray) -> np.ndarray:
    """(d,) factors of a person from what was bought and how often; zeros without history.

    minimises sum_i c_i (w_i - x.y_i)^2 + 50 |x|^2 with w = 1 and c = 1 + 10 ln(1 + orders) for what
    was bought, w = 0 and c = 1 for all else.
    """
    Y = factors.item[item]
    extra = ALPHA * np.log1p(count)
    left = factors.gram + (Y * extra[:, None]).T @ Y + RIDGE * np.eye(Y.shape[1])
    return np.linalg.solve(left, Y.T @ (1 + extra))


def fit_factors(rows: Rows, count: np.ndarray, n_items: int, seed: int = 0) -> Factors:
    """Item factors of the objective above, by turns over people and items.

    rows   items of every user        count  orders that hold each of rows.items
    """
    start = randomness.rng(seed, "storefront", "als").normal(0.0, 0.1, (n_items, FACTORS))
    n_users = len(rows.indptr) - 1
    user = np.repeat(np.arange(n_users), rows.counts())
    order = np.argsort(rows.items, kind="stable")
    indptr = np.zeros(n_items + 1, dtype=np.int64)
    np.cumsum(np.bincount(rows.items, minlength=n_items), out=indptr[1:])
    items, users = start, np.zeros((n_users, FACTORS))
    for _ in range(SWEEPS):
        users = solve_side(Factors.of(items), rows.indptr, rows.items, count)
        items = solve_side(Factors.of(users), indptr, user[order], count[order])
    return Factors.of(items)


def solve_side(factors: Factors, indptr, item, count) -> np.ndarray:
    """`fold_in` for every row of a CSR table, (rows, d)."""
    out = np.zeros((len(indptr) - 1, factors.item.shape[1]))
    for row in np.flatnonzero(np.diff(indptr)):
        span = slice(indptr[row], indptr[row + 1])
        out[row] = fold_in(factors, item[span], count[span])
    return out


def habit_of(context: Context) -> Callable[[np.ndarray], np.ndarray]:
    """A function from items (n,) to ln(1 + orders) of each, 0 for what was never bought."""
    order = np.argsort(context.item)
    bought, times = context.item[order], np.log1p(context.count[order])

    def habit(items: np.ndarray) -> np.ndarray:
        if not len(bought):
            return np.zeros(len(items))
        at = np.minimum(np.searchsorted(bought, items), len(bought) - 1)
        return np.where(bought[at] == items, times[at], 0.0)

    return habit


@dataclass(frozen=True)
class Popularity:
    """households (N,): how many bought each item."""

    households: np.ndarray
    name: str = "popularity/1"

    def __call__(self, context: Context) -> np.ndarray:
        return np.log1p(self.households.astype(np.float64))

    def of(self, context: Context) -> Callable[[np.ndarray], np.ndarray]:
        return lambda items: np.log1p(self.households[items].astype(np.float64))


@dataclass(frozen=True)
class Frequency:
    """How often this person bought it, and a little popularity."""

    households: np.ndarray
    name: str = "frequency/1"

    def __call__(self, context: Context) -> np.ndarray:
        most = max(float(self.households.max(initial=0)), 1.0)
        logit = -3 + self.households / most
        logit[context.item] += np.log1p(context.count)
        return logit

    def of(self, context: Context) -> Callable[[np.ndarray], np.ndarray]:
        most = max(float(self.households.max(initial=0)), 1.0)
        habit = habit_of(context)
        return lambda items: (-3 + self.households[items] / most) + habit(items)


@dataclass(frozen=True)
class Als:
    """Taste: what people with such a history bought. Popularity where there is no history."""

    factors: Factors
    households: np.ndarray
    name: str = "als/1"

    def __call__(self, context: Context) -> np.ndarray:
        if not len(context.item):
            return self.households / max(float(self.households.max(initial=0)), 1.0)
        return self.factors.liked(context)

    def of(self, context: Context) -> Callable[[np.ndarray], np.ndarray]:
        if not len(context.item):
            most = max(float(self.households.max(initial=0)), 1.0)
            return lambda items: self.households[items] / most
        taste = self.factors.taste(context)
        return lambda items: dots(self.factors.item[items], taste)


@dataclass(frozen=True)
class Blend:
    """Habit and half of taste: ln(1 + orders) + .5 als."""

    factors: Factors
    households: np.ndarray
    name: str = "blend/1"

    def __call__(self, context: Context) -> np.ndarray:
        logit = 0.5 * Als(self.factors, self.households)(context)
        logit[context.item] += np.log1p(context.count)
        return logit

    def of(self, context: Context) -> Callable[[np.ndarray], np.ndarray]:
        taste, habit = Als(self.factors, self.households).of(context), habit_of(context)
        return lambda items: 0.5 * taste(items) + habit(items)


@dataclass(frozen=True)
class File:
    """Scores of an outside ranker: items and scores of each user.

    All other items come last, by popularity; so do all items of somebody without scores.
    """

    user: dict[str, int]
    rows: Rows  # ratings hold the scores
    households: np.ndarray  # (N,) how many bought each item
    name: str = "file/1"

    @classmethod
    def read(
        cls, path: str | Path, users: list[str], items: list[str], households: np.ndarray
    ) -> "File":
        """Read (user, item, score) with the shop's identifiers, and print what is left out.

        Raises PageLLMError for a score that is no number, a pair that stands there twice, or a file
        in which nothing is of this shop.
        """
        table = read_table(Path(path), ("user", "item"))
        if missing := [n for n in ("user", "item", "score") if n not in table.column_names]:
            raise PageLLMError(f"{path}: no column {missing[0]}; want user, item, score")
        print(told(path, table, ("user", "item", "score")), flush=True)
        known = {name: at for at, name in enumerate(users)}
        number = {name: at for at, name in enumerate(items)}
        names = [ids_of(table, "user", path), ids_of(table, "item", path)]
        user = np.array([known.get(u, -1) for u in names[0]], dtype=np.int64)
        item = np.array([number.get(i, -1) for i in names[1]], dtype=np.int64)
        try:
            score = table["score"].to_numpy().astype(np.float64)
        except (ValueError, TypeError):
            raise PageLLMError(f"{path}: column score is not numbers") from None
        if not np.isfinite(score).all():
            raise PageLLMError(f"{path}: a score is missing or not finite; leave such rows out")
        keep = (user >= 0) & (item >= 0)
        if not keep.any():
            raise PageLLMError(
                f"{path} names no user and item of this shop; use the shop's own ids"
            )
        if not keep.all():
            first = int(np.flatnonzero(~keep)[0])
            print(
                f"{path}: of {counted(len(keep), 'row')} {int((~keep).sum()):,} left out, whose "
                f"user or item the shop has not; the first: {names[0][first]}, {names[1][first]}",
                flush=True,
            )
        if lacking := len(users) - len(np.unique(user[keep])):
            print(
                f"{path}: of {counted(len(users), 'user')} {lacking:,} without a score: items come "
                "to them by popularity",
                flush=True,
            )
        if len(np.unique(user[keep] * len(items) + item[keep])) < keep.sum():
            raise PageLLMError(f"{path}: a user has two scores for one item; want each pair once")
        order = np.argsort(user[keep], kind="stable")
        indptr = np.zeros(len(users) + 1, dtype=np.int64)
        np.cumsum(np.bincount(user[keep], minlength=len(users)), out=indptr[1:])
        return cls(known, Rows(indptr, item[keep][order], score[keep][order]), households)

    def __call__(self, context: Context) -> np.ndarray:
        least = self.rows.ratings.min(initial=0.0) - 1.0
        logit = least + 0.5 * self.households / max(float(self.households.max(initial=0)), 1.0)
        if context.user in self.user:
            items, score = self.rows.of(self.user[context.user])
            logit[items] = score
        return logit


def make_ranker(name: str, households: np.ndarray, factors: Factors) -> Ranker:
    """A ranker of NAMES but those that are read from elsewhere: `file`, `lightgbm`, `policy` and
    `compose`.
    """
    if name == "popularity":
        return Popularity(households)
    if name == "frequency":
        return Frequency(households)
    return (Als if name == "als" else Blend)(factors, households)


@dataclass(frozen=True)
class Platt:
    """p = 1 / (1 + exp(-(alpha + beta logit)))."""

    alpha: float = 0.0
    beta: float = 1.0

    def __call__(self, logit: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-np.clip(self.alpha + self.beta * logit, -500, 500)))


def fit_platt(logit: np.ndarray, bought: np.ndarray, weight: np.ndarray, rounds=50) -> Platt:
    """Weighted logistic regression on one number, by Newton's method. All (n,).

    Raises ValueError where everything or nothing was bought.
    """
    if not 0 < (weight * bought).sum() < weight.sum():
        raise ValueError("fit_platt: want some that were bought and some that were not")
    X = np.stack([np.ones(len(logit)), logit], axis=1)
    share = (weight * bought).sum() / weight.sum()
    at = np.array([np.log(share / (1 - share)), 0.0])
    for _ in range(rounds):
        p = Platt(*at)(logit)
        gradient = X.T @ (weight * (bought - p)) - 1e-6 * at
        curve = (X * (weight * p * (1 - p))[:, None]).T @ X + 1e-6 * np.eye(2)
        step = np.linalg.solve(curve, gradient)
        at = at + step * min(1.0, 5.0 / max(np.abs(step).max(), 1e-12))
        if np.abs(step).max() < 1e-9:
            break
    return Platt(float(at[0]), float(at[1]))


def calibration_error(p: np.ndarray, bought: np.ndarray, weight: np.ndarray, bins=10) -> float:
    """Expected calibration error over bins of equal weight:

    mean |share bought - mean p|. All (n,).
    """
    order = np.argsort(p, kind="stable")
    middle = np.cumsum(weight[order]) - weight[order] / 2
    edge = middle / weight.sum() * bins
    place = np.minimum(edge.astype(np.int64), bins - 1)
    total = np.bincount(place, weight[order], bins)
    gap = np.bincount(place, (weight * (bought - p))[order], bins)
    return float(np.abs(gap).sum() / total.sum())
