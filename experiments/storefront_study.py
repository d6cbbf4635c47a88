"""What each part of the storefront is worth: the same people's pages, one part changed at a time.

Reads   data/<dataset>, runs/<run>/storefront/build and tune
Writes  runs/<run>/storefront-study/metrics.json, table.txt

    make storefront-study DATASET=complete_journey
    python -m experiments.storefront_study --dataset complete_journey --rows full,depth_10

Every row is compared with the full page by the paired difference in recall over people. Test orders
are read, and nothing is chosen by them. Rows that need a model are in storefront_distil.py.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast
from unittest.mock import patch

import numpy as np

from experiments.storefront import keep
from pagellm.pages import stats
from pagellm.stage import randomness
from pagellm.stage.command import main
from pagellm.stage.config import PageLLMError, check
from pagellm.storefront import choose, gates
from pagellm.storefront.ahead import Ahead
from pagellm.storefront.evaluate import baselines, user_scores
from pagellm.storefront.front import Sources, Store, open_store
from pagellm.storefront.making import Front, Writer
from pagellm.storefront.missions import Missions
from pagellm.storefront.page import page, written_ahead
from pagellm.storefront.parts import Answer, Context, Keyword, Page, Theme
from pagellm.storefront.policy import Terms
from pagellm.storefront.rankers import Als, Blend, Popularity
from pagellm.storefront.search import Search
from pagellm.storefront.teach import template_of
from pagellm.storefront.tune import fitting, people_of

__all__ = ["Config", "Ease", "ItemKnn", "Limited", "ROWS", "run"]

RIDGE = 500.0  # of EASE
SHOWN = ("recall", "new_recall", "NDCG", "ILD")


@dataclass(frozen=True, kw_only=True)
class Config(Sources):
    """Change one part of the page at a time and score the same people's pages."""

    people: int = 400  # test people, drawn by seed; 0: all
    rows: str = "all"  # rows of the table, comma-separated; all: but search_no_pruning
    n_boot: int = 1000  # bootstrap draws behind an interval

    def __post_init__(self):
        super().__post_init__()
        names = set(ROWS) if self.rows == "all" else set(self.rows.split(","))
        check(
            self,
            people=(self.people >= 0, "0 or more"),
            rows=(names <= set(ROWS), f"all, or some of {', '.join(ROWS)}"),
            n_boot=(self.n_boot > 1, "2 or more"),
        )


class SameThemes:
    """A writer that names the themes of another, and differs in keywords."""

    writer: Writer

    def themes(
        self, contexts: list[Context], intents: list[list[str]], used: list[list[str]]
    ) -> list[list[Answer[Theme]]]:
        return self.writer.themes(contexts, intents, used)


@dataclass(frozen=True)
class Limited(SameThemes):
    """A writer that gives at most m keywords a theme, out of all that are near."""

    writer: Writer
    m: int
    chooses: bool = True

    @property
    def name(self) -> str:
        return f"{self.writer.name}, {self.m} keywords"

    def keywords(
        self, themes: list[Theme], contexts: list[Context], offered: list[np.ndarray]
    ) -> list[Answer[list[Keyword]]]:
        return template_of(self.writer).keywords(themes, contexts, offered, self.m)


@dataclass(frozen=True)
class Unpruned(SameThemes):
    """A writer that is offered every keyword of the corpus, not the hundred nearest."""

    writer: Writer
    offered: np.ndarray
    chooses: bool = True

    @property
    def name(self) -> str:
        return f"{self.writer.name}, all keywords"

    def keywords(
        self, themes: list[Theme], contexts: list[Context], offered: list[np.ndarray]
    ) -> list[Answer[list[Keyword]]]:
        return self.writer.keywords(themes, contexts, [self.offered] * len(themes))


class ItemKnn:
    """Cosine between the buyers of two items, summed over what a person bought (train orders)."""

    name = "itemknn/1"

    def __init__(self, store: Store):
        rows = store.known.rows
        self.bought = np.zeros((store.shop.n_users, store.shop.n_items), dtype=np.float32)
        user = np.repeat(np.arange(store.shop.n_users), rows.counts())
        self.bought[user, rows.items] = 1.0
        self.scale = 1 / np.sqrt(np.maximum(self.bought.sum(0), 1.0))

    def __call__(self, context: Context) -> np.ndarray:
        own = np.zeros(self.bought.shape[1], dtype=np.float32)
        own[context.item] = self.scale[context.item]
        return (self.scale * (self.bought.T @ (self.bought @ own))).astype(np.float64)


class Ease:
    """EASE (Steck, WWW 2019) by way of the people's inner products, of which there are fewer.

    B = I - P diag(1 / diag P) with P = (X'X + ridge I)^-1 = (I - X' (XX' + ridge I)^-1 X) / ridge
    """

    name = "ease/1"

    def __init__(self, store: Store, ridge: float = RIDGE):
        self.bought, self.ridge = ItemKnn(store).bought, ridge
        inner = self.bought @ self.bought.T
        inner[np.diag_indices(len(inner))] += ridge
        self.inverse = np.linalg.inv(inner)
        kept = self.inverse @ self.bought
        self.diagonal = (1 - np.einsum("ui,ui->i", self.bought, kept)) / ridge

    def __call__(self, context: Context) -> np.ndarray:
        own = np.zeros(self.bought.shape[1], dtype=np.float32)
        own[context.item] = 1.0
        times = (own - self.bought.T @ (self.inverse @ (self.bought @ own))) / self.ridge
        return (own - times / self.diagonal).astype(np.float64)


def of_front(change: Callable[[Front], Front]) -> Callable[[Store, Context], Page]:
    """A row of pages that are made anew by a changed front."""
    return lambda store, context: page(change(store.front), context, store.layout)


def weights(**values: float) -> Callable[[Store, Context], Page]:
    return of_front(lambda front: replace(front, weights=replace(front.weights, **values)))


def limited(m: int) -> Callable[[Store, Context], Page]:
    return of_front(lambda front: replace(front, writer=Limited(front.writer, m)))


def each_category(front: Front) -> Front:
    """Every category is a mission of its own."""
    old = front.missions
    alone = np.arange(len(old.names))
    missions = Missions(old.category, old.names, alone, old.category, len(alone))
    template = replace(template_of(front.writer), missions=missions)
    return replace(front, missions=missions, writer=template)


def everything_fits(front: Front) -> Front:
    """Only the rules are left of the gates: every item agrees with every theme."""
    return replace(front, agree=lambda theme, keywords, item: np.ones(len(item)), threshold=0.0)


def unpruned(front: Front, writer: Writer) -> Front:
    return replace(front, writer=Unpruned(writer, np.arange(len(front.corpus.text))))


def ungated(store: Store, context: Context) -> Page:
    """No gate looks at a text, theme, keyword or row, and no category is restricted. What is sold
    out or stands above stays off the page.
    """
    front, none = store.front, Terms(())
    policy = replace(
        front.policy, banned=none, claims=none, sensitive=none, instructions=none, restricted=none
    )
    writer = replace(template_of(front.writer), policy=policy)
    # A switch that turns gates off has no place in what shops run.
    with (
        patch.object(gates, "blocked", lambda decisions: False),
        patch.object(gates, "check_keywords", lambda words, *about: (list(words), [])),
    ):
        return page(replace(front, policy=policy, writer=writer), context, store.layout)


def each_row_alone(store: Store, context: Context) -> Page:
    """Rows know nothing of those above but their items: themes alike may stand on one page."""
    with patch.object(
        choose, "conflicts", lambda making, offers: np.zeros((len(offers),) * 2, bool)
    ):
        return page(store.front, context, store.layout)


def of_people_alike(store: Store, context: Context) -> Page:
    """Rows written for people alike, ranked for the person."""
    known = store.known
    name = known.segment(context.item, context.mission)
    alike = cast(Any, Ahead)(store, None, "", None, known.at)
    if name not in POOLED:
        users = [known.context(user) for user in store.shop.user_ids]
        sets: dict[str, list[int]] = {}
        for at, one in enumerate(users):
            sets.setdefault(known.segment(one.item, one.mission), []).append(at)
        POOLED.update(
            {key: written_ahead(store.front, alike.pooled(key, some), store.layout)[0]
             for key, some in sets.items()}
        )  # fmt: skip
    return page(store.front, context, store.layout, written=POOLED[name], source="segment")


POOLED: dict[str, list] = {}
SLOW = (
    "search_no_pruning",
)  # minutes a person in a shop of 8,000 keywords: made where it is named
# Pages by the cascade; then lists without it, which have no themes.
ROWS: dict[str, Callable[[Store, Context], Page] | str] = {
    "full": of_front(lambda front: front),
    "search_writes": of_front(lambda front: replace(front, writer=Search(front))),
    "categories": of_front(each_category),
    "rules_alone": of_front(everything_fits),
    "no_gates": ungated,
    "no_left_to_right": each_row_alone,
    "no_pruning": of_front(lambda front: unpruned(front, front.writer)),
    "search_no_pruning": of_front(lambda front: unpruned(front, Search(front))),
    "ret_0": weights(ret=0.0),
    "agree_0": weights(agree=0.0),
    "redundancy_0": weights(redundancy=0.0),
    "all_0": weights(ret=0.0, agree=0.0, redundancy=0.0),
    "depth_10": of_front(lambda front: replace(front, depth=10)),
    "depth_200": of_front(lambda front: replace(front, depth=200)),
    "keywords_2": limited(2),
    "keywords_4": limited(4),
    "keywords_16": limited(16),
    "people_alike": of_people_alike,
    "static": of_front(lambda front: replace(front, static=True)),
    "own_popularity": "popularity",
    "own_itemknn": "itemknn",
    "own_als": "als",
    "own_ease": "ease",
    "own_blend": "blend",
    "bottom_up": "bottom up",
    "flat": "flat",
}


def bottom_up(store: Store, items: np.ndarray, slots: int = 10) -> float:
    """Share of the first five items of rows that are of the row's commonest mission, where rows are
    the ranker's list, sorted by mission and cut.
    """
    mission = store.front.missions.of_item[items]
    order = np.lexsort((np.arange(len(items)), mission))
    shares = [
        np.bincount(row[row >= 0], minlength=1).max() / len(row)
        for start in range(0, len(items), slots)
        if len(row := mission[order[start : start + slots]][:5])
    ]
    return float(np.mean(shares))


def rankers_of(store: Store) -> dict[str, Callable[[], Any]]:
    ranker = store.front.ranker
    factors = ranker.factors if isinstance(ranker, Blend) else None
    if factors is None:
        raise PageLLMError("the study's rows are of --ranker blend")
    households = store.front.households
    return {
        "popularity": lambda: Popularity(households),
        "als": lambda: Als(factors, households),
        "itemknn": lambda: ItemKnn(store),
        "ease": lambda: Ease(store),
        "blend": lambda: ranker,
    }


def lists_of(store: Store, name: str, users: np.ndarray) -> tuple[list[np.ndarray], float]:
    """Each person's items in reading order by one row of the table; TP@5, NaN without themes."""
    how = ROWS[name]
    contexts = [store.known.context(store.shop.user_ids[u]) for u in users.tolist()]
    if not isinstance(how, str):
        made = [how(store, context) for context in contexts]
        front = each_category(store.front) if name == "categories" else store.front
        return [one.items() for one in made], fitting(front, made)
    if how in ("flat", "bottom up"):
        lists = [baselines(store, context)["flat"] for context in contexts]
        fits = [bottom_up(store, items) for items in lists] if how == "bottom up" else [np.nan]
        return lists, float(np.mean(fits))
    other = replace(store, front=replace(store.front, ranker=rankers_of(store)[how]()))
    return [baselines(other, context)["own ranked"] for context in contexts], np.nan


def table(results: dict[str, dict], people: int, config: Config) -> str:
    lines = [
        f"{config.dataset}: {people} people, test orders; means, and the paired difference in "
        "recall to the full page with its 95% interval",
        "",
        f"{'':<16}" + "".join(f"{name:>12}" for name in SHOWN) + f"{'TP@5':>8}   difference",
    ]
    for name, one in results.items():
        gap = one["less"]
        cells = "".join(f"{one[column]:>12.4f}" for column in SHOWN)
        fits = "" if np.isnan(one["tp5"]) else f"{one['tp5']:.4f}"
        lines.append(
            f"{name:<16}{cells}{fits:>8}   {gap['mean']:+.4f} [{gap['low']:+.4f}, "
            f"{gap['high']:+.4f}]"
        )
    return "\n".join(lines) + "\n"


def run(config: Config) -> dict:
    """Score every row; returns name -> means, TP@5 and the difference to the full page."""
    store = open_store(config)
    users, labels = people_of(store, "test")
    if not len(users):
        raise PageLLMError(f"{config.data_dir} has no test orders of people with a history")
    drawn = randomness.rng(config.seed, "storefront", "study").permutation(users)
    users = np.sort(drawn[: config.people or None])
    POOLED.clear()
    results: dict[str, dict] = {}
    scored: dict[str, dict[str, np.ndarray]] = {}
    every = [name for name in ROWS if name not in SLOW]
    for name in every if config.rows == "all" else ["full", *config.rows.split(",")]:
        if name in scored:
            continue
        lists, tp5 = lists_of(store, name, users)
        scored[name] = user_scores(store, users, labels, lists)
        results[name] = {column: float(np.nanmean(scored[name][column])) for column in SHOWN}
        results[name] |= {
            "tp5": tp5,
            "less": stats.paired(
                scored[name]["recall"], scored["full"]["recall"], config.seed, config.n_boot
            ),
        }
        print(f"{name}: recall {results[name]['recall']:.4f}", flush=True)
    text = table(results, len(users), config)
    out = config.stage("storefront-study")
    keep(out, results, text)
    return results


if __name__ == "__main__":
    sys.exit(main(Config, run, "experiments.storefront_study"))
