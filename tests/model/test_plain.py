"""Plain recommenders: each equals its slow definition, and a well-kept implementation where one is
installed.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pagellm.model import plain
from pagellm.model.plain import ease_weights, fit, gram_matrix, knn_weights, sum_rows
from pagellm.stage.config import PageLLMError
from tests.strategies import purchases, rows_of, seeds

STEADY = settings(deadline=None, max_examples=40)
SETTINGS = {
    "popularity": {},
    "ItemKNN": {"neighbours": 2, "shrink": 1.0},
    "EASE": {"ridge": 3.0},
    "ALS": {"factors": 3, "alpha0": 0.1, "reg": 0.02, "nu": 0.5},
}
BIG = np.random.default_rng(0).random((40, 25)) < 0.25


def dense(matrix):
    return torch.from_numpy(matrix.astype(np.float64))


@STEADY
@given(purchases(), st.integers(1, 20))
def test_gram_is_the_product_whatever_the_block(matrix, block):
    X = dense(matrix)
    assert torch.equal(gram_matrix(rows_of(matrix), matrix.shape[1], block).double(), X.T @ X)


@STEADY
@given(purchases(), seeds)
def test_sum_rows_is_the_product(matrix, seed):
    W = torch.randn(
        matrix.shape[1], 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    users = np.random.default_rng(seed).integers(len(matrix), size=5)
    torch.testing.assert_close(sum_rows(W, rows_of(matrix), users), dense(matrix)[users] @ W)


def test_ease_is_a_minimum_under_a_zero_diagonal():
    X = dense(BIG)
    B = ease_weights(X.T @ X, 2.0)
    assert not B.diagonal().any()
    assert B.is_contiguous()  # by rows: sum_rows reads whole ones

    def cost(W):
        return (X - X @ W).square().sum() + 2.0 * W.square().sum()

    B = B.clone().requires_grad_()
    grad = torch.autograd.grad(cost(B), B)[0]
    assert grad[~torch.eye(len(B), dtype=torch.bool)].abs().max() < 1e-9


def test_float32_is_enough_for_ease():
    X = dense(BIG)
    torch.testing.assert_close(
        ease_weights((X.T @ X).float(), 1.0).double(),
        ease_weights(X.T @ X, 1.0),
        atol=1e-5,
        rtol=1e-4,
    )


def test_cosine_equals_implicits():
    library = pytest.importorskip(
        "implicit.nearest_neighbours", reason="the dev extra is not installed"
    )
    sparse = pytest.importorskip("scipy.sparse")
    N = BIG.shape[1]
    theirs = library.CosineRecommender(K=N)
    theirs.fit(sparse.csr_matrix(BIG.astype(np.float32)), show_progress=False)
    similarity = theirs.similarity.toarray()
    np.fill_diagonal(similarity, 0.0)
    np.testing.assert_allclose(
        knn_weights(gram_matrix(rows_of(BIG), N), N - 1, 0.0).numpy(), similarity, atol=1e-6
    )


@STEADY
@given(purchases(), st.integers(1, 9), st.floats(0, 5))
def test_knn_is_shrunk_cosine_of_the_nearest_and_of_those_tied_with_the_last(
    matrix, neighbours, shrink
):
    X = matrix.astype(np.float64)
    size = np.sqrt(X.sum(0))
    cosine = X.T @ X / np.maximum(np.outer(size, size) + shrink, 1e-300)
    np.fill_diagonal(cosine, 0.0)
    W = knn_weights(gram_matrix(rows_of(matrix), X.shape[1]), neighbours, shrink).numpy()
    for i, row in enumerate(cosine):
        last = np.sort(row)[::-1][:neighbours][-1]
        np.testing.assert_allclose(W[i], np.where(row >= last - 1e-6, row, 0.0), atol=1e-5)


@pytest.mark.parametrize("name", list(SETTINGS))
def test_new_numbers_for_users_and_items_change_nothing(name):
    """New numbers permute the scores: nothing is decided by an id.

    ALS starts at random rows, so it is run until it is at its minimum.
    """
    rng = np.random.default_rng(3)
    users, items = rng.permutation(BIG.shape[0]), rng.permutation(BIG.shape[1])
    chosen = SETTINGS[name] if name != "ALS" else SETTINGS[name] | {"factors": 1}
    a, b = (
        fit(name, rows_of(m), *m.shape, chosen).score(np.arange(len(m)))
        for m in (BIG, BIG[users][:, items])
    )
    torch.testing.assert_close(
        a[users][:, items], b, atol=2e-3 if name == "ALS" else 1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("name", list(SETTINGS))
def test_a_user_without_rows_gets_finite_scores(name):
    matrix = BIG.copy()
    matrix[5] = False
    assert (
        fit(name, rows_of(matrix), *matrix.shape, SETTINGS[name])
        .score(np.array([5, 6]))
        .isfinite()
        .all()
    )


def test_grids_stay_within_the_catalogue():
    assert plain.grid_of("ALS", 100)["factors"] == (8, 32, 64) and plain.grid_of("ALS", 2)[
        "factors"
    ] == (8,)
    assert (
        plain.grid_of("ItemKNN", 11)["neighbours"] == (10,)
        and plain.grid_of("EASE", 5) == plain.GRIDS["EASE"]
    )


def test_als_draws_from_its_seed_alone():
    a, b, c = (
        fit("ALS", rows_of(BIG), *BIG.shape, SETTINGS["ALS"], seed).learned["items"]
        for seed in (0, 0, 1)
    )
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_wrong_calls_say_what_is_wanted(monkeypatch):
    with pytest.raises(PageLLMError, match="EASE: ridge"):
        fit("EASE", rows_of(BIG), *BIG.shape, {"lambda": 1.0})
    with pytest.raises(PageLLMError, match="popularity: none"):
        fit("SLIM", rows_of(BIG), *BIG.shape, {})
    monkeypatch.setattr(plain, "LARGEST", 10)
    with pytest.raises(PageLLMError, match="--models popularity,ALS"):
        fit("EASE", rows_of(BIG), *BIG.shape, {"ridge": 1.0})


def test_als_with_facts_ranks_what_nobody_bought():
    bought = BIG.copy()
    bought[:, 24] = False
    plain, told = (
        fit(name, rows_of(bought), *bought.shape, SETTINGS["ALS"], groups=[np.array([3, 24])])
        for name in ("ALS", "ALS+facts")
    )
    fans, others = np.flatnonzero(bought[:, 3]), np.flatnonzero(~bought[:, 3])
    assert plain.score(fans)[:, 24].abs().max() < 1e-4
    assert told.score(fans)[:, 24].mean() > told.score(others)[:, 24].mean() + 0.01
    assert told.learned["users"].shape == (len(bought), 3)
