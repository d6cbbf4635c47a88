"""Hypothesis strategies that several test files share. Sizes stay tiny: an exception needs no more."""

import numpy as np
import torch
from hypothesis import strategies as st

from pagellm.data.shop import Rows

__all__ = ["garbage", "pages", "prefix_mask", "purchases", "rows_of", "seeds", "unit"]

unit = st.floats(0, 1)
seeds = st.integers(0, 2**31)
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
