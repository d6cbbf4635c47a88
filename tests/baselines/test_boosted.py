"""The LightGBM row: it learns from hidden train rows alone, and is there where LightGBM is."""

import json

import numpy as np
import pytest

from pagellm.baselines import boosted, compare
from pagellm.baselines.boosted import Boosted
from pagellm.data import prepare
from pagellm.data.shop import load
from pagellm.pages.ranked import Scorer, check_pages, popularity_pages, seen_rows
from pagellm.stage.config import PageLLMError

PLAIN = {"ALS+facts": {"factors": 8, "alpha0": 0.1, "reg": 0.03, "nu": 1.0}}


@pytest.fixture(autouse=True)
def few_trees(monkeypatch):
    monkeypatch.setattr(boosted, "TREES", (10, 25))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("boosted")
    prepare.run(prepare.Config(data=str(root / "data"), users=160, items=80))
    return root


def config(root, **more):
    where = {"data": str(root / "data"), "runs": str(root / "runs"), "n_boot": 20, "rerank": ""}
    (root / "settings.json").write_text(
        json.dumps({"popularity": {"settings": {}}, "ALS": {"settings": PLAIN["ALS+facts"]}})
    )
    models = {"models": "popularity,ALS,ALS+facts", "versus": "ALS"}
    return compare.Config(**where | models | {"settings": str(root / "settings.json")} | more)


def test_the_trees_rank_unseen_items_and_know_more_than_popularity(root):
    pytest.importorskip("lightgbm", reason="needs the extra [ranker]")
    shop = load(root / "data/synthetic")
    ranker = Boosted.fit(shop, PLAIN, seed=0)
    assert ranker.number in boosted.TREES
    scorer, seen = Scorer(shop, "test"), seen_rows(shop, "test", "train+valid")
    pages = ranker.rank(scorer.users, seen, 6, 40)
    check_pages("LightGBM", pages, scorer.users, seen)
    assert pages.item.shape == (len(scorer.users), 40) and (pages.slots == 6).all()
    assert (pages.score[:, 1:] <= pages.score[:, :-1]).all()
    plain = popularity_pages(shop, scorer.users, seen, 6, 40)
    ours, theirs = (np.nanmean(scorer(p, 6)["NDCG@100"]) for p in (pages, plain))
    assert ours > 1.2 * theirs
    again = Boosted.fit(shop, PLAIN, seed=0).rank(scorer.users, seen, 6, 40)
    assert (again.item == pages.item).all() and (again.score == pages.score).all()


def test_held_out_rows_do_not_reach_the_trees(root):
    """Test items exchanged among the users: the pages stay as they are."""
    pytest.importorskip("lightgbm", reason="needs the extra [ranker]")
    shops = [load(root / "data/synthetic") for _ in range(2)]
    test = np.flatnonzero(shops[1].rows("test", None))
    shops[1].item[test] = shops[1].item[np.roll(test, 1)]
    users, seen = np.arange(40), shops[0].csr("train", positive=None)
    pages = [Boosted.fit(shop, PLAIN, seed=0).rank(users, seen, 6, 20) for shop in shops]
    assert (pages[0].item == pages[1].item).all() and (pages[0].score == pages[1].score).all()


def test_the_row_is_there_where_lightgbm_is(root):
    pytest.importorskip("lightgbm", reason="needs the extra [ranker]")
    found = compare.run(config(root, run="with"))
    assert list(found) == ["popularity", "ALS", "ALS+facts", "LightGBM"]
    settings = json.loads((root / "runs/with/baselines/settings.json").read_text())
    assert settings["LightGBM"]["settings"]["trees"] in boosted.TREES
    assert "LightGBM" not in compare.run(config(root, run="never", ranker="never"))
    again = config(root, run="again", settings=str(root / "runs/with/baselines/settings.json"))
    assert compare.run(again)["LightGBM"] == found["LightGBM"]


def test_without_lightgbm_the_row_is_left_out_or_missed_by_name(root, monkeypatch):
    monkeypatch.setattr(boosted, "installed", lambda: False)
    monkeypatch.setattr(compare, "installed", lambda: False)
    assert "LightGBM" not in compare.run(config(root, run="without"))
    with pytest.raises(PageLLMError, match="LightGBM is not installed"):
        compare.run(config(root, run="must", ranker="always"))
    with pytest.raises(PageLLMError, match="auto, always or never"):
        config(root, ranker="sometimes")
