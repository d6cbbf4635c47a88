"""Slots that a shop keeps for its new items, which no policy puts on a page by itself.

    new = is_new(shop, days=30)            which items first occurred in the last days of the log
    page = with_new(page, fresh, new, 2)   the page with two of them, spread evenly

A new item has few rows, so its scores stay below those of twenty others, whoever trained them. How
many of its slots a shop gives to what is new is the shop's choice. Which of the new items they hold
is still the policy's: the best for this user.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from pagellm.data.shop import Shop
from pagellm.stage.config import PageLLMError

__all__ = ["NEW_DAYS", "check_new", "check_times", "is_new", "places", "ranks_with_new", "with_new"]

NEW_DAYS = 30.0
DAY = 86400  # seconds


def check_new(items: int, days: float, most: int) -> dict[str, tuple[bool, str]]:
    """Rules for config.check: the options new_items, on pages of `most` slots, and new_days."""
    return {
        "new_items": (0 <= items <= most, f"0 to {most}, the slots of a page"),
        "new_days": (0 < days < np.inf, "days, above 0"),
    }


def is_new(shop: Shop, days: float) -> np.ndarray:
    """(N,) bool: items whose first row lies within the last `days` of the log.

    Without times none is.
    """
    known = shop.time > 0
    if not known.any():
        return np.zeros(shop.n_items, bool)
    first = np.full(shop.n_items, np.iinfo(np.int64).max)
    np.minimum.at(first, shop.item[known], shop.time[known])
    return first > shop.time.max() - days * DAY


def check_times(shop: Shop) -> None:
    """Raise PageLLMError for a log without times, of which nothing says which items are new."""
    if not (shop.time > 0).any():
        raise PageLLMError(
            "new_items: the log has no times, so nothing says which items are new\n"
            "  Name its column with --time_column when you prepare it, or leave --new_items out."
        )


def places(k: int, n: int) -> list[int]:
    """Slots, from 0, of n new items on a page of k: the middle of each n-th of the page."""
    return [(2 * j + 1) * k // (2 * n) for j in range(n)]


def with_new(page: list[int], fresh: list[int], new: np.ndarray, n: int) -> list[int]:
    """A page on which n items are new, if there are as many.

    page   items, the first slot first     fresh  new items that are not on it, the best first
    new    (N,) bool                       n      wanted; those that the page has already count

    The others keep their order; the last ones that are not new make room.
    """
    lacking = max(0, n - int(new[page].sum()))
    fresh = fresh[: min(lacking, int((~new[page]).sum()))]
    if not fresh:
        return page
    old = [at for at, item in enumerate(page) if not new[item]]
    gone = set(old[len(old) - len(fresh) :])
    out = [item for at, item in enumerate(page) if at not in gone]
    for at, item in zip(places(len(page), len(fresh)), fresh, strict=True):
        out.insert(at, item)
    return out


def ranks_with_new(
    item: np.ndarray, slots: np.ndarray, fresh: Sequence[Iterable[int]], new: np.ndarray, n: int
) -> np.ndarray:
    """(B, depth) ranks whose first `slots` are pages with n new items each, as by `with_new`.

    item   (B, depth) best first, -1 past the end of a row; slots (B,) of the page
    fresh  (B,) new items for each page, the best first

    What makes room on the page comes next after it, in its order.
    """
    out = item.copy()
    for row, more in enumerate(fresh):
        before = item[row, : slots[row]].tolist()
        page = with_new(before, list(more), new, n)
        if page is not before:
            kept = set(page)
            order = page + [i for i in item[row].tolist() if i >= 0 and i not in kept]
            out[row, : len(order)] = order[: item.shape[1]]
    return out
