"""The data classes that the steps of the storefront exchange, and a page as JSON.

M candidates of a row, N items, W keywords, K slots. Nothing here computes.
"""

from dataclasses import asdict, dataclass, field
from typing import Generic, TypeVar

import numpy as np

__all__ = [
    "Answer",
    "Candidates",
    "Context",
    "Decision",
    "INTENTS",
    "Keyword",
    "Layout",
    "PARTS",
    "Page",
    "Placement",
    "Row",
    "Slots",
    "Theme",
    "Weights",
    "Written",
    "page_json",
]

Made = TypeVar("Made")
PARTS = ("ranker", "ret", "agree", "redundancy", "reward")  # of a score
INTENTS = ("restock", "browse", "discover", "season", "deal", "editorial")


@dataclass(frozen=True)
class Context:
    """What may be known of one person at one moment; nothing later than `at` is in it."""

    user: str | None  # the shop's own identifier; None: unknown
    bucket: str  # people of one bucket share cached rows
    at: int  # seconds since 1970
    item: np.ndarray  # (H,) int64 items bought, newest first
    count: np.ndarray  # (H,) int64 orders that hold each of them
    mission: np.ndarray  # (20,) float32 shares of the person's orders, sum 1; uniform when cold
    barred: np.ndarray  # (E,) int64 items never to show
    season: tuple[str, ...] = ()  # names of the calendar entries in force


@dataclass(frozen=True)
class Theme:
    """What a row is about."""

    title: str
    intent: str
    concepts: tuple[str, ...]
    subtitle: str = ""
    persona: str = ""
    avoid: tuple[str, ...] = ()
    mission: int = -1  # number of the mission it was made of; -1: none
    source: str = ""  # the writer's name, or "static"


@dataclass(frozen=True)
class Keyword:
    """A text of the corpus, chosen for a theme."""

    text: str
    type: str  # category, brand, attribute or query
    score: float
    matches: int  # items in stock


@dataclass(frozen=True)
class Candidates:
    """Items that a row may show, and how they were found."""

    item: np.ndarray  # (M,) int64
    ret: np.ndarray  # (M,) float64 strength of retrieval
    agree: np.ndarray  # (M,) float64, 0..1: how well the item fits the theme
    source: np.ndarray  # (M,) int64 place of the keyword that found it; -1: none


@dataclass(frozen=True)
class Written:
    """A theme on offer as writer and retrieval leave it: all of a row but the person's ranking."""

    theme: Theme
    keywords: tuple[Keyword, ...]
    found: Candidates
    note: str = ""  # why another writer than the one that was asked wrote it; "": it did itself


@dataclass(frozen=True)
class Answer(Generic[Made]):
    """What a writer gave, a theme or keywords, or why it gave nothing; both where another writer
    stood in.

    Tokens are 0 where no model was asked.
    """

    value: Made | None
    problem: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Decision:
    """One look of a gate."""

    stage: str
    level: str  # text, theme, keyword, placement, product, page
    rule: str
    action: str  # pass, repair, drop, replace, fall_back
    value: float
    threshold: float


@dataclass(frozen=True)
class Weights:
    """Weights of the parts of an item's score.

    All 0 with static themes: the ranker's own order, exactly.
    """

    ret: float = 0.5
    agree: float = 0.25
    reward: float = 0.0
    redundancy: float = 0.5


@dataclass(frozen=True)
class Placement:
    """One row of a layout."""

    id: str
    intent: str
    slots: int
    min_items: int = 4
    role: str = "carousel"
    title: str = ""  # a locked title; "": the writer's
    categories: tuple[str, ...] = ()  # locked categories
    sponsored: int = 0  # sponsored items the row may show


@dataclass(frozen=True)
class Layout:
    """The rows of a page, from the top."""

    id: str
    placements: tuple[Placement, ...]
    locale: str = "en"


@dataclass(frozen=True)
class Slots:
    """The items of a filled row, top first: all (K',) with K' at most the row's slots."""

    item: np.ndarray  # int64
    place: np.ndarray  # int64 place among the candidates
    score: np.ndarray  # float64, redundancy included
    redundancy: np.ndarray  # float64, 0 or below: what repeating an item above cost
    propensity: np.ndarray  # float64: P(item | slots above)


@dataclass(frozen=True)
class Row:
    """A filled row of a page."""

    placement: Placement
    source: str  # generated, segment, static or editorial
    theme: Theme
    keywords: tuple[Keyword, ...]
    item: np.ndarray  # (K',) int64
    score: np.ndarray  # (K',) float64
    parts: (
        np.ndarray
    )  # (K', 5) float64 that sum to the score: ranker, ret, agree, redundancy, reward
    keyword: tuple[int, ...]  # place of the keyword that found each item; -1: none
    propensity: np.ndarray  # (K',) float64
    quality: dict = field(default_factory=dict)
    theme_propensity: float = 1.0
    sponsored: frozenset[int] = frozenset()  # which of its items are paid for


@dataclass(frozen=True)
class Page:
    """A whole page. `ms` holds times, and is the only field that differs between equal requests."""

    page_id: str
    user: str | None
    at: int
    layout: str
    seed: int
    explore: float
    models: dict
    rows: tuple[Row, ...]
    page: dict
    fallbacks: tuple[str, ...]
    ms: dict
    cost: dict
    decisions: tuple[Decision, ...] = ()

    def items(self) -> np.ndarray:
        """Every item in reading order, (P,) int64."""
        return np.concatenate([np.zeros(0, np.int64), *(row.item for row in self.rows)])


def row_json(row: Row, position: int, ids: list[str], titles: list[str]) -> dict:
    names = PARTS if row.parts[:, 4].any() else PARTS[:4]
    items = []
    for k, item in enumerate(row.item.tolist()):
        entry = {"id": ids[item], "rank": k + 1, "score": float(row.score[k])}
        entry["parts"] = dict(zip(names, map(float, row.parts[k]), strict=False))
        entry["propensity"] = float(row.propensity[k])
        if titles[item]:
            entry["title"] = titles[item]
        if item in row.sponsored:
            entry["sponsored"] = True
        if row.keyword[k] >= 0:
            entry["keyword"] = row.keywords[row.keyword[k]].text
        items.append(entry)
    theme = {"title": row.theme.title, "concepts": list(row.theme.concepts)}
    if row.source != "static":
        theme |= {"subtitle": row.theme.subtitle, "writer": row.theme.source}
    return {
        "id": row.placement.id,
        "position": position,
        "intent": row.placement.intent,
        "source": row.source,
        "propensity": float(row.theme_propensity),
        "theme": theme,
        "keywords": [asdict(keyword) for keyword in row.keywords],
        "items": items,
        "quality": row.quality,
    }


def page_json(page: Page, ids: list[str], titles: list[str], explain: bool = False) -> dict:
    """The page as schemas.PAGE describes it. ids, titles: of the shop's N items.

    explain  adds the gates' decisions under `page`
    """
    about = dict(page.page)
    if explain:
        about["decisions"] = [asdict(decision) for decision in page.decisions]
    return {
        "schema": "storefront/1",
        "page_id": page.page_id,
        "user": page.user,
        "at": page.at,
        "layout": page.layout,
        "seed": page.seed,
        "explore": page.explore,
        "models": page.models,
        "placements": [
            row_json(row, position, ids, titles) for position, row in enumerate(page.rows, 1)
        ],
        "page": about,
        "fallbacks": list(page.fallbacks),
        "ms": page.ms,
        "cost": page.cost,
    }
