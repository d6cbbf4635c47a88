"""Implicit ALS: factors of who chose what, and how much they liked it.

It is a plain baseline (model/plain.py) and a start for the network's rows (model/rows.py).

    X, Y = als(shop.csr("train"), U, N, factors=64, alpha0=0.01, reg=0.01, nu=1.0)
    X[users] @ Y.T                          (B, N) scores
"""

import re
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pagellm.data.shop import Catalogue, Rows
from pagellm.stage import randomness

__all__ = [
    "Space",
    "Stars",
    "add_pseudo_users",
    "als",
    "als_side",
    "basis_of",
    "fit_stars",
    "fold_towards",
    "item_groups",
    "like_counts",
    "liked_means",
    "one_by_one",
    "penalty_scale",
    "rating_targets",
    "sizes",
    "transpose",
]


WIDEST = 1000  # items of the largest category, brand or title word that counts


def als(
    rows: Rows,
    n_users: int,
    n_items: int,
    factors: int,
    alpha0: float,
    reg: float,
    nu: float,
    seed: int = 0,
    iterations: int = 15,
    target: np.ndarray | None = None,
) -> tuple[Tensor, Tensor]:
    """Implicit ALS: user factors X (U, d) and item factors Y (N, d).

        minimise  sum over rows (v_ui - x_u.y_i)^2 + alpha0 sum over all pairs (x_u.y_i)^2
                  + sum_u reg_u |x_u|^2 + sum_i reg_i |y_i|^2

    reg_u = reg * c * (n_u + alpha0 N)^nu, and likewise reg_i with (n_i + alpha0 U). The constant c
    keeps the sum of all penalties what it is at nu = 1. nu = 0 is one penalty for all. Each half
    step is solved exactly, users last.

    target  (R,) the targets v of `rows`, as `rating_targets` makes them; None: 1 for all. Pairs
            without a row have target 0.

    Source: Hu, Koren and Volinsky, ICDM 2008; penalties of Rendle et al., RecSys 2022; a target
    for pairs that nobody rated: Steck, KDD 2010.
    """
    by_item = transpose(rows, n_items)
    item_target = None
    if target is not None:
        target = np.asarray(target, np.float32)
        item_target = target[np.argsort(rows.items, kind="stable")]  # in the order of `transpose`
    size_u, size_i = sizes(rows, alpha0, n_items), sizes(by_item, alpha0, n_users)
    scale = penalty_scale(rows, n_users, n_items, alpha0, reg, nu)
    reg_u, reg_i = (scale * size.pow(nu) for size in (size_u, size_i))
    start = randomness.rng(seed, "als").standard_normal((n_items, factors), dtype=np.float32)
    Y = torch.from_numpy(start) * (0.1 / factors**0.5)
    alike, alike_items = like_counts(rows, factors), like_counts(by_item, factors)
    for _ in range(iterations):
        X = als_side(Y, rows, alpha0, reg_u.float(), target, alike=alike)
        Y = als_side(X, by_item, alpha0, reg_i.float(), item_target, alike=alike_items)
    return als_side(Y, rows, alpha0, reg_u.float(), target, alike=alike), Y


def sizes(rows: Rows, alpha0: float, others: int) -> Tensor:
    """n_u + alpha0 N of every user, float64: how much data a user has, pairs without a row too."""
    return torch.from_numpy(rows.counts()).double() + alpha0 * others


def penalty_scale(
    rows: Rows, n_users: int, n_items: int, alpha0: float, reg: float, nu: float
) -> float:
    """reg * c of `als`: reg_u is this number times (n_u + alpha0 N)^nu."""
    size_u, size_i = (
        sizes(r, alpha0, n) for r, n in ((rows, n_items), (transpose(rows, n_items), n_users))
    )
    c = (size_u.sum() + size_i.sum()) / (size_u.pow(nu).sum() + size_i.pow(nu).sum())
    return float(reg * c)


@dataclass(frozen=True)
class Space:
    """Item factors, and under which penalties they were fitted: all that places a new user.

    items    (N, d)
    penalty  `penalty_scale` of the fit; alpha0, nu: its settings
    """

    items: Tensor
    alpha0: float
    penalty: float
    nu: float

    @cached_property
    def basis(self) -> "Basis":
        return basis_of(self.items)

    def place(self, rows: Rows, target: np.ndarray | None = None) -> Tensor:
        """(B, d) the best factors of each user of `rows` for the items as they are; 0 without rows.

        This is the last half step of `als`. One user goes after the other, so what is found for one
        does not depend on who else is asked about, to the last bit.

        target  as in `als`
        """
        size = sizes(rows, self.alpha0, len(self.items))
        reg = (self.penalty * size.pow(self.nu)).float()
        out = self.items.new_zeros(len(size), self.items.shape[1])
        for u in np.flatnonzero(rows.counts()):
            span = slice(rows.indptr[u], rows.indptr[u + 1])
            one = Rows(np.array([0, span.stop - span.start]), rows.items[span], rows.ratings[span])
            mine = None if target is None else target[span]
            out[u] = als_side(
                self.items, one, self.alpha0, reg[u : u + 1], target=mine, basis=self.basis
            )[0]
        return out


def one_by_one(Y: Tensor, X: Tensor, size: int = 2**18) -> Tensor:
    """X Y' (B, N), each row of X (B, d) by itself: what is found for one does not depend on who
    else is asked about, to the last bit. A product of matrices rounds otherwise by batch.

    Every row meets a part of Y (N, d), of `size` numbers, while that part is in the cache.
    """
    out = Y.new_empty(len(X), len(Y))
    rows = max(64, size // max(1, Y.shape[1]) // 64 * 64)
    for at in range(0, len(Y), rows):
        part = Y[at : at + rows]
        for x, to in zip(X, out[:, at : at + rows], strict=True):
            torch.mv(part, x, out=to)
    return out


class Basis(NamedTuple):
    """Y'Y = Q diag(e) Q' of item factors Y (N, d), and V = Y Q."""

    e: Tensor  # (d,)
    Q: Tensor  # (d, d)
    V: Tensor  # (N, d)


def basis_of(Y: Tensor) -> Basis:
    e, Q = torch.linalg.eigh((Y.T @ Y).double())
    Q, e = Q.to(Y.dtype), e.clamp_min(0.0).to(Y.dtype)
    return Basis(e, Q, Y @ Q)


def transpose(rows: Rows, n_items: int) -> Rows:
    """The users of every item, from the items of every user."""
    user = np.repeat(np.arange(len(rows.indptr) - 1), rows.counts())
    indptr = np.zeros(n_items + 1, np.int64)
    np.cumsum(np.bincount(rows.items, minlength=n_items), out=indptr[1:])
    order = np.argsort(rows.items, kind="stable")
    return Rows(indptr, user[order], rows.ratings[order])


class Alike(NamedTuple):
    """Users with equally many rows: B users with n rows each.

    user  (B,)        where (B, n) their rows        item (B * n,) what these hold
    """

    user: Tensor
    where: np.ndarray
    item: Tensor


def like_counts(rows: Rows, d: int, block: int = 4_000_000) -> list[Alike]:
    """The users of `rows` that have any, in groups for `als_side` with d factors."""
    counts, groups = rows.counts(), []
    for n in np.unique(counts[counts > 0]).tolist():
        members = np.flatnonzero(counts == n)
        step = max(1, block // (n * d + min(n, d) ** 2))
        for some in (members[at : at + step] for at in range(0, len(members), step)):
            where = rows.indptr[some][:, None] + np.arange(n)
            item = torch.from_numpy(rows.items[where.reshape(-1)])
            groups.append(Alike(torch.from_numpy(some), where, item))
    return groups


def als_side(
    Y: Tensor,
    rows: Rows,
    alpha0: float,
    reg: Tensor,
    target: np.ndarray | None = None,
    basis: Basis | None = None,
    alike: list[Alike] | None = None,
) -> Tensor:
    """The best x_u for fixed Y, for all users: (Y_u'Y_u + alpha0 Y'Y + reg_u I) x_u = Y_u'v_u.

    Y_u (n, d) holds the rows of Y that user u has, v_u their targets. Users with equally many rows
    share a batch. In the basis Q in which Y'Y = Q diag(e) Q' is diagonal, H = alpha0 e + reg_u is
    diagonal too. So a user with few rows needs only an n x n system:

        x_u = Q H^-1 W' (I + W H^-1 W')^-1 v_u,   W = Y_u Q          (push-through identity)

    Y (N, d)    reg (U,)    target (R,), or None for 1 throughout    returns (U, d)
    basis       `basis_of` Y, where it is at hand; alike: `like_counts` of rows likewise
    """
    e, Q, V = basis_of(Y) if basis is None else basis
    d = Y.shape[1]
    out, every = Y.new_zeros(len(rows.indptr) - 1, d), alpha0 * e
    for user, where, item in like_counts(rows, d) if alike is None else alike:
        B, n = where.shape
        W = V.index_select(0, item).view(B, n, d)
        v = None if target is None else torch.from_numpy(target[where])[..., None]  # (B, n, 1)
        H = every + reg[user, None]  # (B, d)
        if n <= d:
            WH = W / H[:, None]
            K = WH @ W.mT
            K.diagonal(dim1=1, dim2=2).add_(1.0)
            ones = W.new_ones(B, n, 1) if v is None else v
            z = torch.cholesky_solve(ones, torch.linalg.cholesky(K))
            x = (WH.mT @ z)[..., 0]
        else:
            A = W.mT @ W + torch.diag_embed(H)
            right = W.sum(1)[..., None] if v is None else W.mT @ v
            x = torch.cholesky_solve(right, torch.linalg.cholesky(A))[..., 0]
        out.index_copy_(0, user, x @ Q.T)
    return out


def fold_towards(
    users: Tensor,
    begin: Tensor,
    buyers: Rows,
    alpha0: float,
    reg: Tensor,
    basis: Basis | None = None,
) -> Tensor:
    """Rows of items with a few buyers: from where something else puts them, towards their buyers.

        minimise  sum over buyers (1 - x_u.y)^2 + alpha0 sum over users (x_u.(y - b))^2
                  + reg_i |y - b|^2

    users (U, d)    begin (n, d), b of each item    buyers  the users of each of the n items
    reg   (n,)      basis  `basis_of` users, where it is at hand
    """
    item = np.repeat(np.arange(len(begin)), buyers.counts())
    said = (users[torch.from_numpy(buyers.items)] * begin[torch.from_numpy(item)]).sum(1)
    return begin + als_side(users, buyers, alpha0, reg, target=(1.0 - said).numpy(), basis=basis)


def item_groups(catalogue: Catalogue) -> list[np.ndarray]:
    """Items (rising) of every category, brand and title word that 2 to WIDEST of them share."""
    found: dict[tuple[str, str], list[int]] = {}
    for item in range(len(catalogue)):
        names = {("category", name) for name in catalogue.categories[item]} | {
            ("brand", catalogue.brand[item])
        }
        names |= {("word", word) for word in re.findall(r"\w+", catalogue.title[item].lower())}
        for name in names:
            if name[1]:
                found.setdefault(name, []).append(item)
    return [np.array(items) for _, items in sorted(found.items()) if 2 <= len(items) <= WIDEST]


def add_pseudo_users(rows: Rows, groups: list[np.ndarray]) -> Rows:
    """`rows` with one more user for every set of items in `groups`, who has these items."""
    sizes = np.array([len(items) for items in groups], np.int64)
    more = np.concatenate(groups) if groups else rows.items[:0]
    return Rows(
        np.concatenate([rows.indptr, rows.indptr[-1] + np.cumsum(sizes)]),
        np.concatenate([rows.items, more]),
        np.concatenate([rows.ratings, np.full(len(more), np.nan, np.float32)]),
    )


def liked_means(ratings: np.ndarray, liked: np.ndarray) -> tuple[float, float]:
    """Mean stars of the liked rows and of the others; 0 where none is known."""
    stars, liked = np.asarray(ratings, np.float64), np.asarray(liked, bool)
    groups = (stars[group & ~np.isnan(stars)] for group in (liked, ~liked))
    first, second = (float(x.mean()) if len(x) else 0.0 for x in groups)
    return first, second


def rating_targets(
    ratings: np.ndarray,
    liked: np.ndarray,
    disliked: float = 0.35,
    slope: float = 0.15,
    means: tuple[float, float] | None = None,
) -> np.ndarray:
    """Targets (R,) float32 for `als`: how much a user liked what they chose.

    A liked item of average or unknown stars has target 1. Without ratings and dislikes all targets
    are 1, which is plain ALS.

    ratings   (R,) stars, NaN where unknown
    liked     (R,) bool
    disliked  target of a disliked item of average stars: above 0, because the user did choose it
    slope     added for every star above the average of the liked, or of the disliked, items.
              Targets are never below 0.
    means     `liked_means` of the rows that a model was fitted to; None: of these rows
    """
    stars, liked = np.asarray(ratings, np.float64), np.asarray(liked, bool)
    out = np.where(liked, 1.0, disliked)
    means = liked_means(ratings, liked) if means is None else means
    for group, mean in zip((liked, ~liked), means, strict=True):
        known = group & ~np.isnan(stars)
        out[known] += slope * (stars[known] - mean)
    return np.maximum(out, 0.0).astype(np.float32)


class Stars(NamedTuple):
    """Predicted stars of user u and item i: mean + user[u] + item[i] + taste[u].place[i]."""

    mean: float  # of all ratings
    user: Tensor  # (U,) biases
    item: Tensor  # (N,) biases
    taste: Tensor  # (U, d)
    place: Tensor  # (N, d) unit rows

    def score(self, users: np.ndarray) -> Tensor:
        """Predicted stars of all items: (B, N) float32."""
        u = torch.from_numpy(users)
        biases = self.mean + self.user[u][:, None] + self.item
        return biases + self.taste[u] @ self.place.T

    def of(self, rows: Rows, space: Space, shrink: float = 3.0) -> tuple[Tensor, Tensor]:
        """Bias (B,) and taste (B, d) of other users, from what they rated; items stay as they are.

        rows   ratings of these users       shrink  as in `fit_stars`
        space  the rows `place`, with alpha0 0, nu 0 and the ridge of `fit_stars` as its penalty
        """
        user = np.repeat(np.arange(len(rows.indptr) - 1), rows.counts())
        known = ~np.isnan(rows.ratings)
        u, i, r = user[known], rows.items[known], rows.ratings[known].astype(np.float64)
        many = np.bincount(u, minlength=len(rows.indptr) - 1)
        rest = r - self.mean - self.item.numpy()[i]
        bias = np.bincount(u, rest, len(many)) / (many + shrink)
        rated = Rows(np.concatenate([[0], np.cumsum(many)]), i, rows.ratings[known])
        taste = space.place(rated, (rest - bias[u]).astype(np.float32))
        return torch.from_numpy(bias).float(), taste


def fit_stars(
    rows: Rows, Y: Tensor, shrink: float = 3.0, reg: float = 0.5, rounds: int = 10
) -> Stars:
    """Predict ratings by biases, and by a ridge regression of each user on the rows of Y.

    rows    what users rated, liked or not; rows without a rating are left out
    Y       (N, d) item factors; they are scaled to length 1
    shrink  every user and item begins with so many ratings of average height (Koren, KDD 2008, 2.1)
    reg     ridge of the regression, in ratings
    """
    n_users, n_items = len(rows.indptr) - 1, len(Y)
    user = np.repeat(np.arange(n_users), rows.counts())
    known = ~np.isnan(rows.ratings)
    u, i, r = user[known], rows.items[known], rows.ratings[known].astype(np.float64)
    mean = float(r.mean()) if len(r) else 0.0
    of_user, of_item = np.zeros(n_users), np.zeros(n_items)
    many_u, many_i = np.bincount(u, minlength=n_users), np.bincount(i, minlength=n_items)
    for _ in range(rounds):
        of_item = np.bincount(i, r - mean - of_user[u], n_items) / (many_i + shrink)
        of_user = np.bincount(u, r - mean - of_item[i], n_users) / (many_u + shrink)
    place = Y / Y.norm(dim=1, keepdim=True).clamp_min(1e-9)
    indptr = np.concatenate([[0], np.cumsum(many_u)])
    rest = (r - mean - of_user[u] - of_item[i]).astype(np.float32)
    ridge = torch.full((n_users,), reg)
    taste = als_side(place, Rows(indptr, i, rows.ratings[known]), 0.0, ridge, target=rest)
    bias_u, bias_i = (torch.from_numpy(x).float() for x in (of_user, of_item))
    return Stars(mean, bias_u, bias_i, taste, place)
