"""What PPO pays a slot: the chance that its item is picked, less what it repeats.

    reward = OutcomeReward.of(composer, users, seen, k=20)
    reward(user, item, mask)                     (B, K) what every slot of some pages earns
    reward.maximise(users, k)                    (U, K) the page of most reward, slot by slot

The composer's outcome model (model/outcome.py) gives every candidate of a user a calibrated
chance. Slot k of a page with items i_1, i_2, ... earns

    (v(i_k) - spread * max over j < k of similarity(i_k, i_j)) / log2(k + 1) / unit

v is the chance times exp(worth * stars), with the worth and spread that validation chose for
composed pages. `unit` is the mean v of the best k candidates, so rewards are near 1.

An item outside the user's pool of candidates is worth as much as the least of them. The outcome
model was never asked about such items, so a policy could win by its mistakes there.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pagellm.data.shop import Rows
from pagellm.model.composer import Composer
from pagellm.pages.compose import Opinion
from pagellm.pages.rerank import Kin, mmr

__all__ = ["OutcomeReward", "repeated", "similarities"]


TABLE = 4096  # items up to which all similarities are held at once: 64 MiB


def similarities(kin: Kin, n_items: int) -> np.ndarray | None:
    """(N, N) float32 similarities of all items; None where they are too many to hold."""
    if n_items > TABLE:
        return None
    every = np.arange(n_items)[None]
    return np.concatenate(
        [kin.similarity(every, np.array([i])).astype(np.float32) for i in range(n_items)]
    )


def repeated(item: np.ndarray, kin: Kin, table: np.ndarray | None = None) -> np.ndarray:
    """The largest similarity of every slot's item to one above it: (B, K) float64, 0 at slot 1.

    item   (B, K) ids; ids below 0 are empty slots at the end of a row and resemble nothing
    table  of `similarities`, where it is at hand
    """
    out, at = np.zeros(item.shape), np.maximum(item, 0)
    for k in range(1, item.shape[1]):
        above, own = at[:, :k], at[:, k]
        like = kin.similarity(above, own) if table is None else table[own[:, None], above]
        out[:, k] = like.max(1)
    return np.where(item >= 0, out, 0.0)


@dataclass
class OutcomeReward:
    """Chances of some users' candidates, and what a page of them earns.

    user    (U,) rising; a user who is not among them cannot be judged
    item    (U, M) candidates, -1 where there is none
    value   (U, M) chance times worth, 0 where there is none
    kin     how similar items are
    spread  price of repetition, in chances times worth
    unit    mean value of the best candidates
    """

    user: np.ndarray
    item: np.ndarray
    value: np.ndarray
    kin: Kin
    spread: float
    unit: float

    @classmethod
    def of(cls, composer: Composer, users: np.ndarray, seen: Rows, k: int) -> "OutcomeReward":
        """Ask the outcome model about the candidates of `users`, none of them in `seen`."""
        opinion, _, _ = composer.opinion(users, seen)
        return cls.from_opinion(
            opinion, composer.kin, composer.taste.worth, composer.taste.spread, k
        )

    @classmethod
    def from_opinion(
        cls, o: Opinion, kin: Kin, worth: float = 0.0, spread: float = 0.0, k: int = 20
    ) -> "OutcomeReward":
        """spread in units of the mean value of the best k candidates (compose.Taste)."""
        value = np.where(o.item >= 0, o.chance * np.exp(worth * (o.stars + o.mean)), 0.0)
        best = -np.sort(-value, axis=1)[:, :k]
        unit = max(float(best.mean()) if best.size else 0.0, 1e-9)
        return cls(o.user, o.item, value, kin, spread * unit, unit)

    def __post_init__(self):
        if (np.diff(self.user) <= 0).any():
            raise ValueError("OutcomeReward: want users in rising order, none of them twice")
        self.table = similarities(self.kin, len(self.kin.leaf)) if self.spread else None
        self.width = int(self.item.max(initial=0)) + 1
        key = np.where(
            self.item >= 0, np.arange(len(self.user))[:, None] * self.width + self.item, -1
        ).ravel()
        order = np.argsort(key, kind="stable")
        self.key, self.sorted_value = key[order], self.value.ravel()[order]
        there = np.where(self.item >= 0, self.value, np.inf).min(1, initial=np.inf)
        self.least = np.where(np.isfinite(there), there, 0.0)

    def values(self, user: np.ndarray, item: np.ndarray) -> np.ndarray:
        """v of items (B, K) for users (B,): (B, K) float64."""
        row = np.searchsorted(self.user, user)
        if (row >= len(self.user)).any() or (
            self.user[np.minimum(row, len(self.user) - 1)] != user
        ).any():
            raise ValueError("OutcomeReward: asked about a user whose candidates were not judged")
        key = np.where(item < self.width, row[:, None] * self.width + item, -2)
        at = np.minimum(np.searchsorted(self.key, key), len(self.key) - 1)
        return np.where(self.key[at] == key, self.sorted_value[at], self.least[row][:, None])

    def __call__(self, user: np.ndarray, item: Tensor, mask: Tensor) -> Tensor:
        """What every slot earns: (B, K) float32, 0 off the mask.

        user (B,)    item, mask (B, K) as in decode.Pages
        """
        ids = torch.where(mask, item, -1).cpu().numpy()
        paid = self.values(user, np.maximum(ids, 0))
        if self.spread:
            paid = paid - self.spread * repeated(ids, self.kin, self.table)
        paid = paid / self.unit / np.log2(np.arange(2, ids.shape[1] + 2))
        return torch.where(mask, torch.from_numpy(paid).float().to(item.device), 0.0)

    def maximise(self, users: np.ndarray, k: int) -> np.ndarray:
        """Pages (U, k) that take in every slot what adds most to the reward; -1 past the end."""
        row = np.searchsorted(self.user, users)
        item = self.item[row]
        value = np.where(item >= 0, self.value[row], -np.inf)
        column = mmr(item, value, self.kin, k, self.spread)
        page = np.where(column >= 0, np.take_along_axis(item, np.maximum(column, 0), 1), -1)
        return np.pad(page, ((0, 0), (0, k - page.shape[1])), constant_values=-1)
