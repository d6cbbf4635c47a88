"""Plain recommenders, small and exact: popularity, ItemKNN, EASE, implicit ALS.

    fitted = fit("EASE", shop.csr("train"), shop.n_users, shop.n_items, {"ridge": 200.0}, seed=0)
    fitted.score(users)         (B, N) float32, higher is better; of seen and unseen items alike

Most of them read who liked what, and nothing else. ALS+facts reads titles, categories and brands
too. ALS+ratings reads all of that, the ratings, and what users chose but did not like: it is the
strongest simple row of the tables.

They learn from the rows that they are given, never from a validation or test row. ItemKNN and EASE
hold N x N float32: 570 MB for 12,000 items, and EASE three times that for a moment.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pagellm.data.shop import Rows, Shop
from pagellm.model.als import Stars, add_pseudo_users, als, fit_stars, rating_targets
from pagellm.stage.config import PageLLMError

__all__ = [
    "Chosen",
    "Fitted",
    "GRIDS",
    "PLAIN",
    "by_factors",
    "by_ratings",
    "by_weights",
    "ease_weights",
    "fit",
    "gram_matrix",
    "grid_of",
    "knn_weights",
    "sum_rows",
]


LARGEST = 40_000  # items for which N x N float32 (6.4 GB) is still worth trying

# Values that a search may try, in order. It starts in the middle of each list.
GRIDS: dict[str, dict[str, tuple]] = {
    "popularity": {},
    "ItemKNN": {
        "neighbours": (10, 20, 50, 100, 200, 500, 1000, 2000, 5000),
        "shrink": (0.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0),
    },
    "EASE": {"ridge": (10.0, 20.0, 50.0, 100.0, 200.0, 350.0, 500.0, 1000.0, 2000.0)},
    "ALS": {
        "factors": (8, 32, 64, 128, 256, 512),
        "alpha0": (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3),
        "reg": (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
        "nu": (0.0, 0.5, 1.0),
    },
}
PLAIN = tuple(GRIDS)  # these know users and items alone; the next ones read the catalogue too
GRIDS["ALS+facts"] = GRIDS["ALS"]
# disliked, slope: as in als.rating_targets. facts: target of a category, brand or title word.
# stars: how many standard deviations of a user's scores one predicted star is worth.
GRIDS["ALS+ratings"] = GRIDS["ALS"] | {
    "disliked": (0.0, 0.15, 0.35, 0.6, 1.0),
    "slope": (0.0, 0.08, 0.15, 0.3),
    "facts": (0.25, 0.5, 1.0),
    "stars": (0.0, 0.1, 0.2, 0.4),
}


def grid_of(name: str, n_items: int) -> dict[str, tuple]:
    """GRIDS[name] without numbers of factors or neighbours that are too large for the catalogue."""
    return {
        what: tuple(v for v in values if v < n_items) or values[:1]
        if what in ("factors", "neighbours")
        else values
        for what, values in GRIDS[name].items()
    }


class Chosen(NamedTuple):
    """What users chose, liked or not."""

    rows: Rows
    liked: np.ndarray  # (R,) bool

    @classmethod
    def of(cls, shop: Shop, splits: str | tuple[str, ...] = "train") -> "Chosen":
        """The rows of these splits."""
        keep = shop.rows(splits, positive=None)
        return cls(shop.csr(splits, positive=None), shop.positive[keep])


class Fitted(NamedTuple):
    """A fitted recommender: how it scores, and every array that it learned.

    A test row that has leaked would have to show in one of these arrays.
    """

    score: Callable[[np.ndarray], Tensor]  # users (B,) int64 -> (B, N) float32
    learned: dict[str, Tensor]


def fit(
    name: str,
    rows: Rows,
    n_users: int,
    n_items: int,
    settings: dict,
    seed: int = 0,
    gram: Tensor | None = None,
    groups: list[np.ndarray] | None = None,
    chosen: Chosen | None = None,
) -> Fitted:
    """Fit one of GRIDS to the positives `rows` of n_users users.

    settings  values for the model's names in GRIDS
    gram      (N, N) of gram_matrix, if it has been computed already
    groups    als.item_groups, for ALS+facts and ALS+ratings: categories, brands and title words,
              each of which counts as one more user of its items
    chosen    for ALS+ratings, which learns from disliked items and from stars too

    Raises PageLLMError for an unknown model, settings that are not its own, or too many items.
    """
    if name not in GRIDS or set(settings) != set(GRIDS[name]):
        raise PageLLMError(
            f"{name} with settings {settings}: want one of "
            + "; ".join(f"{model}: {', '.join(grid) or 'none'}" for model, grid in GRIDS.items())
        )
    if name == "popularity":
        count = torch.from_numpy(np.bincount(rows.items, minlength=n_items)).float()
        return Fitted(lambda users: count.expand(len(users), -1), {"count": count})
    if name in ("ALS", "ALS+facts"):
        rows = add_pseudo_users(rows, groups or []) if name == "ALS+facts" else rows
        X, Y = als(rows, len(rows.counts()), n_items, **settings, seed=seed)
        return by_factors(X[:n_users], Y)
    if name == "ALS+ratings":
        if chosen is None:
            raise ValueError("fit: ALS+ratings wants `chosen`")
        return fit_ratings(chosen, n_users, n_items, settings, seed, groups or [])
    gram = gram_matrix(rows, n_items) if gram is None else gram
    W = (knn_weights if name == "ItemKNN" else ease_weights)(gram, **settings)
    return by_weights(W, rows)


def fit_ratings(
    chosen: Chosen, n_users: int, n_items: int, settings: dict, seed: int, groups: list[np.ndarray]
) -> Fitted:
    """ALS whose targets are ratings (als.rating_targets), and predicted stars beside its scores."""
    rows = add_pseudo_users(chosen.rows, groups)
    target = rating_targets(
        chosen.rows.ratings, chosen.liked, settings["disliked"], settings["slope"]
    )
    more = np.full(len(rows.items) - len(target), settings["facts"], np.float32)
    plain = {name: settings[name] for name in ("factors", "alpha0", "reg", "nu")}
    target = np.concatenate([target, more])
    X, Y = als(rows, len(rows.counts()), n_items, **plain, seed=seed, target=target)
    return by_ratings(X[:n_users], Y, fit_stars(chosen.rows, Y), settings["stars"])


def by_factors(X: Tensor, Y: Tensor) -> Fitted:
    """Scores by factors of users (U, d) and items (N, d)."""
    return Fitted(lambda users: X[torch.from_numpy(users)] @ Y.T, {"users": X, "items": Y})


def by_weights(W: Tensor, rows: Rows) -> Fitted:
    """Scores by item weights W (N, N), and who liked what."""
    return Fitted(lambda users: sum_rows(W, rows, users), {"weights": W})


def by_ratings(X: Tensor, Y: Tensor, stars: Stars, weight: float) -> Fitted:
    """Scores by factors; a predicted star adds `weight` standard deviations of a user's scores."""

    def score(users: np.ndarray) -> Tensor:
        out = X[torch.from_numpy(users)] @ Y.T
        return out + weight * out.std(1, keepdim=True) * stars.score(users) if weight else out

    learned = {"users": X, "items": Y, "taste": stars.taste, "user": stars.user, "item": stars.item}
    return Fitted(score, learned)


def gram_matrix(rows: Rows, n_items: int, block: int = 4_000_000) -> Tensor:
    """X'X (N, N) float32: how many users have both items; the diagonal counts an item's users.

    It sums over the pairs of each user's items, `block` pairs at a time. Raises PageLLMError where
    N x N is too large.
    """
    if n_items > LARGEST:
        raise PageLLMError(
            f"{n_items:,} items: N x N float32 takes {4e-9 * n_items**2:.0f} GB, more than we try "
            f"({LARGEST:,} items)\n  Leave ItemKNN and EASE out: --models popularity,ALS"
        )
    gram = torch.zeros(n_items * n_items)
    counts = rows.counts()
    width = np.repeat(counts, counts)  # of each row: partners, itself included
    start = np.repeat(rows.indptr[:-1], counts)  # of each row: where its user's items begin
    ends = np.cumsum(width)
    at = 0
    while at < len(width):
        to = max(
            at + 1, int(np.searchsorted(ends, (ends[at - 1] if at else 0) + block, side="right"))
        )
        w = width[at:to]
        within = np.arange(w.sum()) - np.repeat(np.cumsum(w) - w, w)
        code = (
            np.repeat(rows.items[at:to], w) * n_items
            + rows.items[np.repeat(start[at:to], w) + within]
        )
        gram.index_add_(0, torch.from_numpy(code), torch.ones(len(code)))
        at = to
    return gram.view(n_items, n_items)


def sum_rows(W: Tensor, rows: Rows, users: np.ndarray) -> Tensor:
    """x_u W (B, M): the sum of the rows of W (N, M) that a user has; 0 for a user without any."""
    counts = rows.counts()[users]
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    items = torch.from_numpy(rows.items[np.repeat(rows.indptr[users], counts) + within])
    return F.embedding_bag(items, W, torch.from_numpy(np.cumsum(counts) - counts), mode="sum")


def knn_weights(gram: Tensor, neighbours: int, shrink: float) -> Tensor:
    """Cosine of item columns, g_ij / (sqrt(g_ii g_jj) + shrink), (N, N) with a diagonal of 0.

    Of each row only the nearest `neighbours` stay. All items that are tied with the last of these
    stay too, so that item numbers decide nothing.
    """
    size = gram.diagonal().sqrt()
    S = gram / (torch.outer(size, size) + shrink).clamp_min(torch.finfo(gram.dtype).tiny)
    S.fill_diagonal_(0.0)
    last = torch.cat(
        [part.topk(min(neighbours, len(S)), dim=1).values[:, -1:] for part in S.split(1024)]
    )
    return S.mul_(last <= S)


def ease_weights(gram: Tensor, ridge: float) -> Tensor:
    """EASE: B (N, N) from X'X (N, N).

        argmin |X - XB|^2 + ridge |B|^2   with a diagonal of 0:   B_ij = -P_ij / P_jj,
        P = (X'X + ridge I)^-1

    Source: Steck, WWW 2019.
    """
    A = gram.clone()
    A.diagonal().add_(ridge)
    # It comes column by column. The other way round the symmetric matrix is the same, and a row
    # lies in one piece, as `sum_rows` needs it: at 15,182 items that is 35 times as fast.
    P = torch.cholesky_inverse(torch.linalg.cholesky(A)).mT
    return P.div_(-P.diagonal().clone()).fill_diagonal_(0.0)
