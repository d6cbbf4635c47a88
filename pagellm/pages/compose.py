"""Builds pages from predicted picks: which items are shown, in which slots. Numpy only, in batches.

    page = compose(opinion, kin, Taste(worth=0.4, order=0.5, spread=0.4), k=20)
    taste = choose(lambda t: scores_of(compose(opinion, kin, t, 20)), [plain rows], GRID)

Three numbers control how a page is built:

    worth   an item's value is its chance times exp(worth * expected stars of this user for it)
    spread  MMR chooses the items by value; its strength is `spread` times the mean value of a slot
    order   the chosen items are sorted by value * exp(order * mean stars of the item)

Variety decides which items are on the page, and the sort decides their slots. So more variety does
not disturb the order.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

import numpy as np

from pagellm.pages.rerank import Kin, mmr, placed, sort_page
from pagellm.pages.yardstick import ACCURACY, means

__all__ = [
    "DOWN",
    "ENOUGH",
    "accuracy_lost",
    "GRID",
    "Opinion",
    "Taste",
    "as_varied",
    "choose",
    "compose",
    "margin",
    "ranked_by_value",
    "unit_of",
    "value_of",
    "worst",
]

DOWN = ("WMRD", "redundancy")  # measures of which less is better
# Standard errors that a margin needs: 2 would be level at the 95% level, the best of many settings
# flatters, so one more.
ENOUGH = 3.0
FEWEST = 30  # users
LOSS = 0.001  # share of a baseline's mean accuracy that counts as one loss
GRID: dict[str, tuple[float, ...]] = {
    "worth": (0.0, 0.1, 0.2, 0.3, 0.4, 0.5),
    "order": (0.0, 0.15, 0.3, 0.5, 0.75, 1.0),
    "spread": (0.0, 0.2, 0.4, 0.6, 0.9, 1.3, 1.8, 2.5),
}


@dataclass(frozen=True)
class Opinion:
    """Predictions about the candidates of some users.

    user   (U,) int64
    item   (U, M) int64, -1 where there is no candidate
    chance (U, M) chance of a pick, comparable over users (outcome.Calibration)
    stars  (U, M) expected stars less the shop's mean; 0 where the shop has none
    mean   (U, M) mean stars of the item less the shop's mean; 0 where unknown
    """

    user: np.ndarray
    item: np.ndarray
    chance: np.ndarray
    stars: np.ndarray
    mean: np.ndarray


@dataclass(frozen=True)
class Taste:
    """How pages are built. All 0: the candidates of largest chance, in that order."""

    worth: float = 0.0
    order: float = 0.0
    spread: float = 0.0


Ranked = tuple[np.ndarray, np.ndarray, np.ndarray]


def ranked_by_value(o: Opinion, worth: float) -> Ranked:
    """item, chance * worth, mean (U, M) of the candidates, the largest value first."""
    value = np.where(o.item >= 0, o.chance * np.exp(worth * (o.stars + o.mean)), -np.inf)
    best = np.argsort(-value, axis=1, kind="stable")
    item, value, mean = (np.take_along_axis(x, best, 1) for x in (o.item, value, o.mean))
    return item, value, mean


def unit_of(o: Opinion, taste: Taste, k: int = 20) -> float:
    """What a slot is worth: the mean of chance * worth over the best k of each user."""
    return mean_of_best(ranked_by_value(o, taste.worth)[1], k)


def mean_of_best(value: np.ndarray, k: int) -> float:
    """The mean over the first k of values (U, M); what is below 0 counts as 0."""
    value = value[:, :k]
    return float(np.maximum(value, 0.0).mean()) if value.size else 0.0


def compose(
    o: Opinion,
    kin: Kin,
    taste: Taste,
    k: int = 20,
    depth: int = 100,
    within: int = 100,
    unit: float | None = None,
    ranked: Ranked | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Page of k and the ranks after it: item (U, depth), score (U, depth), slots (U,) filled.

    Candidates are ranked by chance * worth; -1 past the last. Scores fall.

    within  the best so many candidates may stand on the page, whatever the depth
    unit    of spread; None: `unit_of` these users. With a number, a page does not depend on who
            else is asked about
    ranked  what `ranked_by_value` gives, where it is at hand
    """
    item, value, mean = ranked_by_value(o, taste.worth) if ranked is None else ranked
    unit = mean_of_best(value, k) if unit is None else unit
    column = mmr(item[:, :within], value[:, :within], kin, k, taste.spread * unit)
    column = sort_page(column, np.log(np.maximum(value, 1e-12)) + taste.order * mean)
    item, score = placed(item, value, column)
    slots = np.minimum((item >= 0).sum(1), k)
    item, score = item[:, :depth], score[:, :depth]
    return item, score, slots


def margin(
    ours: dict[str, np.ndarray], row: dict[str, np.ndarray], name: str
) -> tuple[float, float]:
    """How far a metric is above 99% of a baseline's value: mean over users, and standard error.

    ours, row  name -> (U,) scores of the same users (ranked.Scorer), NaN where undefined
    """
    sign = -1.0 if name in DOWN else 1.0
    difference = sign * (ours[name] - row[name])
    kept = difference[~np.isnan(difference)]
    if len(kept) < 2:
        return 0.0, np.inf
    allowed = 0.01 * abs(float(np.nanmean(row[name])))
    return float(kept.mean()) + allowed, max(float(kept.std()) / len(kept) ** 0.5, 1e-9)


def worst(
    ours: dict[str, np.ndarray], rows: list[dict[str, np.ndarray]], names: tuple[str, ...]
) -> float:
    """The smallest margin over baselines and metrics, in standard errors; inf if none is defined.

    A metric that is defined for fewer than FEWEST users is too noisy and is left out.
    """
    found = [
        margin(ours, row, name)
        for row in rows
        for name in names
        if name in row and (~np.isnan(row[name])).sum() >= FEWEST and np.nanstd(row[name]) > 0
    ]
    return min((mean / error for mean, error in found), default=np.inf)


def accuracy_lost(
    ours: dict[str, np.ndarray], rows: list[dict[str, np.ndarray]], names: tuple[str, ...]
) -> float:
    """How far accuracy may be below a baseline's, at the worst, in whole LOSSES of its value.

    Accuracy counts as its mean less one standard error of the difference, so that the fewer users
    there are, the less of it is given up. Half a LOSS counts as none.
    """
    worst = 0.0
    for row in rows:
        for name in set(names) & set(ACCURACY) & set(row):
            more = row[name] - ours[name]
            more, size = more[~np.isnan(more)], max(abs(float(np.nanmean(row[name]))), 1e-9)
            if len(more):
                worst = max(worst, float(more.mean() + more.std() / len(more) ** 0.5) / size)
    return float(np.round(worst / LOSS))


def value_of(
    ours: dict[str, np.ndarray], rows: list[list[dict]], names: tuple[str, ...]
) -> tuple[float, ...]:
    """What `choose` makes largest: no accuracy lost, then the worst margin over each group.

    rows  groups of baselines. Accuracy is compared with the first. Up to ENOUGH standard errors
          the first group's margin counts, beyond that the second's, and so on

    Margins are in standard errors. Alone they would sell a good part of the hits for variety or
    order where few users make the errors large.
    """
    found = [worst(ours, group, names) for group in rows]
    lost = accuracy_lost(ours, rows[0], names) if rows else 0.0
    return (-lost, *(min(x, ENOUGH) for x in found[:-1]), found[-1])


def choose(
    scored: Callable[[Taste], dict[str, np.ndarray]],
    rows: list[list[dict]],
    names: tuple[str, ...],
    grid: dict[str, tuple[float, ...]] = GRID,
    rounds: int = 3,
) -> tuple[Taste, dict[Taste, tuple[float, ...]]]:
    """The Taste whose smallest margin over `rows` is largest; and all that were tried.

    scored  a Taste -> validation scores of its pages
    rows    groups of baselines, the most important group first

    "Largest" is by `value_of`. Every other value of each grid is tried with those of the others:
    from the middle alone the search can get stuck. From the best of these one number after the
    other is moved over its whole grid, until none gains.
    """
    tried: dict[Taste, tuple[float, ...]] = {}

    def value(taste: Taste) -> tuple[float, ...]:
        if taste not in tried:
            tried[taste] = value_of(scored(taste), rows, names)
        return tried[taste]

    coarse = product(*(values[::2] for values in grid.values()))
    at = max(
        (dict(zip(grid, some, strict=True)) for some in coarse), key=lambda x: value(Taste(**x))
    )
    for _ in range(rounds):
        before = dict(at)
        for name, values in grid.items():
            found = [value(Taste(**(at | {name: v}))) for v in values]
            at[name] = values[found.index(max(found))]
        if at == before:
            break
    return Taste(**at), tried


def as_varied(
    taste: Taste,
    scored: Callable[[Taste], dict[str, np.ndarray]],
    shipped: dict[str, np.ndarray],
    spreads: tuple[float, ...] = GRID["spread"],
    halvings: int = 3,
) -> Taste:
    """The taste with the smallest spread at which pages vary no less than those of a plain row.

    scored    a Taste -> validation scores of its pages
    shipped   scores of the plain row's pages
    spreads   tried one after the other; between the last two the interval is halved
    returns   the taste as it is where its mean ILD is not lower, where items have no categories, or
              where so much spread brings Recall@20 or NDCG@100 below the plain row's means
    """
    theirs = means(shipped)

    @cache
    def ours(spread: float) -> dict[str, float]:
        return means(scored(replace(taste, spread=spread)))

    def varied(spread: float) -> bool:
        return ours(spread)["ILD"] >= theirs["ILD"]

    if "ILD" not in theirs or varied(taste.spread):
        return taste
    below, enough = taste.spread, None
    for spread in (s for s in spreads if s > taste.spread):
        if varied(spread):
            enough = spread
            break
        below = spread
    if enough is None:
        return taste
    for _ in range(halvings):
        middle = (below + enough) / 2
        below, enough = (below, middle) if varied(middle) else (middle, enough)
    lost = any(ours(enough)[m] < theirs[m] for m in ACCURACY if m in theirs)
    return taste if lost else replace(taste, spread=enough)
