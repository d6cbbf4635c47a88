"""Re-ranking: what a page of relevant and varied candidates must obey."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagellm.data.shop import Catalogue
from pagellm.pages import rerank
from pagellm.pages.energy import LAMBDA_D, LAMBDA_R
from pagellm.pages.ranked import RankedPages
from tests.strategies import seeds

METHODS = sorted(rerank.METHODS)
N = 9


def shop_of(rng) -> tuple[Catalogue, rerank.Kin]:
    """Nine items in few categories; some titles of one brand nearly repeat each other."""
    kinds = [(), ("A",), ("A", "B"), ("C",), ("B", "C", "D")]
    paths = [tuple(kinds[i]) for i in rng.integers(len(kinds), size=N)]
    title = [f"big red toy number {i}" for i in rng.integers(3, size=N)]
    brand = [["Acme", "Brio"][i] for i in rng.integers(2, size=N)]
    leaf = [path[-1] if path else "" for path in paths]
    catalogue = Catalogue.of(
        [f"i{i}" for i in range(N)], title, brand, paths, leaf, [""] * N, [np.nan] * N
    )
    return catalogue, rerank.Kin.of(catalogue)


def candidates(rng, users=3, m=6) -> tuple[np.ndarray, np.ndarray]:
    """item (U, M) without repeats, -1 past a random end; rel (U, M), falling."""
    item = np.stack([rng.permutation(N)[:m] for _ in range(users)])
    item[np.arange(m) >= rng.integers(m + 1, size=users)[:, None]] = -1
    rel = -np.sort(-rng.random((users, m)), axis=1)
    return item, np.where(item >= 0, rel, -np.inf)


def similar(kin: rerank.Kin, a: int, b: int) -> float:
    """Jaccard of two items' categories; 1 within a near-duplicate group. For one pair, slowly."""
    if kin.group[a] == kin.group[b]:
        return 1.0
    A, B = (set(kin.kinds.table[i][kin.kinds.table[i] >= 0].tolist()) for i in (a, b))
    return len(A & B) / len(A | B) if A | B else 0.0


def slowly(method: str, item, rel, kin, k: int, strength: float) -> list[int]:
    """One user's page by the definition: the best value at every slot, computed from scratch."""
    free, page = [c for c in range(len(item)) if item[c] >= 0], []
    while free and len(page) < k:
        above = [item[c] for c in page]

        def value(c, above=above):
            if method == "mmr":
                most = max((similar(kin, item[c], a) for a in above), default=0.0)
                return rel[c] - strength * most
            if method == "energy":
                leaf = kin.leaf[item[c]]
                novel = leaf >= 0 and leaf not in [kin.leaf[a] for a in above]
                start, end = kin.near.indptr[item[c]], kin.near.indptr[item[c] + 1]
                twin = set(kin.near.neighbour[start:end].tolist()) & set(above)
                return rel[c] + strength * (LAMBDA_D * novel - LAMBDA_R * bool(twin))
            some = [*above, item[c]]
            S = np.array([[similar(kin, a, b) for b in some] for a in some])
            S = (1 - rerank.OWN) * S
            np.fill_diagonal(S, 1.0)
            grown = np.linalg.slogdet(S)[1] - np.linalg.slogdet(S[:-1, :-1])[1] if above else 0.0
            return rel[c] + 0.5 * strength * max(grown, np.log(1e-12))

        best = max(free, key=lambda c: (round(value(c), 9), -c))
        page.append(best)
        free.remove(best)
    return page


@pytest.mark.parametrize("method", METHODS)
@settings(deadline=None, max_examples=40)
@given(seeds, st.integers(1, 7), st.sampled_from([0.0, 0.1, 0.5, 2.0]))
def test_every_slot_takes_the_candidate_worth_most_given_those_above(method, seed, k, strength):
    rng = np.random.default_rng(seed)
    _, kin = shop_of(rng)
    item, rel = candidates(rng)
    column = rerank.METHODS[method](item, rel, kin, k, strength)
    for row in range(len(item)):
        want = slowly(method, item[row], rel[row], kin, k, strength)
        assert column[row].tolist() == want + [-1] * (column.shape[1] - len(want))


@pytest.mark.parametrize("method", METHODS)
@settings(deadline=None, max_examples=20)
@given(seeds)
def test_at_strength_0_nothing_moves(method, seed):
    rng = np.random.default_rng(seed)
    _, kin = shop_of(rng)
    item, rel = candidates(rng)
    ranked = RankedPages(np.arange(len(item)), item, rel, np.minimum((item >= 0).sum(1), 4))
    again = rerank.reranked(ranked, kin, 4, method, 0.0)
    assert np.array_equal(again.item, item) and np.array_equal(again.slots, ranked.slots)


@pytest.mark.parametrize("method", METHODS)
@settings(deadline=None, max_examples=20)
@given(seeds, st.floats(0.01, 3))
def test_a_page_holds_the_same_candidates_once_each_with_falling_scores(method, seed, strength):
    rng = np.random.default_rng(seed)
    _, kin = shop_of(rng)
    item, rel = candidates(rng)
    ranked = RankedPages(np.arange(len(item)), item, rel, np.minimum((item >= 0).sum(1), 4))
    again = rerank.reranked(ranked, kin, 4, method, strength)
    for old, new, score in zip(item, again.item, again.score, strict=True):
        n = (old >= 0).sum()
        assert sorted(new[:n].tolist()) == sorted(old[:n].tolist()) and (new[n:] == -1).all()
        assert (np.diff(score[:n]) <= 0).all()
        on_page = set(new[: min(4, n)].tolist())
        assert [i for i in new[:n] if i not in on_page] == [i for i in old[:n] if i not in on_page]


@pytest.mark.parametrize("method", METHODS)
def test_a_user_does_not_depend_on_the_others(method, monkeypatch):
    rng = np.random.default_rng(0)
    _, kin = shop_of(rng)
    item, rel = candidates(rng, users=7)
    whole = rerank.METHODS[method](item, rel, kin, 5, 0.4)
    monkeypatch.setattr(rerank, "BLOCK", 1)
    assert np.array_equal(rerank.METHODS[method](item, rel, kin, 5, 0.4), whole)


@settings(deadline=None, max_examples=30)
@given(seeds)
def test_similarity_is_symmetric_1_with_itself_and_what_the_slow_one_says(seed):
    rng = np.random.default_rng(seed)
    _, kin = shop_of(rng)
    every = np.broadcast_to(np.arange(N), (N, N))
    fast = kin.similarity(every, np.arange(N))
    assert np.array_equal(fast, fast.T) and (np.diag(fast) == 1).all()
    slow = [[similar(kin, a, b) for a in range(N)] for b in range(N)]
    np.testing.assert_allclose(fast, slow)


@settings(deadline=None, max_examples=30)
@given(seeds)
def test_similarities_kept_by_sets_of_categories_are_those_of_items_to_the_last_bit(seed):
    rng = np.random.default_rng(seed)
    _, kin = shop_of(rng)
    item = rng.integers(-1, N, (5, 9))  # -1: an empty slot
    other = rng.integers(0, N, 5)
    assert kin.sets is not None
    kept = kin.similarity(item, other)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rerank, "SETS", 0)
        bare = rerank.Kin(kin.kinds, kin.group, kin.leaf, kin.near)
        assert bare.sets is None
        assert np.array_equal(bare.similarity(item, other), kept)


def test_mmr_prefers_the_other_kind_once_similarity_outweighs_relevance():
    """rel .9 and .8 of one kind, .7 of another: the third comes second as soon as strength > .1."""
    catalogue = Catalogue.of(
        list("abc"),
        ["x", "y", "z"],
        [""] * 3,
        [("A",), ("A",), ("B",)],
        ["A", "A", "B"],
        [""] * 3,
        [np.nan] * 3,
    )
    kin = rerank.Kin.of(catalogue)
    item, rel = np.array([[0, 1, 2]]), np.array([[0.9, 0.8, 0.7]])
    assert rerank.mmr(item, rel, kin, 3, 0.09).tolist() == [[0, 1, 2]]
    assert rerank.mmr(item, rel, kin, 3, 0.11).tolist() == [[0, 2, 1]]


@settings(deadline=None, max_examples=30)
@given(seeds, st.floats(0.1, 10), st.floats(-5, 5))
def test_relevance_forgets_scale_and_shift(seed, scale, shift):
    rng = np.random.default_rng(seed)
    item, score = candidates(rng)
    rel = rerank.relevance(item, score)
    there = item >= 0
    np.testing.assert_allclose(
        rerank.relevance(item, score * scale + shift)[there], rel[there], atol=1e-9
    )
    assert (rel[there] >= 0).all() and (rel[there] <= 1).all() and (rel[~there] == -np.inf).all()


def test_relevance_of_equal_scores_is_1():
    assert rerank.relevance(np.array([[4, 5, -1]]), np.array([[2.0, 2.0, 9.0]])).tolist() == [
        [1.0, 1.0, -np.inf]
    ]


def test_a_sorted_page_keeps_its_items_and_puts_the_best_first():
    column = np.array([[3, 0, 2, -1], [1, -1, -1, -1]])
    value = np.array([[5.0, 9.0, 7.0, 6.0], [1.0, 1.0, 1.0, 1.0]])
    assert rerank.sort_page(column, value).tolist() == [[2, 3, 0, -1], [1, -1, -1, -1]]


def test_the_chosen_strength_is_the_largest_before_accuracy_is_lost():
    def row(recall, ndcg):
        return {"Recall@20": recall, "NDCG@100": ndcg}

    tried = {0.0: row(0.5, 0.4), 0.1: row(0.499, 0.401), 0.2: row(0.496, 0.397)}
    assert rerank.choose(tried) == 0.2
    assert rerank.choose(tried | {0.3: row(0.494, 0.4), 0.4: row(0.5, 0.4)}) == 0.2
    assert rerank.choose(tried | {0.05: row(0.5, 0.39)}) == 0.0
    assert rerank.choose(tried, share=0.999) == 0.0
    assert rerank.choose(tried, share=0.997) == 0.1
    with pytest.raises(ValueError, match="strength 0"):
        rerank.choose({0.1: row(1, 1)})


def test_unequal_shapes_are_refused():
    with pytest.raises(ValueError, match="want"):
        rerank.mmr(np.zeros((2, 3), int), np.zeros((2, 4)), None, 2, 0.1)
