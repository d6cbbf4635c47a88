"""What is known of a person at a moment: history, missions, bucket.

know = Known(orders.only("train"), mission_of_item)
contexts(shop, orders, ["u1", None], at)         one Context each, nothing at `at` or later in it
"""

from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np

from pagellm.data.orders import Orders, orders_of
from pagellm.data.shop import Rows, Shop
from pagellm.storefront.parts import Context

__all__ = ["Known", "contexts"]

HISTORY = 2000  # items of a history, newest first; more are left out
OWN_BUCKET = 20  # items that give a person a bucket of their own
BUSY = (40, 150)  # items that separate the three levels of activity


@dataclass(frozen=True)
class Known:
    """Everybody's history up to a moment, so that a context is a look-up.

    rows, count   items of every user, newest first, and the orders that hold each
    number        the shop's identifier -> user
    mission       (N,) mission of every item, -1 where unknown
    """

    rows: Rows
    count: np.ndarray
    number: dict[str, int]
    mission: np.ndarray
    n_missions: int
    at: int
    locale: str = "en"

    @classmethod
    def of(cls, shop: Shop, orders: Orders, mission: np.ndarray, k: int, at: int) -> "Known":
        rows, count = orders.where(orders.time < at).history()
        number = {name: at for at, name in enumerate(shop.user_ids)}
        return cls(rows, count, number, mission, k, at)

    def context(self, user: str | None, barred: np.ndarray | None = None, season=()) -> Context:
        """One person's. An unknown or absent user is cold."""
        at = self.number.get(user, -1) if user is not None else -1
        span = slice(0, 0) if at < 0 else slice(self.rows.indptr[at], self.rows.indptr[at + 1])
        item, count = self.rows.items[span][:HISTORY], self.count[span][:HISTORY]
        share = self.shares(item, count)
        return Context(
            user,
            self.bucket(user, item, share),
            self.at,
            item,
            count,
            share,
            np.zeros(0, np.int64) if barred is None else barred,
            tuple(season),
        )

    def shares(self, item: np.ndarray, count: np.ndarray) -> np.ndarray:
        """(k,) float32: the part of a person's orders in each mission; uniform without any."""
        name = self.mission[item]
        bought, times = name[name >= 0], count[name >= 0]
        total: np.ndarray = np.bincount(bought, times, minlength=self.n_missions)
        if not total.sum():
            total = np.ones(self.n_missions)
        return (total / total.sum()).astype(np.float32)

    def bucket(self, user: str | None, item: np.ndarray, share: np.ndarray) -> str:
        """Whose cached rows fit: one's own, those of people alike, or everybody's."""
        if not len(item):
            return f"cold:{self.locale}"
        if len(item) >= OWN_BUCKET:
            year, week, _ = datetime.fromtimestamp(self.at, UTC).isocalendar()
            return f"user:{user}:{year}-W{week:02d}"
        first, second = np.argsort(-share, kind="stable")[:2].tolist() if len(share) > 1 else (0, 0)
        return f"segment:{first}:{second}:{int(np.searchsorted(BUSY, len(item), side='right'))}"


def contexts(
    shop: Shop,
    orders: Orders | None,
    users: list[str | None],
    at: int,
    mission: np.ndarray | None = None,
    k: int = 20,
) -> list[Context]:
    """One context a user, in order. Without orders a user's positive rows count once each.

    mission  (N,) of every item; None: no missions are known, and the shares are uniform
    """
    orders = orders_of(shop) if orders is None else orders
    mission = np.full(shop.n_items, -1) if mission is None else mission
    known = Known.of(shop, orders, mission, k, at)
    return [known.context(user) for user in users]
