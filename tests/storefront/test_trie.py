"""The trie of keywords: what may be written is what the corpus holds, whatever the logits say."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagellm.stage.config import PageLLMError
from pagellm.storefront.trie import Trie, keywords_under, walk

MILK, OAT, BAR, COFFEE, GROUND, END = range(6)
GOLDEN = [[MILK], [OAT, MILK], [OAT, BAR], [COFFEE], [GROUND, COFFEE]]
COSINE = np.array([0.30, 0.55, 0.10, 0.60, 0.58])
corpora = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=4), min_size=1, max_size=12)


def stub(paths):
    """The same logits at every step."""
    logits = np.array([1.0, 2.0, 0.5, 1.5, 0.0, 0.8])
    return np.tile(logits - np.logaddexp.reduce(logits), (len(paths), 1))


def drawn(seed):
    """A model whose logits are drawn anew for every path."""

    def logp(paths):
        rows = [np.random.default_rng([seed, *path]).normal(0, 3, 6) for path in paths]
        return np.array([row - np.logaddexp.reduce(row) for row in rows])

    return logp


def test_the_golden_scores():
    trie = Trie.of(GOLDEN, END)
    row, mean, masked = walk(trie, stub, width=None)
    order = np.argsort(trie.number[row])
    assert mean[order] == pytest.approx([-2.0685, -1.7019, -1.8685, -1.8185, -2.2019], abs=1e-4)
    assert masked[order] == pytest.approx([0.1744, 0.2950, 0.1790, 0.2875, 0.0641], abs=1e-4)


@pytest.mark.parametrize(
    ("gamma", "order", "scores"),
    [
        (2, [1, 3, 4, 0, 2], [-0.6019, -0.6185, -1.0419, -1.4685, -1.6685]),
        (0, [1, 3, 2, 0, 4], [-1.7019, -1.8185, -1.8685, -2.0685, -2.2019]),
    ],
)
def test_the_golden_order(gamma, order, scores):
    found = keywords_under(Trie.of(GOLDEN, END), stub, gamma * COSINE)
    assert [one.number for one in found] == order
    assert [one.score for one in found] == pytest.approx(scores, abs=1e-4)


@given(corpora, st.integers(0, 99), st.sampled_from([1, 2, 4, None]))
def test_every_path_is_a_keyword_and_none_comes_twice(tokens, seed, width):
    found = keywords_under(Trie.of(tokens, END), drawn(seed), m=20, least=20, width=width)
    written = [one.path for one in found]
    assert written == [(*tokens[one.number], END) for one in found]
    assert sorted(set(written)) == sorted({(*row, END) for row in tokens})


@given(corpora, st.integers(0, 99))
def test_every_keyword_is_reached_and_the_mask_is_a_distribution(tokens, seed):
    trie = Trie.of(tokens, END)
    row, _, masked = walk(trie, drawn(seed), width=None)
    assert row.tolist() == list(range(len({tuple(one) for one in tokens})))
    assert masked.sum() == pytest.approx(1)


@given(corpora, st.data())
def test_children_are_the_next_tokens_of_keywords_not_yet_written(tokens, data):
    trie = Trie.of(tokens, END)
    gone = data.draw(st.sets(st.integers(0, len(trie) - 1)))
    left = [tuple(r[r >= 0].tolist()) for n, r in enumerate(trie.rows) if n not in gone]
    prefix = data.draw(st.sampled_from(tokens))
    prefix = tuple(prefix[: data.draw(st.integers(0, len(prefix)))])
    token, low, high = trie.children(trie.node(prefix), sorted(gone))
    n = len(prefix)
    assert token.tolist() == sorted({row[n] for row in left if row[:n] == prefix})
    for t, a, b in zip(token, low, high, strict=True):
        assert trie.node((*prefix, int(t))) == (a, b, n + 1)


@given(corpora, corpora, st.integers(0, 99))
def test_a_wider_corpus_never_lowers_the_best_score(some, more, seed):
    best = [
        max(walk(Trie.of(rows, END), drawn(seed), width=None)[1]) for rows in (some, some + more)
    ]
    assert best[1] >= best[0]


def test_only_some_keywords_may_be_written():
    trie = Trie.of(GOLDEN, END).only(np.array([4, 0]))
    assert {one.number for one in keywords_under(trie, stub)} == {0, 4}
    assert trie.node((OAT,)) is None


def test_a_keyword_far_below_the_first_ends_the_list():
    bonus = np.array([0.0, 0.0, 0.0, -9.0, -9.0])
    assert [one.number for one in keywords_under(Trie.of(GOLDEN, END), stub, bonus)] == [1, 2, 0]
    assert len(keywords_under(Trie.of(GOLDEN, END), stub, bonus, least=4)) == 4


def test_what_is_no_corpus_is_refused():
    with pytest.raises(PageLLMError, match="no keywords"):
        Trie.of([], END)
    with pytest.raises(PageLLMError, match="none of the keywords"):
        Trie.of(GOLDEN, END).only(np.array([9]))
    with pytest.raises(ValueError, match="keyword 1 has no tokens"):
        Trie.of([[MILK], []], END)
    with pytest.raises(ValueError, match="keyword 1 holds the separator"):
        Trie.of([[MILK], [OAT, END]], END)
