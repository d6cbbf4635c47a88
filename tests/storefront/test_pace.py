"""What keeps a page quick, and that it changes nothing."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagellm.pages.energy import Near
from pagellm.storefront import choose, offers, rankers, text
from pagellm.storefront.corpus import build_corpus, fused_ranks, prune, set_overlap
from pagellm.storefront.front import Sources, open_store
from pagellm.storefront.fuse import Quota, SameLeaf, fill
from pagellm.storefront.page import page
from pagellm.storefront.parts import Candidates, Theme
from pagellm.storefront.policy import Terms
from pagellm.storefront.text import BM25, stems
from pagellm.storefront.themes import by_falling
from tests.storefront.golden import STOCK, catalogue


def test_a_page_fills_each_row_and_folds_its_history_in_once(made, monkeypatch):
    store, fills, folds, products = open_store(Sources(**made)), [], [], []
    real_slots, real_fold, real_dots = offers.slots_of, rankers.fold_in, rankers.dots

    def slots_of(making, offer, *rest):
        fills.append(offer.theme.title)
        return real_slots(making, offer, *rest)

    monkeypatch.setattr(offers, "slots_of", slots_of)
    monkeypatch.setattr(choose, "slots_of", slots_of)
    monkeypatch.setattr(rankers, "fold_in", lambda *a: folds.append(1) or real_fold(*a))
    monkeypatch.setattr(
        rankers, "dots", lambda rows, at: products.append(len(rows)) or real_dots(rows, at)
    )
    found = page(store.front, store.known.context(store.shop.user_ids[0]), store.layout)
    titles = [row.theme.title for row in found.rows if row.source == "generated"]
    assert titles and len(folds) == 1 and products.count(store.shop.n_items) == 1
    # A category may stand in two missions, so that a row below may lose an item and be filled anew.
    assert all(fills.count(title) <= 2 for title in titles) and fills.count(titles[0]) == 1


items = st.lists(st.integers(0, 30), max_size=12, unique=True).map(sorted)


@given(items, items)
def test_overlap_is_the_jaccard_index(a, b):
    both, either = len(set(a) & set(b)), len(set(a) | set(b))
    found = set_overlap(np.array(a, np.int64), np.array(b, np.int64))
    assert found == (both / either if either else 0.0)


def test_keywords_remember_their_overlap_and_what_is_near_to_a_name(monkeypatch):
    corpus = build_corpus(catalogue(), STOCK)
    asked, real = [], BM25.top
    monkeypatch.setattr(BM25, "top", lambda self, *a, **k: asked.append(a) or real(self, *a, **k))
    theme = Theme("Easy weekday breakfasts", "browse", ("Granola", "Coffee"))
    first = prune(corpus, theme)
    assert (prune(corpus, theme) == first).all() and len(asked) == 2
    for a in range(len(corpus)):
        for b in range(len(corpus)):
            assert corpus.overlap(a, b) == set_overlap(corpus.matches(a), corpus.matches(b))
    assert corpus.overlap.cache_info().misses == len(corpus) ** 2


@given(st.lists(st.integers(0, 40), max_size=12, unique=True))
def test_one_list_is_fused_as_several_are(numbers):
    number, score = fused_ranks([np.array(numbers, np.int64)])
    other, both = fused_ranks([np.array(numbers, np.int64), np.zeros(0, np.int64)])
    assert (number == other).all() and (score == both).all()


@given(st.lists(st.sampled_from([0.0, -1.5, 2.0, 7.25, 1e-9]), max_size=40))
def test_places_fall_by_logit_and_equals_stay_in_order(logit):
    logit = np.array(logit)
    assert (by_falling(logit) == np.argsort(-logit, kind="stable")).all()


texts = st.lists(st.lists(st.sampled_from("abcde"), max_size=5), min_size=1, max_size=8)


@given(texts, st.lists(st.sampled_from("abcdef"), max_size=4))
def test_scores_of_all_texts_are_those_of_the_ones_that_are_found(texts, query):
    index = BM25(texts)
    doc, score = index.score(query)
    dense = np.zeros(len(texts))
    dense[doc] = score
    assert index.dense(query).dtype == np.float64 and (index.dense(query) == dense).all()


def test_short_texts_are_held_against_a_policy_once_and_long_ones_are_not_kept():
    terms = Terms(["scam"])
    for said in ("A scam", "scam " * 100):
        assert [terms.found(said) for _ in range(3)] == ["scam"] * 3
    assert terms.remembered.cache_info()[:2] == (2, 1)


def test_stems_of_short_texts_are_remembered_and_a_caller_may_change_its_own():
    text.remembered.cache_clear()
    stems("Oat milks").append("x")
    assert stems("Oat milks") == ["oat", "milk"] and text.remembered.cache_info().hits == 1
    assert stems("milks " * 100) == ["milk"] * 100 and text.remembered.cache_info().misses == 1


@given(st.lists(st.integers(0, 3), min_size=2, max_size=8), st.randoms(use_true_random=False))
def test_likeness_is_by_leaf_parent_and_near_duplicates(leaves, rng):
    n, leaf = len(leaves), np.array(leaves) - 1
    parent = np.where(leaf >= 0, leaf // 2, -1)
    pairs = np.array([(0, n - 1)])
    near = Near.of_pairs(pairs, n)
    among = np.array(rng.sample(range(n), n))
    to = SameLeaf(leaf, parent, near).among(among)
    for place, one in enumerate(among):
        for sim, other in zip(to(place), among, strict=True):
            if {int(one), int(other)} == {0, n - 1} and one != other:
                assert sim == 1
            elif leaf[one] >= 0 and leaf[one] == leaf[other]:
                assert sim == 0.5
            else:
                same = parent[one] >= 0 and parent[one] == parent[other]
                assert sim == (0.25 if same else 0)


@pytest.mark.parametrize("mu", [0.0, 0.5])
def test_a_row_is_the_same_whatever_the_order_of_its_candidates(mu):
    rng = np.random.default_rng(0)
    for _ in range(30):
        item = np.sort(rng.permutation(60)[:20])
        score = rng.integers(0, 4, 20).astype(float)
        quota = Quota(SameLeaf(np.arange(60) // 5, np.arange(60) // 20), mu)
        order, free = rng.permutation(20), np.zeros(60, bool)
        rows = [
            fill(score[at], Candidates(item[at], score[at], score[at], item[at]), 8, quota, free,
                 0.0, np.zeros(0))
            for at in (np.arange(20), order)
        ]  # fmt: skip
        assert (rows[0].item == rows[1].item).all() and (rows[0].score == rows[1].score).all()
