"""Pages on request: filters hold in every slot; caches and batches change nothing."""

import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pagellm.model.policy import MODES
from pagellm.serving import recommender
from pagellm.serving.cache import Cache
from pagellm.serving.filters import Filters
from pagellm.serving.recommender import Ask, Recommender
from pagellm.serving.sources import Sources
from pagellm.stage.config import PageLLMError


def ids(answer):
    return [slot["item"] for slot in answer["items"]]


def one(rec, **ask):
    (answer,) = rec.answers([Ask(**{"k": 6} | ask)])
    return answer


@pytest.mark.parametrize("mode", MODES)
def test_a_known_users_page_is_the_page_that_evaluation_scores(rec, mode):
    """Prompts from the cache or read on the spot: Policy.rank knows no cache."""
    history, met = rec.shop.csr("train"), rec.shop.csr(("train", "valid"), positive=None)
    ranked = rec.policies["ppo"].rank(np.arange(rec.shop.n_users), history, met, 6, 6, mode)
    answers = rec.answers([Ask(user=name, k=6, mode=mode) for name in rec.shop.user_ids])
    assert [[rec.item_of[i] for i in ids(a)] for a in answers] == [
        [i for i in row if i >= 0] for row in ranked.item.tolist()
    ]


@pytest.mark.parametrize("split, told, met", [("valid", "train", "train"), ("none", None, None)])
def test_split_says_what_the_prompts_show_and_what_no_page_holds(rec, split, told, met):
    r = Recommender(rec.shop, rec.policies, rec.reward, rec.hashes, split)
    user = int(np.argmax(rec.shop.csr(None).counts()))
    case = r.resolve(Ask(user=rec.shop.user_ids[user]))
    assert case.items.tolist() == rec.shop.csr(told).of(user)[0].tolist()
    assert sorted(case.seen) == sorted(rec.shop.csr(met, positive=None).of(user)[0])


@pytest.mark.parametrize("mode", MODES)
def test_caches_and_neighbours_change_no_page(rec, mode):
    """The same page and scores, with a cold cache, a warm one or none, alone or in a batch."""
    some = [
        Ask(user=rec.shop.user_ids[3], k=6, mode=mode),
        Ask(history=((rec.shop.catalogue.ids[1], 5.0),), k=4, mode=mode),
        Ask(k=6, mode=mode),
    ]
    plain = Recommender(rec.shop, rec.policies, rec.reward, rec.hashes, cache=Cache(0))
    kept = Recommender(rec.shop, rec.policies, rec.reward, rec.hashes, cache=Cache(1 << 24))
    alone = [plain.answers([ask])[0] for ask in some]
    for answers in (kept.answers(some), kept.answers(some), kept.answers(some + some)[3:]):
        for a, b in zip(alone, answers, strict=True):
            assert ids(a) == ids(b)
            assert [s["score"] for s in b["items"]] == pytest.approx(
                [s["score"] for s in a["items"]], abs=1e-4
            )
            assert b["page_reward"] == pytest.approx(a["page_reward"], abs=1e-4)
    assert kept.cache.hits > 0 and kept.cache.size > 0 and len(plain.cache) == 0


def test_rewards_from_kept_prompts_are_those_of_the_model_alone(rec):
    """RewardModel.forward reads prompt and page together and knows no cache.

    Kept prompts are found by the reward model's hash.
    """
    shared = Cache(1 << 24)
    r = Recommender(rec.shop, rec.policies, rec.reward, rec.hashes, cache=shared)
    cases = [
        r.resolve(ask)
        for ask in (Ask(user=rec.shop.user_ids[3]), Ask(), Ask(user=rec.shop.user_ids[5]))
    ]
    item = torch.tensor([[4, 9, 2], [1, 0, 7], [8, 3, -1]])
    reader = rec.policies["sft"]
    prompt, valid = reader.prompt([c.user for c in cases], [(c.items, c.ratings) for c in cases])
    want = rec.reward(prompt, valid, item, item >= 0)
    for _ in range(2):
        token, page = r.rewards(cases, item, item >= 0)
        torch.testing.assert_close(token, want[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(page, want[1], atol=1e-5, rtol=1e-5)
    missed = shared.misses
    r.rewards(cases, item, item >= 0)
    assert shared.misses == missed
    Recommender(
        rec.shop, rec.policies, rec.reward, rec.hashes | {"reward": "other"}, cache=shared
    ).rewards(cases, item, item >= 0)
    assert shared.misses == missed + len(cases)


def test_the_cache_is_not_read_under_another_models_hash(rec):
    shared = Cache(1 << 24)
    ask = Ask(user=rec.shop.user_ids[0], k=6)
    first = Recommender(rec.shop, rec.policies, rec.reward, rec.hashes, cache=shared)
    swapped = {"ppo": rec.policies["sft"], "sft": rec.policies["ppo"]}
    other = Recommender(rec.shop, swapped, rec.reward, rec.hashes | {"ppo": "other"}, cache=shared)
    first.answers([ask])
    fresh = Recommender(
        rec.shop, swapped, rec.reward, rec.hashes | {"ppo": "other"}, cache=Cache(0)
    )
    assert [s["score"] for s in other.answers([ask])[0]["items"]] == pytest.approx(
        [s["score"] for s in fresh.answers([ask])[0]["items"]], abs=1e-5
    )


@given(sizes=st.lists(st.integers(0, 9), max_size=30))
@settings(deadline=None)
def test_a_cache_keeps_the_last_used_within_its_room(sizes):
    cache = Cache(20)
    for key, size in enumerate(sizes):
        cache.put(key, size, size)
        assert cache.get(key) == size and cache.size <= 20
    assert cache.size == sum(size for key, size in enumerate(sizes) if cache.get(key) is not None)
    cache.put("large", 1, 21)
    assert cache.get("large") is None


@given(data=st.data())
@settings(deadline=None, max_examples=40)
def test_filters_hold_in_every_slot_and_fill_the_page_as_far_as_they_allow(rec, data):
    c = rec.shop.catalogue
    some_ids = st.lists(st.sampled_from(c.ids), max_size=40)
    price = st.none() | st.floats(0, 100)
    f = Filters(
        exclude=tuple(data.draw(some_ids)),
        categories=data.draw(
            st.none() | st.lists(st.sampled_from([*rec.members, "?"]), max_size=4).map(tuple)
        ),
        in_stock=data.draw(st.none() | some_ids.map(tuple)),
        price_min=data.draw(price),
        price_max=data.draw(price),
    )
    user = data.draw(st.none() | st.integers(0, rec.shop.n_users - 1))
    k, mode = data.draw(st.integers(1, 12)), data.draw(st.sampled_from(MODES))
    met = (
        set()
        if user is None
        else set(rec.shop.csr(("train", "valid"), positive=None).of(user)[0].tolist())
    )

    def passes(i):
        return (
            i not in met
            and c.ids[i] not in f.exclude
            and (f.categories is None or {*c.categories[i], c.leaf[i]} & set(f.categories) - {""})
            and (f.in_stock is None or c.ids[i] in f.in_stock)
            and (f.price_min is None or c.price[i] >= np.float32(f.price_min))
            and (f.price_max is None or c.price[i] <= np.float32(f.price_max))
        )

    legal = {c.ids[i] for i in range(len(c)) if passes(i)}
    answer = one(
        rec, user=None if user is None else rec.shop.user_ids[user], filters=f, k=k, mode=mode
    )
    page = ids(answer)
    assert set(page) <= legal and len(set(page)) == len(page) == min(k, len(legal))
    assert bool(answer["notes"]) == (len(page) < k)
    assert all(
        math.isfinite(s["score"]) and math.isfinite(s["token_reward"]) for s in answer["items"]
    )


def test_filters_act_inside_decoding(rec):
    """The softmax runs over what passes the filters.

    The only item in stock has probability 1, and two items share it.
    """
    a, b = rec.shop.catalogue.ids[:2]
    only = one(rec, filters=Filters(in_stock=(a,)))
    assert ids(only) == [a] and only["items"][0]["score"] == pytest.approx(0, abs=1e-6)
    first = one(rec, k=1, filters=Filters(in_stock=(a, b)))["items"][0]
    free = rec.write("ppo", [rec.resolve(Ask(k=1))], 1, "greedy")[0].first[0]
    both = free[:2].log_softmax(0)
    assert first["item"] == (a, b)[int(both.argmax())]
    assert first["score"] == pytest.approx(float(both.max()), abs=1e-5)


def test_an_item_of_unknown_price_fails_a_price_filter(rec):
    price = rec.price.clone()
    r = Recommender(rec.shop, rec.policies, rec.reward, rec.hashes)
    r.price = price.index_fill(0, price.new_tensor([0, 1]).long(), math.nan)
    page = ids(one(r, k=len(price), filters=Filters(price_min=0.0)))
    assert len(page) == len(price) - 2 and not set(page) & set(rec.shop.catalogue.ids[:2])
    r.price = torch.full_like(price, math.nan)
    answer = one(r, k=3, filters=Filters(price_max=30.0))
    assert answer["items"] == [] and "no item of this data set has a price" in answer["notes"][0]
    assert one(r, k=3)["notes"] == []


def test_a_strangers_page_follows_the_history_alone(rec):
    known = ((rec.shop.catalogue.ids[4], 5.0), (rec.shop.catalogue.ids[9], math.nan))
    nobody, stranger = (
        one(rec, history=known),
        one(rec, user="never met", history=(*known, ("no such item", 3.0))),
    )
    assert ids(nobody) == ids(stranger) and nobody["user"]["history"] == 2
    assert stranger["unknown"] == {"user": True, "items": ["no such item"], "categories": []}
    assert not stranger["user"]["known"] and not nobody["unknown"]["user"]
    assert not {item for item, _ in known} & set(ids(nobody))
    assert len(ids(one(rec))) == 6  # nothing at all: <user_unk> and an empty history


def test_what_was_rated_low_is_kept_off_the_page_and_out_of_the_prompt(rec):
    disliked = ids(one(rec))[0]
    page = one(rec, history=((disliked, 2.0),))
    assert page["user"]["history"] == 0 and ids(page) == ids(
        one(rec, filters=Filters(exclude=(disliked,)))
    )


def test_a_typed_history_follows_the_stored_one_and_overrides_it(rec):
    user = int(np.argmax(rec.history.counts()))
    stored = rec.history.of(user)[0].tolist()
    new = next(i for i in range(rec.shop.n_items) if i not in rec.met.of(user)[0])
    name = rec.shop.catalogue.ids
    case = rec.resolve(
        Ask(
            user=rec.shop.user_ids[user],
            history=(
                (name[stored[0]], 1.0),
                (name[stored[1]], 4.0),
                (name[new], 5.0),
                (name[stored[1]], 5.0),
            ),
        )
    )
    assert case.items.tolist() == [*stored[2:], new, stored[1]] and case.ratings[-2:].tolist() == [
        5.0,
        5.0,
    ]
    assert {new, *stored} <= set(case.seen.tolist())


def test_scoring_the_written_order_gives_the_written_rewards(rec):
    user = rec.shop.user_ids[5]
    page = one(rec, user=user)
    again = one(rec, user=user, page=tuple(ids(page)))
    assert [s["token_reward"] for s in again["items"]] == pytest.approx(
        [s["token_reward"] for s in page["items"]], abs=1e-5
    )
    for number in ("page_reward", "energy", "ild", "entropy"):
        assert again[number] == pytest.approx(page[number], abs=1e-5)
    turned = one(rec, user=user, page=(*reversed(ids(page)), "no such item"))
    assert ids(turned) == ids(page)[::-1] and turned["unknown"]["items"] == ["no such item"]
    assert turned["page_reward"] != pytest.approx(page["page_reward"], abs=1e-6)
    assert turned["ild"] == pytest.approx(page["ild"])
    assert one(rec, page=())["page_reward"] is None


def test_answers_come_in_order_and_one_that_fails_stands_alone(rec):
    item = rec.shop.catalogue.ids[0]
    answers = rec.answers(
        [Ask(k=3), Ask(page=(item, item)), Ask(k=2, policy="sft"), Ask(k=10**6), Ask(k=5)]
    )
    assert [len(ids(answers[i])) for i in (0, 2, 4)] == [3, 2, 5]
    assert "repeats" in str(answers[1]) and "at most" in str(answers[3])
    assert ids(answers[0]) == ids(answers[4])[:3] and answers[2]["model"] == rec.hashes["sft"]


def test_explained_slots_name_the_nearest_history_and_later_choices(rec):
    user = int(np.argmax(rec.held.counts()))
    answer = one(rec, user=rec.shop.user_ids[user], k=40, explain=True)
    held = {rec.shop.catalogue.ids[i] for i in rec.held.of(user)[0]}
    assert {s["item"] for s in answer["items"] if s["held_out"]} == held & set(ids(answer)) != set()
    table = rec.unit["ppo"].numpy()
    for slot in answer["items"]:
        history = rec.history.of(user)[0]
        cosines = table[history] @ table[rec.item_of[slot["item"]]]
        assert [x["similarity"] for x in slot["similar"]] == pytest.approx(
            sorted(cosines)[::-1][:2], abs=1e-3
        )


def test_weights_that_do_not_belong_together_are_refused(served, rec, tmp_path, monkeypatch):
    shutil.copytree(served / "runs", tmp_path / "runs")
    shutil.copytree(served / "data", tmp_path / "data")
    sources = Sources(
        run="base", data=str(tmp_path / "data"), runs=str(tmp_path / "runs"), device="cpu"
    )
    with open(tmp_path / "runs" / "base" / "ppo" / "model.pt", "ab") as file:
        file.write(b"\0")
    with pytest.raises(PageLLMError, match="changed or damaged"):
        Recommender.load(sources)
    done = tmp_path / "runs" / "base" / "ppo" / "done"
    ids = iter(["before", "after", "after", "after"])
    with monkeypatch.context() as m:
        m.setattr(recommender, "finished", lambda *_: {"id": next(ids)})
        with pytest.raises(PageLLMError, match="changed while"):
            m.setattr(recommender.Policy, "load", lambda *_: rec.policies["ppo"])
            Recommender.load(sources, ("ppo",), reward=False)
    done.unlink()
    with pytest.raises(PageLLMError, match="make ppo"):
        Recommender.load(sources, ("ppo",))
    fewer = rec.shop.__class__(**{**vars(rec.shop), "n_users": 3})
    with pytest.raises(PageLLMError, match="3 and"):
        Recommender(fewer, rec.policies, rec.reward, rec.hashes)
    narrow = SimpleNamespace(trunk=SimpleNamespace(n_users=3, n_items=rec.shop.n_items))
    with pytest.raises(PageLLMError, match="reward was made for 3 users"):
        Recommender(rec.shop, rec.policies, narrow, rec.hashes)


def sources(root, **more):
    return Sources(
        run="base", data=str(root / "data"), runs=str(root / "runs"), device="cpu", **more
    )


def test_what_is_there_is_taken(served, sft_alone, tmp_path):
    """PPO where it is finished, else SFT; rewards where there is a reward model."""

    def loaded(*stages):
        runs = tmp_path / "-".join(stages)
        for name in stages:
            shutil.copytree(served / "runs" / "base" / name, runs / "base" / name)
        return Recommender.load(replace(sources(served), runs=str(runs)))

    for stages, policies, default in (
        (("sft",), ["sft"], "sft"),
        (("sft", "reward"), ["sft"], "sft"),
        (("ppo",), ["ppo"], "ppo"),
        (("sft", "ppo", "reward"), ["ppo", "sft"], "ppo"),
    ):
        r = loaded(*stages)
        assert sorted(r.policies) == policies and r.default == default
        answer = one(r, user=r.shop.user_ids[0])
        assert answer["policy"] == default and answer["model"] == r.hashes[default]
        has_reward = "reward" in stages
        rewards = [answer["page_reward"], *(s["token_reward"] for s in answer["items"])]
        assert [x is not None for x in rewards] == [has_reward] * 7
        assert answer["reward_model"] == r.hashes.get("reward")
    begun = sources(sft_alone).where("ppo")
    begun.mkdir()
    (begun / "config.json").write_text("{}")
    assert Recommender.load(sources(sft_alone)).default == "sft"  # PPO is still in training
    shutil.rmtree(begun)


def test_what_is_missing_is_named(sft_alone, tmp_path):
    with pytest.raises(PageLLMError, match="no PageLLM policy(.|\\n)*make ppo"):
        Recommender.load(sources(sft_alone), ("ppo",))
    with pytest.raises(PageLLMError, match="no reward model(.|\\n)*make reward"):
        Recommender.load(sources(sft_alone), reward=True)
    with pytest.raises(PageLLMError, match="no reward model in .*other"):
        Recommender.load(sources(sft_alone, reward_run="other"))
    with pytest.raises(PageLLMError, match="no SFT policy(.|\\n)*make sft"):
        Recommender.load(replace(sources(sft_alone), runs=str(tmp_path)))
    (error,) = Recommender.load(sources(sft_alone)).answers([Ask(policy="ppo")])
    assert "policy=ppo: not served here, there is sft" in str(error)


def test_sfts_page_does_not_depend_on_what_else_is_there(rec, sft_alone):
    alone = Recommender.load(sources(sft_alone, split="test"))
    for user in rec.shop.user_ids[:4]:
        a, b = one(alone, user=user), one(rec, user=user, policy="sft")
        assert [(s["item"], s["score"]) for s in a["items"]] == [
            (s["item"], pytest.approx(s["score"], abs=1e-5)) for s in b["items"]
        ]
        assert a["energy"] == b["energy"] and a["ild"] == b["ild"]
    order = tuple(reversed(ids(a)))
    scored = one(alone, user=user, page=order)
    assert tuple(ids(scored)) == order and scored["page_reward"] is None


def test_by_default_no_page_holds_what_its_user_has(rec, served):
    """A shop's page: whatever split a row is in, and however it was rated."""
    r = Recommender.load(sources(served))
    had = rec.shop.csr(None, positive=None)
    for user, answer in enumerate(r.answers([Ask(user=u, k=12) for u in rec.shop.user_ids])):
        assert not set(ids(answer)) & {rec.shop.catalogue.ids[i] for i in had.of(user)[0]}
        assert answer["user"]["history"] == len(rec.shop.csr(None).of(user)[0])
    assert "no rows held out" in r.in_words() and "test rows held out" in rec.in_words()
