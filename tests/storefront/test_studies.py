"""The study and the bench of the storefront: rows change what they say, grown shops keep pages."""

from dataclasses import replace

import numpy as np
import pytest

from experiments import storefront_bench, storefront_study
from experiments.storefront_bench import grown, spread
from experiments.storefront_study import Ease, ItemKnn
from pagellm.stage.config import PageLLMError
from pagellm.storefront import show
from pagellm.storefront.front import open_store
from pagellm.storefront.page import page, written_ahead


@pytest.fixture(scope="module")
def store(made):
    return open_store(show.Config(**made))


def test_one_part_is_changed_at_a_time(made, capsys):
    rows = "depth_10,keywords_2,categories,rules_alone,people_alike,own_itemknn,bottom_up,flat"
    found = storefront_study.run(storefront_study.Config(**made, people=12, rows=rows, n_boot=50))
    assert list(found) == ["full", *rows.split(",")]
    assert found["full"]["less"]["mean"] == 0 and found["full"]["tp5"] > 0.9
    assert (
        np.isnan(found["flat"]["tp5"]) and found["bottom_up"]["recall"] == found["flat"]["recall"]
    )
    assert "paired difference" in capsys.readouterr().out
    with pytest.raises(PageLLMError, match="rows"):
        storefront_study.Config(**made, rows="nothing")


def test_without_gates_alike_themes_and_all_keywords_pages_are_other_pages(store):
    """And nothing is left switched off behind a row."""
    people = [store.known.context(user) for user in store.shop.user_ids[:4]]
    row = {name: storefront_study.ROWS[name] for name in storefront_study.ROWS}
    full = [row["full"](store, person) for person in people]
    free = [row["no_gates"](store, person) for person in people]
    assert not any(d.level in ("keyword",) for one in free for d in one.decisions)
    assert any(d.level == "keyword" for one in full for d in one.decisions)
    rude = replace(store, front=replace(store.front, threshold=2.0))  # no row agrees that well
    assert {r.source for r in row["full"](rude, people[0]).rows} == {"static"}
    assert "generated" in {r.source for r in row["no_gates"](rude, people[0]).rows}
    alone = [row["no_left_to_right"](store, person) for person in people]
    for name, found in (("full", full), ("no_left_to_right", alone)):
        again = [row[name](store, person) for person in people]
        assert [one.page_id for one in again] == [one.page_id for one in found]
    value = [sum(r.quality["value"] for r in one.rows) for one in alone]
    assert all(one.page["repeats"] == 0 for one in alone) and min(value) > 0
    theme = store.front.writer.themes([people[0]], [["discover"]], [[]])[0][0].value
    bare = replace(theme, concepts=theme.concepts[:1])
    every = storefront_study.unpruned(store.front, store.front.writer).writer
    assert every.chooses
    (answer,) = every.keywords([bare], [people[0]], [np.zeros(0, np.int64)])
    assert len(answer.value) == 8 and answer.value[0].text == theme.concepts[0]


def test_item_to_item_scores_are_sums_of_cosines(store):
    context = store.known.context(store.shop.user_ids[4])
    knn = ItemKnn(store)
    score, bought = knn(context), knn.bought
    for item in (0, 7, 30):
        cosine = [
            bought[:, item]
            @ bought[:, other]
            / np.sqrt(max(bought[:, item].sum(), 1) * max(bought[:, other].sum(), 1))
            for other in context.item
        ]
        assert score[item] == pytest.approx(sum(cosine), rel=1e-4)


def test_ease_is_the_closed_form_over_items(store):
    ease, context = Ease(store, ridge=20.0), store.known.context(store.shop.user_ids[4])
    gram = (ease.bought.T @ ease.bought).astype(np.float64)
    inverse = np.linalg.inv(gram + 20.0 * np.eye(len(gram)))
    weights = -inverse / np.diag(inverse)
    np.fill_diagonal(weights, 0.0)
    own = np.zeros(len(gram))
    own[context.item] = 1.0
    assert ease(context) == pytest.approx(own @ weights, abs=2e-3)


def test_a_grown_shop_shows_copies_of_the_same_items(store):
    """Which copy an item is has no say: the page is the same but for it."""
    context, n = store.known.context(store.shop.user_ids[9]), store.shop.n_items
    rows = written_ahead(store.front, context, store.layout)[0]
    large = grown(store.front, 5)
    moved, kept = spread(context, rows, n, 5, np.random.default_rng(0))
    small = grown(store.front, 1)  # without near-duplicates, as the large one
    first = page(small, context, store.layout, written=rows)
    second = page(large, moved, store.layout, written=kept)
    assert len(first.items()) == len(second.items())
    assert (second.items() % n >= 0).all() and (second.items() >= n).any()


def test_a_copied_shop_holds_the_same_purchases_of_brands_of_its_own(store):
    shop, train = store.shop, store.orders.only("train")
    large, orders = storefront_bench.copied(shop, train, 3, np.random.default_rng(0))
    n = shop.n_items
    assert large.n_items == len(large.catalogue) == 3 * n == orders.n_items
    assert (orders.item % n == train.item).all() and (large.item % n == shop.item).all()
    assert set((orders.item // n).tolist()) == {0, 1, 2}
    assert len(set(large.catalogue.ids)) == 3 * n
    assert len(large.catalogue.brand_names) == 3 * len(shop.catalogue.brand_names)


def test_the_bench_builds_larger_shops(made, capsys):
    asked = storefront_bench.Config(**made, parts="build", sizes="100,400", people=3)
    small, large = storefront_bench.run(asked)["build"]
    assert large["items"] == 3 * small["items"] and large["keywords"] > small["keywords"]
    assert 0 < small["seconds"] and 0 < small["p50"] <= small["p95"] and 0 < small["GB"]
    assert "keywords: built in" in capsys.readouterr().out


def test_the_bench_prints_its_parts(made, capsys, monkeypatch):
    monkeypatch.setattr(storefront_bench, "TRIE", 500)
    found = storefront_bench.run(
        storefront_bench.Config(**made, sizes="100,2000", people=3, rounds=1)
    )
    assert [one["items"] for one in found["online"]][1] > 1000
    assert set(found) == {"online", "parts", "bm25", "masks"} and len(found["bm25"]) == 2
    assert found["masks"]["masked over unmasked"] > 0.5 and found["masks"]["mask us"] > 0
    said = capsys.readouterr().out
    assert "p95 of the largest shop" in said and "pages a second without a cache" in said
