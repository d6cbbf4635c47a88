"""Rows whose theme nobody has to write: what was bought before, seasons, offers, categories that a
merchandiser locked; and the static rows that stand in.

Their items are in the ranker's own order, bit for bit.
"""

from dataclasses import replace

import numpy as np

from pagellm.stage import randomness
from pagellm.storefront import gates
from pagellm.storefront.fuse import Quota, fill, row_value
from pagellm.storefront.making import NOTHING, POPULAR, TITLES, Front, Making, put
from pagellm.storefront.parts import Candidates, Placement, Row, Theme
from pagellm.storefront.retrieve import members_first
from pagellm.storefront.themes import season_title

__all__ = ["blocked_by", "locked_rows", "own_title", "static_row"]


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
    parts = np.zeros((n, 5))
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
