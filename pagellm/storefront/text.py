"""Words, a light plural stem, and BM25 over short texts.

index = BM25([stems("Organic whole milk"), stems("Oat milk")])
item, score = index.top(stems("milks"), depth=10)         best first, ties by number

BM25 is in Lucene's form: a term t that stands tf times in a text of l words adds

    ln(1 + (N - df + .5) / (df + .5)) * tf / (tf + 1.2 (.25 + .75 l / mean length))

Source: Robertson and Zaragoza, The Probabilistic Relevance Framework, 2009.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from pagellm.data.shop import Catalogue

__all__ = ["BM25", "best_first", "index_texts", "parents", "stem", "stems", "words"]

WORD = re.compile(r"[^\W_]+")  # runs of letters and digits of any script
LONGEST = 10_000  # characters of a text that are read; longer ones are cut
SHORT = 200  # characters of a text whose stems are remembered: titles and keywords come again
K1, B = 1.2, 0.75


def words(text: str) -> list[str]:
    """The words of a text in small letters: runs of letters and digits after NFKC."""
    return WORD.findall(unicodedata.normalize("NFKC", text[:LONGEST]).lower())


@lru_cache(maxsize=1 << 16)
def stem(word: str) -> str:
    """A word without its plural ending: berries and berry are both "berri"."""
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        base = word[:-2]
        drop_es = base.endswith(("sh", "ch", "x", "ss")) or (word.endswith("oes") and len(word) > 5)
        word = base if word.endswith("es") and drop_es else word[:-1]
    if len(word) > 3:
        if word.endswith("ie"):
            return word[:-1]
        if word.endswith("y") and word[-2] not in "aeiou":
            return word[:-1] + "i"
    return word


def stems(text: str) -> list[str]:
    """The stemmed words of a text, in order."""
    return list(remembered(text) if len(text) <= SHORT else map(stem, words(text)))


@lru_cache(maxsize=1 << 14)
def remembered(text: str) -> tuple[str, ...]:
    return tuple(map(stem, words(text)))


def parents(catalogue: Catalogue) -> list[str]:
    """The category right above each item's leaf; "" where there is none."""
    found = []
    for path, leaf in zip(catalogue.categories, catalogue.leaf, strict=True):
        at = path.index(leaf) if leaf in path else 0
        found.append(path[at - 1] if at else "")
    return found


def index_texts(catalogue: Catalogue) -> list[str]:
    """What an item is found by: its title, its leaf category, the category above, its brand."""
    columns = (catalogue.title, catalogue.leaf, parents(catalogue), catalogue.brand)
    return [" ".join(filter(None, row)) for row in zip(*columns, strict=True)]


def best_first(score: np.ndarray, number: np.ndarray, depth: int | None = None) -> np.ndarray:
    """Places of the `depth` best scores, best first; equal scores by the smaller number.

    score (M,) float, number (M,) int -> (min(M, depth),) int64
    """
    if depth is not None and depth < len(score):
        # Everything that ties with the last place stays in until the numbers have decided.
        last = np.partition(score, len(score) - depth)[len(score) - depth]
        kept = np.flatnonzero(score >= last)
        return kept[np.lexsort((number[kept], -score[kept]))][:depth]
    return np.lexsort((number, -score))


class BM25:
    """An inverted index: for each term the texts that hold it, and what it adds to their score."""

    def __init__(self, texts: Sequence[Sequence[str]]):
        """texts  N texts as lists of terms"""
        self.n = len(texts)
        length = np.array([len(text) for text in texts], dtype=np.float64)
        mean = length.mean() if length.sum() else 1.0
        self.terms: dict[str, int] = {}
        term, doc, count = [], [], []
        for number, text in enumerate(texts):
            for word, times in Counter(text).items():
                term.append(self.terms.setdefault(word, len(self.terms)))
                doc.append(number)
                count.append(times)
        order = np.argsort(np.array(term, dtype=np.int64), kind="stable")
        self.doc = np.array(doc, dtype=np.int64)[order]
        df = np.bincount(np.array(term, dtype=np.int64), minlength=len(self.terms))
        self.indptr = np.concatenate([[0], np.cumsum(df)])
        tf = np.array(count, dtype=np.float64)[order]
        self.idf = np.log1p((self.n - df + 0.5) / (df + 0.5))
        norm = K1 * (1 - B + B * length[self.doc] / mean)
        self.weight = np.repeat(self.idf, df) * tf / (tf + norm)

    def postings(self, term: str) -> tuple[np.ndarray, np.ndarray]:
        """doc, weight of one term, by rising document."""
        at = self.terms.get(term)
        if at is None:
            return self.doc[:0], self.weight[:0]
        span = slice(self.indptr[at], self.indptr[at + 1])
        return self.doc[span], self.weight[span]

    def score(self, query: Sequence[str], every: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """doc, score of the texts that hold a term of the query, by rising document.

        every  only texts that hold all of its terms
        """
        lists = {term: self.postings(term) for term in dict.fromkeys(query)}
        if not lists:
            return self.doc[:0], self.weight[:0]
        times = Counter(query)
        doc, place = np.unique(
            np.concatenate([doc for doc, _ in lists.values()]), return_inverse=True
        )
        added = np.concatenate([weight * times[term] for term, (_, weight) in lists.items()])
        score = np.bincount(place, added, len(doc)) if len(doc) else self.weight[:0]
        if every:
            all_of_them = np.bincount(place, minlength=len(doc)) == len(lists)
            return doc[all_of_them], score[all_of_them]
        return doc, score

    def dense(self, query: Sequence[str]) -> np.ndarray:
        """(N,) float64: the score of every text, 0 without a word of the query."""
        found = [(*self.postings(term), times) for term, times in Counter(query).items()]
        doc = np.concatenate([self.doc[:0], *(doc for doc, _, _ in found)])
        if not len(doc):
            return np.zeros(self.n)
        added = np.concatenate([weight * times for _, weight, times in found])
        return np.bincount(doc, added, self.n)

    def top(
        self, query: Sequence[str], depth: int, allowed: np.ndarray | None = None, every=False
    ) -> tuple[np.ndarray, np.ndarray]:
        """doc, score of the best texts, best first, ties by number.

        allowed  (N,) bool: the others are left out before the cut
        """
        doc, score = self.score(query, every)
        if allowed is not None:
            kept = allowed[doc]
            doc, score = doc[kept], score[kept]
        order = best_first(score, doc, depth)
        return doc[order], score[order]
