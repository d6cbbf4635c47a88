"""Simulated visitors of the synthetic shop, and a simulated online test of two policies.

Reads   data/<dataset> with truth.npy, runs/<run>/evaluate/<policy>/pages.parquet of two policies
Writes  runs/<run>/simulator      log.parquet (user-level, as pagellm.online.abtest reads it),
                                  abtest.json

    pagellm simulator --control sft --treatment compose

A page is a grid that is filled row by row. A visitor reads the first row. In a row, the probability
that a slot is looked at falls from left to right. What is looked at may be clicked, and what is
clicked may be bought. A visitor who buys leaves; at the end of a row some of the others leave.
Clicks and purchases follow the shop's true ratings and the price:

    P(click | seen)    = sigma(c0 + c1 (truth - 3))          truth in 1..5
    P(buy | clicked)   = sigma(b0 + b1 (truth - 3) - b2 log(price / median price))

This is `--reading carousel`. There are two simpler readers, who read slot after slot and go on with
probability 0.9: `position` always, `cascade` until the first click.

`expected` gives the mean result of a session in closed form, so that samples, tests and estimators
can be checked against it. Every coefficient is an assumption: the result shows how the test
behaves, not what a real shop would earn. Takes seconds.
"""

import sys
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pagellm.data.shop import Shop, load
from pagellm.online import abtest
from pagellm.pages.ranked import last_evaluated, read_pages
from pagellm.stage import hints, randomness
from pagellm.stage.command import main
from pagellm.stage.config import PageLLMError, check
from pagellm.stage.files import atomic, read_json
from pagellm.stage.outputs import check_folder
from pagellm.stage.run import Run, StageConfig, file_id

__all__ = [
    "Behaviour",
    "Config",
    "READERS",
    "Sessions",
    "World",
    "expected",
    "online_log",
    "run",
    "visit",
    "visit_log",
    "visits",
    "world_of",
]


@dataclass(frozen=True)
class Behaviour:
    """How visitors read a page."""

    columns: int = 5  # slots in a row of the grid
    glance: float = 0.85  # a slot is looked at with probability glance ** column
    next_row: float = 0.75  # probability of going on to the next row
    click_base: float = -2.5  # c0, in logits
    click_taste: float = 1.0  # c1, logits for each star
    buy_base: float = -1.5  # b0, in logits
    buy_taste: float = 0.8  # b1, logits for each star
    buy_price: float = 0.5  # b2, logits for each factor e of price
    leave_on_purchase: bool = True  # a purchase ends the visit; off: slots do not depend on each
    # other, and rewards add up over them
    leave_on_click: bool = False  # the first click ends the visit, after its purchase if any


READERS = {
    "carousel": Behaviour(),
    "position": Behaviour(columns=1, glance=1.0, next_row=0.9, leave_on_purchase=False),
    "cascade": Behaviour(columns=1, glance=1.0, next_row=0.9, leave_on_click=True),
    "rows": Behaviour(columns=10, leave_on_purchase=False),  # rows of ten, as a storefront's
}


@dataclass(frozen=True)
class World:
    """What U users would do with N items.

    click  (U, N) probability of a click on an item that is seen
    buy    (U, N) probability of buying an item that is clicked
    price  (N,)
    how    how they read a page
    """

    click: np.ndarray
    buy: np.ndarray
    price: np.ndarray
    how: Behaviour

    def look(self, K: int) -> np.ndarray:
        """(K,): probability that a visitor who reads a slot's row looks at the slot."""
        return self.how.glance ** (np.arange(K) % self.how.columns)

    def stay(self, K: int) -> np.ndarray:
        """(K,): probability of going on after a slot: next_row at the end of a row, else 1."""
        return np.where((np.arange(K) + 1) % self.how.columns == 0, self.how.next_row, 1.0)


@dataclass
class Sessions:
    """What S sessions did: seen, clicked, bought (S, K) bool."""

    seen: np.ndarray
    clicked: np.ndarray
    bought: np.ndarray


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-x))


def world_of(shop: Shop, how: Behaviour = Behaviour()) -> World:  # noqa: B008 (frozen)
    """The world of a shop whose true ratings are known. Raises PageLLMError for any other.

    Only the synthetic shop has them.
    """
    if shop.truth is None:
        raise PageLLMError(
            f"{shop.path} has no truth.npy: visitors can be simulated on the synthetic shop only\n"
            f"  Make it with: {hints.command('prepare', 'synthetic')}"
        )
    price = np.where(
        np.isnan(shop.catalogue.price), np.nanmedian(shop.catalogue.price), shop.catalogue.price
    )
    price = price.astype(np.float64)
    taste = shop.truth.astype(np.float64) - 3.0
    dear = np.log(np.maximum(price, 0.01) / np.median(price))
    return World(
        sigmoid(how.click_base + how.click_taste * taste),
        sigmoid(how.buy_base + how.buy_taste * taste - how.buy_price * dear),
        price,
        how,
    )


def rates(world: World, user: np.ndarray, page: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """P(click | row is read) and P(buy | clicked) of every slot, (S, K); 0 past the page's end."""
    there = page >= 0
    item, who = np.maximum(page, 0), np.asarray(user)[:, None]
    return (
        np.where(there, world.look(page.shape[1]) * world.click[who, item], 0.0),
        np.where(there, world.buy[who, item], 0.0),
    )


def visit(world: World, user: np.ndarray, page: np.ndarray, rng: np.random.Generator) -> Sessions:
    """Draw one session for each of S visitors.

    user (S,) rows of the world; page (S, K) items, -1 past the page's end
    """
    S, K = page.shape
    item, who = np.maximum(page, 0), np.asarray(user)[:, None]
    draw = rng.random((4, S, K))
    seen = (draw[0] < world.look(K)) & (page >= 0)
    clicked = seen & (draw[1] < world.click[who, item])
    bought = clicked & (draw[2] < world.buy[who, item])
    on = draw[3] < world.stay(K)
    if world.how.leave_on_purchase:
        on &= ~bought
    if world.how.leave_on_click:
        on &= ~clicked
    reads = np.ones((S, K), dtype=bool)
    reads[:, 1:] = np.logical_and.accumulate(on, axis=1)[:, :-1]
    return Sessions(seen & reads, clicked & reads, bought & reads)


def expected(world: World, user: np.ndarray, page: np.ndarray) -> dict[str, np.ndarray]:
    """Closed-form means of one session for each (user, page); arguments as in `visit`.

    returns impressions, clicks, purchases, gmv   (S,) expected numbers, and money
            failure, purchase                     (S,) P(no click), P(a purchase)
            slots                                 (S, K) click probability of every slot
    """
    click, buy = rates(world, user, page)
    sale, stay = click * buy, world.stay(page.shape[1])
    how = world.how
    leave = click if how.leave_on_click else sale if how.leave_on_purchase else np.zeros_like(sale)
    last = click if how.leave_on_click else sale
    reads, quiet, unsold = (before((1 - p) * stay) for p in (leave, click, last))
    return {
        "slots": reads * click,
        "impressions": (reads * world.look(page.shape[1]) * (page >= 0)).sum(1),
        "clicks": (reads * click).sum(1),
        "purchases": (reads * sale).sum(1),
        "gmv": (reads * sale * world.price[np.maximum(page, 0)]).sum(1),
        "failure": 1 - (quiet * click).sum(1),
        "purchase": (unsold * sale).sum(1),
    }


AGAIN_AFTER_ADD, AGAIN, MOST_VIEWS = 0.15, 0.35, 5  # chances of another page, and the most pages


def visits(adds: np.ndarray, any_add: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Page views and cart adds of a visit, in closed form: (S,) each.

    A visitor looks at another page with probability .15 after a page with an add, .35 after one
    without, and at five at most. So more adds a page view mean fewer page views a visit, and which
    of the two a change is measured by matters.

    adds     (S,) expected adds of one page view        any_add  (S,) P(an add) of one page view
    """
    again = AGAIN_AFTER_ADD * any_add + AGAIN * (1 - any_add)
    views = (1 - again**MOST_VIEWS) / (1 - again)
    return views, adds * views


def visits_of(true: list[dict[str, np.ndarray]]) -> dict[str, dict[str, float]]:
    """Adds by both denominators, of the control's and the treatment's `expected`: metric ->
    control, treatment, relative.
    """
    shown = []
    for t in true:
        views, adds = visits(t["purchases"], t["purchase"])
        shown.append((t["purchases"].mean(), views.mean(), adds.mean()))
    found = {}
    for at, metric in enumerate(("adds per page view", "views per visit", "adds per visit")):
        a, b = float(shown[0][at]), float(shown[1][at])
        found[metric] = {"control": a, "treatment": b, "relative": b / a - 1}
    return found


def visit_log(
    world: World, user: np.ndarray, page: np.ndarray, visitors: int, seed: int = 0
) -> dict[str, np.ndarray]:
    """adds, views, visits (visitors,) of people who come once each and read pages as `visits` says.

    user, page  (U,), (U, K) whose pages there are; a visitor is one of them, drawn at random
    """
    rng = randomness.rng(seed, "simulator", "visits")
    who = rng.integers(len(user), size=visitors)
    adds, views = np.zeros(visitors), np.zeros(visitors)
    here = np.ones(visitors, dtype=bool)
    for _ in range(MOST_VIEWS):
        at = np.flatnonzero(here)
        bought = visit(world, user[who[at]], page[who[at]], rng).bought.sum(1)
        adds[at] += bought
        views[at] += 1
        here[at] = rng.random(len(at)) < np.where(bought > 0, AGAIN_AFTER_ADD, AGAIN)
    return {"adds": adds, "views": views, "visits": np.ones(visitors)}


def before(on: np.ndarray) -> np.ndarray:
    """Product of the entries before each slot, row by row: (S, K) -> (S, K)."""
    return np.cumprod(np.concatenate([np.ones((len(on), 1)), on[:, :-1]], axis=1), axis=1)


def common_users(pages: dict[str, tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Users who have a page in every arm, in rising order."""
    return reduce(np.intersect1d, (users for users, _ in pages.values()))


def online_log(
    world: World,
    pages: dict[str, tuple[np.ndarray, np.ndarray]],
    visitors: int,
    days: int,
    sessions: float,
    seed: int = 0,
    failure: str = "click",
) -> dict[str, np.ndarray]:
    """Simulate a test. Returns its user-level log for pagellm.online.abtest: column -> (visitors,).

    pages     arm -> (users (U,), page (U, K)); the first arm is the control, whose pages everybody
              sees before the test
    visitors  number of visitors; each has the taste of a random shop user and goes to a random arm
    days      visitors come evenly over this many days
    sessions  mean number of a visitor's sessions in the test, 1 or more; as many before it
    failure   what an abandoned session lacks: "click" (and so a purchase too) or "purchase"
    """
    arms = list(pages)
    users = common_users(pages)
    if len(arms) != 2 or len(users) == 0:
        raise PageLLMError(
            f"arms {', '.join(arms)} with {len(users)} users in common: want two arms and some "
            "users"
        )
    rng = randomness.rng(seed, "simulator", "visitors")
    taste, arm = rng.choice(users, visitors), rng.integers(2, size=visitors)
    log = {
        "user": np.arange(visitors),
        "arm": np.array(arms)[arm],
        "day": rng.integers(days, size=visitors),
    }
    for prefix, shown in (("pre_", np.zeros(visitors, np.int64)), ("", arm)):
        count = 1 + rng.poisson(sessions - 1, size=visitors)
        sums = {name: np.zeros(visitors) for name in abtest.COLUMNS}
        for a, (owner, page) in enumerate(pages.values()):
            row = np.searchsorted(owner, taste)
            who = np.repeat(np.flatnonzero(shown == a), count[shown == a])
            for some in np.array_split(who, max(1, len(who) // 50_000)):
                item = page[row[some]]
                s = visit(world, taste[some], item, rng)
                failed = ~(s.clicked if failure == "click" else s.bought).any(1)
                for name, value in zip(
                    abtest.COLUMNS,
                    (
                        s.seen.sum(1),
                        s.clicked.sum(1),
                        np.ones(len(some)),
                        failed,
                        s.bought.any(1),
                        s.bought.sum(1),
                        (s.bought * world.price[np.maximum(item, 0)]).sum(1),
                    ),
                    strict=True,
                ):
                    sums[name] += np.bincount(some, value, visitors)
        log |= {prefix + name: values for name, values in sums.items()}
    return log


@dataclass(frozen=True, kw_only=True)
class Config(StageConfig):
    """Simulate a two-arm online test on the synthetic shop and analyse it."""

    control: str = "sft"  # policy of the control: its name in <runs>/<run>/evaluate, or a
    # pages.parquet
    treatment: str = ""  # policy of the treatment; empty: compose if its pages are there, else ppo;
    # the same as the control makes an A/A test
    visitors: int = 20000  # simulated visitors in both arms together
    days: int = 14  # length of the test; visitors come evenly
    sessions: float = 3.0  # mean number of sessions of a visitor
    k: int = 20  # slots shown
    reading: str = "carousel"  # how a page is read: carousel, position, cascade, or rows of ten
    failure: str = "click"  # what an abandoned session lacks: click (and so a purchase too), or
    # purchase
    alpha: float = 0.01  # error rate over all metrics together
    mde: float = 0.02  # smallest relative change worth finding
    out: str = "simulator"  # directory under the run; another name keeps a second test

    def __post_init__(self):
        super().__post_init__()
        check(
            self,
            visitors=(self.visitors >= 10, "10 or more"),
            days=(self.days > 0, "1 or more"),
            sessions=(self.sessions >= 1, "1 or more"),
            k=(self.k > 0, "1 or more"),
            reading=(self.reading in READERS, ", ".join(READERS)),
            failure=(self.failure in ("click", "purchase"), "click or purchase"),
        )

    def pages(self, policy: str):
        return (
            self.stage("evaluate") / policy / "pages.parquet"
            if not policy.endswith(".parquet")
            else policy
        )


def holds_test(folder: Path) -> bool:
    """Whether a directory holds a simulated test."""
    made = folder / "config.json"
    return made.exists() and "visitors" in read_json(made).get("config", {})


def run(config: Config) -> dict:
    """Simulate and analyse the test.

    Returns the result of pagellm.online.abtest, with `truth`: each metric's exact values.
    """
    if not config.treatment:
        config = replace(config, treatment=last_evaluated(config.stage("evaluate")))
    shop = load(config.data_dir)
    world = world_of(shop, READERS[config.reading])
    inputs, pages = {"data": file_id(config.data_dir / "source.json")}, {}
    for arm, policy in (("control", config.control), ("treatment", config.treatment)):
        path = config.pages(policy)
        try:
            inputs[arm] = file_id(path)
        except FileNotFoundError:
            raise PageLLMError(
                f"no pages of {policy} in {path}\n  Make them with: {config.make('evaluate')}"
            ) from None
        ranked = read_pages(path, shop)
        on_page = np.arange(ranked.item.shape[1]) < np.minimum(ranked.slots, config.k)[:, None]
        pages[f"{policy} ({arm})" if config.control == config.treatment else policy] = (
            ranked.user,
            np.where(on_page, ranked.item, -1)[:, : config.k],
        )
    folder = config.stage(config.out)
    check_folder(folder, holds_test, config.stage(""), own=Config.out)
    with Run(folder, config, inputs) as out:
        log = online_log(
            world, pages, config.visitors, config.days, config.sessions, config.seed, config.failure
        )
        with atomic(out.path / "log.parquet") as beside:
            pq.write_table(pa.table(log), beside)
        print(
            f"SIMULATED visitors of {config.dataset}: assumptions, not people "
            "(pagellm/online/simulator.py)\n"
        )
        result = abtest.run(
            abtest.Config(
                log=str(out.path / "log.parquet"),
                control=next(iter(pages)),
                alpha=config.alpha,
                mde=config.mde,
                daily=config.visitors / config.days,
            )
        )
        users = common_users(pages)
        true = [
            expected(world, users, page[np.searchsorted(owner, users)])
            for owner, page in pages.values()
        ]
        a, b = (float(t["clicks"].sum() / t["impressions"].sum()) for t in true)
        result["truth"] = {"CTR": {"control": a, "treatment": b, "relative": b / a - 1}}
        for metric, name, times in (
            ("GMV per user", "gmv", config.sessions),
            ("purchases per user", "purchases", config.sessions),
            ("session failure", "failure", 1),
            ("session purchase", "purchase", 1),
        ):
            a, b = (float(t[name].mean()) * times for t in true)
            if name == "failure" and config.failure == "purchase":
                a, b = (1 - float(t["purchase"].mean()) for t in true)
            result["truth"][metric] = {"control": a, "treatment": b, "relative": b / a - 1}
        result["visits"] = visits_of(true)
        print(
            "\nclosed form, the same visitors without chance: "
            + ", ".join(
                f"{metric} {t['relative']:+.2%}"
                for metric, t in (result["truth"] | result["visits"]).items()
            )
        )
        out.finish(simulated=True, **abtest.finite(result))
    return result


if __name__ == "__main__":
    sys.exit(main(Config, run, "pagellm simulator"))
