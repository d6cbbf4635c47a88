"""The largest entries of every row are those of a full sort, whatever chunks, blocks and ties."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pagellm.data.shop import Rows
from pagellm.pages import topk
from pagellm.pages.ranked import top_items
from pagellm.stage import randomness
from tests.strategies import seeds


def tables(rng, B, N, levels):
    """Scores of few values, so that equals stand in many chunks; also 0, -0 and infinities."""
    score = rng.integers(-levels, levels + 1, (B, N)).astype(np.float32) / 3
    for value, share in ((-0.0, 0.1), (-math.inf, 0.2), (math.inf, 0.01)):
        score[rng.random((B, N)) < share] = value
    return score


def sorted_whole(score, k, rank):
    """The definition: every row sorted by (score, rank), highest first, without entries of -inf."""
    item = np.full((len(score), min(k, score.shape[1])), -1)
    for row, values in enumerate(score):
        order = sorted(
            np.flatnonzero(values > -math.inf), key=lambda n: (-values[n], -rank[row, n])
        )[:k]
        item[row, : len(order)] = order
    return item


@given(
    seeds,
    st.integers(1, 5),
    st.integers(1, 150),
    st.integers(1, 20),
    st.sampled_from([1, 3, 10_000]),
    st.sampled_from([2, 5, 32]),
    st.sampled_from([1, 200, 10**6]),
)
@settings(deadline=None, max_examples=200)
def test_the_largest_are_those_of_a_full_sort(seed, B, N, k, levels, chunk, entries):
    rng = np.random.default_rng(seed)
    score = tables(rng, B, N, levels)
    rank = np.stack([rng.permutation(N) for _ in range(B)])
    before = score.copy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(topk, "CHUNK", chunk)
        patch.setattr(topk, "ENTRIES", entries)
        item, value = topk.largest(score, k, lambda row, column: rank[row, column])
        plain, _ = topk.largest(score, k)
    np.testing.assert_array_equal(item, sorted_whole(score, k, rank))
    np.testing.assert_array_equal(
        plain, sorted_whole(score, k, np.broadcast_to(-np.arange(N), (B, N)))
    )
    want = np.where(item >= 0, np.take_along_axis(score, np.maximum(item, 0), 1), -np.inf).astype(
        np.float32
    )
    assert value.tobytes() == want.tobytes()  # -0 stays -0
    assert score.tobytes() == before.tobytes()


@pytest.mark.parametrize("k", [1, 7, 100, 101, 6000, 20_000])
def test_a_wide_table_gives_what_a_stable_sort_gives(k):
    score = torch.randn(70, 12_001, generator=torch.Generator().manual_seed(0))
    value, item = topk.top_k(score, k)
    want = score.sort(dim=1, descending=True, stable=True)
    assert torch.equal(value, want.values[:, :k]) and torch.equal(item, want.indices[:, :k])


def test_few_entries_are_looked_at_beyond_those_asked_for():
    score = torch.randn(64, 12_000, generator=torch.Generator().manual_seed(0)).numpy()
    row, _ = topk.contenders(score, 100)
    assert 100 <= np.bincount(row).min() and np.bincount(row).max() < 200


@pytest.mark.parametrize("at", [0, 63, 64])
def test_one_nan_is_refused_wherever_it_stands(at):
    score = np.zeros((2, 65), np.float32)  # one chunk of two columns; column 64 is left over
    score[1, at] = math.nan
    for k in (1, 40):
        with pytest.raises(ValueError, match="NaN"):
            topk.largest(score, k)
    assert (
        torch.from_numpy(score)
        .topk(3, dim=1)[0]
        .nan_to_num(7)
        .equal(topk.top_k(torch.from_numpy(score), 3)[0].nan_to_num(7))
    )


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0), (2, 3)])
def test_nothing_to_choose_from(shape):
    value, item = topk.top_k(torch.full(shape, -math.inf), 2)
    assert item.tolist() == [[0] * min(2, shape[1])] * shape[0] and (value == -math.inf).all()


@given(seeds, st.integers(1, 4), st.integers(30, 200), st.integers(1, 12))
@settings(deadline=None)
def test_users_lists_are_exact_where_chunks_are_used_and_scores_come_back_unchanged(
    seed, U, N, depth
):
    rng = np.random.default_rng(seed)
    score = torch.from_numpy(tables(rng, U, N, 2))
    gone = [rng.permutation(N)[: rng.integers(0, N + 1)] for _ in range(U)]
    seen = Rows(
        np.cumsum([0, *map(len, gone)]),
        np.concatenate(gone).astype(np.int64),
        np.zeros(sum(map(len, gone)), np.float32),
    )
    before = score.clone()
    item, _ = top_items(score, np.arange(U), seen, depth, seed)
    assert score.numpy().tobytes() == before.numpy().tobytes()
    shuffled = randomness.rng(seed, "ties", "items").permutation(N)
    drawn = randomness.rng(seed, "ties", "users").integers(1 << (N - 1).bit_length(), size=U)
    legal = score.numpy()
    for u in range(U):
        legal[u, gone[u]] = -math.inf
    np.testing.assert_array_equal(item, sorted_whole(legal, depth, shuffled ^ drawn[:, None]))


@given(seeds, st.integers(1, 5), st.integers(1, 40))
@settings(deadline=None)
def test_argmax_is_the_first_of_the_largest(seed, B, N):
    rng = np.random.default_rng(seed)
    score, rank = tables(rng, B, N, 2), np.stack([rng.permutation(N) for _ in range(B)])
    got, first = topk.argmax(score, lambda row, column: rank[row, column]), topk.argmax(score)
    for row in range(B):
        equal = np.flatnonzero(score[row] == score[row].max())
        assert got[row] == equal[rank[row, equal].argmax()] and first[row] == equal[0]
