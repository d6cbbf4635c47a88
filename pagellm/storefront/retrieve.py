"""From keywords to the items of a row.

found = retrieve(index, keywords, context, logit)       Candidates

A structured keyword (category, brand, attribute) gives its members in the order of the person's
ranker. A query gives BM25's order; where the index holds vectors, the nearest items too, and the
two lists are fused by rank. Stock and bars are applied before the cut. Ties always go by item
number.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pagellm.data.shop import Catalogue
from pagellm.storefront.corpus import Corpus, fused_ranks
from pagellm.storefront.parts import Candidates, Context, Keyword
from pagellm.storefront.rankers import Logits
from pagellm.storefront.text import BM25, best_first, index_texts, parents, stems

__all__ = ["Index", "build_index", "found_by", "members_first", "merged", "retrieve", "reached"]


@dataclass(frozen=True)
class Index:
    """What answers keywords.

    corpus      its keywords' members
    bm25, live  over the texts of items in stock; live (n,) is the item of each text
    vector      (n, d) of the same texts, or None: queries then go by BM25 alone
    popularity  (N,) orders the members for people without history
    parent      leaf -> the category above it
    """

    corpus: Corpus
    bm25: BM25
    live: np.ndarray
    popularity: np.ndarray
    parent: dict[str, str]
    vector: np.ndarray | None = None

    @cached_property
    def in_stock(self) -> np.ndarray:
        """(N,) bool."""
        found = np.zeros(len(self.popularity), dtype=bool)
        found[self.live] = True
        return found


def build_index(
    catalogue: Catalogue, stock: np.ndarray, corpus: Corpus, popularity, vectors: bool = False
) -> Index:
    """The index of the items in stock (N,) bool. vectors: queries are answered by nearness too."""
    live = np.flatnonzero(stock)
    texts = index_texts(catalogue)
    found = [texts[item] for item in live.tolist()]
    docs = [stems(text) for text in found]
    above = dict(zip(catalogue.leaf, parents(catalogue), strict=True))
    parent = {leaf: name for leaf, name in above.items() if leaf and name}
    nearness = corpus.space.texts(found) if vectors else None
    return Index(corpus, BM25(docs), live, np.asarray(popularity, np.float64), parent, nearness)


def members_first(items: np.ndarray, score: np.ndarray | Logits, depth: int) -> np.ndarray:
    """The `depth` best of some items by score (N,), best first, ties by number."""
    return items[best_first(score[items], items, depth)]


def found_by(
    index: Index, keyword: Keyword, allowed: np.ndarray, score: np.ndarray, depth: int
) -> tuple[np.ndarray, np.ndarray]:
    """item, fused score of one keyword; at most `depth` items a list."""
    at = index.corpus.number.get(keyword.text)
    if keyword.type != "query" and at is not None:
        items = index.corpus.matches(at)
        return fused_ranks([members_first(items[allowed[items]], score, depth)])
    query = stems(keyword.text)
    allowed_docs = allowed[index.live]
    doc, _ = index.bm25.top(query, depth, allowed_docs, every=keyword.type == "query")
    lists = [index.live[doc]]
    if index.vector is not None:
        near = index.vector @ index.corpus.space.text(keyword.text).astype(np.float32)
        near = np.where(allowed_docs, near, -np.inf)
        best = best_first(near, index.live, depth)
        lists.append(index.live[best[near[best] > 0]])
    return fused_ranks(lists)


def reached(
    index: Index, context: Context, allowed: np.ndarray | None, logit: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """live (N,) bool: what may be found; score (N,): what orders the members of a keyword.

    People without history get the members by popularity.
    """
    live = index.in_stock.copy() if allowed is None else index.in_stock & allowed
    live[context.barred] = False
    return live, logit if len(context.item) else index.popularity


def merged(lists: list[tuple[np.ndarray, np.ndarray]], weight: np.ndarray) -> Candidates:
    """Candidates out of what each keyword finds: item and score of its list.

    weight  (W,) of each keyword, the best 1
    """
    if not lists:
        none = np.zeros(0, np.int64)
        return Candidates(none, np.zeros(0), np.zeros(0), none)
    item = np.concatenate([found for found, _ in lists])
    place = np.repeat(np.arange(len(lists)), [len(found) for found, _ in lists])
    gain = np.concatenate([w * score for w, (_, score) in zip(weight, lists, strict=True)])
    # Of equal gains the earlier keyword's counts: the places rise already, and the sort is stable.
    order = np.lexsort((-gain, item))
    number, first = np.unique(item[order], return_index=True)
    best = order[first]
    at = np.searchsorted(number, item)
    share = np.bincount(at, weight[place], len(number)) / weight.sum()
    return Candidates(number, gain[best], np.minimum(share, 1.0), place[best])


def retrieve(
    index: Index,
    keywords: list[Keyword],
    context: Context,
    logit: np.ndarray,
    depth: int = 50,
    allowed: np.ndarray | None = None,
) -> Candidates:
    """Items that some keyword finds, by rising number.

    logit    (N,) float64 of this person; people without history get the members by popularity
    allowed  (N,) bool: in stock and fit for the row's intent; the context's bars come on top
    ret      max over keywords of exp(score_k - best score) * fused rank score
    agree    share of the keywords' weight exp(score_k - best score) that found the item
    Raises ValueError on a logit of another length than the shop.
    """
    n_items = len(index.popularity)
    if logit.shape != (n_items,):
        raise ValueError(f"retrieve: logit {logit.shape}, want ({n_items},)")
    live, score = reached(index, context, allowed, logit)
    weight = np.array([keyword.score for keyword in keywords])
    weight = np.exp(weight - weight.max()) if len(weight) else weight
    return merged([found_by(index, keyword, live, score, depth) for keyword in keywords], weight)
