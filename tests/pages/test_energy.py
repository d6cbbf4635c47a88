"""Near-duplicates, gains, page energy, and the moves that change it."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagellm.pages.energy import (
    Near,
    cosine_pairs,
    energy,
    feedback,
    gain,
    gains,
    near_duplicates,
    page_energy,
)
from pagellm.pages.truth import item_scores
from tests.strategies import catalogue_of, near_relations, shop_with, stars

law = settings(deadline=None, max_examples=60)

N = 9
no_near = Near.of_pairs(np.zeros((0, 2)), N)
leaves = st.lists(st.integers(-1, 3), min_size=N, max_size=N).map(np.array)
pages = st.lists(st.integers(0, N - 1), min_size=1, max_size=6)
grades = st.floats(-2, 3, allow_nan=False, width=16)


# Near-duplicates

words = st.sampled_from("ab cd ef gh ij kl".split())


@st.composite
def small_catalogues(draw):
    n = draw(st.integers(1, 8))
    base = draw(st.lists(words, min_size=1, max_size=6))
    title = [
        " ".join(
            draw(st.one_of(st.just(base), st.lists(words, max_size=6), st.just([*base, "xy"])))
        )
        for _ in range(n)
    ]
    title = [t.upper() if draw(st.booleans()) else t + " -" for t in title]
    kinds = "xxxxxxy"  # mostly one shelf, else little can be near
    return catalogue_of(
        [draw(st.sampled_from(["", *kinds])) for _ in range(n)],
        title,
        [draw(st.sampled_from(["", *kinds])) for _ in range(n)],
    )


@law
@given(small_catalogues(), st.sampled_from([0.3, 0.5, 0.8, 1.0]))
def test_near_duplicates_are_those_of_the_rule(c, threshold):
    """The prefix filter loses no pair and adds none."""
    near = near_duplicates(c, jaccard=threshold)
    sets = [frozenset(t.lower().replace("-", " ").split()) for t in c.title]
    for i in range(len(c)):
        want = [
            j
            for j in range(len(c))
            if j != i
            and c.brand[i] == c.brand[j] != ""
            and c.leaf[i] == c.leaf[j] != ""
            and sets[i] | sets[j]
            and len(sets[i] & sets[j]) / len(sets[i] | sets[j]) >= threshold
        ]
        assert near.of(i).tolist() == want


@law
@given(st.integers(1, 40), st.integers(0, 50), st.integers(1, 9))
def test_prefix_filter_is_exact_at_the_threshold(common, seed, extra):
    """|A & B| / |A | B| = 0.8 exactly counts, whatever the rounding of 0.8 |A|."""
    rng = np.random.default_rng(seed)
    names = [f"w{i}" for i in range(5 * common + extra)]
    rng.shuffle(names)
    inner, only = names[: 4 * common], names[4 * common : 5 * common]
    c = catalogue_of(["x"] * 2, [" ".join(inner), " ".join(inner + only)], ["b"] * 2)
    assert near_duplicates(c).of(0).tolist() == [1]
    c = catalogue_of(
        ["x"] * 2, [" ".join(inner), " ".join(inner + only + names[5 * common :])], ["b"] * 2
    )
    assert near_duplicates(c).of(0).tolist() == []


@law
@given(st.integers(1, 12), st.integers(0, 99), st.integers(1, 5))
def test_embeddings_are_compared_by_cosine_in_blocks(n, seed, block):
    e = np.random.default_rng(seed).integers(-1, 2, size=(n, 3)).astype(np.float32)
    length = np.linalg.norm(e, axis=1)
    want = {
        (i, j)
        for i in range(n)
        for j in range(i + 1, n)
        if length[i] * length[j] > 0 and e[i] @ e[j] / length[i] / length[j] >= 0.6
    }
    assert {tuple(pair) for pair in cosine_pairs(e, 0.6, block).tolist()} == want
    near = near_duplicates(catalogue_of([""] * n), 5.0 * e, cosine=0.6)  # length does not matter
    assert {(i, j) for i in range(n) for j in near.of(i).tolist() if i < j} == want


def test_near_duplicates_join_both_rules_and_refuse_wrong_embeddings():
    c = catalogue_of(["x", "x", ""], ["red ball", "red ball", "blue"], ["b", "b", ""])
    e = np.array([[1, 0], [0, 1], [0, 2.0]])
    near = near_duplicates(c, e)
    assert [near.of(i).tolist() for i in range(3)] == [[1], [0, 2], [1]]
    assert near.group.tolist() == [0, 0, 0]
    for wrong in (e[:2], np.array([1.0, 2, 3]), np.where(e > 1, np.nan, e)):
        with pytest.raises(ValueError, match="embedding"):
            near_duplicates(c, wrong)
    for wrong in ({"jaccard": 0.0}, {"jaccard": 1.5}, {"cosine": 0.0}, {"cosine": 1.5}):
        with pytest.raises(ValueError, match="above 0"):
            near_duplicates(c, e, **wrong)
    # 1 counts as near
    assert near_duplicates(c, e, jaccard=1.0, cosine=1.0).of(1).tolist() == [0, 2]


@law
@given(near_relations(N))
def test_near_is_symmetric_and_groups_are_its_components(near):
    for i in range(N):
        assert i not in near.of(i)
        reach, edge = {i}, [i]
        while edge:
            fresh = {int(j) for e in edge for j in near.of(e)} - reach
            reach |= fresh
            edge = list(fresh)
        assert near.group[i] == min(reach)
        assert all(i in near.of(j) for j in near.of(i))


def test_groups_of_a_long_chain():
    chain = np.stack([np.arange(499), np.arange(1, 500)], 1)[::-1]
    assert (Near.of_pairs(chain, 501).group == [0] * 500 + [500]).all()


# Energy


def test_energy_by_hand():
    """leaves x x y -; 0 and 1 near. Page 0 1 2 3 3, gains 1..5; d = 1, .6309, .5, .4307, .3869."""
    near = Near.of_pairs(np.array([[0, 1]]), 4)
    d = [1 / math.log2(k + 1) for k in range(1, 6)]
    want = d[0] * 1.3 + d[1] * (2 - 0.3) + d[2] * 3.3 + d[3] * 4 + d[4] * (5 - 0.3)
    assert energy([0, 1, 2, 3, 3], [1, 2, 3, 4, 5], np.array([0, 0, 1, -1]), near) == pytest.approx(
        want
    )
    want = d[0] * 3 + d[1] * (2 - 0.7)
    got = energy([0, 1], [1, 2], np.array([0, 0, 1, -1]), near, lambda_d=2.0, lambda_r=0.7)
    assert got == pytest.approx(want)


@law
@given(
    st.lists(pages, max_size=4),
    leaves,
    near_relations(N),
    st.data(),
    st.sampled_from([0.0, 0.3, 2.0]),
    st.sampled_from([0.0, 0.3, 2.0]),
)
def test_batch_energy_equals_energy_and_ignores_padding(
    batch, leaf, near, data, lambda_d, lambda_r
):
    width = max(map(len, batch), default=0) + data.draw(st.integers(0, 2))
    item = np.full((len(batch), width), -1)
    for row, page in enumerate(batch):
        item[row, : len(page)] = page
    worth = np.full(item.shape, np.nan)
    for row, page in enumerate(batch):
        worth[row, : len(page)] = data.draw(
            st.lists(grades, min_size=len(page), max_size=len(page))
        )
    got = page_energy(item, item >= 0, worth, leaf, near, lambda_d, lambda_r)
    want = [
        energy(page, worth[row, : len(page)], leaf, near, lambda_d, lambda_r)
        for row, page in enumerate(batch)
    ]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)


@law
@given(pages, leaves, near_relations(N), st.data())
def test_energy_laws(page, leaf, near, data):
    """E is linear in the gains; a last item adds one term; numbers of leaf categories are names."""
    g = np.array(data.draw(st.lists(grades, min_size=len(page), max_size=len(page))))
    e = energy(page, g, leaf, near)
    d = 1 / np.log2(np.arange(len(page)) + 2)
    assert energy(page, 3 * g + 1, leaf, near) - e == pytest.approx((d * (2 * g + 1)).sum())
    assert energy(page[:-1], g[:-1], leaf, near) - e == pytest.approx(
        -d[-1]
        * (
            g[-1]
            + 0.3 * (leaf[page[-1]] >= 0 and leaf[page[-1]] not in leaf[page[:-1]])
            - 0.3
            * (page[-1] in page[:-1] or bool(set(near.of(page[-1]).tolist()) & set(page[:-1])))
        )
    )
    assert energy(page, g, np.where(leaf >= 0, 40 - leaf, -1), near) == pytest.approx(e)


def test_page_energy_refuses():
    leaf, ones = np.zeros(N, int), np.ones((1, 2))
    with pytest.raises(ValueError, match="want one"):
        page_energy(np.array([[0, 1]]), np.array([[True]]), ones, leaf, no_near)
    with pytest.raises(ValueError, match="hole"):
        page_energy(np.array([[0, 1]]), np.array([[False, True]]), ones, leaf, no_near)


def test_gain_of_known_and_unknown_ratings():
    nan = math.nan
    got = gain([5, 4, 1, 5, nan, nan], [4.2, 1.0, 5.0, nan, nan, 3.0])
    assert got.tolist() == pytest.approx([2 + 0.4, 1, -2 + 0.5, 2, 1, 1 + 0.25])
    assert gain(nan, nan, implicit_gain=0.5) == 0.5


@law
@given(
    st.dictionaries(st.tuples(st.integers(0, 2), st.integers(0, 4)), stars, max_size=10),
    st.lists(st.lists(st.integers(-1, 4), min_size=3, max_size=3), min_size=1, max_size=3),
)
def test_gains_look_up_each_users_own_rows(rows, page):
    shop = shop_with([(u, i, r, "train") for (u, i), r in rows.items()], 3, 5)
    s = item_scores(shop)
    users = np.arange(len(page))[::-1]
    got = gains(users, np.array(page), shop.csr("train", positive=None), s)
    for b, user in enumerate(users.tolist()):
        for k, item in enumerate(page[b]):
            want = float(gain(rows[user, item], s[item])) if (user, item) in rows else 0.0
            assert got[b, k] == pytest.approx(want)


# Feedback


@law
@given(
    st.lists(st.integers(0, N - 1), min_size=1, max_size=7, unique=True),
    leaves,
    near_relations(N),
    st.data(),
)
def test_feedback_is_every_move_that_changes_energy(page, leaf, near, data):
    """delta_E of (i, k, k2) is E after moving i from k to k2 less E before; here within 3 slots."""
    g = data.draw(st.lists(grades, min_size=len(page), max_size=len(page)))
    of = dict(zip(page, g, strict=True))
    want = {}
    for k in range(len(page)):
        for k2 in range(len(page)):
            moved = page[:k] + page[k + 1 :]
            moved.insert(k2, page[k])
            delta = energy(moved, [of[i] for i in moved], leaf, near) - energy(page, g, leaf, near)
            if 0 < abs(k - k2) <= 3 and abs(delta) > 1e-12:
                want[page[k], k + 1, k2 + 1] = delta
    got = feedback(page, g, leaf, near, reach=3)
    # A change of about 1e-12 may fall on either side of the threshold.
    clear = {key: delta for key, delta in want.items() if abs(delta) > 1e-9}
    assert {m[:3]: m.delta_E for m in got if abs(m.delta_E) > 1e-9} == pytest.approx(clear)
    assert feedback(page, g, leaf, near, reach=3, beneficial_only=True) == [
        m for m in got if m.delta_E > 0
    ]


def test_feedback_reaches_five_slots():
    moves = feedback(list(range(8)), [8, 7, 6, 5, 4, 3, 2, 1], np.full(N, -1), no_near)
    assert max(abs(m.k - m.k2) for m in moves) == 5
    assert all(m.delta_E < 0 for m in moves)  # a sorted page: every move hurts
