"""What a page is made by, and what of it is there while it is made.

Front     a built storefront: everything but the person and the layout
Making    one page: items taken so far, rows, decisions, fallbacks
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from pagellm.data.shop import Catalogue
from pagellm.stage import randomness
from pagellm.storefront.corpus import Corpus
from pagellm.storefront.fuse import Quota, SameLeaf, row_value
from pagellm.storefront.missions import Missions
from pagellm.storefront.parts import (
    Answer,
    Candidates,
    Context,
    Decision,
    Keyword,
    Layout,
    Placement,
    Row,
    Slots,
    Theme,
    Weights,
)
from pagellm.storefront.policy import Policy
from pagellm.storefront.rankers import Logits, Platt, Ranker
from pagellm.storefront.retrieve import Index

__all__ = [
    "DEPTH",
    "Deals",
    "Front",
    "Making",
    "NOTHING",
    "Offer",
    "POPULAR",
    "TITLES",
    "Writer",
    "default_layout",
    "put",
]

DEPTH = 50  # items of a keyword
NOTHING = np.zeros(0, np.int64)  # no items


POPULAR = "Popular now"  # the title of a row that is about nothing in particular


TITLES = {
    "restock": "Buy it again",
    "deal": "Offers",
    "season": "In season",
    "discover": "New for you",
}


class Writer(Protocol):
    """What writes a page's themes, and then the keywords of each: themes.Template, or another.

    name  of model, prompts and options together: part of every cache key
    A writer with an attribute `chooses` that is true is offered keywords for every theme; others
    only where the theme's own concepts are too few.
    """

    @property
    def name(self) -> str: ...

    def themes(
        self, contexts: list[Context], intents: list[list[str]], used: list[list[str]]
    ) -> list[list[Answer[Theme]]]:
        """For each context its themes, best first.

        intents  of the open placements        used  titles that stand on the page already
        """

    def keywords(
        self, themes: list[Theme], contexts: list[Context], offered: list[np.ndarray]
    ) -> list[Answer[list[Keyword]]]:
        """For each theme its keywords, best first. offered: numbers of keywords near to it."""


@dataclass(frozen=True)
class Deals:
    """Items on offer, and when. All (D,)."""

    item: np.ndarray  # int64
    first: np.ndarray  # int64: days since 1970
    last: np.ndarray  # int64: days since 1970, the last one included

    def at(self, moment: int) -> np.ndarray:
        """(D',) items on offer at a moment (seconds), rising, none twice."""
        day = moment // 86_400
        return np.unique(self.item[(self.first <= day) & (day <= self.last)])


@dataclass(frozen=True)
class Front:
    """A built storefront. Arrays are by item (N,).

    agree      (theme, keywords, items) -> (n,) how well each fits
    threshold  mean agreement that a generated row needs in its first five slots
    best       categories by sales, the best first: what static rows show
    """

    catalogue: Catalogue
    stock: np.ndarray
    households: np.ndarray
    corpus: Corpus
    index: Index
    missions: Missions
    ranker: Ranker
    platt: Platt
    writer: Writer
    agree: Callable[[Theme, list[Keyword], np.ndarray], np.ndarray]
    policy: Policy
    similar: SameLeaf
    best: list[str]
    known: frozenset[str]
    weights: Weights = Weights()
    threshold: float = 0.0
    depth: int = DEPTH  # items that each keyword finds at most
    static: bool = False  # themes off: every row shows a best-selling category
    models: dict = field(default_factory=dict)
    deals: Deals | None = None  # None: the shop marks none
    sponsored: np.ndarray | None = None  # (N,) bool: what is paid for; None: nothing
    rewards: np.ndarray | None = None  # (N,) float64: what the shop wants shown; None: all alike
    caps: tuple[tuple[np.ndarray, int], ...] = ()  # items of a category (N,) bool, most of a page


def default_layout(name: str = "A") -> Layout:
    """A: one restock and five browse rows of ten; B: six discover rows of ten."""
    intents = ["restock", *["browse"] * 5] if name == "A" else ["discover"] * 6
    rows = tuple(Placement(f"p{n}", intent, 10) for n, intent in enumerate(intents, 1))
    return Layout(name, rows)


@dataclass
class Offer:
    """A theme on offer with all that a row needs."""

    theme: Theme
    keywords: list[Keyword]
    found: Candidates
    score: np.ndarray
    parts: np.ndarray  # (M, 4) ranker, ret, agree, reward as they enter the score
    note: str = ""
    value: float = 0.0
    preview: Slots | None = None  # its best row, were it the first on the page
    slots: int = 0  # that the preview had

    @property
    def shown(self) -> np.ndarray:
        """Items of the preview."""
        return NOTHING if self.preview is None else self.preview.item


class Making:
    """A page while it is made: items taken so far, decisions, and fallbacks."""

    def __init__(
        self,
        front: Front,
        context: Context,
        layout: Layout,
        seed: int,
        explore: float,
        explore_themes: bool = False,
        explore_all: bool = False,
    ):
        self.front, self.context, self.layout = front, context, layout
        self.seed, self.explore = seed, explore
        self.explore_themes = explore_themes and explore > 0
        self.explore_all = explore_all and explore > 0
        self.logit = Logits(front.ranker, context)
        self.legal = front.stock.copy()
        self.legal[context.barred] = False
        self.taken = np.zeros(len(front.stock), dtype=bool)
        self.rows: dict[int, Row] = {}
        self.placements = list(layout.placements)
        self.groups, self.left = limits_of(front, layout)
        self.decisions: list[Decision] = []
        self.fallbacks: list[str] = []
        self.static_left = list(front.best)
        self.answers: list[Answer] = []
        self.source = "generated"
        # Entries of the calendar that no row above shows.
        self.seasons = [e for e in front.policy.seasons(context.at) if e["name"] in context.season]

    def quota(self, placement: Placement) -> Quota:
        """What a generated row may show: policy's caps, and sponsored items by row and page."""
        front, left = self.front, list(self.left)
        if front.sponsored is not None:
            left[-1] = min(left[-1], placement.sponsored)
        return Quota(front.similar, front.weights.redundancy, self.groups, left)

    def draws(self, kind: str, placement: Placement, n: int) -> np.ndarray:
        """(n,) in [0, 1): draws of one row. kind: slots or theme."""
        position = [row.id for row in self.layout.placements].index(placement.id)
        key = (self.context.user, self.context.at, position)
        return randomness.rng(self.seed, kind, *key).random(n)

    def allowed(self, intent: str) -> np.ndarray:
        """(N,) bool: what a row of this intent may show now."""
        return self.fitting(intent) & ~self.taken

    def may(self, intent: str, items: np.ndarray) -> np.ndarray:
        """(n,) bool: which of some items a row of this intent may show now."""
        allowed = self.legal[items] & ~self.taken[items]
        if intent == "discover":
            allowed &= ~np.isin(items, self.context.item)
        return allowed

    def fitting(self, intent: str) -> np.ndarray:
        """(N,) bool: what it might show, were nothing above it on the page."""
        allowed = self.legal.copy()
        if intent == "discover":
            allowed[self.context.item] = False
        return allowed


def limits_of(front: Front, layout: Layout) -> tuple[list[np.ndarray], list[int]]:
    """Groups of items (N,) bool that a page may show only so many of, and how many: the policy's
    caps, then what is sponsored.
    """
    groups, left = [group for group, _ in front.caps], [most for _, most in front.caps]
    if front.sponsored is not None:
        slots = sum(placement.slots for placement in layout.placements)
        groups.append(front.sponsored)
        left.append(int(front.policy.sponsored_share * slots))
    return groups, left


def put(making: Making, position: int, row: Row) -> None:
    quality = dict(row.quality)
    if "value" in quality:
        quality["value"] = row_value(making.front.platt(making.logit[row.item]), position + 1)
    sponsored = making.front.sponsored
    paid = () if sponsored is None else row.item[sponsored[row.item]].tolist()
    making.rows[position] = replace(row, quality=quality, sponsored=frozenset(paid))
    making.taken[row.item] = True
    making.left = [
        left - int(group[row.item].sum())
        for group, left in zip(making.groups, making.left, strict=True)
    ]
