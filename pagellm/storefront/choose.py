"""Which theme stands in which open row: the best choice of all rows together, or one that is drawn.

Then the rows are filled from the top, each with the items that no row above shows.
"""

from dataclasses import replace

import numpy as np

from pagellm.storefront import gates
from pagellm.storefront.fuse import assign
from pagellm.storefront.given import own_title
from pagellm.storefront.making import Making, Offer, put
from pagellm.storefront.offers import passes, slots_of
from pagellm.storefront.parts import Decision, Row, Slots
from pagellm.storefront.text import stems

__all__ = ["conflicts", "generated_rows"]

# Two themes of a page: their likeness at most, and the share of one's items that the other has.
ALIKE, COVERED = 0.85, 0.5


def conflicts(making: Making, offers: list[Offer]) -> np.ndarray:
    """(G, G) bool: themes too alike, or of which one shows over half of the other's items."""
    n = len(offers)
    clash = np.zeros((n, n), dtype=bool)
    shown = [frozenset(offer.shown.tolist()) for offer in offers]
    names = [
        (frozenset(stems(offer.theme.title)), frozenset(offer.theme.concepts)) for offer in offers
    ]
    vectors = np.array([making.front.corpus.theme_vector(o.theme) for o in offers]).reshape(n, -1)
    near = vectors @ vectors.T
    for a in range(n):
        for b in range(a):
            both, least = len(shown[a] & shown[b]), max(min(len(shown[a]), len(shown[b])), 1)
            alike = max(near[a, b], *map(gates.jaccard, names[a], names[b]))
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
        best = {
            g: best_row(making, position, offers[g])
            for g in range(len(offers))
            if fits[g, place] and g not in standing and not clash[g, standing].any()
        }
        legal = [g for g, (_, looks) in best.items() if not gates.blocked(looks)]
        if not legal:
            continue
        chance = weight[legal] / weight[legal].sum()
        draw = making.draws("theme", placement, 1)[0]
        at = min(int(np.searchsorted(np.cumsum(chance), draw, side="right")), len(legal) - 1)
        row = generated_row(making, position, offers[legal[at]], best[legal[at]])
        assert row is not None
        row = replace(row, theme_propensity=float(chance[at]))
        put_offer(making, position, row, offers[legal[at]])
        standing.append(legal[at])


def best_row(making: Making, position: int, offer: Offer) -> tuple[Slots, list[Decision]]:
    """The row of the offer's best items, and what the gates say of it."""
    placement = making.placements[position]
    slots = offer.preview
    # Without the preview's items, not one of which was lost, the best row would be the same.
    if (
        slots is None
        or offer.slots != placement.slots
        or making.groups
        or making.taken[slots.item].any()
    ):
        slots = slots_of(making, offer, placement, 0.0, np.zeros(0))
    least = min(placement.min_items, placement.slots)
    row, agree = replace(placement, min_items=least), offer.found.agree[slots.place]
    return slots, gates.check_placement(agree, row, making.front.threshold)


def generated_row(
    making: Making,
    position: int,
    offer: Offer,
    best: tuple[Slots, list[Decision]] | None = None,
) -> Row | None:
    """The row, or None where too little is left for it or a gate is against it.

    best  what `best_row` gave for it, where that is known

    The gates look at the best items. Whether the row is shown hangs on no draw, so that the
    propensities of drawn items are exact.
    """
    placement = making.placements[position]
    slots, looks = best or best_row(making, position, offer)
    if not passes(making, looks):
        return None
    if making.explore:
        uniform = making.draws("slots", placement, placement.slots)
        slots = slots_of(making, offer, placement, making.explore, uniform)
    agree = offer.found.agree[slots.place]
    parts = np.insert(offer.parts[slots.place], 3, slots.redundancy, axis=1)
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
