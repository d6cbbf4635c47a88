"""What is known of a person at a moment: history, missions, bucket.

know = Known(orders.only("train"), mission_of_item)
contexts(shop, orders, ["u1", None], at)         one Context each, nothing at `at` or later in it
"""

from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np

from pagellm.data.orders import Orders, orders_of
from pagellm.data.shop import Rows, Shop, is_forgotten
from pagellm.storefront.parts import Context
from pagellm.storefront.policy import Policy

__all__ = ["Known", "contexts", "week_of"]

HISTORY = 2000  # items of a history, newest first; more are left out
OWN_BUCKET = 20  # items that give a person a bucket of their own
BUSY = (40, 150)  # numbers of items at which a higher level of activity begins


@dataclass(frozen=True)
class Known:
    """Everybody's history up to a moment, so that a context is a look-up.

    rows, count   items of every user, newest first, and the orders that hold each
    number        the shop's identifier -> user
    mission       (N,) mission of every item, -1 where unknown
    policy        whose calendar says which seasons are in force; None: it has none
    """

    rows: Rows
    count: np.ndarray
    number: dict[str, int]
    mission: np.ndarray
    n_missions: int
    at: int
    locale: str = "en"
    policy: Policy | None = None

    @classmethod
    def of(
        cls,
        shop: Shop,
        orders: Orders,
        mission: np.ndarray,
        k: int,
        at: int,
        policy: Policy | None = None,
    ) -> "Known":
        rows, count = orders.where(orders.time < at).history()
        number = {name: at for at, name in enumerate(shop.user_ids) if not is_forgotten(name)}
        return cls(rows, count, number, mission, k, at, policy=policy)

    def context(
        self,
        user: str | None,
        barred: np.ndarray | None = None,
        more: np.ndarray | None = None,
        at: int | None = None,
    ) -> Context:
        """One person's. An unknown or absent user is cold.

        more  (n,) items bought since, oldest first; one that is there twice was bought twice
        at    the moment; None: the end of what is known
        """
        row = self.number.get(user, -1) if user is not None else -1
        span = slice(0, 0) if row < 0 else slice(self.rows.indptr[row], self.rows.indptr[row + 1])
        item, count = self.rows.items[span], self.count[span]
        if more is not None and len(more):
            item, count = with_more(item, count, more)
        item, count = item[:HISTORY], count[:HISTORY]
        share = self.shares(item, count)
        at = self.at if at is None else at
        return Context(
            user,
            self.bucket(user, item, share, at),
            at,
            item,
            count,
            share,
            np.zeros(0, np.int64) if barred is None else barred,
            self.seasons(at),
        )

    def seasons(self, at: int) -> tuple[str, ...]:
        """Names of the calendar's entries in force at a moment (seconds), in its order."""
        if self.policy is None:
            return ()
        return tuple(entry["name"] for entry in self.policy.seasons(at))

    def shares(self, item: np.ndarray, count: np.ndarray) -> np.ndarray:
        """(k,) float32: the part of a person's orders in each mission; uniform without any."""
        name = self.mission[item]
        bought, times = name[name >= 0], count[name >= 0]
        total: np.ndarray = np.bincount(bought, times, minlength=self.n_missions)
        if not total.sum():
            total = np.ones(self.n_missions)
        return (total / total.sum()).astype(np.float32)

    def bucket(self, user: str | None, item: np.ndarray, share: np.ndarray, at: int) -> str:
        """Which cached rows are used: the person's own, those of similar people, or everybody's."""
        if len(item) >= OWN_BUCKET and user is not None:
            return f"user:{user}:{week_of(at)}"
        return self.segment(item, share)

    def segment(self, item: np.ndarray, share: np.ndarray) -> str:
        """The bucket of similar people: their two most frequent missions and how much they buy."""
        if not len(item):
            return f"cold:{self.locale}"
        first, second = np.argsort(-share, kind="stable")[:2].tolist() if len(share) > 1 else (0, 0)
        return f"segment:{first}:{second}:{int(np.searchsorted(BUSY, len(item), side='right'))}"


def week_of(at: int) -> str:
    """The ISO week of a moment (seconds), as 2017-W44."""
    year, week, _ = datetime.fromtimestamp(at, UTC).isocalendar()
    return f"{year}-W{week:02d}"


def with_more(item: np.ndarray, count: np.ndarray, more: np.ndarray):
    """Newest first: items bought since, then what was known; counts are added up."""
    newest, first, times = np.unique(more[::-1], return_index=True, return_counts=True)
    order = np.argsort(first)
    newest, times = newest[order], times[order]
    known = dict(zip(item.tolist(), count.tolist(), strict=True))
    times = times + np.array([known.get(i, 0) for i in newest.tolist()], dtype=np.int64)
    rest = ~np.isin(item, newest)
    return np.concatenate([newest, item[rest]]), np.concatenate([times, count[rest]])


def contexts(
    shop: Shop,
    orders: Orders | None,
    users: list[str | None],
    at: int,
    mission: np.ndarray | None = None,
    k: int = 20,
    policy: Policy | None = None,
) -> list[Context]:
    """One context a user, in order. Without orders a user's positive rows count once each.

    mission  (N,) of every item; None: no missions are known, and the shares are uniform
    policy   with the calendar of seasons; None: there are none
    """
    orders = orders_of(shop) if orders is None else orders
    mission = np.full(shop.n_items, -1) if mission is None else mission
    known = Known.of(shop, orders, mission, k, at, policy)
    return [known.context(user) for user in users]
