"""A grocery of twelve items, small enough to work out by hand."""

import numpy as np

from pagellm.data.orders import Orders
from pagellm.data.shop import SPLITS, Catalogue, Shop

__all__ = ["AT", "HOUSEHOLDS", "STOCK", "catalogue", "golden_orders", "golden_shop"]

ITEMS = (
    ("g01", "Organic whole milk", ("Dairy", "Milk")),
    ("g02", "Oat milk barista", ("Dairy", "Plant milk")),
    ("g03", "Greek yogurt plain", ("Dairy", "Yogurt")),
    ("g04", "Salted butter", ("Dairy", "Butter")),
    ("g05", "Whole bean coffee", ("Drinks", "Coffee")),
    ("g06", "Ground coffee dark", ("Drinks", "Coffee")),
    ("g07", "Green tea bags", ("Drinks", "Tea")),
    ("g08", "Honey oat granola", ("Breakfast", "Granola")),
    ("g09", "Corn flakes cereal", ("Breakfast", "Cereal")),
    ("g10", "Wheat bread sliced", ("Bakery", "Bread")),
    ("g11", "Dark chocolate bar", ("Snacks", "Chocolate")),
    ("g12", "Dish soap lemon", ("Household", "Cleaning")),
)
HOUSEHOLDS = np.array([90, 35, 50, 40, 60, 45, 30, 25, 55, 80, 65, 20])
STOCK = np.array([True] * 11 + [False])  # g12 is sold out
AT = 1509494400
DAY = 86_400


def catalogue() -> Catalogue:
    ids, titles, paths = zip(*ITEMS, strict=True)
    n = len(ITEMS)
    leaf = [path[-1] for path in paths]
    return Catalogue.of(ids, titles, [""] * n, paths, leaf, [""] * n, np.full(n, np.nan))


def golden_orders() -> Orders:
    """u1's baskets: g01 in 5, g05 in 4, g10 in 3, g08 in 1; u2 bought g11 and g03 once."""
    lines = []
    for basket, items in enumerate(((0, 4, 9), (0, 4, 9), (0, 4, 9), (0, 4, 7), (0,))):
        lines += [(0, item, basket, AT - (5 - basket) * DAY, 0) for item in items]
    lines += [(1, item, 9, AT - 2 * DAY, 0) for item in (10, 2)]
    lines += [(0, item, 20, AT + DAY, 2) for item in (0, 1, 4, 8)]
    user, item, basket, time, split = (
        np.array(c, dtype=np.int64) for c in zip(*lines, strict=True)
    )
    ones = np.ones(len(lines))
    return Orders(
        user, item, basket, time, ones.astype(np.int64), ones.astype(np.float32),
        split.astype(np.int8), 3, 12,
    )  # fmt: skip


def golden_shop(path=None) -> Shop:
    """Three people: u1 and u2 with orders, u3 without."""
    train = golden_orders().only("train")
    user, item, _, last = train.pairs()
    order = np.lexsort((item, last, user))
    n = len(user)
    return Shop(
        3, 12, user[order], item[order], np.full(n, np.nan, np.float32), last[order],
        np.ones(n, bool), np.full(n, SPLITS.index("train"), np.int8), catalogue(),
        ["u1", "u2", "u3"], path=path,
    )  # fmt: skip
