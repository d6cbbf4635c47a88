"""Hard constraints on a page, in the shop's own words, and the mask of items that they leave."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pagellm.data.shop import Catalogue

__all__ = ["SEEN", "Filters", "allowed_items", "category_members", "look_up"]


SEEN = ("hide", "allow")  # what becomes of items that the person has met


@dataclass(frozen=True)
class Filters:
    """Constraints that hold in every slot.

    None is no filter. An empty list of what is allowed allows nothing.
    """

    exclude: tuple[str, ...] = ()  # item ids that no slot may hold
    categories: tuple[str, ...] | None = None  # an item needs one of these
    in_stock: tuple[str, ...] | None = None  # only these item ids
    price_min: float | None = None  # an item of unknown price fails either bound
    price_max: float | None = None
    seen: str | None = None  # one of SEEN. allow: what the person liked before may stand on the
    # page again, what they disliked may not. None: what the Recommender does


def look_up(names: Iterable[str], known: dict[str, int]) -> tuple[list[int], list[str]]:
    """Dense ids of the names that are known; and the names that are not."""
    names = list(names)
    return [known[name] for name in names if name in known], [n for n in names if n not in known]


def category_members(catalogue: Catalogue) -> dict[str, np.ndarray]:
    """Category name (of any level), in alphabetical order -> dense ids of its items."""
    members: dict[str, list[int]] = {}
    for i, (names, leaf) in enumerate(zip(catalogue.categories, catalogue.leaf, strict=True)):
        for name in {*names, leaf} - {""}:
            members.setdefault(name, []).append(i)
    return {name: np.array(items) for name, items in sorted(members.items())}


def allowed_items(
    filters: Filters, item_of: dict[str, int], members: dict[str, np.ndarray], price: Tensor
) -> Tensor | None:
    """(N,) bool: items that pass the filters, exclude aside; None where no filter is set.

    item_of  id -> dense id    members  from category_members    price  (N,) float, NaN: unknown
    Unknown ids and categories match nothing.
    """
    f = filters
    if all(x is None for x in (f.categories, f.in_stock, f.price_min, f.price_max)):
        return None
    allowed = torch.ones(len(price), dtype=torch.bool)
    if f.categories is not None:
        found = [members[name] for name in f.categories if name in members]
        allowed &= only(np.concatenate([np.zeros(0, np.int64), *found]), len(price))
    if f.in_stock is not None:
        allowed &= only(np.array(look_up(f.in_stock, item_of)[0], np.int64), len(price))
    if f.price_min is not None:  # NaN compares false: an unknown price fails
        allowed &= price >= f.price_min
    if f.price_max is not None:
        allowed &= price <= f.price_max
    return allowed


def only(items: np.ndarray, n_items: int) -> Tensor:
    """(N,) bool, True at these dense ids."""
    mask = torch.zeros(n_items, dtype=torch.bool)
    mask[torch.from_numpy(items)] = True
    return mask
