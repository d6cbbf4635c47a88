"""Users worth a look: found by what is served, kept until the models change."""

import asyncio
from types import SimpleNamespace

import numpy as np
import pytest

from pagellm.serving import interesting
from pagellm.stage.config import PageLLMError


def answer(user, items, reward=None, near=()):
    slots = [
        {"item": item, "similar": [{"similarity": x}] if x is not None else []}
        for item, x in zip(items, near or [None] * len(items), strict=True)
    ]
    return {"user": {"id": user}, "items": slots, "page_reward": reward}


def test_the_fewest_shared_items_come_first():
    left = [answer("a", "xyz"), answer("b", "xyz"), answer("c", "xyz")]
    right = [answer("a", "zyx"), answer("b", "uvw"), answer("c", "xvw")]
    found = interesting.most_changed(left, right)
    assert [(u["id"], u["value"]) for u in found["users"]] == [("b", 0), ("c", 1), ("a", 3)]


def test_least_served_is_by_reward_or_else_by_nearness():
    found = interesting.least_served([answer("a", "x", 0.5), answer("b", "x", -2.0)])
    assert found["measure"] == "reward" and [u["id"] for u in found["users"]] == ["b", "a"]
    bare = [answer("a", "xy", near=[0.9, 0.7]), answer("b", "xy", near=[0.1, 0.3]), answer("c", "")]
    found = interesting.least_served(bare)
    assert found["measure"] == "near"  # c has no history to be near to
    assert [(u["id"], u["value"]) for u in found["users"]] == [("b", 0.2), ("a", 0.8)]
    assert interesting.least_served([answer("c", "")]) is None


def shop(n, time):
    ids = [f"U{i}" for i in range(n)]
    user = np.repeat(np.arange(n), 2)
    history = SimpleNamespace(counts=lambda: np.arange(n)[::-1])
    return SimpleNamespace(
        shop=SimpleNamespace(n_users=n, user_ids=ids, user=user, time=time), history=history
    )


def test_the_newest_of_thousands_came_last():
    first = np.random.default_rng(0).permutation(5000).astype(np.int64)
    found = interesting.newest(shop(5000, np.stack([first + 9000, first], 1).ravel()))
    assert found["measure"] == "newest" and len(found["users"]) == interesting.MOST
    assert [u["value"] for u in found["users"]] == list(range(4999, 4991, -1))
    assert found["users"][0]["id"] == f"U{first.argmax()}"


def test_without_times_the_shortest_history_counts_as_new():
    found = interesting.newest(shop(50, np.zeros(100, np.int64)))
    assert found["measure"] == "history" and found["users"][0] == {"id": "U49", "value": 0.0}


class Counted:
    """A service over a Recommender that answers at once and counts."""

    def __init__(self, recommender):
        self.recommender, self.asks = recommender, []
        self.config = SimpleNamespace(max_k=100)

    async def answer(self, ask):
        self.asks.append(ask)
        return self.recommender.answers([ask])[0]


def test_pages_are_written_once_for_each_pair_and_model(rec, monkeypatch):
    monkeypatch.setattr(interesting, "SAMPLE", 10)
    service = Counted(rec)
    finder = interesting.Finder(service)

    async def twice():
        return await asyncio.gather(finder.find("sft", "ppo"), finder.find("sft", "ppo"))

    one, two = asyncio.run(twice())
    assert one == two and len(service.asks) == 2 * one["sampled"] <= 2 * interesting.SAMPLE
    assert [g["measure"] for g in one["groups"]] == ["changed", "reward", "newest"]
    pages = {p: {a.user: a for a in service.asks if a.policy == p} for p in ("sft", "ppo")}
    worst = one["groups"][0]["users"][0]
    both = [{x["item"] for x in rec.answers([pages[p][worst["id"]]])[0]["items"]} for p in pages]
    assert len(both[0] & both[1]) == worst["value"]
    monkeypatch.setattr(interesting, "SECONDS", 0.0)  # a slow model: the first few must do
    alone = asyncio.run(finder.find("ppo", "ppo"))
    assert alone["sampled"] == interesting.AT_ONCE < one["sampled"]
    assert [g["measure"] for g in alone["groups"]] == ["reward", "newest"]
    with pytest.raises(PageLLMError, match="not served here"):
        asyncio.run(finder.find("sft", "nothing"))
