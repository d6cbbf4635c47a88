"""The ranker study: features from train rows only, candidates unseen, planted gains found."""

import dataclasses

import numpy as np
import pytest

from experiments import ranker
from pagellm.data.shop import SPLITS, load
from pagellm.stage.config import PageLLMError


@pytest.fixture(scope="module")
def shop(served):
    return load(served / "data" / "synthetic")


def config(served, **more):
    return ranker.Config(
        **{
            "run": "base",
            "data": str(served / "data"),
            "runs": str(served / "runs"),
            "device": "cpu",
            "candidates": 20,
            "k": 6,
            "seeds": 2,
            "trees": 5,
        }
        | more
    )


def test_plain_features_are_those_counted_by_hand(shop):
    users, item = np.array([3, 7]), np.array([[0, 5, 9], [4, 1, -1]])
    got = ranker.plain_features(shop, users, item)
    assert set(got) == set(ranker.PLAIN)
    c = shop.catalogue
    for row, user in enumerate(users):
        mine = shop.csr("train").of(user)[0].tolist()
        for column, i in enumerate(item[row].tolist()):
            if i < 0:
                assert all(np.isnan(x[row, column]) for x in got.values())
                continue
            train = shop.rows("train", None) & (shop.item == i)
            want = {
                "popularity": np.log1p(train.sum()),
                "price": c.price[i],
                "price - usual": c.price[i] - np.mean([c.price[j] for j in mine]),
                "category": np.mean([c.leaf[j] == c.leaf[i] for j in mine]),
                "department": np.mean([c.categories[j][0] == c.categories[i][0] for j in mine]),
                "brand": np.mean([c.brand[j] == c.brand[i] for j in mine]),
                "history": np.log1p(len(mine)),
            }
            for name, value in want.items():
                assert got[name][row, column] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_features_do_not_change_with_held_out_rows(shop):
    """Changing the item and rating of every held-out row changes no plain feature."""
    held = ~np.isin(shop.split, [SPLITS.index("train")])
    rng = np.random.default_rng(0)
    item, rating = shop.item.copy(), shop.rating.copy()
    item[held], rating[held] = rng.integers(shop.n_items, size=held.sum()), 1.0
    other = dataclasses.replace(shop, item=item, rating=rating)
    users, some = np.arange(20), rng.integers(shop.n_items, size=(20, 7))
    a, b = (ranker.plain_features(s, users, some) for s in (shop, other))
    assert all(np.array_equal(a[name], b[name], equal_nan=True) for name in a)


def test_a_ranker_finds_a_feature_that_says_it_all(shop, served):
    pytest.importorskip("lightgbm", reason="needs the extra [ranker]")
    rng = np.random.default_rng(0)
    U, M = 200, 20
    label = rng.random((U, M)) < 0.1
    found = ranker.Candidates(
        np.arange(U),
        np.tile(np.arange(M), (U, 1)),
        label,
        {"told": label + 0.3 * rng.random((U, M)), "noise": rng.random((U, M))},
    )
    hits = {}
    for names in (("noise",), ("noise", "told")):
        booster = ranker.learn(found, names, config(served, trees=60, candidates=20), 0)
        item = ranker.order(found, names, booster, 6).item[:, :3]
        hits[names] = np.take_along_axis(label, item, 1).mean()
        assert np.array_equal(np.sort(ranker.order(found, names, booster, 6).item, 1), found.item)
    same = ranker.dealt(found, 0)
    at = np.argsort(same.item, axis=1)
    assert not np.array_equal(same.item, found.item) and np.array_equal(
        np.take_along_axis(same.label, at, 1), label
    )
    assert np.array_equal(np.take_along_axis(same.features["told"], at, 1), found.features["told"])
    assert hits["noise", "told"] > 2 * hits["noise",]
    nothing = dataclasses.replace(found, label=np.zeros_like(label))
    with pytest.raises(PageLLMError, match="found no held-out item"):
        ranker.learn(nothing, ("noise",), config(served), 0)


def test_the_study_runs_keeps_and_says_what_is_missing(served, capsys, monkeypatch):
    pytest.importorskip("lightgbm", reason="needs the extra [ranker]")
    records = ranker.run(config(served))
    assert {r["variant"] for r in records} == {"EASE", *ranker.ROWS} and {
        r["seeds"] for r in records
    } == {2}
    said = capsys.readouterr().out
    assert (
        "marginal beside EASE's score, to plain + first" in said
        and "share of the trees' gain" in said
    )
    ranker.run(config(served))
    assert "already done" in capsys.readouterr().out
    with np.load(served / "runs" / "base" / "ranker" / "test.npz") as kept:
        shop = load(served / "data" / "synthetic")
        held = shop.csr("test")
        for row, user in enumerate(kept["user"].tolist()):
            item = kept["item"][row]
            assert np.array_equal(kept["label"][row], np.isin(item, held.of(user)[0]) & (item >= 0))
            assert not set(item.tolist()) & set(
                shop.csr(("train", "valid"), None).of(user)[0].tolist()
            )
    with pytest.raises(PageLLMError, match="make ppo"):
        ranker.run(config(served, run="nobody"))


def test_without_lightgbm_it_says_how_to_get_it(served, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "lightgbm", None)
    with pytest.raises(PageLLMError, match=r"pagellm\[ranker\]"):
        ranker.run(config(served))
