"""Pages of rows for everybody, scored on held-out orders, beside what a shop could do without
themes.

Reads   runs/<run>/storefront/build and tune
Writes  runs/<run>/storefront/evaluate      pages.parquet (user, rank, item, score; reading order),
                                            placements.parquet (one row an item, with its parts),
                                            decisions.parquet (every look of a gate),
                                            metrics.json, table.txt

    pagellm storefront evaluate --dataset complete_journey

Rows of the table, each with as many items as the page has slots:

    storefront      the page of themed rows
    static          the layout with best-selling categories, each in the ranker's order
    static popular  the same, in the order of popularity
    own popular     each person's most bought categories, by popularity
    own ranked      the same, in the ranker's order
    flat            the ranker's own best items without rows: what the themes are paid for with
    popularity      the best sellers without rows

The price of theming is 1 - recall@page / recall of `flat`.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pagellm.pages import metrics, stats
from pagellm.stage import randomness
from pagellm.stage.command import main
from pagellm.stage.config import PageLLMError, check
from pagellm.stage.files import atomic, read_json, write_json
from pagellm.stage.hints import counted
from pagellm.stage.run import Run, finished
from pagellm.storefront.front import Explored, Store, open_store
from pagellm.storefront.page import page, spread
from pagellm.storefront.parts import PARTS, Context, Page
from pagellm.storefront.rankers import Popularity
from pagellm.storefront.text import best_first
from pagellm.storefront.tune import fitting, people_of

__all__ = ["Config", "baselines", "grid_of", "run", "table", "user_scores"]

COLUMNS = ("recall", "new_recall", "NDCG", "ILD", "entropy")


@dataclass(frozen=True, kw_only=True)
class Config(Explored):
    """Make everybody's page of rows, score it on held-out orders, and print the table."""

    split: str = "test"  # held-out orders that count as hits: test or valid
    people: int = 0  # users to evaluate, drawn by seed; 0: all
    n_boot: int = 1000  # bootstrap draws for each interval

    def __post_init__(self):
        super().__post_init__()
        check(
            self,
            split=(self.split in ("test", "valid"), "test or valid"),
            n_boot=(self.n_boot > 1, "2 or more"),
        )


def grid_of(lists: list[np.ndarray]) -> np.ndarray:
    """(U, longest) int64, -1 past the end of a list."""
    width = max((len(items) for items in lists), default=1)
    out = np.full((len(lists), max(width, 1)), -1, dtype=np.int64)
    for row, items in enumerate(lists):
        out[row, : len(items)] = items
    return out


def user_scores(
    store: Store, users: np.ndarray, labels, lists: list[np.ndarray]
) -> dict[str, np.ndarray]:
    """name -> (U,) of some users' pages in reading order; NaN where undefined.

    recall      labels on the page / labels
    new_recall  the same, of labels never bought before
    """
    recall, new = np.full(len(users), np.nan), np.full(len(users), np.nan)
    refs: list[np.ndarray] = []
    for at, (user, items) in enumerate(zip(users.tolist(), lists, strict=True)):
        label = labels.of(user)[0]
        refs.append(label)
        recall[at] = np.isin(label, items).mean()
        fresh = label[~np.isin(label, store.known.rows.of(user)[0])]
        if len(fresh):
            new[at] = np.isin(fresh, items).mean()
    sizes, counts = [len(items) for items in lists], [len(label) for label in refs]
    shown = (
        np.repeat(users, sizes),
        np.concatenate([np.arange(1, n + 1) for n in sizes]),
        np.concatenate(lists),
    )
    # All labels are equally good: each has the mean of the ranks 1..n.
    ranks = np.concatenate([np.full(n, (n + 1) / 2) for n in counts])
    k = max(*sizes, 1)
    found = metrics.score_pages(
        users,
        shown,
        (np.repeat(users, counts), np.concatenate(refs), ranks),
        store.front.catalogue.categories,
        page_k=k,
        ndcg_k=k,
    )
    return {
        "recall": recall,
        "new_recall": new,
        "NDCG": found[f"NDCG@{k}"],
        "ILD": found["ILD"],
        "entropy": found["entropy"],
    }


def own_categories(store: Store, context: Context, n: int) -> list[np.ndarray]:
    """Items of the person's n most bought categories; best sellers where there are fewer."""
    front = store.front
    category = front.missions.category
    bought = category[context.item]
    count = np.bincount(bought[bought >= 0], context.count[bought >= 0], len(front.missions.names))
    order = np.lexsort((np.arange(len(count)), -count))
    own = [c for c in order.tolist() if count[c] > 0]
    number = {name: c for c, name in enumerate(front.missions.names)}
    own += [c for c in (number[name] for name in front.best) if c not in own]
    return [np.flatnonzero((category == c) & front.stock) for c in own[:n]]


def rows_by(
    groups: list[np.ndarray], score: np.ndarray, slots: list[int], first: np.ndarray
) -> np.ndarray:
    """Reading order of `first` and then each group's best items, none twice."""
    shown = [first]
    for items, n in zip(groups, slots, strict=False):
        rest = items[~np.isin(items, np.concatenate(shown))]
        shown.append(rest[best_first(score[rest], rest, n)])
    return np.concatenate(shown)


def baselines(store: Store, context: Context) -> dict[str, np.ndarray]:
    """The pages of one person without themes, but for the static ones."""
    front, layout = store.front, store.layout
    slots = [placement.slots for placement in layout.placements]
    logit, popular = front.ranker(context), Popularity(front.households)(context)
    allowed = front.stock.copy()
    allowed[context.barred] = False
    if all(placement.intent == "discover" for placement in layout.placements):
        allowed[context.item] = False
    live = np.flatnonzero(allowed)
    restock = np.zeros(0, dtype=np.int64)
    if layout.placements[0].intent == "restock" and len(context.item):
        again = context.item[allowed[context.item]]
        restock = again[best_first(logit[again], again, slots[0])]
        slots = slots[1:]
    groups = [items[allowed[items]] for items in own_categories(store, context, len(slots))]
    groups_all = [
        items[allowed[items]] for items in own_categories(store, context, len(layout.placements))
    ]
    every = [placement.slots for placement in layout.placements]
    none = np.zeros(0, dtype=np.int64)
    return {
        "own popular": rows_by(groups_all, popular, every, none),
        "own ranked": rows_by(groups, logit, slots, restock),
        "flat": live[best_first(logit[live], live, sum(every))],
        "popularity": live[best_first(popular[live], live, sum(every))],
    }


def all_pages(
    store: Store, users: np.ndarray, config: Config
) -> tuple[dict[str, list], list[Page]]:
    """name -> the items of every user's page; and the storefront's pages themselves."""
    static = replace(store.front, static=True)
    popular = replace(static, ranker=Popularity(static.households))
    lists: dict[str, list[np.ndarray]] = {}
    made = []
    for user in users.tolist():
        context = store.known.context(store.shop.user_ids[user])
        made.append(page(store.front, context, store.layout, config.seed, **config.drawn))
        shown = {
            "storefront": made[-1].items(),
            "static": page(static, context, store.layout).items(),
            "static popular": page(popular, context, store.layout).items(),
        }
        for name, items in (shown | baselines(store, context)).items():
            lists.setdefault(name, []).append(items)
    return lists, made


def placements_table(users: np.ndarray, pages: list[Page]) -> pa.Table:
    """One row an item of every page: placements.parquet."""
    rows: dict[str, list] = {name: [] for name in (
        "user", "position", "placement", "rank", "item", *PARTS, "propensity", "source", "title",
        "writer",
    )}  # fmt: skip
    for user, found in zip(users.tolist(), pages, strict=True):
        for position, row in enumerate(found.rows, 1):
            n = len(row.item)
            rows["user"] += [user] * n
            rows["position"] += [position] * n
            rows["placement"] += [row.placement.id] * n
            rows["rank"] += list(range(1, n + 1))
            rows["item"] += row.item.tolist()
            for at, name in enumerate(PARTS):
                rows[name] += row.parts[:, at].tolist()
            rows["propensity"] += row.propensity.tolist()
            rows["source"] += [row.source] * n
            rows["title"] += [row.theme.title] * n
            rows["writer"] += [row.theme.source] * n
    return pa.table(rows)


def pages_table(users: np.ndarray, pages: list[Page]) -> pa.Table:
    """user, rank, item, score in reading order, as every other page of the project."""
    sizes = [len(found.items()) for found in pages]
    return pa.table(
        {
            "user": np.repeat(users, sizes).astype(np.int32),
            "rank": np.concatenate([np.arange(1, n + 1) for n in sizes]).astype(np.int32),
            "item": np.concatenate([found.items() for found in pages]).astype(np.int32),
            # Scores of different rows are not on one scale; the reading order is.
            "score": np.concatenate([-np.arange(1.0, n + 1) for n in sizes]).astype(np.float32),
        }
    )


def decisions_table(pages: list[Page]) -> pa.Table:
    """Every decision of the gates, which names no person: decisions.parquet."""
    looks = [(found, look) for found in pages for look in found.decisions]
    texts = ("stage", "level", "rule", "action")
    columns = {"page_id": pa.array([found.page_id for found, _ in looks]).dictionary_encode()}
    for name in texts:
        columns[name] = pa.array([getattr(look, name) for _, look in looks]).dictionary_encode()
    for name in ("value", "threshold"):
        columns[name] = pa.array([getattr(look, name) for _, look in looks], pa.float64())
    version = [f"{found.models['gates']} {found.models['policy']}" for found, _ in looks]
    return pa.table(columns | {"version": pa.array(version).dictionary_encode()})


def personal(
    store: Store, users: np.ndarray, labelled: list[np.ndarray], pages: list[Page], seed: int
) -> float | None:
    """How often one's own page finds more of one's labels than the page of somebody as active.

    A tie counts half: .5 is what pages that are the same for everybody have. None without anybody
    to compare with.
    """
    n_bought = store.known.rows.counts()[users]
    tercile = np.searchsorted(np.quantile(n_bought, [1 / 3, 2 / 3]), n_bought)
    rng, wins = randomness.rng(seed, "storefront", "personal"), []
    items = [found.items() for found in pages]
    for at, label in enumerate(labelled):
        others = np.flatnonzero(tercile == tercile[at])
        others = others[others != at]
        if len(others):
            own, other = (np.isin(label, items[i]).mean() for i in (at, rng.choice(others)))
            wins.append(0.5 * (1 + np.sign(own - other)))
    return float(np.mean(wins)) if wins else None


def about_keywords(
    store: Store, labelled: list[np.ndarray], pages: list[Page]
) -> dict[str, float | None]:
    """keyword_fit: share of keywords that match a label of the person's. overlap: how much of a
    keyword's items its nearest neighbour above finds too. density: items a keyword finds, median.
    """
    corpus = store.front.corpus
    fits, found, overlap = [], [], []
    for label, made in zip(labelled, pages, strict=True):
        for row in made.rows:
            matches = [corpus.matches(corpus.number[word.text]) for word in row.keywords]
            fits += [bool(np.isin(label, items).any()) for items in matches]
            found += [len(items) for items in matches]
        overlap += [d.value for d in made.decisions if d.rule == "overlap" and d.action == "pass"]
    return {
        "keyword_fit": float(np.mean(fits)) if fits else None,
        "overlap": float(np.mean(overlap)) if overlap else None,
        "density": float(np.median(found)) if found else None,
    }


def about_rows(store: Store, pages: list[Page]) -> dict[str, float]:
    """What is said of the rows themselves."""
    rows = [row for found in pages for row in found.rows]
    words = [keyword for row in rows for keyword in row.keywords]
    corpus, threshold = store.front.corpus, store.front.policy.min_items
    decisions = [
        d for found in pages for d in found.decisions if d.level in ("text", "theme", "placement")
    ]
    categories, households = store.shop.catalogue.categories, store.front.households
    percentile = np.argsort(np.argsort(households, kind="stable")) / max(len(households) - 1, 1)
    sets = {tuple(row.theme.title for row in found.rows) for found in pages}
    return {
        "generated": float(np.mean([row.source == "generated" for row in rows])),
        "tp5": fitting(store.front, pages),
        "keywords": len(words),
        "validity": float(np.mean([w.text in corpus.number for w in words])) if words else 1.0,
        "zero_results": float(np.mean([w.matches < 1 for w in words])) if words else 0.0,
        "short_rows": float(np.mean([len(row.item) < threshold for row in rows])),
        "repeats": float(np.mean([found.page["repeats"] for found in pages])),
        "blocked": float(np.mean([d.action != "pass" for d in decisions])) if decisions else 0.0,
        "titles": len({row.theme.title for row in rows}),
        "page_sets": len(sets) / len(pages),
        "cohesion": float(np.mean([1 - spread(row.item.tolist(), categories) for row in rows])),
        "popularity": float(np.mean(percentile[np.concatenate([p.items() for p in pages])])),
        "items_ever": len(np.unique(np.concatenate([p.items() for p in pages])))
        / store.shop.n_items,
        "ms": float(np.median([found.ms["total"] for found in pages])),
    }


def table(results: dict[str, dict], about: dict[str, Any], heading: str) -> str:
    lines = [heading, "", f"{'':<16}" + "".join(f"{name:>26}" for name in COLUMNS)]
    for name, scores in results.items():
        cells = []
        for column in COLUMNS:
            s = scores[column]
            cells.append(
                "–" if s["mean"] is None else f"{s['mean']:.4f} [{s['low']:.4f}, {s['high']:.4f}]"
            )
        lines.append(f"{name:<16}" + "".join(f"{cell:>26}" for cell in cells))
    gap = about["difference"]
    price = "–" if about["price"] is None else f"{about['price']:.1%}"
    lines += [
        "",
        f"price of theming {price}; storefront - flat {gap['mean']:+.4f} "
        f"[{gap['low']:+.4f}, {gap['high']:+.4f}]",
        f"first five items that fit the theme's mission {about['tp5']:.3f}; rows generated "
        f"{about['generated']:.3f}; keywords of the corpus {about['validity']:.4f} of "
        f"{about['keywords']:,}; "
        f"without a result {about['zero_results']:.4f}",
        f"keywords that match a label {shown(about['keyword_fit'])}; items a keyword finds "
        f"{shown(about['density'])} (median), its overlap with one above {shown(about['overlap'])}",
        f"likeness inside rows {about['cohesion']:.3f}; popularity percentile "
        f"{about['popularity']:.3f}; own page better than that of somebody as active "
        f"{shown(about['personal'])}",
        f"{counted(about['titles'], 'title')}; decisions that block {about['blocked']:.4f}; items "
        f"ever shown {about['items_ever']:.3f}; {about['ms']:.1f} ms a page",
    ]
    return "\n".join(lines) + "\n"


def price_of(recall: float, flat: float) -> float | None:
    """The share of the list's recall that rows cost; None where the list finds nothing either."""
    return 1 - recall / flat if flat else None


def shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def run(config: Config) -> dict:
    """Make, score and write; returns name -> metric -> {mean, low, high}."""
    make = config.make("storefront build")
    inputs = {"build": finished(config.stage("storefront/build"), "storefront", make)["id"]}
    with Run(config.stage("storefront/evaluate"), config, inputs) as out:
        if out.already_done():
            print((out.path / "table.txt").read_text())
            return read_json(out.path / "metrics.json")["rows"]
        store = open_store(config)
        users, labels = people_of(store, config.split)
        if not len(users):
            raise PageLLMError(
                f"{config.data_dir} has no {config.split} rows of people with a history"
            )
        if config.people:
            rng = np.random.Generator(np.random.Philox(key=config.seed))
            users = np.sort(rng.permutation(users)[: config.people])
        lists, pages = all_pages(store, users, config)
        scored = {name: user_scores(store, users, labels, shown) for name, shown in lists.items()}
        results = {
            name: {m: stats.summary(v, config.seed, config.n_boot) for m, v in scores.items()}
            for name, scores in scored.items()
        }
        labelled = [labels.of(user)[0] for user in users.tolist()]
        about: dict[str, Any] = {**about_rows(store, pages)}
        about |= about_keywords(store, labelled, pages)
        about |= {
            "personal": personal(store, users, labelled, pages, config.seed),
            "price": price_of(
                results["storefront"]["recall"]["mean"], results["flat"]["recall"]["mean"]
            ),
            "difference": stats.paired(
                scored["storefront"]["recall"], scored["flat"]["recall"], config.seed, config.n_boot
            ),
        }
        heading = (
            f"{config.dataset}: {counted(len(users), 'person', 'people')}, "
            f"{counted(store.shop.n_items, 'item')}, "
            f"{config.split} orders; "
            f"layout {store.layout.id}, ranker {store.front.ranker.name}; mean and 95% interval"
        )
        text = table(results, about, heading)
        write_results(out.path, results, about, text, users, pages)
        out.finish(people=len(users))
        print(text, flush=True)
        return results


def write_results(
    folder: Path, results, about, text: str, users: np.ndarray, pages: list[Page]
) -> None:
    for name, content in (
        ("pages", pages_table(users, pages)),
        ("placements", placements_table(users, pages)),
        ("decisions", decisions_table(pages)),
    ):
        with atomic(folder / f"{name}.parquet") as beside:
            pq.write_table(content, beside, compression="zstd")
    write_json(folder / "metrics.json", {"rows": results, "about": about})
    with atomic(folder / "table.txt") as beside:
        beside.write_text(text)


if __name__ == "__main__":
    sys.exit(main(Config, run, "pagellm storefront evaluate"))
