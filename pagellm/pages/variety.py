"""Variety inside decoding: what an item is worth more or less, given the items on the slots above.

    variety = Variety(Kin.of(shop.catalogue), "mmr", strength=1.0)
    above = variety.begin(B)                # nothing on the page yet
    logits + above.change                   # (B, N), before the next slot is filled
    above.add(item)                         # (B,) items that were put there; -1: none

The log-probability of item i in the next slot changes by

    mmr     - strength * (largest similarity to an item above)
    energy  + strength * (LAMBDA_D novel_i - LAMBDA_R redundant_i)      as in rerank.energy

So the strength is in nats: with mmr an item that is all alike to one above needs exp(strength)
times the probability of an item that is like none. Every mode of decoding adds the same change, and
log-probabilities of a page are those of the changed distribution.
"""

from dataclasses import dataclass, field

import numpy as np

from pagellm.pages.energy import LAMBDA_D, LAMBDA_R
from pagellm.pages.rerank import Kin

__all__ = ["KINDS", "STRENGTH", "Above", "Variety"]

KINDS = ("none", "mmr", "energy")
STRENGTH = 1.0  # nats
KEPT = 16 * 2**20  # float32 numbers of similarities that are kept, 64 MB


@dataclass
class Variety:
    """One kind of variety at one strength, for pages of one catalogue. method: mmr or energy."""

    kin: Kin
    method: str
    strength: float
    rows: dict[int, np.ndarray] = field(default_factory=dict)  # item -> what `cost` gives

    def __post_init__(self):
        if self.method not in KINDS[1:] or not 0 <= self.strength < np.inf:
            raise ValueError(
                f"variety {self.method!r} of strength {self.strength}: want "
                f"{' or '.join(KINDS[1:])}, and 0 or more"
            )

    def begin(self, pages: int) -> "Above":
        """What is above the first slot of some pages: nothing."""
        n = len(self.kin.leaf)
        if self.method == "mmr":
            return Above(self, (np.zeros((pages, n), np.float32),))
        novel = np.repeat((self.kin.leaf >= 0)[None], pages, 0)
        return Above(self, (novel, np.zeros((pages, n), bool)))

    def cost(self, item: int) -> np.ndarray:
        """(N,) float32: minus the strength times the similarity of every item to this one."""
        if item not in self.rows:
            if (len(self.rows) + 1) * len(self.kin.leaf) > KEPT:
                self.rows.clear()
            every = np.arange(len(self.kin.leaf))[None]
            like = self.kin.similarity(every, np.array([item]))[0]
            self.rows[item] = (-self.strength * like).astype(np.float32)
        return self.rows[item]


@dataclass
class Above:
    """The items above the next slot of B pages, as far as they change what comes next.

    known  of mmr: (B, N) minus strength times the largest similarity to an item above. Of energy:
           (B, N) bool, whether an item is novel, and whether it is redundant
    """

    variety: Variety
    known: tuple[np.ndarray, ...]

    @property
    def change(self) -> np.ndarray:
        """(B, N) float32, in nats."""
        if self.variety.method == "mmr":
            return self.known[0]
        novel, redundant = self.known
        worth = LAMBDA_D * novel - LAMBDA_R * redundant
        return (self.variety.strength * worth).astype(np.float32)

    def add(self, item: np.ndarray) -> None:
        """item (B,): what was put on each page; -1: nothing."""
        kin = self.variety.kin
        for row in np.flatnonzero(item >= 0):
            one = int(item[row])
            if self.variety.method == "mmr":
                cost = self.known[0][row]
                np.minimum(cost, self.variety.cost(one), out=cost)
                continue
            novel, redundant = (x[row] for x in self.known)
            novel[kin.leaf == kin.leaf[one]] = False
            redundant[kin.near.of(one)] = True

    def select(self, rows: np.ndarray) -> None:
        """Keep these pages, in this order; one may be repeated."""
        self.known = tuple(x[rows] for x in self.known)
