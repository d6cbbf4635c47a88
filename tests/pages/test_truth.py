"""Ground-truth pages of train rows: the split, the item scores, the order of a page."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagellm.data.shop import SPLITS
from pagellm.pages.energy import Near
from pagellm.pages.truth import (
    PageMaker,
    Ties,
    ground_truth_page,
    item_scores,
    popularity,
    single_level,
    split_history,
)
from tests.strategies import catalogue_of, near_relations, shop_with, stars

law = settings(deadline=None, max_examples=60)

N = 9
liked = st.one_of(st.sampled_from([4.0, 5.0]), st.just(math.nan))
no_near = Near.of_pairs(np.zeros((0, 2)), N)


# The input/label split


@st.composite
def histories(draw):
    ratings = draw(st.lists(liked, min_size=1, max_size=12))
    return np.arange(100, 100 + len(ratings)), np.array(ratings)


@law
@given(histories(), st.floats(0.01, 0.99), st.integers(0, 99))
def test_split_is_a_partition_in_order_with_a_label(history, share, seed):
    items, ratings = history
    given_, label = split_history(items, ratings, share, np.random.default_rng(seed))
    assert len(label) >= 1
    assert sorted([*given_, *label]) == list(range(len(items)))
    assert list(given_) == sorted(given_) and list(label) == sorted(label)


@law
@given(histories(), st.floats(0.01, 0.99), st.integers(0, 99))
def test_split_is_stratified(history, share, seed):
    """About share * m of a level's m items are labels, never none or all; a single one is input."""
    items, ratings = history
    _, label = split_history(items, ratings, share, np.random.default_rng(seed))
    if all((np.nan_to_num(ratings) == r).sum() == 1 for r in np.nan_to_num(ratings)):
        assert len(label) == 1  # nothing but single items: one of them must become the label
        return
    for level in np.unique(np.nan_to_num(ratings)):
        m = int((np.nan_to_num(ratings) == level).sum())
        got = int((np.nan_to_num(ratings)[label] == level).sum())
        if m == 1:
            assert got == 0
        else:
            assert 1 <= got <= m - 1
            assert abs(got - share * m) <= 0.5 or got in (1, m - 1)


def test_split_draws_every_item_and_nothing_else_decides():
    items, ratings = np.arange(6), np.array([5, 5, 5, 4, 4, 4.0])
    drawn = {
        tuple(split_history(items, ratings, 0.2, np.random.default_rng(s))[1]) for s in range(200)
    }
    assert drawn == {(a, b) for a in range(3) for b in range(3, 6)}
    single = {
        split_history(np.arange(2), np.array([5, 4.0]), 0.2, np.random.default_rng(s))[1][0]
        for s in range(50)
    }
    assert single == {0, 1}


def test_single_level():
    ratings = np.array([5, 5, 4, 4.0])
    assert not single_level(ratings, np.array([0, 2]), np.array([1, 3]))
    assert single_level(ratings, np.array([0, 2, 3]), np.array([1]))
    assert not single_level(np.array([math.nan, math.nan]), np.array([0]), np.array([1]))


@pytest.mark.parametrize(
    "arguments",
    [([], [], 0.2), ([1], [5.0, 4.0], 0.2), ([1, 2], [5.0, 4.0], 0.0), ([1, 2], [5.0, 4.0], 1.0)],
)
def test_split_refuses(arguments):
    with pytest.raises(ValueError, match="split_history"):
        split_history(*map(np.asarray, arguments[:2]), arguments[2], np.random.default_rng(0))


# s_i and popularity


@law
@given(
    st.dictionaries(
        st.tuples(st.integers(0, 3), st.integers(0, 4)),
        st.tuples(stars, st.sampled_from(SPLITS)),
        max_size=14,
    ),
    st.sampled_from([0.0, 0.5, 7.0]),
)
def test_item_scores_are_shrunken_means_of_train_ratings(rows, shrink):
    """(n + m) s_i = sum r + m mu over train rows of any rating; NaN without one."""
    shop = shop_with([(u, i, r, s) for (u, i), (r, s) in rows.items()], 4, 5)
    s = item_scores(shop, shrink)
    train = [(i, r) for (_, i), (r, split) in rows.items() if split == "train"]
    known = [(i, r) for i, r in train if not math.isnan(r)]
    for i in range(5):
        mine = [r for j, r in known if j == i]
        if not mine:
            assert math.isnan(s[i])
            continue
        mu = sum(r for _, r in known) / len(known)
        assert (len(mine) + shrink) * s[i] == pytest.approx(sum(mine) + shrink * mu)
    assert popularity(shop).tolist() == [sum(j == i for j, _ in train) for i in range(5)]


def test_scores_do_not_shrink_unless_asked():
    assert item_scores(shop_with([(0, 0, 5.0, "train"), (0, 1, 1.0, "train")], 1, 2)).tolist() == [
        5.0,
        1.0,
    ]


def test_shrink_is_not_negative():
    with pytest.raises(ValueError, match="shrink"):
        item_scores(shop_with([(0, 0, 5.0, "train")], 1, 1), -1.0)


# Ground-truth pages


@st.composite
def shelves(draw):
    items = draw(st.lists(st.integers(0, N - 1), min_size=1, max_size=N, unique=True))
    ratings = [draw(liked) for _ in items]
    s = np.array(
        [draw(st.one_of(st.just(math.nan), st.sampled_from([2.0, 3.5, 4.5]))) for _ in range(N)]
    )
    leaf = [draw(st.sampled_from(["", "x", "y", "z"])) for _ in range(N)]
    return np.array(items), np.array(ratings), catalogue_of(leaf), s


@law
@given(shelves(), st.randoms())
def test_page_follows_rating_then_novelty_then_s_then_the_draw(shelf, random):
    """At every slot no remaining item is better by (rating, new category, s, -tie)."""
    items, ratings, c, s = shelf
    tie = Ties(3, N).of(1, items)
    page, removed = ground_truth_page(items, ratings, c, s, no_near, tie)
    drawn = dict(zip(items.tolist(), tie.tolist(), strict=True))
    assert removed == 0 and sorted(page) == sorted(items)
    level = dict(zip(items.tolist(), np.nan_to_num(ratings, nan=-1.0), strict=True))
    for k, item in enumerate(page.tolist()):
        seen = {c.leaf[i] for i in page[:k]} | {""}

        def key(i, seen=seen):
            return level[i], c.leaf[i] not in seen, np.nan_to_num(s[i], nan=-1.0), -drawn[i]

        assert key(item) == max(key(int(i)) for i in page[k:])
    shuffled = random.sample(range(len(items)), len(items))
    assert (
        ground_truth_page(items[shuffled], ratings[shuffled], c, s, no_near, tie[shuffled])[
            0
        ].tolist()
        == page.tolist()
    )


@law
@given(st.integers(1, 40), st.integers(0, 9))
def test_ties_are_an_order_of_the_items_and_no_two_are_equal(n_items, seed):
    ties = Ties(5, n_items, seed)
    for user in range(5):
        assert len(set(ties.of(user, np.arange(n_items)).tolist())) == n_items


def test_item_numbers_do_not_order_the_pages_of_a_shop_without_ratings():
    """Of 400 users' pages of nine like items, each item leads some: about a ninth of them."""
    ties, items, c = Ties(400, N), np.arange(N), catalogue_of(["x"] * N)
    unknown = np.full(N, math.nan)
    first = [
        ground_truth_page(items, unknown, c, unknown, no_near, ties.of(u, items))[0][0]
        for u in range(400)
    ]
    assert (np.abs(np.bincount(first, minlength=N) / 400 - 1 / N) < 0.06).all()


def test_a_page_maker_draws_ties_anew_for_every_user(shop_without_ratings):
    """Users who liked the same items get pages in different orders, and always the same ones."""
    maker, again = (PageMaker(shop_without_ratings) for _ in range(2))
    pages = [maker.page(u, np.arange(8), np.full(8, math.nan)).tolist() for u in range(20)]
    assert len({tuple(page) for page in pages}) > 5
    assert pages == [again.page(u, np.arange(8), np.full(8, math.nan)).tolist() for u in range(20)]


@pytest.fixture
def shop_without_ratings():
    rows = [(u, i, math.nan, "train") for u in range(20) for i in range(8)]
    return shop_with(rows, 20, 8)


@law
@given(shelves(), near_relations(N))
def test_redundant_items_leave_and_the_higher_one_stays(shelf, near):
    items, ratings, c, s = shelf
    tie = Ties(1, N).of(0, items)
    whole, _ = ground_truth_page(items, ratings, c, s, no_near, tie)
    page, removed = ground_truth_page(items, ratings, c, s, near, tie)
    kept = page.tolist()
    assert removed == len(whole) - len(kept)
    assert kept == [i for i in whole.tolist() if i in kept]  # nothing changes its order
    for k, item in enumerate(whole.tolist()):
        above = [i for i in whole[:k].tolist() if i in kept]
        assert (item in kept) == (not set(near.of(item).tolist()) & set(above))


def test_the_same_item_twice_is_redundant():
    page, removed = ground_truth_page(
        np.array([3, 3]),
        np.array([4.0, 5.0]),
        catalogue_of(["x"] * 4),
        np.full(4, 4.0),
        Near.of_pairs(np.zeros((0, 2)), 4),
        np.array([0, 0]),
    )
    assert page.tolist() == [3] and removed == 1


# Training examples


@st.composite
def dated_shops(draw):
    """A shop with times, all ratings kinds and splits; rows of a user in the order of time."""
    rows = {
        (u, i): (r, s)
        for u in range(3)
        for i, r, s in draw(
            st.lists(
                st.tuples(st.integers(0, 7), stars, st.sampled_from(["train", "train", "test"])),
                max_size=8,
            )
        )
    }
    shop = shop_with([(u, i, r, s) for (u, i), (r, s) in rows.items()], 3, 8)
    return replace(shop, time=np.sort(draw(times_of(len(rows)))))


def times_of(n):
    return st.lists(st.integers(0, 5), min_size=n, max_size=n).map(lambda t: np.array(t, np.int64))


@law
@given(dated_shops(), st.integers(0, 9), st.sampled_from([None, 1, 2]))
def test_examples_are_made_of_liked_train_items_alone(shop, seed, longest):
    """History and page share nothing; all of a user's liked train items are in one of them."""
    maker, liked_of = PageMaker(shop), shop.csr("train")
    assert maker.users.tolist() == [u for u in range(3) if len(liked_of.of(u)[0]) > 1]
    for user in maker.users.tolist():
        items, ratings = liked_of.of(user)
        rating = dict(zip(items.tolist(), np.nan_to_num(ratings, nan=-1.0), strict=True))
        for draw in (maker.example, None):
            rng = np.random.default_rng(seed)
            if draw:
                (history, given_), page = draw(user, 0.4, rng, longest)
                whole = draw(user, 0.4, np.random.default_rng(seed))[1]
            else:
                (history, given_), page, _ = maker.later(user, rng, longest)
                whole = maker.later(user, np.random.default_rng(seed))[1]
            assert sorted([*history, *whole]) == sorted(items)
            assert (
                len(history) and len(whole) and list(history) == [i for i in items if i in history]
            )
            assert [rating[i] for i in history.tolist()] == np.nan_to_num(given_, nan=-1.0).tolist()
            assert page.tolist() == whole[:longest].tolist()


@law
@given(dated_shops(), st.integers(0, 9))
def test_a_later_page_comes_after_its_history(shop, seed):
    """No item of the page is older than one of the history; the time is that of its earliest."""
    maker, train = PageMaker(shop), np.flatnonzero(shop.rows("train"))
    for user in maker.users.tolist():
        time = {int(shop.item[row]): int(shop.time[row]) for row in train if shop.user[row] == user}
        (history, _), page, start = maker.later(user, np.random.default_rng(seed))
        assert max(time[i] for i in history.tolist()) <= start
        assert start == min(time[i] for i in page.tolist())


def test_a_later_page_begins_anywhere_but_at_the_first_item():
    rows = [(0, i, 5.0, "train") for i in range(4)]
    maker = PageMaker(replace(shop_with(rows, 1, 4), time=np.arange(4)))
    starts = {maker.later(0, np.random.default_rng(n))[2] for n in range(60)}
    assert starts == {1, 2, 3}


def test_the_clock_cuts_train_rows_into_equal_parts():
    rows = [(0, i, 5.0, "train") for i in range(12)] + [(1, 0, 5.0, "test")]
    time = np.append(np.arange(12) * 10, 10**6)
    maker = PageMaker(replace(shop_with(rows, 2, 12), time=time))
    assert maker.clock(1) == ()
    for times in (2, 3, 4):
        cuts = maker.clock(times)
        counts = np.histogram(maker.time, [-1, *(c - 1 for c in cuts), 200])[0]
        assert len(cuts) == times - 1 and counts.max() - counts.min() <= 2
    still = PageMaker(replace(shop_with(rows, 2, 12), time=np.zeros(13, np.int64)))
    assert still.clock(4) == (0,)


def test_the_share_of_users_with_a_level_on_one_side_only():
    """Two items of one level: a level on both sides; two items of two levels: never."""
    alike = [(u, i, 5.0, "train") for u in range(3) for i in range(2)]
    unlike = [(3, 0, 5.0, "train"), (3, 1, 4.0, "train")]
    assert PageMaker(shop_with(alike, 4, 2)).single_level_share(0.5, 0) == 0
    assert PageMaker(shop_with(alike + unlike, 4, 2)).single_level_share(0.5, 0) == 1 / 4
