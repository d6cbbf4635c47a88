"""Slots that a shop keeps for its new items: who they are, where they stand, what they replace."""

from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagellm import load
from pagellm.serving import recommend
from pagellm.serving.filters import Filters
from pagellm.serving.newcomers import is_new, places, with_new
from pagellm.serving.recommender import Ask, Recommender
from pagellm.serving.sources import Sources
from pagellm.stage.config import PageLLMError


@given(st.integers(1, 40), st.integers(1, 40))
def test_places_are_different_slots_spread_over_the_page(k, n):
    found = places(k, min(n, k))
    assert sorted(set(found)) == found and 0 <= found[0] and found[-1] < k
    assert places(20, 1) == [10] and places(20, 2) == [5, 15]


@given(
    st.lists(st.integers(0, 29), unique=True, max_size=10),
    st.lists(st.integers(30, 59), unique=True, max_size=10),
    st.sets(st.integers(0, 29)),
    st.integers(0, 10),
)
def test_the_page_gets_as_many_new_items_as_there_are(page, fresh, also_new, n):
    new = np.zeros(60, bool)
    new[[*also_new, *range(30, 60)]] = True
    found = with_new(page, fresh, new, n)
    assert len(found) == len(page) == len(set(found))
    had = sum(new[i] for i in page)
    assert sum(new[i] for i in found) == max(had, min(n, had + len(fresh), len(page)))
    assert [i for i in found if i in fresh] == fresh[: sum(i in fresh for i in found)]
    kept = [i for i in found if i not in fresh]
    assert kept == [i for i in page if i in kept]  # the others keep their order
    assert all(i in kept for i in page if new[i])
    old = [i for i in page if not new[i]]
    assert [i for i in old if i in kept] == old[: len(kept) - had]  # the last ones make room


def test_new_are_items_whose_first_row_is_late(rec):
    shop = rec.shop
    first = np.array([shop.time[shop.item == i].min() for i in range(shop.n_items)])
    days = (shop.time.max() - np.sort(first)[-4]) / 86400 + 0.5  # the four latest are new
    assert is_new(shop, days).tolist() == (first >= np.sort(first)[-4]).tolist()
    assert not is_new(replace(shop, time=np.zeros_like(shop.time)), days).any()


@pytest.fixture(scope="module")
def newest(rec):
    """Days such that some tenth of the items are new."""
    shop = rec.shop
    first = np.sort([shop.time[shop.item == i].min() for i in range(shop.n_items)])
    return float(shop.time.max() - first[-(shop.n_items // 10)]) / 86400 + 0.5


def loaded(served, **more):
    told = {"data": str(served / "data"), "runs": str(served / "runs"), "run": "base"}
    return Recommender.load(Sources(**told, device="cpu"), **more)


def seen_by(known, user):
    met = known.met.of(known.shop.user_ids.index(user))[0]
    return set(np.array(known.shop.catalogue.ids)[met])


def ids(answer):
    return [slot["item"] for slot in answer["items"]]


@pytest.mark.parametrize("policy", ["sft", "ppo", "compose", "plain"])
@pytest.mark.parametrize("mode", ["greedy", "beam"])
def test_pages_of_every_policy_keep_slots_for_new_items(composed, newest, policy, mode):
    known = loaded(composed, new_days=newest)
    shop = known.shop
    new = {name for name, is_new in zip(shop.catalogue.ids, known.new, strict=True) if is_new}
    people = [Ask(user=u, k=6, policy=policy, mode=mode) for u in shop.user_ids[:8]]
    plain = known.answers(people)
    for n in (1, 2, 6):
        pages = known.answers([replace(ask, new_items=n) for ask in people])
        for ask, before, after in zip(people, plain, pages, strict=True):
            seen = seen_by(known, ask.user)
            there = len(new - seen)
            assert sum(i in new for i in ids(after)) >= min(n, there)
            assert len(set(ids(after))) == 6 and not seen & set(ids(after))
            rest = [i for i in ids(after) if i not in new or i in ids(before)]
            assert rest == [i for i in ids(before) if i in rest]
            assert all(np.isfinite(slot["score"]) for slot in after["items"])
            assert len(after["items"]) == 6 and [s["rank"] for s in after["items"]] == [
                1,
                2,
                3,
                4,
                5,
                6,
            ]


def test_filters_hold_for_new_items_too_and_a_service_may_keep_slots_for_all(served, newest):
    known = loaded(served, new_days=newest, new_items=3)
    new = [name for name, there in zip(known.shop.catalogue.ids, known.new, strict=True) if there]
    user = known.shop.user_ids[0]
    seen = np.array(known.shop.catalogue.ids)[known.met.of(0)[0]]
    one = next(name for name in new if name not in seen)
    without = tuple(name for name in new if name != one)
    (page,) = known.answers([Ask(user=user, k=6, filters=Filters(exclude=without))])
    assert [name for name in ids(page) if name in new] == [one]
    (none,) = known.answers([Ask(user=user, k=6, new_items=0)])
    (small,) = known.answers([Ask(user=user, k=2)])  # fewer slots than are kept by default
    assert len(ids(small)) == 2 and ids(none) == ids(
        loaded(served).answers([Ask(user=user, k=6)])[0]
    )
    (wrong,) = known.answers([Ask(user=user, k=2, new_items=3)])
    assert isinstance(wrong, PageLLMError) and "k=2 has not so many slots" in str(wrong)


def test_rewards_are_those_of_the_page_that_is_shown(served, newest):
    known = loaded(served, new_days=newest)
    user = known.shop.user_ids[0]
    (page,) = known.answers([Ask(user=user, k=6, new_items=2)])
    (scored,) = known.answers([Ask(user=user, page=tuple(ids(page)))])
    assert scored["page_reward"] == pytest.approx(page["page_reward"], abs=1e-4)


def test_everybodys_file_keeps_the_slots_too(served, newest, tmp_path):
    told = {"data": str(served / "data"), "runs": str(served / "runs"), "run": "base", "k": 6}
    told |= {"all": True, "device": "cpu", "depth": 12, "policy": "sft", "new_days": newest}
    rows = {}
    for n in (0, 2):
        out = str(tmp_path / f"{n}.parquet")
        recommend.run(recommend.Config(out=out, new_items=n, **told))
        rows[n] = pq.read_table(out).to_pandas()
    known = loaded(served, new_days=newest)
    new = np.array(known.shop.catalogue.ids)[known.new]
    for user, page in rows[2].groupby("user_id"):
        before = rows[0][rows[0].user_id == user]
        assert page["rank"].tolist() == list(range(1, len(page) + 1)) and page.item_id.is_unique
        assert page.page.sum() == before.page.sum() and page.item_id[page.page].isin(
            new
        ).sum() >= min(2, len(set(new) - seen_by(known, user)))
        assert page.score.is_monotonic_decreasing
        gone = set(before.item_id[before.page]) - set(page.item_id[page.page])
        later = page.item_id[~page.page].tolist()
        assert set(later[: len(gone)]) == gone  # what made room comes next
        answer = known.answers([Ask(user=user, k=6, policy="sft", new_items=2)])[0]
        assert ids(answer) == page.item_id[page.page].tolist()


def test_a_log_without_times_says_so(served, rec):
    known = loaded(served)
    known.shop = replace(rec.shop, time=np.zeros_like(rec.shop.time))
    (wrong,) = known.answers([Ask(user=rec.shop.user_ids[0], k=6, new_items=1)])
    assert "has no times" in str(wrong) and "--time_column" in str(wrong)
    with pytest.raises(PageLLMError, match="0 to 6, the slots of a page"):
        recommend.Config(user="u", k=6, new_items=7)


def test_pages_in_python_keep_them_too(served, rec):
    model = load("base", runs=str(served / "runs"))
    new = np.array(rec.shop.catalogue.ids)[model.recommender.new].tolist()
    pages = model.pages(users=rec.shop.user_ids[:3], k=5, new_items=1).to_pylist()
    for user in rec.shop.user_ids[:3]:
        mine = [row["item"] for row in pages if row["user"] == user]
        assert len(mine) == 5
        assert any(i in new for i in mine) or not set(new) - seen_by(model.recommender, user)
    with pytest.raises(PageLLMError, match="want 0 to k=5"):
        model.pages(history=[], k=5, new_items=6)
