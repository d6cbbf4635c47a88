"""From candidates to a row: scores, slots, propensities, and which theme goes where.

score = logit + a z(ret) + b z(agree) + c z(reward) - mu max over items above of sim(i, j)

z is taken over the row's candidates with the population's standard deviation; a constant column is
0. sim is 1 for near-duplicates, .5 within a leaf category, .25 within its parent. With all weights
at 0 the score is the ranker's logit itself, bit for bit.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pagellm.pages.energy import Near
from pagellm.storefront.parts import Candidates, Slots, Weights

__all__ = ["Quota", "SameLeaf", "assign", "fill", "fuse", "row_value", "z_score"]

MOST_NODES = 20_000  # of the search in assign
SLOT_DECAY, ROW_DECAY = 0.85, 0.75  # attention: factor for each later slot, and for each lower row


def z_score(column: np.ndarray) -> np.ndarray:
    """(M,) minus its mean, over its standard deviation; zeros for a constant column."""
    column = np.asarray(column, dtype=np.float64)
    if not len(column) or np.ptp(column) == 0:
        return np.zeros(len(column))
    return (column - column.mean()) / column.std()


def fuse(
    logit: np.ndarray,
    ret: np.ndarray,
    agree: np.ndarray,
    weights: Weights,
    reward: np.ndarray | None = None,
) -> np.ndarray:
    """(M,) float64 scores without redundancy.

    All inputs (M,). Raises ValueError on unequal lengths.
    """
    columns = [logit, ret, agree] + ([] if reward is None else [reward])
    if len({np.shape(column) for column in columns}) != 1 or np.ndim(logit) != 1:
        shapes = ", ".join(str(np.shape(column)) for column in columns)
        raise ValueError(f"fuse: shapes {shapes}, want one (M,) for all")
    score = np.array(logit, dtype=np.float64)
    for weight, column in zip(
        (weights.ret, weights.agree, weights.reward), columns[1:], strict=False
    ):
        if weight:
            score += weight * z_score(column)
    return score


@dataclass(frozen=True)
class SameLeaf:
    """How alike two items are:

    leaf, parent (N,) int64, -1 where unknown; near-duplicates or None.
    """

    leaf: np.ndarray
    parent: np.ndarray
    near: Near | None = None

    def among(self, items: np.ndarray) -> Callable[[int], np.ndarray]:
        """A function from a place among `items` (M,) to the likeness of its item to each of them,
        (M,): 1, .5, .25 or 0.
        """
        leaf, parent = self.leaf[items], self.parent[items]
        where = {} if self.near is None else {i: n for n, i in enumerate(items.tolist())}

        def to(place: int) -> np.ndarray:
            sim = np.zeros(len(items))
            if parent[place] >= 0:
                sim[parent == parent[place]] = 0.25
            if leaf[place] >= 0:
                sim[leaf == leaf[place]] = 0.5
            if self.near is not None:
                for other in self.near.of(int(items[place])).tolist():
                    if other in where:
                        sim[where[other]] = 1.0
            return sim

        return to


@dataclass
class Quota:
    """Limits on a row, beside its score.

    similar, mu   the cost of repeating: mu times the likeness to the nearest item above in this row
    groups, left  (N,) bool each, such as a category or what is sponsored; and how many items of
                  each the row may still show
    """

    similar: SameLeaf | None = None
    mu: float = 0.0
    groups: Sequence[np.ndarray] = ()
    left: Sequence[int] = ()


def fill(
    score: np.ndarray,
    candidates: Candidates,
    slots: int,
    quota: Quota,
    taken: np.ndarray,
    explore: float,
    uniform: np.ndarray,
    given: np.ndarray | None = None,
) -> Slots:
    """The items of a row, top first; fewer than `slots` where fewer are legal.

    score    (M,) of the candidates        taken  (N,) bool: shown above on the page, never again
    explore  tau: each slot is drawn by softmax(score / tau) over what is still legal; 0: the best
             one
    uniform  (slots,) in [0, 1): the draws
    given    (K,) places of candidates that are shown whatever the draws: their propensities are
             those of a page that another policy drew
    Equal scores go by item number. propensity is P(item | slots above), exactly; 1 without
    exploring. Raises ValueError on scores of another length or too few draws, and for a given place
    that is not legal.
    """
    item = candidates.item
    draws = slots if explore and given is None else 0
    if score.shape != item.shape or len(uniform) < draws:
        raise ValueError(
            f"fill: score {score.shape} for {item.shape} candidates, {len(uniform)} draws for "
            f"{slots} slots: want one score a candidate and one draw a slot"
        )
    legal = ~taken[item]
    redundancy = np.zeros(len(item))
    left, members = list(quota.left), [group[item] for group in quota.groups]
    for group, most in zip(members, left, strict=True):
        if most <= 0:
            legal &= ~group
    chosen: list[int] = []
    costs, chance = [], []
    rising = bool((item[1:] > item[:-1]).all())
    to = quota.similar.among(item) if quota.similar is not None and quota.mu else None
    while len(chosen) < slots and len(now := np.flatnonzero(legal)):
        total = score[now] - quota.mu * redundancy[now] if quota.mu else score[now]
        if given is None and rising and not explore:
            at, p = int(total.argmax()), 1.0  # of equals the first has the smallest number
        elif given is None:
            at, p = pick(total, item[now], explore, uniform[len(chosen)] if explore else 0.0)
        elif len(chosen) == len(given):
            break
        else:
            at, p = chance_of(total, now, int(given[len(chosen)]), explore)
        place = now[at]
        chosen.append(place)
        costs.append(-quota.mu * redundancy[place] if quota.mu else 0.0)
        chance.append(p)
        legal[place] = False
        if to is not None:
            redundancy = np.maximum(redundancy, to(place))
        for number, group in enumerate(members):
            left[number] -= int(group[place])
            if left[number] <= 0:
                legal &= ~group
    place = np.array(chosen, dtype=np.int64)
    cost = np.array(costs, dtype=np.float64)
    total = score[place] + cost if quota.mu else score[place]
    return Slots(item[place], place, total, cost, np.array(chance, dtype=np.float64))


def pick(total: np.ndarray, item: np.ndarray, explore: float, draw: float) -> tuple[int, float]:
    """place, propensity of the item that fills a slot."""
    if not explore:
        best = np.flatnonzero(total == total.max())
        return int(best[np.argmin(item[best])]), 1.0
    # Candidates are sorted by number, so that a draw finds the same item whatever their order.
    order = np.argsort(item, kind="stable")
    weight = np.exp((total[order] - total.max()) / explore)
    edge = np.cumsum(weight)
    at = min(int(np.searchsorted(edge, draw * edge[-1], side="right")), len(order) - 1)
    return int(order[at]), float(weight[at] / edge[-1])


def chance_of(total: np.ndarray, now: np.ndarray, place: int, explore: float) -> tuple[int, float]:
    """Where a place stands among the legal ones `now` (M',), and its propensity."""
    at = int(np.searchsorted(now, place))
    if at == len(now) or now[at] != place:
        raise ValueError(f"fill: given place {place} is shown above already, or may not be shown")
    if not explore:
        return at, float(total[at] == total.max())
    weight = np.exp((total - total.max()) / explore)
    return at, float(weight[at] / weight.sum())


def row_value(p: np.ndarray, row: int = 1) -> float:
    """.75^(row - 1) sum_k .85^(k - 1) p_k of a row's items, top first; row counts from 1."""
    return float(ROW_DECAY ** (row - 1) * (SLOT_DECAY ** np.arange(len(p)) @ p))


def assign(value: np.ndarray, conflict: np.ndarray) -> tuple[np.ndarray, bool]:
    """The theme of each position, so that their values' sum is largest and no two conflict.

    value     (G, S) 0 or more; -inf where a theme may not stand
    conflict  (G, G) bool, symmetric
    returns   (S,) int64 theme or -1 for none, each theme once; and whether it is proven to be the
              best

    Branch and bound: no solution is better than every open position with its best legal theme, nor
    than the best legal themes at their best open position. After 20,000 nodes the best so far is
    taken.
    """
    n_themes, n_positions = value.shape
    if conflict.shape != (n_themes, n_themes):
        raise ValueError(f"assign: conflict {conflict.shape} for {n_themes} themes")
    best, best_value, nodes = [-1] * n_positions, -1.0, 0
    order = [np.lexsort((np.arange(n_themes), -value[:, s])).tolist() for s in range(n_positions)]
    worth, clash = value.tolist(), conflict.tolist()
    later = np.maximum.accumulate(value[:, ::-1], axis=1)[:, ::-1].tolist()  # best from s on

    def no_better(s: int, legal: set[int], total: float) -> bool:
        """Whether no choice for the positions from s on makes more of `total` than the best has."""
        by_theme = sorted([later[g][s] for g in legal if later[g][s] > 0], reverse=True)
        if total + sum(by_theme[: n_positions - s]) <= best_value + 1e-12:
            return True
        by_position = 0.0
        for t in range(s, n_positions):
            first = next((g for g in order[t] if g in legal), -1)
            by_position += max(worth[first][t], 0.0) if first >= 0 else 0.0
        return total + by_position <= best_value + 1e-12

    def search(s: int, chosen: list[int], legal: set[int], total: float) -> bool:
        nonlocal best, best_value, nodes
        nodes += 1
        if s == n_positions:
            if total > best_value + 1e-12:
                best, best_value = list(chosen), total
            return True
        if nodes > MOST_NODES:
            return False
        if no_better(s, legal, total):
            return True
        proven = True
        for g in order[s]:
            if g in legal and worth[g][s] > -np.inf:
                rest = {h for h in legal if h != g and not clash[g][h]}
                proven &= search(s + 1, [*chosen, g], rest, total + worth[g][s])
        return search(s + 1, [*chosen, -1], legal, total) and proven

    proven = search(0, [], set(range(n_themes)), 0.0) if n_positions else True
    return np.array(best, dtype=np.int64), proven
