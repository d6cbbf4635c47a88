"""What the caches of prompts and users save (the paper's 5.4).

Reads   data/<dataset>, runs/<run>/sft or ppo, reward

    make caches                         python -m experiments.cost.caches --dataset synthetic

The same requests are answered with and without the caches.

Users return with realistic frequencies: a request comes from the user of rank n with probability ~
1 / n^skew. Requests are answered `batch` at once, as `serve` does. Hits are counted for user states
(the history and the items met) and for prompts (keys and values of every layer, and the state h_u).
Seconds are of whole answers; the two settings take turns. A minute.
"""

import sys
import time
from dataclasses import dataclass

import numpy as np

from pagellm.pages.stats import difference
from pagellm.serving.cache import Cache
from pagellm.serving.recommender import Ask, Recommender
from pagellm.serving.sources import POLICIES, Sources
from pagellm.stage import randomness
from pagellm.stage.command import main
from pagellm.stage.config import check

__all__ = ["Config", "Counting", "requests", "run"]


@dataclass(frozen=True, kw_only=True)
class Config(Sources):
    """Answer the same requests with and without the caches; print hits and seconds."""

    policy: str = "ppo"  # policy that writes the pages
    requests: int = 2000  # number of pages asked for
    batch: int = 16  # requests answered at once
    skew: float = 1.0  # the user of popularity rank n asks with probability proportional to n **
    # -skew; 0: all users equally often
    room: float = 64.0  # memory of the cache, in megabytes
    k: int = 20  # slots on a page
    rounds: int = 3  # times that each setting answers all requests, each from an empty cache

    def __post_init__(self):
        super().__post_init__()
        check(
            self,
            policy=(self.policy in POLICIES, " or ".join(POLICIES)),
            requests=(self.requests > 0, "1 or more"),
            batch=(self.batch > 0, "1 or more"),
            skew=(self.skew >= 0, "0 or more"),
            room=(self.room > 0, "above 0"),
            k=(self.k > 0, "1 or more"),
            rounds=(self.rounds > 0, "1 or more"),
        )


class Counting(Cache):
    """A Cache that counts hits and misses for each kind of key."""

    def __init__(self, room: int):
        super().__init__(room)
        self.counted: dict[str, list[int]] = {"user": [0, 0], "prompt": [0, 0]}

    def get(self, key):
        value = super().get(key)
        self.counted[key[1]][value is None] += 1
        return value


def requests(n_users: int, n: int, skew: float, seed: int) -> np.ndarray:
    """Users of n successive requests, (n,)."""
    rng = randomness.rng(seed, "caches")
    weight = np.arange(1, n_users + 1) ** -skew
    return rng.permutation(n_users)[rng.choice(n_users, size=n, p=weight / weight.sum())]


def answer_all(
    rec: Recommender, asks: list[Ask], batch: int
) -> tuple[list, np.ndarray, dict[str, float]]:
    """Answer all requests. Returns the answers, seconds of each batch, seconds of each part."""
    spent: dict[str, float] = {}
    rec.observe = lambda stage, seconds: spent.__setitem__(stage, spent.get(stage, 0.0) + seconds)
    out, seconds = [], []
    for at in range(0, len(asks), batch):
        started = time.perf_counter()
        out += rec.answers(asks[at : at + batch])
        seconds.append(time.perf_counter() - started)
    return out, np.array(seconds), spent


def run(config: Config) -> dict:
    """Print the table and return its numbers.

    hits           kind of key -> [hits, misses]
    same           number of pages that are equal with and without caches
    with, without  seconds of each round
    saved          (mean, low, high) milliseconds saved per request
    """
    rec = Recommender.load(config, (config.policy,))
    users = requests(rec.shop.n_users, config.requests, config.skew, config.seed)
    asks = [Ask(user=rec.shop.user_ids[u], k=config.k, policy=config.policy) for u in users]
    rec.cache = Cache(0)
    rec.answers(asks[: config.batch])  # not timed: the first call of anything is slow
    times: dict[str, list[np.ndarray]] = {"with": [], "without": []}
    stages: dict[str, dict[str, float]] = {}
    said: dict[str, list] = {}
    for _ in range(config.rounds):
        for name in times:
            counting = Counting(int(config.room * 1e6))
            rec.cache = counting if name == "with" else Cache(0)
            said[name], seconds, stages[name] = answer_all(rec, asks, config.batch)
            times[name].append(seconds)
            if name == "with":
                kept = counting
    same = sum(a == b for a, b in zip(pages(said["with"]), pages(said["without"]), strict=True))
    saved = [x / config.batch * 1e3 for x in difference(times["without"], times["with"])]
    total = {name: float(np.mean([s.sum() for s in seconds])) for name, seconds in times.items()}
    print(
        f"{config.requests:,} requests of {len(set(users.tolist())):,} users (skew "
        f"{config.skew:g}), {config.batch} at once, pages of {config.k}; {config.rounds} rounds\n"
    )
    for kind, (hits, misses) in kept.counted.items():
        print(
            f"{kind + ' cache':<16}{hits:>8,} hits {misses:>8,} misses  "
            f"{hits / max(hits + misses, 1):.1%}"
        )
    print(
        f"{'kept':<16}{len(kept):>8,} entries, {kept.size / 1e6:.1f} of {config.room:g} MB\n\n"
        f"{'seconds':<16}{'without':>9}{'with':>9}{'saved':>8}"
    )
    for stage in stages["without"]:
        a, b = stages["without"][stage], stages["with"].get(stage, 0.0)
        print(f"{stage:<16}{a:9.2f}{b:9.2f}{1 - b / a:8.0%}")
    print(
        f"{'whole answer':<16}{total['without']:9.2f}{total['with']:9.2f}"
        f"{1 - total['with'] / total['without']:8.0%}"
        "\n\n"
        f"saved a request: {saved[0]:.2f} ms [{saved[1]:.2f}, {saved[2]:.2f}] (bootstrap over "
        f"rounds and batches); stages: last round; {same:,} of {len(asks):,} pages are the same "
        "with and without"
    )
    return {"hits": kept.counted, "same": same, **total, "saved": tuple(saved)}


def pages(answers: list) -> list:
    """The items of every page, which must not depend on a cache."""
    return [[slot["item"] for slot in answer["items"]] for answer in answers]


if __name__ == "__main__":
    sys.exit(main(Config, run, "experiments.cost.caches"))
