"""Implicit ALS, exact: factors of who has what. A plain baseline (pagellm/model/plain.py) and a start for rows.

X, Y = als(shop.csr("train"), shop.n_users, shop.n_items, factors=64, alpha0=0.01, reg=0.01, nu=1.0)
X[users] @ Y.T                          (B, N) scores
"""

import re

import numpy as np
import torch
from torch import Tensor

from pagellm.data.shop import Catalogue, Rows
from pagellm.stage import randomness

__all__ = ["als", "als_side", "item_groups", "add_pseudo_users"]


WIDEST = 1000  # items of a category, brand or title word; wider ones say little and cost much


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
) -> tuple[Tensor, Tensor]:
    """Implicit ALS (Hu et al., ICDM 2008) with Rendle et al.'s (RecSys 2022) regularisation. X (U, d), Y (N, d).

        sum_seen (1 - x_u.y_i)^2 + alpha0 sum_all (x_u.y_i)^2 + sum_u reg_u |x_u|^2 + sum_i reg_i |y_i|^2

    reg_u = reg * c * (n_u + alpha0 N)^nu, likewise reg_i with (n_i + alpha0 U); c keeps the sum of all reg what it is
    at nu = 1. nu = 0 is one penalty for all. Each half step is solved exactly, users last.
    """
    by_item = transpose(rows, n_items)
    size_u, size_i = (
        torch.from_numpy(r.counts()).double() + alpha0 * n
        for r, n in ((rows, n_items), (by_item, n_users))
    )
    c = (size_u.sum() + size_i.sum()) / (size_u.pow(nu).sum() + size_i.pow(nu).sum())
    reg_u, reg_i = (reg * c * size.pow(nu) for size in (size_u, size_i))
    start = randomness.rng(seed, "als").standard_normal((n_items, factors), dtype=np.float32)
    Y = torch.from_numpy(start) * (0.1 / factors**0.5)
    for _ in range(iterations):
        X = als_side(Y, rows, alpha0, reg_u.float())
        Y = als_side(X, by_item, alpha0, reg_i.float())
    return als_side(Y, rows, alpha0, reg_u.float()), Y


def transpose(rows: Rows, n_items: int) -> Rows:
    """Users of every item, in place of items of every user."""
    user = np.repeat(np.arange(len(rows.indptr) - 1), rows.counts())
    indptr = np.zeros(n_items + 1, np.int64)
    np.cumsum(np.bincount(rows.items, minlength=n_items), out=indptr[1:])
    order = np.argsort(rows.items, kind="stable")
    return Rows(indptr, user[order], rows.ratings[order])


def als_side(Y: Tensor, rows: Rows, alpha0: float, reg: Tensor, block: int = 4_000_000) -> Tensor:
    """The best x_u for fixed Y (N, d), all u at once: (Y_u'Y_u + alpha0 Y'Y + reg_u I) x_u = Y_u'1. Returns (U, d).

    Y_u (n, d) holds the rows of Y that u has; reg (U,). Users with equally many rows share a batch. In the basis Q
    where Y'Y = Q diag(e) Q' is diagonal, H = alpha0 e + reg_u is too, so that few rows need only an n x n system:

        x_u = Q H^-1 W' (I + W H^-1 W')^-1 1,   W = Y_u Q          (push-through identity)
    """
    e, Q = torch.linalg.eigh((Y.T @ Y).double())
    Q, e = Q.to(Y.dtype), e.clamp_min(0.0).to(Y.dtype)
    V, d = Y @ Q, Y.shape[1]
    out = Y.new_zeros(len(rows.indptr) - 1, d)
    counts = rows.counts()
    for n in np.unique(counts[counts > 0]):
        members = np.flatnonzero(counts == n)
        step = max(1, int(block // (n * d + min(n, d) ** 2)))
        for some in (members[at : at + step] for at in range(0, len(members), step)):
            # (B, n, d)
            W = V[torch.from_numpy(rows.items[rows.indptr[some][:, None] + np.arange(n)])]
            H = alpha0 * e + reg[torch.from_numpy(some), None]  # (B, d)
            if n <= d:
                WH = W / H[:, None]
                K = WH @ W.mT
                K.diagonal(dim1=1, dim2=2).add_(1.0)
                z = torch.cholesky_solve(W.new_ones(len(some), n, 1), torch.linalg.cholesky(K))
                x = (WH.mT @ z)[..., 0]
            else:
                A = W.mT @ W + torch.diag_embed(H)
                x = torch.cholesky_solve(W.sum(1)[..., None], torch.linalg.cholesky(A))[..., 0]
            out[torch.from_numpy(some)] = x @ Q.T
    return out


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
    """`rows` and behind them one more user for every set of items in `groups`, who has chosen these."""
    sizes = np.array([len(items) for items in groups], np.int64)
    more = np.concatenate(groups) if groups else rows.items[:0]
    return Rows(
        np.concatenate([rows.indptr, rows.indptr[-1] + np.cumsum(sizes)]),
        np.concatenate([rows.items, more]),
        np.concatenate([rows.ratings, np.full(len(more), np.nan, np.float32)]),
    )
