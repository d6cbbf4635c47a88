"""Laws of duplicates, k-core and splits, compared with a slow version where there is one."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagellm.data.filters import (
    TEST,
    TRAIN,
    VALID,
    group_rank,
    highest,
    k_core,
    latest,
    random_keys,
    repeats,
    split_by_time,
    split_random,
    strength,
    thin,
    tie_ranks,
)

few = settings(deadline=None, max_examples=80)
cell = st.tuples(
    st.integers(0, 3),
    st.integers(0, 4),
    st.integers(-1, 3),
    st.sampled_from([math.nan, 1.0, 3.0, 5.0]),
    st.integers(0, 9),
)
rows_with_repeats = st.lists(cell, max_size=14, unique_by=lambda row: row[:2] + row[4:])
pairs = st.sets(st.tuples(st.integers(0, 5), st.integers(0, 6)), max_size=24).map(sorted)


def columns(rows, dtypes=(int, int, int, float, int)):
    return [np.array([row[n] for row in rows], dtype=dtype) for n, dtype in enumerate(dtypes)]


@few
@given(rows_with_repeats, st.randoms(use_true_random=False))
def test_latest_keeps_one_row_a_pair_whatever_the_order(rows, random):
    """Of each (user, item) the largest (time, rating with NaN lowest, tie) stays,
    in any order of rows.
    """

    def kept(rows):
        return [rows[n] for n in latest(*columns(rows))]

    best = {}
    for row in rows:
        key = (row[2], -math.inf if math.isnan(row[3]) else row[3], row[4])
        if row[:2] not in best or key > best[row[:2]][0]:
            best[row[:2]] = key, row
    expected = [best[pair][1] for pair in sorted(best)]
    shuffled = random.sample(rows, len(rows))
    assert repr(kept(rows)) == repr(kept(shuffled)) == repr(expected)


@few
@given(rows_with_repeats)
def test_highest_keeps_the_best_grade_and_the_latest_time(rows):
    index, time = highest(*columns(rows))
    best = {}
    for row in rows:
        key = (-math.inf if math.isnan(row[3]) else row[3], row[2], row[4])
        best[row[:2]] = max(best.get(row[:2], key), key)
    assert [rows[n][:2] for n in index] == sorted(best)
    assert [rows[n][4] for n in index] == [best[pair][2] for pair in sorted(best)]
    assert time.tolist() == [
        max(row[2] for row in rows if row[:2] == pair) for pair in sorted(best)
    ]


@few
@given(pairs, st.integers(0, 4), st.randoms(use_true_random=False))
def test_k_core_is_what_is_left_when_rows_are_taken_out_one_by_one(rows, k, random):
    """Removing rows of any too rare user or item, in any order, ends in the same largest set."""
    left = list(rows)
    while True:
        rare = [
            row
            for row in left
            if sum(r[0] == row[0] for r in left) < k or sum(r[1] == row[1] for r in left) < k
        ]
        if not rare:
            break
        left.remove(random.choice(rare))
    user, item = columns(rows, (int, int))
    keep, rounds = k_core(user, item, k)
    assert [row for row, stays in zip(rows, keep, strict=True) if stays] == left
    assert rounds[0] == {"users": len(set(user)), "items": len(set(item)), "rows": len(rows)}
    assert rounds[-1] == {
        "users": len({u for u, _ in left}),
        "items": len({i for _, i in left}),
        "rows": len(left),
    }
    sizes = [r["rows"] for r in rounds]
    assert rounds[-1] == rounds[-2] and sizes[:-1] == sorted(set(sizes), reverse=True)


@few
@given(pairs, st.integers(0, 3), st.integers(0, 7), st.randoms(use_true_random=False))
def test_thin_keeps_the_lowest_keys_and_comes_as_close_as_any_number_of_rows(
    rows, k, wanted, random
):
    """Of all prefixes of the rows by key, the one whose core's users are nearest to what was asked.

    Fewer users than were asked for in all rows is an error.
    """
    user, item = columns(rows, (int, int))
    counted = np.array([random.random() < 0.8 for _ in rows], bool)
    keys = np.array(random.sample(range(100), len(rows)), np.uint64)
    order = np.argsort(keys)
    left = []
    for n in range(len(rows) + 1):
        some = order[:n][counted[order[:n]]]
        left.append(len(set(user[some][k_core(user[some], item[some], k)[0]])))
    assert left == sorted(left)
    if left[-1] < wanted:
        with pytest.raises(ValueError, match=f"leave {left[-1]} users"):
            thin(user, item, counted, keys, k, wanted)
        return
    keep = thin(user, item, counted, keys, k, wanted)
    assert set(order[: keep.sum()]) == set(np.flatnonzero(keep))
    assert abs(left[keep.sum()] - wanted) == min(abs(n - wanted) for n in left)


@few
@given(pairs, st.integers(0, 3))
def test_a_draw_depends_on_seed_user_and_item_alone(rows, seed):
    users, items = [f"u{n}" for n in range(6)], [f"i{n}" for n in range(7)]
    user, item = columns(rows, (int, int))
    keys = random_keys(seed, user, item, users, items)
    alone = [random_keys(seed, np.array([u]), np.array([i]), users, items)[0] for u, i in rows]
    assert keys.tolist() == [int(key) for key in alone] and len(set(keys.tolist())) == len(rows)
    other = random_keys(seed + 1, user, item, users, items)
    assert not np.any(keys == other)


def test_draws_are_these_on_every_machine():
    """SHA-256 of "seed NUL user NUL item": its first eight bytes, most significant first."""
    keys = random_keys(7, np.array([0, 0, 1]), np.array([0, 1, 0]), ["A1", "Ä2"], ["B1", "B2"])
    assert keys.tolist() == GOLDEN


GOLDEN = [10208337298201646828, 14749945107494703517, 10026376581150917219]


@few
@given(pairs)
def test_rank_counts_the_smaller_rows_of_the_group(rows):
    group, key = columns(rows, (int, int))
    coarse = key // 3
    rank, size = group_rank(group, coarse, -key)
    for n in range(len(rows)):
        same = [m for m in range(len(rows)) if group[m] == group[n]]
        assert size[n] == len(same)
        assert rank[n] == sum((coarse[m], -key[m]) < (coarse[n], -key[n]) for m in same)


def held_out(n):
    return max(1, n // 10) if n >= 3 else 0


@st.composite
def tables(draw, users=3, most=34):
    """Columns user, item, time, positive with one row per pair.

    Some users have few rows and some many; some days have many rows.
    """
    user, item, time, positive = [], [], [], []
    for u in range(users):
        count = draw(st.one_of(st.integers(0, 6), st.integers(0, most)))
        user += [u] * count
        item += draw(st.permutations(range(count)))
        time += draw(st.lists(st.integers(-1, 5), min_size=count, max_size=count))
        positive += draw(
            st.lists(st.sampled_from([True, True, False]), min_size=count, max_size=count)
        )
    return np.array(user, int), np.array(item, int), np.array(time, int), np.array(positive, bool)


@few
@given(tables(), st.integers(0, 99))
def test_a_random_split_holds_out_the_papers_shares(table, seed):
    """valid = test = max(1, floor(n/10)) of n >= 3 positives, none of fewer.

    Of m other rows floor(m/10) are held out.
    """
    user, item, _, positive = table
    keys = random_keys(seed, user, item, ["a", "b", "c"], [str(n) for n in range(40)])
    split = split_random(user, item, positive, keys)
    for u in range(3):
        mine = (user == u) & positive
        others = (user == u) & ~positive
        assert sum(split[mine] == TEST) == sum(split[mine] == VALID) == held_out(mine.sum())
        assert sum(split[others] == TEST) == sum(split[others] == VALID) == others.sum() // 10
        for rows in (mine, others):  # by the draws: test first, then validation
            by_draw = split[rows][np.argsort(keys[rows])]
            assert by_draw.tolist() == sorted(by_draw.tolist(), reverse=True)
    assert set(split.tolist()) <= {TRAIN, VALID, TEST} and split.dtype == np.int8


@few
@given(tables(), st.booleans())
def test_a_split_by_time_never_looks_back(table, leave_one_out):
    """Positives only move forward in (time, tie), and the stated number of them is held out.

    Any other row goes by its time alone: what is at or after a held-out positive is held out too.
    """
    user, tie, time, positive = table
    split = split_by_time(user, tie, time, positive, leave_one_out)
    for u in range(3):
        mine = np.flatnonzero(user == u)
        liked = sorted((n for n in mine if positive[n]), key=lambda n: (time[n], tie[n]))
        assert [split[n] for n in liked] == sorted(split[n] for n in liked)
        expected = (1 if len(liked) >= 3 else 0) if leave_one_out else held_out(len(liked))
        for part in (TEST, VALID):
            assert sum(split[n] == part for n in liked) == expected
        for n in set(mine) - set(liked):
            reached = [split[m] for m in liked if split[m] != TRAIN and time[m] <= time[n]]
            assert split[n] == (max(reached, default=TRAIN) if time[n] >= 0 else TRAIN)


@few
@given(tables(), st.integers(0, 99), st.randoms(use_true_random=False))
def test_equal_times_are_ordered_by_a_draw_and_different_times_by_themselves(table, seed, random):
    """The order is that of SHA-256 draws of user and item, whatever the order of the rows."""
    user, item, time, _ = table
    ids = ["a", "b", "c"], [str(n) for n in range(40)]
    rank = tie_ranks(seed, user, item, time, *ids)
    draw = random_keys(f"{seed} order", user, item, *ids)
    for n in range(len(user)):
        same = [m for m in range(len(user)) if (user[m], time[m]) == (user[n], time[n])]
        if len(same) == 1:
            assert rank[n] == 0
        assert sorted(same, key=lambda m: rank[m]) == sorted(same, key=lambda m: draw[m])
    order = np.array(random.sample(range(len(user)), len(user)), dtype=int)
    again = tie_ranks(seed, user[order], item[order], time[order], *ids)
    assert np.array_equal(rank[order], again)


@pytest.mark.parametrize("leave_one_out", [True, False])
def test_item_numbers_do_not_choose_the_test_row(leave_one_out):
    """200 users have 8 items on one day: each number is held out about equally often."""
    user, item = np.repeat(np.arange(200), 8), np.tile(np.arange(8), 200)
    day, liked = np.zeros(1600, int), np.ones(1600, bool)
    ids = [f"u{n}" for n in range(200)], [f"i{n}" for n in range(8)]
    tie = tie_ranks(0, user, item, day, *ids)
    split = split_by_time(user, tie, day, liked, leave_one_out)
    for part in (TEST, VALID):
        chosen = np.bincount(item[split == part], minlength=8)
        assert chosen.sum() == 200 and 8 <= chosen.min() <= chosen.max() <= 50


@few
@given(tables(), st.integers(0, 9), st.randoms(use_true_random=False))
def test_splits_follow_the_rows_when_they_are_shuffled(table, seed, random):
    user, item, time, positive = table
    order = np.array(random.sample(range(len(user)), len(user)), dtype=int)
    ids = ["a", "b", "c"], [str(n) for n in range(40)]

    def both(user, item, time, positive):
        return [
            split_random(user, item, positive, random_keys(seed, user, item, *ids)),
            split_by_time(user, tie_ranks(seed, user, item, time, *ids), time, positive, False),
        ]

    shuffled = both(*(column[order] for column in table))
    for before, after in zip(both(*table), shuffled, strict=True):
        assert np.array_equal(before[order], after)


def test_the_random_split_differs_between_seeds_and_users():
    user, item = np.repeat(np.arange(2), 30), np.tile(np.arange(30), 2)
    positive = np.ones(60, bool)
    splits = {
        seed: split_random(
            user,
            item,
            positive,
            random_keys(seed, user, item, ["a", "b"], [str(n) for n in range(30)]),
        )
        for seed in (0, 1)
    }
    assert not np.array_equal(splits[0], splits[1])
    assert not np.array_equal(splits[0][:30], splits[0][30:])


@pytest.mark.parametrize(
    "split",
    [
        lambda user, item, positive: split_random(user, item, positive, np.zeros(0, np.uint64)),
        lambda user, item, positive: split_by_time(user, item, user, positive, False),
    ],
)
def test_no_rows_no_split(split):
    empty = np.zeros(0, int)
    assert len(split(empty, empty, np.zeros(0, bool))) == 0
    assert len(latest(empty, empty, empty, np.zeros(0), empty)) == 0
    assert k_core(empty, empty, 5)[0].shape == (0,)


@few
@given(rows_with_repeats, st.randoms(use_true_random=False))
def test_repeats_are_the_different_times_of_a_pair_and_its_rows_without_one(rows, random):
    user, item, time, *_ = columns(random.sample(rows, len(rows)))
    expected = {}
    for n, row in enumerate(rows):
        expected.setdefault(row[:2], set()).add(f"row {n}" if row[2] == -1 else row[2])
    assert repeats(user, item, time).tolist() == [len(expected[p]) for p in sorted(expected)]


def test_strength_grows_ever_more_slowly_and_is_always_liked():
    found = strength(np.arange(1, 60))
    assert found[0] == 4 and found.max() < 5
    assert (np.diff(found) > 0).all() and (np.diff(found, 2) < 0).all()
