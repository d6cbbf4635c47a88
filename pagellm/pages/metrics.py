"""Scores of pages (SPEC 8; Eq. 14 to 22): Recall, NDCG, WAS, PWKT, WMRD, DPA, ILD, entropy, redundancy.

One user, for reading and for checking by hand; None where a score is undefined:

    was("abc", "baxyc")                     0.7531: ref is the labels, best first; gen the page, best first
    entropy([4, 7], categories)             categories: item -> its category names, () where unknown

All users at once, by the same definitions and without a loop over users:

    per_user = score_pages(users, (user, rank, item), (user, item, rank), categories)    # name -> (U,), NaN
    summary(per_user["WAS"], seed=0)        mean, 95% interval, coverage

A page is de-duplicated first; duplicate_rate reports the repeats. Without labels a score is undefined, not 0.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

__all__ = [
    "BLOCK",
    "DIRECTION",
    "Described",
    "balance",
    "described",
    "dpa",
    "duplicate_rate",
    "entropy",
    "ild",
    "ndcg",
    "ndcg_bound",
    "near_duplicate_pairs",
    "paper_scale",
    "pwkt",
    "recall",
    "redundancy",
    "score_pages",
    "unknown_rate",
    "was",
    "wmrd",
]


# Which way is better, for every name that score_pages may return ("Recall@5" and the like go up too).
DIRECTION = {
    "Recall@20": "up",
    "Recall@40": "up",
    "NDCG@100": "up",
    "WAS": "up",
    "PWKT": "up",
    "WMRD": "down",
    "DPA": "up",
    "ILD": "up",
    "ILD_cosine": "up",
    "entropy": "up",
    "balance": "up",
    "redundancy": "down",
    "duplicate_rate": "down",
    "near_duplicate_pairs": "down",
    "unknown_rate": "down",
}

MISSING = ("worst", "append", "skip")
BLOCK = 2_000_000  # numbers in the largest arrays held at once
PAPER_SHIFT = 100.0  # max_shift that reproduces the paper's tables (SPEC 9)

Items = Sequence[Any]  # item ids: numbers, strings or anything else that is hashable
Categories = Mapping[Any, Collection] | Sequence[Collection]  # item -> its category names


def distinct(gen: Items, k: int | None = None) -> list:
    """The first k different items, each at its first place."""
    if k is not None and k < 1:
        raise ValueError(f"k={k}: want 1 or more, or None for the whole list")
    return list(dict.fromkeys(gen))[:k]


def labels_of(ref: Items) -> list:
    ref = list(ref)
    if len(set(ref)) < len(ref):
        raise ValueError(f"the labels repeat an item: {ref}")
    return ref


def recall(ref: Items, gen: Items, k: int | None = None, cap: bool = False) -> float | None:
    """Eq. 14: labels among the first k of gen, divided by n labels; by min(k, n) with cap. In [0, 1].

    k None  the whole list        None without labels
    """
    ref, gen = labels_of(ref), distinct(gen, k)
    if not ref:
        return None
    return len(set(ref) & set(gen)) / (min(k, len(ref)) if cap and k else len(ref))


def ndcg(
    ref: Items, gen: Items, k: int | None = None, rel: Sequence[float] | None = None
) -> float | None:
    """Eq. 15, 16: DCG / IDCG, both cut at k; gain 2^rel - 1, discount log2(rank + 1). In [0, 1].

    rel  grade of each label, 0 or more, in the order of ref (graded form: rating - 3); default all 1
    None without labels, or if every label has grade 0. Raises ValueError on negative or missing grades.
    """
    ref, gen = labels_of(ref), distinct(gen, k)
    rel = [1.0] * len(ref) if rel is None else list(rel)
    if len(rel) != len(ref) or any(not grade >= 0 for grade in rel):
        raise ValueError(
            f"ndcg: grades {rel} for {len(ref)} labels: want one of 0 or more for each"
        )
    gain = {item: 2.0**grade - 1.0 for item, grade in zip(ref, rel, strict=True)}
    best = dcg(sorted(gain.values(), reverse=True)[:k])
    return dcg([gain.get(item, 0.0) for item in gen]) / best if best else None


def dcg(gains: Sequence[float]) -> float:
    return sum(gain / math.log2(rank + 1) for rank, gain in enumerate(gains, start=1))


def ndcg_bound(n: np.ndarray, recalls: Mapping[int, np.ndarray], k: int = 100) -> np.ndarray:
    """The most that binary NDCG@k can be beside these recalls: hits lead their band, the rest follow the last cut.

    n        (U,) labels of each user        recalls  cut -> (U,) Recall@cut, cuts up to k
    returns  (U,), NaN without labels. A score above it was not computed from the same lists.
    """
    n = np.asarray(n, dtype=np.int64)
    # by the first j ranks
    gained = np.concatenate([[0.0], np.cumsum(1.0 / np.log2(np.arange(k) + 2.0))])
    total, found, start = np.zeros(len(n)), np.zeros(len(n), dtype=np.int64), 0
    for cut, recall_at in sorted(recalls.items()):
        hits = np.rint(np.nan_to_num(recall_at) * n).astype(np.int64)
        total += gained[np.minimum(start + hits - found, k)] - gained[start]
        found, start = hits, cut
    total += gained[np.minimum(start + n - found, k)] - gained[start]
    return np.where(n > 0, total / np.where(n > 0, gained[np.minimum(n, k)], 1.0), np.nan)


class Aligned(NamedTuple):
    """How far each of n labels of u users stands from where it belongs. All (u, n), limit (u, 1).

    real, place  rank the label belongs at; its rank on the page, a missing one right behind the page
    weight       1 / log2(1 + real); 0 where a missing label is skipped
    shift        |real - place|, the limit where a missing label counts as worst
    found        bool: earns similarity
    limit        S, the largest shift that counts
    """

    real: np.ndarray
    place: np.ndarray
    weight: np.ndarray
    shift: np.ndarray
    found: np.ndarray
    limit: np.ndarray


def align(
    real: np.ndarray, place: np.ndarray, length: np.ndarray, missing: str, paper: bool
) -> Aligned:
    """real (u, n); place (u, n), NaN where not on the page; length (u,), different items on the page."""
    found = ~np.isnan(place)
    if paper:
        # Ranks among the labels alone, weights 1, one fixed limit; labels that a cut ranking lacks come last.
        place = np.where(found, (place[:, None, :] < place[:, :, None]).sum(-1) + 1.0, np.nan)
        length, missing = found.sum(-1), "append"
        weight, limit = np.ones(real.shape), np.full((len(real), 1), PAPER_SHIFT)
    else:
        weight = 1.0 / np.log2(1.0 + real)
        limit = np.maximum(length, real.shape[1])[:, None].astype(np.float64)
    place = np.where(found, place, length[:, None] + 1.0)
    shift = np.abs(real - place)
    if missing == "worst":
        shift = np.where(found, shift, limit)
    elif missing == "append":
        found = np.ones_like(found)
    else:
        weight = weight * found
    return Aligned(real, place, weight, shift, found, limit)


def weighted_mean(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Over the last axis; NaN if all weights are 0. For weights rescaled to mean 1 it is (1/n) sum w x."""
    total = weight.sum(-1)
    return (x * weight).sum(-1) / np.where(total > 0, total, np.nan)


def was_rows(a: Aligned) -> np.ndarray:
    return weighted_mean(np.where(a.found, np.maximum(0.0, 1.0 - a.shift / a.limit), 0.0), a.weight)


def pwkt_rows(a: Aligned) -> np.ndarray:
    # Missing labels share the rank behind the page: after every present one, tied among themselves.
    concordance = np.sign(a.real[:, :, None] - a.real[:, None, :]) * np.sign(
        a.place[:, :, None] - a.place[:, None, :]
    )
    weight = np.triu(a.weight[:, :, None] * a.weight[:, None, :], 1)  # each pair i < j once
    return weighted_mean(concordance.reshape(len(weight), -1), weight.reshape(len(weight), -1))


def wmrd_rows(a: Aligned) -> np.ndarray:
    return weighted_mean(a.shift, a.weight)


def dpa_rows(a: Aligned) -> np.ndarray:
    return weighted_mean(np.where(a.found, 1.0 / (1.0 + np.log2(1.0 + a.shift)), 0.0), a.weight)


def one_user(
    rows,
    ref: Items,
    gen: Items,
    k: int | None,
    missing: str,
    ref_rank: Sequence[float] | None,
    paper: bool,
) -> float | None:
    """A rank score of one user. Raises ValueError on an unknown `missing` or ranks that do not fit."""
    ref, gen = labels_of(ref), distinct(gen, k)
    if missing not in MISSING:
        raise ValueError(f"missing={missing!r}: want one of {', '.join(MISSING)}")
    real = (
        np.arange(1.0, len(ref) + 1) if ref_rank is None else np.asarray(ref_rank, dtype=np.float64)
    )
    if real.shape != (len(ref),) or not (real >= 1).all():
        raise ValueError(
            f"ref_rank {ref_rank}: want a rank of 1 or more for each of {len(ref)} labels"
        )
    if not ref:
        return None
    at = {item: rank for rank, item in enumerate(gen, start=1)}
    place = np.array([at.get(item, np.nan) for item in ref], dtype=np.float64)
    score = float(rows(align(real[None], place[None], np.array([len(gen)]), missing, paper))[0])
    return None if math.isnan(score) else score


def was(
    ref: Items,
    gen: Items,
    k: int | None = None,
    missing: str = "worst",
    ref_rank: Sequence[float] | None = None,
    paper_scale: bool = False,
) -> float | None:
    """Eq. 17, weighted agreement of positions: (1/n) sum_i w_i max(0, 1 - shift_i / S). In [0, 1], up.

    ref, gen     labels, page, best first; the page is de-duplicated, then cut at k (None: whole)
    w_i          1 / log2(1 + rank_i), rescaled to mean 1: the labels' own first ranks count most
    S            max(K, n), K the different items on the (cut) page, n the labels
    missing      a label that is not on the page: worst (similarity 0, shift S), append (rank K + 1), skip
    ref_rank     ranks of the labels where some tie: see stats.average_ranks; default 1..n
    paper_scale  ranks among the labels only, w = 1, S = 100 (SPEC 9): to compare with the paper's tables

    None without labels, or where all are skipped. The same arguments and cases serve pwkt, wmrd and dpa.
    """
    return one_user(was_rows, ref, gen, k, missing, ref_rank, paper_scale)


def pwkt(
    ref: Items,
    gen: Items,
    k: int | None = None,
    missing: str = "worst",
    ref_rank: Sequence[float] | None = None,
    paper_scale: bool = False,
) -> float | None:
    """Eq. 18, weighted Kendall's tau: sum_{i<j} w_i w_j delta_ij / sum_{i<j} w_i w_j. In [-1, 1], up.

    delta is 1 for a pair in the right order, -1 in the wrong one, 0 where tied or both missing; a present
    label precedes a missing one. None with fewer than 2 labels (0 in paper_scale). Arguments as in `was`.
    """
    score = one_user(pwkt_rows, ref, gen, k, missing, ref_rank, paper_scale)
    return 0.0 if score is None and paper_scale and len(ref) else score


def wmrd(
    ref: Items,
    gen: Items,
    k: int | None = None,
    missing: str = "worst",
    ref_rank: Sequence[float] | None = None,
    paper_scale: bool = False,
    normalize: bool = False,
) -> float | None:
    """Eq. 19, weighted mean rank difference: sum_i w_i shift_i / sum_i w_i, in ranks. In [0, S], down.

    normalize divides by S. The other arguments as in `was`.
    """
    rows = relative_wmrd_rows if normalize else wmrd_rows
    return one_user(rows, ref, gen, k, missing, ref_rank, paper_scale)


def relative_wmrd_rows(a: Aligned) -> np.ndarray:
    return wmrd_rows(a) / a.limit[:, 0]


def dpa(
    ref: Items,
    gen: Items,
    k: int | None = None,
    missing: str = "worst",
    ref_rank: Sequence[float] | None = None,
    paper_scale: bool = False,
) -> float | None:
    """Eq. 20, discounted positional accuracy: sum_i w_i / (1 + log2(1 + shift_i)) / sum_i w_i. In [0, 1], up.

    A missing label adds 0 (missing=worst). Arguments as in `was`.
    """
    return one_user(dpa_rows, ref, gen, k, missing, ref_rank, paper_scale)


def names_of(categories: Categories, item: Any) -> frozenset:
    """Category names of one item; empty where unknown. One name or number may stand without brackets."""
    names = categories.get(item) if isinstance(categories, Mapping) else categories[item]
    if names is None:
        return frozenset()
    if isinstance(names, str) or not isinstance(names, Iterable):
        names = (names,)
    return frozenset(names) - {""}


def ild(
    gen: Items,
    categories: Categories | None = None,
    embedding: Mapping[Any, Sequence] | Sequence[Sequence] | np.ndarray | None = None,
) -> float | None:
    """Eq. 21, intra-list diversity: 1 - mean similarity of two different items of the page. Up.

    categories  similarity is the Jaccard index of the category sets, 0 if both are unknown (unknown_rate
                tells how often); ILD is then in [0, 1]
    embedding   instead: item -> vector; similarity is the cosine, 0 for a vector of length 0; ILD in [0, 2]
    None with fewer than 2 different items. Raises ValueError unless exactly one of the two is given.
    """
    if (categories is None) == (embedding is None):
        raise ValueError("ild: want categories or embedding, one of them")
    page = distinct(gen)
    if len(page) < 2:
        return None
    if categories is not None:
        sets = [names_of(categories, item) for item in page]
        pairs = [jaccard(a, b) for i, a in enumerate(sets) for b in sets[:i]]
    else:
        assert embedding is not None  # one of the two, see above
        vectors = [np.asarray(embedding[item], dtype=np.float64) for item in page]
        pairs = [cosine(a, b) for i, a in enumerate(vectors) for b in vectors[:i]]
    return 1.0 - sum(pairs) / len(pairs)


def jaccard(a: frozenset, b: frozenset) -> float:
    return len(a & b) / max(1, len(a | b))


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    length = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / length if length else 0.0


def entropy(gen: Items, categories: Categories) -> float | None:
    """Eq. 22: H = -sum_c p_c ln p_c over categories c, in nats. Up: more balanced.

    An item with m categories adds 1/m to each; items without share one category, unknown. The paper's N is
    the number of categories, not of items. In [0, ln min(K, C)] where m = 1. None for an empty page.
    """
    page = distinct(gen)
    share: dict[Any, float] = defaultdict(float)
    for item in page:
        names = names_of(categories, item) or {None}
        for name in names:
            share[name] += 1.0 / len(names) / len(page)
    return max(0.0, -sum(p * math.log(p) for p in share.values())) if page else None


def balance(gen: Items, categories: Categories, n_categories: int | None = None) -> float | None:
    """H / ln min(K, C), cut at 1: K different items, C categories of the catalogue. None where min(K, C) < 2.

    n_categories  C; default those in `categories`, and unknown as one more if any item there has none
    Items of several categories can push H above ln min(K, C): that page is as balanced as pages get.
    """
    page = distinct(gen)
    if n_categories is None:
        known, unknown = count_categories(categories)
        n_categories = known + (unknown or any(not names_of(categories, item) for item in page))
    h, most = entropy(page, categories), min(len(page), n_categories)
    return None if h is None or most < 2 else min(1.0, h / math.log(most))


def count_categories(categories: Categories) -> tuple[int, bool]:
    """How many categories the catalogue has, and whether some item of it has none."""
    sets = [
        names_of(categories, item)
        for item in (categories if isinstance(categories, Mapping) else range(len(categories)))
    ]
    return len(frozenset().union(*sets)), any(not names for names in sets)


def redundancy(gen: Items, categories: Categories, n_categories: int | None = None) -> float | None:
    """1 - H / ln min(K, C): 0 for a page that is as balanced as can be, 1 for one category only. Down.

    Arguments and cases as in `balance`. The paper calls H itself "redundancy" and marks it up.
    """
    score = balance(gen, categories, n_categories)
    return None if score is None else 1.0 - score


def duplicate_rate(gen: Items) -> float | None:
    """Share of slots that repeat an item above. Down. None for an empty page."""
    return 1.0 - len(set(gen)) / len(gen) if len(gen) else None


def near_duplicate_pairs(gen: Items, group: Mapping | Sequence) -> float:
    """Pairs of different items of one near-duplicate group. Down.

    group  item -> group; an item of group None, or not in the mapping, belongs to none
    """
    groups = Counter(
        group.get(item) if isinstance(group, Mapping) else group[item] for item in distinct(gen)
    )
    return float(sum(n * (n - 1) // 2 for name, n in groups.items() if name is not None))


def unknown_rate(gen: Items, categories: Categories) -> float | None:
    """Share of the different items without a category: a flag for ILD and entropy. None for an empty page."""
    page = distinct(gen)
    return sum(not names_of(categories, item) for item in page) / len(page) if page else None


class Lists(NamedTuple):
    """Ranked lists of many users, one entry after another: by row, then from the first rank down.

    row     (P,) index into users
    item    (P,) item ids
    place   (P,) rank from 1 within the row, repeats counted
    first   (P,) bool: not a repeat of an item above
    order   (P,) rank from 1 within the row, repeats not counted; a repeat shares that of the entry above
    """

    row: np.ndarray
    item: np.ndarray
    place: np.ndarray
    first: np.ndarray
    order: np.ndarray


def rows_among(users: np.ndarray, user: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index of every user in `users`, and whether it is there at all."""
    row = np.minimum(np.searchsorted(users, user), len(users) - 1)
    return row, users[row] == user


def within_rows(row: np.ndarray, n_rows: int) -> np.ndarray:
    """0, 1, 2 ... within each run of the sorted `row`."""
    count = np.bincount(row, minlength=n_rows)
    return np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)


class Index(NamedTuple):
    """Where each item of each list stands: `code` (P,) sorted, (row * base + item) * width + place - 1.

    begin (rows,)  where a row's entries begin        ids  items in `code` are positions in these (sorted); None: as is
    """

    code: np.ndarray
    base: int
    width: int
    begin: np.ndarray
    ids: np.ndarray | None


def ranked_lists(
    users: np.ndarray, user: np.ndarray, rank: np.ndarray, item: np.ndarray
) -> tuple[Lists, Index]:
    """Sort entries into Lists, leaving out users that are not among `users`."""
    row, kept = rows_among(users, user)
    row, rank, item = row[kept], rank[kept], item[kept]
    step = np.diff(row)
    if not ((step > 0) | ((step == 0) & (np.diff(rank) >= 0))).all():  # most come sorted
        by_rank = np.lexsort((rank, row))
        row, item = row[by_rank], item[by_rank]
    place = within_rows(row, len(users)) + 1
    index = index_of(row, item, place, len(users))
    again = 1 + np.flatnonzero(np.diff(index.code // index.width) == 0)
    if not len(again):
        return Lists(row, item, place, np.ones(len(row), dtype=bool), place), index
    first = np.ones(len(row), dtype=bool)
    first[entries(index, again)] = False
    firsts = np.cumsum(first)
    return Lists(row, item, place, first, firsts - (firsts - first)[index.begin][row]), index


def index_of(row: np.ndarray, item: np.ndarray, place: np.ndarray, n_rows: int) -> Index:
    """`row` rises, and `place` from 1 within each row."""
    count = np.bincount(row, minlength=n_rows)
    base, width, ids = int(item.max(initial=0)) + 1, int(place.max(initial=1)), None
    if n_rows * base * width >= 1 << 62:
        ids, item = np.unique(item, return_inverse=True)
        base = len(ids)
    code = item.astype(np.int64) * width + place - 1
    if n_rows * width <= 2 * len(row):  # many short sorts take a fraction of the time of a long one
        table = np.full((n_rows, width), np.iinfo(np.int64).max)
        table[row, place - 1] = code
        table.sort(axis=1)
        code = table[np.arange(width) < count[:, None]] + row * (base * width)
    else:
        code = np.sort(code + row * (base * width))
    begin = np.minimum(np.cumsum(count) - count, max(len(row) - 1, 0))
    return Index(code, base, width, begin, ids)


def entries(index: Index, at: np.ndarray) -> np.ndarray:
    """Entries of the lists that stand at positions `at` of the sorted codes."""
    code = index.code[at]
    return index.begin[code // (index.base * index.width)] + code % index.width


def places_of(
    row: np.ndarray, item: np.ndarray, lists: Lists, index: Index
) -> tuple[np.ndarray, np.ndarray]:
    """Where each (row, item), all different, stands in the lists: order and place of its first entry, NaN where
    nowhere.
    """
    order, place = np.full(len(item), np.nan), np.full(len(item), np.nan)
    if len(item) and len(index.code):
        known = item < index.base
        if index.ids is not None:
            number = np.minimum(np.searchsorted(index.ids, item), index.base - 1)
            item, known = number, index.ids[number] == item
        want = row * index.base + np.where(known, item, 0)
        at = np.minimum(np.searchsorted(index.code, want * index.width), len(index.code) - 1)
        found = known & (index.code[at] // index.width == want)
        entry = entries(index, at[found])
        order[found], place[found] = lists.order[entry], lists.place[entry]
    return order, place


def score_pages(
    users: np.ndarray,
    pages: tuple,
    refs: tuple,
    categories: "Categories | Described",
    *,
    page_k: int = 20,
    recall_k: Sequence[int] = (20, 40),
    ndcg_k: int = 100,
    cap: bool = False,
    rel: np.ndarray | None = None,
    missing: str = "worst",
    normalize: bool = False,
    n_categories: int | None = None,
    group: np.ndarray | None = None,
    embedding: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Every score of every user: the functions above on each user's lists, without a loop over users.

    users       (U,) int, rising; other users' entries are left out
    pages       (user, rank, item), (P,) int each: ranked lists, in any order of rows
    refs        (user, item, rank), (R,) each: labels and the ranks they belong at, 1..n or stats.average_ranks
    categories  item -> its category names, () where unknown; or what `described` made of them, once for many calls
    page_k      entries of a list that are the page: all but Recall and NDCG look at these only
    rel         (R,) grades of the labels, for NDCG
    group       (N,) int near-duplicate group of every item: adds near_duplicate_pairs
    embedding   (N, d) float: adds ILD_cosine
    The other options as in the functions for one user.

    returns name -> (U,) float64, NaN where undefined: see DIRECTION
    Raises ValueError on users that do not rise, repeated labels, negative grades, unknown options.
    """
    users = np.asarray(users)
    if len(users) == 0 or (np.diff(users) <= 0).any():
        raise ValueError("score_pages: want users rising, at least one")
    if missing not in MISSING or min(page_k, ndcg_k, *recall_k) < 1:
        raise ValueError(
            f"score_pages: missing={missing!r}, page_k={page_k}, recall_k={recall_k}, "
            f"ndcg_k={ndcg_k}: want missing one of {', '.join(MISSING)}, the others 1 or more"
        )
    lists, index = ranked_lists(users, *(np.asarray(column) for column in pages))
    ref_row, ref_item, ref_rank, grade = labels(users, refs, rel)
    order, place = places_of(ref_row, ref_item, lists, index)
    scores = accuracy_scores(len(users), ref_row, order, grade, recall_k, ndcg_k, cap)

    on_page = lists.place <= page_k
    shown = np.bincount(lists.row[on_page], minlength=len(users))
    page = Lists(*(column[on_page & lists.first] for column in lists))
    length = np.bincount(page.row, minlength=len(users))
    page_order = np.where(place <= page_k, order, np.nan)
    scores |= order_scores(len(users), ref_row, ref_rank, page_order, length, missing, normalize)

    scores |= category_scores(len(users), page, length, categories, n_categories)
    scores["duplicate_rate"] = 1.0 - ratio(length, shown)
    if group is not None:
        scores["near_duplicate_pairs"] = group_pairs(len(users), page, np.asarray(group))
    if embedding is not None:
        scores["ILD_cosine"] = cosine_diversity(len(users), page, length, np.asarray(embedding))
    return scores


def ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b, NaN where b is 0."""
    return a / np.where(b > 0, b, np.nan)


def labels(users: np.ndarray, refs: tuple, rel: np.ndarray | None) -> tuple[np.ndarray, ...]:
    """row, item, rank, grade of the labels of `users`, sorted by row and rank."""
    user, item, rank = (np.asarray(column) for column in refs)
    grade = np.ones(len(user)) if rel is None else np.asarray(rel, dtype=np.float64)
    if not (grade >= 0).all() or not (rank >= 1).all() or len(grade) != len(user):
        raise ValueError(
            "score_pages: want a rank of 1 or more and a grade of 0 or more for every label"
        )
    row, kept = rows_among(users, user)
    row, item, rank, grade = row[kept], item[kept], rank[kept].astype(np.float64), grade[kept]
    if len(np.unique(row * (item.max(initial=0) + 1) + item)) < len(row):
        raise ValueError("score_pages: the labels of a user repeat an item")
    by_row = np.lexsort((rank, row))
    return row[by_row], item[by_row], rank[by_row], grade[by_row]


def accuracy_scores(
    n_users: int,
    row: np.ndarray,
    order: np.ndarray,
    grade: np.ndarray,
    recall_k: Sequence[int],
    ndcg_k: int,
    cap: bool,
) -> dict[str, np.ndarray]:
    """Recall and NDCG from where each label stands in the whole list (order, NaN where nowhere)."""
    scores = {}
    count = np.bincount(row, minlength=n_users)
    for k in recall_k:
        hits = np.bincount(row[order <= k], minlength=n_users)
        scores[f"Recall@{k}"] = ratio(hits, np.minimum(k, count) if cap else count)
    gain = 2.0**grade - 1.0
    hit = order <= ndcg_k
    dcg = np.bincount(row[hit], weights=gain[hit] / np.log2(order[hit] + 1.0), minlength=n_users)
    best = np.lexsort((-gain, row))
    rank = within_rows(row, n_users) + 1.0
    cut = rank <= ndcg_k
    ideal = np.bincount(
        row[cut], weights=gain[best][cut] / np.log2(rank[cut] + 1.0), minlength=n_users
    )
    scores[f"NDCG@{ndcg_k}"] = ratio(dcg, ideal)
    return scores


def order_scores(
    n_users: int,
    row: np.ndarray,
    real: np.ndarray,
    place: np.ndarray,
    length: np.ndarray,
    missing: str = "worst",
    normalize: bool = False,
    paper: bool = False,
) -> dict[str, np.ndarray]:
    """WAS, PWKT, WMRD, DPA: users with the same number of labels form one dense block."""
    scores = {name: np.full(n_users, np.nan) for name in ("WAS", "PWKT", "WMRD", "DPA")}
    count = np.bincount(row, minlength=n_users)
    begin = np.cumsum(count) - count
    for n in np.unique(count[count > 0]):
        members = np.flatnonzero(count == n)
        step = max(1, BLOCK // n**2)  # pwkt holds (users, n, n)
        for some in (members[at : at + step] for at in range(0, len(members), step)):
            index = begin[some][:, None] + np.arange(n)
            a = align(real[index], place[index], length[some], missing, paper)
            wmrd_of = relative_wmrd_rows if normalize else wmrd_rows
            for name, rows in (
                ("WAS", was_rows),
                ("PWKT", pwkt_rows),
                ("WMRD", wmrd_of),
                ("DPA", dpa_rows),
            ):
                scores[name][some] = rows(a)
    return scores


class Described(NamedTuple):
    """The categories of a catalogue as numbers: what `described` makes.

    table  (N + 1, m) int32 category numbers, -1 behind an item's last; the last row, which index -1 finds, is an
           empty slot of a page
    size   (N + 1,) int64 how many each item has
    known, some_unknown   categories of the whole catalogue; whether some item of it has none
    """

    table: np.ndarray
    size: np.ndarray
    known: int
    some_unknown: bool


def described(categories: Sequence) -> Described:
    """categories  of every item, 0 to N - 1, its category names, () where unknown; no mapping."""
    if not all(type(names) is tuple for names in categories):
        categories = [tuple(names_of(categories, item)) for item in range(len(categories))]
    number: dict[Hashable, int] = {}
    size = np.fromiter(map(len, (*categories, ())), np.int64, len(categories) + 1)
    flat = np.fromiter(
        (number.setdefault(name, len(number)) for name in chain.from_iterable(categories)), np.int32
    )
    table = np.full((len(size), size.max()), -1, dtype=np.int32)
    table[np.arange(table.shape[1]) < size[:, None]] = flat
    order = np.sort(table, axis=1)
    # no name, or one twice
    if "" in number or ((order[:, 1:] == order[:, :-1]) & (order[:, 1:] >= 0)).any():
        return described([tuple(names_of(categories, item)) for item in range(len(categories))])
    return Described(table, size, len(number), bool((size[:-1] == 0).any()))


def category_scores(
    n_users: int,
    page: Lists,
    length: np.ndarray,
    categories: Categories | Described,
    n_categories: int | None,
) -> dict[str, np.ndarray]:
    """ILD, entropy, balance, redundancy and unknown_rate of pages without repeats."""
    index = page.item
    if isinstance(categories, Mapping):
        items, index = np.unique(page.item, return_inverse=True)
        known, some_unknown = count_categories(categories)
        categories = described([tuple(names_of(categories, item)) for item in items.tolist()])
        categories = categories._replace(known=known, some_unknown=some_unknown)
    elif not isinstance(categories, Described):
        categories = described(categories)
    table, size, known, some_unknown = categories
    width = int(page.order.max(initial=1))
    grid = np.full((n_users, width), -1, dtype=np.int64)
    grid[page.row, page.order - 1] = index
    unknown = np.bincount(page.row, weights=size[index] == 0, minlength=n_users)
    h, diversity = np.empty(n_users), np.empty(n_users)
    step = max(1, BLOCK // (4 * width * max(width, table.shape[1])))
    for some in (slice(at, at + step) for at in range(0, n_users, step)):
        h[some] = category_entropy(grid[some], table, size)
        diversity[some] = jaccard_diversity(grid[some], table, size)
    if n_categories is None:
        most = np.minimum(length, known + (some_unknown | (unknown > 0)))
    else:
        most = np.minimum(length, n_categories)
    balance = np.minimum(1.0, h / np.log(np.where(most > 1, most, np.nan)))
    return {
        "ILD": diversity,
        "entropy": h,
        "balance": balance,
        "redundancy": 1.0 - balance,
        "unknown_rate": ratio(unknown, length),
    }


def category_entropy(grid: np.ndarray, table: np.ndarray, size: np.ndarray) -> np.ndarray:
    """H (U,) of pages (U, K) of items, -1 in empty slots; an item without categories counts for one called unknown."""
    (U, K), m = grid.shape, table.shape[1]
    base = m + 2  # above any count
    names, count, length = table[grid].astype(np.int64), size[grid][..., None], (grid >= 0).sum(1)
    # One number for each category of each slot, so that a page's entries of one category come to stand together.
    key = np.where(names >= 0, (names + 1) * base + count, -1)
    unknown = np.where((grid >= 0)[..., None] & (count == 0), 1, -1)
    key = np.sort(np.concatenate([key, unknown], 2).reshape(U, K * (m + 1)), axis=1)
    row, column = np.nonzero(key >= 0)
    number, count = np.divmod(key[row, column], base)
    new = np.ones(len(row), dtype=bool)
    new[1:] = (row[1:] != row[:-1]) | (number[1:] != number[:-1])
    start = np.flatnonzero(new)
    share = np.add.reduceat(1.0 / count / length[row], start) if len(start) else np.zeros(0)
    h = np.bincount(row[start], weights=-share * np.log(share), minlength=U)
    return np.where(length > 0, np.maximum(h, 0.0), np.nan)


def jaccard_diversity(grid: np.ndarray, table: np.ndarray, size: np.ndarray) -> np.ndarray:
    """ILD (U,) by category sets of pages (U, K) of items, -1 in empty slots."""
    U, K = grid.shape
    # Users last: every operation then runs along them, however short the pages.
    names = np.ascontiguousarray(table[grid.T].transpose(2, 0, 1))  # (m, K, U)
    mine = np.where(names < 0, -2, names)  # padding equals no padding
    count, similar = size.astype(np.int32)[grid.T], np.zeros(U)
    for i in range(K - 1):
        both = np.zeros((K - 1 - i, U), dtype=np.int32)
        for a in mine[:, i]:
            for b in names[:, i + 1 :]:
                both += a == b
        similar += (both / np.maximum(count[i] + count[i + 1 :] - both, 1)).sum(0)
    n = (grid >= 0).sum(1)
    return 1.0 - ratio(similar, n * (n - 1) // 2)


def cosine_diversity(
    n_users: int, page: Lists, length: np.ndarray, embedding: np.ndarray
) -> np.ndarray:
    """ILD (U,) by cosine: sum_{i != j} cos_ij = |sum_i e_i|^2 - sum_i |e_i|^2 for unit vectors e_i."""
    vector = embedding[page.item].astype(np.float64)
    norm = np.linalg.norm(vector, axis=1, keepdims=True)
    unit = np.divide(vector, norm, out=np.zeros_like(vector), where=norm > 0)
    total = np.zeros((n_users, embedding.shape[1]))
    np.add.at(total, page.row, unit)
    own = np.bincount(page.row, weights=np.square(unit).sum(1), minlength=n_users)
    return 1.0 - ratio(np.square(total).sum(1) - own, length * (length - 1))


def group_pairs(n_users: int, page: Lists, group: np.ndarray) -> np.ndarray:
    """Pairs in one near-duplicate group, (U,)."""
    base = group.max(initial=0) + 1
    code, count = np.unique(page.row * base + group[page.item], return_counts=True)
    pairs = np.bincount(code // base, weights=count * (count - 1) // 2, minlength=n_users)
    return pairs.astype(np.float64)  # bincount of nothing counts in whole numbers


def paper_scale(
    users: np.ndarray, pages: tuple, refs: tuple, leaf: Sequence | None = None, batch: int = 64
) -> dict[str, float]:
    """The rank scores on the scale of the paper's tables, for comparison only (SPEC 8 and 9).

    Ranks among the labels only of a full ranking, w = 1, S = 100; a user with one label counts (1, 0, 0, 1);
    and the plain mean over U users with labels times ceil(U / batch) / U: batch means added, over users.

    users, pages, refs as in score_pages    leaf  item -> one category: adds the entropy of 40-item pages
    """
    users = np.asarray(users)
    lists, index = ranked_lists(users, *(np.asarray(column) for column in pages))
    row, item, rank, _ = labels(users, refs, None)
    order, _ = places_of(row, item, lists, index)
    scores = order_scores(
        len(users), row, rank, order, np.zeros(len(users), dtype=np.int64), paper=True
    )
    scores["PWKT"] = np.where(
        np.isnan(scores["PWKT"]) & ~np.isnan(scores["WAS"]), 0.0, scores["PWKT"]
    )
    if leaf is not None:
        page = Lists(*(column[lists.first & (lists.place <= 40)] for column in lists))
        length = np.bincount(page.row, minlength=len(users))
        scores["entropy"] = category_scores(len(users), page, length, leaf, None)["entropy"]
    return {name: paper_mean(values[~np.isnan(values)], batch) for name, values in scores.items()}


def paper_mean(values: np.ndarray, batch: int) -> float:
    """mean * ceil(U / batch) / U; NaN for no user."""
    return (
        float(np.mean(values)) * math.ceil(len(values) / batch) / len(values)
        if len(values)
        else math.nan
    )
