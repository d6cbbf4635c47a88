"""Missions, contexts and rankers."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagellm.data.orders import Orders
from pagellm.data.shop import Rows
from pagellm.stage.config import PageLLMError
from pagellm.storefront.build import read_policy, read_stock
from pagellm.storefront.context import Known, contexts
from pagellm.storefront.missions import (
    Missions,
    Shelves,
    affinity,
    category_names,
    cohesion,
    find_missions,
    joint_counts,
    missions,
    refined,
    top_of_groups,
)
from pagellm.storefront.rankers import (
    Als,
    Blend,
    Factors,
    File,
    Frequency,
    Platt,
    calibration_error,
    fit_factors,
    fit_platt,
    fold_in,
)
from tests.storefront.golden import AT, HOUSEHOLDS, catalogue, golden_orders, golden_shop


def baskets(lists):
    indptr = np.cumsum([0, *map(len, lists)])
    items = np.array([i for some in lists for i in some], np.int64)
    return Rows(indptr, items, np.full(len(items), np.nan, np.float32))


SIX = baskets([[0, 1], [0, 1], [0, 2], [2, 3], [2, 3], [1]])


def test_affinities_worked_out_by_hand():
    """ln((n_ij B + 1) / (n_i n_j + 1)) of six baskets."""
    joint = joint_counts(SIX, np.arange(4), 4)
    assert joint[0].tolist() == [3, 2, 1, 0]
    found = affinity(joint, 6)
    wanted = [math.log(19 / 10), math.log(13 / 10), 0.0, 0.0]
    assert found[0] == pytest.approx(wanted) and wanted[:2] == pytest.approx(
        [0.6419, 0.2624], abs=1e-4
    )
    assert found[2, 3] == pytest.approx(0.6190, abs=1e-4)


def test_categories_that_are_bought_together_share_a_mission():
    lists = [[0, 1], [1, 2], [0, 2], [3, 4], [4, 5], [3, 5]] * 20
    found = missions(baskets(lists), np.arange(6), k=2)
    assert len(set(found[:3])) == len(set(found[3:])) == 1 and found[0] != found[3]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.integers(0, 7), min_size=1, max_size=4), min_size=1, max_size=12),
       st.integers(1, 5))  # fmt: skip
def test_every_category_has_one_of_k_missions_and_the_order_of_baskets_moves_none(lists, k):
    lists = [sorted(set(some)) for some in lists]
    found = missions(baskets(lists), np.arange(8), k)
    assert found.shape == (8,) and found.min() >= 0 and found.max() < k
    assert missions(baskets(lists[::-1]), np.arange(8), k).tolist() == found.tolist()


def test_no_mission_at_all_is_refused():
    with pytest.raises(ValueError, match="k=0"):
        missions(SIX, np.arange(4), 0)


@given(st.lists(st.integers(-1, 3), min_size=1, max_size=12), st.integers(1, 4))
def test_the_first_of_each_group_stay_in_order(group, most):
    group = np.array(group)
    order = np.random.default_rng(0).permutation(len(group))
    top = top_of_groups(order, group, 4, most)
    for g in range(4):
        wanted = [i for i in order.tolist() if group[i] == g][:most]
        assert top[g].tolist() == wanted + [-1] * (most - len(wanted))


def test_a_shop_without_categories_goes_by_title_words():
    shop = catalogue()
    bare = type(shop).of(
        [str(n) for n in range(24)], ["red mug"] * 12 + ["blue plate"] * 12, [""] * 24, [()] * 24,
        [""] * 24, [""] * 24, np.full(24, np.nan),
    )  # fmt: skip
    names = category_names(bare)
    assert len(set(names[:12])) == len(set(names[12:])) == 1 and names[0] != names[12]


def test_missions_of_a_shop():
    found = find_missions(catalogue(), golden_orders().only("train"), k=3)
    assert found.of_item.tolist() == found.of_category[found.category].tolist()


def test_a_context_knows_nothing_at_its_moment_or_later():
    shop, orders = golden_shop(), golden_orders()
    one, two, three, stranger = contexts(shop, orders, ["u1", "u2", "u3", None], AT)
    assert dict(zip(one.item.tolist(), one.count.tolist(), strict=True)) == {0: 5, 4: 4, 9: 3, 7: 1}
    assert two.item.tolist() == [2, 10]
    assert len(three.item) == len(stranger.item) == 0
    assert three.bucket == stranger.bucket == "cold:en"
    early = contexts(shop, orders, ["u1"], AT - 3 * 86_400)[0]
    assert early.count.max() == 2


def test_shares_of_missions_sum_to_one_and_are_even_for_strangers():
    shop, orders = golden_shop(), golden_orders()
    mission = np.arange(12) % 3
    known = Known.of(shop, orders, mission, 3, AT)
    assert known.context("u1").mission.sum() == pytest.approx(1)
    assert known.context(None).mission.tolist() == pytest.approx([1 / 3] * 3)


def test_frequency_logits_of_the_golden_shop():
    """-3 + ln(1 + orders) + households / 90."""
    person = contexts(golden_shop(), golden_orders(), ["u1"], AT)[0]
    logit = Frequency(HOUSEHOLDS)(person)
    wanted = {0: -0.2082, 4: -0.7239, 9: -0.7248, 7: -2.0291, 8: -2.3889, 5: -2.5, 1: -2.6111}
    for item, value in wanted.items():
        assert logit[item] == pytest.approx(value, abs=1e-4)


def test_folding_in_is_the_weighted_least_squares_solution():
    """sum_i c_i (w_i - x.y_i)^2 + 50 |x|^2 is flat at x."""
    rng = np.random.default_rng(0)
    Y = rng.normal(size=(9, 4))
    item, count = np.array([1, 5]), np.array([2, 7])
    x = fold_in(Factors.of(Y), item, count)
    c, w = np.ones(9), np.zeros(9)
    c[item] += 10 * np.log1p(count)
    w[item] = 1
    gradient = Y.T @ (c * (w - Y @ x)) - 50 * x
    assert np.abs(gradient).max() < 1e-9


def test_taste_ranks_what_alike_people_bought_above_what_others_did():
    lists = [[0, 1, 2], [0, 1], [1, 2], [0, 2]] * 10 + [[3, 4, 5], [3, 4], [4, 5]] * 10
    rows = baskets(lists)
    factors = fit_factors(rows, np.ones(len(rows.items), np.int64), 6)
    person = contexts(golden_shop(), golden_orders(), [None], AT)[0]
    person = type(person)(
        None, "b", AT, np.array([0]), np.array([1]), person.mission, person.barred
    )
    logit = Als(factors, np.ones(6))(person)
    assert logit[[1, 2]].min() > logit[[3, 4, 5]].max()
    assert Blend(factors, np.ones(6))(person)[0] == pytest.approx(0.5 * logit[0] + math.log(2))


@given(st.integers(0, 1000), st.floats(-2, 2), st.floats(0.5, 2))
@settings(max_examples=20, deadline=None)
def test_platt_s_rule_finds_the_slope_that_made_the_labels(seed, alpha, beta):
    logit = np.linspace(-4, 4, 400)
    share = Platt(alpha, beta)(logit)
    found = fit_platt(
        np.r_[logit, logit], np.r_[np.ones(400), np.zeros(400)], np.r_[share, 1 - share]
    )
    assert (found.alpha, found.beta) == (
        pytest.approx(alpha, abs=1e-3),
        pytest.approx(beta, abs=1e-3),
    )


def test_a_perfect_calibration_has_no_error():
    p = np.repeat([0.2, 0.8], 100)
    bought = np.r_[np.arange(100) < 20, np.arange(100) < 80]
    assert calibration_error(p, bought, np.ones(200), bins=2) == pytest.approx(0)
    assert calibration_error(1 - p, bought, np.ones(200), bins=2) == pytest.approx(0.6)


def test_labels_all_alike_cannot_be_calibrated():
    with pytest.raises(ValueError, match="want some that were bought"):
        fit_platt(np.zeros(3), np.ones(3), np.ones(3))


def test_scores_of_a_ranker_outside_are_read_by_the_shops_own_ids(tmp_path, capsys):
    """Ids are text, rows of strangers are counted on the screen, and no score is chosen of two."""
    (tmp_path / "x.csv").write_text("user,item,score\n007,a,0.5\n7,b,2\n007,c,1\n")
    sold = np.array([2, 9, 4])
    file = File.read(tmp_path / "x.csv", ["007", "8"], ["a", "b", "c"], sold)
    assert file.rows.of(0)[0].tolist() == [0, 2] and file.rows.of(0)[1].tolist() == [0.5, 1.0]
    said = capsys.readouterr().out
    assert "3 rows; columns user, item, score; none left over" in said
    assert "of 3 rows 1 left out, whose user or item the shop has not; the first: 7, b" in said
    assert "of 2 users 1 without a score" in said
    for text, said in (
        ("user,item,score\n007,a,1\n007,a,2\n", "two scores for one item"),
        ("user,item,score\n007,a,one\n", "column score is not numbers"),
        ("user,item,score\nx,a,1\n", "no user and item of this shop"),
        ("user,item,points\n007,a,1\n", "no column score"),
    ):
        (tmp_path / "x.csv").write_text(text)
        with pytest.raises(PageLLMError, match=said):
            File.read(tmp_path / "x.csv", ["007", "8"], ["a", "b", "c"], sold)


def test_files_of_a_shop_may_begin_with_a_byte_order_mark(tmp_path):
    shop = golden_shop()
    gone = shop.catalogue.ids[3]
    (tmp_path / "gone.txt").write_bytes(b"\xef\xbb\xbf" + gone.encode() + b"\r\n")
    stock = read_stock(str(tmp_path / "gone.txt"), shop.catalogue)
    assert np.flatnonzero(~stock).tolist() == [3]
    (tmp_path / "policy.json").write_bytes(b'\xef\xbb\xbf{"banned": ["zebra"]}')
    assert read_policy(str(tmp_path / "policy.json")).banned.found("a zebra")
    (tmp_path / "policy.json").write_text("{")
    with pytest.raises(PageLLMError, match=r"policy\.json is no JSON"):
        read_policy(str(tmp_path / "policy.json"))


def test_shelves_count_the_best_rows_of_ten_or_fewer():
    """One person: mission 0 holds three items of which two have room, mission 1 holds one."""
    shelves = Shelves(np.array([[0, 1, 0, 2, -1]]), np.array([[0.5, 0.4, 0.3, 0.2, 0.9]]))
    of_category = np.array([0, 0, 1])
    assert shelves.held(of_category, rows=2, slots=2) == pytest.approx(0.5 + 0.4 + 0.2)
    assert shelves.held(of_category, rows=1, slots=3) == pytest.approx(1.2)


def test_refined_missions_hold_more_and_stay_as_close_together():
    """Twelve categories bought in threes; people want what three of them at once would not hold."""
    rng = np.random.default_rng(0)
    n, per = 12, 10
    leaf = np.repeat(np.arange(n), per)
    baskets = []
    for _ in range(400):
        group = rng.integers(4)
        some = rng.choice(np.arange(3 * group, 3 * group + 3), 2, replace=False)
        extra = rng.integers(n, size=1)
        baskets.append(np.unique(np.r_[some, extra] * per + rng.integers(per)))
    size = [len(b) for b in baskets]
    item = np.concatenate(baskets)
    lines = len(item)
    basket = np.repeat(np.arange(400), size)
    zero = np.zeros(lines, np.int64)
    orders = Orders(
        basket % 50, item, basket, basket, zero + 1, np.ones(lines, np.float32),
        zero.astype(np.int8), 50, n * per,
    )  # fmt: skip
    of_category = missions(orders.baskets(), leaf, 4)
    names = [f"c{c}" for c in range(n)]
    found = Missions(leaf, names, of_category, of_category[leaf], 4)
    shelves = Shelves(rng.integers(3, size=(40, 60)), np.tile(np.linspace(1, 0.1, 60), (40, 1)))
    better = refined(found, orders, shelves)
    likeness = affinity(joint_counts(orders.baskets(), leaf, n), 400)
    sales = np.bincount(leaf[item], minlength=n).astype(float)
    assert shelves.held(better.of_category) >= shelves.held(found.of_category)
    least = 0.98 * cohesion(found.of_category, likeness, sales)
    assert cohesion(better.of_category, likeness, sales) >= least - 1e-12
    assert better.of_item.tolist() == better.of_category[leaf].tolist()
    total = np.bincount(better.of_category, sales, minlength=4)
    assert (np.diff(total) <= 0).all()  # the mission with the most sales is still the first
    same = refined(found, orders, shelves)
    assert same.of_category.tolist() == better.of_category.tolist()


def test_more_starts_hold_no_less_and_are_the_same_every_time():
    """The first start is among more of them; baskets without a pattern make starts differ."""
    rng = np.random.default_rng(1)
    item, basket = rng.integers(24, size=300), np.arange(300) // 3
    zero = np.zeros(300, np.int64)
    orders = Orders(
        basket % 20, item, basket, basket, zero + 1, np.ones(300, np.float32),
        zero.astype(np.int8), 20, 24,
    )  # fmt: skip
    leaf = np.arange(24)
    of_category = missions(orders.baskets(), leaf, 6)
    found = Missions(leaf, [f"c{c}" for c in leaf], of_category, of_category, 6)
    shelves = Shelves(rng.integers(24, size=(20, 60)), rng.random((20, 60)))
    made = [refined(found, orders, shelves, starts, seed=3) for starts in (1, 2, 4, 8)]
    held = [shelves.held(one.of_category) for one in made]
    assert held == sorted(held) and held[0] < held[-1]
    again = refined(found, orders, shelves, 8, seed=3)
    assert again.of_category.tolist() == made[-1].of_category.tolist()


@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_what_rows_hold_is_what_filling_them_item_by_item_gives(seed, rows, slots):
    rng = np.random.default_rng(seed)
    shelves = Shelves(rng.integers(-1, 6, size=(3, 12)), rng.random((3, 12)))
    of_category = rng.integers(0, 4, size=6)
    total = 0.0
    for categories, clicks in zip(shelves.category, shelves.clicks, strict=True):
        row = [[] for _ in range(4)]
        for c, click in zip(categories, clicks, strict=True):
            if c >= 0 and len(row[of_category[c]]) < slots:
                row[of_category[c]].append(click)
        total += sum(sorted(map(sum, row))[::-1][:rows]) / 3
    assert shelves.held(of_category, rows, slots) == pytest.approx(total)
