"""Users worth a look: whose page changed most, who is served least, who came last.

    groups = await interesting(service, "sft", "ppo")        GET /v1/interesting?left=sft&right=ppo

The first two groups come from pages that are written for SAMPLE users, drawn at random. They are
written few at a time, so that other requests go on in between, and no longer than SECONDS. What was
found is kept until the models change.
"""

import asyncio
import time
from collections.abc import Sequence

import numpy as np

from pagellm.serving.recommender import Ask, Recommender
from pagellm.stage import randomness
from pagellm.stage.config import PageLLMError

__all__ = ["SAMPLE", "Finder", "least_served", "most_changed", "newest"]

SAMPLE = 48  # users whose pages are written, at most
SECONDS = 5.0  # after which no more are
AT_ONCE = 8  # pages that wait at the same time
SLOTS = 20  # of a page
MOST = 8  # users of a group


def most_changed(left: Sequence[dict], right: Sequence[dict]) -> dict | None:
    """Users whose two pages share the fewest items; value: how many.

    left, right  answers of Recommender.answers, for the same users in the same order
    """
    shared = [
        len({x["item"] for x in a["items"]} & {x["item"] for x in b["items"]})
        for a, b in zip(left, right, strict=True)
    ]
    users = [answer["user"]["id"] for answer in right]
    return group("Most changed", "changed", users, np.array(shared, float))


def least_served(answers: Sequence[dict]) -> dict | None:
    """Users whose page promises least: by its reward, or without a reward model by how near its
    items are to the history (mean over slots of the nearest item's cosine)."""
    users = [answer["user"]["id"] for answer in answers]
    reward = [answer["page_reward"] for answer in answers]
    if any(x is not None for x in reward):
        return group("Least served", "reward", users, np.array(reward, float))
    near = [
        [slot["similar"][0]["similarity"] for slot in answer["items"] if slot["similar"]]
        for answer in answers
    ]
    means = np.array([np.mean(x) if x else np.nan for x in near], float)
    return group("Least served", "near", users, means)


def newest(recommender: Recommender) -> dict | None:
    """Users whose first event is the latest, of all users; value: seconds since 1970.

    Where no times are known: users with the shortest history; value: its length.
    """
    shop = recommender.shop
    first = np.full(shop.n_users, np.inf)
    np.minimum.at(first, shop.user, shop.time.astype(float))
    known = first[np.isfinite(first)]
    if len(known) and known.min() < known.max():
        return group("Newest", "newest", shop.user_ids, first, latest=True)
    return group("Newest", "history", shop.user_ids, recommender.history.counts().astype(float))


def group(
    name: str, measure: str, users: Sequence[str], value: np.ndarray, latest: bool = False
) -> dict | None:
    """The MOST users of lowest value (latest: highest); None if no value is known."""
    known = np.flatnonzero(np.isfinite(value))
    order = known[np.argsort(-value[known] if latest else value[known], kind="stable")][:MOST]
    rows = [{"id": users[i], "value": round(float(value[i]), 4)} for i in order]
    return {"name": name, "measure": measure, "users": rows} if rows else None


class Finder:
    """Finds the groups and keeps them. One search at a time; others wait and read what it found.

    service  serve.Service, or anything with its recommender and answer
    """

    def __init__(self, service):
        self.service, self.lock = service, asyncio.Lock()
        self.kept: dict[tuple[str, str, str], dict] = {}

    async def find(self, left: str, right: str) -> dict:
        """The answer of GET /v1/interesting. Raises PageLLMError for a policy not served, and what
        Service.answer raises."""
        recommender = self.service.recommender
        for policy in (left, right):
            if policy not in recommender.names:
                there = ", ".join(recommender.names)
                raise PageLLMError(f"policy={policy[:80]}: not served here, there is {there}")
        key = (recommender.key, left, right)
        async with self.lock:
            if key not in self.kept:
                found = await self.search(recommender, left, right)
                if len(self.kept) >= 16:
                    self.kept.clear()
                self.kept[key] = found
        return self.kept[key]

    async def search(self, recommender: Recommender, left: str, right: str) -> dict:
        """Write pages of the sample by both policies while SECONDS last, and sort the users."""
        ids, started, sampled = recommender.shop.user_ids, time.monotonic(), 0
        drawn = randomness.rng(0, "serving", "interesting").permutation(len(ids))[:SAMPLE]
        pages: dict[str, list[dict]] = {policy: [] for policy in (left, right)}
        while sampled < len(drawn) and (not sampled or time.monotonic() - started < SECONDS):
            some = [ids[i] for i in drawn[sampled : sampled + AT_ONCE]]
            for policy, answers in pages.items():
                answers += await self.pages(recommender, policy, some)
            sampled += len(some)
        groups = [least_served(pages[right]), newest(recommender)]
        if left != right:
            groups.insert(0, most_changed(pages[left], pages[right]))
        return {"sampled": sampled, "groups": [g for g in groups if g]}

    async def pages(self, recommender: Recommender, policy: str, users: list[str]) -> list[dict]:
        """Answers for these users, written together."""
        k = min(SLOTS, recommender.slots(policy), self.service.config.max_k)
        asks = [Ask(user=user, k=k, policy=policy, explain=True) for user in users]
        return await asyncio.gather(*(self.service.answer(ask) for ask in asks))
