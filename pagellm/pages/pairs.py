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

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from pagellm.data.shop import Catalogue, Shop
from pagellm.pages.energy import Near, energy, gain, gains, near_duplicates, page_energy
from pagellm.pages.stats import average_ranks
from pagellm.pages.truth import (
    Ties,
    best_first,
    draw_labels,
    item_scores,
    level_members,
    page_of,
    popularity,
    rating_levels,
)

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
MATCHES = 5  # a replacement is drawn from so many items, those nearest in popularity and s_i


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
class Stock:
    """What pair making needs of the catalogue, computed once from the train rows."""

    catalogue: Catalogue
    near: Near
    s: np.ndarray  # (N,) truth.item_scores
    weight: np.ndarray  # (N,) popularity ** 0.75: odds of an item to fill a rejected page
    coordinate: np.ndarray  # (N, 2) in 0..1: popularity rank and s_i, to match replacements by
    by_leaf: list[np.ndarray]  # items of every leaf category
    ties: Ties  # the order of labels that nothing else tells apart
    leaf: list[int]  # leaf category of every item, as catalogue.leaf_id

    @classmethod
    def of(cls, shop: Shop, near: Near | None = None, shrink: float = 0.0) -> "Stock":
        catalogue, s, count = shop.catalogue, item_scores(shop, shrink), popularity(shop)
        order = np.argsort(catalogue.leaf_id, kind="stable")
        cuts = np.searchsorted(catalogue.leaf_id[order], np.arange(len(catalogue.leaf_names) + 1))
        known = ~np.isnan(s)
        middle = s[known].mean() if known.any() else 3.0
        rank = (len(count) - average_ranks(count)) / max(1, len(count) - 1)
        coordinate = np.stack([rank, (np.where(known, s, middle) - 1.0) / 4.0], axis=1)
        return cls(
            catalogue,
            near or near_duplicates(catalogue),
            s,
            count**0.75,
            coordinate,
            [order[a:b] for a, b in zip(cuts, cuts[1:], strict=False)],
            Ties(shop.n_users, shop.n_items),
            catalogue.leaf_id.tolist(),
        )


@dataclass(frozen=True)
class Buyer:
    """What the train rows say about one user."""

    user: int
    items: np.ndarray  # liked ones, oldest first
    ratings: np.ndarray  # of the liked ones; NaN where unknown
    disliked: np.ndarray  # items rated below 3
    gain: dict[int, float]  # energy.gain of every train item, liked or not
    free: np.ndarray  # (N,) bool: True unless the item is in the user's train rows
    # What every draw needs of the liked items, made once: places of each rating level,
    levels: list[np.ndarray]
    order: list[int]  # places of the items, best first (truth.best_first),
    item_list: list[int]  # the items, their rating levels and leaf categories as lists
    level_list: list[float]
    leaf_list: list[int]


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
    bad = rng.permutation(side.buyer.disliked)[:length]
    fill = length - len(bad)
    if fill:
        # Exponential race: the `fill` earliest arrivals are a weighted draw without replacement.
        eligible = np.flatnonzero(side.buyer.free & (stock.weight > 0))
        if len(eligible) < fill:
            return None
        arrival = rng.standard_exponential(len(eligible)) / stock.weight[eligible]
        first = np.argpartition(arrival, fill - 1)[:fill]  # sorts no more: there may be millions
        bad = rng.permutation(np.concatenate([bad, eligible[first[np.argsort(arrival[first])]]]))
    source = "rated" if fill == 0 else "sampled" if fill == length else "rated+sampled"
    return bad.tolist(), [], source


def ranked(side: Side, stock: Stock, rng: np.random.Generator) -> Edit | None:
    """Swap 1 to 3 disjoint pairs of positions a < b where a has the better (rating, s_i)."""
    level, s = side.level, rating_levels(stock.s[side.page])
    better = (level[:, None] > level) | ((level[:, None] == level) & (s[:, None] > s))
    return swap(side.page, better, rng, most=3)


def swap(page: list[int], worth: np.ndarray, rng: np.random.Generator, most: int) -> Edit | None:
    """Swap 1 to `most` disjoint pairs of positions a < b, drawn among those with worth[a, b].

    worth  (K, K) bool
    """
    candidates = rng.permutation(np.argwhere(np.triu(worth, 1))).tolist()
    if not candidates:
        return None
    count = rng.integers(1, most + 1)
    rejected, edited = list(page), []
    for a, b in candidates:
        if a not in edited and b not in edited:
            rejected[a], rejected[b] = rejected[b], rejected[a]
            edited += [a, b]
        if len(edited) == 2 * count:
            break
    return rejected, edited, "swap"


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
    slot = int(rng.choice(slots))
    others = set(leaf.tolist()) - {-1, int(leaf[slot])}
    if not others:
        return None
    pool = np.concatenate([stock.by_leaf[category] for category in sorted(others)])
    near = np.concatenate([stock.near.of(item) for item in side.page])
    pool = pool[side.buyer.free[pool] & ~np.isin(pool, near)]
    if len(pool) == 0:
        return None
    distance = np.abs(stock.coordinate[pool] - stock.coordinate[side.page[slot]]).sum(1)
    return replace(
        side.page, slot, int(rng.choice(pool[np.argsort(distance, kind="stable")[:MATCHES]]))
    )


def redundancy(side: Side, stock: Stock, rng: np.random.Generator) -> Edit | None:
    """Replace an item by an unseen near-duplicate of an item above it."""
    copies = [
        (a, copy)
        for a, item in enumerate(side.page[:-1])
        for copy in stock.near.of(item).tolist()
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


def pair_seed(seed: int, user: int, kind: str, draw: int) -> int:
    """63 bits that depend on the arguments only, so that neither order nor processes matter."""
    state = np.random.SeedSequence([seed, user, KINDS.index(kind), draw]).generate_state(
        1, np.uint64
    )
    return int(state[0] >> np.uint64(1))


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
    stock, make = Stock.of(shop, near, shrink), makers(literal_swaps)
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
    for buyer in wait:
        for kind in kinds:
            for draw in range(per_kind):
                own = pair_seed(seed, buyer.user, kind, draw)
                rng = np.random.Generator(np.random.PCG64(own))
                side = draw_side(buyer, stock, label_share, k, rng)
                edit = make[kind](side, stock, rng)
                pair = edit and finish(side, stock, kind, edit, own)
                least = max(margin, ranked_margin) if kind == "ranked" else margin
                outcome = (
                    "impossible" if not pair else "rejected" if pair.delta_E < least else "emitted"
                )
                counts[kind]["tried"] += 1
                counts[kind][outcome] += 1
                if outcome == "emitted":
                    pairs.append(pair)
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
        worth = gain(np.concatenate([ratings, stars]), stock.s[seen], implicit_gain)
        free = np.ones(shop.n_items, dtype=bool)
        free[seen] = False
        gain_of = dict(zip(seen.tolist(), worth.tolist(), strict=True))
        yield Buyer(
            int(user),
            items,
            ratings,
            bad,
            gain_of,
            free,
            level_members(ratings),
            best_first(items, ratings, stock.s, stock.ties.of(int(user), items)).tolist(),
            items.tolist(),
            rating_levels(ratings).tolist(),
            stock.catalogue.leaf_id[items].tolist(),
        )


def draw_side(
    buyer: Buyer, stock: Stock, label_share: float, k: int, rng: np.random.Generator
) -> Side:
    """Split one user's liked items at random; the labels make the page, cut at k slots."""
    items, levels = buyer.item_list, buyer.level_list
    label = draw_labels(buyer.levels, len(items), label_share, rng)
    is_label = label.tolist()
    chosen = [at for at in buyer.order if is_label[at]]
    page = page_of(
        [items[at] for at in chosen],
        [levels[at] for at in chosen],
        [buyer.leaf_list[at] for at in chosen],
        stock.near,
    )[:k]
    level = {items[at]: levels[at] for at in chosen}
    return Side(
        buyer,
        buyer.items[~label].tolist(),
        buyer.ratings[~label].tolist(),
        page,
        np.array([level[item] for item in page]),
    )


def finish(side: Side, stock: Stock, kind: str, edit: Edit, seed: int) -> Pair:
    """The pair that an edit makes, with the energies' difference."""
    rejected, edited, source = edit
    of, leaf = side.buyer.gain, stock.leaf
    value = [
        energy(page, [of.get(item, 0.0) for item in page], leaf, stock.near)
        for page in (side.page, rejected)
    ]
    return Pair(
        side.buyer.user,
        kind,
        side.history,
        side.history_rating,
        side.page,
        rejected,
        [slot in edited for slot in range(len(side.page))],
        value[0] - value[1],
        source,
        seed,
    )


def check_energy(
    pairs: list[Pair], counts: dict[str, dict], shop: Shop, stock: Stock, implicit_gain: float
) -> None:
    """Compute all energies again, in one batch; add the share that agrees to every kind's count.

    The two ways to compute E must agree; that they do not is a bug, hence the assertions.
    """
    rows, leaf = shop.csr("train", positive=None), stock.catalogue.leaf_id
    users = np.array([pair.user for pair in pairs], dtype=np.int64)
    values = []
    for pages in ([pair.chosen for pair in pairs], [pair.rejected for pair in pairs]):
        item = np.full((len(pages), max(map(len, pages), default=0)), -1, dtype=np.int64)
        for row, page in enumerate(pages):
            item[row, : len(page)] = page
        worth = gains(users, item, rows, stock.s, implicit_gain)
        values.append(page_energy(item, item >= 0, worth, leaf, stock.near))
    right = values[0] > values[1]
    assert np.allclose(values[0] - values[1], [pair.delta_E for pair in pairs]), (
        "two ways to E disagree"
    )
    assert not pairs or right.mean() >= 0.99, (
        f"only {right.mean():.4f} of the pairs have E(chosen) higher"
    )
    for kind, count in counts.items():
        mine = right[np.array([pair.kind == kind for pair in pairs], dtype=bool)]
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
