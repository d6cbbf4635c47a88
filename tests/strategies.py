"""Hypothesis strategies that several test files share. Sizes stay tiny: an exception needs no more."""

import torch
from hypothesis import strategies as st

__all__ = ["garbage", "pages", "prefix_mask", "seeds", "unit"]

unit = st.floats(0, 1)
seeds = st.integers(0, 2 ** 31)
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
