"""What PPO is paid: the value of an item, discounted by its slot, less what it repeats."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pagellm.model.outcome_reward import OutcomeReward, repeated, similarities
from pagellm.pages.compose import Opinion
from pagellm.pages.rerank import Kin


@pytest.fixture(scope="module")
def kin(shop):
    return Kin.of(shop.catalogue)


def reward_of(kin, seed=0, users=3, pool=8, worth=0.0, spread=0.0, k=4) -> OutcomeReward:
    """Users 0, 2, 4, ... with a random pool each; the last candidate of the first is missing."""
    rng = np.random.default_rng(seed)
    item = np.stack([rng.permutation(30)[:pool] for _ in range(users)])
    item[0, -1] = -1
    chance, stars = rng.random((users, pool)), rng.normal(size=(users, pool))
    opinion = Opinion(2 * np.arange(users), item, chance, stars, 0.1 * stars)
    return OutcomeReward.from_opinion(opinion, kin, worth, spread, k)


def paid(reward, user, page):
    item = torch.tensor([page])
    return reward(np.array([user]), item, item >= 0)[0]


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1000), st.sampled_from([0.0, 0.7]), st.sampled_from([0.0, 0.5]))
def test_a_slot_earns_its_value_less_what_it_repeats(kin, seed, worth, spread):
    reward = reward_of(kin, seed, worth=worth, spread=spread)
    page = [*reward.item[1, :3].tolist(), -1]
    got = paid(reward, 2, page)
    for k, i in enumerate(page[:3]):
        above = [float(kin.similarity(np.array([[i]]), np.array([j]))[0, 0]) for j in page[:k]]
        want = (reward.value[1, k] - reward.spread * max(above, default=0.0)) / reward.unit
        assert got[k].item() == pytest.approx(want / np.log2(k + 2), rel=1e-5, abs=1e-6)
    assert got[3] == 0
    assert repeated(np.array([page]), kin)[0, 3] == 0
    table = similarities(kin, len(kin.leaf))
    assert np.allclose(repeated(np.array([page]), kin, table), repeated(np.array([page]), kin))


def test_worth_multiplies_chances(kin):
    plain, worth = reward_of(kin), reward_of(kin, worth=0.5)
    assert not np.allclose(plain.value, worth.value)
    assert (worth.value[0, -1], plain.value[0, -1]) == (0.0, 0.0)


def test_an_item_outside_the_pool_is_worth_the_least_of_it(kin):
    reward = reward_of(kin)
    for row, user in enumerate(reward.user):
        outside = sorted(set(range(60)) - set(reward.item[row].tolist()))[0]
        there = reward.value[row][reward.item[row] >= 0]
        assert paid(reward, user, [outside])[0].item() == pytest.approx(
            there.min() / reward.unit, rel=1e-5
        )


def test_nobody_is_judged_unasked(kin):
    reward = reward_of(kin)
    for user in (1, 99):
        with pytest.raises(ValueError, match="not judged"):
            paid(reward, user, [1])
    with pytest.raises(ValueError, match="rising"):
        OutcomeReward(np.array([1, 0]), reward.item[:2], reward.value[:2], kin, 0.0, 1.0)


def test_without_spread_the_maximised_page_is_the_best_of_all_pages(kin):
    reward = reward_of(kin, pool=6)
    page = reward.maximise(np.array([2]), 3)[0]
    total = {
        p: paid(reward, 2, list(p)).sum().item()
        for p in itertools.permutations(reward.item[1].tolist(), 3)
    }
    assert total[tuple(page.tolist())] == pytest.approx(max(total.values()))


def test_each_slot_of_the_maximised_page_gains_most_given_those_above(kin):
    reward = reward_of(kin, spread=2.0)
    page = reward.maximise(np.array([0, 2]), 4)
    for row, user in enumerate((0, 2)):
        for k in range(4):
            above = page[row, :k].tolist()
            rest = [i for i in reward.item[row].tolist() if i >= 0 and i not in above]
            gain = {i: paid(reward, user, [*above, i])[k].item() for i in rest}
            assert gain[page[row, k]] == pytest.approx(max(gain.values()))
    assert (reward.maximise(np.array([0]), 9)[0, 7:] == -1).all()  # 7 candidates, 9 slots
