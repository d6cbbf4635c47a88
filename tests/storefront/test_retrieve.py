"""Keywords, the corpus, and the items they find."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagellm.storefront.corpus import TYPES, build_corpus, fused_ranks, prune
from pagellm.storefront.parts import Context, Keyword, Theme
from pagellm.storefront.rankers import Frequency
from pagellm.storefront.retrieve import build_index, retrieve
from pagellm.storefront.text import stems
from tests.storefront.golden import AT, HOUSEHOLDS, STOCK, catalogue

EMPTY = np.zeros(0, np.int64)
BREAKFAST = (
    Keyword("Plant milk", "category", 0.9, 1),
    Keyword("Granola", "category", 0.85, 1),
    Keyword("Cereal", "category", 0.8, 1),
    Keyword("coffee", "query", 0.6, 2),
)


def u1(barred=EMPTY):
    item, count = np.array([0, 4, 7, 9]), np.array([5, 4, 1, 3])
    return Context("u1", "user:u1", AT, item, count, np.full(20, 0.05, np.float32), barred)


def cold():
    return Context(None, "cold:en", AT, EMPTY, EMPTY, np.full(20, 0.05, np.float32), EMPTY)


def index(stock=STOCK):
    shop = catalogue()
    return build_index(shop, stock, build_corpus(shop, stock), HOUSEHOLDS)


def test_two_lists_are_fused_by_rank():
    """Sum over lists of 1 / (60 + rank): ranks 1 and 3, ranks 2 and 1, rank 5."""
    lists = [np.array([7, 8, 1, 2, 3]), np.array([8, 0, 7])]
    number, score = fused_ranks(lists)
    found = dict(zip(number.tolist(), score.tolist(), strict=True))
    assert found[7] == pytest.approx(0.032266, abs=1e-6)
    assert found[8] == pytest.approx(0.032522, abs=1e-6)
    assert found[3] == pytest.approx(0.015385, abs=1e-6)


def test_retrieval_of_the_golden_row():
    """Weights exp(score - best): 1, .9512, .9048, .7408; g05 stands in the row above already."""
    allowed = np.ones(12, bool)
    allowed[[0, 9]] = False
    found = retrieve(index(), list(BREAKFAST), u1(), Frequency(HOUSEHOLDS)(u1()), allowed=allowed)
    ret = dict(zip(found.item.tolist(), found.ret.tolist(), strict=True))
    assert sorted(ret) == [1, 4, 5, 7, 8]
    for item, wanted in ((1, 0.016393), (7, 0.015594), (8, 0.014833), (5, 0.011949)):
        assert ret[item] == pytest.approx(wanted, abs=1e-6)
    assert found.source.tolist() == [0, 3, 3, 1, 2]


def test_what_is_sold_out_or_barred_is_not_found():
    keywords = [Keyword("Dairy", "category", 1.0, 4), Keyword("Cleaning", "category", 1.0, 1)]
    barred = np.array([3])
    found = retrieve(index(), keywords, u1(barred), np.zeros(12))
    assert found.item.tolist() == [0, 1, 2]


def test_people_without_history_get_members_by_popularity():
    found = retrieve(
        index(), [Keyword("Dairy", "category", 1.0, 4)], cold(), np.arange(12.0), depth=2
    )
    assert sorted(found.item.tolist()) == [0, 2]  # 90 and 50 households


def test_a_logit_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"logit \(3,\), want \(12,\)"):
        retrieve(index(), [], u1(), np.zeros(3))


def test_the_corpus_holds_every_category_of_items_in_stock_and_no_other():
    corpus = build_corpus(catalogue(), STOCK)
    names = {corpus.text[w] for w in range(len(corpus)) if TYPES[corpus.type[w]] == "category"}
    assert {"Dairy", "Milk", "Plant milk", "Granola"} <= names
    assert "Cleaning" not in names and "Household" not in names


def test_every_keyword_matches_an_item_in_stock_and_no_two_are_equal_after_stemming():
    corpus = build_corpus(catalogue(), STOCK)
    assert corpus.counts().min() > 0
    assert STOCK[corpus.item].all()
    keys = [tuple(stems(text)) for text in corpus.text]
    assert len(set(keys)) == len(keys)


def test_a_query_matches_what_holds_all_its_stems():
    corpus = build_corpus(catalogue(), STOCK)
    # Three titles hold "milk" or one of its categories, but no query of the golden shop stands in
    # three.
    assert all(TYPES[kind] == "category" for kind in corpus.type)


def test_forbidden_texts_are_no_keywords():
    corpus = build_corpus(catalogue(), STOCK, forbidden=lambda text: "milk" in text.lower())
    assert not [text for text in corpus.text if "milk" in text.lower()]


def test_pruning_puts_the_theme_s_own_concepts_first():
    corpus = build_corpus(catalogue(), STOCK)
    theme = Theme("Easy weekday breakfasts", "browse", ("Granola", "Cereal"))
    best = [corpus.text[w] for w in prune(corpus, theme, 3)]
    assert {"Granola", "Cereal"} <= set(best)
    assert len(prune(corpus, theme, 3)) <= 3


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 11), st.floats(0.01, 10))
def test_a_higher_logit_never_lowers_an_item_s_retrieval(item, more):
    logit = Frequency(HOUSEHOLDS)(u1())
    raised = logit.copy()
    raised[item] += more
    keywords = [Keyword(name, "category", 1.0, 1) for name in ("Dairy", "Drinks", "Breakfast")]
    before, after = (retrieve(index(), keywords, u1(), x) for x in (logit, raised))
    at = before.item == item
    assert (after.ret[after.item == item] >= before.ret[at]).all()


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(12)), st.integers(0, 1000))
def test_renumbering_the_items_changes_nothing_but_the_numbers(order, seed):
    """With no two logits equal, so that no tie has to go by number."""
    order = np.array(order)
    shop, logit = catalogue(), np.random.default_rng(seed).random(12)
    moved = type(shop).of(
        *(
            [column[i] for i in order]
            for column in (shop.ids, shop.title, shop.brand, shop.categories)
        ),
        *([column[i] for i in order] for column in (shop.leaf, shop.description)),
        shop.price[order],
    )
    there = build_index(moved, STOCK[order], build_corpus(moved, STOCK[order]), HOUSEHOLDS[order])
    keywords = [k for k in BREAKFAST if k.type == "category"] + [
        Keyword("Dairy", "category", 0.7, 4)
    ]
    new_place = np.argsort(order)
    person = u1()
    moved_person = Context(
        "u1", "user:u1", AT, new_place[person.item], person.count, person.mission, EMPTY
    )
    a = retrieve(index(), keywords, person, logit)
    b = retrieve(there, keywords, moved_person, logit[order])
    assert dict(zip(a.item.tolist(), a.ret, strict=False)) == dict(
        zip(order[b.item].tolist(), b.ret, strict=False)
    )
