"""The cascade, from a person and a layout to a page. Read this first.

found = page(front, context, layout)

    ranker -> locked rows -> themes on offer -> keywords -> candidates -> agreement -> gates
           -> the best choice of themes -> rows from the top

Themes, keywords and candidates may have been made ahead (`written_ahead`); the rest is then done
for the person of the moment.

A page is always made. Each step that failed, and what was done instead, is listed in `fallbacks`.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from pagellm.data.shop import Catalogue
from pagellm.stage import randomness
from pagellm.storefront import gates
from pagellm.storefront.corpus import Corpus, prune
from pagellm.storefront.fuse import Quota, SameLeaf, assign, fill, fuse, row_value
from pagellm.storefront.missions import Missions
from pagellm.storefront.parts import (
    Answer,
    Candidates,
    Context,
    Decision,
    Keyword,
    Layout,
    Page,
    Placement,
    Row,
    Slots,
    Theme,
    Weights,
    Written,
)
from pagellm.storefront.policy import Policy
from pagellm.storefront.rankers import Logits, Platt, Ranker
from pagellm.storefront.retrieve import Index, members_first, retrieve
from pagellm.storefront.text import best_first
from pagellm.storefront.themes import season_title

__all__ = [
    "DEPTH",
    "Deals",
    "Front",
    "MOST_KEPT",
    "Writer",
    "blocked_by",
    "default_layout",
    "kept",
    "open_rows_of",
    "page",
    "scored",
    "spread",
    "text_decisions",
    "written_ahead",
]

DEPTH = 50  # items of a keyword
MOST_KEPT = 200  # candidates of a theme, the ranker's best
MOST_KEYWORDS = 8  # of a row
ALIKE, COVERED = (
    0.85,
    0.5,
)  # two themes of a page: likeness at most, share of one's items in the other's
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
    parts: np.ndarray  # (M, 3) ranker, ret, agree as they enter the score
    note: str = ""
    value: float = 0.0
    shown: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))


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


def page(
    front: Front,
    context: Context,
    layout: Layout,
    seed: int = 0,
    explore: float = 0.0,
    written: Sequence[Written] | None = None,
    source: str = "generated",
    explore_themes: bool = False,
    explore_all: bool = False,
) -> Page:
    """A whole page for one person.

    seed     of the draws, of which each row has its own
    explore  tau > 0 draws every generated slot by softmax(score / tau); 0 takes the best
    explore_themes  draws the theme of each open row too, from the top, by softmax(value over the
             best value / tau)
    explore_all     draws the slots of all other rows too: bought before, static, editorial
    written  what `written_ahead` left for this person, or for people alike; None: made now
    source   of the rows made of them: generated, or segment where they were written for people
             alike
    """
    started = time.perf_counter()
    making = Making(front, context, layout, seed, explore, explore_themes, explore_all)
    making.source = source
    wanted, open_rows = locked_rows(making)
    if open_rows and not front.static:
        if written is None:
            written = themes_on_offer(making, [wanted[position] for position in open_rows])
        offers = [offer for one in written if (offer := offer_of(making, one)) is not None]
        generated_rows(making, open_rows, wanted, offers)
    for position in open_rows:
        if position not in making.rows:
            static_row(making, position, wanted[position])
    return finished(making, (time.perf_counter() - started) * 1000)


def written_ahead(
    front: Front, context: Context, layout: Layout, seed: int = 0
) -> tuple[list[Written], list[Decision]]:
    """Themes on offer for a person, with keywords and candidates: all that `page` needs a writer
    and retrieval for; and what the gates decided meanwhile.
    """
    making = Making(front, context, layout, seed, 0.0)
    wanted, open_rows = locked_rows(making)
    rows = themes_on_offer(making, [wanted[position] for position in open_rows])
    return rows, making.decisions


def locked_rows(making: Making) -> tuple[list[str], list[int]]:
    """Put the rows whose theme is given. Returns every row's intent, and the positions left."""
    wanted, open_rows = [], []
    for position, placement in enumerate(making.layout.placements):
        intent = intent_of(making, placement)
        row = locked_row(making, placement, intent) if locked(placement, intent) else None
        if row is not None:
            put(making, position, row)
        else:
            open_rows.append(position)
            if placement.categories or placement.intent in ("restock", "season", "deal"):
                # Its title was written for other items than those of a row to browse.
                making.placements[position] = replace(placement, title="", categories=())
                intent = "browse"
        wanted.append(intent)
    return wanted, open_rows


def intent_of(making: Making, placement: Placement) -> str:
    """The placement's intent, or `browse` where it cannot be served."""
    intent, context = placement.intent, making.context
    why = ""
    if intent == "restock" and not making.legal[context.item].any():
        why = "nothing bought before that is in stock"
    if intent == "season" and not context.season:
        why = "no season in the policy's calendar"
    elif intent == "season" and not (making.seasons or placement.categories):
        why = "a row above shows the season"
    if intent == "deal" and not making.legal[deals_at(making)].any():
        why = "no deal is in force" if making.front.deals else "the shop marks no deals"
    if intent == "editorial" and not placement.categories:
        why = "an editorial row names no category"
    if why:
        making.fallbacks.append(f"{placement.id}: {why}; shown as browse")
        return "browse"
    return intent


def deals_at(making: Making) -> np.ndarray:
    deals = making.front.deals
    return NOTHING if deals is None else deals.at(making.context.at)


def locked(placement: Placement, intent: str) -> bool:
    return intent in ("restock", "season", "deal", "editorial") or bool(placement.categories)


def locked_row(making: Making, placement: Placement, intent: str) -> Row | None:
    """A row whose theme is given: its items are those of the history or of the named categories."""
    front = making.front
    names, title = known_names(front, placement.categories), ""
    if intent == "restock":
        items = making.context.item
    elif intent == "deal" and not names:
        items = deals_at(making)
    else:
        if intent == "season" and not names:
            names, title = season_of(making)
        items = items_of(front, names)
        if intent == "deal":
            items = np.intersect1d(items, deals_at(making))
    items = items[making.may(intent, items)]
    otherwise = title or TITLES.get(intent) or (names[0] if names else "")
    title = fresh_title(making, own_title(making, placement, otherwise), intent)
    if not len(items):
        asked = ", ".join(name[:80] for name in (names or placement.categories)[:3])
        what = f"no item of {asked} is in stock" if asked else "nothing of it is in stock"
        making.fallbacks.append(f"{placement.id}: {what}; shown as browse")
        return None
    source = "editorial" if placement.categories else "static"
    return plain_row(
        making, placement, Theme(title, intent, names[:8], source="static"), items, source
    )


def season_of(making: Making) -> tuple[tuple[str, ...], str]:
    """Categories and title of the next season in force that has something to show: the categories
    with the person's best items come first. Two rows of seasons show two seasons.
    """
    front, title = making.front, ""
    names: tuple[str, ...] = ()
    while making.seasons:
        season = making.seasons.pop(0)
        found: dict[str, float] = {}
        for name in known_names(front, tuple(season["categories"])):
            items = items_of(front, (name,))
            items = items[making.may("season", items)]
            if len(items):
                found[name] = float(making.logit[items].max())
        names = tuple(sorted(found, key=lambda name: -found[name]))
        names = names or known_names(front, tuple(season["categories"]))
        draw = randomness.seed_of(making.seed, making.context.bucket, season["name"])
        for title in (season_title(front.policy, season["name"], names, draw), season["name"], ""):
            if not blocked_by(front, title):
                break
        if found:
            break
    return names, title


def blocked_by(front: Front, title: str) -> str:
    """The first rule that keeps a title off the page, "" for none.

    A person may use words that the catalogue does not know; all other rules hold for everybody.
    """
    decisions = gates.check_text(title, "", front.policy, front.known)
    return next((d.rule for d in decisions if d.action != "pass" and d.rule != "known"), "")


def own_title(making: Making, placement: Placement, otherwise: str) -> str:
    """The placement's locked title; another where it has none, or where a gate is against it."""
    rule = blocked_by(making.front, placement.title) if placement.title else ""
    if rule:
        making.fallbacks.append(f"{placement.id}: its title is blocked by the rule {rule}")
    return otherwise if rule or not placement.title else placement.title


def fresh_title(making: Making, title: str, intent: str) -> str:
    """A title of a row that no writer names: 3 to 40 characters, and none that the page has."""
    title = title[: gates.LONGEST].strip()
    if len(title) < gates.SHORTEST:
        title = TITLES.get(intent, POPULAR)
    used, n, found = {row.theme.title for row in making.rows.values()}, 2, title
    while found in used:
        found, n = f"{title[: gates.LONGEST - 4].strip()} {n}", n + 1
    return found


def known_names(front: Front, names: tuple[str, ...]) -> tuple[str, ...]:
    """Those of some categories that the shop sells."""
    return tuple(name for name in names if name in front.corpus.number)


def items_of(front: Front, names: tuple[str, ...]) -> np.ndarray:
    """Items of some categories, rising."""
    number = front.corpus.number
    found = [front.corpus.matches(number[name]) for name in known_names(front, names)]
    return np.unique(np.concatenate([np.zeros(0, np.int64), *found]))


def plain_row(making: Making, placement: Placement, theme: Theme, items, source: str) -> Row:
    """The ranker's own best of some items, bit for bit; drawn with `explore_all`."""
    best = members_first(items, making.logit, placement.slots)
    propensity = np.ones(len(best))
    if making.explore_all:
        some = Candidates(items, np.zeros(len(items)), np.zeros(len(items)), NOTHING)
        uniform = making.draws("slots", placement, placement.slots)
        logit, slots = making.logit[items], placement.slots
        drawn = fill(logit, some, slots, Quota(), making.taken, making.explore, uniform)
        best, propensity = drawn.item, drawn.propensity
    n = len(best)
    parts = np.zeros((n, 4))
    parts[:, 0] = making.logit[best]
    p = making.front.platt(making.logit[best])
    quality = {"decision": "pass", "value": row_value(p, 1)}
    return Row(
        placement,
        source,
        theme,
        (),
        best,
        making.logit[best],
        parts,
        (-1,) * n,
        propensity,
        quality,
    )


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


def told_to_writer(making: Making) -> tuple[Context, list[str]]:
    """The person without the items that the locked rows show, and the titles of these rows."""
    used = [row.theme.title for row in making.rows.values()]
    barred = np.union1d(making.context.barred, np.flatnonzero(making.taken))
    return replace(making.context, barred=barred), used


def open_rows_of(
    front: Front, context: Context, layout: Layout
) -> tuple[Context, list[str], list[str]]:
    """What a writer is told: the person without what the locked rows show, the intents of the open
    rows, and the titles used already.
    """
    making = Making(front, context, layout, 0, 0.0)
    wanted, open_rows = locked_rows(making)
    told, used = told_to_writer(making)
    return told, [wanted[position] for position in open_rows], used


def themes_on_offer(making: Making, intents: list[str]) -> list[Written]:
    """Themes whose texts and keywords the gates let pass, with keywords and candidates."""
    front = making.front
    context, used = told_to_writer(making)
    answers = front.writer.themes([context], [intents], [used])[0]
    making.answers += answers
    both = [(answer.value, answer.problem) for answer in answers if answer.value is not None]
    both = [(theme, note) for theme, note in both if passes(making, text_decisions(front, theme))]
    themes, chooses = [theme for theme, _ in both], getattr(front.writer, "chooses", False)
    offered = [
        prune(front.corpus, theme) if chooses or needs_more(front, theme) else NOTHING
        for theme in themes
    ]
    answered = front.writer.keywords(themes, [context] * len(themes), offered)
    making.answers += answered
    found = []
    for (theme, note), answer in zip(both, answered, strict=True):
        written = candidates_of(making, theme, answer.value) if answer.value else None
        if written is not None:
            found.append(replace(written, note=note or answer.problem))
    return found


NOTHING = np.zeros(0, np.int64)


def needs_more(front: Front, theme: Theme) -> bool:
    """Whether a theme's own concepts are too few to be its keywords."""
    return sum(name in front.corpus.number for name in theme.concepts) < 8


def text_decisions(front: Front, theme: Theme) -> list[Decision]:
    found = gates.check_text(theme.title, theme.subtitle, front.policy, front.known)
    return found + gates.check_theme(theme, (), None, front.policy)


def passes(making: Making, decisions: list[Decision]) -> bool:
    making.decisions += decisions
    return not gates.blocked(decisions)


def candidates_of(making: Making, theme: Theme, keywords: list[Keyword]) -> Written | None:
    """What the keywords find, and how well it fits; None where no keyword passes the gates."""
    front, context = making.front, making.context
    least = front.policy.min_items
    keywords, decisions = gates.check_keywords(keywords, front.corpus, context, least, front.policy)
    making.decisions += decisions
    if not keywords:
        return None
    # What a keyword finds does not hang on the rows above; what they show is taken out afterwards.
    allowed = making.fitting(theme.intent)
    found = untaken(
        making, retrieve(front.index, keywords, context, making.logit.all, front.depth, allowed)
    )
    if len(found.item) < least:
        keywords, found = widened(making, theme, keywords, allowed, found)
    if not len(found.item):
        return None
    best = np.sort(best_first(making.logit[found.item], found.item, MOST_KEPT))
    found = kept(found, best)
    found = replace(found, agree=front.agree(theme, keywords, found.item))
    return Written(theme, tuple(keywords), found)


def offer_of(making: Making, written: Written) -> Offer | None:
    """Scores of one theme's candidates for this person; None where a gate is against the row."""
    front, theme = making.front, written.theme
    found = kept(written.found, making.may(theme.intent, written.found.item))
    least = front.policy.min_items
    score, parts = scored(front, making.logit[found.item], found)
    offer = Offer(theme, list(written.keywords), found, score, parts, written.note)
    slots = most_slots(making.layout)
    most = max((placement.sponsored for placement in making.placements), default=0)
    row = Placement("", theme.intent, slots, min_items=min(least, slots), sponsored=most)
    preview = slots_of(making, offer, row, 0.0, np.zeros(0))
    if not passes(making, gates.check_placement(found.agree[preview.place], row, front.threshold)):
        return None
    offer.value = row_value(front.platt(making.logit[preview.item]))
    offer.shown = preview.item
    return offer


def most_slots(layout: Layout) -> int:
    return max((placement.slots for placement in layout.placements), default=10)


def scored(front: Front, logit: np.ndarray, found: Candidates) -> tuple[np.ndarray, np.ndarray]:
    """score (M,), and its parts (M, 3): ranker, ret, agree."""
    score = fuse(logit, found.ret, found.agree, front.weights)
    zero = np.zeros(len(logit))
    by_ret = fuse(zero, found.ret, zero, Weights(front.weights.ret, 0, 0, 0))
    return score, np.stack([logit, by_ret, score - logit - by_ret], axis=1)


def widened(
    making: Making, theme: Theme, keywords: list[Keyword], allowed: np.ndarray, found: Candidates
) -> tuple[list[Keyword], Candidates]:
    """More keywords where a row would be too short: each one's parent category, then those nearest
    to the theme, until it is long enough. None that a generated row may not name.

    Returned are the keywords that found something, at most eight, and what they found.
    """
    front, policy = making.front, making.front.policy
    parents = [front.index.parent.get(keyword.text, "") for keyword in keywords]
    near = [front.corpus.text[w] for w in prune(front.corpus, theme).tolist()]
    names = [name for name in (*parents, *near) if name in front.corpus.number]
    tried, have = list(keywords), {keyword.text for keyword in keywords}
    lowest = min(keyword.score for keyword in keywords)
    for name in dict.fromkeys(names):
        if len(found.item) >= policy.min_items:
            break
        if name in have or policy.forbidden(name) or policy.restricted.found(name):
            continue
        tried.append(front.corpus.keyword(front.corpus.number[name], lowest - 1.0))
        logit = making.logit.all
        more = retrieve(front.index, tried, making.context, logit, front.depth, allowed)
        found = untaken(making, more)
    places = np.unique(found.source)[:MOST_KEYWORDS]
    found = kept(found, np.isin(found.source, places))
    return [tried[at] for at in places], replace(
        found, source=np.searchsorted(places, found.source)
    )


def kept(found: Candidates, places: np.ndarray) -> Candidates:
    """Some of the candidates: places (n,) int64 or (M,) bool."""
    return Candidates(
        found.item[places], found.ret[places], found.agree[places], found.source[places]
    )


def untaken(making: Making, found: Candidates) -> Candidates:
    return kept(found, ~making.taken[found.item])


def slots_of(making: Making, offer: Offer, row: Placement, explore: float, uniform) -> Slots:
    quota = making.quota(row)
    return fill(offer.score, offer.found, row.slots, quota, making.taken, explore, uniform)


def conflicts(making: Making, offers: list[Offer]) -> np.ndarray:
    """(G, G) bool: themes too alike, or of which one shows over half of the other's items."""
    n = len(offers)
    clash = np.zeros((n, n), dtype=bool)
    vectors = np.array([making.front.corpus.theme_vector(o.theme) for o in offers]).reshape(n, -1)
    near = vectors @ vectors.T
    for a in range(n):
        for b in range(a):
            both = len(np.intersect1d(offers[a].shown, offers[b].shown))
            least = max(min(len(offers[a].shown), len(offers[b].shown)), 1)
            alike = max(near[a, b], gates.likeness(offers[a].theme, offers[b].theme))
            clash[a, b] = clash[b, a] = alike > ALIKE or both / least > COVERED
    return clash


def generated_rows(
    making: Making, open_rows: list[int], wanted: list[str], offers: list[Offer]
) -> None:
    """Choose a theme for each open row and fill the rows from the top."""
    if not offers:
        return
    decay = 0.75 ** np.array(open_rows)
    fits = np.array([[o.theme.intent == wanted[s] for s in open_rows] for o in offers])
    value = np.where(fits, np.array([o.value for o in offers])[:, None] * decay, -np.inf)
    clash = conflicts(making, offers)
    if making.explore_themes:
        drawn_rows(making, open_rows, offers, fits, clash)
        return
    chosen, _ = assign(value, clash)
    spare = [g for g in range(len(offers)) if g not in set(chosen.tolist())]
    standing: list[int] = []
    for place, position in enumerate(open_rows):
        choices = [int(chosen[place])] if chosen[place] >= 0 else []
        later = {int(g) for g in chosen[place + 1 :] if g >= 0}
        for g in [*choices, *sorted(spare, key=lambda g: -offers[g].value)]:
            if any(clash[g, other] for other in [*standing, *(later - {g})]):
                continue
            row = generated_row(making, position, offers[g]) if fits[g, place] else None
            if row is not None:
                put_offer(making, position, row, offers[g])
                standing.append(g)
                spare = [other for other in spare if other != g]
                break


def put_offer(making: Making, position: int, row: Row, offer: Offer) -> None:
    put(making, position, row)
    if offer.note:
        making.fallbacks.append(f"{row.placement.id}: {offer.note}")


def drawn_rows(
    making: Making, open_rows: list[int], offers: list[Offer], fits: np.ndarray, clash: np.ndarray
) -> None:
    """Draw a theme for each open row, from the top, and fill the row.

    Drawn from are the themes that clash with none above and whose best row the gates let pass, so
    that the probability of the one that is shown, given the rows above, is exact.
    """
    value = np.array([offer.value for offer in offers])
    weight = np.exp((value / max(value.max(), 1e-12) - 1) / making.explore)
    standing: list[int] = []
    for place, position in enumerate(open_rows):
        placement = making.placements[position]
        legal = [
            g
            for g in range(len(offers))
            if fits[g, place]
            and g not in standing
            and not clash[g, standing].any()
            and not gates.blocked(best_row(making, position, offers[g])[1])
        ]
        if not legal:
            continue
        chance = weight[legal] / weight[legal].sum()
        draw = making.draws("theme", placement, 1)[0]
        at = min(int(np.searchsorted(np.cumsum(chance), draw, side="right")), len(legal) - 1)
        row = generated_row(making, position, offers[legal[at]])
        assert row is not None
        row = replace(row, theme_propensity=float(chance[at]))
        put_offer(making, position, row, offers[legal[at]])
        standing.append(legal[at])


def best_row(making: Making, position: int, offer: Offer) -> tuple[Slots, list[Decision]]:
    """The row of the offer's best items, and what the gates say of it."""
    placement = making.placements[position]
    slots = slots_of(making, offer, placement, 0.0, np.zeros(0))
    least = min(placement.min_items, placement.slots)
    row, agree = replace(placement, min_items=least), offer.found.agree[slots.place]
    return slots, gates.check_placement(agree, row, making.front.threshold)


def generated_row(making: Making, position: int, offer: Offer) -> Row | None:
    """The row, or None where too little is left for it or a gate is against it.

    The gates look at the best items. Whether the row is shown hangs on no draw, so that the
    propensities of drawn items are exact.
    """
    placement = making.placements[position]
    slots, looks = best_row(making, position, offer)
    if not passes(making, looks):
        return None
    if making.explore:
        uniform = making.draws("slots", placement, placement.slots)
        slots = slots_of(making, offer, placement, making.explore, uniform)
    agree = offer.found.agree[slots.place]
    parts = np.concatenate([offer.parts[slots.place], slots.redundancy[:, None]], axis=1)
    quality = {
        "decision": "pass",
        "agreement": float(agree[:5].mean()),
        "tp5": float((agree[:5] >= gates.FITS).mean()),
        "value": 0.0,
    }
    return Row(
        placement,
        making.source,
        replace(offer.theme, title=own_title(making, placement, offer.theme.title)),
        tuple(offer.keywords),
        slots.item,
        slots.score,
        parts,
        tuple(offer.found.source[slots.place].tolist()),
        slots.propensity,
        quality,
    )


def static_row(making: Making, position: int, intent: str) -> None:
    """The next best-selling category that still has items."""
    placement, allowed = making.placements[position], making.allowed(intent)
    while making.static_left:
        name = making.static_left.pop(0)
        items = items_of(making.front, (name,))
        items = items[allowed[items]]
        if len(items) >= min(placement.min_items, placement.slots):
            title = fresh_title(making, own_title(making, placement, name), intent)
            theme = Theme(title, intent, (name,), source="static")
            put(making, position, plain_row(making, placement, theme, items, "static"))
            if not making.front.static:
                making.fallbacks.append(f"{placement.id}: no theme is left; {name} instead")
            return
    rest = np.flatnonzero(allowed)
    if len(rest):
        title = own_title(making, placement, TITLES.get(intent, POPULAR))
        theme = Theme(fresh_title(making, title, intent), intent, (), source="static")
        put(making, position, plain_row(making, placement, theme, rest, "static"))
        making.fallbacks.append(f"{placement.id}: no category is left; what is popular instead")
    else:
        making.fallbacks.append(f"{placement.id}: no item is left; the row is left out")


def spread(items: list[int], categories: Sequence[Sequence[str]]) -> float:
    """ILD of a page, as metrics.ild has it, by one product of matrices; 0 for less than two items.

    items  none twice
    """
    if len(items) < 2:
        return 0.0
    number: dict[str, int] = {}
    sets = [{number.setdefault(n, len(number)) for n in categories[item]} for item in items]
    held = np.zeros((len(items), max(len(number), 1)))
    for row, names in enumerate(sets):
        held[row, list(names)] = 1.0
    both, size = held @ held.T, held.sum(1)
    alike = both / np.maximum(size[:, None] + size - both, 1.0)
    pairs = len(items) * (len(items) - 1)
    return float(1 - (alike.sum() - np.trace(alike)) / pairs)


def finished(making: Making, ms: float) -> Page:
    front, context, layout = making.front, making.context, making.layout
    rows = tuple(making.rows[position] for position in sorted(making.rows))
    looks = gates.check_page(rows, front.catalogue.categories)
    making.decisions += looks
    items = np.concatenate([np.zeros(0, np.int64), *(row.item for row in rows)])
    models = {"themes": front.writer.name, "ranker": front.ranker.name}
    models |= {"gates": "rules/1", "policy": front.policy.name} | front.models
    tokens = [(a.prompt_tokens, a.completion_tokens) for a in making.answers] or [(0, 0)]
    key = [context.user, context.at, layout.id, making.seed, making.explore, models, items.tolist()]
    drawn = {"explore_themes": making.explore_themes, "explore_all": making.explore_all}
    drawn = {name: True for name, asked in drawn.items() if asked}
    return Page(
        hashlib.blake2b(json.dumps(key).encode(), digest_size=8).hexdigest(),
        context.user,
        context.at,
        layout.id,
        making.seed,
        making.explore,
        models,
        rows,
        {
            "items": len(items),
            "repeats": len(items) - len(np.unique(items)),
            "entropy": next(look.value for look in looks if look.rule == "entropy"),
            "ild": spread(items.tolist(), front.catalogue.categories),
            "value": float(sum(row.quality["value"] for row in rows)),
            **drawn,
        },
        tuple(making.fallbacks),
        {"total": round(ms, 3)},
        {
            "prompt_tokens": sum(p for p, _ in tokens),
            "completion_tokens": sum(c for _, c in tokens),
            "usd": 0,
        },
        tuple(making.decisions),
    )
