"""Scores, slots with their propensities, and the choice of themes."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagellm.storefront.fuse import Quota, SameLeaf, assign, fill, fuse, row_value, z_score
from pagellm.storefront.parts import Candidates, Weights
from pagellm.storefront.rankers import Platt
from tests.storefront.golden import catalogue

# g02 g06 g08 g09 by number, g05 being placed above.
ITEM = np.array([1, 5, 7, 8])
LOGIT = np.array([-2.6111, -2.5, -2.0291, -2.3889])
RET = np.array([0.016393, 0.011949, 0.015594, 0.014833])
AGREE = np.array([0.92, 0.70, 0.95, 0.90])
ROW = Candidates(ITEM, RET, AGREE, np.array([0, 3, 1, 2]))
NONE = np.zeros(12, bool)


def alike():
    shop = catalogue()
    parent = np.unique([path[0] for path in shop.categories], return_inverse=True)[1]
    return SameLeaf(shop.leaf_id, parent)


def test_z_scores_of_the_golden_row():
    assert z_score(RET) == pytest.approx([1.0141, -1.6357, 0.5375, 0.0841], abs=2e-4)
    assert z_score(AGREE) == pytest.approx([0.5339, -1.7035, 0.8390, 0.3305], abs=2e-4)
    assert z_score(np.full(3, 0.7)).tolist() == [0, 0, 0]
    assert z_score(np.zeros(0)).tolist() == []


def test_fused_scores_of_the_golden_row():
    score = fuse(LOGIT, RET, AGREE, Weights())
    assert score == pytest.approx([-1.9706, -3.7437, -1.5506, -2.2642], abs=3e-4)


@pytest.mark.parametrize(
    "mu, chance, last",
    [(0.5, (0.4428, 0.5471, 0.7949), -2.3892), (0.0, (0.4428, 0.5221, 0.8145), -2.2642)],
)
def test_propensities_of_the_golden_row(mu, chance, last):
    """tau = 1; the draws lead to g08, g02, g09.

    With mu = .5 the cereal pays for the granola above.
    """
    score = fuse(LOGIT, RET, AGREE, Weights())
    quota = Quota(alike(), mu)
    row = fill(score, ROW, 3, quota, NONE, 1.0, np.array([0.6, 0.0, 0.9]))
    assert row.item.tolist() == [7, 1, 8]
    assert row.score[-1] == pytest.approx(last, abs=3e-4)
    assert row.propensity == pytest.approx(chance, abs=1e-4)


def test_row_values_of_the_golden_page():
    p = Platt()
    first = row_value(p(np.array([-0.2082, -0.7239, -0.7248])), 1)
    second = row_value(p(np.array([-2.0291, -2.6111, -2.3889])), 2)
    assert first == pytest.approx(0.9615, abs=1e-4) and second == pytest.approx(0.1763, abs=1e-4)


scores = st.lists(st.floats(-5, 5), min_size=1, max_size=6)


@st.composite
def rows(draw):
    score = np.array(draw(scores))
    n = len(score)
    item = np.array(draw(st.permutations(range(12))))[:n]
    taken = np.array(draw(st.lists(st.booleans(), min_size=12, max_size=12)))
    return score, Candidates(item, np.zeros(n), np.zeros(n), np.full(n, -1)), taken


@given(rows(), st.integers(1, 6))
def test_without_weights_a_row_is_the_ranker_s_order_bit_for_bit(row, slots):
    score, candidates, taken = row
    same = fuse(score, np.arange(len(score)), np.arange(len(score)), Weights(0, 0, 0, 0))
    assert same.tobytes() == score.tobytes()
    filled = fill(same, candidates, slots, Quota(alike(), 0.0), taken, 0.0, np.zeros(0))
    legal = [(-s, i) for s, i in zip(score, candidates.item, strict=True) if not taken[i]]
    assert filled.item.tolist() == [i for _, i in sorted(legal)[:slots]]
    assert [-s for s, _ in sorted(legal)[:slots]] == filled.score.tolist()
    assert (filled.propensity == 1).all() and (filled.redundancy == 0).all()


@settings(deadline=None)
@given(rows(), st.integers(1, 3), st.sampled_from([0.3, 1.0, 5.0]), st.sampled_from([0.0, 0.5]))
def test_propensities_of_a_slot_sum_to_one_over_what_is_legal(row, slots, tau, mu):
    """Walk a fine grid of draws for the last slot: each item's share of it is its propensity."""
    score, candidates, taken = row
    above = np.full(slots, 0.4)
    grid = (np.arange(400) + 0.5) / 400
    chance, share = {}, {}
    for draw in grid:
        above[-1] = draw
        filled = fill(score, candidates, slots, Quota(alike(), mu), taken, tau, above)
        if len(filled.item) < slots:
            return
        one = int(filled.item[-1])
        chance[one] = filled.propensity[-1]
        share[one] = share.get(one, 0) + 1 / 400
    assert all(abs(chance[one] - share[one]) < 0.01 for one in chance)
    legal = int((~taken[candidates.item]).sum()) - slots + 1
    if len(chance) == legal:
        assert sum(chance.values()) == pytest.approx(1.0)


@given(rows(), st.integers(0, 5), st.floats(0.01, 3))
def test_a_higher_logit_never_lowers_an_item_s_rank(row, which, more):
    score, candidates, taken = row
    which %= len(score)
    item = candidates.item[which]
    raised = score.copy()
    raised[which] += more
    place = [
        fill(s, candidates, 6, Quota(alike(), 0.0), taken, 0.0, np.zeros(0)).item.tolist()
        for s in (score, raised)
    ]
    if not taken[item]:
        assert place[1].index(item) <= place[0].index(item)


def test_caps_and_sponsored_places_are_kept():
    item = np.arange(6)
    candidates = Candidates(item, np.zeros(6), np.zeros(6), np.full(6, -1))
    sponsored = np.isin(np.arange(12), [0, 1, 2])
    quota = Quota(groups=[sponsored], left=[1])
    best = fill(-item.astype(float), candidates, 4, quota, NONE, 0.0, np.zeros(0))
    assert best.item.tolist() == [0, 3, 4, 5]
    low, even = np.arange(12) < 3, np.arange(12) % 2 == 0
    quota = Quota(groups=[low, even], left=[2, 1])  # item 0 is of both groups
    best = fill(-item.astype(float), candidates, 4, quota, NONE, 0.0, np.zeros(0))
    assert best.item.tolist() == [0, 1, 3, 5]
    none_left = Quota(groups=[even], left=[0])
    best = fill(-item.astype(float), candidates, 4, none_left, NONE, 0.0, np.zeros(0))
    assert best.item.tolist() == [1, 3, 5]


def test_wrong_shapes_are_refused_with_both():
    with pytest.raises(ValueError, match=r"shapes \(2,\), \(3,\), \(3,\)"):
        fuse(np.zeros(2), np.zeros(3), np.zeros(3), Weights())
    with pytest.raises(ValueError, match="one draw a slot"):
        fill(np.zeros(4), ROW, 3, Quota(), NONE, 1.0, np.zeros(2))


TABLE = np.array([[10, 9.5, 0], [9, 2, 1], [5, 4.5, 4], [8, 7.9, 0.5]])


@pytest.mark.parametrize(
    "pairs, themes, worth",
    [
        ((), [1, 0, 2], 22.5),
        (((0, 1), (0, 3)), [1, 3, 2], 20.9),
        (((0, 1), (0, 3), (1, 3)), [0, 2, -1], 14.5),
    ],
)
def test_assignments_worked_out_by_hand(pairs, themes, worth):
    conflict = np.zeros((4, 4), bool)
    for a, b in pairs:
        conflict[a, b] = conflict[b, a] = True
    found, proven = assign(TABLE, conflict)
    assert proven and found.tolist() == themes
    assert sum(TABLE[g, s] for s, g in enumerate(themes) if g >= 0) == pytest.approx(worth)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**31), st.floats(0, 0.6))
def test_the_assignment_is_the_best_of_all(n_themes, n_positions, seed, often):
    rng = np.random.default_rng(seed)
    value = np.where(
        rng.random((n_themes, n_positions)) < 0.2, -np.inf, rng.random((n_themes, n_positions))
    )
    conflict = np.triu(rng.random((n_themes, n_themes)) < often, 1)
    conflict |= conflict.T
    best = 0.0
    for choice in itertools.product(range(-1, n_themes), repeat=n_positions):
        used = [g for g in choice if g >= 0]
        if len(set(used)) == len(used) and not conflict[np.ix_(used, used)].any():
            best = max(best, sum(value[g, s] for s, g in enumerate(choice) if g >= 0))
    found, proven = assign(value, conflict)
    assert proven
    used = [g for g in found.tolist() if g >= 0]
    assert len(set(used)) == len(used) and not conflict[np.ix_(used, used)].any()
    assert sum(value[g, s] for s, g in enumerate(found) if g >= 0) == pytest.approx(best)
