"""Words, stems and BM25."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagellm.storefront.text import BM25, best_first, index_texts, parents, stem, stems, words
from tests.storefront.golden import catalogue

PAIRS = (
    "berry berries, cookie cookies, dish dishes, "
    "tomato tomatoes, shoe shoes, glass glasses, box boxes, size sizes"
)


@pytest.mark.parametrize("pair", PAIRS.split(", "))
def test_singular_and_plural_share_a_stem(pair):
    one, many = pair.split()
    assert stem(one) == stem(many)


@pytest.mark.parametrize("word", ["bus", "virus", "glass", "basis", "gas", "is"])
def test_words_that_end_in_s_by_nature_stay(word):
    assert stem(word) == word or word == "gas" and stem(word) == "gas"


@given(st.text(max_size=40))
def test_words_are_small_and_hold_letters_and_digits_only(text):
    for word in words(text):
        assert word.isalnum() or not word.isascii()
        assert word == word.lower()


def test_words_of_other_scripts_are_runs_of_letters():
    assert words("Молоко 3,2% — свежее") == ["молоко", "3", "2", "свежее"]
    assert words("ＦＵＬＬ width") == ["full", "width"]


def titles_and_leaves():
    shop = catalogue()
    return [stems(f"{title} {leaf}") for title, leaf in zip(shop.title, shop.leaf, strict=True)]


def test_bm25_of_the_golden_shop():
    """Mean length 4; idf(milk) = idf(coffee) = ln 5.2."""
    assert np.mean([len(text) for text in titles_and_leaves()]) == 4
    index = BM25(titles_and_leaves())
    assert index.idf[index.terms["milk"]] == pytest.approx(math.log(5.2))
    doc, score = index.top(["milk"], 10)
    assert doc.tolist() == [0, 1] and score == pytest.approx([1.0304, 0.9627], abs=5e-5)
    doc, score = index.top(stems("oat milk"), 10, every=True)
    assert doc.tolist() == [1] and score == pytest.approx([1.6426], abs=5e-5)
    doc, score = index.top(stems("coffee beans"), 10)
    assert doc.tolist() == [4, 5] and score == pytest.approx([2.0120, 1.0304], abs=5e-5)


def test_bm25_of_five_texts():
    texts = "organic whole milk | whole bean coffee | "
    texts += "oat milk barista | milk chocolate bar | ground coffee"
    doc, score = BM25([stems(text) for text in texts.split("|")]).score(stems("whole milk"))
    assert doc.tolist() == [0, 1, 2, 3]
    assert score == pytest.approx([0.6247, 0.3866, 0.2380, 0.2380], abs=5e-5)


def test_an_index_without_texts_finds_nothing():
    assert not len(BM25([]).top(["milk"], 5)[0])
    assert not len(BM25([[]]).top(["milk"], 5)[0])
    assert not len(BM25([["milk"]]).top([], 5)[0])


texts = st.lists(st.lists(st.sampled_from("abcde"), max_size=5), min_size=1, max_size=8)


@given(texts, st.lists(st.sampled_from("abcdef"), min_size=1, max_size=3))
def test_all_words_is_a_part_of_any_word_with_the_same_scores(texts, query):
    index = BM25(texts)
    some, every = (
        dict(zip(*map(np.ndarray.tolist, index.score(query, flag)), strict=False))
        for flag in (0, 1)
    )
    wanted = {n for n, text in enumerate(texts) if set(query) <= set(text)}
    assert set(every) == wanted
    assert all(some[n] == every[n] for n in every)
    assert set(some) == {n for n, text in enumerate(texts) if set(query) & set(text)}


@given(texts, st.sampled_from("abcde"), st.integers(0, 7))
def test_one_more_mention_of_the_word_never_lowers_a_text_of_equal_length(texts, word, at):
    """Another word of the text becomes the query's word, and idf moves for all alike."""
    at %= len(texts)
    others = [place for place, other in enumerate(texts[at]) if other != word]
    if not others or word not in texts[at]:
        return
    more = [list(text) for text in texts]
    more[at][others[0]] = word
    before, after = (
        dict(zip(*map(np.ndarray.tolist, BM25(t).score([word])), strict=False))
        for t in (texts, more)
    )
    assert after[at] >= before[at]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=20), st.integers(1, 20))
def test_the_best_are_those_of_a_full_sort(scores, depth):
    score, number = np.array(scores, float), np.random.default_rng(0).permutation(len(scores))
    assert best_first(score, number, depth).tolist() == best_first(score, number)[:depth].tolist()


def test_an_item_is_found_by_title_leaf_and_what_is_above():
    shop = catalogue()
    assert index_texts(shop)[1] == "Oat milk barista Plant milk Dairy"
    assert parents(shop)[7] == "Breakfast"
