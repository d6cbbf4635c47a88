"""The outcome model: folds, the pool of candidates, features that know no answer, a network that
learns, calibration.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pagellm.data import prepare
from pagellm.data.shop import load
from pagellm.model.als import item_groups
from pagellm.model.judges import History, Judges, by_turns, contents, legal_items, tuned
from pagellm.model.outcome import Calibration, Network, Outcome, fit_network, hide, learn
from pagellm.model.plain import Chosen, fit
from pagellm.pages import stats
from pagellm.stage import randomness

STEADY = settings(deadline=None, max_examples=40)


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    data = tmp_path_factory.mktemp("outcome") / "data"
    prepare.run(prepare.Config(data=str(data), users=80, items=60))
    return load(data / "synthetic")


@pytest.fixture(scope="module")
def judges(shop):
    return Judges.fit(shop.catalogue, History.of(shop, shop.rows("train", None)))


def asked(judges, users, seen, depth, more=None):
    """Candidates and features of users whom the judges were fitted to."""
    legal = legal_items(seen, users, len(judges.catalogue))
    return judges.candidates(judges.known.select(users), legal, depth, more)


@pytest.mark.parametrize("folds, share", [(1, 0.2), (3, 0.2), (4, 0.25)])
def test_folds_hide_train_rows_of_everybody_and_none_twice(shop, folds, share):
    hidden = hide(shop, folds, share, seed=0)
    assert len(hidden) == folds and max(sum(h.astype(int) for h in hidden)) <= 1
    count = np.bincount(shop.user[shop.rows("train", None)], minlength=shop.n_users)
    for h in hidden:
        assert not (h & ~shop.rows("train", None)).any()
        assert (
            np.abs(np.bincount(shop.user[h], minlength=shop.n_users) - share * count) <= 1
        ).all()
    with pytest.raises(ValueError, match="no more than all"):
        hide(shop, 3, 0.5, seed=0)


@STEADY
@given(st.integers(0, 10_000), st.integers(1, 9))
def test_the_pool_takes_from_its_lists_by_turns_and_nothing_twice(seed, depth):
    rng = np.random.default_rng(seed)
    lists = [np.stack([rng.permutation(8)[:w] for _ in range(3)]) for w in (5, 3)]
    lists[0][0, 3:] = -1
    for row, found in enumerate(by_turns(lists, depth)):
        line = []
        for turn in range(5):
            for one in lists:
                if turn < one.shape[1] and one[row, turn] >= 0 and one[row, turn] not in line:
                    line.append(int(one[row, turn]))
        line = line[:depth]
        assert found[found >= 0].tolist() == line and (found[len(line) :] == -1).all()


def test_candidates_are_different_and_unseen(shop, judges):
    seen, users = shop.csr(("train", "valid"), positive=None), np.arange(10)
    item, x = asked(judges, users, seen, 40)
    assert x.shape[:2] == item.shape == (10, 40) and np.isfinite(x).all() and x.dtype == np.float32
    for u, mine in zip(users, item, strict=True):
        mine = mine[mine >= 0]
        assert len(set(mine)) == len(mine) and not set(mine) & set(seen.of(u)[0])
    first = item[:, ::-1][:, :5]
    again, _ = asked(judges, users, seen, 40, first)
    assert (np.isin(first, again) | (first < 0)).all()  # another ranker's best are in the pool


def test_a_users_features_do_not_depend_on_who_else_is_asked_about(shop, judges):
    seen = shop.csr("train", positive=None)
    item, x = asked(judges, np.array([3, 5, 9]), seen, 20)
    alone, y = asked(judges, np.array([5]), seen, 20)
    assert (item[1] == alone[0]).all()
    assert (x[1] == y[0]).all()


def test_features_do_not_know_a_hidden_row(shop):
    """Whatever a hidden row says (item, rating, time), candidates and features are the same."""
    train = shop.rows("train", None)
    hidden = hide(shop, 1, 0.2, seed=0)[0]
    rng = np.random.default_rng(0)
    lie = replace(
        shop,
        item=np.where(hidden, rng.integers(shop.n_items, size=len(shop.item)), shop.item),
        rating=np.where(hidden, 1.0, shop.rating).astype(np.float32),
        positive=np.where(hidden, ~shop.positive, shop.positive),
        time=np.where(hidden, 0, shop.time),
    )
    users, found = np.arange(20), []
    for one in (shop, lie):
        history = History.of(one, train & ~hidden)
        found.append(asked(Judges.fit(one.catalogue, history), users, history.rows, 30))
    assert (found[0][0] == found[1][0]).all() and (found[0][1] == found[1][1]).all()


def test_a_shop_without_ratings_texts_prices_times_has_features_too(shop):
    n = shop.n_items
    bare = type(shop.catalogue).of(
        shop.catalogue.ids, [""] * n, [""] * n, [()] * n, [""] * n, [""] * n, [np.nan] * n
    )
    poor = replace(
        shop,
        catalogue=bare,
        rating=np.full(len(shop.rating), np.nan, np.float32),
        positive=np.ones(len(shop.item), bool),
        time=np.zeros(len(shop.item), np.int64),
    )
    judges = Judges.fit(bare, History.of(poor, poor.rows("train", None)))
    item, x = asked(judges, np.arange(5), poor.csr("train"), 10)
    assert (item >= 0).all() and np.isfinite(x).all()
    assert contents(bare).shape == (n, 1)


def test_the_network_finds_what_decides_and_is_the_same_for_the_same_seed():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4000, 5)).astype(np.float32)
    p = 1 / (1 + np.exp(-(2 * x[:, 1] + np.abs(x[:, 2]) * 2 - 3)))  # a line and a bend
    picked = rng.random(len(x)) < p
    found = Outcome([fit_network(x, picked, seed=1, epochs=20, batch=256)])(x)
    assert np.corrcoef(found, p)[0, 1] > 0.97
    again = Outcome([fit_network(x, picked, seed=1, epochs=20, batch=256)])(x)
    assert (found == again).all()


def test_the_network_has_the_weights_of_torchs_adamw_to_the_last_bit():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1100, 7)).astype(np.float32)
    picked = rng.random(len(x)) < 0.2
    ours = fit_network(x, picked, seed=1, epochs=2, batch=128)
    z, y = torch.from_numpy(x), torch.from_numpy(picked.astype(np.float32))
    torch.manual_seed(int(randomness.rng(1, "outcome", "network").integers(2**31)))
    theirs, rate = Network(z.mean(0), z.std(0) + 1e-6), float(y.mean())
    torch.nn.init.constant_(theirs.line.bias, float(np.log(rate / (1 - rate))))
    opt = torch.optim.AdamW(theirs.parameters(), lr=3e-3, weight_decay=0.01)
    orders = [torch.randperm(len(y))[: len(y) // 128 * 128].split(128) for _ in range(2)]
    for step, at in enumerate(part for order in orders for part in order):
        opt.param_groups[0]["lr"] = 3e-3 * min(1.0, (step + 1) / 50) * (1 - step / 16)
        opt.zero_grad()
        F.binary_cross_entropy_with_logits(theirs(z[at]), y[at]).backward()
        opt.step()
    for name, weight in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], weight), name
        assert ours.state_dict()[name].untyped_storage().nbytes() == weight.nbytes


@pytest.mark.parametrize("name", ["EASE", "ALS+facts", "ALS+ratings"])
def test_a_judge_of_a_plain_models_settings_is_that_model(shop, name):
    """So `compose` need not fit it again: equal scores to the last bit."""
    small = {"factors": 8, "alpha0": 0.1, "reg": 0.03, "nu": 1.0}
    found = {
        "EASE": {"ridge": 50.0},
        "ALS+facts": small,
        "ALS+ratings": small | {"disliked": 0.35, "slope": 0.15, "facts": 0.5, "stars": 0.1},
    }
    history = History.of(shop, shop.rows("train", None))
    judges = Judges.fit(shop.catalogue, history, tuned(found, shop))
    model = fit(
        name,
        shop.csr("train"),
        shop.n_users,
        shop.n_items,
        found[name],
        groups=item_groups(shop.catalogue),
        chosen=Chosen.of(shop),
    )
    mine, every = judges.plain(name, found[name]), np.arange(shop.n_users)
    assert torch.equal(mine.score(every), model.score(every))
    assert mine.learned.keys() == model.learned.keys()
    changed = {key: value * 2 for key, value in found[name].items()}
    assert judges.plain(name, changed) is None and judges.plain("ALS", small) is None


def test_learnt_chances_rank_hidden_rows_above_chance(shop):
    outcome = learn(shop, folds=2, depth=40, networks=1)
    judges, seen = (
        Judges.fit(shop.catalogue, History.of(shop, shop.rows("train", None))),
        shop.csr("train", positive=None),
    )
    users = np.flatnonzero(shop.csr("valid").counts() > 0)
    item, x = asked(judges, users, seen, 40)
    held = shop.csr("valid")
    picked = np.isin(
        users[:, None] * shop.n_items + item,
        np.repeat(np.arange(shop.n_users), held.counts()) * shop.n_items + held.items,
    )
    p = outcome(x)
    assert p[picked].mean() > 1.1 * p[~picked].mean()


@STEADY
@given(st.integers(0, 10_000))
def test_calibrated_chances_add_up_to_what_was_picked(seed):
    """The constant is free, so the sum of chances on the rows it was fitted to is the number of
    picks.
    """
    rng = np.random.default_rng(seed)
    p, others = rng.random(500) * 0.3 + 0.01, rng.standard_normal((500, int(rng.integers(3))))
    picked = rng.random(500) < p * 0.5
    scale = Calibration.fit(p, others, picked)
    assert abs(scale(p, others).sum() - picked.sum()) < 1e-3


def test_calibration_finds_the_weights_of_further_opinions():
    rng = np.random.default_rng(0)
    p, others = rng.random(50_000) * 0.5 + 0.05, rng.standard_normal((50_000, 2))
    truth = Calibration(-0.5, 0.8, (0.6, -0.3))
    found = Calibration.fit(p, others, rng.random(50_000) < truth(p, others))
    np.testing.assert_allclose([found.a, found.b, *found.c], [-0.5, 0.8, 0.6, -0.3], atol=0.06)


def test_calibration_of_chances_that_know_nothing_is_the_rate():
    """Newton's whole steps overshoot here: chances of one half on average, picks at one fifth."""
    rng = np.random.default_rng(0)
    picked = rng.random(1600) < 0.2
    p = rng.random(1600)
    none = np.zeros((1600, 0))
    scale = Calibration.fit(p, none, picked)
    assert abs(scale.a) < 10 and abs(scale(p, none).mean() - picked.mean()) < 0.01


def bent_chances(n: int, seed: int):
    """Predicted chances, none of another opinion, and picks: rare ones are twice as frequent."""
    rng = np.random.default_rng(seed)
    z = rng.normal(-3.0, 1.2, n)
    true = -0.2 + z - 0.6 * np.minimum(z + 3.0, 0.0)
    return 1 / (1 + np.exp(-z)), np.zeros((n, 0)), rng.random(n) < 1 / (1 + np.exp(-true))


def test_calibration_bends_where_rare_picks_are_more_frequent_than_a_line_says():
    scale = Calibration.fit(*bent_chances(200_000, 0))
    p, others, picked = bent_chances(200_000, 1)
    there = np.ones(len(p), bool)
    bins = stats.reliability(scale(p, others), picked, there)
    assert 0.85 < min(bins) and max(bins) < 1.18
    straight = Calibration(scale.a, scale.b, scale.c)
    assert max(stats.reliability(straight(p, others), picked, there)) > 1.25


def test_calibration_keeps_the_order_of_its_sum_also_where_low_chances_are_picked_most():
    """The lowest third is picked the more often the lower it is: a slope of its own would fall."""
    rng = np.random.default_rng(0)
    z = rng.normal(0.0, 1.5, 20_000)
    true = z + 3.0 * np.maximum(-0.5 - z, 0.0)
    p, others = 1 / (1 + np.exp(-z)), np.zeros((len(z), 0))
    scale = Calibration.fit(p, others, rng.random(len(z)) < 1 / (1 + np.exp(-true)))
    order = np.argsort(scale.sum(p, others))
    assert (np.diff(scale(p, others)[order]) >= 0).all()
