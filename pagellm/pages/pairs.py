"""Pairs of pages, the better one first: what the reward model learns from (the paper's A.3).

    pairs, counts = make_pairs(shop, seed=0, kinds=KINDS, per_kind=4, label_share=0.5)

The better page is a user's ground-truth page. By the kind of pair, the worse one

    preference   holds what the user rated below 3, filled up with items the user has not dealt with
    ranked       swaps 1 to 3 pairs of positions, so that a better item stands below a worse one
    diversity    replaces the only item of a category by one of a category that the page already
                 shows
    redundancy   replaces an item by a near-duplicate of an item above it

Both pages are equally long, and everything comes from train rows. A pair is dropped unless its
second page has the lower energy E.

The paper swaps positions for the last three kinds alike. But a swap cannot change which items the
page holds, so only their order would tell about diversity or redundancy. literal_swaps=True does it
that way.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain, islice

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from pagellm.data.shop import Rows, Shop
from pagellm.pages import edits
from pagellm.pages.edits import MATCHES, NOBODY, Stock
from pagellm.pages.energy import (
    Near,
    energy,
    gain,
    gains,
    near_above,
    novel_slots,
    page_energy,
)
from pagellm.pages.truth import (
    best_first,
    draw_labels,
    label_counts,
    level_members,
    rating_levels,
)
from pagellm.stage import collector
from pagellm.stage.randomness import Streams, generators, seeds

__all__ = [
    "KINDS",
    "Pair",
    "Side",
    "Stock",
    "buyers",
    "diversity",
    "draw_side",
    "from_table",
    "make_pairs",
    "preference",
    "ranked",
    "redundancy",
    "swapped_diversity",
    "swapped_redundancy",
    "to_table",
]


KINDS = ("preference", "ranked", "diversity", "redundancy")
NEUTRAL = ("exclude", "weak_negative")
USERS = 256  # whose draws are made together; fewer in a large catalogue:
FLAGS = 1 << 22  # items times users, or times pages whose edits are made together

CHECKED = 1_000  # pairs whose energies are computed a second time
WIDE = 4096  # in a larger catalogue replacements for diversity are looked for page by page


@dataclass(frozen=True)
class Pair:
    """Two pages for one user: chosen, rejected and mask are equally long; ids are 0 to N - 1."""

    user: int
    kind: str
    history: list[int]  # items that the policy may see, oldest first
    history_rating: list[float]  # NaN where unknown
    chosen: list[int]
    rejected: list[int]
    mask: list[bool]  # True on edited positions; nowhere for preference
    delta_E: float  # E(chosen) - E(rejected)
    source: str  # of the rejected page: swap, replacement, rated, sampled or rated+sampled
    seed: int  # of the generator that drew the split and the edit


@dataclass(frozen=True)
class Buyer:
    """What the train rows say about one user."""

    user: int
    items: np.ndarray  # liked ones, oldest first
    ratings: np.ndarray  # of the liked ones; NaN where unknown
    disliked: np.ndarray  # items rated below 3
    seen: np.ndarray  # all train items, liked or not, and their ratings
    stars: np.ndarray
    free: np.ndarray  # (N,) bool: True unless the item is in the user's train rows
    # What every draw needs of the liked items, made once:
    members: list[np.ndarray]  # places of each rating level
    order: np.ndarray  # places of the items, best first (truth.best_first)
    level: np.ndarray  # rating level of each item
    kept: list[np.ndarray] = field(default_factory=list, init=False)

    def eligible(self, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Free items of a weight above 0, and their weights; made once for one array of weights."""
        if not self.kept or self.kept[0] is not weight:
            items = np.flatnonzero(self.free & (weight > 0))
            self.kept[:] = weight, items, weight[items]
        return self.kept[1], self.kept[2]


@dataclass(frozen=True)
class Side:
    """One random split of a buyer's liked items, and the page made from its labels."""

    buyer: Buyer
    history: list[int]
    history_rating: list[float]
    page: list[int]
    level: np.ndarray  # (K,) rating of each slot, -inf where unknown


# What the functions below return: the rejected page, its edited positions, and how it was made
# (Pair.source); None if the page allows no such pair.
Edit = tuple[list[int], list[int], str]


def preference(side: Side, stock: Stock, rng: np.random.Generator) -> Edit | None:
    """Disliked items in random order, filled up with unseen ones drawn in proportion to weight."""
    length = len(side.page)
    bad = side.buyer.disliked
    if len(bad):
        bad = rng.permutation(bad)[:length]
    fill = length - len(bad)
    if fill:
        # Exponential race: the `fill` earliest arrivals are a weighted draw without replacement.
        eligible, weight = side.buyer.eligible(stock.weight)
        if len(eligible) < fill:
            return None
        arrival = rng.standard_exponential(len(eligible)) / weight
        first = arrival.argpartition(fill - 1)[:fill]  # sorts no more: there may be millions
        bad = rng.permutation(np.concatenate([bad, eligible[first[arrival[first].argsort()]]]))
    source = "rated" if fill == 0 else "sampled" if fill == length else "rated+sampled"
    return bad.tolist(), [], source


def ranked(side: Side, stock: Stock, rng: np.random.Generator) -> Edit | None:
    """Swap 1 to 3 disjoint pairs of positions a < b where a has the better (rating, s_i)."""
    level, s = side.level, stock.level[side.page]
    better = (level[:, None] > level) | ((level[:, None] == level) & (s[:, None] > s))
    return swap(side.page, better, rng, most=3)


def swap(page: list[int], worth: np.ndarray, rng: np.random.Generator, most: int) -> Edit | None:
    """Swap 1 to `most` disjoint pairs of positions a < b, drawn among those with worth[a, b].

    worth  (K, K) bool
    """
    K = len(page)
    candidates = rng.permutation(np.flatnonzero(worth & above(K)))
    if not len(candidates):
        return None
    count = rng.integers(1, most + 1)
    rejected, edited = list(page), []
    for a, b in (divmod(both, K) for both in candidates.tolist()):
        if a not in edited and b not in edited:
            rejected[a], rejected[b] = rejected[b], rejected[a]
            edited += [a, b]
        if len(edited) == 2 * count:
            break
    return rejected, edited, "swap"


@lru_cache(maxsize=64)
def above(K: int) -> np.ndarray:
    """(K, K) bool: whether slot a stands above slot b."""
    return np.triu(np.ones((K, K), dtype=bool), 1)


def lonely(leaf: np.ndarray) -> np.ndarray:
    """(K,) bool: slots that are the only one of their (known) leaf category."""
    return (leaf >= 0) & ((leaf[:, None] == leaf).sum(1) == 1)


def diversity(side: Side, stock: Stock, rng: np.random.Generator) -> Edit | None:
    """Replace the only item of a category by an unseen one of a category that is on the page.

    The new item is one of the MATCHES nearest in popularity rank and s_i, so that neither gives the
    edit away. It is never a near-duplicate of an item on the page: that would be a redundancy pair.
    """
    leaf = stock.catalogue.leaf_id[side.page]
    slots = np.flatnonzero(lonely(leaf))
    if len(slots) == 0:
        return None
    slot = int(slots[rng.integers(len(slots))])
    others = set(leaf.tolist()) - {-1, int(leaf[slot])}
    if not others:
        return None
    pool = np.concatenate([stock.by_leaf[category] for category in sorted(others)])
    pool = pool[side.buyer.free[pool]]
    near = np.concatenate([stock.near.of(item) for item in side.page])
    stock.flag[near] = True
    pool = pool[~stock.flag[pool]]
    stock.flag[near] = False
    if len(pool) == 0:
        return None
    popular, liked = np.abs(stock.coordinate[:, pool] - stock.coordinate[:, [side.page[slot]]])
    nearest = pool[np.argsort(popular + liked, kind="stable")[:MATCHES]]
    return replace(side.page, slot, int(nearest[rng.integers(len(nearest))]))


def redundancy(side: Side, stock: Stock, rng: np.random.Generator) -> Edit | None:
    """Replace an item by an unseen near-duplicate of an item above it."""
    indptr, neighbour = stock.near.lists
    copies = [
        (a, copy)
        for a, item in enumerate(side.page[:-1])
        for copy in neighbour[indptr[item] : indptr[item + 1]]
        if side.buyer.free[copy]
    ]
    if not copies:
        return None
    a, copy = copies[rng.integers(len(copies))]
    return replace(side.page, int(rng.integers(a + 1, len(side.page))), copy)


def replace(page: list[int], slot: int, item: int) -> Edit:
    """The edit that puts `item` into `slot`."""
    return [*page[:slot], item, *page[slot + 1 :]], [slot], "replacement"


def swapped_diversity(side: Side, stock: Stock, rng: np.random.Generator) -> Edit | None:
    """The paper's way: swap the only item of a category with a later item of a shared category."""
    leaf = stock.catalogue.leaf_id[side.page]
    alone = lonely(leaf)
    return swap(side.page, alone[:, None] & ~alone, rng, most=1)


def swapped_redundancy(side: Side, stock: Stock, rng: np.random.Generator) -> Edit | None:
    """The paper's way: swap an item upwards, to below another item of its own category."""
    leaf = stock.catalogue.leaf_id[side.page]
    same = (leaf[:, None] == leaf) & (leaf >= 0)
    alike_above = np.cumsum(same, axis=0) > 0  # [a, b]: b's category stands at a or above
    return swap(side.page, alike_above & ~same, rng, most=1)


def makers(literal_swaps: bool) -> dict[str, Callable]:
    """Kind of pair -> the function that makes its rejected page."""
    if literal_swaps:
        return dict(
            zip(KINDS, (preference, ranked, swapped_diversity, swapped_redundancy), strict=True)
        )
    return dict(zip(KINDS, (preference, ranked, diversity, redundancy), strict=True))


def pair_seeds(
    seed: int, block: Sequence[Buyer], kinds: Sequence[str], per_kind: int
) -> np.ndarray:
    """63 bits for every buyer, kind and draw, (buyers * kinds * per_kind,) uint64.

    They depend on the seed, the user, the kind and the number of the draw only, so that neither
    order nor processes matter.
    """
    whole = [seed & 0xFFFFFFFF]
    while seed := seed >> 32:
        whole.append(seed & 0xFFFFFFFF)
    kind = np.array([KINDS.index(name) for name in kinds])
    user = np.array([buyer.user for buyer in block])
    user, kind, draw = (
        each.reshape(-1) for each in np.meshgrid(user, kind, np.arange(per_kind), indexing="ij")
    )
    given = [np.full(len(kind), word) for word in whole]
    return seeds([*given, user, kind, draw], 1)[:, 0] >> np.uint64(1)


@collector.paused()
def make_pairs(
    shop: Shop,
    seed: int = 0,
    kinds: Sequence[str] = KINDS,
    per_kind: int = 4,
    label_share: float = 0.5,
    *,
    k: int = 20,
    literal_swaps: bool = False,
    neutral: str = "exclude",
    margin: float = 1e-6,
    ranked_margin: float = 0.0,
    shrink: float = 0.0,
    implicit_gain: float = 1.0,
    near: Near | None = None,
    users: Sequence[int] | None = None,
    progress: bool = False,
) -> tuple[list[Pair], dict[str, dict]]:
    """Pairs of every user with two liked train items or more, ordered by user, kind and draw.

    kinds          kinds of pairs to make, some of KINDS
    per_kind       draws of each kind for each user; every draw splits input and labels anew
    label_share    share of the user's liked train items that go to the page
    k              slots of a page at most
    literal_swaps  make diversity and redundancy pairs by swaps, as the paper does
    neutral        "exclude": a rating of 3 is neither liked nor disliked; "weak_negative": disliked
    margin         E(chosen) - E(rejected) of a pair that is kept, at least
    ranked_margin  the same for ranked pairs, if it is more: the difference between their two orders
                   may be smaller than the noise of a rating
    shrink         of truth.item_scores
    implicit_gain  of energy.gain
    near           near-duplicates to use; by default those that titles tell
    users          users to make pairs of; by default all
    progress       show a progress bar
    returns        the pairs; and for every kind the numbers of draws tried, impossible (the page
                   allows no such pair), rejected (by the margin) and emitted, and lower_energy: the
                   share of emitted pairs whose rejected page has the lower energy, computed a
                   second time

    Raises ValueError on an unknown kind or neutral, or if per_kind or k is below 1.
    """
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise ValueError(
            f"make_pairs: unknown kind {unknown[0]!r}; want some of {', '.join(KINDS)}"
        )
    if neutral not in NEUTRAL or per_kind < 1 or k < 1:
        raise ValueError(
            f"make_pairs: neutral={neutral!r}, per_kind={per_kind}, k={k}: want neutral one of "
            f"{', '.join(NEUTRAL)}, the others 1 or more"
        )
    stock = Stock.of(shop, near, shrink)
    pairs: list[Pair] = []
    counts = {
        kind: dict.fromkeys(("tried", "impossible", "rejected", "emitted"), 0) for kind in kinds
    }
    wait = tqdm(
        buyers(shop, stock, neutral, implicit_gain, users),
        "pairs",
        disable=not progress,
        unit="user",
        total=shop.n_users if users is None else len(users),
        mininterval=1.0,
    )
    buyer_of = iter(wait)
    at_once = per_kind if shop.n_items <= WIDE else 1
    size = max(1, min(USERS, FLAGS // max(1, shop.n_items * at_once)))
    kept = [max(margin, ranked_margin) if kind == "ranked" else margin for kind in kinds]
    while block := list(islice(buyer_of, size)):
        drawn = draw_block(
            block,
            stock,
            pair_seeds(seed, block, kinds, per_kind),
            kinds,
            label_share,
            k,
            literal_swaps,
        )
        kind = np.tile(np.repeat(np.arange(len(kinds)), per_kind), len(block))
        delta = drawn.delta(stock, implicit_gain)
        good = drawn.made & (delta >= np.array(kept)[kind])
        for at, name in enumerate(kinds):
            of = kind == at
            for outcome, which in (
                ("tried", of),
                ("impossible", of & ~drawn.made),
                ("rejected", of & drawn.made & ~good),
                ("emitted", of & good),
            ):
                counts[name][outcome] += int(which.sum())
        pairs += drawn.pairs(np.flatnonzero(good), [kinds[at] for at in kind.tolist()], delta)
    check_energy(pairs, counts, shop, stock, implicit_gain)
    return pairs, counts


def buyers(
    shop: Shop, stock: Stock, neutral: str, implicit_gain: float, users: Sequence[int] | None
) -> Iterator[Buyer]:
    """Users with two liked train items or more: at least one for the history, one for the page."""
    liked, others = shop.csr("train"), shop.csr("train", positive=False)
    for user in range(shop.n_users) if users is None else users:
        items, ratings = liked.of(user)
        if len(items) < 2:
            continue
        rest, stars = others.of(user)
        bad = rest[stars < 3] if neutral == "exclude" else rest[stars <= 3]
        seen = np.concatenate([items, rest])
        free = np.ones(shop.n_items, dtype=bool)
        free[seen] = False
        yield Buyer(
            int(user),
            items,
            ratings,
            bad,
            seen,
            np.concatenate([ratings, stars]),
            free,
            level_members(ratings),
            best_first(items, ratings, stock.s, stock.ties.of(int(user), items)),
            rating_levels(ratings),
        )


def label_draws(
    block: Sequence[Buyer], draws: int, label_share: float, rngs: Sequence[np.random.Generator]
) -> list[np.ndarray]:
    """For every buyer (draws, n) bool: the labels among the liked items, a generator a draw."""
    found = []
    for at, buyer in enumerate(block):
        counts = label_counts(buyer.members, label_share)
        label = np.zeros((draws, len(buyer.items)), dtype=bool)
        for row, rng in zip(label, rngs[at * draws : (at + 1) * draws], strict=True):
            draw_labels(row, buyer.members, counts, rng)
        found.append(label)
    return found


def draw_side(
    buyer: Buyer, stock: Stock, label_share: float, k: int, rng: np.random.Generator
) -> Side:
    """Split one user's liked items at random; the labels make the page, cut at k slots."""
    labels = label_draws([buyer], 1, label_share, [rng])
    return sides_of([buyer], labels, stock, k)[0]


def labels_together(
    block: Sequence[Buyer], draws: int, label_share: float, streams: Streams
) -> np.ndarray:
    """`label_draws` of many streams at once, `draws` of them a buyer: (buyers, draws, n) bool.

    n  liked items of the buyer who has most
    """
    counts = [label_counts(buyer.members, label_share) for buyer in block]
    label = np.zeros((len(block) * draws, max(len(b.items) for b in block)), dtype=bool)
    levels = [
        [(places, c) for places, c in zip(buyer.members, count, strict=True) if c]
        for buyer, count in zip(block, counts, strict=True)
    ]
    for at in range(max(map(len, levels))):
        own = [level[at] if at < len(level) else (NOBODY, 0) for level in levels]
        table = np.repeat(padded([places.tolist() for places, _ in own]), draws, axis=0)
        length = np.repeat([len(places) for places, _ in own], draws)
        mixed = streams.permutation(table, length)
        row, place = np.nonzero(
            np.arange(mixed.shape[1]) < np.repeat([c for _, c in own], draws)[:, None]
        )
        label[row, mixed[row, place]] = True
    none = np.repeat([not level for level in levels], draws)
    liked = np.repeat([len(buyer.items) for buyer in block], draws)
    one = streams.integers(np.where(none, liked, 1))
    label[none, one[none]] = True
    return label.reshape(len(block), draws, label.shape[1])


def pages_of(
    block: Sequence[Buyer], labels: Sequence[np.ndarray], stock: Stock, k: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The ground-truth pages of all draws of all buyers, those of truth.ground_truth_page.

    labels   for every buyer (draws, n) bool
    returns  (D, K) items, -1 in empty slots; (D, K) rating levels; (D,) slots
    """
    # The labels of all draws, one after another, each draw's best first.
    at = [np.nonzero(label[:, buyer.order]) for buyer, label in zip(block, labels, strict=True)]
    place = [buyer.order[column] for buyer, (_, column) in zip(block, at, strict=True)]
    count = np.concatenate([label.sum(1) for label in labels])
    draw = np.repeat(np.arange(len(count)), count)
    item = np.concatenate([buyer.items[p] for buyer, p in zip(block, place, strict=True)])
    level = np.concatenate([buyer.level[p] for buyer, p in zip(block, place, strict=True)])
    # Within a level, categories that the page does not show yet go first.
    fresh = novel_slots(draw, stock.catalogue.leaf_id[item])
    new = (np.diff(draw) > 0) | (level[1:] != level[:-1])
    group = np.concatenate([[0], np.cumsum(new)])
    order = np.argsort(2 * group + ~fresh, kind="stable")
    item, level = item[order], level[order]
    # Of near-duplicates the highest one stays.
    code, first = np.unique(draw * len(stock.near) + item, return_index=True)
    above, below = near_above(draw, item, stock.near, code, first)
    kept = np.ones(len(item), dtype=bool)
    for a, b in zip(above.tolist(), below.tolist(), strict=True):  # below rises
        if kept[a]:
            kept[b] = False
    draw, item, level = draw[kept], item[kept], level[kept]
    count = np.bincount(draw, minlength=len(count))
    slot = np.arange(len(draw)) - (np.cumsum(count) - count)[draw]
    shape, shown = (len(count), min(k, count.max(initial=0))), slot < k
    page, own = np.full(shape, -1, dtype=np.int64), np.full(shape, -np.inf)
    page[draw[shown], slot[shown]] = item[shown]
    own[draw[shown], slot[shown]] = level[shown]
    return page, own, np.minimum(count, k)


def histories(
    block: Sequence[Buyer], labels: Sequence[np.ndarray]
) -> Iterator[tuple[list[int], list[float]]]:
    """Items and ratings that each draw leaves to the history, oldest first."""
    for buyer, label in zip(block, labels, strict=True):
        row, column = np.nonzero(~label)
        items, ratings = buyer.items[column].tolist(), buyer.ratings[column].tolist()
        cut = np.searchsorted(row, np.arange(len(label) + 1)).tolist()
        for a, b in zip(cut, cut[1:], strict=False):
            yield items[a:b], ratings[a:b]


def sides_of(
    block: Sequence[Buyer], labels: Sequence[np.ndarray], stock: Stock, k: int
) -> list[Side]:
    """All draws of all buyers as Sides; arguments as in `pages_of`."""
    page, level, length = pages_of(block, labels, stock, k)
    buyer = (b for b, label in zip(block, labels, strict=True) for _ in label)
    return [
        Side(whose, *history, items[:n], own[:n])
        for whose, history, items, own, n in zip(
            buyer, histories(block, labels), page.tolist(), level, length.tolist(), strict=True
        )
    ]


def padded(pages: Sequence[Sequence[int]]) -> np.ndarray:
    """(B, longest) int64 items of pages, -1 past their ends."""
    count = np.fromiter(map(len, pages), np.int64, len(pages))
    item = np.full((len(pages), count.max(initial=0)), -1, dtype=np.int64)
    flat = np.fromiter(chain.from_iterable(pages), np.int64, count.sum())
    item[np.arange(item.shape[1]) < count[:, None]] = flat
    return item


@dataclass(frozen=True)
class Drawn:
    """All draws of a block of buyers, D of them, equally many a buyer."""

    block: Sequence[Buyer]
    labels: Sequence[np.ndarray]  # for every buyer (draws, n) bool
    seed: np.ndarray  # (D,) uint64
    page: np.ndarray  # (D, K) items, -1 in empty slots
    rejected: np.ndarray  # (D, K), likewise
    edited: np.ndarray  # (D, K) bool
    made: np.ndarray  # (D,) bool: False where the page allows no such pair
    source: list[str]  # D, as in Pair

    def delta(self, stock: Stock, implicit_gain: float) -> np.ndarray:
        """(D,) energy of the page less that of the rejected one; 0 where there is none."""
        made = np.flatnonzero(self.made)
        buyer = made // (len(self.page) // len(self.block))
        begin = np.cumsum([0, *(len(b.seen) for b in self.block)])
        rows = Rows(
            begin,
            np.concatenate([b.seen for b in self.block]),
            np.concatenate([b.stars for b in self.block]),
        )
        log2 = np.array([math.log2(slot + 2.0) for slot in range(self.page.shape[1])])
        value = [
            page_energy(
                item,
                item >= 0,
                gains(buyer, item, rows, stock.s, implicit_gain),
                stock.catalogue.leaf_id,
                stock.near,
                log2=log2,
            )
            for item in (self.page[made], self.rejected[made])
        ]
        delta = np.zeros(len(self.page))
        delta[made] = value[0] - value[1]
        return delta

    def pairs(self, which: np.ndarray, kinds: Sequence[str], delta: np.ndarray) -> list[Pair]:
        """The pairs of the draws `which`; kinds and delta of all D draws."""
        draws, history = len(self.page) // len(self.block), list(histories(self.block, self.labels))
        length = (self.page >= 0).sum(1)[which].tolist()
        own = self.seed[which].tolist()
        chosen, rejected = self.page[which].tolist(), self.rejected[which].tolist()
        mask, change = self.edited[which].tolist(), delta[which].tolist()
        return [
            Pair(
                self.block[at // draws].user,
                kinds[at],
                history[at][0],
                history[at][1],
                chosen[i][:n],
                rejected[i][:n],
                mask[i][:n],
                change[i],
                self.source[at],
                own[i],
            )
            for i, (at, n) in enumerate(zip(which.tolist(), length, strict=True))
        ]


def draw_block(
    block: Sequence[Buyer],
    stock: Stock,
    own: np.ndarray,
    kinds: Sequence[str],
    label_share: float,
    k: int,
    literal_swaps: bool,
) -> Drawn:
    """Labels, pages and edits of a block of buyers.

    own  (D,) uint64, the seeds of `pair_seeds`
    """
    # `preference` is drawn page by page: it takes exponential numbers, as many as there are items.
    together: dict[str, Callable] = {
        "ranked": edits.ranked,
        "diversity": edits.swapped_diversity if literal_swaps else edits.diversity,
        "redundancy": edits.swapped_redundancy if literal_swaps else edits.redundancy,
    }
    if len(stock.s) > WIDE and not literal_swaps:
        del together["diversity"]
    draws = len(own) // len(block)
    kind = np.repeat(np.arange(len(kinds)), draws // len(kinds))
    many = np.array([name in together for name in kinds], dtype=bool)[kind]
    all_kinds, all_many = np.tile(kind, len(block)), np.tile(many, len(block))
    streams, rngs = Streams(own[all_many]), list(generators(own[~all_many]))
    first = labels_together(block, int(many.sum()), label_share, streams)
    rest = label_draws(block, int((~many).sum()), label_share, rngs)
    labels = []
    for buyer, a, b in zip(block, first, rest, strict=True):
        label = np.empty((draws, len(buyer.items)), dtype=bool)
        label[many], label[~many] = a[:, : len(buyer.items)], b
        labels.append(label)
    page, level, length = pages_of(block, labels, stock, k)
    rejected, edited = page.copy(), np.zeros(page.shape, dtype=bool)
    made, source = np.zeros(len(page), dtype=bool), np.full(len(page), "", dtype=object)
    stream_of = np.cumsum(all_many) - 1
    leaf = np.where(page >= 0, stock.catalogue.leaf_id[page], -1)
    free = np.stack([buyer.free for buyer in block])
    for at, name in enumerate(kinds):
        if name in together:
            rows = np.flatnonzero(all_kinds == at)
            pages = edits.Pages(page[rows], level[rows], leaf[rows], rows // draws, free)
            edit = together[name](pages, stock, streams.of(stream_of[rows]))
            rejected[rows], edited[rows], made[rows] = edit
            source[rows] = "swap" if name == "ranked" or literal_swaps else "replacement"
    make, rows = makers(literal_swaps), np.flatnonzero(~all_many)
    single: list[Edit] = []
    for row, rng, items, n, stars in zip(
        rows.tolist(), rngs, page[rows].tolist(), length[rows].tolist(), level[rows], strict=True
    ):
        side = Side(block[row // draws], [], [], items[:n], stars[:n])
        single.append(make[kinds[all_kinds[row]]](side, stock, rng) or ([], [], ""))
    source[rows] = [by for *_, by in single]
    made[rows] = source[rows] != ""
    items = padded([new for new, *_ in single])
    rejected[rows, : items.shape[1]] = np.where(
        made[rows, None], items, rejected[rows, : items.shape[1]]
    )
    edited[
        np.repeat(rows, [len(slots) for _, slots, _ in single]),
        [slot for _, slots, _ in single for slot in slots],
    ] = True
    return Drawn(block, labels, own, page, rejected, edited, made, source.tolist())


def check_energy(
    pairs: list[Pair], counts: dict[str, dict], shop: Shop, stock: Stock, implicit_gain: float
) -> None:
    """Compute energies again, slot by slot; add the share that agrees to every kind's count.

    Of CHECKED pairs at most, evenly among all. The two ways to compute E must agree; that they do
    not is a bug, hence the assertions.
    """
    rows, leaf = shop.csr("train", positive=None), stock.catalogue.leaf_id.tolist()
    some = pairs[:: max(1, -(-len(pairs) // CHECKED))]
    right = np.ones(len(some), dtype=bool)
    for at, pair in enumerate(some):
        items, ratings = rows.of(pair.user)
        worth = dict(
            zip(
                items.tolist(),
                gain(ratings, stock.s[items], implicit_gain).tolist(),
                strict=True,
            )
        )
        value = [
            energy(page, [worth.get(item, 0.0) for item in page], leaf, stock.near)
            for page in (pair.chosen, pair.rejected)
        ]
        assert math.isclose(value[0] - value[1], pair.delta_E, rel_tol=1e-5, abs_tol=1e-8), (
            "two ways to E disagree"
        )
        right[at] = value[0] > value[1]
    assert not pairs or right.mean() >= 0.99, (
        f"only {right.mean():.4f} of the pairs have E(chosen) higher"
    )
    for kind, count in counts.items():
        mine = right[np.array([pair.kind == kind for pair in some], dtype=bool)]
        count["lower_energy"] = round(float(mine.mean()), 4) if len(mine) else None


SCHEMA = pa.schema(
    [
        ("user", pa.int32()),
        ("kind", pa.string()),
        ("history", pa.list_(pa.int32())),
        ("history_rating", pa.list_(pa.float32())),
        ("chosen", pa.list_(pa.int32())),
        ("rejected", pa.list_(pa.int32())),
        ("mask", pa.list_(pa.bool_())),
        ("delta_E", pa.float64()),
        ("source", pa.string()),
        ("seed", pa.int64()),
    ]
)


def to_table(pairs: Sequence[Pair]) -> pa.Table:
    """A table with one row a pair; ratings as float32."""
    columns = {name: [getattr(pair, name) for pair in pairs] for name in SCHEMA.names}
    return pa.table(columns, schema=SCHEMA)


def from_table(table: pa.Table) -> list[Pair]:
    """The inverse of to_table."""
    return [Pair(**row) for row in table.select(SCHEMA.names).to_pylist()]
