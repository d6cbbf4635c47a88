"""Statistics of results: intervals, differences, effect sizes, rank correlation, calibration.

Three functions give a mean with a 95% bootstrap interval:

    summary(x)         of one score a user: draws users
    paired(a, b)       of a - b, two systems on the same users, one seed of training: draws users
    difference(a, b)   the same for several seeds: draws seeds, then users

The last two also give a two-sided p-value from the same draws; `holm` corrects several of them.
`interval(a, b)` takes whichever of the last two fits the number of seeds. All three draw with
replacement from seeded generators, so the same input gives the same interval. `paired` is `summary`
of the difference. `difference` has a generator of its own: for one seed its interval equals that of
`paired` up to the noise of the draws, not in every digit.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from pagellm.pages.metrics import BLOCK

__all__ = [
    "average_ranks",
    "calibration",
    "difference",
    "difference_test",
    "effect",
    "holm",
    "interval",
    "p_value",
    "paired",
    "reliability",
    "spearman",
    "summary",
    "wilson",
    "with_holm",
    "within_users",
]


def summary(values: np.ndarray, seed: int, n_boot: int = 1000) -> dict[str, Any]:
    """Mean over users with its 95% percentile bootstrap interval.

    values   (U,) one score a user; NaN, where it is undefined, is left out
    seed     of the draws
    n_boot   number of draws
    returns  mean, low, high (None if no user counts); count: how many users count; coverage: their
             share of all users
    """
    return summed(np.asarray(values, dtype=np.float64), seed, n_boot)[0]


def summed(values: np.ndarray, seed: int, n_boot: int) -> tuple[dict[str, Any], np.ndarray]:
    """What `summary` returns, and the bootstrap means behind it: (n_boot,), or none, (0,)."""
    kept = values[~np.isnan(values)]
    if len(kept) == 0:
        return {"mean": None, "low": None, "high": None, "coverage": 0.0, "count": 0}, kept
    means = drawn_means(kept, seed, n_boot)
    low, high = np.quantile(means, [0.025, 0.975])
    found = {
        "mean": float(kept.mean()),
        "low": float(low),
        "high": float(high),
        "coverage": len(kept) / len(values),
        "count": len(kept),
    }
    return found, means


def drawn_means(kept: np.ndarray, seed: int, n_boot: int) -> np.ndarray:
    """(n_boot,) means of len(kept) values drawn with replacement."""
    few = len(kept) * n_boot <= KEPT
    blocks = kept_rows(len(kept), seed, n_boot) if few else drawn_rows(len(kept), seed, n_boot)
    return np.concatenate([kept[block].mean(1) for block in blocks])


KEPT = 4_000_000  # draws that are kept for the next metric of the same users


def drawn_rows(n: int, seed: int, n_boot: int) -> Iterable[np.ndarray]:
    """Blocks (b, n) of numbers below n, n_boot rows in all."""
    rng = np.random.Generator(np.random.PCG64(seed))
    step = max(1, BLOCK // n)
    for at in range(0, n_boot, step):
        yield rng.integers(n, size=(min(step, n_boot - at), n), dtype=np.int32)


@lru_cache(maxsize=1)
def kept_rows(n: int, seed: int, n_boot: int) -> list[np.ndarray]:
    """The blocks of `drawn_rows`: a table asks for the same ones again and again."""
    return list(drawn_rows(n, seed, n_boot))


def p_value(means: np.ndarray) -> float:
    """Two-sided p-value of "the true mean is 0", from bootstrap means (n,).

    Twice the smaller share of draws on either side of 0, with one draw added to both counts and at
    most 1, so that n draws never say less than 2 / (n + 1). It is below .05 where the 95%
    percentile interval leaves 0 out, up to one draw.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 15; the added
    draw: Davison and Hinkley, Bootstrap Methods, 1997, section 4.2.
    """
    smaller = min((means <= 0).sum(), (means >= 0).sum())
    return float(min(1.0, 2 * (smaller + 1) / (len(means) + 1)))


def holm(p: Sequence[float] | np.ndarray) -> np.ndarray:
    """p-values corrected for how many there are (Holm's step-down procedure).

    p (n,). The i-th smallest is multiplied by n - i + 1; none may fall below a smaller one, and
    none above 1. Rejecting those at or below .05 keeps the chance of any false one at .05. NaN
    stays NaN and does not count.

    Source: Holm, Scandinavian Journal of Statistics 6, 1979.
    """
    p = np.asarray(p, dtype=np.float64)
    out = np.full(len(p), np.nan)
    known = np.flatnonzero(~np.isnan(p))
    order = known[np.argsort(p[known], kind="stable")]
    steps = np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1))
    out[order] = np.minimum(steps, 1.0)
    return out


def with_holm(records: list[dict], family: str) -> list[dict]:
    """Give records that have a p also p_holm, corrected over those of the same family.

    family  the key whose value says which records belong together
    """
    for name in dict.fromkeys(r[family] for r in records):
        some = [r for r in records if r[family] == name and r.get("p") is not None]
        for r, p in zip(some, holm([r["p"] for r in some]), strict=True):
            r["p_holm"] = float(p)
    return records


def paired(a: np.ndarray, b: np.ndarray, seed: int = 0, n_boot: int = 1000) -> dict[str, Any]:
    """Mean of a - b over the users for whom both are defined, with its paired bootstrap interval.

    a, b  (U,) scores of the same users, in the same order
    The other arguments, and what it returns, as in `summary`; and p, see `p_value` (None if no user
    counts).

    Raises ValueError on unequal lengths.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"paired: {a.shape} against {b.shape}: want scores of the same users")
    gap = a - b
    found, means = summed(gap, seed, n_boot)
    return found | {"p": p_value(means) if len(means) else None}


DRAWN = 2_000_000  # counts of users in one block of draws
REUSED = 16_000_000  # counts of users that are kept for the next entry of a table


def resamples(S: int, U: int, draws: int, seed: int) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    """Blocks of draws with replacement: how often each seed (b, S) and each user (b, U) is drawn.

    Every entry of a table asks for the same draws, so they are kept where they are few.
    """
    if draws * U <= REUSED:
        return _few_resamples(S, U, draws, seed)
    return _resamples(S, U, draws, seed)


@lru_cache(maxsize=2)
def _few_resamples(S: int, U: int, draws: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    return list(_resamples(S, U, draws, seed))


def _resamples(S: int, U: int, draws: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.Generator(np.random.Philox(key=seed))
    rows = max(1, DRAWN // U)
    for start in range(0, draws, rows):
        some = range(start, min(draws, start + rows))
        seeds, users = np.empty((len(some), S)), np.empty((len(some), U), dtype=np.int32)
        for d in range(len(some)):
            seeds[d] = np.bincount(rng.integers(S, size=S), minlength=S)
            users[d] = np.bincount(rng.integers(U, size=U), minlength=U)
        yield seeds, users


def difference(
    a: list[np.ndarray], b: list[np.ndarray], draws: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """`difference_test` without p: mean, low, high."""
    return difference_test(a, b, draws, seed)[:3]


def difference_test(
    a: list[np.ndarray], b: list[np.ndarray], draws: int = 2000, seed: int = 0
) -> tuple[float, float, float, float]:
    """Mean of a - b over seeds and users, its 95% interval and p: a paired two-level bootstrap.

    a, b     one (U,) array for each seed of training, users in the same order everywhere, NaN where
             undefined
    draws    each draws seeds with replacement, then users with replacement
    seed     of the draws
    returns  mean, low, high, p (see `p_value`); NaN if no score is defined in both
    """
    delta = np.stack(a) - np.stack(b)  # (S, U)
    defined = ~np.isnan(delta)
    if not defined.any():
        return (float("nan"),) * 4
    filled = np.where(defined, delta, 0.0)
    known = defined.astype(np.float64)
    means = np.concatenate(
        [
            ((seeds @ filled) * users).sum(1) / np.maximum(((seeds @ known) * users).sum(1), 1)
            for seeds, users in resamples(len(delta), delta.shape[1], draws, seed)
        ]
    )
    low, high = np.quantile(means, [0.025, 0.975])
    return float(filled.sum() / defined.sum()), float(low), float(high), p_value(means)


def interval(
    a: list[np.ndarray], b: list[np.ndarray], seed: int = 0, n_boot: int = 1000
) -> tuple[float, float, float, float]:
    """Mean of a - b with its 95% interval: by `paired` for one seed, by
    `difference_test` for several.

    a, b     one (U,) array for each seed of training, users in the same order everywhere
    returns  mean, low, high, p; NaN if no score is defined in both
    """
    if len(a) > 1:
        return difference_test(a, b, n_boot, seed)
    found = paired(a[0], b[0], seed, n_boot)
    if not found["count"]:
        return (math.nan,) * 4
    return found["mean"], found["low"], found["high"], found["p"]


def effect(a: list[np.ndarray], b: list[np.ndarray]) -> float:
    """Effect size d: the mean of a - b over its standard deviation among users.

    0 where a and b are equal; infinite where all users differ by the same amount. A user's
    difference is the mean over seeds. Arguments as in `difference`.
    """
    gap = np.stack(a) - np.stack(b)  # (S, U)
    known = gap[:, ~np.isnan(gap).all(0)]
    if not known.size or not np.nanmax(np.abs(known)):
        return 0.0
    mean, spread = float(np.nanmean(known)), float(np.std(np.nanmean(known, axis=0)))
    return mean / spread if spread > 1e-9 * abs(mean) else float(np.copysign(np.inf, mean))


def wilson(right: float, n: int, z: float = 1.96) -> tuple[float, float, float]:
    """A share right / n with its Wilson score interval.

    right    how many of n are right; a tie may count one half
    z        standard errors on either side: 1.96 for 95%
    returns  share, low, high, with 0 <= low <= share <= high <= 1. For n = 0 the share is NaN and
             the interval is the whole of 0 to 1.

    Source: Wilson, Journal of the American Statistical Association 22, 1927.
    """
    if n == 0:
        return math.nan, 0.0, 1.0
    p, q = right / n, z * z / n
    half = z * math.sqrt(p * (1 - p) / n + q / (4 * n))
    low, high = (p + q / 2 - half) / (1 + q), (p + q / 2 + half) / (1 + q)
    return p, min(p, max(0.0, low)), max(p, min(1.0, high))


def average_ranks(levels: Sequence[float] | np.ndarray) -> np.ndarray:
    """(n,) ranks from 1, highest level first; equal levels share the mean of their ranks.

    NaN (unknown) is lowest.
    """
    levels = np.asarray(levels, dtype=np.float64)
    levels = np.where(np.isnan(levels), -np.inf, levels)
    _, inverse, count = np.unique(-levels, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[inverse]


def spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    """Spearman's rank correlation of a and b, both (n,), in [-1, 1]; equal values share a rank.

    None for fewer than 2 values, and where a or b holds one value only.
    """
    ranks = average_ranks(a), average_ranks(b)
    if len(a) < 2 or min(r.std() for r in ranks) == 0:
        return None
    return float(np.corrcoef(*ranks)[0, 1])


def calibration(margin: np.ndarray, bins: int = 10) -> float | None:
    """Expected calibration error of the confidence p = sigma(|margin|), which is from 1/2 to 1.

    The mean of |share right - mean confidence| over equally wide bins of confidence, weighted by
    their counts.

    margin   (n,) reward of the better page minus that of the worse one; above 0 is right, 0 is half
             right
    returns  from 0 to 1; None for n = 0
    """
    if len(margin) == 0:
        return None
    confidence = 1.0 / (1.0 + np.exp(-np.clip(np.abs(margin), 0, 60)))
    right = (margin > 0) + 0.5 * (margin == 0)
    index = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    total = np.bincount(index, minlength=bins)
    gap = np.abs(np.bincount(index, right, bins) - np.bincount(index, confidence, bins))
    return float(gap[total > 0].sum() / len(margin))


def within_users(score: np.ndarray, picked: np.ndarray, there: np.ndarray) -> np.ndarray:
    """Pearson correlation of a score with picks, or with hits, over each user's candidates.

    score, picked  (U, M) numbers    there (U, M) bool: which of them count
    returns        (U,) in -1..1; NaN where score or picks are the same for all candidates
    """
    x, y = (np.where(there, v, np.nan).astype(float) for v in (score, picked))
    x, y = (v - np.nanmean(v, 1, keepdims=True) for v in (x, y))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.nansum(x * y, 1) / np.sqrt(np.nansum(x * x, 1) * np.nansum(y * y, 1))


def reliability(chance: np.ndarray, picked: np.ndarray, there: np.ndarray) -> list[float]:
    """Observed over predicted picks in ten bins of equally many candidates, by rising chance."""
    p, y = chance[there], picked[there]
    bins = np.array_split(np.argsort(p, kind="stable"), 10)
    return [round(float(y[b].sum() / max(p[b].sum(), 1e-12)), 4) for b in bins]
