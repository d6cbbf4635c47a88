"""Scores of pages: Recall, NDCG, WAS, PWKT, WMRD, DPA, ILD, entropy, redundancy.

They are Eq. 14 to 22 of arXiv 2506.09084. Each stands here twice. For one user, to be read and
checked by hand (None where a score is undefined):

    was("abc", "baxyc")              0.7531; first the labels, then the page, both best first
    entropy([4, 7], categories)      categories: item -> its category names, () where unknown

And for all users at once, by the same definitions but without a loop over users:

    scores = score_pages(users, (user, rank, item), (user, item, rank), categories)
    scores["WAS"]                    (U,), NaN where undefined; stats.summary gives its mean

Repeats are taken off a page first, and duplicate_rate reports them. A score that needs labels is
undefined for a user without labels, not 0.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
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


# Which direction is better, for the names that score_pages returns. Names that are not here, such
# as "Recall@5", go up.
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
PAPER_SHIFT = 100.0  # the S of `was` with which numbers come out on the scale of the paper's tables

Items = Sequence[Any]  # item ids: numbers, strings or anything else that is hashable
Categories = Mapping[Any, Collection] | Sequence[Collection]  # item -> its category names


def distinct(gen: Items, k: int | None = None) -> list:
    """The first k different items, each at its first place."""
    if k is not None and k < 1:
        raise ValueError(f"k={k}: want 1 or more, or None for the whole list")
    return list(dict.fromkeys(gen))[:k]


def labels_of(ref: Items) -> list:
    """The labels as a list. Raises ValueError if one repeats."""
    ref = list(ref)
    if len(set(ref)) < len(ref):
        raise ValueError(f"the labels repeat an item: {ref}")
    return ref


def recall(ref: Items, gen: Items, k: int | None = None, cap: bool = False) -> float | None:
    """Recall@k (Eq. 14): the share of the n labels that are among the first k of gen. In [0, 1].

    ref, gen  labels and page, best first
    k         None: the whole page
    cap       divide by min(k, n) instead of n, so that a short list can reach 1
    returns   None without labels
    """
    ref, gen = labels_of(ref), distinct(gen, k)
    if not ref:
        return None
    return len(set(ref) & set(gen)) / (min(k, len(ref)) if cap and k else len(ref))


def ndcg(
    ref: Items, gen: Items, k: int | None = None, rel: Sequence[float] | None = None
) -> float | None:
    """NDCG@k (Eq. 15, 16): DCG / ideal DCG, both of the first k ranks. In [0, 1].

        DCG = sum of (2^rel - 1) / log2(rank + 1)

    ref, gen  labels and page, best first
    k         None: the whole page
    rel       grade of each label, 0 or more, in the order of ref, e.g. rating - 3; default all 1
    returns   None without labels, or if every label has grade 0

    Raises ValueError on negative or missing grades.
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
    """Discounted sum of the gains at ranks 1, 2, 3 ..."""
    return sum(gain / math.log2(rank + 1) for rank, gain in enumerate(gains, start=1))


def ndcg_bound(n: np.ndarray, recalls: Mapping[int, np.ndarray], k: int = 100) -> np.ndarray:
    """The highest NDCG@k (grades 0 and 1) that lists of these recalls can have.

    It is reached if the hits of each band between two cuts lead that band, and all labels not yet
    found stand right after the last cut. A higher score was not computed from the same lists.

    n        (U,) number of labels of each user
    recalls  cut -> (U,) Recall@cut, for cuts up to k
    returns  (U,), NaN without labels
    """
    n = np.asarray(n, dtype=np.int64)
    # gained[j]: DCG of hits on the first j ranks
    gained = np.concatenate([[0.0], np.cumsum(1.0 / np.log2(np.arange(k) + 2.0))])
    total, found, start = np.zeros(len(n)), np.zeros(len(n), dtype=np.int64), 0
    for cut, recall_at in sorted(recalls.items()):
        hits = np.rint(np.nan_to_num(recall_at) * n).astype(np.int64)
        total += gained[np.minimum(start + hits - found, k)] - gained[start]
        found, start = hits, cut
    total += gained[np.minimum(start + n - found, k)] - gained[start]
    return np.where(n > 0, total / np.where(n > 0, gained[np.minimum(n, k)], 1.0), np.nan)


class Aligned(NamedTuple):
    """How far each of the n labels of u users stands from where it belongs; n is the same for all.

    real    (u, n) rank where the label belongs
    place   (u, n) its rank on the page; a label not on the page stands right after the page
    weight  (u, n) 1 / log2(1 + real); 0 for a missing label that is skipped
    shift   (u, n) |real - place|; the limit for a missing label that counts as worst
    found   (u, n) bool: whether the label earns any similarity
    limit   (u, 1) S, the largest shift that counts
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
    """Align the labels of u users with their pages.

    real     (u, n) rank where each label belongs
    place    (u, n) its rank on the page, NaN if it is not there
    length   (u,) number of different items on the page
    missing  how a label counts that is not on the page: see `was`
    paper    whether to use the scale of the paper's tables: see `was`
    """
    found = ~np.isnan(place)
    if paper:
        # Ranks among the labels alone, weights 1, a fixed limit; labels not found come last.
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
    """sum w x / sum w over the last axis; NaN if all weights are 0."""
    total = weight.sum(-1)
    return (x * weight).sum(-1) / np.where(total > 0, total, np.nan)


def was_rows(a: Aligned) -> np.ndarray:
    """`was` of u users, (u,)."""
    return weighted_mean(np.where(a.found, np.maximum(0.0, 1.0 - a.shift / a.limit), 0.0), a.weight)


def pwkt_rows(a: Aligned) -> np.ndarray:
    """`pwkt` of u users, (u,)."""
    # Missing labels share the rank after the page: after all others, and tied with each other.
    concordance = np.sign(a.real[:, :, None] - a.real[:, None, :]) * np.sign(
        a.place[:, :, None] - a.place[:, None, :]
    )
    weight = np.triu(a.weight[:, :, None] * a.weight[:, None, :], 1)  # each pair i < j once
    return weighted_mean(concordance.reshape(len(weight), -1), weight.reshape(len(weight), -1))


def wmrd_rows(a: Aligned) -> np.ndarray:
    """`wmrd` of u users, (u,)."""
    return weighted_mean(a.shift, a.weight)


def dpa_rows(a: Aligned) -> np.ndarray:
    """`dpa` of u users, (u,)."""
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
    """One of the rank scores of one user; rows computes it for many. Other arguments as in `was`.

    Raises ValueError on an unknown `missing`, repeated labels, or ranks that do not fit.
    """
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
    """WAS (Eq. 17), weighted agreement of positions. In [0, 1], higher is better.

        WAS = (1/n) sum_i w_i max(0, 1 - shift_i / S)

    shift_i is the distance, in ranks, between where label i belongs and where it stands on the
    page. The weights w_i = 1 / log2(1 + rank_i), rescaled to mean 1, make the first labels count
    most. S is max(K, n), where K is the number of different items on the page and n that of labels.

    ref, gen     labels and page, best first; repeats are taken off the page before it is cut at k
    k            None: the whole page
    missing      how a label counts that is not on the page: "worst" (similarity 0, shift S),
                 "append" (as if it stood at rank K + 1) or "skip"
    ref_rank     ranks of the labels if some of them tie, see stats.average_ranks; default 1 to n
    paper_scale  use ranks among the labels only, w_i = 1 and S = 100, to compare with the paper's
                 tables
    returns      None without labels, or if all are skipped

    pwkt, wmrd and dpa take the same arguments and treat the same cases alike.
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
    """PWKT (Eq. 18), weighted Kendall's tau. In [-1, 1], higher is better.

        PWKT = sum_{i<j} w_i w_j delta_ij / sum_{i<j} w_i w_j

    delta_ij is 1 if labels i and j stand in the right order on the page, -1 in the wrong one, 0 if
    they tie or are both missing. A label on the page precedes a missing one.

    Arguments as in `was`. None also for fewer than 2 labels (in paper_scale 0).
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
    """WMRD (Eq. 19), weighted mean rank difference, in ranks. In [0, S], lower is better.

        WMRD = sum_i w_i shift_i / sum_i w_i

    normalize  divide by S
    The other arguments as in `was`.
    """
    rows = relative_wmrd_rows if normalize else wmrd_rows
    return one_user(rows, ref, gen, k, missing, ref_rank, paper_scale)


def relative_wmrd_rows(a: Aligned) -> np.ndarray:
    """`wmrd` with normalize of u users, (u,)."""
    return wmrd_rows(a) / a.limit[:, 0]


def dpa(
    ref: Items,
    gen: Items,
    k: int | None = None,
    missing: str = "worst",
    ref_rank: Sequence[float] | None = None,
    paper_scale: bool = False,
) -> float | None:
    """DPA (Eq. 20), discounted positional accuracy. In [0, 1], higher is better.

        DPA = sum_i w_i / (1 + log2(1 + shift_i)) / sum_i w_i

    With missing="worst" a missing label adds 0 to the first sum. Arguments as in `was`.
    """
    return one_user(dpa_rows, ref, gen, k, missing, ref_rank, paper_scale)


def names_of(categories: Categories, item: Any) -> frozenset:
    """The set of category names of one item; empty if unknown. A single name needs no brackets."""
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
    """ILD (Eq. 21), intra-list diversity: 1 - mean similarity of two items. Higher is better.

    gen         the page; the mean is over all pairs of different items
    categories  similarity is the Jaccard index of the category sets, 0 if both are empty
                (unknown_rate tells how often); ILD is then in [0, 1]
    embedding   instead: item -> vector. Similarity is the cosine, 0 for a vector of length 0; ILD
                is then in [0, 2]
    returns     None with fewer than 2 different items

    Raises ValueError unless exactly one of categories and embedding is given.
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
    """Jaccard index |a & b| / |a | b|; 0 of two empty sets."""
    return len(a & b) / max(1, len(a | b))


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Cosine of two vectors; 0 if one has length 0."""
    length = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / length if length else 0.0


def entropy(gen: Items, categories: Categories) -> float | None:
    """Entropy (Eq. 22) of the page's categories, H = -sum_c p_c ln p_c, in nats.

    Higher is better: more balanced. An item of m categories adds 1/m to each of them; items without
    a category share one, unknown. The N of Eq. 22 is the number of categories, not of items.

    returns  from 0 to ln min(K, C) if every item has one category, with K different items and C
             categories; None for an empty page
    """
    page = distinct(gen)
    share: dict[Any, float] = defaultdict(float)
    for item in page:
        names = names_of(categories, item) or {None}
        for name in names:
            share[name] += 1.0 / len(names) / len(page)
    return max(0.0, -sum(p * math.log(p) for p in share.values())) if page else None


def balance(gen: Items, categories: Categories, n_categories: int | None = None) -> float | None:
    """Entropy relative to its maximum: H / ln min(K, C), at most 1. Higher is better.

    K is the number of different items on the page, C that of the catalogue's categories. Items of
    several categories can push H above ln min(K, C): such a page counts as perfectly balanced.

    n_categories  C; default: the categories in `categories`, and one more, unknown, if any item has
                  none
    returns       None if min(K, C) is below 2
    """
    page = distinct(gen)
    if n_categories is None:
        known, unknown = count_categories(categories)
        n_categories = known + (unknown or any(not names_of(categories, item) for item in page))
    h, most = entropy(page, categories), min(len(page), n_categories)
    return None if h is None or most < 2 else min(1.0, h / math.log(most))


def count_categories(categories: Categories) -> tuple[int, bool]:
    """The number of categories in a catalogue, and whether some item of it has none."""
    sets = [
        names_of(categories, item)
        for item in (categories if isinstance(categories, Mapping) else range(len(categories)))
    ]
    return len(frozenset().union(*sets)), any(not names for names in sets)


def redundancy(gen: Items, categories: Categories, n_categories: int | None = None) -> float | None:
    """1 - balance: 0 for a perfectly balanced page, 1 for a page of one category. Lower is better.

    Arguments and cases as in `balance`. The paper calls H itself "redundancy", higher being better.
    """
    score = balance(gen, categories, n_categories)
    return None if score is None else 1.0 - score


def duplicate_rate(gen: Items) -> float | None:
    """Share of slots that repeat an item above. Lower is better. None for an empty page."""
    return 1.0 - len(set(gen)) / len(gen) if len(gen) else None


def near_duplicate_pairs(gen: Items, group: Mapping | Sequence) -> float:
    """Number of pairs of different items in one near-duplicate group. Lower is better.

    group  item -> group; an item of group None, or not in the mapping, belongs to none
    """
    groups = Counter(
        group.get(item) if isinstance(group, Mapping) else group[item] for item in distinct(gen)
    )
    return float(sum(n * (n - 1) // 2 for name, n in groups.items() if name is not None))


def unknown_rate(gen: Items, categories: Categories) -> float | None:
    """Share of the different items without a category; None for an empty page.

    Tells how far ILD and entropy can be trusted.
    """
    page = distinct(gen)
    return sum(not names_of(categories, item) for item in page) / len(page) if page else None


class Lists(NamedTuple):
    """Ranked lists of many users as flat arrays, sorted by row (user), then by rank.

    row    (P,) index into users
    item   (P,) item id
    place  (P,) rank from 1 within the row, repeats counted
    first  (P,) bool: not a repeat of an item above
    order  (P,) rank from 1 within the row, repeats not counted; a repeat has the entry's above it
    """

    row: np.ndarray
    item: np.ndarray
    place: np.ndarray
    first: np.ndarray
    order: np.ndarray


def rows_among(users: np.ndarray, user: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index of every entry of `user` in the rising `users`, and whether it is there at all."""
    begin = np.flatnonzero(np.diff(user)) + 1
    if len(user) > 1 and 2 * len(begin) < len(user):  # one search for entries that stand together
        begin = np.concatenate([[0], begin])
        length = np.diff(begin, append=len(user))
        row, found = rows_among(users, user[begin])
        return np.repeat(row, length), np.repeat(found, length)
    row = np.minimum(np.searchsorted(users, user), len(users) - 1)
    return row, users[row] == user


def within_rows(row: np.ndarray, n_rows: int) -> np.ndarray:
    """0, 1, 2 ... within each run of the sorted `row`."""
    count = np.bincount(row, minlength=n_rows)
    return np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)


class Index(NamedTuple):
    """A sorted index of Lists, to look up where an item stands in a row.

    code         (P,) int64, rising: (row * base + item) * width + place - 1
    base, width  above any item, and the longest list
    begin        (rows,) where a row's entries begin in Lists
    ids          (base,) rising item ids, if `code` holds positions in them because they are too
                 large themselves; None if it holds ids
    """

    code: np.ndarray
    base: int
    width: int
    begin: np.ndarray
    ids: np.ndarray | None


def ranked_lists(
    users: np.ndarray, user: np.ndarray, rank: np.ndarray, item: np.ndarray
) -> tuple[Lists, Index]:
    """Sort entries (P,) into Lists and their Index, leaving out users that are not in `users`."""
    row, kept = rows_among(users, user)
    if not kept.all():
        row, rank, item = row[kept], rank[kept], item[kept]
    step = np.diff(row)
    if not ((step > 0) | ((step == 0) & (np.diff(rank) >= 0))).all():  # most inputs are sorted
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
    """The Index of entries whose `row` rises, and whose `place` is 1, 2, 3 ... within each row."""
    count = np.bincount(row, minlength=n_rows)
    base, width, ids = int(item.max(initial=0)) + 1, int(place.max(initial=1)), None
    if n_rows * base * width >= 1 << 62:
        ids, item = np.unique(item, return_inverse=True)
        base = len(ids)
    code = item.astype(np.int64) * width + place - 1
    if n_rows * width <= 2 * len(row):  # many short sorts are several times faster than a long one
        kind = "int32" if base * width < 1 << 31 else "int64"
        if n_rows * width == len(row):
            table = code.astype(kind).reshape(n_rows, width)
            table.sort(axis=1)
            code = table.reshape(-1) + row * (base * width)
        else:
            table = np.full((n_rows, width), np.iinfo(kind).max, kind)
            table[row, place - 1] = code
            table.sort(axis=1)
            code = table[np.arange(width) < count[:, None]] + row * (base * width)
    else:
        code = np.sort(code + row * (base * width))
    begin = np.minimum(np.cumsum(count) - count, max(len(row) - 1, 0))
    return Index(code, base, width, begin, ids)


def entries(index: Index, at: np.ndarray) -> np.ndarray:
    """Positions in Lists of the entries at positions `at` of the sorted codes."""
    code = index.code[at]
    return index.begin[code // (index.base * index.width)] + code % index.width


def places_of(
    row: np.ndarray, item: np.ndarray, lists: Lists, index: Index
) -> tuple[np.ndarray, np.ndarray]:
    """Where each (row, item) stands in the lists: order and place of its first entry, or NaN.

    row, item  (R,), all pairs different
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
    """Every score of every user: the functions above, without a loop over users.

    users       (U,) int, rising; entries of other users are left out
    pages       (user, rank, item), (P,) int each: ranked lists, in any order
    refs        (user, item, rank), (R,) each: labels, and the ranks where they belong, 1 to n or
                stats.average_ranks
    categories  item -> its category names, () where unknown; or, for many calls, what `described`
                made of them
    page_k      entries of a list that are the page: all scores but Recall and NDCG look at these
                only
    recall_k    cuts of Recall; ndcg_k: the cut of NDCG
    rel         (R,) grades of the labels, for NDCG
    group       (N,) int near-duplicate group of every item: adds near_duplicate_pairs
    embedding   (N, d) float: adds ILD_cosine
    The other options as in the functions for one user.

    returns     name -> (U,) float64, NaN where undefined. Names: see DIRECTION

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
    """row, item, rank and grade, (R,) each, of the labels of `users`, sorted by row and rank."""
    user, item, rank = (np.asarray(column) for column in refs)
    grade = np.ones(len(user)) if rel is None else np.asarray(rel, dtype=np.float64)
    if not (grade >= 0).all() or not (rank >= 1).all() or len(grade) != len(user):
        raise ValueError(
            "score_pages: want a rank of 1 or more and a grade of 0 or more for every label"
        )
    row, kept = rows_among(users, user)
    row, item, rank, grade = row[kept], item[kept], rank[kept].astype(np.float64), grade[kept]
    code = np.sort(row * (item.max(initial=0) + 1) + item)
    if (code[1:] == code[:-1]).any():
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
    """Recall and NDCG, (n_users,) each, from where each label stands in the whole list.

    row    (R,) rising: whose label
    order  (R,) its rank in the list, NaN if it is not there
    grade  (R,) of the label
    """
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
    """WAS, PWKT, WMRD and DPA, (n_users,) each; users with equally many labels form a dense block.

    row     (R,) rising: whose label
    real    (R,) rank where the label belongs
    place   (R,) its rank on the page, NaN if it is not there
    length  (n_users,) number of different items on each page
    """
    scores = {name: np.full(n_users, np.nan) for name in ("WAS", "PWKT", "WMRD", "DPA")}
    count = np.bincount(row, minlength=n_users)
    begin = np.cumsum(count) - count
    for n in (1 + np.flatnonzero(np.bincount(count)[1:])).tolist():
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
    """The categories of a catalogue as numbers, made by `described`.

    table         (N + 1, m) int32: the category numbers of each item, then -1. The last row stands
                  for an empty slot of a page, whose item is -1
    size          (N + 1,) int64: how many categories each item has
    known         number of categories in the catalogue
    some_unknown  whether some item has none
    """

    table: np.ndarray
    size: np.ndarray
    known: int
    some_unknown: bool


def described(categories: Sequence) -> Described:
    """Turn category names into numbers, once for many calls of score_pages.

    categories  (N,) for every item from 0 to N - 1 its category names, () if unknown; no mapping
    """
    if not set(map(type, categories)) <= {tuple}:
        categories = [tuple(names_of(categories, item)) for item in range(len(categories))]
    every = list(chain.from_iterable(categories))
    number: dict[Hashable, int] = {name: at for at, name in enumerate(dict.fromkeys(every))}
    size = np.fromiter(map(len, (*categories, ())), np.int64, len(categories) + 1)
    flat = np.fromiter(map(number.__getitem__, every), np.int32, len(every))
    table = np.full((len(size), size.max()), -1, dtype=np.int32)
    table[np.arange(table.shape[1]) < size[:, None]] = flat
    order = np.sort(table, axis=1)
    # An empty name, or an item with the same name twice: clean up first.
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
    """ILD, entropy, balance, redundancy and unknown_rate of pages without repeats, (n_users,) each.

    length  (n_users,) number of items on each page
    """
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
    """`entropy` (U,) of pages (U, K) of items, -1 in empty slots; arguments from Described."""
    U, m = len(grid), table.shape[1]
    base = m + 2  # above any count
    small = (int(table.max(initial=0)) + 2) * base < 1 << 31  # narrow numbers sort faster
    kind = np.int32 if small else np.int64
    names, length = table[grid].astype(kind), (grid >= 0).sum(1)
    count = size.astype(kind)[grid][..., None]
    # One key for each category of each slot. Sorting brings a page's entries of one category
    # together.
    key = np.where(names >= 0, (names + 1) * base + count, -1)
    unknown = (grid >= 0)[..., None] & (count == 0)
    if unknown.any():
        key = np.concatenate([key, np.where(unknown, kind(1), kind(-1))], 2)
    key = np.sort(key.reshape(U, -1), axis=1)
    there = key >= 0
    row, key = np.repeat(np.arange(U), there.sum(1)), key[there]
    number = key // base
    count = key - number * base
    new = np.ones(len(row), dtype=bool)
    new[1:] = (row[1:] != row[:-1]) | (number[1:] != number[:-1])
    start = np.flatnonzero(new)
    share = np.add.reduceat(1.0 / count / length[row], start) if len(start) else np.zeros(0)
    h = np.bincount(row[start], weights=-share * np.log(share), minlength=U)
    return np.where(length > 0, np.maximum(h, 0.0), np.nan)


def jaccard_diversity(grid: np.ndarray, table: np.ndarray, size: np.ndarray) -> np.ndarray:
    """`ild` (U,) by categories, of pages (U, K) of items, -1 in empty slots."""
    U, K = grid.shape
    # Users along the last axis: operations then run along many users, even if pages are short.
    at = np.ascontiguousarray(grid.T)
    few = table.max(initial=0) < 256 and hasattr(np, "bitwise_count")  # NumPy 2
    common = common_by_bits if few else common_by_names
    both_of, count, similar = common(table, at), size.astype(np.int32)[at], np.zeros(U)
    for i in range(K - 1):
        both = both_of(i)
        similar += (both / np.maximum(count[i] + count[i + 1 :] - both, 1)).sum(0)
    n = (grid >= 0).sum(1)
    return 1.0 - ratio(similar, n * (n - 1) // 2)


def common_by_names(table: np.ndarray, at: np.ndarray) -> Callable[[int], np.ndarray]:
    """A function of slot i: how many categories slots i + 1, ... share with it, (K - 1 - i, U).

    table  (N + 1, m) of Described      at  (K, U) items
    """
    names = np.ascontiguousarray(table[at].transpose(2, 0, 1))  # (m, K, U)
    mine = np.where(names < 0, -2, names)  # padding equals no padding

    def both_of(i: int) -> np.ndarray:
        both = np.zeros((len(at) - 1 - i, at.shape[1]), dtype=np.int32)
        for a in mine[:, i]:
            for b in names[:, i + 1 :]:
                both += a == b
        return both

    return both_of


def common_by_bits(table: np.ndarray, at: np.ndarray) -> Callable[[int], np.ndarray]:
    """`common_by_names` for few categories: a bit for each, 64 in a word."""
    words = []
    for start in range(0, int(table.max(initial=0)) + 1, 64):
        inside = (table >= start) & (table < start + 64)
        bit = np.uint64(1) << np.where(inside, table - start, 0).astype(np.uint64)
        words.append(np.bitwise_or.reduce(np.where(inside, bit, np.uint64(0)), axis=1)[at])

    def both_of(i: int) -> np.ndarray:
        return sum(np.bitwise_count(w[i] & w[i + 1 :]).astype(np.int32) for w in words)

    return both_of


def cosine_diversity(
    n_users: int, page: Lists, length: np.ndarray, embedding: np.ndarray
) -> np.ndarray:
    """`ild` (U,) by cosine: sum_{i != j} cos_ij = |sum_i e_i|^2 - sum_i |e_i|^2 of unit vectors."""
    vector = embedding[page.item].astype(np.float64)
    norm = np.linalg.norm(vector, axis=1, keepdims=True)
    unit = np.divide(vector, norm, out=np.zeros_like(vector), where=norm > 0)
    total = np.zeros((n_users, embedding.shape[1]))
    np.add.at(total, page.row, unit)
    own = np.bincount(page.row, weights=np.square(unit).sum(1), minlength=n_users)
    return 1.0 - ratio(np.square(total).sum(1) - own, length * (length - 1))


def group_pairs(n_users: int, page: Lists, group: np.ndarray) -> np.ndarray:
    """`near_duplicate_pairs` (U,) of pages without repeats."""
    base = group.max(initial=0) + 1
    code, count = np.unique(page.row * base + group[page.item], return_counts=True)
    pairs = np.bincount(code // base, weights=count * (count - 1) // 2, minlength=n_users)
    return pairs.astype(np.float64)  # the bincount of nothing is int64


def paper_scale(
    users: np.ndarray, pages: tuple, refs: tuple, leaf: Sequence | None = None, batch: int = 64
) -> dict[str, float]:
    """The rank scores on the scale of the paper's tables, for comparison with them only.

    The paper's numbers are of another size than Eq. 17 to 20 allow. This scale comes out near them:
    ranks among the labels only of a full ranking, w_i = 1, S = 100; for a user with one label WAS
    is 1, PWKT 0, WMRD 0 and DPA 1. Instead of the mean over the U users it takes the sum of the
    batches' means divided by U, which is the mean times ceil(U / batch) / U.

    users, pages, refs  as in `score_pages`
    leaf                item -> one category: adds the entropy of pages of 40 items
    batch               users in a batch
    returns             name -> mean over users
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
    """mean * ceil(U / batch) / U of values (U,); NaN for no user."""
    return (
        float(np.mean(values)) * math.ceil(len(values) / batch) / len(values)
        if len(values)
        else math.nan
    )
