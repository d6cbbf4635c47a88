"""The cascade, from a person and a layout to a page. Read this first.

found = page(front, context, layout)

    ranker -> locked rows (given.py)
           -> themes on offer -> keywords -> candidates -> agreement -> gates (offers.py)
           -> the best choice of themes -> rows from the top (choose.py)

Themes, keywords and candidates may have been made ahead (`written_ahead`); the rest is then done
for the person of the moment.

A page is always made. Each step that failed, and what was done instead, is listed in `fallbacks`.
"""

import hashlib
import json
import time
from collections.abc import Sequence

import numpy as np

from pagellm.storefront import gates
from pagellm.storefront.choose import generated_rows
from pagellm.storefront.given import locked_rows, static_row
from pagellm.storefront.making import Front, Making
from pagellm.storefront.offers import offer_of, themes_on_offer
from pagellm.storefront.parts import Context, Decision, Layout, Page, Written

__all__ = ["page", "spread", "written_ahead"]


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
