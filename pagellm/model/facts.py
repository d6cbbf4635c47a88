"""What a page prompt says of an item of the history, beside its token.

    item_facts(vocab.words, catalogue, ("category", "price"))   [[412, 87], [412, 9, 88], ...]

The facts of an item are written in words, which mean the same of every item: two drums share the
word, a cheap drum and a cheap flute share another. `pagellm sft --show category,price` keeps them
with the vocabulary, so that every later stage writes the same prompts.
"""

from collections.abc import Callable

import numpy as np

from pagellm.data.shop import Catalogue

__all__ = ["FACTS", "item_facts", "price_levels"]

FACTS = ("category", "brand", "price")
LEVELS = ("cheapest", "cheap", "average", "dear", "dearest")
LONGEST = 3  # tokens of one fact; what is longer is cut


def price_levels(price: np.ndarray) -> np.ndarray:
    """(N,) index into LEVELS by fifths of the shop's known prices; -1 where unknown.

    price  (N,) NaN where unknown
    """
    known = ~np.isnan(price)
    out = np.full(len(price), -1)
    if known.any():
        edges = np.quantile(price[known], np.arange(1, len(LEVELS)) / len(LEVELS))
        out[known] = np.searchsorted(edges, price[known], side="right")
    return out


def item_facts(
    words: Callable[[str], list[int]], catalogue: Catalogue, names: tuple[str, ...]
) -> list[list[int]]:
    """Word tokens of every item, fact after fact; what is unknown is left out.

    words  text -> its tokens, of which each fact keeps LONGEST
    names  some of FACTS
    """
    level = price_levels(catalogue.price)
    text = {
        "category": catalogue.leaf,
        "brand": catalogue.brand,
        "price": [LEVELS[i] if i >= 0 else "" for i in level],
    }
    return [
        [
            token
            for name in names
            if text[name][item]
            for token in words(f" {text[name][item]}")[:LONGEST]
        ]
        for item in range(len(catalogue))
    ]
