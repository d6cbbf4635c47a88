"""Intervals, effect sizes, ranks, correlation and calibration."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagellm.pages import stats
from pagellm.pages.stats import (
    average_ranks,
    calibration,
    difference,
    difference_test,
    effect,
    interval,
    paired,
    spearman,
    summary,
    wilson,
)

few = settings(deadline=None, max_examples=40)

# Intervals

scores = st.lists(
    st.one_of(st.floats(-5, 5, allow_nan=False), st.just(math.nan)), min_size=1, max_size=12
)


@few
@given(scores, st.integers(0, 5))
def test_summary(values, seed):
    """The mean of defined values; low and high within them; the same seed, the same interval."""
    got = summary(values, seed, n_boot=50)
    kept = [x for x in values if not math.isnan(x)]
    assert got["count"] == len(kept) and got["coverage"] == len(kept) / len(values)
    if not kept:
        assert got["mean"] is got["low"] is got["high"] is None
        return
    assert got["mean"] == pytest.approx(sum(kept) / len(kept))
    assert min(kept) - 1e-9 <= got["low"] <= got["high"] <= max(kept) + 1e-9
    assert summary(values, seed, n_boot=50) == got
    shifted = summary([x + 3 for x in values], seed, n_boot=50)
    for name in ("mean", "low", "high"):
        assert shifted[name] == pytest.approx(got[name] + 3)


def test_interval_is_that_of_a_mean():
    """For many users: mean -+ 1.96 standard errors; blocks of draws do not change its width."""
    x = np.random.default_rng(0).normal(2.0, 3.0, size=5000)
    got = summary(x, 0)
    se = x.std() / math.sqrt(len(x))
    assert (got["mean"] - got["low"]) / se == pytest.approx(1.96, abs=0.2)
    assert (got["high"] - got["mean"]) / se == pytest.approx(1.96, abs=0.2)
    assert summary(x, 1) != got


def test_bootstrap_makes_as_many_draws_as_asked(monkeypatch):
    x = np.random.default_rng(0).normal(size=10)
    whole = summary(x, 3, n_boot=500)
    monkeypatch.setattr(stats, "BLOCK", 70)
    # The same draws, cut into blocks of 7; 503 is no multiple of 7.
    assert summary(x, 3, n_boot=503) != whole == summary(x, 3, n_boot=500)


def test_paired_uses_users_of_both_and_cancels_what_they_share():
    rng = np.random.default_rng(0)
    base = rng.normal(0, 10, size=400)
    a, b = base + 0.1 + rng.normal(0, 0.1, 400), base.copy()
    a[:3], b[3:5] = math.nan, math.nan
    got = paired(a, b)
    assert got["count"] == 395 and got["coverage"] == 395 / 400
    assert 0.05 < got["low"] < got["mean"] < got["high"] < 0.15
    assert got == summary(a - b, 0) | {"p": got["p"]}
    assert paired(b, a)["mean"] == pytest.approx(-got["mean"])
    with pytest.raises(ValueError, match="same users"):
        paired(a, b[:-1])


def test_several_seeds_are_drawn_as_well_as_users():
    """With equal users the interval is that of the seeds, with equal seeds that of the users."""
    rng = np.random.default_rng(0)
    shift = rng.normal(0, 1, 8)
    a, b = [np.full(50, 0.5 + x) for x in shift], [np.zeros(50)] * 8
    mean, low, high = difference(a, b)
    assert mean == pytest.approx(0.5 + shift.mean())
    assert high - low == pytest.approx(2 * 1.96 * shift.std() / 8**0.5, rel=0.15)
    users = rng.normal(0, 1, 300)
    mean, low, high = difference([users] * 3, [np.zeros(300)] * 3)
    assert mean == pytest.approx(users.mean())
    assert (low + high) / 2 == pytest.approx(mean, abs=0.05)
    assert high - low == pytest.approx(2 * 1.96 * users.std() / 300**0.5, rel=0.15)
    assert difference(a, b) == difference(a, b) != difference(a, b, seed=1) != difference(b, a)


@pytest.mark.parametrize("drawn, reused", [(40, 0), (10**6, 10**6)])
def test_an_interval_is_that_of_draws_made_one_by_one(drawn, reused, monkeypatch):
    """In blocks of any size, kept or not: each draw takes seeds, then users, with replacement."""
    monkeypatch.setattr(stats, "DRAWN", drawn)
    monkeypatch.setattr(stats, "REUSED", reused)
    made = np.random.default_rng(1)
    a, b = made.normal(size=(2, 3, 17))
    a[0, :4] = math.nan
    rng, means = np.random.Generator(np.random.Philox(key=5)), []
    for _ in range(200):
        seeds = rng.integers(3, size=3)
        users = rng.integers(17, size=17)
        means.append(np.nanmean((a - b)[seeds][:, users]))
    for _ in range(2):
        found = difference(list(a), list(b), 200, 5)
        assert found[1:] == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])))


def test_a_difference_leaves_out_users_without_both_scores():
    """A user counts in the seeds where both scores are defined; if there is none, all is NaN."""
    nan = math.nan
    a, b = [np.array([1.0, nan, 5.0]), np.array([2.0, 7.0, nan])], [np.array([0.0, 1.0, nan])] * 2
    mean, low, high = difference(a, b)
    assert mean == pytest.approx((1 + 2 + 6) / 3) and 0 <= low <= mean <= high <= 6
    mean, low, high = difference([np.array([nan])], [np.array([1.0])])
    assert math.isnan(mean) and math.isnan(low) and math.isnan(high)


def test_an_interval_is_that_of_the_number_of_seeds():
    rng = np.random.default_rng(0)
    a, b = ([rng.normal(size=40) for _ in range(2)] for _ in range(2))
    one = paired(a[0], b[0], 3, 200)
    assert interval(a[:1], b[:1], 3, 200) == (*(one["mean"], one["low"], one["high"], one["p"]),)
    assert interval(a, b, 3, 200) == difference_test(a, b, 200, 3)
    assert difference_test(a, b, 200, 3)[:3] == difference(a, b, 200, 3)
    assert np.isnan(interval([np.array([math.nan])], [np.ones(1)])).all()


def test_an_effect_is_the_mean_over_the_spread_of_the_users_means():
    a, b = [np.array([1.0, 3.0, math.nan]), np.array([3.0, 5.0, math.nan])], [np.zeros(3)] * 2
    assert effect(a, b) == pytest.approx(3 / 1)  # users' means over seeds: 2 and 4
    assert effect(b, a) == pytest.approx(-3)
    assert effect(a, a) == 0 == effect([np.array([math.nan])], [np.zeros(1)])
    assert effect([np.full(4, 2.0)], [np.zeros(4)]) == math.inf
    assert effect([np.full(4, -0.1)], [np.zeros(4)]) == -math.inf
    for unit in (1e-9, 1e9):  # d has no unit
        assert effect([unit * x for x in a], b) == pytest.approx(3)


# Shares


@given(st.integers(1, 500), st.floats(0, 1), st.sampled_from([1.0, 1.96, 2.576]))
def test_wilson_ends_at_the_shares_that_a_normal_test_just_accepts(n, share, z):
    """At either end p0 the share lies exactly z standard errors, those of p0, away."""
    found, low, high = wilson(share * n, n, z)
    assert 0 <= low <= found == pytest.approx(share) and found <= high <= 1
    for end in (low, high):
        if 1e-9 < end < 1 - 1e-9:
            assert (found - end) ** 2 == pytest.approx(
                z**2 * end * (1 - end) / n, rel=1e-9, abs=1e-12
            )


@given(st.integers(1, 500), st.data())
def test_wilson_holds_the_share_and_turns_around_with_it(n, data):
    right = data.draw(st.integers(0, n))
    share, low, high = wilson(right, n)
    assert 0 <= low <= share == right / n <= high <= 1 and low < high
    mirrored = wilson(n - right, n)
    assert np.allclose([1 - mirrored[2], 1 - mirrored[1]], [low, high])


def test_wilson_equals_statsmodels():
    proportion = pytest.importorskip(
        "statsmodels.stats.proportion", reason="statsmodels is in the extra dev"
    )
    for wins, n in ((0, 10), (3, 10), (60.5, 200), (10, 10)):
        assert wilson(wins, n, 1.959963984540054)[1:] == pytest.approx(
            proportion.proportion_confint(wins, n, method="wilson"), abs=1e-9
        )


def test_wilson_of_nothing_is_the_whole_range():
    share, low, high = wilson(0, 0)
    assert math.isnan(share) and (low, high) == (0.0, 1.0)


# Ranks


def test_average_ranks():
    assert average_ranks([5, 4, 5, math.nan, 4, 3]).tolist() == [1.5, 3.5, 1.5, 6, 3.5, 5]
    assert average_ranks([]).tolist() == []
    assert average_ranks([math.nan, math.nan]).tolist() == [1.5, 1.5]


@given(st.lists(st.tuples(st.integers(-3, 3), st.floats(-5, 5)), min_size=3, max_size=20))
def test_spearman_knows_order_only(points):
    """In [-1, 1], symmetric, and the same after any rising change of scale; -a turns its sign."""
    a, b = np.array(points).T
    rho = spearman(a, b)
    if rho is None:
        assert len(set(a)) == 1 or len(set(b)) == 1
        return
    assert -1 - 1e-9 <= rho <= 1 + 1e-9
    assert spearman(a, a) == pytest.approx(1)
    assert spearman(b, a) == pytest.approx(rho) and spearman(-a, b) == pytest.approx(-rho)
    assert spearman(np.exp(a), 3 * b) == pytest.approx(rho)


def test_spearman_by_hand():
    assert spearman(np.array([1.0, 1, 2, 2]), np.array([1.0, 2, 3, 4])) == pytest.approx(
        2 / math.sqrt(5)
    )
    assert spearman(np.arange(2.0), np.array([5.0, 4.0])) == pytest.approx(-1)
    for a, b in (([1.0], [2.0]), ([1.0, 2], [3.0, 3]), ([3.0, 3], [1.0, 2])):
        assert spearman(np.array(a), np.array(b)) is None


# Calibration


def test_calibration_is_small_exactly_where_confidence_is_right():
    rng = np.random.default_rng(0)
    margin = rng.normal(0, 2, 20_000)
    truth = rng.random(20_000) < 1 / (1 + np.exp(-np.abs(margin)))
    honest = np.where(truth, np.abs(margin), -np.abs(margin))
    assert calibration(honest) < 0.02
    assert calibration(honest * 5) > 0.1
    assert calibration(np.zeros(0)) is None


def test_calibration_by_hand():
    """|share right - mean confidence| in a bin, weighted over bins; a margin of 0 is half right."""
    log3 = math.log(3)  # confidence 3/4
    assert calibration(np.array([log3, log3, log3, -log3])) == pytest.approx(0, abs=1e-12)
    assert calibration(np.array([log3, -log3])) == pytest.approx(0.25)
    assert calibration(np.zeros(5)) == pytest.approx(0, abs=1e-12)
    # A bin of confidence 1/2 that is right, one of confidence 1 that is wrong: they do not cancel.
    two = np.array([1e-9, -100.0])
    assert calibration(two, bins=2) == pytest.approx((0.5 + 1) / 2)
    assert calibration(two, bins=1) == pytest.approx(0.75 - 0.5)


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_never_lowers_a_p_value_keeps_their_order_and_leaves_one_alone(p):
    adjusted = stats.holm(p)
    assert (adjusted >= np.array(p) - 1e-12).all() and (adjusted <= 1).all()
    order = np.argsort(p, kind="stable")
    assert (np.diff(adjusted[order]) >= 0).all()
    if p:
        assert adjusted.min() == pytest.approx(min(1.0, len(p) * min(p)))
        assert stats.holm([p[0], float("nan")])[0] == p[0]


def test_p_is_below_05_where_the_interval_leaves_0_out():
    rng = np.random.default_rng(0)
    seen = set()
    for shift in (0.0, 0.02, 0.05, 0.1, 0.3):
        for _ in range(5):
            x = rng.normal(shift, 1, 500)
            found = stats.paired(x, np.zeros(500), n_boot=999)
            outside = found["low"] > 0 or found["high"] < 0
            if not 0.04 < found["p"] < 0.06:  # one draw decides there
                assert (found["p"] < 0.05) == outside
            seen.add(outside)
            assert stats.interval([x], [np.zeros(500)], n_boot=999)[3] == found["p"]
            assert stats.paired(np.zeros(500), x, n_boot=999)["p"] == pytest.approx(found["p"])
    assert seen == {True, False}


def test_p_of_no_difference_is_1_and_of_the_clearest_2_of_all_draws():
    assert stats.paired(np.ones(9), np.ones(9))["p"] == 1.0
    assert stats.paired(np.ones(9), np.zeros(9), n_boot=99)["p"] == pytest.approx(2 / 100)
    assert stats.paired(np.array([np.nan]), np.array([1.0]))["p"] is None


def test_under_no_effect_p_is_below_05_one_time_in_twenty():
    rng = np.random.default_rng(1)
    low = [
        stats.paired(rng.normal(size=80), np.zeros(80), n_boot=200)["p"] < 0.05 for _ in range(300)
    ]
    assert 0.01 < np.mean(low) < 0.1
