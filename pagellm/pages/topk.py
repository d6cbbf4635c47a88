"""The largest entries of every row of a wide table: exact, with little more than one pass over it.

On a CPU torch.topk of 12,000 columns takes several times as long as the matrix product that made
them. Here every row is cut into chunks. The k-th largest of the chunks' maxima is a lower bound of
the k-th largest entry, since k different entries reach it. Only a few more than k entries of a row
reach that bound, and only these are sorted.
"""

from collections.abc import Callable

import numpy as np
from torch import Tensor, from_numpy

__all__ = ["Rank", "argmax", "largest", "tie_key", "top_k"]


# (row, column) -> int64 from 0 to 2^32 - 1, different within a row. Of equal entries the one with
# the higher rank goes first.
Rank = Callable[[np.ndarray, np.ndarray], np.ndarray]

CHUNK = 32  # entries of a chunk; fewer if a row is short
ENTRIES = 2**20  # entries of the rows processed at a time, 4 MB, so that they stay in the cache
LOWEST = np.finfo(np.float32).min


def contenders(score: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The entries of every row that may be among its k largest: these, their equals, a few others.

    score    (B, N) float32, C-contiguous
    k        1 or more
    returns  row, column of the entries; rows rise, and columns within a row. None of them is -inf

    Raises ValueError if a score is NaN.
    """
    B, N = score.shape
    chunk = min(CHUNK, N // (2 * k))
    bound = np.full(B, LOWEST)
    if chunk > 1:
        # Chunk j holds the columns j, j + M, j + 2 M ...; columns left over at the end are in none.
        M = N // chunk
        best = score[:, : chunk * M].reshape(B, chunk, M).max(1)
        found = np.isnan(best).any() or np.isnan(score[:, chunk * M :]).any()
        best.partition(M - k, axis=1)
        bound = np.maximum(best[:, M - k], LOWEST)
    else:
        found = np.isnan(score).any()
    if found:
        raise ValueError("a score is NaN")
    at = np.flatnonzero(score >= bound[:, None])
    row = at // max(N, 1)
    return row, at - row * N


def largest(score: np.ndarray, k: int, rank: Rank | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The k largest entries of every row, largest first; entries of -inf do not count.

    score    (B, N) float32, C-contiguous
    rank     orders equal entries, also where the list ends. None: the smaller column goes first
    returns  column (B, min(k, N)) int64, -1 past the last; value, shaped alike, float32, -inf past
             the last

    Raises ValueError if a score is NaN.
    """
    B, N = score.shape
    k = min(k, N)
    item, value = np.zeros((B, k), np.int64), np.zeros((B, k), np.float32)
    size = max(1, ENTRIES // max(1, N))
    for at in range(0, B if k else 0, size):
        some = slice(at, at + size)
        item[some], value[some] = largest_of(score[some], k, rank and from_row(rank, at))
    return item, value


def from_row(rank: Rank, start: int) -> Rank:
    """`rank` for a table that begins at row `start` of the whole one."""
    return lambda row, column: rank(row + start, column)


def largest_of(score: np.ndarray, k: int, rank: Rank | None) -> tuple[np.ndarray, np.ndarray]:
    """`largest` of a few rows at once, at least one; k from 1 to N."""
    B, N = score.shape
    row, column = contenders(score, k)
    count = np.bincount(row, minlength=B)
    slot = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
    width = max(int(count.max()), k)
    key, which = np.full((B, width), np.iinfo(np.int64).min), np.full((B, width), -1)
    # Places in the flat arrays: NumPy finds these faster than pairs of row and column.
    slot += row * width
    value = score.reshape(-1)[row * N + column]
    key.reshape(-1)[slot] = tie_key(value, N - 1 - column if rank is None else rank(row, column))
    which.reshape(-1)[slot] = column
    item = np.take_along_axis(which, np.argsort(key, axis=1)[:, : -k - 1 : -1], 1)
    return item, np.where(
        item >= 0, np.take_along_axis(score, np.maximum(item, 0), 1), np.float32(-np.inf)
    )


def tie_key(score: np.ndarray, rank: np.ndarray) -> np.ndarray:
    """int64 that sort like (score, rank). score: float32 without NaN; rank: from 0 to 2^32 - 1."""
    bits = (score + np.float32(0.0)).view(np.int32)  # + 0 turns -0 into 0
    return np.where(bits < 0, bits ^ 0x7FFFFFFF, bits).astype(np.int64) << 32 | rank


def argmax(score: np.ndarray, rank: Rank | None = None) -> np.ndarray:
    """Column (B,) int64 of the largest entry of every row of score (B, N).

    Of equal entries the one of the highest rank counts, without a rank the first.
    """
    column = score.argmax(1)
    if rank is None:
        return column
    top = np.take_along_axis(score, column[:, None], 1)
    for row in np.flatnonzero((score == top).sum(1) > 1):
        equal = np.flatnonzero(score[row] == top[row])
        column[row] = equal[rank(np.full(len(equal), row), equal).argmax()]
    return column


def top_k(score: Tensor, k: int, rank: Rank | None = None) -> tuple[Tensor, Tensor]:
    """torch.topk(score, min(k, N), dim=1) of score (B, N) float32: value and column, largest first.

    Equal entries are ordered by rank, without a rank by rising column. Where a row has fewer than k
    entries above -inf, the rest has value -inf and column 0.

    torch.topk itself is called if a score is NaN, and on a GPU if no rank is given; equal entries
    then come in its own order. With a rank, a GPU's scores are copied to the CPU.
    """
    k = min(k, score.shape[1])
    found = None
    if score.device.type == "cpu" or rank is not None:
        try:
            found = largest(score.detach().cpu().contiguous().numpy(), k, rank)
        except ValueError:  # a NaN
            pass
    if found is None:
        whole = score.topk(k, dim=1)
        return whole.values, whole.indices
    item, value = found
    return from_numpy(value).to(score.device), from_numpy(np.maximum(item, 0)).to(score.device)
