"""Shoppers: what each habit does, samples against the closed form, the log, and what is learnt."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagellm.online import simulate
from pagellm.online.ope import pl_propensity
from pagellm.online.page_reward import PagePolicy, fit_reward, places, standard, teach
from pagellm.online.shopper import (
    Habits,
    Shoppers,
    expected,
    same_kind_above,
    shoppers_of,
    visit,
)
from pagellm.stage.config import PageLLMError

PLAIN = Habits(
    columns=2, glance=1.0, next_row=1.0, bored=0.0, satiation=0.0, substitutes=False, buy_price=0.0
)


def world(how: Habits, seed=0, users=2, items=8, satiation=None) -> Shoppers:
    rng = np.random.default_rng(seed)
    return Shoppers(
        rng.normal(size=(users, items)),
        rng.normal(size=(users, items)),
        np.array([0, 0, 1, 1, 2, -1, -1, 0]),
        1.0 + np.arange(items),
        np.full(users, how.satiation if satiation is None else satiation),
        how,
    )


@settings(deadline=None, max_examples=25)
@given(
    st.integers(0, 1000),
    st.integers(1, 3),
    st.sampled_from([0.0, 0.5]),
    st.booleans(),
    st.sampled_from([0.0, 1.5]),
)
def test_samples_agree_with_the_closed_form(seed, columns, bored, substitutes, satiation):
    how = Habits(columns, 0.8, 0.7, bored, satiation, 0.0, substitutes)
    shop, rng = world(how, seed), np.random.default_rng(seed)
    page = np.array([rng.permutation(8)[:5]])
    page[0, 4] = -1
    n = 20_000
    seen = visit(shop, np.zeros(n, np.int64), page.repeat(n, 0), rng)
    want = expected(shop, np.zeros(1, np.int64), page)
    for name, sample in (("clicks", seen.clicked), ("purchases", seen.bought)):
        total = sample.sum(1)
        error = 5 * total.std() / n**0.5 + 1e-9
        assert abs(total.mean() - want[name][0]) < error
    assert np.abs(seen.bought.mean(0) - want["sales"][0]).max() < 5 * 0.5 / n**0.5
    assert not seen.clicked[:, 4].any() and not (seen.bought & ~seen.clicked).any()
    assert want["gmv"][0] == pytest.approx((want["sales"][0] * shop.price[page[0]])[:4].sum())


def test_without_habits_a_page_is_the_sum_of_its_slots():
    shop = world(PLAIN)
    for page in itertools.permutations(range(8), 3):
        whole = expected(shop, np.zeros(1, int), np.array([page]))["purchases"][0]
        alone = sum(expected(shop, np.zeros(1, int), np.array([[i]]))["purchases"][0] for i in page)
        assert whole == pytest.approx(alone)


@pytest.mark.parametrize(
    "habit", [{"satiation": 2.0}, {"substitutes": True}, {"bored": 0.9}, {"next_row": 0.5}]
)
def test_every_habit_costs_purchases_where_it_bites(habit):
    plain, how = world(PLAIN), dataclasses.replace(PLAIN, **habit)
    page, user = np.array([[0, 1, 7, 2]]), np.zeros(1, int)  # three of one kind
    less = expected(world(how), user, page)["purchases"][0]
    assert less < expected(plain, user, page)["purchases"][0]
    mixed = np.array([[0, 2, 4, 5]])  # four kinds
    if set(habit) <= {"satiation", "substitutes"}:
        same = expected(world(how), user, mixed)["purchases"][0]
        assert same == pytest.approx(expected(plain, user, mixed)["purchases"][0])


def test_items_without_a_kind_are_no_substitutes():
    assert same_kind_above(np.array([[0, 5, 6, 1, 7, -1]]), world(PLAIN).leaf).tolist() == [
        [0, 0, 0, 1, 2, 0]
    ]


def test_shoppers_differ_in_satiation_and_mind_prices(shop):
    some = shoppers_of(shop, Habits(satiation=0.8, satiation_spread=0.5))
    assert some.satiation.std() > 0.1 and some.satiation.mean() == pytest.approx(0.8, abs=0.2)
    even = shoppers_of(shop, Habits(satiation=0.8, satiation_spread=0.0))
    assert (even.satiation == 0.8).all()
    free = shoppers_of(shop, Habits(buy_price=0.0))
    dear = np.log(some.price / np.median(some.price))
    assert np.allclose(free.buy - some.buy, 2.62 * dear)


@pytest.fixture(scope="module")
def logged(served, tmp_path_factory):
    root = tmp_path_factory.mktemp("pages")
    config = simulate.Config(
        data=str(served / "data"), runs=str(root), run="r", pages=3000, k=4, pool=10, columns=2
    )
    return config, simulate.run(config)


def test_a_log_has_exact_propensities_and_reads_back(logged, capsys):
    config, log = logged
    place = places(log.candidates, log.page)
    assert np.allclose(pl_propensity(log.score, place), log.propensity)
    again = simulate.run(config)
    assert "already done" in capsys.readouterr().out
    for name, column in vars(log).items():
        assert np.allclose(getattr(again, name), column), name
    assert not (log.bought & ~log.clicked).any() and log.clicked.any()
    assert len(set(log.page[0])) == 4 and set(log.page[0]) <= set(log.candidates[0])
    with pytest.raises(PageLLMError, match="pool"):
        simulate.Config(k=10, pool=5)


def test_the_page_reward_sees_what_stands_above_and_the_pointwise_one_does_not(logged, shop):
    config, log = logged
    z, item = standard(log.score[:50]), log.candidates[:50]
    whole = fit_reward(shop.catalogue, log, columns=2)
    alone = fit_reward(shop.catalogue, log, columns=2, above=False)
    place = places(item, log.page[:50])
    other = place.copy()
    other[:, [0, 1]] = other[:, [1, 0]]
    assert np.array_equal(alone.slots(z, item, place)[:, 2:], alone.slots(z, item, other)[:, 2:])
    moved = place.copy()
    moved[:, 0] = [next(c for c in range(10) if c not in row) for row in place]
    assert not np.allclose(whole.slots(z, item, place)[:, 1:], whole.slots(z, item, moved)[:, 1:])
    # Calibrated on what it was fitted to, and greedy pages are worth no less than those logged.
    zs, every = standard(log.score), log.candidates
    total = whole.value(zs, every, places(every, log.page)).mean()
    assert total == pytest.approx(log.bought.sum(1).mean(), rel=0.3)
    best = whole.maximise(z, item, 4)
    assert all(len(set(row)) == 4 for row in best.tolist())
    assert whole.value(z, item, best).mean() > whole.value(z, item, place).mean()


def test_rloo_begins_at_the_greedy_page_and_raises_the_reward_of_drawn_ones(logged, shop):
    config, log = logged
    reward = fit_reward(shop.catalogue, log, columns=2)
    z, item = standard(log.score[:40]), log.candidates[:40]
    start = PagePolicy(reward)
    assert np.array_equal(start.write(z, item, 4)[0], reward.maximise(z, item, 4))
    uniform = np.random.default_rng(0).random((40, 4))
    place, logp = start.write(z, item, 4, uniform)
    assert all(len(set(row)) == 4 for row in place.tolist()) and (logp <= 0).all()
    learnt = teach(reward, z, item, 4, steps=30, users=8, samples=4, lr=1e-2, temperature=1.0)
    before, after = (
        reward.value(z, item, p.write(z, item, 4, uniform)[0]).mean()
        for p in (PagePolicy(reward, 1.0), learnt)
    )
    assert after > before
