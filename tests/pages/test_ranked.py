"""Ranked pages: whole catalogue, mask, every user, ties, leaks, and the file they are kept in."""

import dataclasses
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pagellm.data.shop import Rows
from pagellm.pages import metrics, ranked, stats
from pagellm.pages import ranked as ranked_module
from pagellm.pages.energy import energy, gain, near_duplicates
from pagellm.pages.ranked import (
    RankedPages,
    Scorer,
    audience,
    check_leak,
    check_mask,
    check_pages,
    label_ranks,
    last_evaluated,
    rank_all,
    score_row,
    seen_rows,
    top_items,
)
from pagellm.pages.tables import per_user
from pagellm.stage import randomness
from pagellm.stage.config import PageLLMError
from tests.strategies import purchases, rows_of, seeds

STEADY = settings(deadline=None, max_examples=40)
EMPTY = Rows(np.zeros(9, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))


@STEADY
@given(purchases(), seeds, st.integers(1, 9), st.integers(1, 5))
def test_top_items_are_the_best_of_the_whole_catalogue_less_the_seen(matrix, seed, depth, block):
    U, N = matrix.shape
    score = torch.randn(U, N, generator=torch.Generator().manual_seed(seed)).round(decimals=1)
    ranked = rank_all(
        lambda users: score[users], np.arange(U), rows_of(matrix), 3, depth, seed, block
    )
    for u in range(U):
        got, legal = ranked.item[u][ranked.item[u] >= 0], np.flatnonzero(~matrix[u])
        assert len(got) == len(set(got)) == min(depth, len(legal)) and set(got) <= set(legal)
        np.testing.assert_array_equal(
            ranked.score[u][: len(got)], np.sort(score[u, legal].numpy())[::-1][: len(got)]
        )
        assert (ranked.item[u][len(got) :] == -1).all() and ranked.slots[u] == min(3, len(got))


@given(st.integers(1, 90), st.sampled_from([1, 30, 64, 2**25]))
@settings(deadline=None)
def test_blocks_of_users_are_as_large_as_their_scores_allow(users, most):
    """Blocks of any size give the same lists; after the first none has more than BLOCK scores."""
    score, asked = torch.randn(users, 8, generator=torch.Generator().manual_seed(0)), []

    def some_scores(some):
        asked.append(len(some))
        return score[some]

    seen = Rows(np.zeros(users + 1, np.int64), EMPTY.items, EMPTY.ratings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranked_module, "BLOCK", most)
        patch.setattr(ranked_module, "FIRST", 2)
        patch.setattr(ranked_module, "USERS", 16)
        found = rank_all(some_scores, np.arange(users), seen, 3, 8)
    want = rank_all(lambda some: score[some], np.arange(users), seen, 3, 8, block=7)
    np.testing.assert_array_equal(found.item, want.item)
    assert asked[0] == min(2, users) and sum(asked) == users
    assert all(n == max(1, min(16, most // 8)) for n in asked[1:-1])


def test_ties_are_shuffled_by_seed_and_user_not_by_item_or_block():
    """Every item leads equally often among equals: 4,000 users, 8 items, about 500 each (sd 21)."""
    users, seen = np.arange(4000), Rows(np.zeros(4001, np.int64), EMPTY.items, EMPTY.ratings)
    flat = torch.full((4000, 8), -0.0)
    flat[:, ::2] = 0.0
    first = top_items(flat, users, seen, 8, seed=0)[0][:, 0]
    assert (torch.bincount(first, minlength=8) - 500).abs().max() < 130
    for i in range(8):
        for j in range(i):
            order = top_items(flat, users, seen, 8, seed=0)[0]
            ahead = ((order == i).int().argmax(1) < (order == j).int().argmax(1)).float().mean()
            assert abs(ahead - 0.5) < 0.05
    blocks = rank_all(lambda some: flat[some], users, seen, 8, 8, seed=0, block=7)
    np.testing.assert_array_equal(blocks.item, order.numpy())
    assert not torch.equal(top_items(flat, users, seen, 8, seed=1)[0], order)


@given(seeds, st.integers(1, 5), st.integers(1, 12), st.integers(1, 14))
@settings(deadline=None)
def test_the_order_among_equal_scores_is_that_of_the_shuffle_wherever_the_list_ends(
    seed, U, N, depth
):
    """i goes before j if its score is higher, or if it is equal and the shuffle ranks i higher."""
    rng = np.random.default_rng(seed)
    score = torch.from_numpy(rng.integers(-2, 2, (U, N)).astype(np.float32)) * 0.5
    score[torch.from_numpy(rng.random((U, N)) < 0.2)] = -math.inf
    score[torch.from_numpy(rng.random((U, N)) < 0.2)] = -0.0
    gone = [rng.permutation(N)[: rng.integers(0, N + 1)] for _ in range(U)]
    seen = Rows(
        np.cumsum([0, *map(len, gone)]),
        np.concatenate(gone).astype(np.int64),
        np.zeros(sum(map(len, gone)), np.float32),
    )
    item, value = top_items(score, np.arange(U), seen, depth, seed)
    shuffled = randomness.rng(seed, "ties", "items").permutation(N)
    drawn = randomness.rng(seed, "ties", "users").integers(
        1 << max(1, (N - 1).bit_length()), size=U
    )
    for u in range(U):
        legal = [i for i in range(N) if i not in gone[u] and score[u, i] > -math.inf]
        want = sorted(
            legal, key=lambda i: (-float(score[u, i]), -(int(shuffled[i]) ^ int(drawn[u])))
        )[:depth]
        assert item[u].tolist() == want + [-1] * (min(depth, N) - len(want))
        assert value[u][: len(want)].tolist() == [float(score[u, i]) for i in want]


def test_top_items_refuses_nan_and_drops_minus_infinity():
    with pytest.raises(ValueError, match="NaN"):
        top_items(torch.tensor([[0.0, math.nan]]), np.array([0]), EMPTY, 2)
    item, score = top_items(torch.tensor([[-math.inf, -1.0, -2.0]]), np.array([0]), EMPTY, 3)
    assert item.tolist() == [[1, 2, -1]] and score.tolist() == [[-1.0, -2.0, -math.inf]]


def test_leaks_stop_the_run():
    n, half = np.ones(4, int), np.full(4, 0.5)
    honest = {"Recall@20": half.round(), "Recall@40": half.round(), "NDCG@100": np.zeros(4)}
    check_leak("honest", honest, n, {m: {"mean": 0.0} for m in honest})
    beyond = {"Recall@20": np.zeros(4), "Recall@40": np.zeros(4), "NDCG@100": half}
    with pytest.raises(PageLLMError, match="4 users exceeds what their recall allows"):
        check_leak("x", beyond, n)
    perfect = {name: np.ones(4) for name in honest}
    check_leak("x", perfect, n, {"Recall@20": {"mean": 0.4}})
    with pytest.raises(PageLLMError, match="Recall@20 1.0000 is more than 3 times EASE's 0.3300"):
        check_leak("x", perfect, n, {"Recall@20": {"mean": 0.33}})


def test_a_leak_stops_where_three_times_ease_is_more_than_all():
    """EASE's NDCG is 1 - m: one above 1 - m / 3 is stopped, one a little below is not."""
    n, ease = np.ones(4, int), {"NDCG@100": {"mean": 0.4}}
    for value, stops in ((0.79, False), (0.81, True)):
        scores = {"Recall@20": np.ones(4), "Recall@40": np.ones(4), "NDCG@100": np.full(4, value)}
        if stops:
            with pytest.raises(
                PageLLMError, match="misses less than 1/3 of what EASE's 0.4000 misses"
            ):
                check_leak("x", scores, n, ease)
        else:
            check_leak("x", scores, n, ease)
    check_leak("x", scores, n)
    with pytest.raises(PageLLMError, match="misses less than 1/3"):  # three times EASE is 1 exactly
        check_leak("x", scores, n, {"NDCG@100": {"mean": 1 / 3}})


def test_masked_items_and_missing_users_are_refused(shop):
    users, seen = Scorer(shop, "test").users, seen_rows(shop, "test", "train")
    good = ranked.popularity_pages(shop, users, seen, 5, 20)
    check_pages("popularity", good, users, seen)
    with pytest.raises(PageLLMError, match="every one of them must count"):
        check_pages(
            "x", RankedPages(users[1:], good.item[1:], good.score[1:], good.slots[1:]), users, seen
        )
    item = good.item.copy()
    item[3, 2] = seen.of(users[3])[0][0]
    with pytest.raises(
        PageLLMError,
        match=f"1 listed items are masked, first item {item[3, 2]} of user {users[3]}\n",
    ):
        check_pages("x", RankedPages(users, item, good.score, good.slots), users, seen)


def test_a_user_without_any_legal_item_still_counts(shop, tmp_path):
    """A file has no row of such a user, but the user counts, with score 0."""
    scorer = Scorer(shop, "test")
    good = ranked.popularity_pages(shop, scorer.users, seen_rows(shop, "test", "train"), 5, 20)
    good.item[2] = -1
    ranked.write_pages(tmp_path / "pages.parquet", good, shop)
    back = ranked.read_pages(tmp_path / "pages.parquet", shop)
    assert len(back.user) == len(scorer.users) - 1
    scores = scorer(ranked.with_users(back, scorer.users), 5)
    assert scores["Recall@20"][2] == scores["NDCG@100"][2] == 0 and len(scores["Recall@20"]) == len(
        scorer.users
    )
    want = scorer(good, 5)
    for name in ("Recall@20", "NDCG@100", "ILD"):
        np.testing.assert_array_equal(scores[name], want[name])


def test_masks_take_out_what_they_name(shop):
    assert check_mask("train+valid+unused")[0] and check_mask("train")[0]
    assert not any(
        check_mask(bad)[0] for bad in ("", "valid", "train+test", "train+train", "train+tset")
    )
    for mask, split, names in (
        ("train", "test", "train"),
        ("train+valid", "test", ("train", "valid")),
        ("train+valid", "valid", "train"),
    ):
        want = shop.csr(names, positive=None)
        np.testing.assert_array_equal(seen_rows(shop, split, mask).items, want.items)


def test_the_train_mask_lets_validation_items_compete(shop):
    users = Scorer(shop, "test").users
    lists = {
        mask: ranked.popularity_pages(shop, users, seen_rows(shop, "test", mask), 20, 60)
        for mask in ("train", "train+valid")
    }
    valid = shop.csr("valid", positive=None)
    for u, wide, narrow in zip(users, lists["train"].item, lists["train+valid"].item, strict=True):
        mine = set(valid.of(u)[0])
        assert mine <= set(wide) and not mine & set(narrow) and set(wide) - mine == set(narrow)


def test_the_audience_counts_cold_users_and_items(shop):
    text = audience(shop, Scorer(shop, "test"), "train")
    assert (
        f"{len(np.unique(shop.user[shop.rows('test')])):,} users, all counted, 0 of them cold"
        in text
    )
    assert f"all {shop.n_items} items less the user's train rows" in text
    user = int(Scorer(shop, "test").users[0])
    cold = dataclasses.replace(
        shop, split=np.where((shop.user == user) & (shop.split == 0), 3, shop.split)
    )
    assert "all counted, 1 of them cold" in audience(cold, Scorer(cold, "test"), "train")


# Labels and scores


@STEADY
@given(
    st.lists(
        st.tuples(
            st.integers(0, 2),
            st.sampled_from([math.nan, 3.0, 4.0, 5.0]),
            st.sampled_from([math.nan, 2.5, 4.5]),
        ),
        max_size=12,
    )
)
def test_label_ranks_are_average_ranks_within_the_user(labels):
    """1 + labels of the user that are better by (rating, s) + half of the others that are equal."""
    user, rating, s = (np.array([row[i] for row in labels]) for i in range(3))
    worth = [(u, -1.0 if r != r else r, -1.0 if x != x else x) for u, r, x in labels]
    got = label_ranks(user.astype(int), rating, s)
    for (u, *mine), rank in zip(worth, got, strict=True):
        others = [tuple(rest) for v, *rest in worth if v == u]
        above, equal = sum(o > tuple(mine) for o in others), sum(o == tuple(mine) for o in others)
        assert rank == 1 + above + (equal - 1) / 2


def test_scores_are_those_of_the_one_user_functions(shop):
    """Labels by (rating, s), gains from the held-out ratings, true gains from the true ratings."""
    scorer, k = Scorer(shop, "test"), 6
    pages = ranked.popularity_pages(shop, scorer.users, seen_rows(shop, "test", "train"), k, 15)
    got = scorer(pages, k)
    near, leaf = near_duplicates(shop.catalogue), shop.catalogue.leaf_id
    for row, user in enumerate(scorer.users.tolist()):
        labels, ratings = scorer.held.of(user)
        page = pages.item[row, :k].tolist()
        rank = label_ranks(np.zeros(len(labels), int), ratings, scorer.s[labels])
        assert got["WAS"][row] == pytest.approx(
            metrics.was(labels.tolist(), page, ref_rank=rank.tolist())
        )
        assert got["Recall@20"][row] == metrics.recall(
            labels.tolist(), pages.item[row].tolist(), 20
        )
        held = dict(zip(labels.tolist(), ratings.tolist(), strict=True))
        gains = [float(gain(held[i], scorer.s[i])) if i in held else 0.0 for i in page]
        assert got["energy"][row] == pytest.approx(energy(page, gains, leaf, near))
        true = gain(shop.truth[user, page], scorer.s[page]).tolist()
        assert got["true_energy"][row] == pytest.approx(energy(page, true, leaf, near))
    unknown = Scorer(dataclasses.replace(shop, truth=None), "test")(pages, k)
    assert set(got) - set(unknown) == {"true_energy"}
    for name, values in unknown.items():
        np.testing.assert_array_equal(values, got[name])


def test_a_row_is_checked_scored_from_its_file_and_summed_up(shop, tmp_path):
    scorer, seen = Scorer(shop, "test"), seen_rows(shop, "test", "train")
    pages = ranked.popularity_pages(shop, scorer.users, seen, 5, 20)
    scores, summary = score_row(tmp_path / "row", "x", pages, scorer, seen, 5, n_boot=20)
    for name, values in scorer(pages, 5).items():
        np.testing.assert_array_equal(scores[name], values)
        if name in summary:
            assert summary[name] == stats.summary(values, 0, 20)
    kept = per_user(tmp_path / "row" / "per_user.parquet")
    np.testing.assert_array_equal(kept.pop("user"), scorer.users)
    assert set(kept) == set(scores)
    pages.item[0, 0] = seen.of(scorer.users[0])[0][0]
    with pytest.raises(PageLLMError, match="masked"):
        score_row(tmp_path / "bad", "x", pages, scorer, seen, 5)
    assert not (tmp_path / "bad" / "pages.parquet").exists()


# The file


def test_pages_read_back_as_they_were_written(shop, tmp_path):
    """Rows of different length, pages shorter than the list, users with gaps."""
    item = np.array([[4, 2, 9], [7, -1, -1], [1, 3, -1]])
    score = np.where(item < 0, -np.inf, np.arange(9).reshape(3, 3)).astype(np.float32)
    pages = RankedPages(np.array([0, 5, 6]), item, score, np.array([2, 1, 2]))
    ranked.write_pages(tmp_path / "pages.parquet", pages, shop)
    table = pq.read_table(tmp_path / "pages.parquet").to_pylist()
    assert [(r["user_id"], r["item_id"]) for r in table] == [
        (shop.user_ids[r["user"]], shop.catalogue.ids[r["item"]]) for r in table
    ]
    back = ranked.read_pages(tmp_path / "pages.parquet", shop)
    for name in ("user", "item", "score", "slots"):
        np.testing.assert_array_equal(getattr(back, name), getattr(pages, name))
    pages.item[:] = -1
    ranked.write_pages(tmp_path / "none.parquet", pages, shop)
    none = ranked.read_pages(tmp_path / "none.parquet", shop)
    assert len(none.user) == len(none.slots) == 0
    assert ranked.with_users(none, np.array([3])).item.tolist() == [[-1]]


def test_pages_of_another_library_need_user_rank_and_item(shop, tmp_path):
    """Rows in any order; without a score it falls by rank; without a page all ranks are it."""
    path = tmp_path / "pages.parquet"
    columns = {"user": [3, 1, 3], "rank": [2, 1, 1], "item": [8, 0, 53]}
    pq.write_table(pa.table(columns), path)
    back = ranked.read_pages(path, shop)
    assert back.user.tolist() == [1, 3] and back.item.tolist() == [[0, -1], [53, 8]]
    assert back.score.tolist() == [[-1, -math.inf], [-1, -2]] and back.slots.tolist() == [1, 2]
    for wrong, words in (
        ({"user": [3, 1, 80]}, "user 1..80 is outside 0..79"),
        ({"item": [8, 0, 54]}, "item 0..54 is outside 0..53"),
        ({"item": [8, -1, 53]}, "item -1..53 is outside"),
        ({"rank": [3, 1, 1]}, "without gap or repeat"),
        ({"rank": [1, 1, 1]}, "without gap or repeat"),
        ({"rank": [1, 1, 0]}, "without gap or repeat"),
    ):
        pq.write_table(pa.table(columns | wrong), path)
        with pytest.raises(PageLLMError, match=words):
            ranked.read_pages(path, shop)
    pq.write_table(pa.table({"user": [1], "item": [2]}), path)
    with pytest.raises(PageLLMError, match="no column rank"):
        ranked.read_pages(path, shop)


def test_a_comparison_is_about_composed_pages_where_they_were_evaluated(tmp_path):
    assert last_evaluated(tmp_path) == "ppo"
    (tmp_path / "compose").mkdir()
    (tmp_path / "compose" / "pages.parquet").touch()
    assert last_evaluated(tmp_path) == "compose"
