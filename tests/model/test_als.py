"""Implicit ALS: each half step is exact, the whole is at a minimum of its objective, and it equals
a well-kept implementation.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pagellm.data.shop import Catalogue
from pagellm.model.als import (
    add_pseudo_users,
    als,
    als_side,
    fit_stars,
    item_groups,
    like_counts,
    one_by_one,
    rating_targets,
)
from tests.strategies import purchases, rows_of, seeds

STEADY = settings(deadline=None, max_examples=40)
BIG = np.random.default_rng(0).random((40, 25)) < 0.25


def dense(matrix):
    return torch.from_numpy(matrix.astype(np.float64))


@STEADY
@given(
    purchases(),
    st.floats(0.01, 2),
    st.floats(0.01, 2),
    st.integers(1, 6),
    seeds,
    st.integers(1, 300),
)
def test_als_half_step_solves_each_users_normal_equations(matrix, alpha0, reg, d, seed, block):
    """(Y_u'Y_u + alpha0 Y'Y + reg_u I) x_u = Y_u'1, with more and with fewer rows than factors."""
    Y = torch.randn(
        matrix.shape[1], d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    regs = reg * (1 + torch.arange(len(matrix), dtype=torch.float64))
    rows = rows_of(matrix)
    X = als_side(Y, rows, alpha0, regs, alike=like_counts(rows, d, block))
    for u, mine in enumerate(matrix):
        A = Y[mine].T @ Y[mine] + alpha0 * Y.T @ Y + regs[u] * torch.eye(d, dtype=torch.float64)
        torch.testing.assert_close(
            X[u], torch.linalg.solve(A, Y[mine].sum(0)), atol=1e-8, rtol=1e-6
        )


@pytest.mark.parametrize("items, d", [(1, 1), (63, 5), (200, 64), (131, 3)])
def test_scores_of_one_do_not_depend_on_the_others(items, d):
    draw = torch.Generator().manual_seed(0)
    Y, X = torch.randn(items, d, generator=draw), torch.randn(7, d, generator=draw)
    for size in (1, 100 * d, 2**18):
        every = one_by_one(Y, X, size)
        assert torch.equal(every[3:4], one_by_one(Y, X[3:4], size))
        torch.testing.assert_close(every, X @ Y.T)
    assert one_by_one(Y, X[:0]).shape == (0, items)


@pytest.mark.parametrize("nu", [0.0, 0.5, 1.0])
def test_als_converges_to_a_minimum_of_its_objective(nu):
    """After many exact half steps no small change of X or Y lowers the documented sum.

    Nor are all factors 0.
    """
    U, N, alpha0, reg = *BIG.shape, 0.2, 0.01
    X, Y = (
        m.double().requires_grad_()
        for m in als(rows_of(BIG), U, N, 3, alpha0, reg, nu, iterations=300)
    )
    M = dense(BIG)
    size_u, size_i = M.sum(1) + alpha0 * N, M.sum(0) + alpha0 * U
    c = (size_u.sum() + size_i.sum()) / (size_u.pow(nu).sum() + size_i.pow(nu).sum())
    score = X @ Y.T
    cost = (
        (M * (1 - score) ** 2).sum()
        + alpha0 * score.square().sum()
        + reg
        * c
        * ((size_u.pow(nu) * X.square().sum(1)).sum() + (size_i.pow(nu) * Y.square().sum(1)).sum())
    )
    assert cost < 0.9 * M.sum()
    for grad in torch.autograd.grad(cost, (X, Y)):
        assert grad.abs().max() < 2e-2


def test_als_half_step_equals_implicits():
    """implicit has confidence alpha on what was bought, 1 elsewhere, and penalty lambda.

    Our objective is theirs divided by alpha - 1.
    """
    library = pytest.importorskip("implicit.als", reason="the dev extra is not installed")
    sparse = pytest.importorskip("scipy.sparse")
    alpha, penalty, d = 5.0, 0.7, 6
    Y = np.random.default_rng(1).standard_normal((BIG.shape[1], d)).astype(np.float32)
    theirs = library.AlternatingLeastSquares(
        factors=d, regularization=penalty, alpha=alpha, use_cg=False, use_native=False
    )
    theirs.item_factors, theirs.user_factors = Y, np.zeros((len(BIG), d), np.float32)
    X = theirs.recalculate_user(np.arange(len(BIG)), sparse.csr_matrix(BIG.astype(np.float32)))
    ours = als_side(
        torch.from_numpy(Y),
        rows_of(BIG),
        1 / (alpha - 1),
        torch.full((len(BIG),), penalty / (alpha - 1)),
    )
    np.testing.assert_allclose(ours.numpy() * alpha / (alpha - 1), X, atol=2e-6)


def test_facts_are_sets_of_items_that_share_something():
    c = Catalogue.of(
        ["a", "b", "c"],
        ["Blue Drum", "blue flute", "Red-drum"],
        ["X", "", "X"],
        [("Music", "Drums"), ("Music",), ("Music", "Drums")],
        ["Drums", "", "Drums"],
        [""] * 3,
        [np.nan] * 3,
    )
    # brand X; categories Drums, Music; words blue, drum
    assert [f.tolist() for f in item_groups(c)] == [[0, 2], [0, 2], [0, 1, 2], [0, 1], [0, 2]]


def test_facts_join_as_users_and_leave_the_users_alone():
    rows = add_pseudo_users(rows_of(BIG), [np.array([3, 4]), np.array([0, 7, 9])])
    assert len(rows.counts()) == len(BIG) + 2
    assert rows.of(len(BIG))[0].tolist() == [3, 4] and rows.of(len(BIG) + 1)[0].tolist() == [
        0,
        7,
        9,
    ]
    for u in range(len(BIG)):
        assert rows.of(u)[0].tolist() == rows_of(BIG).of(u)[0].tolist()
    assert add_pseudo_users(rows_of(BIG), []).items.tolist() == rows_of(BIG).items.tolist()


def test_an_item_nobody_bought_is_near_what_it_shares_words_with():
    bought = BIG.copy()
    bought[:, 24] = False
    with_none, with_some = (
        als(
            add_pseudo_users(rows_of(bought), groups), len(BIG) + len(groups), 25, 5, 0.1, 0.01, 1.0
        )[1]
        for groups in ([], [np.array([3, 24])])
    )
    cosine = torch.nn.functional.cosine_similarity
    assert with_none[24].norm() < 1e-4
    others = [i for i in range(24) if i != 3]
    assert cosine(with_some[24], with_some[3], 0) > cosine(
        with_some[24][None], with_some[others], 1
    ).quantile(0.8)


@STEADY
@given(purchases(), st.floats(0.01, 2), st.floats(0.01, 2), st.integers(1, 6), seeds)
def test_als_half_step_with_targets_solves_the_same_equations_for_them(
    matrix, alpha0, reg, d, seed
):
    """(Y_u'Y_u + alpha0 Y'Y + reg_u I) x_u = Y_u'v_u; targets of 1 change nothing."""
    Y = torch.randn(
        matrix.shape[1], d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    regs, rows = reg * torch.ones(len(matrix), dtype=torch.float64), rows_of(matrix)
    value = np.random.default_rng(seed).standard_normal(len(rows.items))
    X = als_side(Y, rows, alpha0, regs, target=value)
    for u, mine in enumerate(matrix):
        v = torch.from_numpy(value[rows.indptr[u] : rows.indptr[u + 1]])
        A = Y[mine].T @ Y[mine] + alpha0 * Y.T @ Y + regs[u] * torch.eye(d, dtype=torch.float64)
        torch.testing.assert_close(X[u], torch.linalg.solve(A, Y[mine].T @ v), atol=1e-8, rtol=1e-6)
    torch.testing.assert_close(
        als_side(Y, rows, alpha0, regs, target=np.ones(len(value))),
        als_side(Y, rows, alpha0, regs),
        atol=1e-9,
        rtol=1e-7,
    )


def test_als_with_targets_converges_to_a_minimum_of_its_objective():
    U, N, alpha0, reg = *BIG.shape, 0.2, 0.01
    rows = rows_of(BIG)
    value = np.random.default_rng(3).random(len(rows.items)).astype(np.float32)
    X, Y = (
        m.double().requires_grad_()
        for m in als(rows, U, N, 3, alpha0, reg, 1.0, iterations=300, target=value)
    )
    M, V = dense(BIG), torch.zeros(U, N, dtype=torch.float64)
    V[M > 0] = torch.from_numpy(value).double()
    score = X @ Y.T
    cost = (
        (M * (V - score) ** 2).sum()
        + alpha0 * score.square().sum()
        + reg
        * (
            ((M.sum(1) + alpha0 * N) * X.square().sum(1)).sum()
            + ((M.sum(0) + alpha0 * U) * Y.square().sum(1)).sum()
        )
    )
    for grad in torch.autograd.grad(cost, (X, Y)):
        assert grad.abs().max() < 2e-2


@STEADY
@given(
    st.lists(
        st.tuples(st.sampled_from([1.0, 2.0, 3.0, 4.0, 5.0, np.nan]), st.booleans()), max_size=12
    ),
    st.floats(0, 1),
    st.floats(0, 0.5),
)
def test_levels_rise_with_the_stars_and_average_1_where_liked(pairs, disliked, slope):
    rating, liked = np.array([p[0] for p in pairs]), np.array([p[1] for p in pairs], bool)
    value = rating_targets(rating, liked, disliked, slope)
    assert (value >= 0).all() and len(value) == len(pairs)
    for group, average in ((liked, 1.0), (~liked, disliked)):
        known = group & ~np.isnan(rating)
        np.testing.assert_allclose(value[group & np.isnan(rating)], average, atol=1e-6)
        order = np.argsort(rating[known])
        assert (np.diff(value[known][order]) >= -1e-6).all()
        raw = (
            average + slope * (rating[known] - rating[known].mean()) if known.any() else np.zeros(0)
        )
        if (raw >= 0).all() and known.any():
            assert abs(value[known].mean() - average) < 1e-5


def test_without_ratings_and_dislikes_levels_are_plain_als():
    assert (rating_targets(np.full(5, np.nan), np.ones(5, bool)) == 1).all()


def rated(matrix, seed):
    rows = rows_of(matrix)
    return rows._replace(
        ratings=np.random.default_rng(seed).integers(1, 6, len(rows.items)).astype(np.float32)
    )


def test_stars_are_a_minimum_of_their_ridge():
    """Each user's taste solves (P'P + reg I) t = P' (rating - mean - biases).

    P holds the unit rows of the rated items.
    """
    rows, Y = (
        rated(BIG, 1),
        torch.randn(BIG.shape[1], 4, generator=torch.Generator().manual_seed(0)),
    )
    found = fit_stars(rows, Y, reg=0.5)
    for u, mine in enumerate(BIG):
        P = found.place[mine]
        rest = torch.from_numpy(rows.of(u)[1]) - found.mean - found.user[u] - found.item[mine]
        expected = torch.linalg.solve(P.T @ P + 0.5 * torch.eye(4), P.T @ rest)
        torch.testing.assert_close(found.taste[u], expected, atol=1e-4, rtol=1e-3)
    users = np.array([2, 0])
    torch.testing.assert_close(
        found.score(users)[1],
        found.mean + found.user[0] + found.item + found.place @ found.taste[0],
    )


def test_stars_leave_out_unknown_ratings():
    rows, Y = (
        rated(BIG, 2),
        torch.randn(BIG.shape[1], 4, generator=torch.Generator().manual_seed(0)),
    )
    hole = rows._replace(
        ratings=np.where(np.arange(len(rows.items)) % 3 == 0, np.nan, rows.ratings).astype(
            np.float32
        )
    )
    keep = ~np.isnan(hole.ratings)
    user = np.repeat(np.arange(len(BIG)), rows.counts())[keep]
    fewer = type(rows)(
        np.concatenate([[0], np.cumsum(np.bincount(user, minlength=len(BIG)))]),
        rows.items[keep],
        rows.ratings[keep],
    )
    for a, b in zip(fit_stars(hole, Y)[1:], fit_stars(fewer, Y)[1:], strict=True):
        torch.testing.assert_close(a, b)
    none = fit_stars(rows._replace(ratings=np.full(len(rows.items), np.nan, np.float32)), Y)
    assert none.mean == 0 and not none.score(np.arange(3)).any()
