"""Hypothesis strategies and small builders that several test files share. Sizes stay tiny."""

import math

import numpy as np
import torch
from hypothesis import strategies as st

from pagellm.data.shop import SPLITS, Catalogue, Rows, Shop
from pagellm.pages.energy import Near

__all__ = [
    "catalogue_of",
    "garbage",
    "near_relations",
    "pages",
    "prefix_mask",
    "purchases",
    "rows_of",
    "seeds",
    "shop_with",
    "stars",
    "unit",
]

unit = st.floats(0, 1)
seeds = st.integers(0, 2**31)
stars = st.one_of(st.integers(1, 5).map(float), st.just(math.nan))  # NaN: no rating
garbage = st.sampled_from([float("nan"), float("inf"), float("-inf"), 1e30, -0.0])


def prefix_mask(lengths: list[int], T: int) -> torch.Tensor:
    """(B, T) bool: row b is True on its first lengths[b] tokens."""
    return torch.arange(T) < torch.tensor(lengths, dtype=torch.long).reshape(-1, 1)


@st.composite
def pages(draw, max_rows: int = 3, max_length: int = 6, dtype=torch.float64):
    """reward, value (B, T), and a right-padded mask (B, T), rows of any length from none to T."""
    B, T = draw(st.integers(1, max_rows)), draw(st.integers(1, max_length))
    lengths = draw(st.lists(st.integers(0, T), min_size=B, max_size=B))
    generator = torch.Generator().manual_seed(draw(seeds))
    scale = draw(st.sampled_from([1e-3, 1.0, 1e3]))
    reward, value = (torch.randn(B, T, generator=generator, dtype=dtype) * scale for _ in range(2))
    return reward, value, prefix_mask(lengths, T)


def rows_of(matrix: np.ndarray) -> Rows:
    """(U, N) bool -> the items of every user."""
    user, item = np.nonzero(matrix)
    indptr = np.concatenate([[0], np.cumsum(np.bincount(user, minlength=len(matrix)))])
    return Rows(indptr, item, np.full(len(item), np.nan, np.float32))


@st.composite
def purchases(draw, max_users: int = 8, max_items: int = 7):
    """(U, N) bool: who bought what; some users and items may have none."""
    shape = draw(st.integers(1, max_users)), draw(st.integers(2, max_items))
    return np.random.default_rng(draw(seeds)).random(shape) < draw(st.sampled_from([0.2, 0.5, 0.9]))


def catalogue_of(leaf, title=None, brand=None) -> Catalogue:
    """A catalogue of len(leaf) items by their leaf category; "" where a text is unknown."""
    n = len(leaf)
    return Catalogue.of(
        [f"i{i}" for i in range(n)],
        title or [""] * n,
        brand or [""] * n,
        [(name,) if name else () for name in leaf],
        leaf,
        [""] * n,
        [math.nan] * n,
    )


def shop_with(rows, n_users, n_items, catalogue=None) -> Shop:
    """A shop of rows (user, item, rating, split name), liked above 3 or where the rating is NaN."""
    user, item, rating, split = zip(*sorted(rows), strict=True) if rows else ([], [], [], [])
    rating, split = (
        np.array(rating, dtype=np.float32),
        np.array([SPLITS.index(s) for s in split], np.int8),
    )
    return Shop(
        n_users,
        n_items,
        np.array(user, np.int64),
        np.array(item, np.int64),
        rating,
        np.zeros(len(rows), np.int64),
        ~(rating <= 3),
        split,
        catalogue or catalogue_of([""] * n_items),
        [f"u{u}" for u in range(n_users)],
    )


@st.composite
def near_relations(draw, n: int):
    """A near-duplicate relation of n items, made of up to 6 pairs."""
    two = st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)).filter(
        lambda pair: pair[0] != pair[1]
    )
    pairs = draw(st.lists(two, max_size=6))
    return Near.of_pairs(np.array(pairs).reshape(-1, 2), n)
