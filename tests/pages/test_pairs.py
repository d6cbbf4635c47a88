"""Pairs of pages: what holds for every pair, for each kind, and for where pairs come from."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagellm.data.shop import SPLITS, Catalogue, Shop
from pagellm.pages import edits, metrics, pairs
from pagellm.pages.energy import energy, gain, near_duplicates
from pagellm.pages.pairs import (
    KINDS,
    Stock,
    buyers,
    diversity,
    draw_side,
    from_table,
    make_pairs,
    makers,
    pair_seeds,
    preference,
    ranked,
    redundancy,
    to_table,
)
from pagellm.pages.truth import Ties, ground_truth_page, item_scores, popularity

law = settings(deadline=None, max_examples=40)
TRAIN, VALID, TEST = (SPLITS.index(name) for name in ("train", "valid", "test"))


def shop_of(seed=0, n_users=12, n_items=60, implicit=False, per_user=24, leaves=6) -> Shop:
    """A small shop: every third item nearly repeats the one before; some categories are unknown."""
    rng = np.random.default_rng(seed)
    leaf = [f"leaf{i % leaves}" for i in rng.integers(0, leaves, n_items)]
    brand = [f"brand{i}" for i in rng.integers(0, 4, n_items)]
    title = [f"thing number{i} with a long name{i} indeed" for i in range(n_items)]
    for i in range(2, n_items, 3):
        leaf[i], brand[i], title[i] = (
            leaf[i - 1],
            brand[i - 1],
            title[i - 1] + ("" if i % 2 else " again"),
        )
    for i in rng.choice(n_items, n_items // 10, replace=False):
        leaf[i] = ""
    paths = [(name,) if name else () for name in leaf]
    catalogue = Catalogue.of(
        [f"i{i}" for i in range(n_items)],
        title,
        brand,
        paths,
        leaf,
        [""] * n_items,
        [1.0] * n_items,
    )
    user = np.repeat(np.arange(n_users), per_user)
    weight = 1.0 / (1 + np.arange(n_items)) ** 0.5
    item = np.concatenate(
        [
            np.sort(rng.choice(n_items, per_user, replace=False, p=weight / weight.sum()))
            for _ in range(n_users)
        ]
    )
    rating = rng.choice([1.0, 2, 3, 4, 5], size=len(user), p=[0.1, 0.1, 0.1, 0.35, 0.35]).astype(
        np.float32
    )
    if implicit:
        rating[:] = np.nan
    split = rng.choice([TRAIN, VALID, TEST], size=len(user), p=[0.8, 0.1, 0.1]).astype(np.int8)
    return Shop(
        n_users,
        n_items,
        user,
        item,
        rating,
        np.zeros(len(user), np.int64),
        ~(rating <= 3),
        split,
        catalogue,
        [f"u{u}" for u in range(n_users)],
    )


shops = st.builds(
    shop_of,
    st.integers(0, 50),
    per_user=st.sampled_from([3, 9, 24]),
    leaves=st.sampled_from([1, 6]),
    implicit=st.sampled_from([False, False, True]),
)


def train_gain(shop, user):
    """item -> gain of one user's train rows."""
    s = item_scores(shop)
    return {item: float(gain(rating, s[item])) for item, rating in by_user(shop)[user].items()}


def by_user(shop):
    """user -> {item: rating} of the train rows."""
    train = {user: {} for user in range(shop.n_users)}
    for user, item, rating, split in zip(
        shop.user, shop.item, shop.rating, shop.split, strict=True
    ):
        if split == TRAIN:
            train[int(user)][int(item)] = float(rating)
    return train


# Laws of every pair


def test_every_kind_can_be_made():
    assert all(count["emitted"] > 10 for count in make_pairs(shop_of(0), 0)[1].values())


@law
@given(shops, st.integers(0, 9), st.booleans())
def test_every_pair(shop, seed, literal):
    pairs, counts = make_pairs(shop, seed, per_kind=2, literal_swaps=literal, k=7)
    near, train, leaf = near_duplicates(shop.catalogue), by_user(shop), shop.catalogue.leaf_id
    for pair in pairs:
        mine = train[pair.user]
        page, history = pair.chosen, pair.history
        assert len(pair.chosen) == len(pair.rejected) == len(pair.mask) <= 7
        assert len(set(pair.rejected)) == len(pair.rejected) and len(set(page)) == len(page)
        assert not set(page) & set(history)
        # History and page are liked train items of this user, and the ratings are theirs.
        assert all(not mine[i] <= 3 for i in page + history)
        assert all(
            r == mine[i] or math.isnan(r) and math.isnan(mine[i])
            for i, r in zip(history, pair.history_rating, strict=True)
        )
        # What a rejected page holds beside the chosen one's items is disliked, or new to the user.
        for item in set(pair.rejected) - set(page):
            assert item not in mine or (pair.kind == "preference" and mine[item] < 3)
        if pair.kind == "preference":
            assert not any(pair.mask)
        else:
            assert pair.mask == [a != b for a, b in zip(pair.chosen, pair.rejected, strict=True)]
        g = train_gain(shop, pair.user)
        e = [
            energy(p, [g.get(i, 0.0) for i in p], leaf, near) for p in (pair.chosen, pair.rejected)
        ]
        assert pair.delta_E == pytest.approx(e[0] - e[1]) and pair.delta_E >= 1e-6
    for kind in KINDS:
        c = counts[kind]
        assert c["tried"] == c["impossible"] + c["rejected"] + c["emitted"]
        assert c["emitted"] == sum(pair.kind == kind for pair in pairs)
        assert c["lower_energy"] == (1.0 if c["emitted"] else None)


@law
@given(shops, st.integers(0, 9))
def test_literal_swaps_leave_sets_alone(shop, seed):
    """ILD, H and duplicates do not depend on the order, so a swap cannot change them."""
    pairs, _ = make_pairs(shop, seed, KINDS[1:], per_kind=2, literal_swaps=True)
    categories, group = shop.catalogue.categories, near_duplicates(shop.catalogue).group
    for pair in pairs:
        assert sorted(pair.chosen) == sorted(pair.rejected) and pair.source == "swap"
        for score in (metrics.ild, metrics.entropy):
            values = score(pair.chosen, categories), score(pair.rejected, categories)
            assert values[0] == pytest.approx(values[1], abs=1e-12)
        assert metrics.duplicate_rate(pair.chosen) == metrics.duplicate_rate(pair.rejected)
        assert (
            metrics.near_duplicate_pairs(pair.rejected, group)
            == metrics.near_duplicate_pairs(pair.chosen, group)
            == 0
        )
        if pair.kind != "ranked":
            assert sum(pair.mask) == 2


def test_literal_swaps_carry_their_signal_in_the_order():
    """Diversity moves the only item of a category down; redundancy moves an item up to its like."""
    shop = shop_of(3, n_users=40)
    pairs, counts = make_pairs(shop, 0, KINDS[2:], per_kind=4, literal_swaps=True)
    leaf = shop.catalogue.leaf_id
    assert all(counts[kind]["emitted"] > 20 for kind in KINDS[2:])
    for pair in pairs:
        a, b = np.flatnonzero(pair.mask)
        page = [int(leaf[i]) for i in pair.chosen]
        if pair.kind == "diversity":
            assert page.count(page[a]) == 1 and page[a] >= 0
            assert page[b] < 0 or page.count(page[b]) > 1
        else:
            assert page[b] in page[:a] and page[b] >= 0 and page[a] != page[b]
    close = [pair for pair in pairs if pair.delta_E < 0.01]
    assert close and min(pair.delta_E for pair in close) >= 1e-6  # the default margin
    assert any(
        [int(leaf[i]) for i in p.chosen[:a]].count(int(leaf[p.chosen[b]])) == 1
        for p in pairs
        if p.kind == "redundancy"
        for a, b in [np.flatnonzero(p.mask)]
    )
    for kind, place in (("diversity", 0), ("redundancy", 1)):  # no category is left out
        moved = {p.chosen[np.flatnonzero(p.mask)[place]] for p in pairs if p.kind == kind}
        assert {int(leaf[i]) for i in moved} == set(range(6))


# Each kind


@law
@given(shops, st.integers(0, 9))
def test_ranked_pairs_swap_true_inversions(shop, seed):
    """One to three disjoint swaps, each of which puts the better item by (rating, s_i) below."""
    s = np.nan_to_num(item_scores(shop), nan=-1.0)
    train = by_user(shop)
    for pair in make_pairs(shop, seed, ("ranked",), per_kind=3)[0]:
        moved = [k for k, edited in enumerate(pair.mask) if edited]
        assert len(moved) in (2, 4, 6)
        for a in moved:
            b = pair.rejected.index(pair.chosen[a])
            assert pair.chosen[b] == pair.rejected[a]
            if a < b:
                up, down = pair.chosen[b], pair.chosen[a]
                level = np.nan_to_num([train[pair.user][up], train[pair.user][down]])
                assert (level[1], s[down]) > (level[0], s[up])


def test_ranked_pairs_swap_one_to_three():
    pairs, _ = make_pairs(shop_of(1, n_users=30, n_items=80, per_user=40), 0, ("ranked",))
    assert {sum(pair.mask) for pair in pairs} == {2, 4, 6}
    # neighbours too
    assert any(
        p.chosen[a] == p.rejected[a + 1] and p.chosen[a + 1] == p.rejected[a]
        for p in pairs
        for a in range(len(p.chosen) - 1)
    )
    for pair in pairs:  # disjoint: whoever moved changed places with one
        for a, item in enumerate(pair.chosen):
            assert pair.rejected[pair.chosen.index(pair.rejected[a])] == item


def test_ranked_pairs_need_no_second_rating():
    """Within one rating level s_i decides; without ratings nothing does."""
    shop = shop_of(1)
    one = replace(shop, rating=np.where(shop.rating > 3, 5.0, shop.rating).astype(np.float32))
    assert len(make_pairs(one, 0, ("ranked",))[0]) > 20
    assert make_pairs(shop_of(1, implicit=True), 0, ("ranked",))[0] == []


def test_two_liked_items_make_a_pair_and_one_does_not():
    shop = shop_of(0, n_users=3, per_user=3)
    row = np.array([0, 0, 1])
    shop = replace(
        shop,
        user=row,
        item=np.array([1, 2, 5]),
        rating=np.full(3, 5, np.float32),
        time=np.zeros(3, np.int64),
        positive=np.ones(3, bool),
        split=np.zeros(3, np.int8),
    )
    pairs, counts = make_pairs(shop, 0, ("preference",), per_kind=2)
    # Only items 1, 2 and 5 were ever bought, so 5 is all there is to fill a page with.
    assert [(pair.user, len(pair.history), pair.rejected) for pair in pairs] == [(0, 1, [5])] * 2
    assert counts["preference"]["tried"] == 2


@law
@given(shops, st.integers(0, 9))
def test_diversity_pairs_lose_a_category(shop, seed):
    """The old item's category leaves the page; the new item's was there; it repeats nothing."""
    leaf, near = shop.catalogue.leaf_id, near_duplicates(shop.catalogue)
    for pair in make_pairs(shop, seed, ("diversity",), per_kind=3)[0]:
        (slot,) = np.flatnonzero(pair.mask)
        before, after = leaf[pair.chosen].tolist(), leaf[pair.rejected].tolist()
        assert before[slot] >= 0 and before.count(before[slot]) == 1 and before[slot] not in after
        assert after[slot] >= 0 and after[slot] in before
        assert not set(near.of(pair.rejected[slot]).tolist()) & set(pair.chosen)
        assert pair.source == "replacement"
        # Fewer categories, the same number of items: the page is less balanced.
        assert set(after) == set(before) - {before[slot]}


def test_diversity_matches_popularity_and_score():
    """The new item is one of the 5 nearest allowed ones in (popularity rank, (s - 1) / 4)."""
    shop = shop_of(2, n_users=20, n_items=150, leaves=4)
    stock = Stock.of(shop)
    count, s = popularity(shop), item_scores(shop)
    rank = np.array([(np.sum(count < c) + np.sum(count <= c) - 1) / 2 for c in count]) / (
        len(count) - 1
    )
    s = np.where(np.isnan(s), np.nanmean(s), s)
    np.testing.assert_allclose(stock.coordinate, np.stack([rank, (s - 1) / 4]))
    train, near, leaf = by_user(shop), near_duplicates(shop.catalogue), shop.catalogue.leaf_id
    ranks, near_by = Counter(), set()
    for pair in make_pairs(shop, 0, ("diversity",), per_kind=6)[0]:
        (slot,) = np.flatnonzero(pair.mask)
        allowed = set(leaf[pair.chosen].tolist()) - {-1, int(leaf[pair.chosen[slot]])}
        pool = [
            i
            for i in range(150)
            if leaf[i] in allowed
            and i not in train[pair.user]
            and not set(near.of(i).tolist()) & set(pair.chosen)
        ]
        at = stock.coordinate[:, [pair.chosen[slot]]]
        distance = np.abs(stock.coordinate[:, pool] - at).sum(0)
        got = distance[pool.index(pair.rejected[slot])]
        ranks[int((distance < got - 1e-12).sum())] += 1
        near_by.add(pair.rejected[slot])
    assert max(ranks) == 4 and len(ranks) == 5
    assert {int(leaf[i]) for i in near_by} == set(range(4))


@law
@given(shops, st.integers(0, 9))
def test_redundancy_pairs_repeat_an_item_above(shop, seed):
    near, group = near_duplicates(shop.catalogue), near_duplicates(shop.catalogue).group
    for pair in make_pairs(shop, seed, ("redundancy",), per_kind=3)[0]:
        (slot,) = np.flatnonzero(pair.mask)
        assert set(near.of(pair.rejected[slot]).tolist()) & set(pair.rejected[:slot])
        assert metrics.near_duplicate_pairs(pair.rejected, group) > metrics.near_duplicate_pairs(
            pair.chosen, group
        )


def test_redundancy_reaches_every_slot_but_the_first():
    pairs, _ = make_pairs(shop_of(0, n_users=60, per_user=30), 0, ("redundancy",), k=5)
    assert {int(np.flatnonzero(pair.mask)[0]) for pair in pairs} == {1, 2, 3, 4}


def test_preference_takes_disliked_items_first():
    """All of the user's items below 3 that fit, and only then others; source says which."""
    shop = shop_of(5, n_users=30)
    train, sources = by_user(shop), set()
    for neutral, most in (("exclude", 2), ("weak_negative", 3)):
        for pair in make_pairs(shop, 0, ("preference",), neutral=neutral)[0]:
            bad = {i for i, r in train[pair.user].items() if r <= most}
            used = bad & set(pair.rejected)
            assert len(used) == min(len(bad), len(pair.chosen))
            assert set(pair.rejected) - used <= set(range(60)) - set(train[pair.user])
            want = (
                "rated" if len(used) == len(pair.chosen) else "rated+sampled" if used else "sampled"
            )
            assert pair.source == want
            sources.add(want)
    assert sources == {"rated", "rated+sampled", "sampled"}
    # each gets its turn
    pairs, _ = make_pairs(shop, 0, ("preference",), per_kind=40, k=1, users=[1])
    assert {pair.rejected[0] for pair in pairs} == {i for i, r in train[1].items() if r < 3}
    pairs, _ = make_pairs(shop_of(5, implicit=True), 0, ("preference",))
    assert pairs and all(pair.source == "sampled" for pair in pairs)


def side_of(shop, user=0, share=0.5, seed=0, neutral="exclude"):
    stock = Stock.of(shop)
    (buyer,) = buyers(shop, stock, neutral, 1.0, [user])
    return draw_side(buyer, stock, share, 20, np.random.default_rng(seed)), stock


def test_fill_is_drawn_by_popularity():
    """The first item of the fill is i with a probability proportional to popularity_i ^ 0.75."""
    shop = shop_of(4, n_items=12, per_user=6, implicit=True)
    count = popularity(shop)
    side, stock = side_of(shop)
    assert len(set(count.tolist())) > 4 and stock.weight**4 == pytest.approx(count**3)
    side = replace(side, page=side.page[:1])
    drawn = Counter(preference(side, stock, np.random.default_rng(n))[0][0] for n in range(4000))
    weight = {i: count[i] ** 0.75 for i in np.flatnonzero(side.buyer.free)}
    for item, w in weight.items():
        share = w / sum(weight.values())
        assert abs(drawn[item] / 4000 - share) < 4 * math.sqrt(share / 4000) + 1e-9


def test_order_of_a_rejected_page_is_random():
    side, stock = side_of(shop_of(5, n_users=30), user=1)
    places = {
        preference(side, stock, np.random.default_rng(n))[0].index(int(side.buyer.disliked[0]))
        for n in range(300)
    }
    assert places == set(range(len(side.page)))


def test_impossible_pages_give_none():
    shop = shop_of(0)
    side, stock = side_of(shop)
    rng = np.random.default_rng(0)
    nobody = replace(side.buyer, free=np.zeros(60, bool), disliked=np.zeros(0, np.int64))
    shut = replace(side, buyer=nobody)
    assert preference(shut, stock, rng) is None
    assert diversity(shut, stock, rng) is None and redundancy(shut, stock, rng) is None
    flat = replace(stock, level=np.full(60, -np.inf))
    assert ranked(replace(side, level=np.full(len(side.page), 4.0)), flat, rng) is None
    one = np.flatnonzero(shop.catalogue.leaf_id == 2)[:3].tolist()
    assert diversity(replace(side, page=one), stock, rng) is None  # a single category
    assert diversity(replace(side, page=one[:1]), stock, rng) is None


@law
@given(shops, st.integers(0, 9))
def test_a_page_is_the_ground_truth_page_of_what_the_history_leaves(shop, seed):
    s, near = item_scores(shop), near_duplicates(shop.catalogue)
    ties, liked = Ties(shop.n_users, shop.n_items), shop.csr("train")
    for pair in make_pairs(shop, seed, per_kind=2, k=7, label_share=0.7)[0]:
        items, ratings = liked.of(pair.user)
        label = ~np.isin(items, pair.history)
        mine, stars = items[label], ratings[label]
        tie = ties.of(pair.user, mine)
        page = ground_truth_page(mine, stars, shop.catalogue, s, near, tie)[0]
        assert pair.chosen == page.tolist()[:7]


@law
@given(shops, st.integers(0, 9), st.booleans())
def test_delta_is_to_the_last_bit_what_slot_by_slot_gives(shop, seed, literal):
    s, near = item_scores(shop), near_duplicates(shop.catalogue)
    leaf, known = shop.catalogue.leaf_id.tolist(), shop.csr("train", positive=None)
    for pair in make_pairs(shop, seed, per_kind=3, literal_swaps=literal)[0]:
        items, ratings = known.of(pair.user)
        worth = dict(zip(items.tolist(), gain(ratings, s[items]).tolist(), strict=True))
        value = [
            energy(page, [worth.get(item, 0.0) for item in page], leaf, near)
            for page in (pair.chosen, pair.rejected)
        ]
        assert pair.delta_E == value[0] - value[1]


def test_pages_of_one_slot_give_preference_pairs_only():
    pairs, counts = make_pairs(shop_of(0), 0, per_kind=1, k=1)
    assert {pair.kind for pair in pairs} == {"preference"}
    assert all(counts[kind]["impossible"] == counts[kind]["tried"] for kind in KINDS[1:])


# Where pairs come from


def test_only_train_rows_matter():
    """Validation and test rows may hold anything: the pairs stay the same."""
    shop = shop_of(6)
    held = shop.split != TRAIN
    rng = np.random.default_rng(0)
    rating, item = shop.rating.copy(), shop.item.copy()
    rating[held] = rng.integers(1, 6, held.sum())
    item[held] = rng.integers(0, 60, held.sum())
    other = replace(shop, rating=rating, item=item, positive=rating > 3)
    assert make_pairs(shop, 1) == make_pairs(other, 1)
    columns = ("user", "item", "rating", "time", "positive", "split")
    bare = replace(shop, **{name: getattr(shop, name)[~held] for name in columns})
    assert make_pairs(shop, 1) == make_pairs(bare, 1)


def test_a_draw_depends_on_its_own_place_only():
    """Only (seed, user, kind, draw) decide, not the other users, kinds or draws, or their order."""
    shop = shop_of(7)
    whole, _ = make_pairs(shop, 3, per_kind=3)
    assert len({pair.seed for pair in whole}) == len(whole)
    parts = [
        pair
        for users in ([5, 3], [0, 1, 2, 4], range(6, 12))
        for kind in KINDS[::-1]
        for pair in make_pairs(shop, 3, (kind,), per_kind=3, users=users)[0]
    ]
    assert sorted(whole, key=lambda p: p.seed) == sorted(parts, key=lambda p: p.seed)
    fewer, _ = make_pairs(shop, 3, per_kind=1)
    assert {pair.seed for pair in fewer} < {pair.seed for pair in whole}
    assert not {pair.seed for pair in make_pairs(shop, 4)[0]} & {pair.seed for pair in whole}
    # every draw splits anew
    assert len({tuple(pair.history) for pair in whole if pair.user == 5}) > 3


@law
@given(shops, st.integers(0, 9), st.booleans(), st.sampled_from([(64, 4096), (2, 4096), (64, 9)]))
def test_draws_made_together_are_those_made_one_by_one(shop, seed, literal, sizes):
    """Every page, edit and source, from the generator of the draw alone; also where few items are
    looked at first for a replacement, and where the catalogue counts as large."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(edits, "FIRST", sizes[0])
        patch.setattr(pairs, "WIDE", sizes[1])
        found, counts = make_pairs(shop, seed, per_kind=2, k=7, literal_swaps=literal)
    of_seed, stock, make = {pair.seed: pair for pair in found}, Stock.of(shop), makers(literal)
    made = Counter()
    for buyer in buyers(shop, stock, "exclude", 1.0, None):
        own = pair_seeds(seed, [buyer], KINDS, 2).tolist()
        for kind, at in zip(np.repeat(KINDS, 2).tolist(), own, strict=True):
            rng = np.random.default_rng(at)
            side = draw_side(buyer, stock, 0.5, 7, rng)
            edit, pair = make[kind](side, stock, rng), of_seed.get(at)
            made[kind] += edit is not None
            assert edit is not None or pair is None
            if pair is not None:
                assert (pair.user, pair.kind) == (buyer.user, kind)
                assert (pair.history, pair.chosen) == (side.history, side.page)
                edited = [slot for slot, is_new in enumerate(pair.mask) if is_new]
                assert (pair.rejected, edited) == (edit[0], sorted(edit[1]))
                assert pair.source == edit[2]
    for kind, count in counts.items():
        assert count["emitted"] + count["rejected"] == made[kind]


def test_the_margin_drops_pairs():
    shop = shop_of(8)
    whole, _ = make_pairs(shop, 0)
    some, counts = make_pairs(shop, 0, margin=0.5)
    assert some == [pair for pair in whole if pair.delta_E >= 0.5]
    assert sum(count["rejected"] for count in counts.values()) >= len(whole) - len(some) > 0


def test_label_share_sets_the_page():
    for share, sign in ((0.2, 1), (0.8, -1)):
        pairs, _ = make_pairs(shop_of(9, per_user=40), 0, ("preference",), label_share=share)
        assert all(sign * (len(pair.history) - len(pair.chosen)) > 0 for pair in pairs)
    pairs, _ = make_pairs(
        shop_of(9, n_items=200, per_user=120), 0, ("preference",), label_share=0.8
    )
    assert {len(pair.chosen) for pair in pairs} == {20}


@pytest.mark.parametrize(
    "wrong", [{"kinds": ("preference", "prefer")}, {"neutral": "maybe"}, {"per_kind": 0}, {"k": 0}]
)
def test_make_pairs_refuses(wrong):
    with pytest.raises(ValueError, match="make_pairs"):
        make_pairs(shop_of(0), **wrong)


@law
@given(shops, st.integers(0, 9))
def test_tables_read_back(shop, seed):
    pairs, _ = make_pairs(shop, seed, per_kind=1)
    back = from_table(to_table(pairs))
    assert len(back) == len(pairs)
    for a, b in zip(pairs, back, strict=True):
        assert np.array_equal(a.history_rating, b.history_rating, equal_nan=True)
        assert replace(a, history_rating=[]) == replace(b, history_rating=[])


def test_shops_without_pairs():
    pairs, counts = make_pairs(shop_of(0, per_user=1), 0)
    assert pairs == [] and to_table(pairs).num_rows == 0
    assert all(count["tried"] == 0 for count in counts.values())


def test_the_ranked_margin_drops_ranked_pairs_alone():
    shop = shop_of(8)
    whole, _ = make_pairs(shop, 0)
    some, _ = make_pairs(shop, 0, ranked_margin=0.3)
    assert some == [pair for pair in whole if pair.kind != "ranked" or pair.delta_E >= 0.3]
    assert len(some) < len(whole)
