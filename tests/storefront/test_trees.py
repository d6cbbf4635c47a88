"""LightGBM as the ranker of rows: it learns from train orders alone, and ranks item by item."""

import shutil
from dataclasses import replace

import numpy as np
import pytest

from pagellm.stage.config import PageLLMError
from pagellm.storefront import trees
from pagellm.storefront.front import Sources, open_store
from pagellm.storefront.page import page
from pagellm.storefront.rankers import Factors, Popularity
from pagellm.storefront.trees import NAMES, Config, Features, examples
from tests.storefront.golden import HOUSEHOLDS, catalogue
from tests.storefront.test_retrieve import cold, u1

pytest.importorskip("lightgbm", reason="needs the extra: pip install 'pagellm[ranker]'")


@pytest.fixture(scope="module")
def fitted(made, tmp_path_factory):
    root = tmp_path_factory.mktemp("trees")
    shutil.copytree(f"{made['runs']}/synthetic", root / "synthetic")
    options = made | {"runs": str(root)}
    done = trees.run(Config(people=60, trees=40, **options))
    assert done["bought"] > 50 and sum(done["gain"].values()) == pytest.approx(1.0, abs=0.01)
    return options


def test_features_of_the_golden_shop():
    shop = catalogue()
    seen = Features(Factors.of(np.eye(12)), HOUSEHOLDS, shop.leaf_id, shop.brand_id)
    table = dict(zip(NAMES, seen.of(u1())(np.array([0, 4, 5, 2])).T, strict=True))
    # g01 in 5 orders, g05 in 4, g06 (coffee, as g05) and g03 in none
    assert table["habit"] == pytest.approx([np.log(6), np.log(5), 0, 0])
    assert table["leaf"] == pytest.approx([np.log(6), np.log(5), np.log(5), 0])
    assert table["popularity"] == pytest.approx(np.log1p(HOUSEHOLDS[[0, 4, 5, 2]]))
    place = {item: at for at, item in enumerate(u1().item.tolist())}
    assert table["newest"] == pytest.approx([1 / (1 + place[0]), 1 / (1 + place[4]), 0, 0])
    assert table["history"] == pytest.approx([np.log1p(len(u1().item))] * 4)
    assert not table["brand"].any()
    stranger = seen.of(cold())(np.arange(12))
    assert not stranger[:, [0, 1, 2, 4, 6]].any() and stranger[:, 3].all()


def test_a_page_is_ranked_by_it_and_items_alone_as_in_the_whole(fitted):
    store = open_store(Sources(ranker="lightgbm", **fitted))
    ranker = store.front.ranker
    assert ranker.name.startswith("lightgbm/")
    for user in (*store.shop.user_ids[:5], None):
        context = store.known.context(user)
        whole = ranker(context)
        some = np.array([7, 3, 50, 3])
        assert whole.shape == (store.shop.n_items,) and np.isfinite(whole).all()
        assert (ranker.of(context)(some) == whole[some]).all()
        assert ranker.of(context)(some[:0]).shape == (0,)
    found = page(store.front, store.known.context(store.shop.user_ids[0]), store.layout)
    assert len(found.items()) >= 40
    static = replace(store.front, static=True)
    row = page(static, store.known.context(store.shop.user_ids[1]), store.layout).rows[0]
    assert (np.diff(row.score) <= 0).all()


def test_it_foresees_more_than_popularity_does(fitted):
    """Recall of the best 20 on the validation rows, over everybody who has some."""
    store = open_store(Sources(ranker="lightgbm", **fitted))
    labels = store.orders.only("valid").history()[0]
    popular, found = Popularity(store.front.households), {"trees": [], "popular": []}
    for user in np.flatnonzero(labels.counts()).tolist():
        context = store.known.context(store.shop.user_ids[user])
        for name, ranker in (("trees", store.front.ranker), ("popular", popular)):
            logit = ranker(context).copy()
            logit[context.item] = -np.inf
            best = np.argsort(-logit, kind="stable")[:20]
            found[name].append(np.isin(labels.of(user)[0], best).mean())
    assert np.mean(found["trees"]) > np.mean(found["popular"])


def test_damaged_trees_are_named(fitted, tmp_path):
    shutil.copytree(f"{fitted['runs']}/synthetic", tmp_path / "synthetic")
    for text in ("", "tree\nversion=v4\nnum_class=1"):
        (tmp_path / "synthetic" / "storefront" / "trees" / "model.txt").write_text(text)
        with pytest.raises(PageLLMError, match="damaged"):
            open_store(Sources(ranker="lightgbm", **fitted | {"runs": str(tmp_path)}))


def test_held_out_rows_move_nothing(made):
    store = open_store(Sources(**made))
    whole = examples(store.shop, store.orders.only("train"), 20, 0)
    keep = store.shop.rows("train", None)
    names = ("user", "item", "rating", "time", "positive", "split")
    less = replace(store.shop, **{name: getattr(store.shop, name)[keep] for name in names})
    for a, b in zip(whole, examples(less, store.orders.only("train"), 20, 0), strict=True):
        assert a.tobytes() == b.tobytes()


def test_what_is_missing_is_said(made, monkeypatch):
    with pytest.raises(PageLLMError, match="storefront-trees"):
        open_store(Sources(ranker="lightgbm", **made))
    orders = open_store(Sources(**made)).orders.only("train")
    never = orders.where(np.zeros(len(orders.time), dtype=bool))
    with pytest.raises(PageLLMError, match="nothing is to be foreseen"):
        examples(open_store(Sources(**made)).shop, never, 5, 0)
    monkeypatch.setattr(trees, "installed", lambda: False)
    with pytest.raises(PageLLMError, match="LightGBM is not installed"):
        trees.run(Config(**made))
