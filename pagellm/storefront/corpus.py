"""Keywords: every text that a row may be searched by, and the items that it matches.

corpus = build_corpus(catalogue, stock)
corpus.matches(w)                           items in stock of keyword w
prune(corpus, theme, n=100)                 the keywords nearest to a theme, best first

Vectors are of the shop's own words (Space), or of a sentence encoder (encode.py).

Four types, the earlier one where two texts are equal after stemming: category (every node of every
path), brand (of 5 items and more), attribute (a word frequent in titles of a category, with the
category's name) and query (1 to 3 words that stand together in 3 titles and more). A structured
keyword matches by membership, a query every item whose text holds all of its stems. Only items in
stock are looked at, so an item that is sold out changes nothing.
"""

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.util import find_spec
from typing import Protocol

import numpy as np
import torch

from pagellm.data.shop import Catalogue
from pagellm.storefront.parts import Keyword, Theme
from pagellm.storefront.text import BM25, best_first, index_texts, stem, stems, words

__all__ = [
    "Corpus",
    "LONGEST_TEXT",
    "STOP",
    "Space",
    "TYPES",
    "Vectors",
    "build_corpus",
    "fused_ranks",
    "prune",
    "set_overlap",
]

TYPES = ("category", "brand", "attribute", "query")
BRAND_ITEMS, ATTRIBUTE_ITEMS, QUERY_ITEMS = 5, 10, 3  # items that a text of each type needs
LONGEST_TEXT = 40  # characters of a keyword
COLUMNS = 64  # of the vectors
EXACT = 300_000  # keywords up to which the nearest are found exactly
KEPT_WIDE = 50_000  # keywords up to which their vectors are kept as float64 too
LINKS, VISITED = 32, 100  # of a keyword in the graph beyond that; keywords looked at
STOP = frozenset(
    "a an and are as at be by for from has have in into is it its of on or our over per than that "
    "the this to under up with without you your all any each not no other".split()
)


@dataclass(frozen=True)
class Space:
    """TF-IDF and its truncated SVD: texts as rows of COLUMNS numbers and length 1."""

    terms: dict[str, int]
    idf: np.ndarray  # (V,) float64
    basis: np.ndarray  # (V, d) float64

    @classmethod
    def of(cls, texts: list[list[str]], seed: int = 0) -> "Space":
        """From N texts of stems."""
        terms: dict[str, int] = {}
        counted = [Counter(text) for text in texts]
        for count in counted:
            for term in count:
                terms.setdefault(term, len(terms))
        df = np.zeros(len(terms))
        for count in counted:
            for term in count:
                df[terms[term]] += 1
        idf = np.log((1 + len(texts)) / (1 + df)) + 1
        row = [n for n, count in enumerate(counted) for _ in count]
        column = [terms[term] for count in counted for term in count]
        value = [times for count in counted for times in count.values()]
        value = np.array(value, dtype=np.float64) * idf[column]
        length = np.sqrt(np.bincount(row, value**2, len(texts)))
        value /= np.maximum(length[row], 1e-12)
        d = min(COLUMNS, len(texts), len(terms))
        if d == 0:
            return cls(terms, idf, np.zeros((len(terms), 1)))
        table = torch.sparse_coo_tensor(
            torch.tensor([row, column]),
            torch.from_numpy(value),
            (len(texts), len(terms)),
            check_invariants=True,
        ).coalesce()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            _, _, basis = torch.svd_lowrank(table, q=d, niter=4)
        return cls(terms, idf, basis.numpy())

    def vector(self, text: list[str]) -> np.ndarray:
        """(d,) float64 of a text of stems; zeros where no word is known."""
        at = [self.terms[term] for term in text if term in self.terms]
        summed = self.idf[at] @ self.basis[at]
        length = np.linalg.norm(summed)
        return summed / length if length > 1e-12 else summed

    def text(self, text: str) -> np.ndarray:
        """(d,) float64 of a text as it stands."""
        return self.vector(stems(text))

    def texts(self, texts: list[str]) -> np.ndarray:
        """(n, d) float32."""
        found = [self.text(text) for text in texts]
        return np.array(found, dtype=np.float32).reshape(len(texts), self.basis.shape[1])


class Vectors(Protocol):
    """Texts as rows of length 1: Space, or encode.Encoder."""

    def text(self, text: str) -> np.ndarray:
        """(d,) float64."""

    def texts(self, texts: list[str]) -> np.ndarray:
        """(n, d) float32."""


@dataclass(frozen=True)
class Corpus:
    """All keywords of a shop. Matches of keyword w: item[indptr[w]:indptr[w + 1]], rising."""

    text: list[str]
    type: np.ndarray  # (W,) int8, index into TYPES
    indptr: np.ndarray  # (W+1,) int64
    item: np.ndarray  # (E,) int64
    vector: np.ndarray  # (W, d) float32, rows of length 1
    space: Vectors
    number: dict[str, int]  # text -> w
    bm25: BM25  # over the keywords' own texts

    def __len__(self) -> int:
        return len(self.text)

    def matches(self, w: int) -> np.ndarray:
        return self.item[self.indptr[w] : self.indptr[w + 1]]

    def counts(self) -> np.ndarray:
        return np.diff(self.indptr)

    @cached_property
    def overlap(self) -> Callable[[int, int], float]:
        """A function from two keywords to the Jaccard index of their items; it remembers some."""
        return lru_cache(1 << 16)(lambda a, b: set_overlap(self.matches(a), self.matches(b)))

    def keyword(self, w: int, score: float) -> Keyword:
        count = int(self.indptr[w + 1] - self.indptr[w])
        return Keyword(self.text[w], TYPES[self.type[w]], float(score), count)

    def theme_vector(self, theme: Theme) -> np.ndarray:
        return self.space.text(" ".join((theme.title, *theme.concepts)))

    @cached_property
    def named(self) -> Callable[[str, int], np.ndarray]:
        """A function from a text to the n keywords nearest to it by BM25; it remembers some."""
        return lru_cache(1 << 11)(lambda text, n: self.bm25.top(stems(text), n)[0])

    @cached_property
    def wide(self) -> np.ndarray:
        """The vectors as float64, so that no search widens them anew; as they are where many."""
        return self.vector.astype(np.float64) if len(self) <= KEPT_WIDE else self.vector

    @cached_property
    def graph(self):
        """A faiss graph over the keywords' vectors; None where there are few, or no faiss."""
        if len(self) <= EXACT or find_spec("faiss") is None:
            return None
        import faiss

        graph = faiss.IndexHNSWFlat(self.vector.shape[1], LINKS, faiss.METRIC_INNER_PRODUCT)
        graph.hnsw.efConstruction, graph.hnsw.efSearch = VISITED, 4 * VISITED
        graph.add(np.ascontiguousarray(self.vector))
        return graph

    def nearest(self, vector: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
        """number, cosine of the n keywords nearest to a vector, best first, ties by number.

        Exact up to 300,000 keywords; beyond, a faiss graph finds nearly all of them.
        """
        if self.graph is not None:
            near, at = self.graph.search(vector.astype(np.float32)[None], min(n, len(self)))
            number, cosine = at[0][at[0] >= 0].astype(np.int64), near[0][at[0] >= 0]
            order = np.lexsort((number, -cosine))
            return number[order], cosine[order].astype(np.float64)
        cosine = self.wide @ vector
        number = best_first(cosine, np.arange(len(self)), n)
        return number, cosine[number]


def set_overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Jaccard index of two rising arrays, none of which holds a number twice."""
    few, many = (a, b) if len(a) < len(b) else (b, a)
    if not len(few) or few[-1] < many[0] or many[-1] < few[0]:
        return 0.0
    at = np.minimum(many.searchsorted(few), len(many) - 1)
    both = int(np.count_nonzero(many[at] == few))
    return both / (len(a) + len(b) - both)


def category_sets(catalogue: Catalogue, live: np.ndarray) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for item in live.tolist():
        for name in catalogue.categories[item]:
            found.setdefault(name, []).append(item)
    return found


def brand_sets(catalogue: Catalogue, live: np.ndarray) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for item in live.tolist():
        if catalogue.brand[item]:
            found.setdefault(catalogue.brand[item], []).append(item)
    return {name: items for name, items in found.items() if len(items) >= BRAND_ITEMS}


def attribute_sets(catalogue: Catalogue, live: np.ndarray) -> dict[str, list[int]]:
    """ "organic yogurt": items of a leaf whose title holds a word that the leaf's name lacks."""
    found: dict[str, list[int]] = {}
    for item in live.tolist():
        leaf = catalogue.leaf[item]
        if not leaf:
            continue
        known = set(stems(leaf))
        for word in dict.fromkeys(words(catalogue.title[item])):
            if word not in STOP and not word.isdigit() and len(word) > 1:
                if stem(word) not in known:
                    found.setdefault(f"{word} {leaf.lower()}", []).append(item)
    return {name: items for name, items in found.items() if len(items) >= ATTRIBUTE_ITEMS}


def query_texts(catalogue: Catalogue, live: np.ndarray) -> dict[tuple[str, ...], str]:
    """Stems -> the commonest spelling, of 1 to 3 words that stand together in enough titles."""
    titles: Counter = Counter()
    spelling: dict[tuple[str, ...], Counter] = {}
    for item in live.tolist():
        name = words(catalogue.title[item])
        here = {
            tuple(name[at : at + n])
            for n in (1, 2, 3)
            for at in range(len(name) - n + 1)
            if name[at] not in STOP
            and name[at + n - 1] not in STOP
            and not all(word.isdigit() for word in name[at : at + n])
        }
        stemmed: dict = {}
        for gram in sorted(here):
            stemmed.setdefault(tuple(map(stem, gram)), gram)
        titles.update(stemmed.keys())
        for key, gram in stemmed.items():
            spelling.setdefault(key, Counter())[" ".join(gram)] += 1
    return {
        key: min(spelling[key].items(), key=lambda pair: (-pair[1], pair[0]))[0]
        for key, count in titles.items()
        if count >= QUERY_ITEMS
    }


def build_corpus(
    catalogue: Catalogue,
    stock: np.ndarray,
    forbidden: Callable[[str], bool] = lambda text: False,
    seed: int = 0,
    encoder: Vectors | None = None,
) -> Corpus:
    """Every keyword of the items in stock.

    stock      (N,) bool
    forbidden  says which texts must not become keywords: banned words, instructions in titles
    encoder    of the vectors; None: the shop's own words
    """
    live = np.flatnonzero(stock)
    texts = index_texts(catalogue)
    docs = [stems(texts[item]) for item in live.tolist()]
    index = BM25(docs)
    groups = (
        category_sets(catalogue, live),
        brand_sets(catalogue, live),
        attribute_sets(catalogue, live),
    )
    chosen: dict[tuple[str, ...], tuple[str, int, np.ndarray]] = {}
    for kind, group in enumerate(groups):
        for name, items in sorted(group.items()):
            key = tuple(stems(name))
            if key and key not in chosen and len(name) <= LONGEST_TEXT and not forbidden(name):
                chosen[key] = (name, kind, np.array(items, dtype=np.int64))
    for key, name in sorted(query_texts(catalogue, live).items()):
        if key not in chosen and len(name) <= LONGEST_TEXT and not forbidden(name):
            doc, _ = index.score(key, every=True)
            chosen[key] = (name, TYPES.index("query"), live[doc])
    keys, kept = list(chosen), list(chosen.values())
    size = np.array([len(items) for _, _, items in kept], dtype=np.int64)
    space = Space.of(docs, seed) if encoder is None else encoder
    text = [name for name, _, _ in kept]
    return Corpus(
        text,
        np.array([kind for _, kind, _ in kept], dtype=np.int8),
        np.concatenate([[0], np.cumsum(size)]).astype(np.int64),
        np.concatenate([np.zeros(0, np.int64), *(items for _, _, items in kept)]),
        space.texts(text),
        space,
        {name: w for w, name in enumerate(text)},
        BM25([list(key) for key in keys]),
    )


def fused_ranks(lists: list[np.ndarray], first: float = 60.0) -> tuple[np.ndarray, np.ndarray]:
    """number, score: sum over lists of 1 / (60 + rank), by rising number.

    lists  numbers, best first; no list names one twice
    Source: Cormack, Clarke and Buettcher, SIGIR 2009.
    """
    if not lists:
        return np.zeros(0, np.int64), np.zeros(0)
    if len(lists) == 1:
        order = np.argsort(lists[0])
        return lists[0][order].astype(np.int64), 1 / (first + 1 + order)
    every = np.concatenate(lists)
    gain = np.concatenate([1 / (first + 1 + np.arange(len(some))) for some in lists])
    number, place = np.unique(every, return_inverse=True)
    return number.astype(np.int64), np.bincount(place, gain, len(number))


def prune(corpus: Corpus, theme: Theme, n: int = 100) -> np.ndarray:
    """Numbers of the keywords nearest to a theme, best first, at most n.

    The n best by cosine to title and concepts, and for each concept the n best by BM25, fused by
    rank.
    """
    near, cosine = corpus.nearest(corpus.theme_vector(theme), n)
    lists = [near[cosine > 0]]
    for concept in itertools.chain(theme.concepts, () if theme.concepts else (theme.title,)):
        lists.append(corpus.named(concept, n))
    number, score = fused_ranks(lists)
    return number[best_first(score, number, n)]
