"""How fast the storefront is, and how it grows with the shop: processor time on one core.

Reads   data/<dataset>, runs/<run>/storefront/build and tune
Prints  pages from kept rows in shops of several sizes, pages without a cache, BM25, pruning, the
        trie, the scorer

    make storefront-bench DATASET=complete_journey

A larger shop is this one several times over: its items are copied, and what people bought and what
rows hold is spread over the copies. Times are of this machine; ratios within a run say more.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from pagellm.stage import randomness
from pagellm.stage.command import main
from pagellm.stage.config import check
from pagellm.storefront.corpus import prune
from pagellm.storefront.front import Sources, Store, open_store
from pagellm.storefront.fuse import SameLeaf
from pagellm.storefront.page import Front, page, written_ahead
from pagellm.storefront.parts import Context, Written
from pagellm.storefront.rankers import Blend, Factors
from pagellm.storefront.text import BM25, index_texts, stems
from pagellm.storefront.trie import Trie

__all__ = ["Config", "grown", "run"]

TRIE, LONGEST, WORDS = 300_000, 8, 30_000  # keywords of the trie, tokens of one, different tokens


@dataclass(frozen=True, kw_only=True)
class Config(Sources):
    """Measure the parts of the storefront, and pages in shops of growing size."""

    sizes: str = "10000,100000,1000000"  # items of the shops, comma-separated; the first may be
    # smaller than the shop itself, and is then the shop as it is
    people: int = 100  # whose pages are made in each shop
    parts: str = "online,parts,bm25"  # what is measured, comma-separated
    rounds: int = 3  # of which the median counts

    def __post_init__(self):
        super().__post_init__()
        ok = all(word.isdigit() and int(word) > 0 for word in self.sizes.split(","))
        check(
            self,
            sizes=(ok, "numbers above 0, comma-separated"),
            parts=(set(self.parts.split(",")) <= set(PARTS), f"some of {','.join(PARTS)}"),
            people=(self.people > 0, "1 or more"),
            rounds=(self.rounds > 0, "1 or more"),
            ranker=(self.ranker == "blend", "blend, whose factors can be copied"),
        )


def grown(front: Front, times: int) -> Front:
    """The front of a shop that is this one so many times over; its keywords stay."""
    ranker = front.ranker
    assert isinstance(ranker, Blend)
    households = np.tile(front.households, times)
    factors = Factors(np.tile(ranker.factors.item, (times, 1)), ranker.factors.gram * times)
    similar = front.similar
    catalogue = replace(front.catalogue, categories=front.catalogue.categories * times)
    return replace(
        front,
        catalogue=catalogue,
        stock=np.ones(len(households), dtype=bool),
        households=households,
        ranker=Blend(factors, households),
        similar=SameLeaf(np.tile(similar.leaf, times), np.tile(similar.parent, times)),
    )


def spread(context: Context, rows: list[Written], n: int, times: int, rng) -> tuple:
    """The same person and rows, their items somewhere among the copies."""
    place = n * rng.integers(0, times, n)
    moved = replace(context, item=context.item + place[context.item])
    found = []
    for row in rows:
        item = row.found.item + place[row.found.item]
        order = np.argsort(item)
        columns = {name: getattr(row.found, name)[order] for name in ("ret", "agree", "source")}
        found.append(replace(row, found=replace(row.found, item=item[order], **columns)))
    return moved, found


def milliseconds(do: Callable[[], Any], rounds: int) -> float:
    """Median processor time of some rounds."""
    spent = []
    for _ in range(rounds):
        began = time.process_time()
        do()
        spent.append(1e3 * (time.process_time() - began))
    return float(np.median(spent))


def online(store: Store, config: Config) -> list[dict]:
    """p50 and p95 of pages that are ranked from kept rows, by size of the shop."""
    front, shop = store.front, store.shop
    users = randomness.rng(config.seed, "storefront", "bench").permutation(shop.n_users)
    people = [store.known.context(shop.user_ids[u]) for u in users[: config.people].tolist()]
    kept = [written_ahead(front, context, store.layout)[0] for context in people]
    copies = [max(1, round(int(size) / shop.n_items)) for size in config.sizes.split(",")]
    fronts = [grown(front, times) for times in copies]
    spent = np.zeros((len(people), len(copies), config.rounds))
    for at, (context, rows) in enumerate(zip(people, kept, strict=True)):
        rng = randomness.rng(config.seed, "storefront", "spread", at)
        moved = [spread(context, rows, shop.n_items, times, rng) for times in copies]
        # All shops in turn, so that whatever else the machine does meets them alike.
        for turn in range(config.rounds):
            for size, (large, (person, own)) in enumerate(zip(fronts, moved, strict=True)):
                do = partial(page, large, person, store.layout, written=own)
                spent[at, size, turn] = milliseconds(do, 1)
    found = []
    for size, times in enumerate(copies):
        p50, p95 = np.percentile(np.median(spent[:, size], axis=1), [50, 95])
        found.append({"items": times * shop.n_items, "p50": float(p50), "p95": float(p95)})
        print(f"page from kept rows, {times * shop.n_items:>9,} items: p50 {p50:.2f} ms, "
              f"p95 {p95:.2f} ms", flush=True)  # fmt: skip
    print(f"  p95 of the largest shop over the smallest: {found[-1]['p95'] / found[0]['p95']:.2f}")
    return found


def searched(store: Store, config: Config) -> list[dict]:
    """BM25 of three words that stand in a title, by number of texts."""
    docs = [stems(text) for text in index_texts(store.shop.catalogue)]
    rng = randomness.rng(config.seed, "storefront", "queries")
    some = [docs[at] for at in rng.integers(0, len(docs), 100).tolist()]
    queries = [rng.permutation(words)[:3].tolist() for words in some if len(words) >= 3]
    found = []
    for size in map(int, config.sizes.split(",")):
        times = max(1, round(size / len(docs)))
        index = BM25(docs * times)
        spent = [milliseconds(partial(index.top, q, 50), config.rounds) for q in queries]
        p50, p95 = np.percentile(spent, [50, 95])
        found.append({"texts": times * len(docs), "p50": float(p50), "p95": float(p95)})
        print(f"BM25 of three words, {times * len(docs):>9,} texts: p50 {p50:.3f} ms, "
              f"p95 {p95:.3f} ms", flush=True)  # fmt: skip
    return found


def single_parts(store: Store, config: Config) -> dict[str, float]:
    """Milliseconds of the parts that a page made now consists of, and of the trie."""
    front = store.front
    users = randomness.rng(config.seed, "storefront", "bench").permutation(store.shop.n_users)
    people = [store.known.context(store.shop.user_ids[u]) for u in users[:20].tolist()]
    made = milliseconds(lambda: [page(front, c, store.layout) for c in people], config.rounds)
    rows = written_ahead(front, people[0], store.layout)[0]
    themes = [row.theme for row in rows][:6]
    rng = randomness.rng(config.seed, "storefront", "trie")
    size = rng.integers(1, LONGEST, TRIE)
    tokens = [rng.integers(1, WORDS, n).tolist() for n in size.tolist()]
    found = {
        "page without a cache": made / len(people),
        f"pruning {len(themes)} themes, {len(front.corpus):,} keywords": milliseconds(
            lambda: [prune(front.corpus, theme) for theme in themes], config.rounds
        ),
        "scorer, one row of 200 candidates": milliseconds(
            lambda: front.agree(rows[0].theme, list(rows[0].keywords), rows[0].found.item),
            config.rounds,
        ),
        f"trie of {TRIE:,} keywords": milliseconds(lambda: Trie.of(tokens, 0), 1),
    }
    for name, ms in found.items():
        print(f"{name}: {ms:.2f} ms", flush=True)
    print(f"  {1e3 / found['page without a cache']:.0f} pages a second without a cache")
    return found


def run(config: Config) -> dict:
    """Measure and print; returns the numbers."""
    store = open_store(config)
    return {name: PARTS[name](store, config) for name in config.parts.split(",")}


PARTS: dict[str, Callable[[Store, Config], Any]] = {
    "online": online,
    "parts": single_parts,
    "bm25": searched,
}


if __name__ == "__main__":
    sys.exit(main(Config, run, "experiments.storefront_bench"))
