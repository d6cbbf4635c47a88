"""Themes on offer for a person: a writer's themes and keywords, what they find, and its scores.

themes -> gates -> keywords -> gates -> candidates -> agreement -> scores -> gates
"""

from dataclasses import replace

import numpy as np

from pagellm.storefront import gates
from pagellm.storefront.corpus import prune
from pagellm.storefront.fuse import fill, fuse, row_value, z_score
from pagellm.storefront.given import locked_rows
from pagellm.storefront.making import NOTHING, Front, Making, Offer
from pagellm.storefront.parts import (
    Candidates,
    Context,
    Decision,
    Keyword,
    Layout,
    Placement,
    Slots,
    Theme,
    Written,
)
from pagellm.storefront.retrieve import retrieve
from pagellm.storefront.text import best_first

__all__ = [
    "MOST_KEPT",
    "kept",
    "offer_of",
    "open_rows_of",
    "passes",
    "scored",
    "slots_of",
    "text_decisions",
    "themes_on_offer",
]

MOST_KEPT = 200  # candidates of a theme, the ranker's best


MOST_KEYWORDS = 8  # of a row


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
    offer.preview, offer.slots = preview, slots
    return offer


def most_slots(layout: Layout) -> int:
    return max((placement.slots for placement in layout.placements), default=10)


def scored(front: Front, logit: np.ndarray, found: Candidates) -> tuple[np.ndarray, np.ndarray]:
    """score (M,), and its parts (M, 4): ranker, ret, agree, reward."""
    weights, zero = front.weights, np.zeros(len(logit))
    rewards = zero if front.rewards is None else front.rewards[found.item]
    score = fuse(logit, found.ret, found.agree, weights, rewards)
    by_ret = zero + weights.ret * z_score(found.ret) if weights.ret else zero
    by_reward = zero + weights.reward * z_score(rewards) if weights.reward else zero
    return score, np.stack([logit, by_ret, score - logit - by_ret - by_reward, by_reward], axis=1)


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
