"""Simulated visitors of the synthetic shop, and a simulated online test of two policies. No person is in it.

Reads   data/<dataset> with truth.npy, runs/<run>/evaluate/<policy>/pages.parquet of two policies
Writes  runs/<run>/simulator                log.parquet (user-level, as pagellm.online.abtest reads it), abtest.json

    python -m pagellm.online.simulator --control sft --treatment ppo

A page is a grid filled row by row. A visitor reads the first row; in a row a slot is looked at with a probability that
falls from left to right; what is looked at may be clicked, what is clicked may be bought. Whoever buys leaves, and at
the end of a row some of the others do. Attraction and purchase follow the shop's true taste and the price:

    P(click | seen)    = sigma(c0 + c1 (truth - 3))          truth in 1..5
    P(buy | clicked)   = sigma(b0 + b1 (truth - 3) - b2 log(price / median price))

That is `--reading carousel`. Two plainer readers, slot after slot, go on with probability 0.9: `position` whatever they
do, `cascade` until they click.

`expected` gives what a session brings on average in closed form, so that samples, tests and estimators can be checked.
Every coefficient is an assumption: the result tells how the test behaves, not what a real shop would earn. Seconds.
"""

import sys
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pagellm.data.shop import Shop, load
from pagellm.online import abtest
from pagellm.pages.ranked import read_pages
from pagellm.stage import hints, randomness
from pagellm.stage.command import main
from pagellm.stage.config import PageLLMError, check
from pagellm.stage.files import atomic
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
    "world_of",
]


@dataclass(frozen=True)
class Behaviour:
    """How visitors read a page. Probabilities unless said otherwise."""

    columns: int = 5  # slots in a row of the grid
    glance: float = 0.85  # a slot is looked at with glance ** column
    next_row: float = 0.75  # who has not bought goes on to the next row
    click_base: float = -2.5  # c0, logit
    click_taste: float = 1.0  # c1, logits per star
    buy_base: float = -1.5  # b0
    buy_taste: float = 0.8  # b1
    buy_price: float = 0.5  # b2, logits per e-fold of price
    leave_on_purchase: bool = True  # off: slots of a row do not depend on each other,
    # and rewards add up
    leave_on_click: bool = False  # the first click ends the visit,
    # after the purchase if there is one


READERS = {
    "carousel": Behaviour(),
    "position": Behaviour(columns=1, glance=1.0, next_row=0.9, leave_on_purchase=False),
    "cascade": Behaviour(columns=1, glance=1.0, next_row=0.9, leave_on_click=True),
}


@dataclass(frozen=True)
class World:
    """click, buy (U, N) probabilities: of a click on what is seen, of a purchase of what is clicked; price (N,)."""

    click: np.ndarray
    buy: np.ndarray
    price: np.ndarray
    how: Behaviour

    def look(self, K: int) -> np.ndarray:
        """(K,) probability that a slot is looked at by a visitor who reads its row."""
        return self.how.glance ** (np.arange(K) % self.how.columns)

    def stay(self, K: int) -> np.ndarray:
        """(K,) probability to go on behind a slot: next_row at the end of a row, else 1."""
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
    """Raises PageLLMError for a shop whose truth is not known: any but the synthetic one."""
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
    """P(click | reads the row), P(buy | clicked) of every slot, (S, K); 0 off the page (-1)."""
    there = page >= 0
    item, who = np.maximum(page, 0), np.asarray(user)[:, None]
    return (
        np.where(there, world.look(page.shape[1]) * world.click[who, item], 0.0),
        np.where(there, world.buy[who, item], 0.0),
    )


def visit(world: World, user: np.ndarray, page: np.ndarray, rng: np.random.Generator) -> Sessions:
    """One session each of S visitors: user (S,) rows of the world, page (S, K) items, -1 past the end."""
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
    """Closed-form means of one session of each (user, page): impressions, clicks, purchases, gmv, failure, purchase,
    and the click probability of every slot, `slots`. (S,) each, slots (S, K); arguments as in `visit`."""
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


def before(on: np.ndarray) -> np.ndarray:
    """Product of a row's entries before each slot, (S, K) -> (S, K)."""
    return np.cumprod(np.concatenate([np.ones((len(on), 1)), on[:, :-1]], axis=1), axis=1)


def online_log(
    world: World,
    pages: dict[str, tuple[np.ndarray, np.ndarray]],
    visitors: int,
    days: int,
    sessions: float,
    seed: int = 0,
    failure: str = "click",
) -> dict[str, np.ndarray]:
    """A user-level log of a simulated test, as pagellm.online.abtest reads it.

    pages     arm -> (users (U,), page (U, K)); the first is the control, which everybody sees before the test
    visitors  each has the taste of a shop user drawn with replacement; half of them, by a coin, go to either arm
    sessions  mean number a visitor in the test, 1 or more; as many before it
    failure   what an abandoned session lacks: a click (and so a purchase too), or a purchase
    """
    arms = list(pages)
    users = np.intersect1d(*(u for u, _ in pages.values()))
    if len(arms) != 2 or len(users) == 0:
        raise PageLLMError(
            f"arms {', '.join(arms)} with {len(users)} users in common: want two arms and some users"
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

    control: str = "sft"  # policy of the control: pages in <runs>/<run>/evaluate/<policy>,
    # or a pages.parquet
    treatment: str = "ppo"  # policy of the treatment; the same again is an A/A test
    visitors: int = 20000  # simulated visitors in both arms together
    days: int = 14  # of the test; visitors come evenly
    sessions: float = 3.0  # mean number of sessions a visitor
    k: int = 20  # slots shown
    reading: str = "carousel"  # how a page is read: carousel, position, cascade
    failure: str = "click"  # what an abandoned session lacks: a click (and so a purchase too),
    # or a purchase
    alpha: float = 0.01  # error rate over all metrics together
    mde: float = 0.02  # relative change that the planner wants to find
    out: str = "simulator"  # directory under the run, so that another test can lie beside

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


def run(config: Config) -> dict:
    """-> the result of pagellm.online.abtest, with the closed-form change of every metric beside it as `truth`."""
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
    with Run(config.stage(config.out), config, inputs) as out:
        log = online_log(
            world, pages, config.visitors, config.days, config.sessions, config.seed, config.failure
        )
        with atomic(out.path / "log.parquet") as beside:
            pq.write_table(pa.table(log), beside)
        print(
            f"SIMULATED visitors of {config.dataset}: assumptions, not people (pagellm/online/simulator.py)\n"
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
        users = np.intersect1d(*(u for u, _ in pages.values()))
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
        print(
            "\nclosed form, the same visitors without chance: "
            + ", ".join(f"{metric} {t['relative']:+.2%}" for metric, t in result["truth"].items())
        )
        out.finish(simulated=True, **abtest.finite(result))
    return result


if __name__ == "__main__":
    sys.exit(main(Config, run, "pagellm simulator"))
