"""How fast the storefront is, and how it grows with the shop: processor time on one core.

Reads   data/<dataset>, runs/<run>/storefront/build and tune
Prints  pages from kept rows in shops of several sizes, pages without a cache, BM25, pruning, the
        trie, the scorer, writing under masks

Beside ours stand bm25s (same scores) and the masks of llguidance, where these wheels are installed.

    make storefront-bench DATASET=complete_journey

A larger shop is this one several times over: its items are copied, and what people bought and what
rows hold is spread over the copies. Times are of this machine; ratios within a run say more. The
part `build` builds such a shop anew, copies being of brands of their own; its memory is the
largest that the process had up to then.
"""

import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np

from pagellm.data.orders import Orders
from pagellm.data.shop import Catalogue, Shop
from pagellm.model.networks import build
from pagellm.model.vocab import Vocab
from pagellm.stage import dist, randomness
from pagellm.stage.command import main
from pagellm.stage.config import PageLLMError, check
from pagellm.storefront import build as stage
from pagellm.storefront.context import Known
from pagellm.storefront.corpus import prune
from pagellm.storefront.front import Sources, Store, front_of, open_store
from pagellm.storefront.fuse import SameLeaf
from pagellm.storefront.local import Local, Next
from pagellm.storefront.making import Front
from pagellm.storefront.offers import open_rows_of
from pagellm.storefront.page import page, written_ahead
from pagellm.storefront.parts import Answer, Context, Written
from pagellm.storefront.prompts import Question, keywords_question
from pagellm.storefront.rankers import Blend, Factors
from pagellm.storefront.remote import Remote
from pagellm.storefront.text import BM25, index_texts, stems
from pagellm.storefront.trie import Node, Trie, keywords_under

__all__ = ["Config", "grown", "run"]

MASK_WORDS = 2048  # of the vocabulary under whose masks keywords are written
TRIE, LONGEST, WORDS = 300_000, 8, 30_000  # keywords of the trie, tokens of one, different tokens


@dataclass(frozen=True, kw_only=True)
class Config(Sources):
    """Measure the parts of the storefront, and pages in shops of growing size."""

    sizes: str = "10000,100000,1000000"  # items of the shops, comma-separated; the first may be
    # smaller than the shop itself, and is then the shop as it is
    people: int = 100  # whose pages are made in each shop
    parts: str = "online,parts,bm25,masks"  # what is measured, comma-separated
    rounds: int = 3  # of which the median counts
    micro: int = 1  # part keywords: rows that the network writes side by side

    def __post_init__(self):
        super().__post_init__()
        ok = all(word.isdigit() and int(word) > 0 for word in self.sizes.split(","))
        check(
            self,
            sizes=(ok, "numbers above 0, comma-separated"),
            parts=(set(self.parts.split(",")) <= set(PARTS), f"some of {','.join(PARTS)}"),
            people=(self.people > 0, "1 or more"),
            rounds=(self.rounds > 0, "1 or more"),
            micro=(self.micro > 0, "1 or more"),
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
        if (other := beside_bm25s(docs * times, index, queries, config.rounds)) is not None:
            found[-1] |= other
            print(f"  bm25s: p50 {other['bm25s p50']:.3f} ms, p95 {other['bm25s p95']:.3f} ms; "
                  f"best scores differ by {other['apart']:.1e} at most", flush=True)  # fmt: skip
    return found


def beside_bm25s(docs: list[list[str]], index: BM25, queries, rounds: int) -> dict | None:
    """Times of bm25s for the same queries, and how far its best scores are from ours."""
    if find_spec("bm25s") is None:
        print("  bm25s is not installed: pip install --no-deps bm25s", flush=True)
        return None
    import bm25s

    other = bm25s.BM25(method="lucene", k1=1.2, b=0.75)
    other.index(docs, show_progress=False)
    k, spent, apart = min(50, len(docs)), [], 0.0
    for query in queries:
        ask = partial(other.retrieve, [query], k=k, show_progress=False)
        spent.append(milliseconds(ask, rounds))
        theirs = float(np.asarray(ask().scores).max())
        apart = max(apart, abs(theirs - float(index.top(query, k)[1][0])))
    p50, p95 = np.percentile(spent, [50, 95])
    return {"bm25s p50": float(p50), "bm25s p95": float(p95), "apart": apart}


def under_masks(store: Store, config: Config) -> dict[str, float]:
    """Keywords written under the trie against the network alone on the same tokens; one step's
    mask beside llguidance's for the same keywords on offer.

    The network is llama-mini as it is before training: what it prefers plays no part.
    """
    corpus, users = store.front.corpus, store.shop.user_ids
    vocab = Vocab.train(corpus.text, 0, 0, MASK_WORDS)
    randomness.seed_torch(config.seed, "storefront", "masks")
    model = build("llama-mini", vocab.n_words, 0, 0, 0.0).eval()
    rows = written_ahead(store.front, store.known.context(users[0]), store.layout)[0]
    offered = [corpus.text[w] for w in prune(corpus, rows[0].theme).tolist()]
    (separator,) = vocab.words("\n")
    tokens = vocab.words_batch(offered)
    trie = Trie.of(tokens, separator)
    prompt = vocab.words(f"keywords: {rows[0].theme.title}\n")
    room = (8 + 1) * (max(map(len, tokens)) + 1)
    calls: list[list[tuple[int, ...]]] = []

    def write(keep: bool = False) -> None:
        follow = Next(model, prompt, room)

        def ask(paths):
            if keep:
                calls.append(list(paths))
            return follow(paths)

        keywords_under(trie, ask)

    def alone() -> None:
        follow = Next(model, prompt, room)
        for paths in calls:
            follow(paths)

    write(keep=True)
    both = [(milliseconds(write, 1), milliseconds(alone, 1)) for _ in range(max(3, config.rounds))]
    ratio = float(np.median([masked / plain for masked, plain in both]))
    found = {"masked over unmasked": ratio, "tokens": float(sum(map(len, calls)))}
    print(f"eight keywords under the trie, {found['tokens']:.0f} tokens followed: {ratio:.2f} of "
          "the network's own time", flush=True)  # fmt: skip
    steps = sum(len(path) + 1 for path in tokens)
    ours = milliseconds(partial(our_masks, trie, tokens, vocab.n_words), config.rounds) / steps
    found["mask us"] = 1e3 * ours
    print(f"one step's mask of {len(offered)} keywords: {1e3 * ours:.1f} us", flush=True)
    theirs = llguidance_masks(vocab, offered, tokens, config.rounds)
    if theirs is not None:
        found["llguidance us"] = 1e3 * theirs / steps
        print(f"  llguidance: {found['llguidance us']:.1f} us", flush=True)
    return found


def our_masks(trie: Trie, tokens: list[list[int]], n_words: int) -> None:
    """The mask of every step of every keyword."""
    for path in tokens:
        node = trie.root
        for token in [*path, trie.separator]:
            child, low, high = trie.children(node)
            allowed = np.zeros(n_words, dtype=bool)
            allowed[child] = True
            at = int(np.searchsorted(child, token))
            node = Node(int(low[at]), int(high[at]), node.depth + 1)


def llguidance_masks(
    vocab: Vocab, offered: list[str], tokens: list[list[int]], rounds: int
) -> float | None:
    """Milliseconds of the masks of every step of every keyword; None without llguidance."""
    if find_spec("llguidance") is None:
        print("  llguidance is not installed: pip install --no-deps llguidance", flush=True)
        return None
    from llguidance import LLMatcher, LLTokenizer

    words = "|".join(re.escape(text) for text in offered)
    tokenizer = LLTokenizer(vocab.tokenizer.to_str())
    grammar = LLMatcher.grammar_from_regex(f"({words})\\n")
    began = LLMatcher(tokenizer, grammar)
    if began.is_error():
        raise PageLLMError(f"llguidance does not take the keywords: {began.get_error()}")

    def walk() -> None:
        for path in tokens:
            matcher = began.deep_copy()
            for token in path:
                matcher.compute_bitmask()
                if not matcher.consume_token(token):
                    raise ValueError(f"llguidance refuses a keyword's own token {token}")
            matcher.compute_bitmask()

    return milliseconds(walk, rounds)


def copied(shop: Shop, train: Orders, times: int, rng) -> tuple[Shop, Orders]:
    """The shop so many times over, each copy's brands its own, and the same purchases of copies."""
    one, copies = shop.catalogue, range(times)
    catalogue = Catalogue.of(
        [f"{name}-{copy}" for copy in copies for name in one.ids],
        [f"{title} {copy}" if title else "" for copy in copies for title in one.title],
        [f"{brand} {copy}" if brand else "" for copy in copies for brand in one.brand],
        one.categories * times,
        one.leaf * times,
        [""] * (times * len(one)),
        np.tile(one.price, times),
    )
    n, place = shop.n_items, shop.n_items * rng.integers(0, times, shop.n_items)
    moved = replace(train, item=train.item + place[train.item], n_items=n * times)
    large = replace(shop, n_items=n * times, item=shop.item + place[shop.item], catalogue=catalogue)
    return large, moved


def built_anew(store: Store, config: Config) -> list[dict]:
    """A build, and pages without a cache out of it, by size of the shop: seconds, ms, gigabytes."""
    shop, policy, found = store.shop, store.front.policy, []
    options = stage.Config(**{name: getattr(config, name) for name in ("seed", "device")})
    train = store.orders.only("train")
    for size in map(int, config.sizes.split(",")):
        times = max(1, round(size / shop.n_items))
        rng = randomness.rng(config.seed, "storefront", "copies", times)
        large, orders = copied(shop, train, times, rng)
        stock = np.ones(large.n_items, dtype=bool)
        began = time.process_time()
        state, counts = stage.built(options, large, orders, policy, stock)
        seconds = time.process_time() - began
        front = front_of(config, large, state, policy, stock, config.seed)
        k, end = front.missions.k, orders.end()
        known = Known.of(large, orders, front.missions.of_item, k, end, policy)
        users = randomness.rng(config.seed, "storefront", "bench").permutation(shop.n_users)
        people = [known.context(shop.user_ids[u]) for u in users[: config.people].tolist()]
        spent = [milliseconds(partial(page, front, one, store.layout), 1) for one in people]
        p50, p95 = np.percentile(spent, [50, 95])
        memory = dist.peak_memory() * 2**20 / 1e9
        words = sum(counts["keywords"].values())
        found.append({"items": large.n_items, "keywords": words, "seconds": seconds,
                      "p50": float(p50), "p95": float(p95), "GB": memory})  # fmt: skip
        print(f"{large.n_items:>9,} items, {words:,} keywords: built in {seconds:.0f} s; a page "
              f"without a cache p50 {p50:.0f} ms, p95 {p95:.0f} ms; {memory:.1f} GB",
              flush=True)  # fmt: skip
    return found


def written_keywords(store: Store, config: Config) -> dict[str, float]:
    """Keywords that a network of our own blocks writes for the template's themes of some people:
    how many are of the corpus, and find an item in stock. Nothing is mended before it is counted.
    """
    front, corpus = store.front, store.front.corpus
    if not isinstance(front.writer, Remote) or not isinstance(front.writer.asked, Local):
        raise PageLLMError("parts=keywords: want --writer lm --weights DIRECTORY")
    template, local = front.writer.template, front.writer.asked
    users = randomness.rng(config.seed, "storefront", "bench").permutation(store.shop.n_users)
    questions = {}
    for user in users[: config.people].tolist():
        context = store.known.context(store.shop.user_ids[user])
        told, intents, used = open_rows_of(front, context, store.layout)
        for answer in template.themes([told], [intents], [used])[0]:
            if answer.value is not None:
                offered = [corpus.text[w] for w in prune(corpus, answer.value).tolist()]
                question = keywords_question(answer.value, offered)
                questions[question.key] = question
    said: list[str] = []

    def ask(question: Question) -> Answer[dict]:
        return local.ask(question, lambda value: value)

    began = time.process_time()
    answers = local.table.each(ask, list(questions.values()), config.micro)
    seconds = (time.process_time() - began) / max(len(questions), 1)
    for one in answers:
        said += one.value["keywords"] if one.value is not None else []
    known = [corpus.number[text] for text in said if text in corpus.number]
    find = sum(bool(front.stock[corpus.matches(w)].any()) for w in known)
    n = max(len(said), 1)
    found = {"keywords": len(said), "valid": len(known) / n, "find": find / n, "seconds": seconds}
    print(f"{len(said):,} keywords for {len(questions):,} rows by {local.name}: {len(known):,} of "
          f"the corpus, {find:,} find an item in stock; {seconds:.2f} s a row, "
          f"{config.micro} side by side", flush=True)  # fmt: skip
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
    "masks": under_masks,
    "build": built_anew,
    "keywords": written_keywords,
}


if __name__ == "__main__":
    sys.exit(main(Config, run, "experiments.storefront_bench"))
